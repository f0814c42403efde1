//! GGUF files made by the gguf package (tools/golden_gguf.py): read, converted, written, and broken on purpose.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value as Json, json};
use wgpu_llava::{
    error::{Error, ErrorKind},
    formats::{
        HostTensor,
        gguf::{
            Array, GgmlType, GgufFile, Value,
            dequant::{dequantize, dequantize_rows},
            export::{FileType, Source, llama_metadata, llama_plan, write_planned},
            llama, llama_config,
            mmproj::{mmproj_metadata, mmproj_name, mmproj_plan},
            write::{GgufHead, write_gguf},
        },
        safetensors::Checkpoint,
        safetensors_writer::TensorData,
        stored::StoredTensor,
    },
    models::config::{LlavaConfig, ModelConfig},
};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gguf").join(name)
}

fn expected() -> Json {
    serde_json::from_slice(&fs::read(golden("expected.json")).unwrap()).unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

const BLOCK_TYPES: [&str; 12] =
    ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"];

#[test]
fn every_block_type_gives_the_packages_values_bit_for_bit() {
    let file = GgufFile::open(&golden("quants.gguf")).unwrap();
    for name in BLOCK_TYPES {
        let tensor = file.require(name).unwrap();
        assert_eq!(tensor.ggml_type.name(), name);
        let wanted = dequantize(&file.require(&format!("{name}.expected")).unwrap()).unwrap();
        let values = dequantize(&tensor).unwrap();
        assert_eq!(bits(&values), bits(&wanted), "{name}");
        assert!(values.iter().any(|value| *value != 0.0));
        let columns = tensor.columns();
        let mut some = vec![0.0; columns * 2];
        dequantize_rows(&tensor, 1..3, &mut some).unwrap();
        assert_eq!(bits(&some), bits(&wanted[columns..]), "{name}");
        assert!(dequantize_rows(&tensor, 2..4, &mut some).is_err());
        assert!(dequantize_rows(&tensor, 0..1, &mut some).is_err());
    }
    let error = dequantize(&file.require("IQ4_XS").unwrap()).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Data);
    assert!(error.message.contains("quants.gguf: IQ4_XS is of type IQ4_XS"), "{error}");
    assert!(file.require("Q4_L").unwrap_err().hints[0].contains("Q4_"));
}

#[test]
fn metadata_of_every_type_is_read() {
    let file = GgufFile::open(&golden("quants.gguf")).unwrap();
    assert_eq!((file.version(), file.text("general.architecture").unwrap()), (3, Some("test")));
    assert_eq!(file.text("t.string").unwrap(), Some("Grüße"));
    let rows = [
        ("t.uint8", Value::U8(200)),
        ("t.int8", Value::I8(-3)),
        ("t.uint16", Value::U16(65000)),
        ("t.int16", Value::I16(-300)),
        ("t.uint32", Value::U32(4_000_000_000)),
        ("t.int32", Value::I32(-5)),
        ("t.float32", Value::F32(1e-5)),
        ("t.uint64", Value::U64(1 << 63)),
        ("t.int64", Value::I64(-(1 << 40))),
        ("t.float64", Value::F64(0.1)),
        ("t.bool", Value::Bool(true)),
        ("t.bools", Value::Array(Array::Bool(vec![true, false]))),
        ("t.bytes", Value::Array(Array::U8(vec![0, 255]))),
        (
            "t.nested",
            Value::Array(Array::Array(vec![Array::I32(vec![1, 2]), Array::I32(vec![3]), Array::I32(vec![4, 5, 6])])),
        ),
    ];
    for (key, value) in rows {
        assert_eq!(file.value(key), Some(&value), "{key}");
    }
    assert_eq!(file.strings("t.strings").unwrap().unwrap(), ["a", "", "ä"]);
    assert_eq!(file.floats("t.floats").unwrap().unwrap(), [0.5, -0.25]);
    assert_eq!(file.integers("t.ints").unwrap().unwrap(), [1, -2, 3]);
    assert_eq!((file.size("t.uint8").unwrap(), file.number("t.int8").unwrap()), (Some(200), Some(-3.0)));
    assert_eq!((file.number("t.float32").unwrap(), file.flag("t.bool").unwrap()), (Some(1e-5), Some(true)));
    assert_eq!(file.size("absent").unwrap(), None);
    let error = file.size("t.int8").unwrap_err();
    assert!(error.message.contains("quants.gguf: t.int8 is I8(-3), where a whole number is expected"), "{error}");
    let error = file.text("t.strings").unwrap_err();
    assert!(error.message.contains("t.strings is an array of string of 3 elements, where a string"), "{error}");
    assert!(file.missing("t.strin").hints[0].contains("t.string"));
}

