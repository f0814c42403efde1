//! From the arguments of `train` to a resolved config, and the text of `--dry-run`.

use super::{
    args::{GlobalArgs, TrainArgs},
    recipes,
};
use crate::{
    error::Result,
    train::{
        config::{self, Request, RunConfig, Setting},
        run_folder,
    },
};
use std::{
    fmt::Write,
    path::{Path, PathBuf},
    time::SystemTime,
};

/// Resolves what `train` was asked to run.
///
/// Without a config file it is the recipe (`default`); with `--resume` and neither, it is the config that the run in
/// `--output-dir`, or the newest run in `runs`, was started with. `working_dir` is absolute.
///
/// # Errors
/// [`ErrorKind::Usage`](crate::error::ErrorKind::Usage): as [`RunConfig::resolve`], or no such recipe or file.
pub fn run_config(args: &TrainArgs, global: &GlobalArgs, working_dir: &Path, now: SystemTime) -> Result<RunConfig> {
    let runs = working_dir.join("runs");
    let mut folder = args.output_dir.as_ref().map(|dir| working_dir.join(dir));
    let mut file = args.run.config.as_ref().map(|path| working_dir.join(path));
    if args.resume && folder.is_none() {
        // A run's own config stands in its folder, and names no other.
        folder = match &file {
            Some(path) if path.ends_with(run_folder::CONFIG_FILE) => path.parent().map(Path::to_path_buf),
            _ => run_folder::latest_run(&runs)?,
        };
    }
    if args.resume && file.is_none() && args.run.recipe.is_none() {
        let saved = folder.as_ref().map(|folder| folder.join(run_folder::CONFIG_FILE));
        file = saved.filter(|path| path.exists());
    }
    let text = file.as_ref().map(|path| config::read_file(path)).transpose()?;
    let recipe = match (&args.run.recipe, &file) {
        (Some(name), _) => Some(recipes::find(name)?),
        (None, None) => Some(recipes::find("default")?),
        (None, Some(_)) => None,
    };
    let mut set = args.run.set.clone();
    if let Some(devices) = global.devices() {
        let devices: Vec<String> = devices.iter().map(ToString::to_string).collect();
        set.push(match &devices[..] {
            [one] => format!("devices={one}"),
            several => format!("devices=[{}]", several.join(", ")),
        });
    }
    if let Some(precision) = global.precision {
        set.push(format!("precision={precision}"));
    }
    let default_output_dir: PathBuf = folder.unwrap_or_else(|| runs.join(run_folder::dated_name(now)));
    RunConfig::resolve(&Request {
        recipe: recipe.map(|recipe| (recipe.name.as_str(), recipe.text.as_str())),
        file: file.as_deref().zip(text.as_deref()),
        set: &set,
        output_dir: args.output_dir.as_deref(),
        default_output_dir: &default_output_dir,
        working_dir,
    })
}

/// `--dry-run`: every value, and where it came from as a comment. It is TOML again.
pub fn describe(run: &RunConfig) -> String {
    let mut text = String::new();
    settings(&mut text, &run.values);
    for stage in &run.stages {
        // Writing to a String cannot fail.
        let _ = match stage.name.as_str() {
            "" => writeln!(text),
            name => writeln!(text, "\n[[stage]]\nname = \"{name}\""),
        };
        settings(&mut text, &stage.values);
    }
    text
}

