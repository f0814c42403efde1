//! A layer split gives the model that one device gives: the decoder's layers lie on several devices, micro-batches follow
//! each other through them, and each device holds its own layers alone.

mod common;
#[path = "common/team.rs"]
mod team;

use team::{Layout, Run};

/// What is trained: a name, a parity case, settings.
type Form = (&'static str, &'static str, &'static str);

const FORMS: &[Form] = &[
    ("projector", "llama3_rope_biases", "method = \"projector\"\nversion = \"plain\"\nlearning_rate = 5e-3"),
    ("lora", "llama3_rope_biases", "method = \"lora\"\nr = 4\nlora_dropout = 0.1\nmm_projector_lr = 1e-4"),
    ("lora_tied", "gqa_tied_mlp_vision", "method = \"lora\"\nr = 4\ngradient_checkpointing = \"full\""),
    ("dora", "mha_untied_linear", "method = \"lora\"\nr = 4\nuse_dora = true"),
    ("qlora", "qlora", "method = \"qlora\"\nr = 4\nlora_dropout = 0.1\ngradient_checkpointing = \"full\""),
    ("full", "mha_untied_linear", "method = \"full\"\nweight_decay = 0.1"),
    ("full_tied", "gqa_tied_mlp_vision", "method = \"full\"\nunfreeze_mm_vision_tower = true\nweight_decay = 0.1"),
];

/// Sums of squares in another order differ in their last bits.
const SUMS: f64 = 1e-5;

#[test]
fn a_split_gives_the_losses_of_one_device() {
    let folder = tempfile::tempdir().unwrap();
    let mut wrong = Vec::new();
    for (name, case, settings) in FORMS {
        let run = Run::new(case, settings, 4, &folder.path().join("run"));
        let one = run.train(Layout::ONE);
        for devices in [2] {
            let distance = run.train(Layout::split(devices)).distance(&one);
            let line = format!("{name:10} {devices} devices: within {distance:.1e}");
            println!("{line}");
            wrong.extend((distance.is_nan() || distance > SUMS).then_some(line));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
