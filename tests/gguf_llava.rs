//! Models written as GGUF and in the original authors' layout, read again: the same values, the same answers.

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
};

use common::{golden, numbers, program, read_json, run, scores, stderr};
use serde_json::{Value, json};
use wgpu_llava::{
    data::{
        Tokenizer,
        gguf_tokenizer::GgufVocabulary,
        gguf_vocabulary::{Parts, Written},
        sentencepiece::{SentencePieceModel, TokenizerFiles},
    },
    error::ErrorKind,
    formats::{
        gguf::{
            self, GgufFile, vocabulary,
            write::{GgufHead, write_gguf},
        },
        gguf_write::write_gguf_model,
        model_folder::ModelFolder,
        safetensors::{Checkpoint, Dtype},
        safetensors_writer::TensorData,
    },
    models::{
        config::{Family, ProjectorType},
        names,
    },
    rng::Rng,
};

fn convert(from: &Path, out: &Path, more: &[&str]) -> String {
    let mut arguments = vec!["convert".into(), "--from".into(), from.as_os_str().to_owned(), "--out".into()];
    arguments.push(out.as_os_str().to_owned());
    arguments.extend(more.iter().map(Into::into));
    stderr(&run(arguments))
}

#[track_caller]
fn assert_scores(found: &[Value], expected: &[Value], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!((&found["id"], &found["tokens"]), (&expected["id"], &expected["tokens"]));
        for (ours, theirs) in numbers(&found["token_logprobs"]).iter().zip(numbers(&expected["token_logprobs"])) {
            assert!((ours - theirs).abs() <= tolerance, "{}: {ours}, expected {theirs}", found["id"]);
        }
    }
}

fn expected_scores(case: &str) -> Vec<Value> {
    read_json(&golden("parity").join(case).join("expected.json"))["score"].as_array().unwrap().clone()
}

#[test]
fn a_pair_of_gguf_files_answers_as_what_it_was_written_of() {
    let dir = tempfile::tempdir().unwrap();
    for (case, dtype, kind, tolerance) in [
        ("mha_untied_mlp", "float32", "F32", 3e-5),
        ("gqa_tied_linear_pad", "float32", "F32", 3e-5),
        ("llama3_rope_biases", "float32", "F32", 3e-5),
        ("mha_untied_linear", "float16", "F16", 2e-2),
        ("gqa_tied_mlp_vision", "bfloat16", "BF16", 1.5e-1),
    ] {
        let out = dir.path().join(case);
        let told = convert(&golden("parity").join(case).join("model"), &out, &["--to", "gguf", "--dtype", dtype]);
        let files: [String; 2] = [format!("model-{kind}.gguf"), format!("mmproj-model-{kind}.gguf")];
        assert!(files.iter().all(|file| out.join(file).is_file() && told.contains(file.as_str())), "{told}");
        assert_eq!(fs::read_dir(&out).unwrap().count(), 2);
        assert_scores(&scores(&out, case), &expected_scores(case), tolerance);
    }
    // Back in Hugging Face's layout, the tower ends with the selected layer.
    let again = dir.path().join("hf");
    convert(&dir.path().join("gqa_tied_linear_pad"), &again, &[]);
    let (again, source) =
        (ModelFolder::open(&again).unwrap(), ModelFolder::open(&golden("parity/gqa_tied_linear_pad/model")).unwrap());
    assert_eq!(again.config().llava().unwrap().projector, ProjectorType::Linear);
    for (name, _) in names::expected_tensors(source.config()) {
        assert_eq!(again.tensor(&name).unwrap(), source.tensor(&name).unwrap(), "{name}");
    }
}

