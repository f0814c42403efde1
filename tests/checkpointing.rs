//! Every mode of gradient checkpointing gives the bytes that none gives: losses and gradients of decoders of many
//! kinds, and whole runs of the program.

mod common;

use std::{collections::BTreeMap, fs};

use common::{golden, open_gpu, read_lines, run};
use serde_json::{Value, json};
use wgpu_llava::{
    autograd::{Checkpointing, Checkpoints, Tape, functions},
    gpu::{AdapterOptions, Gpu},
    models::{config::ModelConfig, llama::Llama, names},
    nn::{Forward, Lora, Parameters},
    ops::{Random, cast::cast, elementwise},
    tensor::{Dtype, Tensor},
};

const MODES: [Checkpointing; 4] =
    [Checkpointing::None, Checkpointing::Selective, Checkpointing::Full, Checkpointing::Offload];

/// What trains.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Method {
    Full,
    /// With this dropout, and whether the embeddings' gradient is wanted too.
    Lora(f64, bool),
}

fn config(changes: Value) -> ModelConfig {
    let mut json = json!({
        "model_type": "llama", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 29, "rms_norm_eps": 1e-5,
    });
    json.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    ModelConfig::parse("config.json", json.to_string().as_bytes()).unwrap()
}

/// The bytes of the losses and of every gradient of one step over packed sequences.
fn step(gpu: &Gpu, config: &ModelConfig, method: Method, checkpoints: Checkpoints) -> BTreeMap<String, Vec<u8>> {
    let shapes: BTreeMap<String, Vec<usize>> = names::language_tensors(config.text()).into_iter().collect();
    let mut random = Random::new(11);
    let mut parameters = Parameters::default();
    let mut load = |name: &str| {
        let shape = &shapes[name];
        let norm = name.ends_with("norm.weight") || name.ends_with("layernorm.weight");
        let values = random.values(shape.iter().product());
        let values: Vec<f32> = values.iter().map(|x| if norm { 1.0 + 0.1 * x } else { 0.4 * x }).collect();
        Ok(parameters.insert(name, Tensor::from_f32(gpu, &values, shape)))
    };
    let mut language = Llama::new(config.text(), &mut load).unwrap();
    language.set_checkpoints(checkpoints);
    let mut trained = Vec::new();
    match method {
        Method::Full => trained.extend(shapes.keys().filter_map(|name| parameters.find(name))),
        Method::Lora(dropout, embeddings) => {
            for (index, layer) in language.layers_mut().iter_mut().enumerate() {
                for (number, (name, linear)) in layer.linears_mut().into_iter().enumerate() {
                    let [n, k] = parameters.get(linear.weight).value.shape()[..] else { panic!("a matrix") };
                    let mut matrix = |what: &str, shape: [usize; 2]| {
                        let values = random.values(shape[0] * shape[1]);
                        let id =
                            parameters.insert(format!("{index}.{name}.{what}"), Tensor::from_f32(gpu, &values, &shape));
                        trained.push(id);
                        id
                    };
                    let (a, b, stream) = (matrix("a", [3, k]), matrix("b", [n, 3]), (7 * index + number) as u32);
                    linear.lora = Some(Lora { a, b, scale: 0.5, dropout, stream, bias: None, dora: None });
                }
            }
            trained.extend(parameters.find(names::EMBED_TOKENS).filter(|_| embeddings));
        }
    }
    for &id in &trained {
        let value = parameters.get(id).value.clone();
        let grad = elementwise::zeros(gpu, value.shape());
        parameters.place(id, value, Some(grad));
    }

    // Sequences that share workgroups, and one longer than the kernels' blocks.
    let lengths = [5, 1, 70];
    let ids = Random::new(12).indices(76, 29);
    let rows: Vec<u32> = vec![0, 3, 40, 41, 74];
    let mut tape = Tape::recording();
    let mut forward = Forward { tape: &mut tape, parameters: &parameters, dropout: Some((7, 3)), before: None };
    let x = language.embed(&mut forward, &ids);
    let hidden = language.forward(&mut forward, x, &|gpu| language.packed(gpu, &lengths));
    let picked = functions::pick_rows(forward.tape, &hidden, &Tensor::from_u32(gpu, &rows, &[rows.len()]));
    drop(hidden);
    let head = forward.parameters.weight(language.lm_head());
    let losses = functions::head_loss(forward.tape, &picked, &head, &[1, 2, 3, 4, 5], 0.2);
    tape.backward(&losses, losses.value.clone());
    let mut found = BTreeMap::from([("losses".to_string(), losses.value.to_bytes().unwrap())]);
    for id in trained {
        let parameter = parameters.get(id);
        found.insert(parameter.name.clone(), parameter.grad.as_ref().unwrap().to_bytes().unwrap());
    }
    found
}

fn compare(gpu: &Gpu, changes: &Value, method: Method, dtype: Dtype) {
    let config = config(changes.clone());
    let [want, others @ ..] = MODES.map(|mode| step(gpu, &config, method, Checkpoints { mode, dtype }));
    for (name, gradient) in &want {
        assert!(gradient.iter().any(|&byte| byte != 0), "{changes} {method:?}: {name} is all zeros");
    }
    for (mode, got) in MODES[1..].iter().zip(&others) {
        let different: Vec<_> = want.keys().filter(|name| got[*name] != want[*name]).collect();
        assert!(different.is_empty(), "{changes} {method:?} {dtype:?} {mode:?}: {different:?}");
    }
}

