//! Adapters of every form that PEFT saves, against what PEFT computes with them and what merging makes of the weights:
//! tests/golden/adapters, made by tools/golden_adapters.py.

mod common;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use common::{golden, numbers, open_gpu, read_json, run};
use half::bf16;
use serde_json::{Value, json};
use wgpu_llava::{
    autograd::Tape,
    error::ErrorKind,
    formats::{
        HostTensor,
        model_folder::ModelFolder,
        peft::{Adapter, LoraWeights, Merge},
        safetensors::Checkpoint,
        safetensors_writer::{TensorData, TensorHead, write_safetensors},
    },
    models::{adapter, config::ModelConfig, llava::Llava, names},
    tensor::Tensor,
};

/// Largest distance of a log-probability, nats.
const TOLERANCE: f64 = 5e-5;

fn form(name: &str) -> PathBuf {
    golden("adapters").join(name)
}

fn forms() -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(golden("adapters"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    assert!(names.len() >= 16, "{names:?}");
    names
}

fn expected(name: &str) -> Value {
    read_json(&form(name).join("expected.json"))
}

/// A form with the folder of the model that it was made for.
fn opened(name: &str) -> (Value, ModelFolder, Adapter) {
    let expected = expected(name);
    let case = golden("parity").join(expected["model"].as_str().unwrap());
    let folder = ModelFolder::open(&case.join("model")).unwrap();
    let adapter = Adapter::read(&form(name), folder.config()).unwrap_or_else(|error| panic!("{name}: {error}"));
    (expected, folder, adapter)
}

/// The model that a form was made for, as a folder.
fn base(name: &str) -> PathBuf {
    golden("parity").join(expected(name)["model"].as_str().unwrap()).join("model")
}

fn check_score(name: &str) {
    let adapter = form(name);
    assert_score(name, &base(name), &["--adapter".as_ref(), adapter.as_os_str()]);
}

/// `score` of a model, with more arguments, against PEFT's.
fn assert_score(name: &str, model: &Path, more: &[&std::ffi::OsStr]) {
    let expected = expected(name);
    let case = golden("parity").join(expected["model"].as_str().unwrap());
    let (data, images) = (case.join("score.json"), case.join("images"));
    let arguments =
        ["score".as_ref(), "--model".as_ref(), model, "--data".as_ref(), &data, "--image-folder".as_ref(), &images];
    let output = run(arguments.iter().map(|argument: &&Path| argument.as_os_str()).chain(more.iter().copied()));
    let lines = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let records = expected["score"].as_array().unwrap();
    assert_eq!(lines.len(), records.len(), "{name}");
    let mut largest = 0.0f64;
    for (line, record) in lines.iter().zip(records) {
        assert_eq!((&line["id"], &line["tokens"]), (&record["id"], &record["tokens"]), "{name}");
        let (ours, theirs) = (numbers(&line["token_logprobs"]), numbers(&record["token_logprobs"]));
        assert_eq!(ours.len(), theirs.len(), "{name}");
        largest = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(largest, f64::max);
    }
    println!("{name}: {largest:.1e}");
    assert!(largest <= TOLERANCE, "{name}: a log-probability is {largest} off");
}

/// In two halves, which run beside each other.
/// `merge` writes a model that answers as the model with the adapter does.
#[test]
fn merged_folders_answer_as_peft_does() {
    let dir = tempfile::tempdir().unwrap();
    for name in forms() {
        let out = dir.path().join(&name);
        let (model, adapter) = (base(&name), form(&name));
        let line =
            [Path::new("merge"), "--model".as_ref(), &model, "--adapter".as_ref(), &adapter, "--out".as_ref(), &out];
        let output = common::program(line).output().unwrap();
        let told = common::stderr(&output);
        // An adapter's bias where the model has none has no place in the weights.
        if !output.status.success() {
            assert!(told.contains("without a bias cannot be merged"), "{name}: {told}");
            assert!(!out.exists());
            continue;
        }
        assert!(told.contains("the largest change is"), "{told}");
        assert_score(&name, &out, &[]);
    }
}

#[test]
fn a_broken_adapter_leaves_no_merged_folder() {
    let dir = tempfile::tempdir().unwrap();
    let (adapter, out) = (dir.path().join("adapter"), dir.path().join("out"));
    common::copy_folder(&form("all_linear"), &adapter);
    let weights = Checkpoint::open(&form("all_linear").join("adapter_model.safetensors")).unwrap();
    let heads = weights.names().map(|name| TensorHead::f32(name, weights.require(name).unwrap().shape)).collect();
    write_safetensors(&adapter.join("adapter_model.safetensors"), heads, &mut |head| {
        let mut values = weights.require(&head.name)?.to_f32()?.data;
        if head.name.contains("lora_A") {
            values[0] = f32::NAN;
        }
        Ok(TensorData::F32(values.into()))
    })
    .unwrap();
    let model = base("all_linear");
    let line = [Path::new("merge"), "--model".as_ref(), &model, "--adapter".as_ref(), &adapter, "--out".as_ref(), &out];
    let output = common::program(line).output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", common::stderr(&output));
    assert!(common::stderr(&output).contains("infinite or not a number"), "{}", common::stderr(&output));
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["adapter"]);
}