#[test]
fn a_types_rounding_is_all_that_a_gguf_file_changes() {
    let dir = tempfile::tempdir().unwrap();
    let source = ModelFolder::open(&golden("parity/mqa_untied_mlp_full_features/model")).unwrap();
    let refused = write_gguf_model(&dir.path().join("full"), &source, "m", None, &mut |_| ()).unwrap_err();
    assert!(refused.kind == ErrorKind::Usage && refused.message.contains("class token"), "{refused}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    for layout in ["gguf", "llava"] {
        let out = dir.path().join("none");
        let mut command = program([Path::new("convert"), Path::new("--out"), &out]);
        let output = command.args(["--from", "embedded:tiny", "--to", layout]).output().unwrap();
        assert_eq!(output.status.code(), Some(3));
        assert!(stderr(&output).contains("a LLaVA without projector weights") && !out.exists());
    }
    let window = ModelFolder::open(&golden("parity/mistral_window/model")).unwrap();
    let refused = write_gguf_model(&dir.path().join("window"), &window, "m", None, &mut |_| ()).unwrap_err();
    assert!(refused.message.contains("sliding_window is 24 of 2048 positions"), "{refused}");

    // A single language model; F16 where nobody says otherwise.
    let out = dir.path().join("out");
    convert(&golden("gguf/tiny_llama.gguf"), &out, &["--to", "gguf"]);
    let written = ModelFolder::open(&out.join("tiny_llama-F16.gguf")).unwrap();
    let source = ModelFolder::open(&golden("gguf/tiny_llama.gguf")).unwrap();
    for (name, shape) in names::expected_tensors(source.config()) {
        let rounded = |value: &f32| if shape.len() > 1 { half::f16::from_f32(*value).to_f32() } else { *value };
        let wanted: Vec<f32> = source.tensor(&name).unwrap().data.iter().map(rounded).collect();
        assert_eq!(written.tensor(&name).unwrap().data, wanted, "{name}");
        assert_eq!(written.stored(&name).unwrap().dtype(), if shape.len() > 1 { Dtype::F16 } else { Dtype::F32 });
    }
    let hf = dir.path().join("bf16");
    convert(&golden("parity/llama3_rope_biases/model"), &hf, &["--dtype", "bfloat16"]);
    convert(&hf, &dir.path().join("kept"), &["--to", "gguf"]);
    assert!(dir.path().join("kept/bf16-BF16.gguf").is_file());
    let qwen = dir.path().join("qwen");
    convert(&golden("parity/qwen2_dynamic/model"), &qwen, &["--to", "gguf", "--dtype", "q8_0"]);
    let file = GgufFile::open(&qwen.join("model-Q8_0.gguf")).unwrap();
    assert_eq!(file.text("general.architecture").unwrap(), Some("qwen2"));
    assert_eq!(file.size("qwen2.attention.head_count_kv").unwrap(), Some(2));
    assert!(file.tensor("blk.0.attn_q.bias").is_some());
    // Its rows are in Hugging Face's order, and it comes back as it was.
    let exact = dir.path().join("exact");
    convert(&golden("parity/qwen2_dynamic/model"), &exact, &["--to", "gguf", "--dtype", "float32"]);
    let (again, source) =
        (ModelFolder::open(&exact).unwrap(), ModelFolder::open(&golden("parity/qwen2_dynamic/model")).unwrap());
    assert_eq!((again.config().text().family, again.config().text().biases.qkv), (Family::Qwen2, true));
    for (name, _) in names::expected_tensors(source.config()) {
        assert_eq!(again.tensor(&name).unwrap(), source.tensor(&name).unwrap(), "{name}");
    }
}