#[test]
fn gradients_of_every_mode_are_the_same_bytes() {
    let gpu = open_gpu();
    let kinds = [
        json!({}),
        json!({ "num_key_value_heads": 2, "tie_word_embeddings": true }),
        json!({ "model_type": "mistral", "sliding_window": 9, "num_key_value_heads": 1 }),
        // Queries, keys and values with biases.
        json!({ "model_type": "qwen2", "hidden_size": 40, "intermediate_size": 33 }),
        // Heads as wide as the kernels for GPUs and processors do not share.
        json!({ "head_dim": 70, "num_attention_heads": 2, "num_key_value_heads": 1 }),
    ];
    for changes in &kinds {
        for method in [Method::Full, Method::Lora(0.0, false), Method::Lora(0.3, false), Method::Lora(0.3, true)] {
            compare(&gpu, changes, method, Dtype::F32);
        }
        compare(&gpu, changes, Method::Full, Dtype::Bf16);
        compare(&gpu, changes, Method::Lora(0.3, true), Dtype::F16);
    }
}

#[test]
fn so_are_they_with_the_kernels_of_gpus() {
    let gpu = Gpu::open(&AdapterOptions { treat_as_gpu: true, ..Default::default() }).unwrap();
    let changes = json!({ "num_key_value_heads": 2, "tie_word_embeddings": true });
    compare(&gpu, &changes, Method::Full, Dtype::F32);
    compare(&gpu, &changes, Method::Lora(0.3, false), Dtype::Bf16);
}

/// Rounded inputs are others than unrounded ones, or the comparison above would say little.
#[test]
fn a_16_bit_precision_rounds_the_inputs_of_layers() {
    let (gpu, config) = (open_gpu(), config(json!({})));
    let losses = |dtype| {
        let checkpoints = Checkpoints { mode: Checkpointing::None, dtype };
        Dtype::F32.widen(&step(&gpu, &config, Method::Full, checkpoints)["losses"])
    };
    let (exact, rounded) = (losses(Dtype::F32), losses(Dtype::Bf16));
    assert_ne!(exact, rounded);
    for (exact, rounded) in exact.iter().zip(&rounded) {
        assert!((exact - rounded).abs() < 0.02 * exact.abs(), "{exact} and {rounded}");
    }
}

/// What a run of three steps says of each, and the weights that it leaves.
fn trained(case: &str, name: &str, set: &[&str], mode: &str) -> (Vec<Vec<Value>>, Vec<u8>) {
    let out = tempfile::tempdir().unwrap();
    let dir = out.path().join("run");
    let config = golden("parity").join(case).join(format!("{name}.toml"));
    let mode = format!("gradient_checkpointing={mode}");
    let mut arguments = vec!["train", config.to_str().unwrap(), "--output-dir", dir.to_str().unwrap(), "--quiet"];
    let all = [&["max_steps=3", "per_device_train_batch_size=2", &mode], set].concat();
    arguments.extend(all.iter().flat_map(|set| ["--set", *set]));
    run(arguments);
    let steps = read_lines(&dir.join("metrics.jsonl"));
    let steps = steps.iter().map(|line| ["loss", "grad_norm"].map(|key| line[key].clone()).to_vec()).collect();
    let file = |name: &str| fs::read(dir.join(name)).ok();
    (steps, file("adapter/adapter_model.safetensors").or_else(|| file("model/model.safetensors")).unwrap())
}

#[test]
fn runs_of_every_mode_leave_the_same_bytes() {
    let runs: [(&str, &str, &[&str]); 6] = [
        // Nothing trains in the decoder, and gradients pass through it.
        ("mha_untied_linear", "projector", &[]),
        ("mha_untied_linear", "lora", &["lora_dropout=0.1"]),
        ("mha_untied_linear", "lora", &["lora_dropout=0.1", "precision=bfloat16"]),
        // The tower trains too; groups of queries; the head is the embeddings.
        ("gqa_tied_mlp_vision", "full_vision", &[]),
        ("gqa_tied_mlp_vision", "lora", &["unfreeze_mm_vision_tower=true", "precision=float16"]),
        ("mistral_window", "full", &[]),
    ];
    for (case, name, set) in runs {
        let want = trained(case, name, set, "none");
        for mode in ["selective", "full", "offload"] {
            let got = trained(case, name, set, mode);
            assert_eq!(got.0, want.0, "{case} {name} {set:?} {mode}");
            assert!(got.1 == want.1, "{case} {name} {set:?} {mode}: other weights");
        }
    }
}

/// More at once than the buffers between device and host hold, in pieces that these cut, odd counts of 16 bits too.
#[test]
fn tensors_come_back_from_the_host_as_they_went() {
    let gpu = open_gpu();
    let sizes = [(9 << 20) + 4, 1, 77, 5 << 20, (4 << 20) + 1, 300];
    let tensors: Vec<(Vec<f32>, Tensor)> =
        sizes.iter().map(|&size| Random::new(size as u64).tensor(&gpu, &[size])).collect();
    let half = cast(&tensors[2].1, Dtype::Bf16);
    let want = half.to_bytes().unwrap();
    let sent: Vec<_> = tensors.iter().map(|(_, tensor)| tensor.offload()).collect();
    let sent_half = half.offload();
    // What is written there afterwards does not reach what has been sent.
    tensors.iter().for_each(|(_, tensor)| elementwise::fill(tensor, 0.0));
    assert_eq!(sent_half.restore().to_bytes().unwrap(), want);
    for ((values, _), sent) in tensors.iter().zip(sent).rev() {
        let tensor = sent.restore();
        assert!(tensor.shape() == [values.len()] && tensor.to_vec().unwrap() == *values, "{} elements", values.len());
    }
}
