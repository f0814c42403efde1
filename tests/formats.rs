//! Model and adapter folders made by transformers and PEFT (tools/golden_formats.py), read, written and read again.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use wgpu_llava::{
    error::{ErrorKind, Result},
    formats::{
        HostTensor,
        hf_write::{Changes, Writing, write_model},
        model_folder::ModelFolder,
        peft::{Adapter, LoraWeights},
        safetensors::{Checkpoint, Dtype},
        safetensors_writer::{TensorData, TensorHead, write_safetensors},
    },
    models::{
        config::{ModelConfig, ProjectorType},
        names,
    },
};

const LAYOUTS: [&str; 4] = ["llava_old", "llava_runtime_4_52", "llava_runtime_5", "llava_v5"];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/formats").join(name)
}

fn expected() -> Value {
    serde_json::from_slice(&fs::read(golden("expected.json")).unwrap()).unwrap()
}

/// Every value of `expected` is a summary (shape, sum, first values) of the tensor of that name.
fn assert_summary(name: &str, tensor: &HostTensor, expected: &Value, tolerance: f64) {
    assert_eq!(json!(tensor.shape), expected["shape"], "{name}");
    let sum: f64 = tensor.data.iter().map(|&value| f64::from(value)).sum();
    assert!((sum - expected["sum"].as_f64().unwrap()).abs() < tolerance, "{name}: sum {sum}");
    for (value, wanted) in tensor.data.iter().zip(expected["first"].as_array().unwrap()) {
        assert!((f64::from(*value) - wanted.as_f64().unwrap()).abs() <= tolerance, "{name}: {value} for {wanted}");
    }
}

fn all_tensors(folder: &ModelFolder) -> BTreeMap<String, HostTensor> {
    let config = folder.config();
    let names = names::expected_tensors(config).into_iter().chain(names::unused_vision_tensors(config));
    names.map(|(name, _)| (name.clone(), folder.tensor(&name).unwrap())).collect()
}

/// Every tensor written as `fetch` gives it.
fn all<'a>(fetch: impl FnMut(&str) -> Result<HostTensor> + 'a) -> Changes<'a> {
    Changes::of(|_| true, fetch, Some(Dtype::F32))
}

/// A copy of a golden folder in which a test may break things.
fn copy(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(golden(name)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    dir
}

fn edit_config(folder: &Path, edit: impl FnOnce(&mut Value)) {
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut config);
    fs::write(path, config.to_string()).unwrap();
}

/// Rewrites model.safetensors with the tensors that `edit` leaves.
fn edit_weights(folder: &Path, edit: impl FnOnce(&mut BTreeMap<String, HostTensor>)) {
    let path = folder.join("model.safetensors");
    let checkpoint = Checkpoint::open(&path).unwrap();
    let read = |name: &str| checkpoint.require(name).unwrap().to_f32().unwrap();
    let mut tensors = checkpoint.names().map(|name| (name.to_owned(), read(name))).collect();
    edit(&mut tensors);
    let heads = tensors.iter().map(|(name, tensor)| TensorHead::f32(name, tensor.shape.clone())).collect();
    drop(checkpoint);
    write_safetensors(&path, heads, &mut |head| Ok(TensorData::F32(tensors[&head.name].data.clone().into()))).unwrap();
}

fn refusal(folder: &Path) -> String {
    let error = ModelFolder::open(folder).err().expect("a broken folder was opened");
    assert_eq!(error.kind, ErrorKind::Data, "{error}");
    format!("{} {}", error.message, error.hints.join(" "))
}

#[test]
fn every_layout_gives_the_same_tensors() {
    let expected = expected();
    for layout in LAYOUTS {
        let folder = ModelFolder::open(&golden(layout)).unwrap();
        let tensors = all_tensors(&folder);
        assert_eq!(tensors.len(), expected["llava"].as_object().unwrap().len(), "{layout}");
        for (name, tensor) in &tensors {
            assert_summary(name, tensor, &expected["llava"][name], 1e-12);
        }
        let llava = folder.config().llava().unwrap();
        assert_eq!((llava.vision_layers_used(), llava.image_seq_length(), llava.image_token_index), (2, 4, 3));
        assert_eq!((folder.dtype().unwrap(), folder.eos_token_ids().unwrap()), (Dtype::F32, vec![2]));
    }
}

