//! The command line: one file a command. The only layer that prints, reads the environment, or gives exit codes.
//!
//! Data that was asked for goes to stdout, everything a person reads to stderr.

mod answer;
pub mod args;
mod bench;
mod chat;
mod config;
mod convert;
mod devices;
mod estimate;
mod eval;
mod generate;
mod hosts;
mod hub;
mod interrupt;
mod merge;
pub mod recipes;
mod report;
mod score;
mod shaders;
mod train;
mod tuning;
pub mod ui;

use std::{env, process::ExitCode};

use crate::{
    error::{Error, Result},
    formats::peft::Adapter,
    gpu::{AdapterOptions, Gpu},
    hub::Wanted,
    models::{
        loading::Loading,
        open::{Opened, Place, load, no_folder},
    },
    train::{
        config::{DeviceChoice, Precision, Source},
        events::{Event, Observer},
    },
};
use args::{Backend, Cli, Command, GlobalArgs, ModelArgs, RecipesCommand};
use ui::Ui;

/// Parses the command line, runs the command, says what went wrong.
pub fn main() -> ExitCode {
    let cli = match args::parse(env::args_os()) {
        Ok(cli) => cli,
        Err(code) => return ExitCode::from(code),
    };
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => ExitCode::from(tell(error, &cli)),
    }
}

/// Says what went wrong; the exit code for it.
fn tell(error: Error, cli: &Cli) -> u8 {
    let error = report::way_out(error, &cli.command);
    report::print_error(&error);
    report::exit_code(error.kind)
}

fn run(cli: &Cli) -> Result<()> {
    let global = &cli.global;
    match &cli.command {
        Command::Devices(args) => devices::run(args, global),
        Command::Train(args) => train::run(args, global, &|error| tell(error, cli)),
        Command::Generate(args) => generate::run(args, global),
        Command::Chat(args) => chat::run(args, global),
        Command::Score(args) => score::run(args, global),
        Command::Eval(args) => eval::run(args, global),
        Command::Convert(args) => convert::run(args, global),
        Command::Merge(args) => merge::run(args, global),
        Command::Shaders(args) => shaders::run(args, global),
        Command::Recipes(RecipesCommand::Ls) => report::print_data(&recipes::list()),
        Command::Recipes(RecipesCommand::Keys) => report::print_data(&recipes::keys()),
        Command::Recipes(RecipesCommand::Show { name }) => report::print_data(&recipes::find(name)?.text),
        Command::Recipes(RecipesCommand::Copy { name, path }) => {
            let path = recipes::copy(name, path.as_deref())?;
            Ui::new(global.quiet, false).line(&format!("wrote {}", path.display()));
            Ok(())
        }
        Command::Completions(args) => report::print_data(&args::completions(args.shell)),
        Command::Estimate(args) => estimate::run(args, global),
        Command::Bench(args) => bench::run(args, global),
    }
}

fn backend(global: &GlobalArgs) -> Option<&'static str> {
    global.backend.map(|backend| match backend {
        Backend::Vulkan => "vulkan",
        Backend::Metal => "metal",
        Backend::Dx12 => "dx12",
        Backend::Gl => "gl",
    })
}

/// Opens the adapter of `--device`, or the best one, and says which it is.
fn open_device(global: &GlobalArgs, ui: &mut Ui) -> Result<Gpu> {
    let gpu = open_adapter(global, global.device.clone())?;
    say_device(&gpu, 1, global.device.is_some(), ui);
    tuning::take_known(&gpu, ui);
    Ok(gpu)
}

/// Opens every device of a config, or the best one; the same adapter may be named several times, and is another device
/// each time.
fn open_devices(global: &GlobalArgs, devices: &[DeviceChoice], ui: &mut Ui) -> Result<Vec<Gpu>> {
    let Some(last) = devices.len().checked_sub(1) else { return Ok(vec![open_device(global, ui)?]) };
    let mut gpus: Vec<Gpu> = Vec::new();
    for choice in devices {
        gpus.push(open_adapter(global, Some(choice.to_string()))?);
    }
    let mut first = 0;
    for at in 0..=last {
        if at == last || gpus[at + 1].facts().index != gpus[first].facts().index {
            say_device(&gpus[first], at + 1 - first, true, ui);
            first = at + 1;
        }
    }
    gpus.iter().for_each(|gpu| tuning::take_known(gpu, ui));
    Ok(gpus)
}

/// Opens the device for a model that is asked, or several for its layers, where `--device` lists them.
fn open_answering(global: &GlobalArgs, ui: &mut Ui) -> Result<Vec<Gpu>> {
    match global.devices() {
        Some(several) if several.len() > 1 => open_devices(global, &several, ui),
        _ => Ok(vec![open_device(global, ui)?]),
    }
}

fn open_adapter(global: &GlobalArgs, device: Option<String>) -> Result<Gpu> {
    Gpu::open(&AdapterOptions { device, backend: backend(global).map(str::to_owned), ..AdapterOptions::default() })
}

fn say_device(gpu: &Gpu, times: usize, chosen: bool, ui: &mut Ui) {
    let facts = gpu.facts();
    let times = if times > 1 { format!("{times} times ") } else { String::new() };
    ui.line(&format!("on {times}{}: {} ({}, {})", facts.index, facts.name, facts.backend, facts.driver));
    if facts.is_cpu {
        let why = if chosen { "as asked" } else { "no GPU was found" };
        ui.line(&format!("  this adapter is the processor itself ({why}): it works, but slowly"));
    }
}

/// Something like what a command will do with a model, for a device that only counts.
struct Rehearsal<'a> {
    tune: bool,
    run: &'a dyn Fn(&Opened) -> Result<()>,
}

/// Opens a device and a model for inference; what is rehearsed may be tuned first.
fn open_model(args: &ModelArgs, global: &GlobalArgs, rehearsal: Rehearsal<'_>, ui: &mut Ui) -> Result<Opened> {
    let working_dir =
        env::current_dir().map_err(|error| Error::failed("the current folder is gone").caused_by(error))?;
    let source = hub::local(args.source(&working_dir), Wanted::Model, ui)?;
    let adapter = args.adapter.as_ref().map(|path| hub::local_path(path, Wanted::Adapter, ui)).transpose()?;
    let tower = args.vision_tower.as_ref().map(|path| hub::local_path(path, Wanted::Tower, ui)).transpose()?;
    let place = match &source {
        Source::Embedded(name) => Place::Embedded(name),
        Source::Local(path) => Place::Folder(path, tower.as_deref()),
        Source::Hub(name) => return Err(no_folder(name)),
    };
    // Files that are wrong are told before a device is opened.
    let folder = place.folder()?;
    let adapter = adapter.as_ref().map(|path| Adapter::read(path, folder.config())).transpose()?;
    let gpus = open_answering(global, ui)?;
    let gpu = &gpus[0];
    let precision = global.precision.map(Precision::dtype);
    tuning::prepare(&gpus, rehearsal.tune, ui, || {
        let counting = Gpu::counting(gpu.facts().clone());
        let progress = &mut |_, _| ();
        let mut loading = Loading::of_frozen(precision, progress);
        (rehearsal.run)(&load(std::slice::from_ref(&counting), place.folder()?, adapter.as_ref(), &mut loading)?)?;
        Ok(counting.launches())
    })?;
    let progress = &mut |done, total| ui.event(Event::loaded(done, total));
    load(&gpus, folder, adapter.as_ref(), &mut Loading::of_frozen(precision, progress))
}
