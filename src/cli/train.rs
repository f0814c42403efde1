//! `wgpu-llava train`: resolves the config, trains, evaluates, reports.

use std::{
    env,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{
    args::{GlobalArgs, TrainArgs},
    config as resolve, hosts, hub, interrupt, report as errors, tuning,
    ui::{Ui, shown},
};
use crate::{
    data::{Template, Version},
    error::{Error, ErrorKind, Result},
    eval,
    gpu::{Gpu, Launches},
    hosts::Hosts,
    train::{
        check,
        config::{RunConfig, Source},
        estimate::estimate,
        metrics, plot,
        report::{self, ReportData, StageReport},
        run::{self, RunOutcome},
        run_folder::CONFIG_FILE,
        start::open_folder,
        team::Devices,
    },
};

/// `tell` says what went wrong and gives the exit code for it.
pub fn run(args: &TrainArgs, global: &GlobalArgs, tell: &dyn Fn(Error) -> u8) -> Result<()> {
    let mut ui = Ui::new(global.quiet, global.verbose);
    if args.dry_run {
        return dry_run(config(args, global, SystemTime::now())?, &mut ui);
    }
    let mut hosts = hosts::open(&mut ui)?;
    // The first host speaks for all, unless something goes wrong.
    let mut ui = Ui::new(global.quiet || hosts.rank() > 0, global.verbose);
    match train(args, global, &mut *hosts, &mut ui) {
        Ok(()) => hosts.finish(),
        Err(error) if hosts.count() == 1 => Err(error),
        // A checkpoint is saved, and every host knows. It is told before one leaves: with such a code the launcher ends
        // the others.
        Err(error) if error.kind == ErrorKind::Interrupted => {
            let code = errors::exit_code(error.kind);
            if hosts.rank() == 0 {
                tell(error);
            }
            hosts.finish()?;
            std::process::exit(i32::from(code))
        }
        Err(error) => {
            let message = format!("rank {} on {}: {}", hosts.rank(), hosts.name(), error.message);
            let code = tell(Error { message, ..error });
            hosts.abort(code);
            std::process::exit(i32::from(code));
        }
    }
}

fn config(args: &TrainArgs, global: &GlobalArgs, now: SystemTime) -> Result<RunConfig> {
    let working_dir =
        env::current_dir().map_err(|error| Error::failed("the current folder is gone").caused_by(error))?;
    resolve::run_config(args, global, &working_dir, now)
}

/// The first host's clock: a new run's folder is named by it.
fn now(hosts: &mut dyn Hosts) -> Result<SystemTime> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut told = since.as_secs().to_le_bytes().to_vec();
    hosts.broadcast(0, &mut told)?;
    let seconds = told.as_chunks().0.first().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    Ok(UNIX_EPOCH + Duration::from_secs(seconds))
}

fn train(args: &TrainArgs, global: &GlobalArgs, hosts: &mut dyn Hosts, ui: &mut Ui) -> Result<()> {
    let mut config = config(args, global, now(hosts)?)?;
    // Looked for where it matters alone: a network file system remembers for a while that a folder was not there.
    let begins = args.resume && !config.output_dir.join(CONFIG_FILE).exists();
    if begins && args.run.config.is_none() && args.run.recipe.is_none() {
        return Err(Error::usage(format!("there is no run in {} to go on with", shown(&config.output_dir)))
            .hint("--output-dir names its folder; a config or a recipe says what to begin where there is none"));
    }
    hub::localize(&mut config, ui)?;
    let gpus = super::open_devices(global, &config.devices, ui)?;
    let gpu = gpus[0].clone();
    if begins {
        ui.line(&format!("  nothing to go on with in {}: starting from the beginning", shown(&config.output_dir)));
    }
    tuning::prepare(&gpus, args.tune.tune, ui, || {
        let mut launches = Launches::default();
        for stage in estimate(&config.stages, gpu.facts(), gpus.len())? {
            launches.add_questions(&stage.launches);
        }
        Ok(launches)
    })?;
    // A model that was split for its training may fit no single device afterwards either.
    let split = config.stages.iter().any(|stage| stage.layer_split);
    let answering = gpus[..if split { gpus.len() } else { 1 }].to_vec();
    let stop = interrupt::install(hosts.count() == 1)?;
    let devices = Devices { gpus, checked: !args.force, slow: None };
    let outcome = run::train(&config, args.resume, &devices, hosts, stop, ui)?;
    drop(devices);
    if hosts.rank() > 0 {
        return Ok(());
    }
    let results = evaluate(&config, &outcome, &answering, ui)?;
    let path = config.output_dir.join("report.html");
    report::write_report(&path, &report_data(&config, &outcome, &gpu, results)?)?;
    ui.line(&format!("report: {}", shown(&path)));
    for command in next_commands(&config, &outcome) {
        ui.line(&format!("  {command}"));
    }
    Ok(())
}