#[test]
fn a_tied_sharded_bf16_llama_is_read_and_written() {
    let expected = expected();
    let folder = ModelFolder::open(&golden("llama_sharded")).unwrap();
    assert_eq!(folder.dtype().unwrap(), Dtype::BF16);
    assert_eq!(folder.eos_token_ids().unwrap(), [2, 4]);
    let text = folder.config().text();
    assert_eq!((text.tie_word_embeddings, text.rope_theta, text.head_dim), (true, 50000.0, 6));
    let tensors = all_tensors(&folder);
    assert_eq!(tensors.len(), expected["llama"].as_object().unwrap().len());
    for (name, tensor) in &tensors {
        assert_summary(name, tensor, &expected["llama"][name], 1e-12);
    }
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("model");
    write_model(&out, &folder, folder.config(), all(|name| Ok(tensors[name].clone())), &Writing::default()).unwrap();
    let stored = Checkpoint::open(&out).unwrap();
    assert!(stored.get("model.embed_tokens.weight").is_some() && stored.get("lm_head.weight").is_none());
    let again = ModelFolder::open(&out).unwrap();
    assert_eq!(all_tensors(&again), tensors);
    assert_eq!(again.eos_token_ids().unwrap(), [2, 4]);
    assert!(!out.join("preprocessor_config.json").exists());
}

#[test]
fn a_written_llava_is_whole_and_reads_back_equal() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run/model");
    for layout in LAYOUTS {
        let folder = ModelFolder::open(&golden(layout)).unwrap();
        write_model(&out, &folder, folder.config(), all(|name| folder.tensor(name)), &Writing::default()).unwrap();
        let again = ModelFolder::open(&out).unwrap();
        assert_eq!(all_tensors(&again), all_tensors(&folder), "{layout}");
        let stored = Checkpoint::open(&out).unwrap();
        assert_eq!(stored.names().count(), 80);
        assert!(stored.get("vision_tower.vision_model.post_layernorm.weight").is_some());
        assert!(stored.get("vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight").is_some());
        assert_eq!(fs::read_dir(dir.path().join("run")).unwrap().count(), 1, "leftovers beside the folder");
        let crop = &again.preprocessor_config().unwrap().unwrap()["crop_size"];
        assert_eq!(crop, &json!({"height": 8, "width": 8}));
        assert_eq!(again.json("processor_config.json").unwrap().unwrap()["patch_size"], 4);
        assert_eq!(out.join("tokenizer.json").exists(), layout == "llava_old");
        assert_eq!(again.json("tokenizer_config.json").unwrap().is_some(), layout == "llava_old");
    }
}

#[test]
fn a_failure_while_writing_leaves_the_old_folder() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("model");
    let folder = ModelFolder::open(&golden("llava_old")).unwrap();
    write_model(&out, &folder, folder.config(), all(|name| folder.tensor(name)), &Writing::default()).unwrap();
    let wrong = write_model(&out, &folder, folder.config(), all(|_| Ok(HostTensor::zeros([1]))), &Writing::default());
    assert!(wrong.unwrap_err().message.contains("to be written is [1]"));
    assert!(ModelFolder::open(&out).is_ok());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_linear_projector_is_written_with_an_identity_and_recognised() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("model");
    let folder = ModelFolder::open(&golden("llava_old")).unwrap();
    let ModelConfig::Llava(mut llava) = folder.config().clone() else { panic!("not a LLaVA") };
    llava.projector = ProjectorType::Linear;
    let config = ModelConfig::Llava(llava);
    write_model(&out, &folder, &config, all(|name| folder.tensor(name)), &Writing::default()).unwrap();

    let again = ModelFolder::open(&out).unwrap();
    assert_eq!(again.config().llava().unwrap().projector, ProjectorType::Linear);
    let names: Vec<_> =
        names::projector_tensors(again.config().llava().unwrap()).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_1.bias"]);
    assert!(again.tensor("multi_modal_projector.linear_2.weight").unwrap().is_identity());

    edit_weights(&out, |tensors| tensors.get_mut("multi_modal_projector.linear_2.bias").unwrap().data[3] = 0.5);
    assert!(refusal(&out).contains("linear_2.bias is not an identity"));

    // In an adapter too.
    let mut adapter = Adapter::new(2, 4.0, 0.0, false);
    for name in names {
        adapter.saved.insert(name.clone(), folder.tensor(&name).unwrap());
    }
    let path = dir.path().join("adapter");
    adapter.write(&path, &config, "tiny").unwrap();
    let stored = Checkpoint::open(&path.join("adapter_model.safetensors")).unwrap();
    let second = stored.require("base_model.model.model.multi_modal_projector.linear_2.weight").unwrap();
    assert!(second.to_f32().unwrap().is_identity());
    assert_eq!(Adapter::read(&path, &config).unwrap(), adapter);
}