/// Copies a file of the package tensor by tensor; matrices are rounded again from the F32 one.
#[test]
fn a_written_file_equals_the_packages_byte_for_byte() {
    let path = golden("rounded.gguf");
    let file = GgufFile::open(&path).unwrap();
    let values = dequantize(&file.require("F32").unwrap()).unwrap();
    let heads = ["F32", "F16", "BF16", "Q8_0"].map(|name| {
        let tensor = file.require(name).unwrap();
        GgufHead { name: name.into(), ggml_type: tensor.ggml_type, shape: tensor.shape.to_vec() }
    });
    let metadata = [
        ("general.architecture".to_owned(), Value::from("test")),
        ("t.uint32".to_owned(), 7u32.into()),
        ("t.strings".to_owned(), vec!["x".to_owned(), "yz".to_owned()].into()),
    ];
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("rounded.gguf");
    write_gguf(&out, &metadata, &heads, &mut |_| Ok(TensorData::F32((&values).into()))).unwrap();
    assert!(fs::read(&out).unwrap() == fs::read(&path).unwrap());
    write_gguf(&out, &metadata, &heads, &mut |head| {
        Ok(TensorData::Raw(file.require(&head.name).unwrap().bytes.into()))
    })
    .unwrap();
    assert!(fs::read(&out).unwrap() == fs::read(&path).unwrap());
}

#[test]
fn what_cannot_be_written_leaves_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("x.gguf");
    let head = |name: &str, ggml_type, shape: &[usize]| GgufHead { name: name.into(), ggml_type, shape: shape.into() };
    let write = |heads: &[GgufHead], values: Vec<f32>| -> Error {
        write_gguf(&out, &[], heads, &mut |_| Ok(TensorData::F32(values.clone().into()))).unwrap_err()
    };
    let wide = "n".repeat(64);
    let rows = [
        (vec![head("a", GgmlType::F16, &[2])], vec![1.0, 70000.0], "a holds 70000, which F16 cannot"),
        (vec![head("a", GgmlType::Q8_0, &[32])], vec![f32::NAN; 32], "a holds NaN, which Q8_0 cannot"),
        (vec![head("a", GgmlType::F32, &[2, 2])], vec![0.0; 3], "a: 3 values for [2, 2]"),
        (vec![head("a", GgmlType::Q8_0, &[33])], vec![0.0; 33], "a: shape [33] cannot be written as Q8_0"),
        (vec![head("a", GgmlType::Q4_K, &[256])], vec![0.0; 256], "a cannot be rounded to Q4_K"),
        (vec![head(&wide, GgmlType::F32, &[1])], vec![0.0], "longer than 63 bytes"),
        (vec![head("a", GgmlType::F32, &[1]); 2], vec![0.0], "`a` is there twice"),
    ];
    for (heads, values, message) in rows {
        let error = write(&heads, values);
        assert!(error.message.contains(message) && error.message.contains("x.gguf"), "{message}: {error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

#[test]
fn a_llama_is_what_transformers_loads_from_the_file() {
    let file = GgufFile::open(&golden("tiny_llama.gguf")).unwrap();
    let checkpoint = Checkpoint::open(&golden("tiny_llama.safetensors")).unwrap();
    let mut names = llama::tensor_names(&file).unwrap();
    names.sort();
    assert_eq!(names, checkpoint.names().collect::<Vec<_>>());
    for name in &names {
        let (tensor, wanted) = (llama::tensor(&file, name).unwrap(), checkpoint.require(name).unwrap());
        let (tensor_f32, wanted) = (tensor.to_f32().unwrap(), wanted.to_f32().unwrap());
        assert_eq!((tensor.shape(), bits(&tensor_f32.data)), (&wanted.shape[..], bits(&wanted.data)), "{name}");
        let (mut part, last) = (vec![0.0; tensor.columns()], tensor.rows() - 1);
        tensor.read_rows(last..last + 1, &mut part).unwrap();
        assert_eq!(part, wanted.data[last * tensor.columns()..], "{name}");
        assert!(tensor.read_rows(last..last + 2, &mut part).is_err());
    }
    let config = llama_config::config_json(&file).unwrap();
    let wanted = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_act": "silu",
        "vocab_size": 40, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 5000.0,
        "rope_scaling": null, "attention_bias": false, "mlp_bias": false, "tie_word_embeddings": false,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
    });
    assert_eq!(config, wanted);
    ModelConfig::parse("config.json", config.to_string().as_bytes()).unwrap();
}

