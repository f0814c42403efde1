//! What several tests share: where the fixtures are, the program, the device, and weights made from a hash.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::{Value, json};
use wgpu_llava::{
    formats::{
        HostTensor,
        safetensors::Checkpoint,
        safetensors_writer::{TensorData, TensorHead, write_safetensors},
    },
    gpu::{AdapterOptions, Gpu},
};

/// A file or folder of tests/golden.
pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

pub fn read_json(path: &Path) -> Value {
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The numbers of a JSON list.
pub fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("a list").iter().map(|x| x.as_f64().expect("a number")).collect()
}

/// The best adapter.
pub fn open_gpu() -> Gpu {
    Gpu::open(&AdapterOptions::default()).expect("an adapter; tools/test installs software Vulkan")
}

/// The program with these arguments, to be run.
pub fn program<S: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wgpu-llava"));
    command.args(arguments);
    command
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs the program and fails the test when the program fails.
pub fn run<S: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = S>) -> Output {
    let output = program(arguments).output().expect("the program starts");
    assert!(output.status.success(), "{}: {}", output.status, stderr(&output));
    output
}

/// What `score` prints of a model for a parity case's records.
pub fn scores(model: &Path, case: &str) -> Vec<Value> {
    let case = golden("parity").join(case);
    let (data, images) = (case.join("score.json"), case.join("images"));
    let output = run([
        "score".as_ref(),
        "--model".as_ref(),
        model,
        "--data".as_ref(),
        &data,
        "--image-folder".as_ref(),
        &images,
    ]
    .map(Path::as_os_str));
    let text = String::from_utf8(output.stdout).expect("JSON is UTF-8");
    text.lines().map(|line| serde_json::from_str(line).expect("a JSON value a line")).collect()
}

/// The lines of a JSON Lines file.
pub fn read_lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.lines().map(|line| serde_json::from_str(line).expect("a JSON value a line")).collect()
}

/// Copies a folder with all that is in it.
pub fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a temporary folder is writable");
    for entry in fs::read_dir(from).expect("the fixture is there") {
        let path = entry.expect("the fixture is readable").path();
        let target = to.join(path.file_name().expect("an entry has a name"));
        if path.is_dir() {
            copy_folder(&path, &target);
        } else {
            fs::copy(&path, &target).expect("a temporary folder is writable");
        }
    }
}

/// How many checkpoints a run has left: every one can be read, and nothing has the name of one that is none.
pub fn whole_checkpoints(out: &Path) -> usize {
    let Ok(entries) = fs::read_dir(out) else { return 0 };
    let mut found = 0;
    for path in entries.map(|entry| entry.expect("a run's folder can be read").path()) {
        if path.file_name().expect("an entry has a name").to_string_lossy().starts_with("checkpoint-") {
            let state = read_json(&path.join("trainer_state.json"));
            assert!(state["step"].as_u64().is_some(), "{}", path.display());
            let tensors = Checkpoint::open(&path.join("state.safetensors")).expect("a whole checkpoint");
            assert!(tensors.names().count() > 10, "{}", path.display());
            found += 1;
        }
    }
    found
}

/// Leaves the language model of a LLaVA folder (with one file of weights) alone, as a plain LLaMA.
pub fn forget_the_tower(model: &Path) {
    let path = model.join("config.json");
    let mut config = read_json(&path)["text_config"].take();
    config["model_type"] = json!("llama");
    config["architectures"] = json!(["LlamaForCausalLM"]);
    fs::write(path, config.to_string()).expect("a temporary folder is writable");
    let weights = model.join("model.safetensors");
    let whole = Checkpoint::open(&weights).expect("the fixture is whole");
    let mut kept: Vec<(String, HostTensor)> = Vec::new();
    for name in whole.names() {
        if let Some(own) = name.strip_prefix("language_model.") {
            kept.push((own.to_owned(), whole.require(name).and_then(|tensor| tensor.to_f32()).expect("a tensor")));
        }
    }
    drop(whole);
    kept.sort_by(|a, b| a.0.cmp(&b.0));
    let heads = kept.iter().map(|(name, tensor)| TensorHead::f32(name.clone(), tensor.shape.clone())).collect();
    write_safetensors(&weights, heads, &mut |head| {
        let at = kept.iter().position(|(name, _)| *name == head.name).expect("one of them");
        Ok(TensorData::F32(kept[at].1.data.clone().into()))
    })
    .expect("a temporary folder is writable");
}

/// u in [-1, 1) of element `index` of tensor `number`: the rule of tools/golden/hash_rule.py.
pub fn hash_value(number: u32, index: usize) -> f64 {
    let mut x = (index as u32).wrapping_add(1).wrapping_mul(2_654_435_761);
    x ^= x >> 16;
    x = x.wrapping_mul(2_246_822_519).wrapping_add(number.wrapping_mul(374_761_393));
    x ^= x >> 13;
    x = x.wrapping_mul(3_266_489_917);
    x ^= x >> 16;
    f64::from(x) / 4_294_967_296.0 * 2.0 - 1.0
}

/// offset + scale * u, rounded once.
pub fn hash_values(number: u32, elements: usize, scale: f64, offset: f64) -> Vec<f32> {
    (0..elements).map(|index| (offset + scale * hash_value(number, index)) as f32).collect()
}

/// The Euclidean norm, summed in f64.
pub fn norm(values: &[f32]) -> f64 {
    values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt()
}

/// Asserts `|got - want| <= tolerance * scale`.
#[track_caller]
pub fn assert_close(what: &str, got: f64, want: f64, tolerance: f64, scale: f64) {
    assert!(
        (got - want).abs() <= tolerance * scale,
        "{what}: {got} instead of {want} (tolerance {tolerance} of {scale})"
    );
}