#[test]
fn parts_that_do_not_belong_together_are_named() {
    let dir = tempfile::tempdir().unwrap();
    convert(&golden("parity/mha_untied_mlp/model"), &dir.path().join("a"), &["--to", "gguf"]);
    let (language, mmproj) = (dir.path().join("a/model-F16.gguf"), dir.path().join("a/mmproj-model-F16.gguf"));
    let folder = |files: &[(&Path, &str)]| {
        let folder = tempfile::tempdir_in(dir.path()).unwrap().keep();
        for (from, name) in files {
            fs::copy(from, folder.join(name)).unwrap();
        }
        ModelFolder::open(&folder).err().map(|error| error.message).unwrap_or_default()
    };
    assert_eq!(folder(&[(&language, "a.gguf"), (&mmproj, "b-mmproj.gguf")]), "");
    let named = ModelFolder::open_with_tower(&language, Some(&mmproj)).unwrap();
    assert!(named.config().llava().is_some() && ModelFolder::open(&language).unwrap().config().llava().is_none());
    let swapped = ModelFolder::open_with_tower(&language, Some(&language)).err().unwrap().message;
    assert!(swapped.contains("`clip` is expected"), "{swapped}");
    assert!(folder(&[(&mmproj, "mmproj.gguf")]).contains("and 0 GGUF files"));
    let two = folder(&[(&language, "a.gguf"), (&mmproj, "mmproj-a.gguf"), (&mmproj, "mmproj-b.gguf")]);
    assert!(two.contains("2 mmproj files"), "{two}");
    let wrong = folder(&[(&language, "a.gguf"), (&language, "mmproj-b.gguf")]);
    assert!(wrong.contains("`clip` is expected"), "{wrong}");
    let other = golden("gguf/tiny_llama.gguf");
    let narrow = folder(&[(&other, "a.gguf"), (&mmproj, "mmproj.gguf")]);
    assert!(narrow.contains("the weights do not fit") && narrow.contains("multi_modal_projector.linear_2"), "{narrow}");
}

/// Files of before 2025: the linears of an MLP under each other's names, no key for the selected layer.
#[test]
fn older_mmproj_files_are_read_alike() {
    let dir = tempfile::tempdir().unwrap();
    let source = ModelFolder::open(&golden("parity/gqa_tied_linear_pad/model")).unwrap();
    for dtype in ["float32", "q8_0"] {
        let out = dir.path().join(dtype);
        convert(&golden("parity/gqa_tied_linear_pad/model"), &out, &["--to", "gguf", "--dtype", dtype]);
        let new = ModelFolder::open(&out).unwrap();
        assert_eq!(new.config().llava().unwrap().projector, ProjectorType::Linear, "{dtype}");
        let path = fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().path());
        let path = path.filter(|path| path.to_string_lossy().contains("mmproj")).last().unwrap();
        let file = GgufFile::from_bytes("mmproj", fs::read(&path).unwrap()).unwrap();
        let is_new = |key: &str| key.contains("feature_layer") || key.starts_with("wgpu_llava");
        let metadata: Vec<(String, gguf::Value)> = file
            .metadata()
            .filter(|(key, _)| !is_new(key))
            .map(|(key, value)| (key.to_owned(), value.clone()))
            .collect();
        let heads: Vec<GgufHead> = file
            .tensor_names()
            .map(|name| {
                let tensor = file.require(name).unwrap();
                GgufHead { name: swapped(name), ggml_type: tensor.ggml_type, shape: tensor.shape.to_vec() }
            })
            .collect();
        write_gguf(&path, &metadata, &heads, &mut |head| {
            Ok(TensorData::Raw(file.require(&swapped(&head.name)).unwrap().bytes.into()))
        })
        .unwrap();
        let old = ModelFolder::open(&out).unwrap();
        for (name, _) in names::expected_tensors(source.config()) {
            assert_eq!(old.tensor(&name).unwrap(), new.tensor(&name).unwrap(), "{name}");
        }
        // As llama.cpp does it.
        assert_eq!(old.preprocessor_config().unwrap().unwrap()["do_pad"], true);
        assert_eq!(new.preprocessor_config().unwrap().unwrap()["do_pad"], false);
    }
}

fn swapped(name: &str) -> String {
    match name.contains(".ffn_up.") {
        true => name.replace(".ffn_up.", ".ffn_down."),
        false => name.replace(".ffn_down.", ".ffn_up."),
    }
}

/// Texts of the built tokenizers, and random ones of all planes.
fn texts() -> Vec<String> {
    let file = read_json(&golden("built_tokenizers/llama/expected.json"));
    let mut texts: Vec<String> =
        file["texts"].as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect();
    let mut rng = Rng::new(11, 0);
    let ranges = [(0x20, 0x5f), (0x61, 0x1a), (0x09, 0x05), (0xa0, 0x400), (0x900, 0x8000), (0x1f300, 0x400)];
    for _ in 0..200 {
        let count = (rng.unit() * 24.0) as usize;
        let mut draw = || {
            let (first, count) = ranges[((rng.unit() * 6.0) as usize).min(5)];
            char::from_u32(first + (rng.unit() * count as f32) as u32).unwrap_or(' ')
        };
        texts.push((0..count).map(|_| draw()).collect());
    }
    texts.retain(|text| !text.contains("<image>"));
    texts
}

