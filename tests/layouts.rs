//! Models in the layouts that people bring (tools/golden_layouts.py), read, answering alike, and converted.

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
};

use common::{golden, numbers, program, read_json, read_lines, run, scores, stderr};
use serde_json::{Value, json};
use wgpu_llava::{
    formats::{
        model_folder::{ModelFolder, Tower},
        safetensors::{Checkpoint, Dtype},
        safetensors_writer::{TensorData, TensorHead, write_safetensors},
    },
    models::{
        config::{ModelConfig, ProjectorType},
        names,
    },
};

/// Largest distance of a log-probability to transformers', nats.
const LOGPROB: f64 = 3e-5;

fn layout(name: &str) -> PathBuf {
    golden("layouts").join(name)
}

/// `score` of a model on a parity case's records against expected lines.
fn assert_scores(model: &Path, case: &str, expected: &Value) {
    let (lines, expected) = (scores(model, case), expected.as_array().unwrap());
    assert_eq!(lines.len(), expected.len());
    for (line, expected) in lines.iter().zip(expected) {
        assert_eq!((&line["id"], &line["tokens"]), (&expected["id"], &expected["tokens"]));
        for (ours, theirs) in numbers(&line["token_logprobs"]).iter().zip(numbers(&expected["token_logprobs"])) {
            assert!((ours - theirs).abs() <= LOGPROB, "{}: {ours}, expected {theirs}", line["id"]);
        }
    }
}

#[test]
fn an_original_checkpoint_in_bin_shards_with_its_tower_elsewhere_answers_as_transformers() {
    assert_scores(&layout("original_bin"), "mha_untied_mlp", &read_json(&layout("expected.json"))["original_bin"]);
}

#[test]
fn an_original_checkpoint_with_a_single_linear_and_its_tower_inside_answers_as_transformers() {
    let expected = read_json(&golden("parity/mha_untied_linear/expected.json"));
    assert_scores(&layout("original_linear"), "mha_untied_linear", &expected["score"]);
}

fn every_name(config: &ModelConfig) -> impl Iterator<Item = String> {
    names::expected_tensors(config).into_iter().chain(names::unused_vision_tensors(config)).map(|(name, _)| name)
}

#[test]
fn a_converted_original_has_the_same_bytes_and_a_token_for_pictures() {
    let dir = tempfile::tempdir().unwrap();
    let convert = |from: &str, to: &str| {
        let out = dir.path().join(to);
        run([Path::new("convert"), Path::new("--from"), &layout(from), Path::new("--out"), &out]);
        ModelFolder::open(&out).unwrap()
    };
    // Its vocabulary has <image> and <pad> already.
    let linear = convert("original_linear", "linear");
    let hf = ModelFolder::open(&golden("parity/mha_untied_linear/model")).unwrap();
    for name in every_name(hf.config()) {
        assert_eq!(linear.tensor(&name).unwrap(), hf.tensor(&name).unwrap(), "{name}");
    }
    assert_eq!(linear.config().llava().unwrap().projector, ProjectorType::Linear);

    let grown = convert("original_bin", "mlp");
    let original = ModelFolder::open(&layout("original_bin")).unwrap();
    let (before, after) = (original.config().text().vocab_size, grown.config().text().vocab_size);
    assert_eq!((before, after), (391, 448));
    let llava = grown.config().llava().unwrap();
    assert_eq!((llava.image_token_index, llava.text_config.pad_token_id), (391, Some(392)));
    for name in every_name(original.config()) {
        let (own, theirs) = (grown.stored(&name).unwrap(), original.stored(&name).unwrap());
        let rows = theirs.rows();
        assert_eq!(own.bytes(0..rows).unwrap(), theirs.bytes(0..rows).unwrap(), "{name}");
    }
    // The same conversion gives the same bytes.
    let again = convert("original_bin", "again");
    for name in [names::EMBED_TOKENS, names::LM_HEAD] {
        assert_eq!(again.tensor(name).unwrap(), grown.tensor(name).unwrap());
        let new = grown.stored(name).unwrap().rows_f32(before..after).unwrap();
        let old = original.tensor(name).unwrap();
        let width = old.shape[1];
        for column in 0..width {
            let mean = old.data.iter().skip(column).step_by(width).sum::<f32>() / before as f32;
            let far = new.iter().skip(column).step_by(width).map(|value| (value - mean).abs()).fold(0.0, f32::max);
            assert!(far < 1e-3, "{name}: a new row is {far} from the mean");
        }
    }
    let tokenizer = read_json(&dir.path().join("mlp/tokenizer.json"));
    let added: Vec<&Value> = tokenizer["added_tokens"].as_array().unwrap().iter().map(|token| &token["id"]).collect();
    assert_eq!(added, [0, 1, 2, 391, 392]);
    assert_eq!(read_json(&dir.path().join("mlp/tokenizer_config.json"))["pad_token"], "<pad>");
}

