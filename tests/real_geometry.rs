//! The geometry of the 7B model: one decoder layer forward and backward over 643 tokens, and a CLIP ViT-L/14 at 336
//! pixels forward, with weights from a hash, against what PyTorch computes (tools/real_geometry.py).
//!
//! A run by hand, of about a quarter of an hour on a processor and 4 GB:
//! `cargo test --release --test real_geometry -- --ignored --nocapture --test-threads 1`

mod common;

use std::{collections::BTreeMap, time::Instant};

use common::{golden, hash_value, norm, numbers, open_gpu, read_json};
use rayon::prelude::*;
use serde_json::{Value, json};
use wgpu_llava::{
    autograd::Tape,
    gpu::Gpu,
    models::{
        clip::ClipVision,
        config::{FeatureSelect, ModelConfig},
        llama::Llama,
        names,
    },
    nn::{Forward, Parameters},
    ops::{elementwise, patch_embed},
    tensor::Tensor,
};

const TOKENS: usize = 643;
const HIDDEN: usize = 4096;
const INPUT: u32 = 1000;
const COTANGENT: u32 = 1001;
const PROJECTION: u32 = 2000;
/// Of a tensor's norm.
const TOLERANCE: f64 = 2e-5;
/// Of a single element's size together with the root mean square of all.
const ELEMENT_TOLERANCE: f64 = 2e-4;

fn hashed(number: u32, elements: usize, scale: f64, offset: f64) -> Vec<f32> {
    (0..elements).into_par_iter().map(|index| (offset + scale * hash_value(number, index)) as f32).collect()
}

/// A weight by its name's rule.
fn weight(number: u32, name: &str, shape: &[usize]) -> Vec<f32> {
    let (scale, offset) = if name.ends_with(".bias") {
        (0.05, 0.0)
    } else if name.contains("class_embedding") || name.contains("position_embedding") {
        (0.2, 0.0)
    } else if shape.len() == 1 {
        (0.1, 1.0)
    } else {
        ((3.0 / shape[1..].iter().product::<usize>() as f64).sqrt(), 0.0)
    };
    hashed(number, shape.iter().product(), scale, offset)
}

/// The config of LLaVA-1.5-7B with a decoder of one layer and hardly any words.
fn config() -> ModelConfig {
    let config = json!({
        "model_type": "llava", "image_token_index": 3,
        "text_config": {
            "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": 11008, "num_hidden_layers": 1,
            "num_attention_heads": 32, "vocab_size": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
        },
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
            "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
        },
    });
    ModelConfig::parse("config.json", config.to_string().as_bytes()).unwrap()
}

/// Norm, projection on hashed noise, and 16 elements; prints the largest distances before it fails.
fn compare(name: &str, tensor: &Tensor, want: &Value) -> Result<(), String> {
    let values = tensor.to_vec().unwrap();
    let shape: usize = numbers(&want["shape"]).iter().map(|&x| x as usize).product();
    assert_eq!(values.len(), shape, "{name}: number of elements");
    let wanted_norm = want["norm"].as_f64().unwrap();
    let far_norm = (norm(&values) - wanted_norm).abs() / wanted_norm;
    // Added in blocks of fixed size, so that the figure does not depend on the number of threads.
    let blocks: Vec<f64> = values
        .par_chunks(1 << 16)
        .enumerate()
        .map(|(block, part)| {
            let first = block << 16;
            part.iter().enumerate().map(|(at, &x)| f64::from(x) * hash_value(PROJECTION, first + at)).sum()
        })
        .collect();
    let far_projection = (blocks.iter().sum::<f64>() - want["projection"].as_f64().unwrap()).abs() / wanted_norm;
    let typical = wanted_norm / (values.len() as f64).sqrt();
    let places = (0..16).map(|j| (values.len() - 1) * j / 15);
    let far_element = places
        .zip(numbers(&want["at"]))
        .map(|(place, wanted)| (f64::from(values[place]) - wanted).abs() / (typical + wanted.abs()))
        .fold(0.0, f64::max);
    println!("{name:48} norm {far_norm:.1e}  projection {far_projection:.1e}  elements {far_element:.1e}");
    let far = far_norm > TOLERANCE || far_projection > TOLERANCE || far_element > ELEMENT_TOLERANCE;
    if far || far_norm.is_nan() { Err(format!("{name} is too far off")) } else { Ok(()) }
}

