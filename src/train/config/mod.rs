//! The config of a run: TOML in layers, every key checked, resolved to typed values.
//!
//! A higher layer wins over a lower one (default < recipe < file < command line); within a layer a stage's own value
//! wins over the one at the top. Where each value came from is kept, for `--dry-run`.

pub mod keys;
mod layers;
mod stage;
mod types;
mod value;

pub use keys::{EVAL_TASKS, KEYS, Key, Kind, Range, Scope};
pub use layers::Origin;
pub use stage::{Setting, StageConfig};
pub use types::{
    DataEntry, DataSource, DeviceChoice, GradientCheckpointing, ImageAspectRatio, LossNorm, LrSchedulerType, Method,
    Optim, Precision, ProjectorType, SelectFeature, Source, TargetModules,
};

use crate::error::{Error, Result, nearest};
use layers::Layer;
use std::{
    fmt::Write,
    path::{Path, PathBuf},
};
use toml::Value;

/// What a config is resolved from.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Name and text of the lowest layer above the defaults.
    pub recipe: Option<(&'a str, &'a str)>,
    /// Path and text; relative paths in it are below its folder.
    pub file: Option<(&'a Path, &'a str)>,
    /// `[STAGE.]KEY=VALUE`; relative paths are below `working_dir`.
    pub set: &'a [String],
    /// `--output-dir`: wins over `output_dir`.
    pub output_dir: Option<&'a Path>,
    /// Where `output_dir` is given nowhere.
    pub default_output_dir: &'a Path,
    /// Absolute.
    pub working_dir: &'a Path,
}

/// A config as resolved: every value typed, every path absolute.
#[derive(Clone, Debug, PartialEq)]
pub struct RunConfig {
    pub output_dir: PathBuf,
    /// Empty: the best adapter. The same one may be there several times.
    pub devices: Vec<DeviceChoice>,
    /// Evaluations after the last stage.
    pub eval_after: Vec<String>,
    /// Questions of each evaluation; none: all.
    pub eval_limit: Option<usize>,
    /// At least one. A config without `[[stage]]` is one stage with an empty name, written straight into `output_dir`.
    pub stages: Vec<StageConfig>,
    /// The values of the whole run as resolved.
    pub values: Vec<Setting>,
}

impl RunConfig {
    /// Resolves the layers.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`](crate::error::ErrorKind::Usage), naming file or argument, line, key and value: unknown key
    /// or stage, wrong type, out of range, not built yet, or a required key that is nowhere.
    pub fn resolve(request: &Request<'_>) -> Result<Self> {
        let mut layers = vec![layers::read_arguments(request.set, request.working_dir)?];
        if let Some((path, text)) = request.file {
            let path = types::join(request.working_dir, path);
            let folder = path.parent().unwrap_or(request.working_dir);
            layers.push(layers::read(Origin::File(path.clone()), &path.display().to_string(), text, folder)?);
        }
        if let Some((name, text)) = request.recipe {
            let origin = Origin::Recipe(name.to_string());
            layers.push(layers::read(origin, &format!("recipe {name}"), text, request.working_dir)?);
        }
        let names = stage_names(&layers)?;

        let mut values = settings(&layers, |key| key.scope == Scope::Run, "", true)?;
        if let Some(dir) = request.output_dir {
            values.retain(|setting| setting.key != "output_dir");
            values.push(output_dir_setting(request.working_dir, dir, Origin::CommandLine));
        }
        if get(&values, "output_dir").is_none() {
            values.push(output_dir_setting(request.working_dir, request.default_output_dir, Origin::Default));
        }
        sort(&mut values);
        let output_dir = PathBuf::from(get(&values, "output_dir").and_then(Value::as_str).unwrap_or_default());
        let choice = |value: &Value| match value {
            Value::Integer(index) => usize::try_from(*index).ok().map(DeviceChoice::Index),
            other => other.as_str().map(|name| DeviceChoice::Name(name.to_string())),
        };
        let devices = get(&values, "devices")
            .and_then(Value::as_array)
            .map_or_else(Vec::new, |list| list.iter().filter_map(choice).collect());
        let eval_after = get(&values, "eval_after")
            .and_then(Value::as_array)
            .map_or_else(Vec::new, |list| list.iter().filter_map(Value::as_str).map(str::to_string).collect());
        let eval_limit = get(&values, "eval_limit").and_then(Value::as_integer).and_then(|n| usize::try_from(n).ok());

        let source = source_name(request);
        let mut stages = Vec::with_capacity(names.len());
        for (index, name) in names.iter().enumerate() {
            let first = index == 0;
            let settings = settings(&layers, |key| key.scope != Scope::Run, name, first)?;
            let stage = StageConfig::new(name, &output_dir, settings, stages.last(), &source)?;
            stages.push(stage);
        }
        Ok(Self { output_dir, devices, eval_after, eval_limit, stages, values })
    }