fn written(tokenizer: &Tokenizer, json: &Value, model: Option<&SentencePieceModel>, rows: usize) -> Written {
    Parts { name: "m", tokenizer, json, model, rows }.vocabulary().unwrap()
}

/// The vocabulary as it stands in a file, read again.
fn through_a_file(vocabulary: &GgufVocabulary) -> GgufVocabulary {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.gguf");
    wgpu_llava::formats::gguf::write::write_gguf(
        &path,
        &vocabulary::metadata(vocabulary),
        &[],
        &mut |_| unreachable!(),
    )
    .unwrap();
    vocabulary::read(&GgufFile::open(&path).unwrap()).unwrap().unwrap()
}

#[test]
fn tokenizers_cut_texts_alike_after_a_gguf_file() {
    let mut folders: Vec<PathBuf> =
        fs::read_dir(golden("data/tokenizers")).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.extend(["gqa_tied_mlp_vision", "mha_untied_mlp"].map(|case| golden("parity").join(case).join("model")));
    for folder in folders.iter().filter(|folder| folder.join("tokenizer.json").is_file()) {
        let tokenizer = Tokenizer::from_folder(folder).unwrap();
        let json = read_json(&folder.join("tokenizer.json"));
        let rows = tokenizer.vocabulary_size() + 5;
        let vocabulary = through_a_file(&written(&tokenizer, &json, None, rows).vocabulary);
        assert_eq!((vocabulary.tokens.len(), vocabulary.token_types[rows - 1]), (rows, 5));
        assert_eq!(vocabulary.tokens[rows - 1], format!("[PAD{}]", rows - 1));
        let again = vocabulary.tokenizer().unwrap();
        for text in texts() {
            let (ours, theirs) = (again.encode(&text, true).unwrap(), tokenizer.encode(&text, true).unwrap());
            assert_eq!(ours, theirs, "{}: {text:?}", folder.display());
        }
        assert_eq!(
            (again.bos_id, again.eos_id, again.image_id),
            (tokenizer.bos_id, tokenizer.eos_id, tokenizer.image_id)
        );
        // A second time, nothing changes any more.
        let config = serde_json::to_vec(&vocabulary.tokenizer_config().unwrap()).unwrap();
        let json = vocabulary.tokenizer_json().unwrap();
        let twice = Tokenizer::from_bytes(&serde_json::to_vec(&json).unwrap(), Some(&config)).unwrap();
        let twice = written(&twice, &json, None, rows).vocabulary;
        assert_eq!((&twice.tokens, &twice.token_types), (&vocabulary.tokens, &vocabulary.token_types));
        assert_eq!((&twice.merges, &twice.scores), (&vocabulary.merges, &vocabulary.scores), "{}", folder.display());
        assert_eq!((twice.pre, twice.add_bos_token), (vocabulary.pre, vocabulary.add_bos_token));
    }
}

#[test]
fn scores_of_a_sentencepiece_vocabulary_are_its_own_or_those_of_its_merges() {
    let folder = golden("built_tokenizers/llama");
    let model = SentencePieceModel::parse("m", &fs::read(folder.join("tokenizer.model")).unwrap()).unwrap();
    let TokenizerFiles { tokenizer: json, config } = TokenizerFiles::from_folder(&folder).unwrap();
    let bytes = |value: &Value| serde_json::to_vec(value).unwrap();
    let tokenizer = Tokenizer::from_bytes(&bytes(&json), Some(&bytes(&config))).unwrap();
    let rows = tokenizer.vocabulary_size();
    let own = written(&tokenizer, &json, Some(&model), rows);
    let scores: Vec<f32> = model.pieces.iter().map(|piece| piece.score).collect();
    assert_eq!(own.vocabulary.scores[..scores.len()], scores);
    let ranked = written(&tokenizer, &json, None, rows);
    for found in [&own, &ranked] {
        assert_eq!((found.foreign_merges, found.vocabulary.merges.len()), (0, 0));
        let again = through_a_file(&found.vocabulary).tokenizer().unwrap();
        for text in texts() {
            assert_eq!(again.encode(&text, true).unwrap(), tokenizer.encode(&text, true).unwrap(), "{text:?}");
        }
    }
    let kinds = &ranked.vocabulary.token_types;
    assert_eq!((kinds[0], kinds[1], kinds[2]), (2, 3, 3));
    let id = |text: &str| ranked.vocabulary.tokens.iter().position(|token| token == text).unwrap();
    assert_eq!((kinds[id("<0x0A>")], kinds[id("<image>")]), (6, 3));
}