#[test]
fn scores_are_those_of_peft() {
    forms().iter().step_by(2).for_each(|name| check_score(name));
}

#[test]
fn scores_of_the_other_forms_are_those_of_peft() {
    forms().iter().skip(1).step_by(2).for_each(|name| check_score(name));
}

/// Every tensor of the model with the adapter in it, in parts of an odd number of rows, and the report's largest change.
fn merged(
    name: &str,
    folder: &ModelFolder,
    adapter: &Adapter,
    keep: fn(f32) -> f32,
) -> (BTreeMap<String, HostTensor>, (String, f64)) {
    let mut merge = Merge::new(adapter, folder.config()).unwrap();
    let config = merge.config().clone();
    let mut tensors = BTreeMap::new();
    for (tensor, _) in names::expected_tensors(&config).into_iter().chain(names::unused_vision_tensors(&config)) {
        let before = if folder.has(&tensor) { tensor.as_str() } else { names::EMBED_TOKENS };
        let mut values = folder.tensor(before).unwrap();
        values.data.iter_mut().for_each(|x| *x = keep(*x));
        if merge.touches(&tensor) {
            let width: usize = values.shape[1..].iter().product();
            for (part, rows) in values.data.chunks_mut(width * 7).enumerate() {
                merge.apply(&tensor, part * 7, rows).unwrap();
            }
        }
        tensors.insert(tensor, values);
    }
    let report = merge.finish().unwrap_or_else(|error| panic!("{name}: {error}"));
    (tensors, report.largest.unwrap())
}

