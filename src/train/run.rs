//! A run: stages in order, each starting from what the one before produced.

use std::{
    fs,
    hash::{BuildHasher, RandomState},
    path::PathBuf,
    sync::atomic::AtomicBool,
    thread,
    time::{Duration, Instant},
};

use super::{
    agreement::{told_by_all, told_by_first},
    config::{Method, RunConfig, Source, StageConfig},
    events::{Event, Observer},
    run_folder::{self, CONFIG_FILE, StartPoint},
    start::Origin,
    team::Devices,
    trainer::{StageOutcome, Trainer},
};
use crate::{
    error::{Error, Result},
    gpu::Gpu,
    hosts::Hosts,
};

/// What one host has written another one sees within this time, as network file systems go.
const SEEN_WITHIN: Duration = Duration::from_secs(2);

/// What a run left: the outcome of each stage, trained now or before.
pub struct RunOutcome {
    pub stages: Vec<Option<StageOutcome>>,
    /// The last stage's model, and its adapter.
    pub result: Origin,
}

/// Trains every stage that is not finished. The run folder is checked before anything is loaded. A stage that does not
/// fit into the devices' memory is not begun.
///
/// # Errors
/// `Memory` for such a stage, with what would make it fit; `Device` for a device that is lost; `Interrupted` when `stop`
/// was set: the hint says how to go on.
pub fn train(
    run: &RunConfig,
    resume: bool,
    devices: &Devices,
    hosts: &mut dyn Hosts,
    stop: &AtomicBool,
    observer: &mut dyn Observer,
) -> Result<RunOutcome> {
    let dirs = run.stage_dirs();
    if resume && run.output_dir.join(CONFIG_FILE).exists() {
        run.check_resumable(&RunConfig::load_saved(&run.output_dir)?)?;
    }
    // Opening the first model finds most mistakes before a folder is made.
    if let Some(first) = run.stages.first().filter(|_| !resume)
        && let Some(model) = &first.model_name_or_path
    {
        super::start::open_folder(model)?;
    }
    let start = open_run(run, &dirs, resume, hosts).inspect_err(|_| remove_if_untouched(run, hosts))?;
    let mut outcomes = Vec::new();
    let mut before: Option<Origin> = None;
    for (index, stage) in run.stages.iter().enumerate() {
        let outcome;
        if index >= start.stage {
            let checkpoint = start.checkpoint.as_ref().filter(|_| index == start.stage);
            let checkpoint = checkpoint.map(|(_, path)| path.as_path());
            let trainer = Trainer::new(stage, before.as_ref(), checkpoint, devices, hosts, observer);
            let trainer = trainer.map_err(|error| devices.named(error));
            let trainer = trainer.inspect_err(|_| remove_if_untouched(run, hosts))?;
            // From here on the folder holds a run.
            if hosts.rank() == 0 {
                crate::formats::atomic::write_file(&run.output_dir.join(CONFIG_FILE), run.to_toml().as_bytes())?;
            }
            observer.event(Event::StageStart(&trainer.header()));
            let trained = trainer.run(stop, hosts, observer);
            outcome = Some(trained.map_err(|error| how_to_go_on(devices.named(error), run, hosts.count()))?);
            devices.gpus.iter().for_each(Gpu::trim);
        } else {
            observer.event(Event::Note(&format!("stage {} was finished before", stage.title())));
            let finished = run_folder::finished(&stage.output_dir)?;
            outcome = finished.map(|finished| StageOutcome::of(&stage.output_dir, &finished));
        }
        outcomes.push(outcome);
        before = Some(produced(stage, before));
    }
    let result = before.ok_or_else(|| Error::usage("the config has no stage"))?;
    Ok(RunOutcome { stages: outcomes, result })
}

/// As [`run_folder::open_run`], by the first host for all. What it writes into output_dir all the others must see.
fn open_run(run: &RunConfig, dirs: &[PathBuf], resume: bool, hosts: &mut dyn Hosts) -> Result<StartPoint> {
    if hosts.count() == 1 {
        return run_folder::open_run(&run.output_dir, dirs, resume);
    }
    // A name of which nobody remembers that it was not there, and which the next start would remove.
    let mark = |word: &str| run.output_dir.join(format!(".shared-{word}.partial"));
    let begin = || {
        let start = run_folder::open_run(&run.output_dir, dirs, resume)?;
        let word = format!("{:016x}", RandomState::new().hash_one(()));
        fs::write(mark(&word), &word).map_err(|error| Error::writing(&mark(&word), error))?;
        Ok((start, word))
    };
    let (start, word): (StartPoint, String) = told_by_first(begin, hosts)?;
    let mut made = dirs.iter().chain(start.checkpoint.as_ref().map(|(_, path)| path));
    let missing = made.find(|path| !is_so_soon(|| path.exists()));
    let missing = missing.map(|path| format!("host {} does not see {}", hosts.name(), path.display()));
    let other = || {
        let (name, folder) = (hosts.name(), run.output_dir.display());
        format!("host {name} does not see what the first one writes into {folder}: it has another folder there")
    };
    let missing = missing
        .or_else(|| (!is_so_soon(|| fs::read_to_string(mark(&word)).is_ok_and(|there| there == word))).then(other));
    // Nobody goes on before all have looked: a run that is refused takes its folders away.
    let told = told_by_all(&missing, hosts);
    if hosts.rank() == 0 {
        let _ = fs::remove_file(mark(&word));
    }
    match told?.into_iter().flatten().next() {
        Some(message) => Err(Error::usage(message).hint("output_dir must be on storage that all hosts share")),
        None => Ok(start),
    }
}

/// Whether it is so now, or once what another host has written is seen here.
fn is_so_soon(is_so: impl Fn() -> bool) -> bool {
    let begun = Instant::now();
    loop {
        let seen = is_so();
        if seen || begun.elapsed() > SEEN_WITHIN {
            return seen;
        }
        thread::sleep(SEEN_WITHIN / 20);
    }
}

/// What a finished stage leaves to the next one.
fn produced(stage: &StageConfig, before: Option<Origin>) -> Origin {
    match stage.method {
        Method::Projector | Method::Full => {
            Origin { model: Source::Local(stage.output_dir.join("model")), adapter: None }
        }
        Method::Lora | Method::Qlora => Origin {
            model: match (&stage.model_name_or_path, before) {
                (None, Some(before)) => before.model,
                (Some(model), _) => model.clone(),
                (None, None) => Source::Local(stage.output_dir.join("model")),
            },
            adapter: Some(stage.output_dir.join("adapter")),
        },
    }
}

/// A run that failed before its first step leaves no folder behind, unless it was there with something in it.
fn remove_if_untouched(run: &RunConfig, hosts: &dyn Hosts) {
    if hosts.rank() > 0 || run.output_dir.join(CONFIG_FILE).exists() {
        return;
    }
    // Only empty folders go: remove_dir refuses others.
    for dir in run.stage_dirs() {
        let _ = std::fs::remove_dir(dir);
    }
    let _ = std::fs::remove_dir(&run.output_dir);
}

fn how_to_go_on(error: Error, run: &RunConfig, hosts: usize) -> Error {
    if error.kind == crate::error::ErrorKind::Interrupted {
        let command = format!("wgpu-llava train --resume --output-dir {}", run.output_dir.display());
        return error.hint(match hosts {
            1 => format!("go on with: {command}"),
            _ => format!("go on, started on these {hosts} hosts or on others that share the folder, with: {command}"),
        });
    }
    error
}