/// The config as resolved, with the origin of each value, on stdout; then what it would do, or what is wrong with it.
fn dry_run(mut config: RunConfig, ui: &mut Ui) -> Result<()> {
    for stage in &config.stages {
        Version::check(&stage.version)?;
    }
    errors::print_data(&resolve::describe(&config))?;
    hub::localize(&mut config, ui)?;
    for line in check::check(&config, ui)? {
        ui.line(&line);
    }
    Ok(())
}

fn evaluate(config: &RunConfig, outcome: &RunOutcome, gpus: &[Gpu], ui: &mut Ui) -> Result<Vec<eval::Outcome>> {
    let mut results = Vec::new();
    let version = asking_version(config);
    for task in &config.eval_after {
        let request = eval::Request {
            task,
            version,
            model: &outcome.result.model.to_string(),
            adapter: outcome.result.adapter.as_deref(),
            limit: config.eval_limit,
            out: Some(&config.output_dir.join("eval")),
            data: None,
        };
        let result = eval::run(gpus, &request, ui)?;
        ui.line(&result.table());
        results.push(result);
    }
    Ok(results)
}

fn report_data(config: &RunConfig, outcome: &RunOutcome, gpu: &Gpu, results: Vec<eval::Outcome>) -> Result<ReportData> {
    let mut stages = Vec::new();
    for (stage, trained) in config.stages.iter().zip(&outcome.stages) {
        let path = stage.output_dir.join(metrics::FILE_NAME);
        let measured = metrics::read(&path)?;
        let model = hub::written_model(stage).unwrap_or("the stage before").to_string();
        let data: Vec<String> = stage.data_path.iter().map(|entry| entry.path.to_string()).collect();
        let settings =
            stage.values.iter().map(|setting| (setting.key.to_string(), setting.value.to_string())).collect();
        let mut row = StageReport {
            name: stage.title().to_string(),
            method: stage.method.to_string(),
            model,
            data: data.join(", "),
            steps: measured.last().map_or(0, |last| last.step),
            final_loss: measured.last().map(|last| last.loss),
            settings,
            loss_svg: plot::loss_svg(stage.title(), &measured)?,
            ..Default::default()
        };
        if let Some(trained) = trained {
            row.records = trained.records;
            row.seconds = trained.seconds;
            row.trainable_parameters = trained.trainable_parameters;
            row.total_parameters = trained.total_parameters;
            row.output = shown(&trained.output);
        }
        stages.push(row);
    }
    let facts = gpu.facts();
    Ok(ReportData {
        title: format!("wgpu-llava: {}", config.output_dir.file_name().unwrap_or_default().to_string_lossy()),
        device: format!("{} ({}, {})", facts.name, facts.backend, facts.driver),
        stages,
        results: results.iter().map(|result| result.row.clone()).collect(),
        samples: results.into_iter().flat_map(|result| result.samples).collect(),
        next_commands: next_commands(config, outcome),
    })
}

/// What to type next, ready to paste: what this model was trained for, and no more than it can do.
fn next_commands(config: &RunConfig, outcome: &RunOutcome) -> Vec<String> {
    let mut model = match (hub::id_of(config, &outcome.result.model), &outcome.result.model) {
        (Some(id), _) => id.to_string(),
        (None, Source::Local(path)) => quoted(&shown(path)),
        (None, other) => other.to_string(),
    };
    if let Some(adapter) = &outcome.result.adapter {
        model += &format!(" --adapter {}", quoted(&shown(adapter)));
    }
    let sees = open_folder(&outcome.result.model).is_ok_and(|folder| folder.config().llava().is_some());
    let shapes = config.eval_after.iter().any(|task| task == "easy-vqa");
    let (image, prompt) = match (sees, shapes) {
        (true, true) => (" --image PICTURE.png", "what color is the shape?"),
        (true, false) => (" --image PICTURE.png", "What is in the picture?"),
        (false, _) => ("", "Hello"),
    };
    // `generate` asks in v1 unless told otherwise; another template than the training's gives bad answers.
    let named = |version: &str| if version == "v1" { String::new() } else { format!(" --version {version}") };
    let version = named(config.stages.last().map_or("v1", |stage| stage.version.as_str()));
    let asked = asking_version(config);
    let mut commands = vec![format!("wgpu-llava generate --model {model}{version}{image} --prompt \"{prompt}\"")];
    // A language model talks in a template of its own, where it has one.
    let own = if sees { named(asked) } else { format!(" --version {asked}") };
    commands.push(format!("wgpu-llava chat --model {model}{own}{image}"));
    commands
        .extend(config.eval_after.iter().map(|task| format!("wgpu-llava eval {task} --model {model}{}", named(asked))));
    commands
}

/// The template in which to ask what was trained: the last stage's, unless that has no place for a question.
fn asking_version(config: &RunConfig) -> &str {
    let last = config.stages.last().map_or("v1", |stage| stage.version.as_str());
    if Template::named(last).is_ok_and(Template::is_plain) { "v1" } else { last }
}

/// In double quotes where a shell would take it apart.
fn quoted(path: &str) -> String {
    if path.contains(char::is_whitespace) { format!("\"{path}\"") } else { path.to_string() }
}
