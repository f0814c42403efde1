//! An adapter that a vision tower was trained beside carries the tower whole, as PEFT loads a saved module.

mod common;

use std::{collections::BTreeSet, path::Path};

use common::{golden, read_lines, run};
use wgpu_llava::{formats::safetensors::Checkpoint, models::config::ModelConfig, models::names};

#[test]
fn the_tower_is_saved_whole_in_both_spellings_and_read_again() {
    let case = golden("parity/gqa_tied_mlp_vision");
    let out = tempfile::tempdir().unwrap();
    let dir = out.path().join("run");
    let config = case.join("lora.toml");
    let set = ["--set", "unfreeze_mm_vision_tower=true", "--set", "max_steps=2", "--quiet"];
    let arguments = [Path::new("train"), &config, Path::new("--output-dir"), &dir];
    run(arguments.into_iter().chain(set.map(Path::new)));

    let weights = Checkpoint::open(&dir.join("adapter/adapter_model.safetensors")).unwrap();
    let stored: BTreeSet<&str> = weights.names().collect();
    let config = ModelConfig::load(&case.join("model")).unwrap();
    let tower = names::expected_tensors(&config).into_iter().chain(names::unused_vision_tensors(&config));
    let tower: Vec<String> = tower.map(|(name, _)| name).filter(|name| name.starts_with(names::VISION_TOWER)).collect();
    assert!(tower.iter().any(|name| name.contains("post_layernorm")), "{tower:?}");
    for name in &tower {
        let older = format!("base_model.model.model.{name}");
        let newer = older.replace(".vision_tower.vision_model.", ".vision_tower.");
        for name in [older, newer] {
            assert!(stored.contains(name.as_str()), "{name} is missing");
        }
    }

    let score = |adapter: &Path| {
        let scores = out.path().join("scores.jsonl");
        let [model, data, images] = ["model", "score.json", "images"].map(|name| case.join(name));
        let option = |name: &'static str| Path::new(name);
        run([
            option("score"),
            option("--model"),
            &model,
            option("--data"),
            &data,
            option("--image-folder"),
            &images,
            option("--adapter"),
            adapter,
            option("--out"),
            &scores,
            option("--quiet"),
        ]);
        read_lines(&scores)
    };
    assert_ne!(score(&dir.join("adapter")), score(&case.join("adapter-lora")));
}