#[test]
fn merged_weights_are_those_of_peft() {
    let mut compared = 0;
    for name in forms() {
        let (expected, folder, adapter) = opened(&name);
        let Some(changed) = expected["merged"].as_object() else { continue };
        let (tensors, largest) = merged(&name, &folder, &adapter, |x| x);
        for (tensor, values) in &tensors {
            match changed.get(tensor) {
                // PEFT has not changed it.
                None => assert_eq!(*values, folder.tensor(tensor).unwrap(), "{name}: {tensor}"),
                Some(wanted) => {
                    assert_eq!(json!(values.shape), wanted["shape"], "{name}: {tensor}");
                    let sum: f64 = values.data.iter().map(|&x| f64::from(x)).sum();
                    let off = (sum - wanted["sum"].as_f64().unwrap()).abs();
                    assert!(off <= 1e-7 * values.len() as f64, "{name}: {tensor}: the sum is {off} off");
                    for (x, wanted) in values.data.iter().zip(numbers(&wanted["first"])) {
                        assert!((f64::from(*x) - wanted).abs() <= 1e-6, "{name}: {tensor}: {x} for {wanted}");
                    }
                    compared += 1;
                }
            }
        }
        assert!(changed.keys().all(|tensor| tensors.contains_key(tensor)), "{name}: a tensor is missing");
        assert_eq!(json!(largest.0), expected["largest"]["tensor"], "{name}: {}", largest.1);
        assert!((largest.1 - expected["largest"]["change"].as_f64().unwrap()).abs() <= 1e-6, "{name}: {largest:?}");

        let whole = form(&name).join("merged.safetensors");
        if !whole.exists() {
            continue;
        }
        let whole = Checkpoint::open(&whole).unwrap();
        let bf16_base = merged(&name, &folder, &adapter, |x| bf16::from_f32(x).to_f32()).0;
        for stored in whole.names() {
            let wanted = whole.require(stored).unwrap().to_f32().unwrap();
            match stored.strip_prefix("bfloat16.") {
                None => {
                    let pairs = tensors[stored].data.iter().zip(&wanted.data);
                    let largest = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    println!("{name}: {stored}: {largest:.1e}");
                    assert!(largest <= 1e-6, "{name}: {stored}: {largest} off");
                }
                Some(tensor) => {
                    // Neighbouring numbers have neighbouring bits.
                    let line = |x: f32| {
                        let bits = i32::from(bf16::from_f32(x).to_bits() as i16);
                        if bits < 0 { -(bits & 0x7fff) } else { bits }
                    };
                    let pairs = bf16_base[tensor].data.iter().zip(&wanted.data);
                    let apart: Vec<i32> = pairs.map(|(&a, &b)| (line(a) - line(b)).abs()).collect();
                    let other = apart.iter().filter(|&&apart| apart > 0).count();
                    println!("{name}: {stored}: {other} of {} round to the neighbour", apart.len());
                    assert!(apart.iter().all(|&apart| apart <= 1), "{name}: {stored}");
                    assert!(other * 500 <= apart.len(), "{name}: {stored}: {other} of {}", apart.len());
                }
            }
        }
    }
    assert!(compared > 100, "{compared} tensors");
}

#[test]
fn a_merge_misses_what_it_was_not_given() {
    let (_, folder, adapter) = opened("dora");
    let whole = "language_model.model.layers.0.self_attn.q_proj.weight";
    let mut merge = Merge::new(&adapter, folder.config()).unwrap();
    let mut rows = folder.tensor(whole).unwrap().data;
    merge.apply(whole, 0, &mut rows).unwrap();
    let error = merge.apply(whole, 0, &mut rows).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Failed, "{error}");
    let mut untouched = vec![1.0; 72];
    merge.apply(names::FINAL_NORM, 0, &mut untouched).unwrap();
    assert_eq!(untouched, [1.0; 72]);
    assert!(merge.finish().unwrap_err().message.contains("were not merged"));

    // A bias for a linear that has none can be used, but not merged.
    let mut biased = adapter.clone();
    let module = biased.modules.get_mut("language_model.model.layers.0.self_attn.q_proj").unwrap();
    module.bias = Some(HostTensor::filled([72], 0.5));
    let error = Merge::new(&biased, folder.config()).err().unwrap();
    assert!(error.message.contains("q_proj.bias") && error.hints.join(" ").contains("lora_bias"), "{error}");
    // Another model.
    let other = ModelConfig::load(&golden("parity/qwen2_dynamic/model")).unwrap();
    assert_eq!(Merge::new(&adapter, &other).err().unwrap().kind, ErrorKind::Data);
}

#[test]
fn dora_of_a_row_of_zeros_leaves_zeros() {
    let mut weights = LoraWeights::new(HostTensor::filled([1, 3], 1.0), HostTensor::new([2, 1], vec![-2.0, 0.5]), 0.5);
    weights.magnitude = Some(HostTensor::new([2], vec![7.0, 2.0]));
    let mut rows = vec![1.0, 1.0, 1.0, 0.75, -0.25, -0.25];
    let largest = weights.merge_rows(0, &mut rows);
    assert_eq!(rows, [0.0, 0.0, 0.0, 2.0, 0.0, 0.0]);
    assert_eq!(largest, 1.25);
    // The second row alone.
    let mut row = vec![0.75, -0.25, -0.25];
    weights.merge_rows(1, &mut row);
    assert_eq!(row, [2.0, 0.0, 0.0]);
}

#[test]
fn written_adapters_read_back_equal() {
    let dir = tempfile::tempdir().unwrap();
    for name in forms() {
        let (_, folder, adapter) = opened(&name);
        let out = dir.path().join(&name);
        adapter.write(&out, folder.config(), "tiny").unwrap();
        assert_eq!(Adapter::read(&out, folder.config()).unwrap(), adapter, "{name}");
        let json = read_json(&out.join("adapter_config.json"));
        assert_eq!(json["use_dora"], json!(name.contains("dora") || name == "raw_state_dict"), "{name}");
    }
}