/// The language model of a parity case alone, as `LlamaForCausalLM`, in the first `rows` rows of its vocabulary.
fn language_model(case: &str, rows: usize, out: &Path) {
    fs::create_dir_all(out).unwrap();
    let source = golden("parity").join(case).join("model");
    let folder = ModelFolder::open(&source).unwrap();
    let mut config = folder.config().to_json("float32")["text_config"].clone();
    config["architectures"] = json!(["LlamaForCausalLM"]);
    config["vocab_size"] = json!(rows);
    fs::write(out.join("config.json"), config.to_string()).unwrap();
    let plain = ModelConfig::parse("config.json", config.to_string().as_bytes()).unwrap();
    let wanted = names::expected_tensors(&plain);
    let heads = wanted.iter().map(|(name, shape)| TensorHead::f32(names::on_disk(name, &plain), shape.clone()));
    write_safetensors(&out.join("model.safetensors"), heads.collect(), &mut |head| {
        let stored = folder.stored(&names::canonical(&head.name))?;
        let rows = if stored.shape.len() > 1 { head.shape[0] } else { 1 };
        Ok(TensorData::F32(stored.rows_f32(0..rows)?.into()))
    })
    .unwrap();
    let mut tokenizer = read_json(&source.join("tokenizer.json"));
    let added = tokenizer["added_tokens"].as_array_mut().unwrap();
    added.retain(|token| token["id"].as_u64().unwrap() < rows as u64);
    fs::write(out.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::copy(source.join("tokenizer_config.json"), out.join("tokenizer_config.json")).unwrap();
}

/// Stage 1 from its real start: a language model, a tower and a projector, each in its own place.
#[test]
fn a_llama_and_a_tower_named_apart_train_as_the_whole_does_in_transformers() {
    let dir = tempfile::tempdir().unwrap();
    let case = golden("parity/mha_untied_mlp");
    language_model("mha_untied_mlp", 393, &dir.path().join("llama"));
    let text = fs::read_to_string(case.join("projector.toml")).unwrap();
    let here = |path: PathBuf| format!("{:?}", path.display().to_string());
    let text = text
        .replace("\"model\"", &here(dir.path().join("llama")))
        .replace("\"captions.json\"", &here(case.join("captions.json")))
        .replace("\"images\"", &here(case.join("images")));
    let parts = format!(
        "vision_tower = {}\nmm_projector_type = \"mlp2x_gelu\"\npretrain_mm_mlp_adapter = {}\n",
        here(layout("clip_tower")),
        here(layout("mm_projector.bin"))
    );
    let config = dir.path().join("run.toml");
    fs::write(&config, parts + &text).unwrap();
    let out = dir.path().join("run");
    // Two stages from such a start are told before they are run, the second without a tower of its own.
    let stages = "\n[[stage]]\nname = \"a\"\n\n[[stage]]\nname = \"b\"\nmethod = \"lora\"\nversion = \"v1\"\n";
    let two = dir.path().join("two.toml");
    fs::write(&two, fs::read_to_string(&config).unwrap() + stages).unwrap();
    run([Path::new("train"), &two, "--dry-run".as_ref()]);
    let refused = |setting: &str| {
        let line = [Path::new("train"), &config, "--dry-run".as_ref(), "--set".as_ref(), setting.as_ref()];
        let output = program(line).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{setting}");
        stderr(&output)
    };
    assert!(refused("mm_projector_type=linear").contains("holds a projector of type mlp2x_gelu"));
    assert!(refused("method=lora").contains("vision_tower with method lora"));
    run([Path::new("train"), &config, Path::new("--output-dir"), &out]);
    let expected = read_json(&case.join("expected.json"));
    let metrics = read_lines(&out.join("metrics.jsonl"));
    let steps = expected["train"]["projector"]["steps"].as_array().unwrap();
    assert_eq!(metrics.len(), steps.len());
    for (got, want) in metrics.iter().zip(steps) {
        let (got, want) = (got["loss"].as_f64().unwrap(), want["loss"].as_f64().unwrap());
        assert!((got - want).abs() <= 2e-5 * want, "{got} for {want}");
    }
    // What comes out is a whole LLaVA.
    let written = ModelFolder::open(&out.join("model")).unwrap();
    let whole = ModelFolder::open(&case.join("model")).unwrap();
    for name in every_name(whole.config()).filter(|name| !name.starts_with(names::PROJECTOR)) {
        assert_eq!(written.tensor(&name).unwrap(), whole.tensor(&name).unwrap(), "{name}");
    }
    assert_eq!(written.config().llava().unwrap().image_token_index, 391);
}

/// What is trained for another size, or on padded pictures, says so to whoever loads it.
#[test]
fn a_written_model_takes_pictures_as_it_was_trained_to() {
    let dir = tempfile::tempdir().unwrap();
    let case = golden("parity/mha_untied_mlp");
    let out = dir.path().join("run");
    let config = case.join("projector.toml");
    let settings = ["image_size=42", "max_steps=1", "image_aspect_ratio=\"pad\""];
    let mut arguments =
        vec!["train".into(), config.display().to_string(), "--output-dir".into(), out.display().to_string()];
    arguments.extend(settings.iter().flat_map(|setting| ["--set".to_owned(), (*setting).to_owned()]));
    run(arguments);
    let written = ModelFolder::open(&out.join("model")).unwrap();
    assert_eq!(written.config().llava().unwrap().vision_config.image_size, 42);
    let processing = written.preprocessor_config().unwrap().unwrap();
    assert_eq!((&processing["crop_size"], &processing["do_pad"]), (&json!({"height": 42, "width": 42}), &json!(true)));
    let shape = written.tensor(names::POSITION_EMBEDDING).unwrap().shape;
    let again = wgpu_llava::models::open::sized(written, None).unwrap();
    assert!(shape == [10, 24] && !again.is_resized());
    let processor = wgpu_llava::models::open::processor(&again, false).unwrap().unwrap();
    assert_eq!(processor.output_size(), Some((42, 42)));
}

#[test]
fn a_vocabulary_without_a_token_for_pictures_grows() {
    let dir = tempfile::tempdir().unwrap();
    language_model("mha_untied_mlp", 391, dir.path());
    let join = || {
        let llama = ModelFolder::open(dir.path()).unwrap();
        llama.joined(Tower::open(&layout("clip_tower")).unwrap(), ProjectorType::Linear, 7).unwrap()
    };
    let joined = join();
    assert!(!joined.has_projector());
    let llava = joined.config().llava().unwrap();
    assert_eq!((llava.text_config.vocab_size, llava.image_token_index), (448, 391));
    let tokenizer = wgpu_llava::models::open::tokenizer(&joined).unwrap();
    assert_eq!((tokenizer.image_id, tokenizer.pad_id), (Some(391), Some(392)));
    assert_eq!(joined.tensor(names::LM_HEAD).unwrap(), join().tensor(names::LM_HEAD).unwrap());
    let twice = joined.joined(Tower::open(&layout("clip_tower")).unwrap(), ProjectorType::Linear, 7);
    assert!(twice.err().unwrap().message.contains("has a vision tower already"));
}

#[test]
fn position_embeddings_for_other_sizes_are_those_of_transformers() {
    let expected = &read_json(&layout("expected.json"))["position_embeddings"];
    for (size, values) in expected.as_object().unwrap() {
        let folder = ModelFolder::open(&layout("original_bin")).unwrap();
        let resized = folder.with_image_size(size.parse().unwrap()).unwrap();
        let found = resized.tensor(names::POSITION_EMBEDDING).unwrap();
        let wanted = numbers(values);
        assert_eq!(found.len(), wanted.len(), "{size}");
        for (found, wanted) in found.data.iter().zip(wanted) {
            assert!((f64::from(*found) - wanted).abs() <= 4e-6, "{size}: {found} for {wanted}");
        }
    }
    let folder = ModelFolder::open(&layout("original_bin")).unwrap();
    assert!(folder.with_image_size(30).err().unwrap().message.contains("not whole patches of 14"));
}

#[test]
fn what_an_original_checkpoint_lacks_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    common::copy_folder(&layout("original_bin"), &model);
    let refused = |model: &Path| ModelFolder::open(model).err().expect("a broken folder was opened");
    let error = refused(&model);
    assert!(error.message.contains("mm_vision_tower is `openai/clip_tower`, and there is no such folder"), "{error}");
    assert!(error.hints[0].contains("vision_tower"));
    assert!(ModelFolder::open_with_tower(&model, Some(&layout("clip_tower"))).is_ok());
    common::copy_folder(&layout("clip_tower"), &dir.path().join("clip_tower"));
    assert!(ModelFolder::open(&model).is_ok());
    let edit = |key: &str, value: Value| {
        let mut config = read_json(&layout("original_bin/config.json"));
        config[key] = value;
        fs::write(model.join("config.json"), config.to_string()).unwrap();
    };
    for (key, value, part) in [
        ("mm_hidden_size", json!(25), "mm_hidden_size is 25, and the vision tower is 24 wide"),
        ("mm_projector_type", json!("mlp3x_gelu"), "`mlp3x_gelu` is not built yet"),
        ("mm_projector_type", json!("linear"), "unknown: model.mm_projector.2"),
        ("mm_use_im_start_end", json!(true), "mm_use_im_start_end"),
        ("mm_patch_merge_type", json!("spatial_unpad"), "mm_patch_merge_type"),
        ("vocab_size", json!(400), "config.json asks for [400, 72]"),
    ] {
        edit(key, value);
        let error = refused(&model);
        assert!(error.message.contains(part), "{part}: {error}");
    }
}

