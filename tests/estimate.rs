//! What `estimate` says beside what a run then holds, and what is told when it is too much.

mod common;

use std::{collections::BTreeSet, path::Path, sync::atomic::AtomicBool};

use common::{program, read_lines, run, stderr};
use serde_json::Value;
use wgpu_llava::{
    gpu::{AdapterOptions, Gpu},
    hosts::Alone,
    train::{
        config::{Request, RunConfig},
        estimate as of_stages,
        events::Silent,
        run as of_run,
        team::Devices,
    },
};

/// Methods and what else they need to be set.
const METHODS: [(&str, &[&str]); 4] = [
    ("projector", &["version=plain", "mm_projector_type=mlp2x_gelu"]),
    ("full", &[]),
    ("lora", &["lora_dropout=0.1"]),
    ("qlora", &["optim=adamw_8bit"]),
];

fn settings<'a>(method: &'a str, others: &[&'a str], mode: &'a str) -> Vec<String> {
    let mut set = vec![
        format!("method={method}"),
        format!("gradient_checkpointing={mode}"),
        "per_device_train_batch_size=4".to_owned(),
        "gradient_accumulation_steps=2".to_owned(),
        "max_steps=3".to_owned(),
        "r=8".to_owned(),
    ];
    set.extend(others.iter().map(|&other| other.to_owned()));
    set.into_iter().flat_map(|set| ["--set".to_owned(), set]).collect()
}

fn config(folder: &Path) -> String {
    let path = folder.join("run.toml");
    let text = "model_name_or_path = \"embedded:tiny\"\n\
                data_path = [{ path = \"embedded:easy-vqa-questions\", limit = 24 }]\n";
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

fn estimate(config: &str, set: &[String], others: &[&str]) -> Value {
    let mut arguments = vec!["estimate".to_owned(), config.to_owned(), "--json".to_owned()];
    arguments.extend(set.iter().cloned().chain(others.iter().map(|&other| other.to_owned())));
    serde_json::from_slice(&run(arguments).stdout).unwrap()
}

/// Estimates a run and makes it, in a folder of the name `what` below `dir`: what a device holds is what was told, which
/// comes back.
fn held_as_told(dir: &Path, config: &str, set: &[String], what: &str) -> u64 {
    let estimated = estimate(config, set, &[]);
    let stage = &estimated["stages"][0];
    assert_eq!((&stage["fits"], &stage["batch"]["from_data"]), (&true.into(), &true.into()));
    let out = dir.join(what);
    let mut arguments = vec!["train".to_owned(), config.to_owned(), "--quiet".to_owned()];
    arguments.extend(set.iter().cloned());
    arguments.extend(["--output-dir".to_owned(), out.display().to_string()]);
    run(&arguments);
    let held = read_lines(&out.join("metrics.jsonl")).last().unwrap()["device_bytes"].as_u64().unwrap();
    let told = stage["device_bytes"].as_u64().unwrap();
    let ratio = held as f64 / told as f64;
    println!("{what:32} {told:>11} estimated, {held:>11} held: {ratio:.4}");
    assert!((0.95..1.05).contains(&ratio), "{what}: {told} estimated, {held} held");
    told
}

#[test]
fn a_run_holds_what_was_estimated() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    for (method, others) in METHODS {
        for mode in ["none", "selective", "full", "offload"] {
            held_as_told(dir.path(), &config, &settings(method, others, mode), &format!("{method}-{mode}"));
        }
    }
}

/// What each of several devices holds, and that sharding and offload let it hold less.
#[test]
fn devices_hold_what_was_estimated_and_less_when_they_share() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    let told = |method: &str, layout: &str| {
        let set = settings(method, &[layout, "devices=[0, 0, 0]"], "full");
        held_as_told(dir.path(), &config, &set, &format!("{method}-{layout}"))
    };
    let [all, optimizer, gradients, weights, offload] =
        ["zero_stage=0", "zero_stage=1", "zero_stage=2", "zero_stage=3", "offload=true"]
            .map(|layout| told("full", layout));
    // Stage 2 gains nothing more here: two of four layers' gradients have their places, and the embeddings'. Nor does
    // stage 3, with places for two layers beside a third of all four.
    assert!(optimizer < all && gradients < all && weights < all && offload < optimizer);
    assert!(told("lora", "zero_stage=3") < told("lora", "zero_stage=2"));
}