    /// The config that a run in `folder` wrote. Its `output_dir` is `folder`, wherever that has been moved to.
    pub fn load_saved(folder: &Path) -> Result<Self> {
        let path = folder.join(super::run_folder::CONFIG_FILE);
        let text = read_file(&path)?;
        Self::resolve(&Request {
            recipe: None,
            file: Some((&path, &text)),
            set: &[],
            output_dir: Some(folder),
            default_output_dir: folder,
            working_dir: folder,
        })
    }

    /// Where each stage writes.
    pub fn stage_dirs(&self) -> Vec<PathBuf> {
        self.stages.iter().map(|stage| stage.output_dir.clone()).collect()
    }

    /// The resolved config as TOML. Resolving it again gives the same run; `output_dir` is left out, so that the
    /// repetition gets a folder of its own.
    pub fn to_toml(&self) -> String {
        let mut text =
            String::from("# As resolved. `wgpu-llava train` with this file repeats the run in a new folder;\n");
        text.push_str("# with --resume too, it goes on with the run in this folder.\n\n");
        let mut line = |setting: &Setting| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{} = {}", setting.key, setting.value);
        };
        self.values.iter().filter(|setting| setting.key != "output_dir").for_each(&mut line);
        let Some(first) = self.stages.first() else { return text };
        // What all stages agree on goes to the top, and what the first one starts from.
        let shared = |setting: &&Setting| {
            let starts = keys::find(setting.key).is_some_and(|key| key.scope == Scope::Start);
            starts || self.stages.iter().all(|stage| get(&stage.values, setting.key) == Some(&setting.value))
        };
        let top: Vec<&Setting> = first.values.iter().filter(shared).collect();
        top.iter().for_each(|setting| line(setting));
        for (index, stage) in self.stages.iter().enumerate().filter(|(_, stage)| !stage.name.is_empty()) {
            let _ = writeln!(text, "\n[[stage]]\nname = {}", Value::String(stage.name.clone()));
            for setting in &stage.values {
                let at_top = top.iter().find(|at_top| at_top.key == setting.key);
                let starts_later = index > 0 && keys::find(setting.key).is_some_and(|key| key.scope == Scope::Start);
                if at_top.is_none() || starts_later {
                    let _ = writeln!(text, "{} = {}", setting.key, setting.value);
                }
            }
        }
        text
    }

    /// Whether a run that was started with `saved` may be gone on with under this config.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`](crate::error::ErrorKind::Usage): a key differs that changes what is computed.
    pub fn check_resumable(&self, saved: &Self) -> Result<()> {
        // How many micro-batches a step has is told by the checkpoint, whatever they are computed on.
        const FREE: &[&str] = &[
            "logging_steps",
            "save_steps",
            "save_total_limit",
            "gradient_accumulation_steps",
            "zero_stage",
            "offload",
            "layer_split",
        ];
        let refuse = |what: String| {
            Error::usage(format!("{} cannot be gone on with: {what}", self.output_dir.display()))
                .hint("--resume without a config goes on with the one the run was started with")
                .hint("for another config choose another --output-dir")
        };
        let names = |run: &Self| run.stages.iter().map(|stage| stage.name.clone()).collect::<Vec<_>>();
        if names(self) != names(saved) {
            return Err(refuse(format!("its stages are {:?}, now {:?}", names(saved), names(self))));
        }
        for (now, before) in self.stages.iter().zip(&saved.stages) {
            for key in KEYS.iter().filter(|key| !FREE.contains(&key.name)) {
                let show = |value: Option<&Value>| value.map_or_else(|| "unset".to_string(), Value::to_string);
                let (new, old) = (get(&now.values, key.name), get(&before.values, key.name));
                if new != old {
                    let stage = if now.name.is_empty() { String::new() } else { format!("{}.", now.name) };
                    return Err(refuse(format!("{stage}{} was {}, now it is {}", key.name, show(old), show(new))));
                }
            }
        }
        Ok(())
    }
}