#[test]
fn a_gguf_file_becomes_a_folder_of_its_values() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let gguf = golden("gguf/tiny_llama.gguf");
    run([Path::new("convert"), Path::new("--from"), &gguf, Path::new("--out"), &out]);
    let (written, expected) =
        (Checkpoint::open(&out).unwrap(), Checkpoint::open(&golden("gguf/tiny_llama.safetensors")).unwrap());
    assert_eq!(written.names().collect::<Vec<_>>(), expected.names().collect::<Vec<_>>());
    for name in expected.names() {
        let (ours, theirs) = (written.require(name).unwrap(), expected.require(name).unwrap());
        assert_eq!(ours.to_f32().unwrap(), theirs.to_f32().unwrap(), "{name}");
    }
    // The file itself is a model, too.
    let folder = ModelFolder::open(&gguf).unwrap();
    assert_eq!(folder.config().text().hidden_size, ModelFolder::open(&out).unwrap().config().text().hidden_size);
}

#[test]
fn converting_to_a_dtype_rounds_once_and_refuses_what_does_not_fit() {
    let dir = tempfile::tempdir().unwrap();
    let source = golden("parity/gqa_tied_mlp_vision/model");
    for (dtype, name) in [(Dtype::BF16, "bfloat16"), (Dtype::F16, "float16")] {
        let out = dir.path().join(name);
        run([
            Path::new("convert"),
            Path::new("--from"),
            &source,
            Path::new("--out"),
            &out,
            "--dtype".as_ref(),
            name.as_ref(),
        ]);
        let (ours, theirs) = (ModelFolder::open(&out).unwrap(), ModelFolder::open(&source).unwrap());
        assert_eq!(ours.dtype().unwrap(), dtype);
        assert_eq!(read_json(&out.join("config.json"))["dtype"], name);
        for tensor in every_name(theirs.config()) {
            let rounded = |value: &f32| match dtype {
                Dtype::BF16 => half::bf16::from_f32(*value).to_f32(),
                _ => half::f16::from_f32(*value).to_f32(),
            };
            let wanted: Vec<f32> = theirs.tensor(&tensor).unwrap().data.iter().map(rounded).collect();
            assert_eq!(ours.tensor(&tensor).unwrap().data, wanted, "{tensor}");
        }
    }
    let again =
        program([Path::new("convert"), Path::new("--from"), &source, Path::new("--out"), &dir.path().join("float16")]);
    let output = { again }.output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("is there already"), "{}", stderr(&output));
}

