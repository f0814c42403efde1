//! Recipes put together from parts: `recipes/list` says of which, `recipes/parts.toml` has the parts.

use super::Recipe;
use crate::train::config::keys::KEYS;

/// What stands in front of the keys.
const MARKS: &str = "\
# Marks: paper is arXiv 2309.09958 (\"An Empirical Study of Scaling Instruct-Tuned Large Multimodal Models\"), repository is
# LLaVA's own code, inferred is neither's. For your own run: `wgpu-llava recipes copy NAME my.toml`, or --set KEY=VALUE.
";

/// Every recipe of `list`, whose parts are the sections of `parts`. What is malformed is left out; a test sees to it
/// that nothing is.
pub fn recipes(list: &str, parts: &str) -> Vec<Recipe> {
    let lines = list.lines().filter(|line| !line.trim_start().starts_with('#'));
    lines.flat_map(|line| of_line(line, parts)).collect()
}

fn of_line(line: &str, parts: &str) -> Vec<Recipe> {
    let columns: Vec<&str> = line.split('|').map(str::trim).collect();
    let [sizes, name, names, about] = columns.as_slice() else { return Vec::new() };
    let recipe = |size: &str| {
        let name = name.replace("SIZE", size);
        let stem = name.rsplit_once('-').map_or(name.as_str(), |(stem, _)| stem);
        let about = about.replace("SIZE", &size.to_uppercase());
        let names: Vec<String> = names.split_whitespace().map(|part| part.replace("SIZE", size)).collect();
        let lines = merged(names.iter().flat_map(|part| section(parts, part)));
        let lines: Vec<String> = lines.iter().map(|line| line.replace("STEM", stem).replace("NAME", &name)).collect();
        let marks = MARKS.replace("NAME", &name);
        Recipe { text: format!("# {about}.\n#\n{marks}\n{}", aligned(&lines)), name, about }
    };
    sizes.split(',').map(recipe).collect()
}

/// The lines of the section `[name]` that set a key.
fn section<'a>(parts: &'a str, name: &str) -> impl Iterator<Item = &'a str> {
    let heading = format!("[{name}]");
    let within = parts.lines().skip_while(move |line| *line != heading).skip(1);
    within.take_while(|line| !line.starts_with('[')).filter(|line| !line.is_empty() && !line.starts_with('#'))
}

fn key(line: &str) -> &str {
    line.split(" = ").next().unwrap_or_default()
}

/// One line a key, the last one given, in the order of the key list.
fn merged<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let lines: Vec<&str> = lines.collect();
    let mut merged: Vec<&str> = Vec::new();
    for line in lines.iter().rev() {
        if merged.iter().all(|kept| key(kept) != key(line)) {
            merged.push(line);
        }
    }
    let place = |line: &&str| KEYS.iter().position(|known| known.name == key(line));
    merged.sort_by_key(place);
    merged
}

/// The lines with their comments one below the other.
fn aligned(lines: &[String]) -> String {
    let split: Vec<(&str, &str)> = lines.iter().map(|line| line.split_once(" # ").unwrap_or((line, ""))).collect();
    let width = split.iter().map(|(value, _)| value.len()).max().unwrap_or(0);
    split.iter().map(|(value, mark)| format!("{value:width$}  # {mark}\n")).collect()
}