/// Of full fine-tuning of 7B with f32 gradients and bf16 weights each device of eight has: with stage 1 an eighth of the
/// moments and masters, with stage 2 of the gradients too, but for those of two layers and of the embeddings.
#[test]
fn stages_share_what_they_say() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("run.toml");
    std::fs::write(&config, "model_name_or_path = \"llama-7b\"\ndata_path = \"none.json\"\nmethod = \"full\"\n")
        .unwrap();
    let of = |stage: &str| {
        let set = ["precision=bfloat16", "model_max_length=64", stage].map(str::to_owned);
        let set: Vec<String> = set.into_iter().flat_map(|set| ["--set".to_owned(), set]).collect();
        let others = ["--devices", "8", "--tflops", "1", "--link", "1"];
        estimate(&config.display().to_string(), &set, &others)["stages"][0].clone()
    };
    let stages = ["zero_stage=0", "zero_stage=1", "zero_stage=2", "offload=true", "zero_stage=3"].map(of);
    let bytes = |at: usize, kind: &str| stages[at]["bytes"][kind].as_f64().unwrap();
    let parameters = stages[0]["trainable_parameters"].as_f64().unwrap();
    let near = |value: f64, expected: f64| (value / expected - 1.0).abs() < 0.05;
    // trained: a copy in 16 bits and an f32 master.
    assert!(near(bytes(0, "trained"), 6.0 * parameters) && near(bytes(0, "optimizer"), 8.0 * parameters));
    for at in [1, 2] {
        assert!(near(bytes(at, "trained"), 2.5 * parameters) && near(bytes(at, "optimizer"), parameters), "{at}");
    }
    assert!(near(bytes(1, "gradients"), 4.0 * parameters));
    let layer = 202_383_360.0 + 131_072_000.0 / 32.0;
    let passing = 4.0 * (2.0 * layer + 131_072_000.0);
    let gradients = bytes(2, "gradients");
    assert!((0.5 * parameters + 0.9 * passing..0.5 * parameters + 1.1 * passing).contains(&gradients), "{gradients}");
    assert!(near(bytes(3, "trained"), 2.0 * parameters) && bytes(3, "optimizer") < 1e7);
    // Stage 3 has its eighth of the layers' weights, and two layers that take turns.
    let (layers, ends) = (32.0 * 202_383_360.0, 262_144_000.0);
    assert!(near(bytes(4, "trained"), 0.75 * layers + 2.5 * ends) && near(bytes(4, "optimizer"), parameters));
    assert!(near(bytes(4, "gradients"), gradients) && near(bytes(4, "weights"), 4.0 * 202_383_360.0));
    assert!(stages[3]["host_bytes"].as_f64().unwrap() > 16.0 * parameters);
}

/// What weights pass on their way to the device, which a device that only counts does not read.
const OF_LOADING: [&str; 3] = ["cast.", "nf4.quantize.", "nf4.factors"];