fn settings(text: &mut String, settings: &[Setting]) {
    let lines: Vec<String> = settings.iter().map(|setting| format!("{} = {}", setting.key, setting.value)).collect();
    // A long value does not push every comment to the right.
    let width = lines.iter().map(String::len).filter(|length| *length <= 60).max().unwrap_or(0);
    for (line, setting) in lines.iter().zip(settings) {
        let _ = writeln!(text, "{line:width$}  # {}", setting.origin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::RunArgs;
    use crate::train::config::{DeviceChoice, Precision};
    use std::time::UNIX_EPOCH;

    fn of(run: RunArgs) -> TrainArgs {
        TrainArgs { run, ..Default::default() }
    }

    fn resolve(args: TrainArgs, dir: &Path) -> RunConfig {
        run_config(&args, &GlobalArgs::default(), dir, UNIX_EPOCH).unwrap()
    }

    #[test]
    fn without_arguments_it_is_the_default_recipe_in_a_dated_folder() {
        let dir = tempfile::tempdir().unwrap();
        let run = resolve(TrainArgs::default(), dir.path());
        assert_eq!(run.output_dir, dir.path().join("runs/1970-01-01_00-00-00"));
        let names: Vec<&str> = run.stages.iter().map(|stage| stage.name.as_str()).collect();
        assert_eq!(names, ["pretrain", "finetune"]);
        assert_eq!(run.eval_after, ["easy-vqa"]);
    }

    #[test]
    fn resuming_takes_the_config_and_the_folder_of_the_run() {
        let dir = tempfile::tempdir().unwrap();
        let started = resolve(of(RunArgs { set: vec!["seed=5".into()], ..Default::default() }), dir.path());
        std::fs::create_dir_all(&started.output_dir).unwrap();
        std::fs::write(started.output_dir.join("config.toml"), started.to_toml()).unwrap();
        let resume = |config: Option<PathBuf>, output_dir: Option<PathBuf>| TrainArgs {
            run: RunArgs { config, ..Default::default() },
            output_dir,
            resume: true,
            ..Default::default()
        };
        let saved = started.output_dir.join("config.toml");
        for args in
            [resume(None, None), resume(None, Some(started.output_dir.clone())), resume(Some(saved.clone()), None)]
        {
            let resumed = resolve(args, dir.path());
            assert_eq!((resumed.output_dir.as_path(), resumed.stages[0].seed), (started.output_dir.as_path(), 5));
            resumed.check_resumable(&started).unwrap();
        }
        // Without --resume the saved config is a new run, in a folder of its own.
        let repeated = resolve(of(RunArgs { config: Some(saved), ..Default::default() }), &dir.path().join("other"));
        assert_ne!(repeated.output_dir, started.output_dir);
        assert_eq!(repeated.stages[1].values, started.stages[1].values);
    }

    #[test]
    fn global_options_are_the_highest_layer() {
        let global =
            GlobalArgs { device: Some("Radeon RX".into()), precision: Some(Precision::Float32), ..Default::default() };
        let run = run_config(&TrainArgs::default(), &global, Path::new("/"), UNIX_EPOCH).unwrap();
        assert_eq!(run.devices, [DeviceChoice::Name("Radeon RX".into())]);
        assert_eq!(run.stages[1].precision, Some(Precision::Float32));
        let llvmpipe = "llvmpipe (LLVM 15.0.6, 256 bits)";
        for (device, devices) in [
            ("2", vec![DeviceChoice::Index(2)]),
            ("0, 1,1", [0, 1, 1].map(DeviceChoice::Index).into()),
            (llvmpipe, vec![DeviceChoice::Name(llvmpipe.into())]),
        ] {
            let global = GlobalArgs { device: Some(device.into()), ..Default::default() };
            let run = run_config(&TrainArgs::default(), &global, Path::new("/"), UNIX_EPOCH).unwrap();
            assert_eq!(run.devices, devices);
        }
    }

    #[test]
    fn a_dry_run_shows_origins_and_is_a_config_again() {
        let args = of(RunArgs { set: vec!["finetune.r=8".into()], ..Default::default() });
        let run = resolve(args, Path::new("/"));
        let text = describe(&run);
        for part in ["# recipe default", "# command line", "# default", "name = \"finetune\""] {
            assert!(text.contains(part), "{text}");
        }
        let again = RunConfig::resolve(&Request {
            recipe: None,
            file: Some((Path::new("/run.toml"), &text)),
            set: &[],
            output_dir: None,
            default_output_dir: Path::new("/x"),
            working_dir: Path::new("/"),
        });
        assert_eq!(again.unwrap(), run);
    }
}
