//! Every op of `ops::OPS` against its CPU reference at awkward sizes, under every way a device may be used.
//!
//! One test an op and a way, made by walking the list: a new op is tested by being in it.
//! `cargo test --release --test ops -- matmul` runs a part; `-- --nocapture` shows the errors.

use libtest_mimic::{Arguments, Failed, Trial};
use wgpu_llava::{
    gpu::{AdapterFacts, AdapterOptions, Gpu, list_adapters},
    ops::{OPS, Op},
};

/// Below, at and above the tiles and workgroups of 64, and the tokens of one CLIP picture at 336 pixels.
const SIZES: [usize; 5] = [1, 7, 63, 65, 577];
/// For the ways that differ from the plain one in which kernel runs, not in how much of it.
const SMALL_SIZES: [usize; 4] = [1, 7, 63, 65];

struct Way {
    name: &'static str,
    options: fn() -> AdapterOptions,
    sizes: &'static [usize],
    /// Ops that this way changes nothing for are left out.
    concerns: fn(&str) -> bool,
}

const WAYS: [Way; 6] = [
    Way { name: "plain", options: AdapterOptions::default, sizes: &SIZES, concerns: |_| true },
    Way {
        name: "without_subgroups",
        options: || AdapterOptions { without_subgroups: true, ..Default::default() },
        sizes: &SMALL_SIZES,
        // Which take subgroups.
        concerns: |op| !op.starts_with("cooperative"),
    },
    // A binding of 64 KiB holds 128 x 128 elements: from 129 on, every square tensor is cut.
    Way {
        name: "small_binding",
        options: || AdapterOptions { max_binding: Some(1 << 16), ..Default::default() },
        sizes: &[65, 257],
        // What is cut is what `matmul` hands on.
        concerns: |op| !op.starts_with("attention") && !op.starts_with("cooperative"),
    },
    // On a processor the kernels for GPUs are compiled only when they are asked for.
    Way {
        name: "as_gpu",
        options: as_gpu,
        sizes: &[1, 7, 63, 65, 257],
        concerns: |op| {
            let sums = ["rms_norm", "layer_norm", "cross_entropy", "elementwise", "reduce", "dora"];
            ["matmul", "nf4", "attention", "patch_embed"].iter().chain(&sums).any(|family| op.starts_with(family))
        },
    },
    // Products whose operands may be rounded go to kernels of their own there.
    Way {
        name: "as_gpu_cooperative",
        options: || AdapterOptions { treat_as_gpu: true, unpacks_f16: true, ..Default::default() },
        sizes: &[7, 65, 257],
        concerns: |op| {
            ["cooperative", "nf4", "matmul.nt_f16", "matmul.nt_bf16", "matmul.nn_f16", "matmul.nn_bf16", "matmul.joint"]
                .iter()
                .any(|of| op.starts_with(of))
        },
    },
    // Products of more than a few blocks.
    Way {
        name: "large_without_subgroups",
        options: || AdapterOptions { without_subgroups: true, ..Default::default() },
        sizes: &[257],
        concerns: |op| op.starts_with("matmul"),
    },
];

fn main() {
    let arguments = Arguments::from_args();
    let facts = list_adapters(None).ok().and_then(|adapters| adapters.into_iter().next());
    let mut trials = Vec::new();
    for way in &WAYS {
        for op in OPS.iter().filter(|op| (way.concerns)(op.name)) {
            let trial = Trial::test(format!("{}::{}", way.name, op.name), move || check(op, way));
            trials.push(trial.with_ignored_flag(missing(op, facts.as_ref()).is_some()));
        }
    }
    for op in OPS {
        if let Some(what) = missing(op, facts.as_ref()) {
            eprintln!("{} is not checked: this device has no {what}", op.name);
        }
    }
    // As a 7B model's head is to a GPU that binds 128 MiB.
    trials.push(Trial::test("as_gpu_small_binding::matmul", || {
        let options = AdapterOptions { max_binding: Some(1 << 16), ..as_gpu() };
        let gpu = open(&options)?;
        OPS.iter().filter(|op| op.name.contains("matmul")).try_for_each(|op| compare(op, &gpu, 257))
    }));
    trials.push(Trial::test("names_are_unique_and_cost_something", || {
        for (index, op) in OPS.iter().enumerate() {
            let cost = (op.cost)(577);
            if cost.flops + cost.bytes == 0 {
                return Err(format!("{} costs nothing", op.name).into());
            }
            if OPS[..index].iter().any(|other| other.name == op.name) {
                return Err(format!("{} is there twice", op.name).into());
            }
        }
        Ok(())
    }));
    libtest_mimic::run(&arguments, trials).exit();
}

/// What the device that all ways use lacks for an op. Without a device the check itself tells.
fn missing(op: &Op, facts: Option<&AdapterFacts>) -> Option<&'static str> {
    facts.and_then(|facts| op.missing(facts))
}

/// Without the kernels that round operands to f16, so that products are compared with f32.
fn as_gpu() -> AdapterOptions {
    AdapterOptions { treat_as_gpu: true, without_cooperative: true, ..Default::default() }
}

fn open(options: &AdapterOptions) -> Result<Gpu, Failed> {
    Gpu::open(options).map_err(|error| format!("{error}; tools/test installs software Vulkan").into())
}

fn check(op: &Op, way: &Way) -> Result<(), Failed> {
    let gpu = open(&(way.options)())?;
    way.sizes.iter().try_for_each(|&n| compare(op, &gpu, n))
}

fn compare(op: &Op, gpu: &Gpu, n: usize) -> Result<(), Failed> {
    let comparisons = (op.check)(gpu, n).map_err(|error| {
        let cause = error.source.map(|source| source.to_string()).unwrap_or_default();
        format!("{} at {n}: {} {cause}", op.name, error.message)
    })?;
    if comparisons.is_empty() {
        return Err(format!("{} at {n} compares nothing", op.name).into());
    }
    for comparison in &comparisons {
        let error = comparison.error();
        let line =
            format!("{} at {n}: {}: {error:.2e}, {:.0e} allowed", op.name, comparison.what, comparison.tolerance);
        println!("{line}");
        // A NaN is no success either.
        if error.is_nan() || error > comparison.tolerance {
            return Err(line.into());
        }
    }
    Ok(())
}
