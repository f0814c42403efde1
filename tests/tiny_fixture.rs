//! A LLaVA with weights from a hash, against what transformers computes with it (tools/golden_tiny_fixture.py):
//! every hidden state, logits, loss, gradients, and twelve steps of AdamW by each method.

mod common;

use std::{collections::BTreeMap, fs, path::Path, sync::OnceLock};

use common::{assert_close, golden, hash_values, norm, numbers, open_gpu, read_json};
use serde_json::{Value, json};
use wgpu_llava::{
    autograd::{Tape, Var},
    data::IMAGE_TOKEN_INDEX,
    formats::{
        model_folder::ModelFolder,
        safetensors_writer::{TensorData, TensorHead, write_safetensors},
    },
    gpu::Gpu,
    models::{
        batch::PackedBatch,
        clip::ClipVision,
        config::{FeatureSelect, ModelConfig},
        llava::{Llava, Pictures},
        loading::{Loading, Quantization},
        names,
    },
    nn::{Forward, Lora},
    ops::{
        adamw, elementwise,
        matmul::{Layout, product},
        patch_embed, reduce,
    },
    quant::QuantType,
    tensor::Tensor,
};

/// Of float32 figures against float32 figures of another engine.
const TOLERANCE: f64 = 1e-4;
const IMAGE_SIZE: usize = 28;
const PATCH_SIZE: usize = 14;

fn gpu() -> &'static Gpu {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    GPU.get_or_init(open_gpu)
}

fn expected() -> Value {
    read_json(&golden("tiny_fixture.json"))
}

fn config(projector: &str) -> Value {
    json!({
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": 60,
        "projector_hidden_act": if projector == "linear" { "linear" } else { "gelu" },
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 2, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE,
        },
        "text_config": {
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "vocab_size": 64, "rms_norm_eps": 1e-5,
        },
    })
}

/// Writes the model folder: tensor t is the t-th of all names sorted by bytes.
fn write_folder(folder: &Path, projector: &str) {
    let json = config(projector).to_string();
    fs::write(folder.join("config.json"), &json).unwrap();
    let config = ModelConfig::parse("config.json", json.as_bytes()).unwrap();
    let mut shapes: BTreeMap<String, Vec<usize>> = names::expected_tensors(&config).into_iter().collect();
    shapes.extend(names::unused_vision_tensors(&config));
    assert_eq!(shapes.len(), if projector == "linear" { 78 } else { 80 });
    let mut values: BTreeMap<String, Vec<f32>> = BTreeMap::new();
    for (number, (name, shape)) in (0..).zip(&shapes) {
        let (scale, offset) = match shape.len() {
            _ if name.ends_with(".bias") => (0.05, 0.0),
            1 if name.ends_with(".weight") => (0.1, 1.0),
            _ => (0.2, 0.0),
        };
        values.insert(name.clone(), hash_values(number, shape.iter().product(), scale, offset));
    }
    // What stands behind a linear projector has no number.
    for (name, shape) in names::projector_identity_tensors(config.llava().unwrap()) {
        let size = shape[0];
        let identity = (0..shape.iter().product()).map(|at| f32::from(shape.len() == 2 && at / size == at % size));
        values.insert(name.clone(), identity.collect());
        shapes.insert(name, shape);
    }
    let heads = shapes.iter().map(|(name, shape)| TensorHead::f32(name.as_str(), shape.as_slice())).collect();
    let mut fetch = |head: &TensorHead| Ok(TensorData::F32(values[&head.name].as_slice().into()));
    write_safetensors(&folder.join("model.safetensors"), heads, &mut fetch).unwrap();
}

fn load(projector: &str) -> Llava {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), projector);
    let folder = ModelFolder::open(folder.path()).unwrap().with_projector().unwrap();
    Llava::load(gpu(), &folder).unwrap()
}

fn pixels() -> Vec<f32> {
    hash_values(1000, 3 * IMAGE_SIZE * IMAGE_SIZE, 1.0, 0.0)
}

/// The four image ids of the fixture are one picture.
fn batch(ids: &[i32], labels: &[i32]) -> PackedBatch {
    let (mut tokens, mut targets) = (Vec::new(), Vec::new());
    for (&id, &label) in ids.iter().zip(labels) {
        match id {
            60 if tokens.last() == Some(&IMAGE_TOKEN_INDEX) => {}
            _ => {
                tokens.push(if id == 60 { IMAGE_TOKEN_INDEX } else { id });
                targets.push(label);
            }
        }
    }
    let mut batch = PackedBatch::default();
    batch.push(&tokens, &targets, 4);
    batch
}

