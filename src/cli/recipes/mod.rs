//! The recipes that are in the program, and `recipes ls|show|copy|keys`.

use crate::{
    error::{Error, Result, nearest},
    formats::atomic::write_file,
    train::config::keys::{KEYS, Key, Kind},
};
use std::{
    path::{Path, PathBuf},
    sync::LazyLock,
};

mod compose;

#[derive(Clone, Debug)]
pub struct Recipe {
    pub name: String,
    /// What it is for, in a line.
    pub about: String,
    /// The config, in TOML.
    pub text: String,
}

const TINY: &str = include_str!("../../../recipes/tiny.toml");

/// Every recipe: what runs without a config, then those put together from parts.
pub fn all() -> &'static [Recipe] {
    static ALL: LazyLock<Vec<Recipe>> = LazyLock::new(|| {
        let first_line = TINY.lines().next().unwrap_or_default().trim_start_matches(['#', ' ']).trim_end_matches('.');
        let tiny = |name: &str, about: &str| Recipe { name: name.into(), about: about.into(), text: TINY.into() };
        let mut all = vec![tiny("default", "`tiny`, which runs without a config"), tiny("tiny", first_line)];
        let (list, parts) = (include_str!("../../../recipes/list"), include_str!("../../../recipes/parts.toml"));
        all.extend(compose::recipes(list, parts));
        all
    });
    &ALL
}

/// # Errors
/// [`ErrorKind::Usage`](crate::error::ErrorKind::Usage): there is none of that name; the nearest is named.
pub fn find(name: &str) -> Result<&'static Recipe> {
    all().iter().find(|recipe| recipe.name == name).ok_or_else(|| {
        let near = nearest(name, all().iter().map(|recipe| recipe.name.as_str())).unwrap_or_default();
        Error::usage(format!("there is no recipe `{name}`; the nearest is `{near}`"))
            .hint("`wgpu-llava recipes ls` lists them; a config file of your own is given without --recipe")
    })
}

/// `recipes ls`: a line each.
pub fn list() -> String {
    let width = all().iter().map(|recipe| recipe.name.len()).max().unwrap_or(0);
    all().iter().map(|recipe| format!("{:width$}  {}\n", recipe.name, recipe.about)).collect()
}

/// `recipes keys`: every config key with its default and its meaning, as the one list of them has it.
pub fn keys() -> String {
    let width = KEYS.iter().map(|key| key.name.len()).max().unwrap_or(0);
    let line = |key: &Key| {
        let default = key.default.map_or(String::new(), |default| format!(" [{default}]"));
        let choices = match key.kind {
            Kind::Choice(names) | Kind::Choices(names) => format!(": {}", names.join(", ")),
            _ => String::new(),
        };
        format!("{:width$}  {}{choices}{default}\n", key.name, key.meaning)
    };
    KEYS.iter().map(line).collect()
}

