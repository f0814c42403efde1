//! What several devices cost: how much of a slow link hides behind the backward, and how much time two devices lose on the
//! same processor beside one.
//!
//! Runs by hand, on a machine that does nothing else:
//! `cargo test --release --test overlap -- --ignored --nocapture --test-threads 1`

mod common;
#[path = "common/team.rs"]
mod team;

use std::{fs, path::Path};

use common::{copy_folder, forget_the_tower, golden, hash_values, read_json};
use serde_json::json;
use team::{Layout, Outcome, Run};
use wgpu_llava::{
    formats::safetensors_writer::{TensorData, TensorHead, write_safetensors},
    models::{config::ModelConfig, names},
    train::{
        estimate::{Cluster, Rates, estimate},
        team::SlowLink,
    },
};

/// As many that what is whole only at the end of a backward, the first layer and the embeddings, is a small part of all, as
/// in large models.
const LAYERS: usize = 24;
const HIDDEN: usize = 64;
/// Steps before those that count.
const WARM_UP: usize = 2;
/// How often both are measured of which a ratio is told, in turn: what else the machine does comes and goes. Of all steps
/// the medians count; where two devices share two cores the shortest is a lucky one.
const TURNS: usize = 3;

/// A machine but for its devices and links.
const NO_BOUND: Rates =
    Rates { flops: 0.0, down: 0.0, up: 0.0, adding: 1e12, updating: 1e12, network: 1e12, on_host: false };
const TWO: Cluster = Cluster { devices: 2, hosts: 1, parts: 1 };