fn ids(value: &Value) -> Vec<i32> {
    numbers(value).into_iter().map(|x| x as i32).collect()
}

fn fixture_batch(expected: &Value) -> PackedBatch {
    batch(&ids(&expected["input_ids"]), &ids(&expected["labels"]))
}

/// `{"norm", "at": {"0,row": [first four]}}` of a tensor [rows, cols].
#[track_caller]
fn assert_figures(what: &str, tensor: &Tensor, figures: &Value) {
    let values = tensor.to_vec().unwrap();
    let wanted = figures["norm"].as_f64().unwrap();
    assert_close(&format!("{what}: norm"), norm(&values), wanted, TOLERANCE, wanted);
    let largest = values.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    for (place, first) in figures["at"].as_object().unwrap() {
        let row: usize = place.split(',').nth(1).unwrap().parse().unwrap();
        for (col, wanted) in numbers(first).into_iter().enumerate() {
            let got = f64::from(values[row * tensor.cols() + col]);
            assert_close(&format!("{what} at {row},{col}"), got, wanted, TOLERANCE, f64::from(largest));
        }
    }
}

/// Logits [T, V] of one sequence.
fn logits(model: &Llava, batch: &PackedBatch) -> Tensor {
    let (mut tape, pixels) = (Tape::silent(), pixels());
    let mut forward = Forward { tape: &mut tape, parameters: &model.parameters, dropout: None, before: None };
    let embedded = model.embed(&mut forward, batch, Pictures::Pixels(&[&pixels])).unwrap();
    let hidden =
        model.language.forward(&mut forward, embedded.clone(), &|gpu| model.language.packed(gpu, &batch.lengths));
    product(Layout::Nt, &hidden.value, &model.parameters.weight(model.language.lm_head()).value)
}

fn argmax(row: &[f32]) -> i32 {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as i32
}

#[test]
fn the_hash_rule_is_the_one_of_the_scripts() {
    for (number, wanted) in [(0, [-0.74666748, -0.45567289, 0.37120832]), (1000, [0.87491193, 0.20793392, -0.88220469])]
    {
        for (index, wanted) in wanted.into_iter().enumerate() {
            assert_close("u", common::hash_value(number, index), wanted, 1e-8, 1.0);
        }
    }
}

#[test]
fn forward_figures() {
    let expected = expected();
    for projector in ["mlp2x_gelu", "linear"] {
        let (model, want) = (load(projector), &expected[projector]);
        let llava = model.config.llava().unwrap();

        let patches = patch_embed::patchify(&pixels(), IMAGE_SIZE, PATCH_SIZE);
        let patches = Tensor::from_f32(gpu(), &patches, &[4, patches.len() / 4]);
        for (layers, figures) in want["vision"]["hidden_states"].as_array().unwrap().iter().enumerate() {
            let mut find = |name: &str| Ok(model.parameters.find(name).unwrap());
            let tower = ClipVision::new(&llava.vision_config, layers, FeatureSelect::Full, &mut find).unwrap();
            let mut tape = Tape::silent();
            let mut forward = Forward { tape: &mut tape, parameters: &model.parameters, dropout: None, before: None };
            let state = tower.forward(&mut forward, &patches);
            assert_figures(&format!("{projector}: hidden state {layers}"), &state.value, figures);
        }
        let (mut tape, pixels) = (Tape::silent(), pixels());
        let mut forward = Forward { tape: &mut tape, parameters: &model.parameters, dropout: None, before: None };
        let features = model.features(&mut forward, &[&pixels]).unwrap();
        let projected = model.projector.as_ref().unwrap().forward(&mut forward, &features);
        assert_figures(&format!("{projector}: projector"), &projected.value, &want["vision"]["projector"]);

        let batch = fixture_batch(&expected);
        let logits = logits(&model, &batch);
        assert_figures(&format!("{projector}: logits"), &logits, &want["logits"]);
        let best: Vec<i32> = logits.to_vec().unwrap().chunks_exact(64).map(argmax).collect();
        assert_eq!(best, ids(&want["argmax"]), "{projector}");

        let losses = model.score(&batch, Pictures::Pixels(&[&pixels])).unwrap();
        let loss = losses.iter().map(|&x| f64::from(x)).sum::<f64>() / losses.len() as f64;
        let wanted = want["loss"].as_f64().unwrap();
        println!("{projector}: loss {loss:.7}, wanted {wanted:.7}");
        assert_close(&format!("{projector}: loss"), loss, wanted, 2e-5, wanted);
    }
}