#[test]
fn tokenizers_that_gguf_has_no_name_for_are_refused() {
    let folder = golden("data/tokenizers/byte_level");
    let tokenizer = Tokenizer::from_folder(&folder).unwrap();
    let json = read_json(&folder.join("tokenizer.json"));
    let rows = tokenizer.vocabulary_size();
    let refused = |pointer: &str, value: Value, expected: &str| {
        let mut json = json.clone();
        *json.pointer_mut(pointer).unwrap() = value;
        let error =
            Parts { name: "m", tokenizer: &tokenizer, json: &json, model: None, rows }.vocabulary().unwrap_err();
        assert!(error.kind == ErrorKind::Data && error.message.contains(expected), "{expected}: {error}");
    };
    refused("/pre_tokenizer", json!({"type": "Whitespace"}), "parts texts in a way of its own");
    refused("/pre_tokenizer/add_prefix_space", json!(true), "parts texts in a way of its own");
    refused("/normalizer", json!({"type": "Lowercase"}), "parts texts in a way of its own");
    refused("/model/type", json!("WordPiece"), "WordPiece");
    refused("/model/byte_fallback", json!(true), "changes or parts texts before it merges");
    let few = Parts { name: "m", tokenizer: &tokenizer, json: &json, model: None, rows: rows - 1 };
    assert!(
        few.vocabulary().unwrap_err().message.contains(&format!("{rows} tokens, the embeddings {} rows", rows - 1))
    );
}

