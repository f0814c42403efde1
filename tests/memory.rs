//! The peak of a pass's memory as the device's pool counts it, against what `models::memory` says beforehand.
//! `-- --nocapture` prints the table; `-- --ignored` adds a larger decoder.

mod common;

use std::{collections::BTreeMap, sync::Mutex};

use common::golden;
use serde_json::json;
use wgpu_llava::{
    autograd::{Checkpointing, Checkpoints, Tape, functions},
    data::IMAGE_TOKEN_INDEX,
    formats::model_folder::ModelFolder,
    gpu::{AdapterOptions, Gpu},
    models::{
        batch::PackedBatch,
        clip::ClipVision,
        config::{ClipVisionConfig, FeatureSelect, LlamaConfig, ModelConfig},
        llama::Llama,
        llava::{Llava, Pictures},
        memory::{Adapters, DecoderPass, Features, LlavaPass, TowerPass, Tuning},
        names,
    },
    nn::{Forward, Lora, Parameters},
    ops::{Random, elementwise},
    tensor::{Dtype, Tensor},
};

const MODES: [Checkpointing; 4] =
    [Checkpointing::None, Checkpointing::Selective, Checkpointing::Full, Checkpointing::Offload];
/// Between what is told and what is measured.
const TOLERANCE: f64 = 0.05;

/// One at a time: peaks of a device are counted for all who use it.
static ALONE: Mutex<()> = Mutex::new(());

fn open_gpu() -> Gpu {
    Gpu::open(&AdapterOptions::default()).expect("an adapter")
}

fn decoder(changes: serde_json::Value) -> LlamaConfig {
    let mut json = json!({ "model_type": "llama", "rms_norm_eps": 1e-5 });
    json.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    ModelConfig::parse("config.json", json.to_string().as_bytes()).unwrap().text().clone()
}

/// Parameters with random values and, where `trains` says so, room for their gradients.
fn fill(gpu: &Gpu, shapes: &[(String, Vec<usize>)], trains: bool) -> Parameters {
    let mut parameters = Parameters::default();
    for (name, shape) in shapes {
        let matrix = if shape.len() > 2 { vec![shape[0], shape[1..].iter().product()] } else { shape.clone() };
        let values = Random::new(1).values(matrix.iter().product());
        let values: Vec<f32> = values.iter().map(|x| 0.1 * x).collect();
        let value = Tensor::from_f32(gpu, &values, &matrix);
        let id = parameters.insert(name.as_str(), value.clone());
        parameters.place(id, value, trains.then(|| elementwise::zeros(gpu, &matrix)));
    }
    parameters
}

/// The bytes that a pass took beside what was there before it.
fn measured(gpu: &Gpu, pass: impl FnOnce()) -> u64 {
    gpu.sync().unwrap();
    gpu.begin_peak();
    let before = gpu.peak_bytes();
    pass();
    gpu.sync().unwrap();
    gpu.peak_bytes() - before
}

fn check(what: &str, told: u64, measured: u64) {
    let error = told as f64 / measured as f64 - 1.0;
    println!("{what:<60} told {told:>12}  measured {measured:>12}  {:+.2} %", error * 100.0);
    assert!(error.abs() <= TOLERANCE, "{what}: {told} bytes told, {measured} measured");
}

fn run(
    gpu: &Gpu,
    config: &LlamaConfig,
    tuning: Tuning<'_>,
    checkpoints: Checkpoints,
    lengths: &[usize],
    targets: usize,
) {
    let shapes = names::language_tensors(config);
    let mut parameters = fill(gpu, &shapes, matches!(tuning, Tuning::Full));
    let mut language =
        Llama::new(config, &mut |name| Ok(parameters.find(name).expect("a tensor of the decoder"))).unwrap();
    language.set_checkpoints(checkpoints);
    if let Tuning::Lora(adapters) = tuning {
        for layer in language.layers_mut() {
            for (name, linear) in layer.linears_mut().into_iter().filter(|(name, _)| (adapters.on)(name)) {
                let [n, k] = parameters.get(linear.weight).value.shape()[..] else { panic!("{name} is a matrix") };
                let mut matrix = |shape: [usize; 2]| {
                    let value = elementwise::zeros(gpu, &shape);
                    let id = parameters.insert("an adapter", value.clone());
                    parameters.place(id, value, Some(elementwise::zeros(gpu, &shape)));
                    id
                };
                let (a, b) = (matrix([adapters.r, k]), matrix([n, adapters.r]));
                let dropout = if adapters.dropout { 0.1 } else { 0.0 };
                linear.lora = Some(Lora { a, b, scale: 1.0, dropout, stream: 0, bias: None, dora: None });
            }
        }
    }
    let (tokens, longest) = (lengths.iter().sum::<usize>(), lengths.iter().copied().max().unwrap_or(0));
    let ids = Random::new(2).indices(tokens, config.vocab_size);
    let rows: Vec<u32> = (0..targets).map(|row| (row * tokens / targets) as u32).collect();
    let told = DecoderPass {
        config,
        tuning,
        checkpoints,
        embeddings_train: matches!(tuning, Tuning::Full),
        tokens,
        longest,
        targets,
    };
    let peak = measured(gpu, || {
        let mut tape = Tape::recording();
        let mut forward = Forward { tape: &mut tape, parameters: &parameters, dropout: Some((1, 1)), before: None };
        let x = language.embed(&mut forward, &ids);
        let hidden = language.forward(&mut forward, x, &|gpu| language.packed(gpu, lengths));
        let picked = functions::pick_rows(forward.tape, &hidden, &Tensor::from_u32(gpu, &rows, &[targets]));
        drop(hidden);
        let head = forward.parameters.weight(language.lm_head());
        let losses = functions::head_loss(forward.tape, &picked, &head, &ids[..targets], 1.0);
        drop(picked);
        tape.backward(&losses, losses.value.clone());
    });
    let what = match tuning {
        Tuning::Frozen => "frozen".to_owned(),
        Tuning::Full => "full".to_owned(),
        Tuning::Lora(adapters) => format!("lora r {}{}", adapters.r, if adapters.dropout { ", dropout" } else { "" }),
    };
    let Checkpoints { mode, dtype } = checkpoints;
    let kind = format!("{} x {} T {tokens} {what} {mode:?} {dtype:?}", config.hidden_size, config.num_hidden_layers);
    check(&kind, told.peak(), peak);
}

