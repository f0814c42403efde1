//! Optimisers and precisions, step by step against PyTorch and bitsandbytes: every config of tests/golden/optim
//! (tools/golden_optim.py) through the program.

mod common;

use std::{collections::BTreeSet, fs, path::Path};

use common::{golden, program, read_json, read_lines, run, stderr};
use serde_json::Value;

/// Relative: loss, gradient norm.
type Tolerance = (f64, f64);

/// f32 throughout.
const EXACT: Tolerance = (2e-5, 1e-4);
/// An index of a moment that lies between two may fall to either side, and so may a weight that is rounded.
const EIGHT_BITS: Tolerance = (2e-4, 5e-3);
/// A value that lies between two of 16 bits may fall to either side, and the runs part from there.
const ROUNDED: Tolerance = (1e-3, 5e-3);
/// Of the first step's loss, before they part.
const FIRST: f64 = 1e-4;
/// Against a model that is in 16 bits with its activations and gradients.
const WHOLE: Tolerance = (1e-2, 1e-1);

fn compare(what: &str, got: &Value, want: &Value, (loss, grad_norm): Tolerance, wrong: &mut Vec<String>) {
    let (mut line, mut fits) = (format!("{what}:"), true);
    for (key, tolerance) in [("loss", loss), ("grad_norm", grad_norm)] {
        let (got, want) = (got[key].as_f64().unwrap_or(f64::NAN), want[key].as_f64().unwrap());
        let error = (got - want).abs() / want.abs();
        fits &= error <= tolerance;
        line += &format!(" {key} {got} for {want} ({error:.1e})");
    }
    println!("{line}");
    if !fits {
        wrong.push(line);
    }
}

fn check(name: &str, tolerance: Tolerance) {
    let folder = golden("optim").join(name);
    let out = tempfile::tempdir().unwrap();
    let dir = out.path().join("run");
    run([Path::new("train"), &folder.join("run.toml"), Path::new("--output-dir"), &dir]);
    let expected = read_json(&folder.join("expected.json"));
    let steps = expected["steps"].as_array().unwrap();
    let metrics = read_lines(&dir.join("metrics.jsonl"));
    assert_eq!((metrics.len(), steps.len()), (12, 12));
    let mut wrong = Vec::new();
    for (got, want) in metrics.iter().zip(steps) {
        assert_eq!((&got["step"], &got["target_tokens"]), (&want["step"], &want["target_tokens"]));
        let what = format!("{name}, step {}", want["step"]);
        let loss = if want["step"] == 1 { FIRST.min(tolerance.0) } else { tolerance.0 };
        compare(&what, got, want, (loss, tolerance.1), &mut wrong);
        let whole = &want["whole_model_in_16_bits"];
        if whole.is_object() {
            compare(&format!("{what}, wholly in 16 bits"), got, whole, WHOLE, &mut wrong);
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

macro_rules! runs {
    ($($run:ident: $tolerance:expr;)+) => {
        $(#[test]
        fn $run() {
            check(stringify!($run), $tolerance);
        })+

        const LISTED: &[&str] = &[$(stringify!($run)),+];
    };
}

runs! {
    full_8bit: EIGHT_BITS;
    full_8bit_tied: EIGHT_BITS;
    lora_8bit: EIGHT_BITS;
    lora_bf16: ROUNDED;
    lora_f16: ROUNDED;
    full_bf16: ROUNDED;
    full_bf16_biases: ROUNDED;
    full_bf16_8bit: ROUNDED;
    full_f16: ROUNDED;
    tower: EXACT;
    tower_bf16: ROUNDED;
}

#[test]
fn every_config_of_the_fixtures_is_listed() {
    let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name().to_string_lossy().into_owned();
    let found: BTreeSet<String> = fs::read_dir(golden("optim")).unwrap().map(name).collect();
    assert_eq!(found, LISTED.iter().map(|run| run.to_string()).collect());
}

/// A factor so large that gradients overflow even f32: steps are skipped until it fits, and then training goes on.
#[test]
fn an_overflow_is_skipped_and_training_recovers() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let config = golden("optim/full_f16/run.toml");
    let train = |sets: &[&str]| {
        let mut command = program([Path::new("train"), &config, Path::new("--output-dir"), &out]);
        command.args(sets.iter().flat_map(|set| ["--set", set]));
        command.output().unwrap()
    };
    let output = train(&["initial_scale_power=72", "max_steps=30", "loss_scale_window=8", "warmup_steps=0"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("overflowed") && stderr(&output).contains("skipped"), "{}", stderr(&output));
    let metrics = read_lines(&out.join("metrics.jsonl"));
    let skipped: Vec<bool> = metrics.iter().map(|line| line["grad_norm"].is_null()).collect();
    let count = skipped.iter().filter(|&&skipped| skipped).count();
    let first_good = skipped.iter().position(|&skipped| !skipped).unwrap();
    assert!((4..20).contains(&first_good) && skipped[first_good..][..8] == [false; 8], "{skipped:?}");
    assert_eq!(metrics[29]["skipped_steps"], count);
    // Nothing changes in a skipped step: the first loss comes again with its records.
    let loss = |step: usize| metrics[step]["loss"].as_f64().unwrap();
    let scale = |step: usize| metrics[step]["loss_scale"].as_f64().unwrap();
    let power = |step: usize| scale(step).log2().round();
    assert_eq!([power(0), power(1), power(2)], [72.0, 72.0, 71.0]);
    assert!(metrics.iter().all(|line| line["loss"].as_f64().unwrap().is_finite()));
    assert!(loss(29) < 0.8 * loss(0), "{} to {}", loss(0), loss(29));
    // A window of good steps tries a larger factor again.
    let powers: Vec<f64> = (0..30).map(power).collect();
    assert!(powers.windows(2).any(|pair| pair[1] == pair[0] + 1.0), "{powers:?}");
}

#[test]
fn where_no_smaller_factor_is_left_the_run_says_so() {
    for set in ["loss_scale=1e28", "min_loss_scale=1e28"] {
        let folder = tempfile::tempdir().unwrap();
        let config = golden("optim/full_f16/run.toml");
        let out = folder.path().join("run");
        let mut command = program([Path::new("train"), &config, Path::new("--output-dir"), &out]);
        let output = command.args(["--set", set]).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        assert!(stderr(&output).contains("overflowed") && stderr(&output).contains("bfloat16"), "{}", stderr(&output));
    }
}

/// What the model read in training is what is written: 16 bits.
#[test]
fn a_model_trained_in_16_bits_is_written_so() {
    for (run_name, dtype, sets) in [
        ("full_bf16", "bfloat16", &["stochastic_rounding=true"][..]),
        ("full_bf16", "bfloat16", &[]),
        ("full_f16", "float16", &[]),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("run");
        let config = golden("optim").join(run_name).join("run.toml");
        let mut command = program([Path::new("train"), &config, Path::new("--output-dir"), &out]);
        command.args(sets.iter().flat_map(|set| ["--set", set]));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        let written = wgpu_llava::formats::safetensors::Checkpoint::open(&out.join("model")).unwrap();
        let weight = written.require("language_model.model.layers.0.self_attn.q_proj.weight").unwrap();
        assert_eq!(weight.bytes.len(), 2 * weight.len(), "{run_name}");
        assert_eq!(read_json(&out.join("model/config.json"))["dtype"], dtype);
        let metrics = read_lines(&out.join("metrics.jsonl"));
        let loss = |step: usize| metrics[step]["loss"].as_f64().unwrap();
        assert!(loss(11) < 0.8 * loss(0), "{run_name} {sets:?}: {} to {}", loss(0), loss(11));
    }
}
