//! The recipes that are in the program, and `recipes ls|show|copy|keys`.

use crate::{
    error::{Error, Result, nearest},
    formats::atomic::write_file,
    train::config::keys::{KEYS, Key, Kind},
};
use std::path::{Path, PathBuf};

#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    pub name: &'static str,
    pub text: &'static str,
}

pub const RECIPES: &[Recipe] = &[Recipe { name: "default", text: include_str!("../../recipes/default.toml") }];

impl Recipe {
    /// What it is for: the first line of its file.
    pub fn about(&self) -> &'static str {
        self.text.lines().next().unwrap_or_default().trim_start_matches(['#', ' '])
    }
}

/// # Errors
/// [`ErrorKind::Usage`](crate::error::ErrorKind::Usage): there is none of that name; the nearest is named.
pub fn find(name: &str) -> Result<&'static Recipe> {
    RECIPES.iter().find(|recipe| recipe.name == name).ok_or_else(|| {
        let near = nearest(name, RECIPES.iter().map(|recipe| recipe.name)).unwrap_or_default();
        Error::usage(format!("there is no recipe `{name}`; the nearest is `{near}`"))
            .hint("`wgpu-llava recipes ls` lists them; a config file of your own is given without --recipe")
    })
}

/// `recipes ls`: a line each.
pub fn list() -> String {
    let width = RECIPES.iter().map(|recipe| recipe.name.len()).max().unwrap_or(0);
    RECIPES.iter().map(|recipe| format!("{:width$}  {}\n", recipe.name, recipe.about())).collect()
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
    use crate::{error::ErrorKind, train::config};

    #[test]
    fn every_recipe_resolves_and_says_what_it_is_for() {
        for recipe in RECIPES {
            assert!(!recipe.about().is_empty() && list().contains(recipe.about()));
            config::RunConfig::resolve(&config::Request {
                recipe: Some((recipe.name, recipe.text)),
                file: None,
                set: &[],
                output_dir: None,
                default_output_dir: Path::new("runs/x"),
                working_dir: Path::new("/"),
            })
            .unwrap();
        }
    }

    #[test]
    fn a_copy_never_overwrites() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mine.toml");
        copy("default", Some(&path)).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), RECIPES[0].text);
        assert_eq!(copy("default", Some(&path)).unwrap_err().kind, ErrorKind::Usage);
        assert!(find("defualt").unwrap_err().message.contains("`default`"));
    }
}