#[test]
fn a_model_in_memory_is_the_same_model_and_may_lack_its_projector() {
    let read = |name: &str| fs::read(golden("llava_old").join(name)).unwrap();
    let files = ["config.json", "model.safetensors", "tokenizer.json"].map(|name| (name.to_owned(), read(name).into()));
    let folder = ModelFolder::in_memory("embedded:x", files).unwrap().with_projector().unwrap();
    assert_eq!(all_tensors(&folder), all_tensors(&ModelFolder::open(&golden("llava_old")).unwrap()));
    assert_eq!(&*folder.require_file("tokenizer.json").unwrap(), read("tokenizer.json"));
    assert!(folder.require_file("x.json").unwrap_err().message.contains("embedded:x holds no x.json"));
    assert!(folder.path().is_none());

    let dir = copy("llava_old");
    edit_weights(dir.path(), |tensors| tensors.retain(|name, _| !name.contains("projector")));
    assert!(refusal(dir.path()).contains("without projector weights"));
    assert!(!ModelFolder::open_base(dir.path()).unwrap().has_projector());
    edit_weights(dir.path(), |tensors| {
        tensors.insert("multi_modal_projector.linear_1.bias".into(), HostTensor::zeros([16]));
    });
    let partly = ModelFolder::open_base(dir.path()).err().expect("half a projector was accepted");
    assert!(partly.message.contains("missing: multi_modal_projector.linear_1.weight [16, 8]"), "{partly}");
}

#[test]
fn vision_layers_behind_the_selected_one_may_be_absent_and_are_written_all_the_same() {
    let dir = copy("llava_old");
    edit_weights(dir.path(), |tensors| {
        tensors.retain(|name, _| !name.contains("layers.2.") && !name.contains("post_lay"))
    });
    let folder = ModelFolder::open(dir.path()).unwrap();
    let out = dir.path().join("out");
    write_model(&out, &folder, folder.config(), Changes::none(), &Writing::default()).unwrap();
    let again = ModelFolder::open(&out).unwrap();
    let norm = again.tensor("vision_tower.vision_model.post_layernorm.weight").unwrap();
    assert_eq!(norm, HostTensor::filled([8], 1.0));
}

