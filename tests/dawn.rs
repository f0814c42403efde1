//! Every kernel that the ops launch, asked of a second WebGPU implementation on the same machine: Dawn, whose results
//! must be the engine's (tools/dawn/replay.mjs compares them).
//!
//! Each op's own check runs once more with `AdapterOptions::capture`. Dawn comes from npm: `tools/dawn/install` puts it
//! into target/dawn, and `tools/test` calls that where node and npm are there. Without it, or where Dawn has no adapter,
//! the test is skipped and says so.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use libtest_mimic::{Arguments, Failed, Trial};
use wgpu_llava::{
    gpu::{AdapterOptions, Gpu},
    ops::OPS,
};

/// Kernels that must be among those that were asked: a family that is launched no more would go unnoticed otherwise.
const MAIN: [&str; 20] = [
    "matmul.tiled.nt",
    "matmul.tiled.nn",
    "matmul.tiled.tn",
    "matmul.rows",
    "matmul.by_subgroup",
    "matmul.by_lane",
    "nf4_matmul.tiled",
    "nf4_matmul.rows",
    "nf4.dequantize",
    "nf4.quantize",
    "flash_attention.forward",
    "flash_attention.backward_query",
    "flash_attention.backward_key_value",
    "decode_attention.parts",
    "decode_attention.join",
    "rms_norm",
    "rope",
    "activation.swiglu",
    "cross_entropy",
    "adamw",
];

/// The ops' checks at this size end inside of tiles and vectors.
const SIZE: usize = 65;

fn main() {
    let arguments = Arguments::from_args();
    let modules = modules();
    let missing = missing(&modules);
    if let Some(why) = &missing {
        eprintln!("no kernel is asked of a second WebGPU: {why}");
    }
    let trials = [("as_gpu", true), ("plain", false)].map(|(name, as_gpu)| {
        let modules = modules.clone();
        Trial::test(name, move || compare(&modules, as_gpu)).with_ignored_flag(missing.is_some())
    });
    libtest_mimic::run(&arguments, trials.into()).exit();
}

/// Where `tools/dawn/install` puts Dawn: beside the folder that cargo gives tests.
fn modules() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("dawn")
}

/// Why Dawn cannot be asked on this machine.
fn missing(modules: &Path) -> Option<String> {
    if !modules.join("node_modules/webgpu").is_dir() {
        return Some("Dawn is not installed; tools/dawn/install does it, with npm".into());
    }
    match replay(modules).output() {
        // It has no adapter, and says why; any other failure is the tests' to tell.
        Ok(output) if output.status.code() == Some(77) => Some(String::from_utf8_lossy(&output.stdout).trim().into()),
        Ok(_) => None,
        Err(error) => Some(format!("node does not start: {error}")),
    }
}

fn replay(modules: &Path) -> Command {
    let mut command = Command::new(env::var_os("NODE").unwrap_or("node".into()));
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/dawn/replay.mjs")).arg(modules);
    command
}

fn compare(modules: &Path, as_gpu: bool) -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let captures = folder.path().to_owned();
    // Dawn has no cooperative matrices under naga's name.
    let options = AdapterOptions {
        treat_as_gpu: as_gpu,
        without_cooperative: true,
        capture: Some(captures.clone()),
        ..Default::default()
    };
    let told = |error: wgpu_llava::error::Error| format!("{error}: {:?}", error.source);
    let gpu = Gpu::open(&options).map_err(told)?;
    for op in OPS {
        (op.check)(&gpu, SIZE).map_err(told)?;
    }
    let output = replay(modules).arg(&captures).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    eprintln!("{}", said.trim());
    if !output.status.success() {
        return Err(format!("{said}{}", String::from_utf8_lossy(&output.stderr)).into());
    }
    let mut asked = BTreeSet::new();
    for entry in fs::read_dir(&captures)? {
        asked.insert(entry?.file_name().to_string_lossy().into_owned());
    }
    for main in MAIN {
        let mine = as_gpu != main.contains(".by_");
        if mine && !asked.iter().any(|file| file.starts_with(main)) {
            return Err(format!("no kernel `{main}` was launched").into());
        }
    }
    Ok(())
}