#[test]
fn decoders() {
    let _alone = ALONE.lock();
    let gpu = open_gpu();
    let wide = decoder(json!({
        "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4, "num_attention_heads": 4,
        "vocab_size": 96,
    }));
    let grouped = decoder(json!({
        "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "vocab_size": 600, "tie_word_embeddings": true,
    }));
    let everywhere = |_: &str| true;
    let two = |name: &str| name.ends_with("q_proj") || name.ends_with("down_proj");
    let adapters = Adapters { r: 8, dropout: false, dora: false, on: &everywhere };
    let tunings = [
        Tuning::Full,
        Tuning::Lora(adapters),
        Tuning::Lora(Adapters { dropout: true, ..adapters }),
        Tuning::Lora(Adapters { r: 16, on: &two, ..adapters }),
    ];
    for mode in MODES {
        for tuning in tunings {
            run(&gpu, &wide, tuning, Checkpoints { mode, dtype: Dtype::F32 }, &[80, 56], 60);
            run(&gpu, &grouped, tuning, Checkpoints { mode, dtype: Dtype::Bf16 }, &[150], 150);
        }
    }
}

#[test]
#[ignore = "a measurement"]
fn a_larger_decoder() {
    let _alone = ALONE.lock();
    let gpu = open_gpu();
    let config = decoder(json!({
        "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 8,
        "vocab_size": 2000,
    }));
    let on = |_: &str| true;
    for dtype in [Dtype::F32, Dtype::Bf16] {
        for mode in MODES {
            let adapters = Adapters { r: 16, dropout: false, dora: false, on: &on };
            run(&gpu, &config, Tuning::Lora(adapters), Checkpoints { mode, dtype }, &[1024], 300);
            println!("    held by the pool and what was in use at most: {} {}", gpu.device_bytes(), gpu.peak_bytes());
        }
    }
}

#[test]
fn towers_that_train() {
    let _alone = ALONE.lock();
    let gpu = open_gpu();
    for (hidden_size, intermediate_size, layers) in [(48, 192, 4), (64, 96, 3)] {
        let config = ClipVisionConfig {
            hidden_size,
            intermediate_size,
            num_hidden_layers: layers,
            num_attention_heads: 4,
            num_channels: 3,
            image_size: 64,
            patch_size: 8,
            layer_norm_eps: 1e-5,
            raw: Default::default(),
        };
        let mut shapes = BTreeMap::new();
        let mut list = |name: &str| {
            let (d, f) = (hidden_size, intermediate_size);
            let shape = match name.rsplit('.').take(2).collect::<Vec<_>>()[..] {
                ["weight", "position_embedding"] => vec![65, d],
                ["weight", "patch_embedding"] => vec![d, 3 * 64],
                ["weight", "fc1"] => vec![f, d],
                ["weight", "fc2"] => vec![d, f],
                ["bias", "fc1"] => vec![f],
                ["weight", name] if name.ends_with("proj") => vec![d, d],
                _ => vec![d],
            };
            shapes.insert(name.to_owned(), shape);
            Ok(0)
        };
        ClipVision::new(&config, layers, FeatureSelect::Default, &mut list).unwrap();
        let parameters = fill(&gpu, &shapes.into_iter().collect::<Vec<_>>(), true);
        for mode in MODES {
            for dtype in [Dtype::F32, Dtype::F16] {
                let checkpoints = Checkpoints { mode, dtype };
                let mut load = |name: &str| Ok(parameters.find(name).expect("listed"));
                let mut tower = ClipVision::new(&config, layers, FeatureSelect::Default, &mut load).unwrap();
                tower.set_checkpoints(checkpoints);
                let pictures = 3;
                let told = TowerPass { config: &config, layers, checkpoints, pictures };
                let peak = measured(&gpu, || {
                    let mut tape = Tape::recording();
                    let patches = Random::new(3).tensor(&gpu, &[pictures * 64, 3 * 64]).1;
                    let mut forward = Forward { tape: &mut tape, parameters: &parameters, dropout: None, before: None };
                    let features = tower.forward(&mut forward, &patches);
                    drop(patches);
                    let cotangent = Random::new(4).tensor(&gpu, features.value.shape()).1;
                    let root = features.node();
                    drop(features);
                    tape.backward(root, cotangent);
                });
                let what = format!("tower {hidden_size} x {layers} {mode:?} {dtype:?}");
                check(&what, told.kept() + told.working_set(), peak);
            }
        }
    }
}