/// model.md §4.2: parameters of the language models, and of LLaVA with a linear or a deep projector at 336 pixels.
#[test]
fn the_published_sizes_open_with_random_weights_that_are_never_made() {
    let rows = [
        ("7B", 4096, 11008, 32, 32, 1e-5, 6_738_415_616, 7_062_902_784_usize),
        ("13B", 5120, 13824, 40, 40, 1e-5, 13_015_864_320, 13_350_839_296),
        ("33B", 6656, 17920, 60, 52, 1e-6, 32_528_943_616, 32_883_582_464),
        ("65B", 8192, 22016, 80, 64, 1e-5, 65_285_660_672, 65_664_681_984),
    ];
    for (name, hidden, inner, layers, heads, eps, language, whole) in rows {
        let text = json!({"model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
            "num_hidden_layers": layers, "num_attention_heads": heads, "rms_norm_eps": eps, "vocab_size": 32000});
        let config = json!({"model_type": "llava", "text_config": text}).to_string();
        let config = ModelConfig::parse("config.json", config.as_bytes()).unwrap();
        let folder = ModelFolder::random(&config, Dtype::BF16, 1).unwrap();
        let count = |name: String| folder.stored(&name).unwrap().len();
        let of_language = names::language_tensors(config.text()).into_iter().map(|(name, _)| name);
        assert_eq!(of_language.map(count).sum::<usize>(), language, "{name}");
        // The published count has the whole tower.
        assert_eq!(every_name(&config).map(count).sum::<usize>(), whole, "{name}");
        let down = folder.stored(&format!("language_model.model.layers.{}.mlp.down_proj.weight", layers - 1)).unwrap();
        assert_eq!((down.shape.as_slice(), down.dtype()), (&[hidden, inner][..], Dtype::BF16));
        let row = down.rows_f32(hidden - 1..hidden).unwrap();
        assert!(row.len() == inner && row.iter().any(|&value| value != row[0]));
        assert_eq!(row, down.rows_f32(hidden - 2..hidden).unwrap()[inner..]);
    }
}