/// The kernels that are compiled while weights are loaded are those that a run on a GPU then launches. (Of a host
/// processor's products by lanes, which may be many launches, a device that only counts notes none.)
#[test]
fn the_kernels_of_a_run_are_known_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = config(dir.path());
    let text = std::fs::read_to_string(&path).unwrap();
    let in_16_bits: [(&str, &[&str]); 2] = [("lora", &["precision=float16"]), ("lora", &["precision=bfloat16"])];
    for (method, others) in METHODS.into_iter().chain(in_16_bits) {
        let set: Vec<String> = settings(method, others, "full").into_iter().filter(|word| word != "--set").collect();
        let out = dir.path().join(format!("{method} {}", others.join(" ")));
        let run = RunConfig::resolve(&Request {
            recipe: None,
            file: Some((Path::new(&path), &text)),
            set: &set,
            output_dir: Some(&out),
            default_output_dir: &out,
            working_dir: dir.path(),
        });
        let run = run.unwrap();
        let gpu = Gpu::open(&AdapterOptions { profile: true, treat_as_gpu: true, ..Default::default() }).unwrap();
        let known = of_stages::estimate(&run.stages, gpu.facts(), 1).unwrap().remove(0).launches;
        let known: BTreeSet<&str> = known.names().collect();
        let devices = Devices { checked: true, ..Devices::one(&gpu) };
        of_run::train(&run, false, &devices, &mut Alone, &AtomicBool::new(false), &mut Silent).unwrap();
        let launched = gpu.profile();
        let launched: BTreeSet<&str> = launched.iter().map(|(name, ..)| name.as_str()).collect();
        let of_loading = |name: &&&str| OF_LOADING.iter().any(|start| name.starts_with(start));
        let late: Vec<_> = launched.difference(&known).filter(|name| !of_loading(name)).collect();
        let in_vain: Vec<_> = known.difference(&launched).collect();
        println!("{method}: {} launched, late {late:?}, in vain {in_vain:?}", launched.len());
        assert!(launched.len() > 10 && late.is_empty() && in_vain.is_empty(), "{method}: {late:?} {in_vain:?}");
        // Attention in 16 bits goes by matrices there, and no other does.
        let by_matrices = ["forward", "backward.query", "backward.key_value"]
            .map(|pass| launched.iter().any(|name| name.starts_with(&format!("cooperative_attention.{pass}"))));
        assert_eq!(
            by_matrices,
            [gpu.cooperative_side().is_some() && in_16_bits.iter().any(|of| of.1 == others); 3],
            "{method} {others:?}"
        );
    }
}

#[test]
fn what_does_not_fit_is_refused_with_what_would_make_it_fit() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    let set = settings("full", &[], "none");
    let estimated = estimate(&config, &set, &["--memory", "24MB"]);
    let stage = &estimated["stages"][0];
    assert_eq!(stage["fits"], false);
    let changes = stage["changes"].as_array().unwrap();
    let mut before = stage["total_bytes"].as_u64().unwrap();
    for change in changes {
        let bytes = change["bytes"].as_u64().unwrap();
        assert!(bytes < before, "{changes:?}");
        before = bytes;
    }
    assert!(changes[0]["change"].as_str().unwrap().contains("gradient_checkpointing"), "{changes:?}");
}

/// Models that are not here have the shapes of the released ones of that name.
#[test]
fn released_models_are_known_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.toml");
    let text = "model_name_or_path = \"lmsys/vicuna-7b-v1.3\"\nvision_tower = \"openai/clip-vit-large-patch14-336\"\n\
                data_path = \"llava_instruct_80k.json\"\nmethod = \"lora\"\nr = 64\nmodel_max_length = 1024\n";
    std::fs::write(&path, text).unwrap();
    let estimated = estimate(&path.display().to_string(), &[], &["--memory", "24GB"]);
    let stage = &estimated["stages"][0];
    // 7B and the tower in bf16, adapters and their states in f32.
    let bytes = |kind: &str| stage["bytes"][kind].as_f64().unwrap();
    assert!((14.0e9..14.3e9).contains(&bytes("weights")), "{stage}");
    assert!((0.6e9..0.7e9).contains(&bytes("trained")) && bytes("optimizer") > 1.9 * bytes("trained"), "{stage}");
    assert_eq!(stage["model_found"], false);
    let unknown = program(["estimate", "--set", "model_name_or_path=some/model"]).output().unwrap();
    assert_eq!(unknown.status.code(), Some(3), "{}", stderr(&unknown));
    assert!(stderr(&unknown).contains("its size is not known"), "{}", stderr(&unknown));
}