/// Reads a config file.
///
/// # Errors
/// [`ErrorKind::Usage`](crate::error::ErrorKind::Usage): missing, unreadable or not UTF-8.
pub fn read_file(path: &Path) -> Result<String> {
    std::fs::read_to_string(path)
        .map_err(|error| Error::usage(format!("cannot read the config {}", path.display())).caused_by(error))
}

pub(super) fn get<'a>(values: &'a [Setting], key: &str) -> Option<&'a Value> {
    values.iter().find(|setting| setting.key == key).map(|setting| &setting.value)
}

/// Into the order of [`KEYS`].
pub(super) fn sort(values: &mut [Setting]) {
    values.sort_by_key(|setting| KEYS.iter().position(|key| key.name == setting.key));
}

fn output_dir_setting(working_dir: &Path, dir: &Path, origin: Origin) -> Setting {
    let value = Value::String(types::join(working_dir, dir).to_string_lossy().into_owned());
    Setting { key: "output_dir", value, origin }
}

/// What errors about missing keys call the config.
fn source_name(request: &Request<'_>) -> String {
    match (request.file, request.recipe) {
        (Some((path, _)), _) => path.display().to_string(),
        (None, Some((name, _))) => format!("recipe {name}"),
        (None, None) => "the config".into(),
    }
}

/// The stages of the highest layer that has any; one without a name where none has.
fn stage_names(layers: &[Layer]) -> Result<Vec<String>> {
    let declared = layers
        .iter()
        .filter(|layer| layer.origin != Origin::CommandLine && !layer.stages.is_empty())
        .map(|layer| layer.stages.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>())
        .next()
        .unwrap_or_default();
    let arguments = layers.iter().filter(|layer| layer.origin == Origin::CommandLine);
    for (name, _) in arguments.flat_map(|layer| &layer.stages) {
        if !declared.contains(name) {
            let error = Error::usage(format!("--set {name}.…: there is no stage `{name}`"));
            return Err(match nearest(name, declared.iter().map(String::as_str)) {
                Some(near) => error.hint(format!("the stages are {}; the nearest is `{near}`", declared.join(", "))),
                None => error.hint("this config has no stages: write --set KEY=VALUE"),
            });
        }
    }
    Ok(if declared.is_empty() { vec![String::new()] } else { declared })
}

/// The value of every key in `scope` that has one, in the order of [`KEYS`].
fn settings(layers: &[Layer], scope: impl Fn(&Key) -> bool, stage: &str, first: bool) -> Result<Vec<Setting>> {
    let mut settings = Vec::new();
    for key in KEYS.iter().filter(|key| scope(key)) {
        let given = layers.iter().find_map(|layer| Some((layer.get(key, stage, first)?, &layer.origin)));
        if let Some((value, origin)) = given {
            settings.push(Setting { key: key.name, value: value.clone(), origin: origin.clone() });
        } else if let Some(default) = key.default {
            let value = value::resolve(key, value::from_argument(key, default), Path::new(""))
                .map_err(|allowed| Error::failed(format!("the default of `{}` must be {allowed}", key.name)))?;
            settings.push(Setting { key: key.name, value, origin: Origin::Default });
        }
    }
    Ok(settings)
}

#[cfg(test)]
mod tests;