/// `recipes copy`: writes the recipe to `path`, or to `<name>.toml`, and gives the path. Never overwrites.
pub fn copy(name: &str, path: Option<&Path>) -> Result<PathBuf> {
    let recipe = find(name)?;
    let path = path.map_or_else(|| PathBuf::from(format!("{name}.toml")), Path::to_path_buf);
    if path.exists() {
        return Err(Error::usage(format!("{} is there already", path.display()))
            .hint(format!("give another name: wgpu-llava recipes copy {name} OTHER.toml")));
    }
    write_file(&path, recipe.text.as_bytes())?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        error::ErrorKind,
        train::config::{LossNorm, LrSchedulerType, Request, RunConfig, StageConfig},
    };
    use std::collections::BTreeSet;

    /// Keys of recipes whose values may say that they are not built yet.
    const COMING: [&str; 6] = ["method", "bits", "quant_type", "double_quant", "optim", "gradient_checkpointing"];

    /// The recipe as resolved, and the keys that had to be left out.
    fn resolved(recipe: &Recipe) -> (RunConfig, Vec<&'static str>) {
        let (mut text, mut left_out) = (recipe.text.clone(), Vec::new());
        loop {
            let error = match RunConfig::resolve(&Request {
                recipe: Some((&recipe.name, &text)),
                file: None,
                set: &[],
                output_dir: None,
                default_output_dir: Path::new("runs/x"),
                working_dir: Path::new("/"),
            }) {
                Ok(run) => return (run, left_out),
                Err(error) => error,
            };
            let of = |key: &&&str| error.message.contains(&format!(": {key} = "));
            let key = COMING.iter().find(of).filter(|_| error.message.contains("not built yet"));
            let key = key.unwrap_or_else(|| panic!("{}: {error}", recipe.name));
            text = text.lines().filter(|line| !line.starts_with(&format!("{key} = "))).collect::<Vec<_>>().join("\n");
            left_out.push(*key);
        }
    }

    fn stage(name: &str) -> StageConfig {
        resolved(find(name).unwrap()).0.stages.remove(0)
    }

    #[test]
    fn every_recipe_resolves_and_says_what_it_is_for() {
        let names: BTreeSet<&str> = all().iter().map(|recipe| recipe.name.as_str()).collect();
        assert_eq!(names.len(), all().len());
        for recipe in all() {
            assert!(list().contains(&format!("  {}\n", recipe.about)), "{}", recipe.name);
            let (run, left_out) = resolved(recipe);
            assert!(left_out.is_empty() || !recipe.text.contains("embedded:"), "{}: {left_out:?}", recipe.name);
            assert!(!run.stages.is_empty() && recipe.text.starts_with("# "), "{}", recipe.name);
        }
    }

    #[test]
    fn every_size_has_every_method_and_every_value_its_mark() {
        for size in ["7b", "13b", "33b", "65b"] {
            for (method, text) in [("pretrain", "projector"), ("full", "full"), ("lora", "lora"), ("qlora", "qlora")] {
                let recipe = find(&format!("{size}-{method}")).unwrap();
                let line = format!("method = \"{text}\" ");
                assert!(recipe.text.lines().any(|found| found.starts_with(&line)), "{}", recipe.text);
            }
        }
        for recipe in all().iter().filter(|recipe| recipe.text != TINY) {
            let keys: Vec<&str> = recipe.text.lines().filter(|line| line.contains(" = ")).collect();
            assert!(keys.len() > 20, "{}", recipe.text);
            for line in keys {
                let mark = line.rsplit_once("  # ").map(|(_, mark)| mark.split(':').next().unwrap_or_default());
                assert!(matches!(mark, Some("paper" | "repository" | "inferred")), "{}: {line}", recipe.name);
            }
            for placeholder in ["SIZE", "STEM", "NAME"] {
                assert!(!recipe.text.contains(placeholder), "{}: {placeholder}", recipe.name);
            }
        }
    }

    /// Every part is used, and every part that is used is there.
    #[test]
    fn the_list_and_the_parts_know_each_other() {
        let (list, parts) = (include_str!("../../../recipes/list"), include_str!("../../../recipes/parts.toml"));
        let lines: Vec<&str> = list.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty()).collect();
        let mut used = BTreeSet::new();
        let mut recipes = 2;
        for line in &lines {
            let columns: Vec<&str> = line.split('|').map(str::trim).collect();
            assert_eq!(columns.len(), 4, "{line}");
            for size in columns[0].split(',') {
                used.extend(columns[2].split_whitespace().map(|part| part.replace("SIZE", size)));
                recipes += 1;
            }
        }
        let there: toml::Table = parts.parse().unwrap();
        assert_eq!(used, there.keys().cloned().collect());
        assert_eq!(recipes, all().len());
    }

    #[test]
    fn the_values_are_the_papers_and_the_repositorys() {
        // Rate, schedule, batch; rank and alpha.
        let (cosine, linear) = (LrSchedulerType::Cosine, LrSchedulerType::Linear);
        for (name, rate, schedule, batch, adapter) in [
            ("33b-pretrain", 1e-4, linear, 128, None),
            ("65b-full", 2e-5, cosine, 512, None),
            ("13b-lora", 1e-4, cosine, 64, Some((64, 128.0))),
            ("7b-qlora", 1e-4, cosine, 64, Some((64, 128.0))),
            ("paper-stage1", 1e-4, linear, 128, None),
            ("paper-full", 2e-5, cosine, 512, None),
            ("paper-lora-r8", 1e-4, cosine, 64, Some((8, 16.0))),
            ("paper-lora-r64", 1e-4, cosine, 64, Some((64, 128.0))),
            ("paper-qlora-r64", 1e-4, cosine, 64, Some((64, 128.0))),
            ("paper-lora-weak", 2e-5, cosine, 64, Some((64, 16.0))),
            ("llava-v1-7b-pretrain", 2e-3, cosine, 128, None),
            ("llava-v1-13b-full", 2e-5, cosine, 128, None),
            ("llava-v1-7b-lora", 2e-5, cosine, 128, Some((64, 16.0))),
            ("llava-v1-7b-qlora", 2e-5, cosine, 128, Some((64, 16.0))),
            ("llava-v1.5-13b-pretrain", 1e-3, cosine, 256, None),
            ("llava-v1.5-7b-full", 2e-5, cosine, 128, None),
            ("llava-v1.5-7b-lora", 2e-4, cosine, 128, Some((128, 256.0))),
        ] {
            let stage = stage(name);
            let found = (stage.learning_rate, stage.lr_scheduler_type, stage.global_batch());
            assert_eq!(found, (rate, schedule, batch), "{name}");
            if let Some(adapter) = adapter {
                assert_eq!((stage.r, stage.lora_alpha, stage.lora_dropout), (adapter.0, adapter.1, 0.05), "{name}");
                assert!(stage.method.to_string().ends_with("lora"), "{name}");
            }
            assert_eq!((stage.warmup_ratio, stage.weight_decay, stage.model_max_length), (0.03, 0.0, Some(2048)));
            let of_repository = name.starts_with("llava");
            assert_eq!(stage.loss_norm == LossNorm::MicroMean, of_repository, "{name}");
        }
        let lora = stage("llava-v1.5-7b-lora");
        assert_eq!((lora.mm_projector_lr, lora.group_by_modality_length), (2e-5, true));
        // Stage 2 starts where stage 1 ends.
        for (first, second) in [
            ("65b-pretrain", "65b-qlora"),
            ("paper-stage1", "paper-lora-weak"),
            ("llava-v1.5-13b-pretrain", "llava-v1.5-13b-lora"),
        ] {
            let folder = resolved(find(first).unwrap()).0.output_dir.join("model").display().to_string();
            assert_eq!(stage(second).model_name_or_path.map(|source| source.to_string()), Some(folder));
        }
    }

    #[test]
    fn a_copy_never_overwrites() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mine.toml");
        copy("7b-lora", Some(&path)).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), find("7b-lora").unwrap().text);
        assert_eq!(copy("default", Some(&path)).unwrap_err().kind, ErrorKind::Usage);
        assert!(find("defualt").unwrap_err().message.contains("`default`"));
        assert!(find("7b-lore").unwrap_err().message.contains("`7b-lora`"));
    }
}