#[test]
fn tensors_that_do_not_fit_are_listed_with_both_sides() {
    let dir = copy("llava_old");
    edit_weights(dir.path(), |tensors| {
        let norm = tensors.remove("language_model.model.norm.weight").unwrap();
        tensors.insert("language_model.model.nrom.weight".into(), norm);
        tensors.insert("language_model.model.layers.0.self_attn.k_proj.weight".into(), HostTensor::zeros([16, 16]));
        tensors.insert("language_model.model.layers.0.self_attn.rotary_emb.inv_freq".into(), HostTensor::zeros([2]));
        tensors.insert("vision_tower.vision_model.embeddings.position_ids".into(), HostTensor::zeros([1, 5]));
    });
    let message = refusal(dir.path());
    for part in [
        "missing: language_model.model.norm.weight [16]; the nearest unknown one is language_model.model.nrom.weight",
        "k_proj.weight is [16, 16] in ",
        "model.safetensors, config.json asks for [8, 16]",
        "unknown: language_model.model.nrom.weight; the nearest known one is language_model.model.norm.weight",
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert!(!message.contains("inv_freq") && !message.contains("position_ids"), "{message}");

    let dir = copy("llava_old");
    edit_config(dir.path(), |config| config["text_config"]["num_hidden_layers"] = json!(40));
    assert!(refusal(dir.path()).contains("more are missing"));

    let dir = copy("llava_old");
    edit_weights(dir.path(), |tensors| {
        tensors.insert("model.language_model.norm.weight".into(), HostTensor::zeros([16]));
    });
    assert!(refusal(dir.path()).contains("are both language_model.model.norm.weight"));
}

#[test]
fn a_head_beside_tied_embeddings_is_dropped_if_equal_and_believed_if_not() {
    let dir = copy("llava_old");
    edit_config(dir.path(), |config| config["tie_word_embeddings"] = json!(true));
    let folder = ModelFolder::open(dir.path()).unwrap();
    assert!(!folder.config().text().tie_word_embeddings, "the head differs");
    edit_weights(dir.path(), |tensors| {
        let embeddings = tensors["language_model.model.embed_tokens.weight"].clone();
        tensors.insert("language_model.lm_head.weight".into(), embeddings);
    });
    let folder = ModelFolder::open(dir.path()).unwrap();
    assert!(folder.config().text().tie_word_embeddings && !folder.has("language_model.lm_head.weight"));
}

#[test]
fn missing_files_are_named() {
    let dir = copy("llava_old");
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    assert!(
        refusal(dir.path())
            .contains("holds no weights: none of model.safetensors, model.safetensors.index.json, pytorch_model.bin")
    );
    fs::remove_file(dir.path().join("config.json")).unwrap();
    assert!(refusal(dir.path()).contains("holds no config.json"));
    assert!(refusal(&dir.path().join("nowhere")).contains("there is no model folder"));
    let dir = copy("llama_sharded");
    fs::remove_file(dir.path().join("model-00002-of-00004.safetensors")).unwrap();
    assert!(refusal(dir.path()).contains("model-00002-of-00004.safetensors"));
}

/// scale·B·A, `[out, in]`.
fn delta(weights: &LoraWeights) -> HostTensor {
    let (rank, inputs) = (weights.lora_a.shape[0], weights.lora_a.shape[1]);
    let row = |b: &[f32]| -> Vec<f32> {
        let value = |column: usize| -> f64 {
            let product = |r: usize| f64::from(b[r]) * f64::from(weights.lora_a.data[r * inputs + column]);
            (0..rank).map(product).sum::<f64>() * weights.scale
        };
        (0..inputs).map(|column| value(column) as f32).collect()
    };
    HostTensor::new([weights.lora_b.shape[0], inputs], weights.lora_b.data.chunks(rank).flat_map(row).collect())
}

#[test]
fn adapters_mean_what_peft_computes_and_survive_a_round_trip() {
    let expected = expected();
    let dir = tempfile::tempdir().unwrap();
    let rows = [
        ("adapter_llava", "llava_old", 14, 4),
        ("adapter_llava_4_51", "llava_v5", 14, 0),
        ("adapter_llama", "llama_sharded", 4, 0),
    ];
    for (name, model, modules, saved) in rows {
        let config = ModelConfig::load(&golden(model)).unwrap();
        let adapter = Adapter::read(&golden(name), &config).unwrap();
        assert_eq!((adapter.modules.len(), adapter.saved.len()), (modules, saved), "{name}");
        assert_eq!((adapter.r, adapter.lora_alpha, adapter.lora_dropout), (2, 3.0, 0.05));
        for (module, weights) in &adapter.modules {
            let wanted = &expected[name]["deltas"][module];
            assert_eq!(weights.scale, wanted["scale"].as_f64().unwrap(), "{name} {module}");
            assert_summary(module, &delta(weights), wanted, 2e-6);
        }
        for (tensor, value) in &adapter.saved {
            assert_summary(tensor, value, &expected[name]["saved"][tensor], 1e-12);
        }
        let out = dir.path().join(name);
        adapter.write(&out, &config, "tiny").unwrap();
        assert_eq!(Adapter::read(&out, &config).unwrap(), adapter, "{name}");
        // Names as PEFT writes them with transformers 4.52 and later.
        let keys = |folder: &Path| -> Vec<String> {
            let checkpoint = Checkpoint::open(&folder.join("adapter_model.safetensors")).unwrap();
            checkpoint.names().map(str::to_owned).collect()
        };
        assert_eq!(keys(&out) == keys(&golden(name)), name != "adapter_llava_4_51");
    }
}

#[test]
fn what_an_adapter_config_says_is_what_peft_reads() {
    let dir = tempfile::tempdir().unwrap();
    let written = |adapter: &Adapter, config: &ModelConfig| -> Value {
        adapter.write(&dir.path().join("a"), config, "models/tiny").unwrap();
        serde_json::from_slice(&fs::read(dir.path().join("a/adapter_config.json")).unwrap()).unwrap()
    };
    let llava = ModelConfig::load(&golden("llava_old")).unwrap();
    let llama = ModelConfig::load(&golden("llama_sharded")).unwrap();
    let adapter = Adapter::read(&golden("adapter_llava"), &llava).unwrap();
    let json = written(&adapter, &llava);
    assert_eq!(json["modules_to_save"], json!(["multi_modal_projector"]));
    assert_eq!((&json["lora_alpha"], &json["base_model_name_or_path"]), (&json!(3), &json!("models/tiny")));
    let pattern = json["target_modules"].as_str().unwrap();
    assert!(pattern.starts_with(r"model\.language_model\.layers\.\d+\."), "{pattern}");

    let mut adapter = Adapter::read(&golden("adapter_llama"), &llama).unwrap();
    let json = written(&adapter, &llama);
    assert_eq!((&json["target_modules"], &json["modules_to_save"]), (&json!(["q_proj", "v_proj"]), &Value::Null));
    adapter.modules.remove("language_model.model.layers.0.self_attn.q_proj");
    assert_eq!(written(&adapter, &llama)["target_modules"].as_array().unwrap()[0], "model.layers.0.self_attn.v_proj");

    let adapter = Adapter::read(&golden("adapter_llava_4_51"), &llava).unwrap();
    let json = written(&adapter, &llava);
    assert_eq!(json["rank_pattern"]["model.language_model.layers.1.self_attn.q_proj"], 3);
    assert_eq!(json["alpha_pattern"]["model.language_model.layers.0.mlp.up_proj"], 0.5);
    assert_eq!(json["alpha_pattern"]["model.language_model.layers.1.self_attn.v_proj"], 5);
}

#[test]
fn an_adapter_that_does_not_fit_is_refused_by_name() {
    let llava = ModelConfig::load(&golden("llava_old")).unwrap();
    let llama = ModelConfig::load(&golden("llama_sharded")).unwrap();
    let refusal = |folder: &Path, config: &ModelConfig| {
        let error = Adapter::read(folder, config).expect_err("a broken adapter was accepted");
        assert_eq!(error.kind, ErrorKind::Data, "{error}");
        format!("{} {}", error.message, error.hints.join(" "))
    };
    // A LLaVA's adapter on a LLaMA: the decoder's shapes are others, and the projector belongs nowhere.
    let message = refusal(&golden("adapter_llava"), &llama);
    assert!(message.contains("multi_modal_projector.linear_1.bias") && message.contains("match nothing"), "{message}");

    let config_rows = [
        ("use_dora", json!(true), "has no lora_magnitude_vector"),
        ("use_bdlora", json!({"nblocks": 2}), "use_bdlora: block-diagonal LoRA is not built yet"),
        ("target_parameters", json!(["mlp.experts"]), "target_parameters"),
        ("trainable_token_indices", json!([1, 2]), "trainable_token_indices"),
        ("alora_invocation_tokens", json!([1]), "alora_invocation_tokens"),
        ("arrow_config", json!({"top_k": 1}), "arrow_config"),
        ("megatron_config", json!({"hidden": 1}), "megatron_config"),
        ("init_lora_weights", json!("pissa_niter_4"), "`pissa`, which changes the base weights"),
        ("target_modules", json!(["q_proj", "lm_head"]), "holds nothing of lm_head"),
        ("peft_type", json!("IA3"), "`IA3` is not built yet"),
        ("r", json!(3), "down_proj is [2, 20], [3, 20] is expected"),
        ("modules_to_save", json!(["multi_modal_projector", "lm_head"]), "holds nothing of lm_head"),
        ("rank_pattern", json!({"(": 3}), "rank_pattern.( is not a pattern"),
        ("bias", json!("some"), "bias: `some` is not built yet"),
    ];
    for (key, value, part) in config_rows {
        let dir = copy("adapter_llava");
        let path = dir.path().join("adapter_config.json");
        let mut json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        json[key] = value;
        fs::write(&path, json.to_string()).unwrap();
        let message = refusal(dir.path(), &llava);
        assert!(message.contains(part), "{part}: {message}");
    }

    let down = "base_model.model.model.language_model.layers.0.mlp.down_proj";
    let weights_rows = [
        ("x.model.language_model.layers.0.mlp.down_proj.lora_A.weight", "match nothing in the model"),
        ("base_model.model.model.language_model.layers.7.mlp.down_proj.lora_A.weight", "the nearest is"),
        ("base_model.model.model.language_model.layers.0.mlp.down_proj.lora_C.weight", "match nothing in the model"),
        (
            "base_model.model.model.language_model.layers.0.mlp.down_projs.lora_A.weight",
            &format!("{down}.lora_A.weight"),
        ),
        ("base_model.model.model.language_model.norm.lora_A.weight", "match nothing in the model"),
    ];
    for (name, part) in weights_rows {
        let dir = copy("adapter_llava");
        fs::rename(dir.path().join("adapter_model.safetensors"), dir.path().join("model.safetensors")).unwrap();
        edit_weights(dir.path(), |tensors| {
            tensors.insert(name.into(), HostTensor::zeros([2, 20]));
        });
        fs::rename(dir.path().join("model.safetensors"), dir.path().join("adapter_model.safetensors")).unwrap();
        let message = refusal(dir.path(), &llava);
        assert!(message.contains(part) && message.contains(name), "{part}: {message}");
    }
    // What belongs to a module, but does not fit it, or lacks its counterpart.
    let module = "language_model.model.layers.0.mlp.down_proj";
    let named_rows = [
        ("lora_magnitude_vector", vec![16], "has a lora_magnitude_vector, but use_dora is false"),
        (
            "lora_B.bias",
            vec![20],
            "lora_B.bias of language_model.model.layers.0.mlp.down_proj is [20], [16] is expected",
        ),
        ("lora_B.weight", vec![0], "saved it without gathering"),
        ("lora_A.other.weight", vec![2, 20], "under another name, with other values"),
    ];
    for (name, shape, part) in named_rows {
        let dir = copy("adapter_llava");
        fs::rename(dir.path().join("adapter_model.safetensors"), dir.path().join("model.safetensors")).unwrap();
        edit_weights(dir.path(), |tensors| {
            tensors.insert(format!("{down}.{name}"), HostTensor::zeros(shape));
        });
        fs::rename(dir.path().join("model.safetensors"), dir.path().join("adapter_model.safetensors")).unwrap();
        let message = refusal(dir.path(), &llava);
        assert!(message.contains(part), "{part}: {message}");
    }
    let dir = copy("adapter_llava");
    fs::rename(dir.path().join("adapter_model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    edit_weights(dir.path(), |tensors| {
        tensors.remove(&format!("{down}.lora_B.weight"));
        let tower = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight";
        tensors.insert(tower.into(), HostTensor::zeros([2, 8]));
    });
    fs::rename(dir.path().join("model.safetensors"), dir.path().join("adapter_model.safetensors")).unwrap();
    let message = refusal(dir.path(), &llava);
    assert!(message.contains(&format!("{module} has no lora_B")), "{message}");

    let dir = copy("adapter_llava");
    fs::remove_file(dir.path().join("adapter_model.safetensors")).unwrap();
    assert!(refusal(dir.path(), &llava).contains("adapter_model.safetensors"));
    fs::remove_file(dir.path().join("adapter_config.json")).unwrap();
    assert!(refusal(dir.path(), &llava).contains("holds no adapter_config.json"));
}

/// Any damage gives a data error or a model, never a panic: bytes changed, cut off or repeated at places that a fixed
/// sequence of pseudo-random numbers picks.
#[test]
fn damaged_files_never_panic() {
    let mut state = 1u64;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below.max(1)
    };
    let config = ModelConfig::load(&golden("llava_old")).unwrap();
    let model = copy("llava_old");
    let adapter = copy("adapter_llava");
    for (dir, name) in [
        (&model, "config.json"),
        (&model, "model.safetensors"),
        (&adapter, "adapter_config.json"),
        (&adapter, "adapter_model.safetensors"),
    ] {
        let path = dir.path().join(name);
        let whole = fs::read(&path).unwrap();
        // Of the weights it is the header that can lead astray.
        let reach = whole.len().min(8 + 12_000);
        for _ in 0..300 {
            let mut bytes = whole.clone();
            match random(4) {
                0 => bytes.truncate(random(reach)),
                1 => bytes[random(8)] = random(256) as u8,
                2 => {
                    let from = random(reach);
                    let part = bytes[from..reach.min(from + random(80))].to_vec();
                    let at = random(reach);
                    bytes.splice(at..at, part);
                }
                _ => (0..=random(3)).for_each(|_| bytes[random(reach)] = b"0919\"{}[],:-eanlr\x00\xff"[random(19)]),
            }
            fs::write(&path, bytes).unwrap();
            let error = if std::ptr::eq(dir, &model) {
                ModelFolder::open(dir.path()).err()
            } else {
                Adapter::read(dir.path(), &config).err()
            };
            assert!(error.is_none_or(|error| error.kind == ErrorKind::Data && !error.message.is_empty()));
        }
        fs::write(&path, whole).unwrap();
    }
}