/// A LLaMA of [`LAYERS`] layers, and long records for it, in `folder`; gives how many weights it has.
fn write_case(folder: &Path) -> usize {
    let model = folder.join("model");
    copy_folder(&golden("parity/mha_untied_linear/model"), &model);
    forget_the_tower(&model);
    let path = model.join("config.json");
    let mut config = read_json(&path);
    for (key, value) in [
        ("hidden_size", HIDDEN),
        ("intermediate_size", 3 * HIDDEN),
        ("num_hidden_layers", LAYERS),
        ("num_attention_heads", 4),
        ("num_key_value_heads", 4),
        ("head_dim", HIDDEN / 4),
    ] {
        config[key] = json!(value);
    }
    fs::write(&path, config.to_string()).unwrap();
    let tensors = names::expected_tensors(&ModelConfig::load(&path).unwrap());
    let elements = |shape: &[usize]| shape.iter().product::<usize>();
    let own = |name: &str| name.strip_prefix("language_model.").unwrap_or(name).to_owned();
    let heads = tensors.iter().map(|(name, shape)| TensorHead::f32(own(name), shape.clone())).collect();
    write_safetensors(&model.join("model.safetensors"), heads, &mut |head| {
        let offset = if head.shape.len() == 1 { 1.0 } else { 0.0 };
        Ok(TensorData::F32(hash_values(head.name.len() as u32, elements(&head.shape), 0.05, offset).into()))
    })
    .unwrap();
    let record = |at: usize| {
        json!({"id": at, "conversations": [
            {"from": "human", "value": format!("What is number {at}?")},
            {"from": "gpt", "value": format!("It is {at}, and no other. ").repeat(40)}]})
    };
    fs::write(folder.join("data.json"), json!((0..16).map(record).collect::<Vec<_>>()).to_string()).unwrap();
    tensors.iter().map(|(_, shape)| elements(shape)).sum()
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// Seconds of the steps that count.
fn seconds(outcome: &Outcome) -> impl Iterator<Item = f64> {
    outcome.steps[WARM_UP..].iter().map(|step| step.step_seconds)
}

fn run_in(folder: &Path, steps: usize, micro_batches: usize) -> Run {
    let settings =
        format!("method = \"full\"\nshuffle = false\nmodel_max_length = 160\nmax_steps = {}", WARM_UP + steps);
    Run::new(&folder.display().to_string(), &settings, micro_batches, &folder.join("run"))
}

/// With a transfer that takes so many times what is computed, a step takes the longer of both, and what cannot hide: of one
/// micro-batch its forward (but for weights that return), and the last bucket's way.
fn transfers_hide(layout: Layout, each: usize) {
    let folder = tempfile::tempdir().unwrap();
    let weights = write_case(folder.path());
    println!("{weights} weights");
    let mut wrong = Vec::new();
    let mut run = run_in(folder.path(), 2 + 8 / each, each * layout.devices);
    let facts = team::gpus(1)[0].facts().clone();
    let traffic = estimate(&run.config(layout).unwrap().stages, &facts, layout.devices).unwrap()[0].traffic;
    let mut all_computes: Vec<f64> = seconds(&run.train(layout)).collect();
    // To the host gradients, in every round under stage 2, and the weights that are updated here; from there the sum,
    // or the part of it that is updated here and the weights that are not. The first are never fewer.
    let of_all = if layout.zero_stage == 2 { each as f64 + 0.5 } else { 1.0 };
    let bytes = 4.0 * weights as f64 * of_all;
    for ratio in [0.25, 0.5, 1.0, 2.0, 4.0] {
        let transfer = ratio * median(&all_computes);
        let link = SlowLink { bytes_per_second: bytes / transfer };
        // In turn, so that both have the same of what else the machine does.
        let (mut computes, mut steps) = (Vec::new(), Vec::new());
        for _ in 0..TURNS {
            for (slow, times) in [(None, &mut computes), (Some(link), &mut steps)] {
                run.slow = slow;
                times.extend(seconds(&run.train(layout)));
            }
        }
        run.slow = None;
        all_computes.extend(&computes);
        let (compute, step) = (median(&computes), median(&steps));
        let longer = compute.max(transfer);
        let rate = link.bytes_per_second;
        let rates = Rates { flops: 1.0 / compute, down: rate, up: rate, ..NO_BOUND };
        let predicted = traffic.step_time(1.0, each as f64, TWO, &rates).seconds();
        let line = format!(
            "ZeRO {}, {each} micro-batches each: compute {compute:.2} s, transfer {transfer:.2} s: step {step:.2} s, \
             {:.2} of the longer, {:.2} of the sum; predicted {predicted:.2} s, {:+.0} %",
            layout.zero_stage,
            step / longer,
            step / (compute + transfer),
            100.0 * (predicted / step - 1.0),
        );
        println!("{line}");
        // What one backward cannot hide of stage 0 the prediction knows.
        let most = if layout.zero_stage == 0 { 1.25 * predicted.max(longer) } else { 1.15 * longer };
        wrong.extend((step > most).then_some(line));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
#[ignore = "a measurement, of minutes"]
fn transfers_hide_behind_one_micro_batch() {
    transfers_hide(Layout::new(2, 0), 1);
}

#[test]
#[ignore = "a measurement, of minutes"]
fn transfers_hide_behind_one_micro_batch_under_stage_2() {
    transfers_hide(Layout::new(2, 2), 1);
}

#[test]
#[ignore = "a measurement, of minutes"]
fn transfers_hide_behind_four_micro_batches_under_stage_2() {
    transfers_hide(Layout::new(2, 2), 4);
}

/// Two devices that share a processor do the work of one in about its time.
#[test]
#[ignore = "a measurement, of minutes"]
fn two_devices_on_one_processor_cost_little_more_than_one() {
    let folder = tempfile::tempdir().unwrap();
    write_case(folder.path());
    for (micro_batches, layout) in [(2, Layout::new(2, 0)), (8, Layout::new(2, 0)), (8, Layout::new(2, 2))] {
        let run = run_in(folder.path(), 4, micro_batches);
        let (mut one, mut two) = (Vec::new(), Vec::new());
        for _ in 0..TURNS {
            for (layout, times) in [(Layout::ONE, &mut one), (layout, &mut two)] {
                times.extend(seconds(&run.train(layout)));
            }
        }
        let (one, two) = (median(&one), median(&two));
        println!("{micro_batches} micro-batches, {layout:?}: {one:.2} s on one, {two:.2} s on two: {:.3}", two / one);
        assert!(two / one < 1.1);
    }
}