/// The decoder's linears as NF4, dequantised in f32: bitsandbytes' losses (tools/golden_nf4.py).
#[test]
fn forward_through_four_bits() {
    let batch = fixture_batch(&expected());
    let losses = read_json(&golden("nf4/expected.json"))["fixture"].take();
    for projector in ["mlp2x_gelu", "linear"] {
        let folder = tempfile::tempdir().unwrap();
        write_folder(folder.path(), projector);
        let folder = ModelFolder::open(folder.path()).unwrap();
        for (double, key) in [(false, "plain"), (true, "double")] {
            let wanted = losses[key][projector].as_f64().unwrap();
            let quantization = Some(Quantization { kind: QuantType::Nf4, double, lm_head: false });
            let progress = &mut |_, _| ();
            let mut loading = Loading { quantization, ..Loading::of_frozen(None, progress) };
            let complete = &mut |name: &str, _: &[usize]| panic!("{name} is in the folder");
            let config = folder.config().clone();
            let model = Llava::load_with(gpu(), &folder, config, false, complete, &mut loading).unwrap();
            let quantized = model.parameters.iter().filter(|parameter| parameter.value.dtype().is_quantized());
            assert_eq!(quantized.count(), 14);
            let losses = model.score(&batch, Pictures::Pixels(&[&pixels()])).unwrap();
            let loss = losses.iter().map(|&x| f64::from(x)).sum::<f64>() / losses.len() as f64;
            println!("{projector}, double {double}: loss {loss:.7}, wanted {wanted:.7}");
            assert_close(projector, loss, wanted, 1e-6, wanted);
        }
    }
}

#[test]
fn greedy_continuation() {
    let expected = expected();
    for projector in ["mlp2x_gelu", "linear"] {
        let model = load(projector);
        let mut so_far = ids(&expected["input_ids"])[..9].to_vec();
        for _ in 0..6 {
            let logits = logits(&model, &batch(&so_far, &vec![-100; so_far.len()])).to_vec().unwrap();
            so_far.push(argmax(&logits[logits.len() - 64..]));
        }
        assert_eq!(so_far[9..], ids(&expected[projector]["greedy"]), "{projector}");
    }
}

/// What a method trains: the checkpoint's names, or those of the adapters added here.
fn prepare(model: &mut Llava, method: &str) -> Vec<usize> {
    let mut trained: Vec<String> = Vec::new();
    if method == "lora" {
        let Llava { language, parameters, .. } = model;
        let mut number = 0;
        for (index, layer) in language.layers_mut().iter_mut().enumerate() {
            for (name, linear) in layer.linears_mut() {
                let path = format!("language_model.model.layers.{index}.{name}");
                let shape = parameters.get(linear.weight).value.shape().to_vec();
                let mut add = |part: &str, number: u32, shape: [usize; 2]| {
                    let values = hash_values(number, shape[0] * shape[1], 0.2, 0.0);
                    trained.push(format!("{path}.{part}"));
                    parameters.insert(format!("{path}.{part}"), Tensor::from_f32(gpu(), &values, &shape))
                };
                let a = add("lora_A", 2000 + 2 * number, [2, shape[1]]);
                let b = add("lora_B", 2001 + 2 * number, [shape[0], 2]);
                linear.lora = Some(Lora { a, b, scale: 2.0, dropout: 0.0, stream: number, bias: None, dora: None });
                number += 1;
            }
        }
    }
    let all = model.parameters.iter().map(|parameter| parameter.name.clone());
    trained.extend(all.filter(|name| {
        name.starts_with("multi_modal_projector.") || (method == "full" && name.starts_with("language_model."))
    }));
    let places: Vec<usize> = trained.iter().map(|name| model.parameters.find(name).unwrap()).collect();
    for &id in &places {
        let value = model.parameters.get(id).value.clone();
        let grad = elementwise::zeros(gpu(), value.shape());
        model.parameters.place(id, value, Some(grad));
    }
    places
}