/// Rewrites the weights of a copied adapter with what `edit` makes of their names and values.
fn edited(name: &str, edit: impl FnOnce(&mut BTreeMap<String, HostTensor>)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&form(name).join("adapter_model.safetensors")).unwrap();
    let read = |name: &str| source.require(name).unwrap().to_f32().unwrap();
    let mut tensors = source.names().map(|name| (name.to_owned(), read(name))).collect();
    edit(&mut tensors);
    let heads = tensors.iter().map(|(name, tensor)| TensorHead::f32(name, tensor.shape.clone())).collect();
    let fetch = &mut |head: &TensorHead| Ok(TensorData::F32(tensors[&head.name].data.as_slice().into()));
    write_safetensors(&dir.path().join("adapter_model.safetensors"), heads, fetch).unwrap();
    fs::copy(form(name).join("adapter_config.json"), dir.path().join("adapter_config.json")).unwrap();
    dir
}

fn renamed(name: &str, rename: impl Fn(&str) -> String) -> tempfile::TempDir {
    edited(name, |tensors| {
        *tensors = std::mem::take(tensors).into_iter().map(|(name, tensor)| (rename(&name), tensor)).collect();
    })
}

#[test]
fn every_layout_and_raw_names_are_the_same_adapter() {
    for name in ["dora", "all_linear"] {
        let (_, folder, adapter) = opened(name);
        let language = "base_model.model.model.language_model.";
        let layouts: [&dyn Fn(&str) -> String; 6] = [
            // transformers up to 4.51
            &|name| {
                name.replace(language, "base_model.model.language_model.model.")
                    .replace(".model.model.vision_tower.", ".model.vision_tower.vision_model.")
                    .replace(".model.model.multi_modal_projector.", ".model.multi_modal_projector.")
            },
            // 4.52 to 4.57
            &|name| name.replace(".vision_tower.", ".vision_tower.vision_model."),
            // The original LLaVA, its tower and projector inside
            &|name| {
                name.replace(language, "base_model.model.model.")
                    .replace(".vision_tower.", ".vision_tower.vision_tower.vision_model.")
                    .replace(".multi_modal_projector.linear_1", ".mm_projector.0")
                    .replace(".multi_modal_projector.linear_2", ".mm_projector.2")
            },
            // A raw state dict; DoRA's vector is there the weight of a layer
            &|name| {
                name.replace(".lora_A.", ".lora_A.default.")
                    .replace(".lora_B.", ".lora_B.default.")
                    .replace(".lora_magnitude_vector", ".lora_magnitude_vector.default.weight")
                    .replace("projector.linear_1.w", "projector.modules_to_save.default.linear_1.w")
            },
            // As older releases kept DoRA's vector, and under another name than the default
            &|name| {
                name.replace(".lora_A.", ".lora_A.mine.")
                    .replace(".lora_B.", ".lora_B.mine.")
                    .replace(".lora_magnitude_vector", ".lora_magnitude_vector.mine")
            },
            &|name| format!("module.{name}").replace(".lora_magnitude_vector", ".lora_magnitude_vector.weight"),
        ];
        for (number, layout) in layouts.iter().enumerate() {
            let dir = renamed(name, layout);
            let read = Adapter::read(dir.path(), folder.config());
            assert_eq!(read.unwrap_or_else(|error| panic!("{name} {number}: {error}")), adapter, "{name} {number}");
        }
    }
}