#[test]
fn names_and_keys_are_those_of_the_package() {
    let expected = expected();
    for (hf, gguf) in expected["language_names"].as_object().unwrap() {
        let gguf = gguf.as_str().unwrap();
        assert_eq!((llama::gguf_name(hf).as_deref(), llama::hf_name(gguf).as_deref()), (Some(gguf), Some(&**hf)));
    }
    for (canonical, gguf) in expected["tower_names"].as_object().unwrap() {
        if !canonical.contains("post_layernorm") {
            assert_eq!(mmproj_name(canonical).as_deref(), gguf.as_str(), "{canonical}");
        }
    }
    assert_eq!(mmproj_name("multi_modal_projector.linear_2.bias").as_deref(), Some("mm.2.bias"));
    let mut known: BTreeSet<&str> = expected["keys"].as_array().unwrap().iter().filter_map(Json::as_str).collect();
    // Read by clip.cpp, and not named by the package.
    known.extend(["clip.has_text_encoder", "clip.vision.mm_patch_merge_type", "clip.vision.feature_layer"]);
    let llava = llava(r#""projector_hidden_act": "gelu""#);
    let scaled = scaled_llama("linear", "");
    let text = llama_metadata(scaled.text(), "m", FileType::F16).unwrap();
    assert!(text.iter().any(|(key, value)| key == "llama.rope.scaling.type" && *value == Value::from("linear")));
    for (key, _) in text.iter().chain(&mmproj_metadata(&llava, "m", FileType::F16, [0.5; 3], [0.5; 3]).unwrap()) {
        assert!(known.contains(key.as_str()), "{key}");
    }
}

fn scaled_llama(kind: &str, more: &str) -> ModelConfig {
    // The scaling is put in afterwards, as a model with any need not be computable.
    let json = r#"{"model_type": "llama", "hidden_size": 256, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 32, "rope_theta": 500000.0, "max_position_embeddings": 64}"#;
    let mut config = ModelConfig::parse("config.json", json.as_bytes()).unwrap();
    let scaling = format!(r#"{{"rope_type": "{kind}", "factor": 8.0{more}}}"#);
    config.text_mut().raw.insert("rope_scaling".into(), serde_json::from_str(&scaling).unwrap());
    config
}

#[test]
fn llama3_scaling_is_written_as_factors_and_found_again() {
    let expected = expected();
    for (name, row) in expected["llama3"].as_object().unwrap() {
        let number = |index: usize| row["parameters"][index].as_f64().unwrap();
        let parameters = [number(2), number(3), number(4), number(5)];
        let factors = llama_config::llama3_factors(number(0), number(1) as usize, parameters);
        for (factor, wanted) in factors.iter().zip(row["factors"].as_array().unwrap()) {
            let wanted = wanted.as_f64().unwrap() as f32;
            assert!((factor - wanted).abs() <= 2e-5 * wanted, "{name}: {factor} for {wanted}");
        }
        assert_eq!(factors.len(), row["factors"].as_array().unwrap().len());
    }

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    let round_trip = |config: &ModelConfig| {
        let plan = llama_plan(config.text(), FileType::F32).unwrap();
        let heads = plan.iter().filter(|planned| !matches!(planned.source, Source::Values(_)));
        let zeros: Vec<HostTensor> = heads.map(|planned| HostTensor::zeros(planned.head.shape.clone())).collect();
        let mut zeros = zeros.iter();
        let metadata = llama_metadata(config.text(), "m", FileType::F32).unwrap();
        let mut fetch = |_: &str| Ok(StoredTensor::host("zeros", "memory", zeros.next().unwrap()));
        write_planned(&path, &metadata, &plan, &mut fetch).unwrap();
        llama_config::config_json(&GgufFile::open(&path).unwrap()).unwrap()["rope_scaling"].clone()
    };
    for (low, high) in [(1.0, 4.0), (1.5, 6.0)] {
        let more = format!(
            r#", "low_freq_factor": {low:?}, "high_freq_factor": {high:?}, "original_max_position_embeddings": 8192"#
        );
        let found = round_trip(&scaled_llama("llama3", &more));
        assert_eq!((&found["rope_type"], &found["factor"]), (&json!("llama3"), &json!(8.0)));
        for (key, wanted) in [("low_freq_factor", low), ("high_freq_factor", high)] {
            assert!((found[key].as_f64().unwrap() - wanted).abs() < 1e-2, "{found}");
        }
    }
    assert_eq!(round_trip(&scaled_llama("linear", "")), json!({"rope_type": "linear", "factor": 8.0}));
    let yarn = round_trip(&scaled_llama("yarn", r#", "original_max_position_embeddings": 16"#));
    assert_eq!(yarn, json!({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}));
    let error = llama_metadata(scaled_llama("longrope", "").text(), "m", FileType::F32).unwrap_err();
    assert!(error.message.contains("`longrope`"), "{error}");
}

#[test]
fn a_llama_written_and_read_again_has_the_same_rows() {
    let checkpoint = Checkpoint::open(&golden("tiny_llama.safetensors")).unwrap();
    let config = llama_config::config_json(&GgufFile::open(&golden("tiny_llama.gguf")).unwrap()).unwrap();
    let parsed = ModelConfig::parse("config.json", config.to_string().as_bytes()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    let types = [FileType::F32, FileType::F16, FileType::Bf16, FileType::Q8_0];
    for (file_type, tolerance) in types.into_iter().zip([0.0, 1e-3, 1e-2, 1e-2]) {
        let plan = llama_plan(parsed.text(), file_type).unwrap();
        let metadata = llama_metadata(parsed.text(), "tiny", file_type).unwrap();
        let mut fetch =
            |canonical: &str| Ok(checkpoint.require(canonical.strip_prefix("language_model.").unwrap())?.into());
        write_planned(&path, &metadata, &plan, &mut fetch).unwrap();
        let file = GgufFile::open(&path).unwrap();
        let mut again = llama_config::config_json(&file).unwrap();
        for id in ["bos_token_id", "eos_token_id", "pad_token_id"] {
            assert_eq!(again[id], Json::Null);
            again[id] = config[id].clone();
        }
        assert_eq!(again, config);
        for name in checkpoint.names() {
            let (tensor, wanted) = (llama::tensor(&file, name).unwrap(), checkpoint.require(name).unwrap());
            let (values, wanted) = (tensor.to_f32().unwrap(), wanted.to_f32().unwrap());
            assert_eq!(tensor.ggml_type(), file_type.stored(&wanted.shape), "{name}");
            for (value, wanted) in values.data.iter().zip(&wanted.data) {
                assert!((value - wanted).abs() <= tolerance * wanted.abs().max(0.1), "{name}: {value} for {wanted}");
            }
        }
        if file_type == FileType::F32 {
            let tensor = llama::tensor(&file, "model.layers.1.self_attn.k_proj.weight").unwrap();
            let mut raw = Vec::new();
            tensor.raw_rows(0..tensor.rows(), &mut raw).unwrap();
            assert_eq!(raw, checkpoint.require("model.layers.1.self_attn.k_proj.weight").unwrap().bytes);
        }
    }
}

fn llava(more: &str) -> LlavaConfig {
    let text = r#"{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}"#;
    let vision = r#"{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14}"#;
    let json = format!(r#"{{"model_type": "llava", "text_config": {text}, "vision_config": {vision}, {more}}}"#);
    match ModelConfig::parse("config.json", json.as_bytes()).unwrap() {
        ModelConfig::Llava(config) => config,
        ModelConfig::Llama(_) => unreachable!(),
    }
}

/// Values that differ from tensor to tensor and from place to place.
fn made_up(shape: &[usize]) -> HostTensor {
    let count = shape.iter().product::<usize>();
    let value = |index: usize| ((index * 37 + shape.len() * 11 + count) % 101) as f32 / 50.0 - 1.0;
    HostTensor::new(shape, (0..count).map(value).collect())
}

#[test]
fn an_mmproj_file_holds_what_clip_cpp_reads() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mmproj.gguf");
    for (act, file_type) in [("gelu", FileType::F16), ("gelu", FileType::Q8_0), ("linear", FileType::Q8_0)] {
        let config = llava(&format!(r#""projector_hidden_act": "{act}""#));
        let metadata = mmproj_metadata(&config, "m", file_type, [0.1, 0.2, 0.3], [0.5; 3]).unwrap();
        let plan = mmproj_plan(&config, file_type).unwrap();
        let shapes = wgpu_llava::models::names::expected_tensors(&ModelConfig::Llava(config.clone()));
        let tensors: BTreeMap<String, HostTensor> =
            shapes.into_iter().map(|(name, shape)| (name, made_up(&shape))).collect();
        let mut fetch = |name: &str| Ok(StoredTensor::host("made up", "memory", &tensors[name]));
        write_planned(&path, &metadata, &plan, &mut fetch).unwrap();
        let file = GgufFile::open(&path).unwrap();
        assert_eq!(file.tensor_names().count(), 5 + 2 * 16 + 4);
        assert_eq!(file.text("clip.projector_type").unwrap(), Some("mlp"));
        assert_eq!(file.size("clip.vision.block_count").unwrap(), Some(2));
        assert_eq!(file.integers("clip.vision.feature_layer").unwrap(), Some(vec![2]));
        assert_eq!(file.floats("clip.vision.image_mean").unwrap(), Some(&[0.1, 0.2, 0.3][..]));
        let tensor = |name: &str| file.require(name).unwrap();
        let patch = tensor("v.patch_embd.weight");
        let patch_type = if file_type == FileType::F16 { GgmlType::F16 } else { GgmlType::F32 };
        assert_eq!((patch.shape, patch.ggml_type), (&[64, 3, 14, 14][..], patch_type));
        assert_eq!(
            (tensor("v.position_embd.weight").ggml_type, tensor("v.class_embd").shape),
            (GgmlType::F32, &[64][..])
        );
        assert_eq!(
            (tensor("v.blk.1.ffn_up.weight").shape, tensor("v.blk.1.ffn_down.weight").shape),
            (&[96, 64][..], &[64, 96][..])
        );
        assert!(file.tensor("v.blk.2.ln1.weight").is_none() && file.tensor("v.post_ln.weight").is_none());
        if act == "linear" {
            linear_projector_is_kept(&file);
        }
        let error = llama_config::config_json(&file).unwrap_err();
        assert!(error.message.contains("(mmproj)") && error.hints[0].contains("language model"), "{error}");
    }
    let full = llava(r#""vision_feature_select_strategy": "full""#);
    let error = mmproj_metadata(&full, "m", FileType::F16, [0.5; 3], [0.5; 3]).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Usage);
    let unbiased = mmproj_plan(&llava(r#""multimodal_projector_bias": false"#), FileType::F16).unwrap();
    assert!(
        unbiased
            .iter()
            .any(|planned| planned.head.name == "mm.2.bias" && planned.source == Source::Values(vec![0.0; 32]))
    );
}

/// The pair of linears that stands for a single one gives what that one gives, with either formula of GELU.
fn linear_projector_is_kept(file: &GgufFile) {
    let values = |name: &str| dequantize(&file.require(name).unwrap()).unwrap();
    let linear = |weight: &[f32], bias: &[f32], input: &[f64]| -> Vec<f64> {
        let row = |row: &[f32]| row.iter().zip(input).map(|(weight, value)| f64::from(*weight) * value).sum::<f64>();
        weight.chunks_exact(input.len()).zip(bias).map(|(weights, bias)| row(weights) + f64::from(*bias)).collect()
    };
    let (weight, bias) = (values("mm.0.weight"), values("mm.0.bias"));
    let input: Vec<f64> = (0..64).map(|index| (f64::from(index) * 0.7).sin()).collect();
    let wanted = linear(&weight[..32 * 64], &bias[..32], &input);
    let tanh_gelu = |x: f64| 0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044715 * x.powi(3))).tanh());
    let hidden: Vec<f64> = linear(&weight, &bias, &input).into_iter().map(tanh_gelu).collect();
    let output = linear(&values("mm.2.weight"), &values("mm.2.bias"), &hidden);
    for (value, wanted) in output.iter().zip(&wanted) {
        assert!((value - wanted).abs() < 1e-9, "{value} for {wanted}");
    }
}

/// A file of one string, one array and two tensors, written by hand.
fn small_file() -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    let string = |bytes: &mut Vec<u8>, text: &str| {
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.as_bytes());
    };
    bytes.extend(3u32.to_le_bytes());
    bytes.extend(2u64.to_le_bytes());
    bytes.extend(2u64.to_le_bytes());
    string(&mut bytes, "kind");
    bytes.extend(8u32.to_le_bytes());
    string(&mut bytes, "text");
    string(&mut bytes, "list");
    bytes.extend(9u32.to_le_bytes());
    bytes.extend(8u32.to_le_bytes());
    bytes.extend(2u64.to_le_bytes());
    string(&mut bytes, "x");
    string(&mut bytes, "y");
    for (name, shape, code, offset) in [("aa", [32u64, 2], 8u32, 0u64), ("bb", [3, 1], 0, 96)] {
        string(&mut bytes, name);
        bytes.extend(2u32.to_le_bytes());
        shape.iter().for_each(|size| bytes.extend(size.to_le_bytes()));
        bytes.extend(code.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
    }
    bytes.resize(bytes.len().next_multiple_of(32) + 96 + 12, 1);
    bytes
}

/// Where a piece of the small file begins.
fn place(bytes: &[u8], piece: &[u8]) -> usize {
    bytes.windows(piece.len()).position(|window| window == piece).unwrap()
}

fn use_everything(file: &GgufFile) {
    for name in file.tensor_names() {
        let _ = dequantize(&file.tensor(name).unwrap());
    }
    let _ = llama_config::config_json(file);
    let _ = llama::tensor_names(file).map(|names| {
        for name in names {
            let _ = llama::tensor(file, &name).map(|tensor| tensor.to_f32());
        }
    });
}

#[test]
fn lying_and_truncated_files_are_refused_by_name() {
    let whole = small_file();
    let file = GgufFile::from_bytes("x.gguf", whole.clone()).unwrap();
    assert_eq!(file.require("aa").unwrap().shape, [2, 32]);
    let refusal = |bytes: Vec<u8>| {
        let error = GgufFile::from_bytes("x.gguf", bytes).err().expect("a broken file was accepted");
        assert_eq!(error.kind, ErrorKind::Data);
        assert!(error.message.contains("x.gguf"), "{error}");
        format!("{} {}", error.message, error.hints.join(" "))
    };
    for length in 0..whole.len() {
        let message = refusal(whole[..length].to_vec());
        assert!(message.contains("truncated"), "{length}: {message}");
    }
    let (list, aa, bb) = (place(&whole, b"list"), place(&whole, b"aa") + 2, place(&whole, b"bb") + 2);
    let changed = |at: usize, with: &[u8]| {
        let mut bytes = whole.clone();
        bytes[at..at + with.len()].copy_from_slice(with);
        bytes
    };
    let huge = u64::MAX.to_le_bytes();
    let rows = [
        (changed(0, b"PK"), "is not a GGUF file"),
        (changed(4, &[1, 0, 0, 0]), "version 1"),
        (changed(4, &[0, 0, 0, 3]), "big-endian"),
        (changed(4, &[9, 0, 0, 0]), "version 9"),
        (changed(8, &huge), "claims 18446744073709551615 tensors"),
        (changed(16, &huge), "claims 18446744073709551615 metadata keys"),
        (changed(24, &huge), "metadata key 1 of 2 wants 18446744073709551615 bytes"),
        (changed(24, &[0; 8]), "metadata key 1 of 2 is empty"),
        (changed(32, &[0xff]), "not UTF-8"),
        (changed(32, b"list"), "list is there twice"),
        (changed(36, &[13]), "kind is of type 13"),
        (changed(40, &huge), "kind wants 18446744073709551615 bytes"),
        (changed(list + 8, &[77]), "list is of type 77"),
        (changed(list + 12, &huge), "list claims 18446744073709551615 elements"),
        (changed(list + 20, &huge), "list [0] wants"),
        (changed(aa - 2, b"bb"), "the tensor bb is there twice"),
        (changed(aa, &[5]), "tensor aa: 5 dimensions"),
        (changed(aa + 4, &[33]), "tensor aa: rows of 33 values are no whole number of Q8_0 blocks of 32"),
        (changed(aa + 4, &[0]), "tensor aa: shape [2, 0] is not possible"),
        (changed(aa + 12, &huge), "tensor aa: shape [18446744073709551615, 32] is larger"),
        (changed(aa + 12, &[3]), "bb and aa lie on the same bytes"),
        (changed(aa + 20, &[4]), "tensor aa: type 4 is not known"),
        (changed(bb + 24, &[97]), "tensor bb: its offset 97 is no multiple of the alignment 32"),
        (changed(bb + 24, &[0]), "lie on the same bytes"),
        (changed(bb + 24, &[128]), "tensor bb: its 12 bytes at 128 are not within the 108 bytes"),
        (changed(bb + 24, &[0xe0, 255, 255, 255, 255, 255, 255, 255]), "tensor bb: its 12 bytes"),
    ];
    for (bytes, expected) in rows {
        let message = refusal(bytes);
        assert!(message.contains(expected), "{expected}: {message}");
    }
}

#[test]
fn arrays_in_arrays_end_and_odd_keys_are_refused() {
    let with = |key: &str, value: &[u8]| {
        let mut bytes = b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0".to_vec();
        bytes.extend((key.len() as u64).to_le_bytes());
        bytes.extend(key.as_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        GgufFile::from_bytes("x.gguf", bytes).map(|_| ()).unwrap_err().message
    };
    let mut deep = 9u32.to_le_bytes().to_vec();
    for _ in 0..100_000 {
        deep.extend(9u32.to_le_bytes());
        deep.extend(1u64.to_le_bytes());
    }
    assert!(with("a", &deep).contains("arrays more than 8 deep"));
    assert!(with("general.alignment", &[4, 0, 0, 0, 24, 0, 0, 0]).contains("general.alignment is U32(24)"));
    assert!(with("general.alignment", &[4, 0, 0, 0, 0, 0, 0, 0]).contains("general.alignment is U32(0)"));
    assert!(with("split.count", &[2, 0, 0, 0, 3, 0]).contains("one of 3 parts"));
    assert!(with("a", &[7, 0, 0, 0, 2]).contains("the byte 2 for a bool"));
}

/// Whatever byte of the header is changed, and in whatever way, nothing panics.
#[test]
fn changed_bytes_never_panic() {
    let tiny = fs::read(golden("tiny_llama.gguf")).unwrap();
    for whole in [small_file(), tiny] {
        let header = whole.len().min(1500);
        for at in 0..header {
            for value in [0, 4, 0x80, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] = value;
                if let Ok(file) = GgufFile::from_bytes("x.gguf", bytes) {
                    use_everything(&file);
                }
            }
        }
    }
}

#[test]
fn models_that_are_not_read_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    let base = |architecture: &str| -> Vec<(String, Value)> {
        let pairs = [
            ("general.architecture", architecture.into()),
            ("llama.block_count", Value::U32(1)),
            ("llama.context_length", Value::U32(8)),
            ("llama.embedding_length", Value::U32(4)),
            ("llama.feed_forward_length", Value::U32(4)),
            ("llama.attention.head_count", Value::U32(2)),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-6)),
        ];
        pairs.map(|(key, value)| (key.to_owned(), value)).into()
    };
    let config = |metadata: &[(String, Value)]| {
        let head = GgufHead { name: "token_embd.weight".into(), ggml_type: GgmlType::F32, shape: vec![3, 4] };
        write_gguf(&path, metadata, &[head], &mut |_| Ok(TensorData::F32(vec![0.0; 12].into()))).unwrap();
        llama_config::config_json(&GgufFile::open(&path).unwrap())
    };
    let plain = config(&base("llama")).unwrap();
    assert_eq!((&plain["tie_word_embeddings"], &plain["num_key_value_heads"]), (&json!(true), &json!(2)));
    assert_eq!(
        (&plain["head_dim"], &plain["rope_theta"], &plain["vocab_size"]),
        (&json!(2), &json!(10000.0), &json!(3))
    );
    let changed = |key: &str, value: Value| {
        let mut metadata = base("llama");
        metadata.retain(|(known, _)| known != key);
        metadata.push((key.to_owned(), value));
        config(&metadata)
    };
    let layers = Value::Array(Array::I32(vec![2, 2]));
    assert_eq!(changed("llama.attention.head_count_kv", layers).unwrap()["num_key_value_heads"], 2);
    let rows = [
        (config(&base("gemma")), "`gemma`, which is not built yet"),
        (changed("llama.expert_count", Value::U32(8)), "a mixture of 8 experts"),
        (changed("llama.attention.head_count_kv", vec![1, 2].into()), "differs from layer to layer"),
        (changed("llama.block_count", Value::U32(0)), "llama.block_count is 0"),
        (changed("llama.block_count", "two".into()), "llama.block_count is a string"),
        (changed("llama.attention.head_count", Value::U32(3)), "which 3 heads do not divide"),
        (changed("llama.attention.value_length", Value::U32(8)), "value_length is 8 and a head is 2 wide"),
        (changed("llama.embedding_length", Value::U32(8)), "rows of 4, and llama.embedding_length is 8"),
        (changed("llama.rope.scaling.type", "longrope".into()), "`longrope`"),
        (changed("llama.rope.scaling.type", "linear".into()), "no metadata llama.rope.scaling.factor"),
        (config(&base("llama")[..6]), "no metadata llama.attention.layer_norm_rms_epsilon"),
        (config(&base("llama")[1..]), "no metadata general.architecture"),
    ];
    for (result, expected) in rows {
        let error = result.expect_err(expected);
        assert!(error.message.contains(expected) && error.message.contains("x.gguf"), "{expected}: {error}");
    }
    let mut wide = base("llama");
    wide.push(("llama.attention.key_length".to_owned(), Value::U64(1 << 60)));
    let heads = [("token_embd.weight", vec![1, 4]), (llama::ROPE_FREQS, vec![4])].map(|(name, shape)| GgufHead {
        name: name.into(),
        ggml_type: GgmlType::F32,
        shape,
    });
    write_gguf(&path, &wide, &heads, &mut |_| Ok(TensorData::F32(vec![2.0; 4].into()))).unwrap();
    let error = llama_config::config_json(&GgufFile::open(&path).unwrap()).unwrap_err();
    assert!(error.message.contains("rope_freqs.weight has shape [4], for heads of 1152921504606846976"), "{error}");
    let head = GgufHead { name: "blk.0.ffn_gate_exps.weight".into(), ggml_type: GgmlType::F32, shape: vec![1] };
    write_gguf(&path, &base("llama"), &[head], &mut |_| Ok(TensorData::F32(vec![0.0].into()))).unwrap();
    let error = llama::tensor_names(&GgufFile::open(&path).unwrap()).unwrap_err();
    assert!(error.message.contains("blk.0.ffn_gate_exps.weight is not one of a LLaMA"), "{error}");
    assert!(error.hints[0].contains("blk.0.ffn_gate.weight"), "{:?}", error.hints);
    assert!(GgufFile::open(folder.path()).err().unwrap().message.contains("is a folder"));
    assert!(GgufFile::open(&folder.path().join("absent")).is_err());
}
