//! The order of the layers, as src/lib.rs gives it, is what the code keeps to: no folder knows a later one.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use regex::Regex;

/// Exceptions, each with its reason: (folder, what it may know of a later layer).
const EXCEPTIONS: [(&str, &str); 2] = [
    // A model folder is its config.json and its tensors' names: plain descriptions, which know no device. They live
    // with the models because these are built by them.
    ("formats", "models::config"),
    ("formats", "models::names"),
];

/// Earlier layers that a folder must nevertheless not know: files and records have nothing to do with a device, and what
/// goes between hosts is bytes.
const FORBIDDEN: [(&str, &[&str]); 3] = [
    ("formats", &["gpu", "tensor", "ops", "autograd", "nn"]),
    ("data", &["gpu", "tensor", "ops", "autograd", "nn"]),
    ("hosts", &["gpu", "tensor", "ops", "autograd", "nn", "formats", "data", "hub"]),
];

/// Known to everybody.
const COMMON: [&str; 4] = ["error", "panics", "rng", "quant"];

/// What is in the binary: at home beside the models, whose folders and records it is made of.
const EMBEDDED: (&str, &str) = ("embedded", "models");

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// Each layer's place in the order of src/lib.rs.
fn order() -> BTreeMap<String, usize> {
    let text = fs::read_to_string(source().join("lib.rs")).unwrap();
    let line = text.lines().find(|line| line.contains('→')).expect("src/lib.rs tells the order of the layers");
    let name = Regex::new("`([a-z]+)`").unwrap();
    let mut order = BTreeMap::new();
    for (place, step) in line.split('→').enumerate() {
        order.extend(name.captures_iter(step).map(|found| (found[1].to_string(), place)));
    }
    let place = order[EMBEDDED.1];
    order.insert(EMBEDDED.0.to_string(), place);
    order
}

/// Every Rust file below a folder.
fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}

/// The folder (or file) directly below src that a file belongs to.
fn layer_of(path: &Path) -> String {
    let inside = path.strip_prefix(source()).unwrap();
    let first = inside.components().next().unwrap().as_os_str().to_string_lossy();
    first.trim_end_matches(".rs").to_string()
}

/// Code without comments and without what only tests see.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let before_tests = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    before_tests.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// The paths behind `crate::`, groups in braces written out: `a::{b, c::d}` is `a::b` and `a::c::d`.
fn crate_paths(code: &str) -> Vec<String> {
    let mut paths = Vec::new();
    for (at, found) in code.match_indices("crate::") {
        // `$crate::` and `other_crate::` are something else.
        if !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$') {
            expand("", &code[at + found.len()..], &mut paths);
        }
    }
    paths
}

/// Reads one path at the start of `text` into `paths`; returns how many bytes it took.
fn expand(prefix: &str, text: &str, paths: &mut Vec<String>) -> usize {
    let mut at = text.len() - text.trim_start().len();
    let mut path = prefix.to_string();
    loop {
        let rest = &text[at..];
        if rest.starts_with('{') {
            at += 1;
            while at < text.len() && !text[at..].starts_with('}') {
                at += expand(&path, &text[at..], paths).max(1);
                at += text[at..].len() - text[at..].trim_start_matches([' ', '\n', ',']).len();
            }
            return (at + 1).min(text.len());
        }
        let word = rest.find(|c: char| !c.is_alphanumeric() && c != '_' && c != '*').unwrap_or(rest.len());
        if !path.is_empty() && !path.ends_with("::") {
            path.push_str("::");
        }
        path.push_str(&rest[..word]);
        at += word;
        match text[at..].strip_prefix("::") {
            Some(_) => at += 2,
            None => break,
        }
    }
    // `name as other`
    if let Some(rest) = text[at..].strip_prefix(" as ") {
        at += 4 + rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
    }
    paths.push(path);
    at
}

#[test]
fn groups_are_written_out() {
    let paths = crate_paths("use crate::{a::{self, B as C, d::E}, f::*};\nlet x = crate::g::h(1); mycrate::no");
    assert_eq!(paths, ["a::self", "a::B", "a::d::E", "f::*", "g::h"]);
}

#[test]
fn no_layer_reaches_up() {
    let order = order();
    assert!(order.len() >= 12, "{order:?}");
    let mut wrong = Vec::new();
    for path in rust_files(&source()) {
        let layer = layer_of(&path);
        let Some(&place) = order.get(&layer) else {
            assert!(
                ["lib", "main"].iter().chain(&COMMON).any(|common| layer == *common),
                "src/lib.rs gives no place to {layer}"
            );
            continue;
        };
        for used in crate_paths(&code(&path)) {
            let target = used.split("::").next().unwrap_or_default();
            if target == layer || COMMON.contains(&target) {
                continue;
            }
            let excepted = EXCEPTIONS.iter().any(|(folder, what)| *folder == layer && used.starts_with(what));
            let forbidden = FORBIDDEN.iter().any(|(folder, what)| *folder == layer && what.contains(&target));
            let up = order.get(target).is_none_or(|&other| other > place);
            if (up && !excepted) || forbidden {
                wrong.push(format!("{}: {used}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "reaches up:\n{}", wrong.join("\n"));
}

#[test]
fn only_the_command_line_prints_exits_or_reads_the_environment() {
    let forbidden =
        Regex::new(r"\b(e?print(ln)?!|dbg!|(std::)?env::(var|args|current_dir|temp_dir|home_dir)|exit\()").unwrap();
    let mut wrong = Vec::new();
    for path in rust_files(&source()) {
        if ["cli", "main"].contains(&layer_of(&path).as_str()) {
            continue;
        }
        let code = code(&path);
        wrong.extend(forbidden.find_iter(&code).map(|found| format!("{}: {}", path.display(), found.as_str())));
    }
    assert!(wrong.is_empty(), "outside src/cli:\n{}", wrong.join("\n"));
}