/// Forward and backward of the fixture's batch; the mean loss.
fn step(model: &Llava, batch: &PackedBatch) -> f64 {
    let (mut tape, pixels) = (Tape::recording(), pixels());
    let mut forward = Forward { tape: &mut tape, parameters: &model.parameters, dropout: None, before: None };
    let scale = 1.0 / batch.targets.len() as f32;
    let losses: Var = model.losses(&mut forward, batch, Pictures::Pixels(&[&pixels]), scale).unwrap().unwrap();
    let values = losses.value.to_vec().unwrap();
    let seed = elementwise::zeros(gpu(), losses.value.shape());
    tape.backward(&losses, seed);
    values.iter().map(|&x| f64::from(x)).sum::<f64>() / values.len() as f64
}

fn check_gradients(what: &str, model: &Llava, trained: &[usize], want: &Value) {
    let want = want.as_object().unwrap();
    assert_eq!(trained.len(), want.len(), "{what}: number of trained tensors");
    for &id in trained {
        let parameter = model.parameters.get(id);
        let figures = want.get(&parameter.name).unwrap_or_else(|| panic!("{what}: {} is not trained", parameter.name));
        let values = parameter.grad.as_ref().unwrap().to_vec().unwrap();
        let wanted = figures["norm"].as_f64().unwrap();
        let name = format!("{what}: gradient of {}", parameter.name);
        assert_close(&name, norm(&values), wanted, TOLERANCE, wanted);
        let largest = f64::from(values.iter().fold(0.0f32, |largest, x| largest.max(x.abs())));
        for (got, wanted) in values.iter().zip(numbers(&figures["first"])) {
            assert_close(&name, f64::from(*got), wanted, TOLERANCE, largest);
        }
    }
}

fn train(projector: &str, method: &str) {
    let expected = expected();
    let want = &expected[projector]["train"][method];
    let mut model = load(projector);
    let trained = prepare(&mut model, method);
    let batch = fixture_batch(&expected);
    let moments: Vec<[Tensor; 2]> = trained
        .iter()
        .map(|&id| [0, 1].map(|_| elementwise::zeros(gpu(), model.parameters.get(id).value.shape())))
        .collect();
    let square_sum = elementwise::zeros(gpu(), &[1]);
    for (index, wanted) in numbers(&want["losses"]).into_iter().enumerate() {
        let what = format!("{projector}, {method}, step {}", index + 1);
        let loss = step(&model, &batch);
        println!("{what}: loss {loss:.7}, wanted {wanted:.7}");
        assert_close(&what, loss, wanted, TOLERANCE, wanted);
        if index == 0 {
            check_gradients(&what, &model, &trained, &want["gradients"]);
        }
        let update = adamw::Step {
            learning_rate: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            max_norm: 0.0,
            gradient_scale: 1.0,
            t: index as u64 + 1,
        };
        elementwise::fill(&square_sum, 0.0);
        for &id in &trained {
            reduce::add_square_sum(model.parameters.get(id).grad.as_ref().unwrap(), &square_sum, 0);
        }
        if index == 0 && method == "full" {
            let wanted = expected[projector]["gradient_norm"].as_f64().unwrap();
            let got = f64::from(square_sum.to_vec().unwrap()[0]).sqrt();
            assert_close(&format!("{what}: norm of all gradients"), got, wanted, TOLERANCE, wanted);
        }
        for (&id, [first, second]) in trained.iter().zip(&moments) {
            let parameter = model.parameters.get(id);
            let grad = parameter.grad.as_ref().unwrap();
            adamw::step(adamw::Weights::Full(&parameter.value), grad, first, second, &square_sum, &update);
            elementwise::fill(grad, 0.0);
        }
    }
}

#[test]
fn training_the_projector() {
    ["mlp2x_gelu", "linear"].into_iter().for_each(|projector| train(projector, "projector"));
}

#[test]
fn training_language_model_and_projector() {
    ["mlp2x_gelu", "linear"].into_iter().for_each(|projector| train(projector, "full"));
}

#[test]
fn training_adapters_and_projector() {
    ["mlp2x_gelu", "linear"].into_iter().for_each(|projector| train(projector, "lora"));
}

#[test]
fn the_same_backward_twice_gives_the_same_bytes() {
    let batch = fixture_batch(&expected());
    let run = || {
        let mut model = load("mlp2x_gelu");
        let trained = prepare(&mut model, "full");
        step(&model, &batch);
        let grads = trained.iter().map(|&id| model.parameters.get(id).grad.as_ref().unwrap().to_vec().unwrap());
        grads.flatten().map(f32::to_bits).collect::<Vec<u32>>()
    };
    assert_eq!(run(), run());
}
