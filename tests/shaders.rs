//! How shaders are kept: every file is used, every family has its Rust file, no shader and no `wgpu` elsewhere.
//! That every variant is valid is build.rs's to check.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use wgpu_llava::{
    gpu::{expand_shader, shader_variants},
    ops::OPS,
};

const LONGEST_FILE: usize = 600;
const MODES: [&[&str]; 4] = [&[], &["IMMEDIATES"], &["SUBGROUPS"], &["IMMEDIATES", "SUBGROUPS"]];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file below a folder that has the extension.
fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap().to_string_lossy().into_owned()
}

/// Rust without comments and without what only tests see.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let before_tests = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    before_tests.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

#[test]
fn every_variant_expands_to_its_own_kernel() {
    let mut texts = BTreeSet::new();
    for variant in shader_variants() {
        for modes in MODES {
            let text = expand_shader(&variant, modes);
            assert!(text.contains(&format!("fn {}(", variant.kernel)), "{} has no fn {}", variant.name, variant.kernel);
            assert_eq!(text.matches("@compute").count(), 1, "{} {modes:?}: one entry point", variant.name);
            let left = text.lines().find(|line| line.trim_start().starts_with('#') || line.contains("#{"));
            assert_eq!(left, None, "{} {modes:?}: a directive is left", variant.name);
        }
        assert!(texts.insert(expand_shader(&variant, &[])), "{}: another variant has the same text", variant.name);
    }
}

#[test]
fn every_shader_file_is_used_and_has_its_rust_file() {
    let families: BTreeSet<String> = shader_variants().into_iter().map(|variant| variant.family).collect();
    let mut imported = BTreeSet::new();
    for path in files("shaders", "wgsl") {
        let text = fs::read_to_string(&path).unwrap();
        imported.extend(text.lines().filter_map(|line| line.trim().strip_prefix("#import ")).map(str::to_string));
    }
    for path in files("shaders", "wgsl") {
        let name = stem(&path);
        if path.parent().unwrap().ends_with("shared") {
            assert!(imported.contains(&name), "nothing imports {}", path.display());
            continue;
        }
        assert!(families.contains(&name), "{} has no variant", path.display());
        assert!(root().join(format!("src/ops/{name}.rs")).is_file(), "{} has no src/ops/{name}.rs", path.display());
        let sections = fs::read_to_string(&path).unwrap();
        for kernel in sections.lines().filter_map(|line| line.trim().strip_prefix("#kernel ")) {
            let used =
                shader_variants().iter().any(|variant| variant.family == name && variant.kernel == kernel.trim());
            assert!(used, "{}: no variant of #kernel {kernel}", path.display());
        }
    }
}

#[test]
fn every_family_is_in_the_list_of_ops_and_every_variant_is_launched() {
    let listed: BTreeSet<&str> = OPS.iter().filter_map(|op| op.name.split('.').next()).collect();
    let launches: String = files("src/ops", "rs").iter().map(|path| code(path)).collect();
    for variant in shader_variants() {
        // Roofs have a list of their own (`ops::roof::ROOFS`).
        let known = listed.contains(variant.family.as_str()) || variant.family == "roof";
        assert!(known, "no op of the family {}", variant.family);
        // Names are written out, except that a suffix may be put together: `attention.{kernel}.narrow`.
        let suffix = variant.name.splitn(3, '.').nth(2);
        let composed = suffix.is_some_and(|suffix| launches.contains(&format!("}}.{suffix}\"")));
        let composed = composed || launches.contains(&format!("\"{}.{{", variant.family));
        let composed = composed || launches.contains(&format!("\"{}.{}.{{", variant.family, variant.kernel));
        let named = launches.contains(&format!("\"{}\"", variant.name));
        assert!(named || composed, "nothing launches {}", variant.name);
    }
}

#[test]
fn no_shader_lives_in_rust_and_wgpu_is_named_in_one_folder() {
    for path in files("src", "rs") {
        let text = code(&path);
        let gpu = path.starts_with(root().join("src/gpu"));
        assert!(!text.contains("@compute"), "{} holds a shader", path.display());
        assert!(gpu || !text.contains("wgpu::"), "{} names wgpu", path.display());
    }
}

#[test]
fn files_stay_short() {
    for folder in ["src", "tests", "examples", "benches"] {
        if !root().join(folder).is_dir() {
            continue;
        }
        for path in files(folder, "rs").into_iter().chain(files(folder, "wgsl")) {
            let lines = fs::read_to_string(&path).unwrap().lines().count();
            assert!(lines <= LONGEST_FILE, "{} has {lines} lines", path.display());
        }
    }
    for path in files("shaders", "wgsl") {
        let lines = fs::read_to_string(&path).unwrap().lines().count();
        assert!(lines <= LONGEST_FILE, "{} has {lines} lines", path.display());
    }
}