#[test]
fn the_original_layout_comes_back_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let tower = golden("layouts/clip_tower").display().to_string();
    for (layout, rows) in [("original_bin", 391), ("original_linear", 371)] {
        let source = golden("layouts").join(layout);
        let (hf, out) = (dir.path().join(format!("{layout}-hf")), dir.path().join(layout));
        let elsewhere: &[&str] = if layout == "original_bin" { &["--vision-tower", &tower] } else { &[] };
        convert(&source, &hf, elsewhere);
        convert(&hf, &out, &["--to", "llava"]);
        let original = wgpu_llava::formats::weights::Weights::open(&source).unwrap();
        let written = Checkpoint::open(&out).unwrap();
        let names: Vec<String> = original.names().unwrap();
        let outside: Vec<&String> =
            names.iter().filter(|name| !name.contains("vision_tower") && !names::is_ignorable(name)).collect();
        let mut found: Vec<&str> = written.names().collect();
        found.sort_unstable();
        let mut wanted: Vec<&str> = outside.iter().map(|name| name.as_str()).collect();
        wanted.sort_unstable();
        assert_eq!(found, wanted);
        for name in outside {
            let (ours, theirs) = (written.require(name).unwrap(), original.require(name).unwrap());
            let ours = wgpu_llava::formats::stored::StoredTensor::from(ours);
            assert_eq!(ours.dtype(), theirs.dtype());
            let count = ours.rows();
            assert_eq!(ours.bytes(0..count).unwrap(), theirs.bytes(0..count).unwrap(), "{name}");
        }
        let config = read_json(&out.join("config.json"));
        assert_eq!((&config["vocab_size"], &config["mm_vision_tower"]), (&json!(rows), &json!("vision_tower")));
        assert_eq!(config["architectures"], json!(["LlavaLlamaForCausalLM"]));
        for file in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
            let text = fs::read_to_string(out.join(file)).unwrap();
            assert!(!text.contains("\"<image>\"") && !text.contains("\"<pad>\""), "{file}: {text}");
        }
        let vision = Checkpoint::open(&out.join("vision_tower")).unwrap();
        assert!(vision.names().all(|name| name.starts_with("vision_model.")));
        let again = ModelFolder::open(&out).unwrap();
        let first = ModelFolder::open(&hf).unwrap();
        for (name, _) in
            names::unused_vision_tensors(first.config()).iter().chain(&names::expected_tensors(first.config()))
        {
            if name.starts_with(names::VISION_TOWER) {
                assert_eq!(again.tensor(name).unwrap(), first.tensor(name).unwrap(), "{name}");
            }
        }
    }
    let expected = read_json(&golden("layouts/expected.json"))["original_bin"].as_array().unwrap().clone();
    assert_scores(&scores(&dir.path().join("original_bin"), "mha_untied_mlp"), &expected, 3e-5);
    // Two rows less in the sum over the vocabulary.
    let found = scores(&dir.path().join("original_linear"), "mha_untied_linear");
    for (found, expected) in found.iter().zip(expected_scores("mha_untied_linear")) {
        for (ours, theirs) in numbers(&found["token_logprobs"]).iter().zip(numbers(&expected["token_logprobs"])) {
            assert!((-3e-5..0.1).contains(&(ours - theirs)), "{ours}, with two more tokens {theirs}");
        }
    }
    // Padding of pictures is said by the model's config there.
    let mut padded = read_json(&dir.path().join("original_bin-hf/preprocessor_config.json"));
    padded["do_pad"] = json!(true);
    fs::write(dir.path().join("original_bin-hf/preprocessor_config.json"), padded.to_string()).unwrap();
    let out = dir.path().join("padded");
    convert(&dir.path().join("original_bin-hf"), &out, &["--to", "llava", "--dtype", "float16"]);
    assert_eq!(read_json(&out.join("config.json"))["image_aspect_ratio"], "pad");
    let again = ModelFolder::open(&out).unwrap();
    assert_eq!(
        (again.dtype().unwrap(), &again.preprocessor_config().unwrap().unwrap()["do_pad"]),
        (Dtype::F16, &json!(true))
    );

    let refused = |from: &Path, expected: &str| {
        let out = dir.path().join("never");
        let mut command = program([Path::new("convert"), Path::new("--from"), from, Path::new("--out"), &out]);
        let output = command.args(["--to", "llava"]).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains(expected), "{}", stderr(&output));
        assert!(!out.exists());
    };
    refused(&golden("gguf/tiny_llama.gguf"), "is a language model without a vision tower");
    refused(&golden("parity/qwen2_dynamic/model"), "no class for a language model of the family qwen2");
}

/// The keys and lists of a GGUF file that came from llama.cpp, after Hugging Face's layout and back.
#[test]
#[ignore = "needs WGPU_LLAVA_GGUF"]
fn a_real_gguf_file_keeps_its_keys_and_tokens() {
    let path = PathBuf::from(std::env::var_os("WGPU_LLAVA_GGUF").expect("WGPU_LLAVA_GGUF names a GGUF file"));
    let dir = tempfile::tempdir().unwrap();
    let (hf, out) = (dir.path().join("hf"), dir.path().join("gguf"));
    convert(&path, &hf, &[]);
    convert(&hf, &out, &["--to", "gguf"]);
    let (original, written) = (GgufFile::open(&path).unwrap(), GgufFile::open(&out.join("hf-F16.gguf")).unwrap());
    let names: Vec<&str> = original.tensor_names().collect();
    assert_eq!(written.tensor_names().collect::<Vec<_>>(), names);
    let keys = |file: &GgufFile| -> Vec<String> {
        let keys = file.metadata().map(|(key, _)| key.to_owned()).filter(|key| !key.starts_with("general."));
        let mut keys: Vec<String> = keys.collect();
        keys.sort();
        keys
    };
    assert_eq!(keys(&written), keys(&original));
    for key in keys(&original) {
        assert!(written.value(&key) == original.value(&key), "{key}");
    }
}