#[test]
fn broken_adapters_are_refused_by_name() {
    let (_, folder, adapter) = opened("dora");
    assert!(adapter.use_dora());
    let refusal = |dir: &Path| {
        let error = Adapter::read(dir, folder.config()).expect_err("a broken adapter was accepted");
        assert_eq!(error.kind, ErrorKind::Data, "{error}");
        format!("{} {}", error.message, error.hints.join(" "))
    };
    let module = "base_model.model.model.language_model.layers.1.mlp.up_proj";
    let canonical = "language_model.model.layers.1.mlp.up_proj";
    let without = |part: &str| {
        edited("dora", |tensors| {
            tensors.remove(&format!("{module}.{part}")).unwrap();
        })
    };
    for part in ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"] {
        let message = refusal(without(part).path());
        let part = part.trim_end_matches(".weight");
        assert!(message.contains(&format!("{canonical} has no {part}")), "{message}");
    }
    let wrong = edited("dora", |tensors| {
        tensors.insert(format!("{module}.lora_magnitude_vector"), HostTensor::zeros([59]));
    });
    let message = refusal(wrong.path());
    assert!(message.contains("lora_magnitude_vector") && message.contains("is [59], [60] is expected"), "{message}");
    let message = refusal(renamed("dora", |name| name.replace(".layers.1.", ".layers.4.")).path());
    assert!(message.contains("layers.4.mlp.down_proj.lora_A.weight\n    the nearest is base_model"), "{message}");
    assert!(message.contains("more"), "{message}");
    let two = edited("dora", |tensors| {
        let tensor = tensors[&format!("{module}.lora_A.weight")].clone();
        tensors.insert(format!("{module}.lora_A.one.weight"), tensor.clone());
        tensors.insert(format!("{module}.lora_A.two.weight"), tensor);
    });
    assert!(refusal(two.path()).contains("several adapters: one, two"));

    // What beside the adapter does not belong to the model.
    let dir = renamed("dora", str::to_owned);
    fs::copy(form("original_llava_linear").join("non_lora_trainables.bin"), dir.path().join("non_lora_trainables.bin"))
        .unwrap();
    let message = refusal(dir.path());
    assert!(message.contains("non_lora_trainables.bin") && message.contains("mm_projector"), "{message}");
}

#[test]
fn what_is_attached_is_exported_again_and_folds_into_the_merged_weights() {
    let gpu = open_gpu();
    for name in ["dora", "lora_bias", "all_linear", "embeddings_and_head", "tied_embeddings_saved", "tied_head_adapted"]
    {
        let (_, folder, adapter) = opened(name);
        let mut model = Llava::load(&gpu, &folder).unwrap();
        adapter::attach(&mut model, &adapter, 0.0).unwrap();
        assert_eq!(adapter::export(&model, &adapter, false).unwrap(), adapter, "{name}");

        adapter::fold(&mut model).unwrap();
        let (tensors, _) = merged(name, &folder, &adapter, |x| x);
        let mut compared = 0;
        for (tensor, wanted) in tensors {
            let Some(id) = model.parameters.find(&tensor) else { continue };
            let got = model.parameters.get(id).value.to_vec().unwrap();
            let largest = got.iter().zip(&wanted.data).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(got.len() == wanted.len() && largest <= 2e-6, "{name}: {tensor}: {largest}");
            compared += 1;
        }
        assert!(compared > 20, "{name}: {compared}");
    }
}

#[test]
fn a_bias_for_a_linear_without_one_is_used_but_not_folded() {
    let (_, folder, mut adapter) = opened("torch_bin");
    let name = "language_model.model.layers.0.self_attn.o_proj";
    let module = adapter.modules.get_mut(name).unwrap();
    module.bias = Some(HostTensor::filled([36], 0.25));
    let scaled = module.scale as f32 * 0.25;
    let mut model = Llava::load(&open_gpu(), &folder).unwrap();
    adapter::attach(&mut model, &adapter, 0.0).unwrap();
    let o_proj = model.language.layers_mut()[0].o_proj.clone();
    let bias = o_proj.lora.as_ref().unwrap().bias.unwrap();
    assert_eq!(model.parameters.get(bias).value.to_vec().unwrap(), vec![scaled; 36]);

    // What the layer computes of zeros is that bias.
    let mut tape = Tape::silent();
    let zeros = tape.constant(Tensor::from_f32(model.gpu(), &[0.0; 72], &[2, 36]));
    let y = o_proj.forward(&mut model.inference(&mut tape), &zeros).value.to_vec().unwrap();
    assert_eq!(y, vec![scaled; 72]);
    assert_eq!(adapter::fold(&mut model).unwrap_err().kind, ErrorKind::Usage);
}