#[test]
fn a_whole_llava() {
    let _alone = ALONE.lock();
    let gpu = open_gpu();
    let folder = ModelFolder::open(&golden("parity/gqa_tied_mlp_vision/model")).unwrap();
    for mode in MODES {
        for tower_trains in [false, true] {
            let mut model = Llava::load(&gpu, &folder).unwrap();
            let checkpoints = Checkpoints { mode, dtype: Dtype::F32 };
            model.set_checkpoints(checkpoints);
            let names: Vec<String> = model.parameters.iter().map(|parameter| parameter.name.clone()).collect();
            for name in names.iter().filter(|name| tower_trains || !name.starts_with(names::VISION_TOWER)) {
                let id = model.parameters.find(name).unwrap();
                let value = model.parameters.get(id).value.clone();
                let grad = elementwise::zeros(&gpu, value.shape());
                model.parameters.place(id, value, Some(grad));
            }
            let config = model.config.llava().unwrap().clone();
            let pixels = vec![0.5; 3 * config.vision_config.image_size.pow(2)];
            let pictures: Vec<&[f32]> = vec![&pixels; 6];
            let mut batch = PackedBatch::default();
            for _ in &pictures {
                let mut tokens = vec![3; 40];
                tokens[1] = IMAGE_TOKEN_INDEX;
                batch.push(&tokens, &[5; 40], config.image_seq_length());
            }
            let tower = TowerPass {
                config: &config.vision_config,
                layers: config.vision_layers_used(),
                checkpoints,
                pictures: pictures.len(),
            };
            let decoder = DecoderPass {
                config: &config.text_config,
                tuning: Tuning::Full,
                checkpoints,
                embeddings_train: true,
                tokens: batch.tokens(),
                longest: batch.lengths[0],
                targets: batch.targets.len(),
            };
            let features = if tower_trains { Features::Trained(tower) } else { Features::Frozen(tower) };
            let told =
                LlavaPass { config: &config, decoder, features, projector_trains: true, pictures: pictures.len() };
            let peak = measured(&gpu, || {
                let mut tape = Tape::recording();
                let mut forward =
                    Forward { tape: &mut tape, parameters: &model.parameters, dropout: None, before: None };
                let losses = model.losses(&mut forward, &batch, Pictures::Pixels(&pictures), 1.0).unwrap().unwrap();
                tape.backward(&losses, losses.value.clone());
            });
            check(&format!("LLaVA, tower trains: {tower_trains}, {mode:?}"), told.peak(), peak);
        }
    }
}

/// The published sizes at 2048 tokens, one sequence, an adapter of rank 64 on every linear.
#[test]
fn what_decoders_of_the_published_sizes_take() {
    let sizes = [("7B", 4096, 11008, 32, 32), ("13B", 5120, 13824, 40, 40), ("65B", 8192, 22016, 80, 64)];
    for (name, hidden_size, inner, layers, heads) in sizes {
        let config = decoder(json!({
            "hidden_size": hidden_size, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "vocab_size": 32000,
        }));
        let on = |_: &str| true;
        let tuning = Tuning::Lora(Adapters { r: 64, dropout: true, dora: false, on: &on });
        let mut before = u64::MAX;
        for mode in MODES {
            let checkpoints = Checkpoints { mode, dtype: Dtype::Bf16 };
            let (embeddings_train, tokens, longest, targets) = (true, 2048, 2048, 1024);
            let pass = DecoderPass { config: &config, tuning, checkpoints, embeddings_train, tokens, longest, targets };
            let gb = |bytes: u64| bytes as f64 / 1e9;
            println!(
                "{name:>4} {mode:?}: {:.3} GB a layer, {:.2} GB at work, {:.2} GB at the head, {:.2} GB in all",
                gb(pass.kept_per_layer()),
                gb(pass.working_set()),
                gb(pass.head()),
                gb(pass.peak())
            );
            if mode == Checkpointing::Full {
                // Two bytes an element.
                assert_eq!(pass.kept_per_layer(), 2 * 2048 * hidden_size);
            }
            assert!(pass.peak() < before, "{name} {mode:?}: no less than the mode before");
            before = pass.peak();
        }
    }
}
