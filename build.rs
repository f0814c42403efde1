//! Packs `shaders/` into the binary, and refuses a shader that does not expand or validate.

#[path = "src/gpu/wgsl.rs"]
#[allow(dead_code, reason = "the preprocessor's runtime half is not used here")]
mod wgsl;

use std::{collections::BTreeMap, env, fmt::Write, fs, path::Path, process::Command};

/// What a device may or may not have; every variant is validated under each combination.
const MODES: [&[&str]; 4] = [&[], &["IMMEDIATES"], &["SUBGROUPS"], &["IMMEDIATES", "SUBGROUPS"]];

fn main() {
    println!("cargo:rerun-if-changed=shaders");
    println!("cargo:rerun-if-changed=src/gpu/wgsl.rs");
    name_commit();
    let mut files = BTreeMap::new();
    for (folder, prefix) in [("shaders", ""), ("shaders/shared", "shared/")] {
        for entry in fs::read_dir(folder).expect("shaders/ is readable").flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|extension| extension == "wgsl") {
                let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                files.insert(format!("{prefix}{stem}"), fs::read_to_string(&path).expect("a shader is readable"));
            }
        }
    }
    let list = fs::read_to_string("shaders/variants").expect("shaders/variants is readable");
    let mut failures = Vec::new();
    match wgsl::parse_variants(&list) {
        Ok(variants) => {
            for variant in &variants {
                for modes in MODES {
                    if let Err(error) = validate(variant, modes, &files) {
                        failures.push(format!("{} {modes:?}: {error}", variant.name));
                        break;
                    }
                }
            }
        }
        Err(error) => failures.push(error),
    }
    for failure in &failures {
        eprintln!("{failure}");
    }
    assert!(failures.is_empty(), "{} shader variant(s) do not validate, see above", failures.len());

    let mut table = String::from("pub static FILES: &[(&str, &str)] = &[\n");
    let root = env::current_dir().expect("a current folder");
    for name in files.keys() {
        let path = root.join("shaders").join(format!("{name}.wgsl"));
        writeln!(table, "    ({name:?}, include_str!({:?})),", path.display().to_string()).expect("write to a string");
    }
    writeln!(
        table,
        "];\npub static VARIANTS: &str = include_str!({:?});",
        root.join("shaders/variants").display().to_string()
    )
    .expect("write to a string");
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    fs::write(Path::new(&out).join("shaders.rs"), table).expect("OUT_DIR is writable");
}

/// Tells the program its commit, where there is a repository with git.
fn name_commit() {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
        Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
    };
    // Not the repository of somebody else that this one lies in.
    let own = git(&["ls-files", "--error-unmatch", "build.rs"]).is_some();
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]).filter(|_| own) else { return };
    println!("cargo:rustc-env=WGPU_LLAVA_COMMIT={commit}");
    // Where a commit or a change of branch is noticed.
    if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"]) {
        println!("cargo:rerun-if-changed={log}");
    }
}

fn validate(variant: &wgsl::Variant, modes: &[&str], files: &BTreeMap<String, String>) -> Result<(), String> {
    let text = wgsl::expand(variant, modes, &|name| files.get(name).map(String::as_str))?;
    let module = naga::front::wgsl::parse_str(&text).map_err(|error| error.emit_to_string(&text))?;
    // A kernel that says `enable f16` or `enable wgpu_cooperative_matrix` is compiled only where the device has it.
    let capabilities = naga::valid::Capabilities::IMMEDIATES
        | naga::valid::Capabilities::SUBGROUP
        | naga::valid::Capabilities::SHADER_FLOAT16
        | naga::valid::Capabilities::SHADER_FLOAT16_IN_FLOAT32
        | naga::valid::Capabilities::COOPERATIVE_MATRIX;
    naga::valid::Validator::new(naga::valid::ValidationFlags::all(), capabilities)
        .validate(&module)
        .map_err(|error| error.emit_to_string(&text))?;
    if !module.entry_points.iter().any(|entry| entry.name == variant.kernel) {
        return Err(format!("the text has no entry point `{}`", variant.kernel));
    }
    Ok(())
}