fn finish(failures: Vec<String>, start: Instant, gpu: &Gpu) {
    println!("{:.0} s, {} MB on {}", start.elapsed().as_secs_f64(), gpu.device_bytes() >> 20, gpu.facts().name);
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
#[ignore = "minutes on a processor"]
fn one_decoder_layer_of_7b() {
    let (gpu, start) = (open_gpu(), Instant::now());
    let want = &read_json(&golden("real_geometry.json"))["decoder_layer"];
    let config = config();
    let shapes: BTreeMap<String, Vec<usize>> = names::language_tensors(config.text()).into_iter().collect();
    let prefix = "language_model.model.layers.0.";
    let numbered: BTreeMap<&str, u32> = shapes.keys().filter_map(|name| name.strip_prefix(prefix)).zip(0..).collect();
    assert_eq!(numbered.len(), 9);
    let mut parameters = Parameters::default();
    let mut load = |name: &str| {
        let shape = &shapes[name];
        let short = name.strip_prefix(prefix);
        // Embedding and last norm are there, but not in the way.
        let values =
            short.map_or_else(|| vec![0.0; shape.iter().product()], |short| weight(numbered[short], short, shape));
        let id = parameters.insert(name, Tensor::from_f32(&gpu, &values, shape));
        if short.is_some() {
            let value = parameters.get(id).value.clone();
            let grad = elementwise::zeros(&gpu, shape);
            parameters.place(id, value, Some(grad));
        }
        Ok(id)
    };
    let language = Llama::new(config.text(), &mut load).unwrap();
    println!("weights: {:.0} s", start.elapsed().as_secs_f64());

    let mut tape = Tape::recording();
    let x = tape.leaf(Tensor::from_f32(&gpu, &hashed(INPUT, TOKENS * HIDDEN, 1.0, 0.0), &[TOKENS, HIDDEN]));
    let mut forward = Forward { tape: &mut tape, parameters: &parameters, dropout: None, before: None };
    let output = language.decoder_layer(&mut forward, 0, x.clone(), &language.packed(&gpu, &[TOKENS]));
    let mut failures = Vec::new();
    failures.extend(compare("output", &output.value, &want["output"]).err());
    println!("forward: {:.0} s", start.elapsed().as_secs_f64());
    let cotangent = Tensor::from_f32(&gpu, &hashed(COTANGENT, TOKENS * HIDDEN, 1.0, 0.0), &[TOKENS, HIDDEN]);
    let gradients = tape.backward(&output, cotangent);
    failures.extend(compare("input_gradient", gradients.of(&x).unwrap(), &want["input_gradient"]).err());
    println!("backward: {:.0} s", start.elapsed().as_secs_f64());
    for name in numbered.keys() {
        let id = parameters.find(&format!("{prefix}{name}")).unwrap();
        let key = format!("gradient.{name}");
        failures.extend(compare(&key, parameters.get(id).grad.as_ref().unwrap(), &want[&key]).err());
    }
    finish(failures, start, &gpu);
}

#[test]
#[ignore = "minutes on a processor"]
fn clip_vit_large_at_336_pixels() {
    let (gpu, start) = (open_gpu(), Instant::now());
    let want = &read_json(&golden("real_geometry.json"))["vision_tower"];
    let config = config();
    let vision = &config.llava().unwrap().vision_config;
    let prefix = "vision_tower.vision_model.";
    let all = names::expected_tensors(&config).into_iter().chain(names::unused_vision_tensors(&config));
    let shapes: BTreeMap<String, Vec<usize>> = all.filter(|(name, _)| name.starts_with(prefix)).collect();
    assert_eq!(shapes.len(), 391);
    let numbered: BTreeMap<&str, u32> = shapes.keys().map(|name| &name[prefix.len()..]).zip(0..).collect();
    let mut parameters = Parameters::default();
    let pixels = hashed(INPUT, 3 * 336 * 336, 2.0, 0.0);
    let patches = patch_embed::patchify(&pixels, 336, 14);
    let patches = Tensor::from_f32(&gpu, &patches, &[vision.num_patches(), 3 * 14 * 14]);

    let mut failures = Vec::new();
    for layers in [0, 1, 23, 12] {
        if layers == 12 && failures.is_empty() {
            continue; // Its figures only help to find where an error begins.
        }
        let mut load = |name: &str| {
            if let Some(id) = parameters.find(name) {
                return Ok(id);
            }
            let (shape, short) = (&shapes[name], &name[prefix.len()..]);
            let values = weight(numbered[short], short, shape);
            let matrix = if shape.len() > 2 { vec![shape[0], shape[1..].iter().product()] } else { shape.clone() };
            Ok(parameters.insert(name, Tensor::from_f32(&gpu, &values, &matrix)))
        };
        let tower = ClipVision::new(vision, layers, FeatureSelect::Full, &mut load).unwrap();
        let mut tape = Tape::silent();
        let mut forward = Forward { tape: &mut tape, parameters: &parameters, dropout: None, before: None };
        let state = tower.forward(&mut forward, &patches);
        let key = format!("hidden_state.{layers}");
        failures.extend(compare(&key, &state.value, &want[&key]).err());
        println!("after {layers} layers: {:.0} s", start.elapsed().as_secs_f64());
    }
    finish(failures, start, &gpu);
}
