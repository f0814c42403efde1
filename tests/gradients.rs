//! Gradients of every function on the tape, against central differences of its forward.
//!
//! With y = f(x) and a random c, L = sum(y c) is differentiated at x along a direction d: what the tape says is
//! <dL/dx, d>. d leans on the gradient itself, so that the derivative is not small by chance, and on noise, so that a
//! gradient with something too much is seen as well.

mod common;

use std::sync::OnceLock;

use common::open_gpu;
use wgpu_llava::{
    autograd::{
        Tape, Var, Weight,
        functions::{self, DoraWeights, DropoutKey, LoraWeights},
    },
    gpu::Gpu,
    models::{
        clip::ClipVision,
        config::{ClipVisionConfig, FeatureSelect},
    },
    nn::{Forward, Parameters},
    ops::{
        Random,
        activation::Activation,
        attention::{Heads, Mask, Ranges},
        elementwise, rope,
    },
    tensor::Tensor,
};

/// Of the derivative.
const TOLERANCE: f64 = 1e-2;
/// Length of a step in the space of all inputs.
const EPSILON: f64 = 2e-2;
/// What gradients hold before the backward, which must add to them.
const BEFORE: f32 = 0.5;

fn gpu() -> &'static Gpu {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    GPU.get_or_init(open_gpu)
}

/// One input: `Leaf` arrives as a `Var`, `Weight` as a `Weight` that trains.
#[derive(Clone, Copy)]
enum Input<'a> {
    Leaf(&'a [usize]),
    Weight(&'a [usize]),
}

use Input::{Leaf, Weight as Trained};

type Function<'f> = &'f dyn Fn(&mut Tape, &[Var], &[Weight]) -> Var;

struct Case<'a> {
    inputs: &'a [Input<'a>],
    values: Vec<Vec<f32>>,
    /// The c of L; `None`: random.
    cotangent: Option<f32>,
    function: Function<'a>,
}

impl Case<'_> {
    /// Output and, when asked for, the gradients of all inputs.
    fn run(&self, values: &[Vec<f32>], cotangent: Option<&[f32]>) -> (Vec<f32>, Vec<Vec<f32>>) {
        let mut tape = if cotangent.is_some() { Tape::recording() } else { Tape::silent() };
        let (mut leaves, mut weights) = (Vec::new(), Vec::new());
        for (input, values) in self.inputs.iter().zip(values) {
            match input {
                Leaf(shape) => leaves.push(tape.leaf(Tensor::from_f32(gpu(), values, shape))),
                Trained(shape) => {
                    let grad = Tensor::empty(gpu(), shape);
                    elementwise::fill(&grad, BEFORE);
                    weights.push(Weight { value: Tensor::from_f32(gpu(), values, shape), grad: Some(grad) });
                }
            }
        }
        let y = (self.function)(&mut tape, &leaves, &weights);
        let out = y.value.to_vec().unwrap();
        let Some(cotangent) = cotangent else { return (out, Vec::new()) };
        let seed = Tensor::from_f32(gpu(), cotangent, y.value.shape());
        let gradients = tape.backward(&y, seed);
        let (mut leaves, mut weights) = (leaves.iter(), weights.iter());
        let of_inputs = self.inputs.iter().map(|input| match input {
            Leaf(_) => gradients.of(leaves.next().unwrap()).expect("the leaf has a gradient").to_vec().unwrap(),
            Trained(_) => {
                let grad = weights.next().unwrap().grad.as_ref().unwrap().to_vec().unwrap();
                grad.iter().map(|x| x - BEFORE).collect()
            }
        });
        (out, of_inputs.collect())
    }

    fn moved(&self, direction: &[f64], by: f64) -> Vec<Vec<f32>> {
        let mut steps = direction.iter();
        let step = |&x: &f32, d: &f64| (f64::from(x) + by * d) as f32;
        self.values.iter().map(|values| values.iter().map(|x| step(x, steps.next().unwrap())).collect()).collect()
    }

    fn check(&self, name: &str) {
        let mut random = Random::new(name.bytes().map(u64::from).sum());
        let (y, _) = self.run(&self.values, None);
        let cotangent = match self.cotangent {
            Some(value) => vec![value; y.len()],
            None => random.values(y.len()),
        };
        let (recorded, gradients) = self.run(&self.values, Some(&cotangent));
        assert_eq!(recorded, y, "{name}: a recording tape computes something else");
        let (_, again) = self.run(&self.values, Some(&cotangent));
        let bits = |all: &[Vec<f32>]| all.concat().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&gradients), bits(&again), "{name}: the same backward gives other bytes");

        let loss = |values: &[Vec<f32>]| -> f64 {
            let (y, _) = self.run(values, None);
            y.iter().zip(&cotangent).map(|(&y, &c)| f64::from(y) * f64::from(c)).sum()
        };
        // All inputs together, then each alone: a large gradient must not hide a wrong small one.
        let sizes: Vec<usize> = self.values.iter().map(Vec::len).collect();
        let mut ranges: Vec<_> = std::iter::once(0..sizes.iter().sum::<usize>()).collect();
        let mut start = 0;
        ranges.extend(sizes.iter().map(|size| {
            start += size;
            start - size..start
        }));
        let gradient: Vec<f64> = gradients.concat().into_iter().map(f64::from).collect();
        // Some gradients are zero (a key's bias moves all scores of a query alike), where noise is all there is.
        let floor = (2e-4 * length(&gradient)).max(1e-3);
        for (index, range) in ranges.iter().enumerate() {
            let within = |at: usize, x: f64| if range.contains(&at) { x } else { 0.0 };
            let aligned: Vec<f64> = gradient.iter().enumerate().map(|(at, &x)| within(at, x)).collect();
            let noise: Vec<f64> = random.values(gradient.len()).into_iter().map(f64::from).collect();
            let noise: Vec<f64> = noise.iter().enumerate().map(|(at, &x)| within(at, x)).collect();
            let (a, b) = (length(&aligned).max(1e-12), length(&noise));
            let direction: Vec<f64> = aligned.iter().zip(&noise).map(|(x, y)| 0.8 * x / a + 0.6 * y / b).collect();
            let analytic: f64 = gradient.iter().zip(&direction).map(|(g, d)| g * d).sum();
            let [ahead, behind] = [EPSILON, -EPSILON].map(|by| loss(&self.moved(&direction, by)));
            let numeric = (ahead - behind) / (2.0 * EPSILON);
            let error = (analytic - numeric).abs() / numeric.abs().max(floor);
            println!("{name}, input {index} (0: all): tape {analytic:.6}, differences {numeric:.6}, {error:.1e} apart");
            assert!(error <= TOLERANCE, "{name}, input {index} (0: all): tape {analytic}, differences {numeric}");
        }
    }
}

fn length(values: &[f64]) -> f64 {
    values.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn case<'a>(seed: u64, inputs: &'a [Input<'a>], function: Function<'a>) -> Case<'a> {
    let mut random = Random::new(seed);
    let shape = |input: &Input<'a>| match *input {
        Leaf(shape) | Trained(shape) => shape,
    };
    let values = inputs.iter().map(|input| random.values(shape(input).iter().product())).collect();
    Case { inputs, values, cotangent: None, function }
}

#[test]
fn linear() {
    let inputs = [Leaf(&[7, 13]), Trained(&[9, 13]), Trained(&[9])];
    case(1, &inputs, &|tape, x, w| functions::linear(tape, &x[0], &w[0], Some(&w[1]))).check("linear");
    let inputs = [Leaf(&[3, 65]), Trained(&[66, 65])];
    case(2, &inputs, &|tape, x, w| functions::linear(tape, &x[0], &w[0], None)).check("linear without bias");
}

#[test]
fn linear_of_a_constant() {
    let constant = Random::new(3).tensor(gpu(), &[5, 8]).1;
    let inputs = [Trained(&[4, 8]), Trained(&[4])];
    case(4, &inputs, &|tape, _, w| {
        let x = tape.constant(constant.clone());
        functions::linear(tape, &x, &w[0], Some(&w[1]))
    })
    .check("linear of a constant");
}

#[test]
fn linear_lora_with_and_without_dropout() {
    for (rank, probability) in [(1, 0.3), (3, 0.0), (3, 0.3), (512, 0.3)] {
        let (a, b) = ([rank, 12], [10, rank]);
        let inputs = [Leaf(&[11, 12]), Trained(&[10, 12]), Trained(&[10]), Trained(&a), Trained(&b)];
        // The same key draws the same mask, so that the function is one function.
        let key = DropoutKey { probability, seed: 5, stream: 2, step: 9 };
        let function: Function<'_> = &|tape, x, w| {
            let lora = LoraWeights { a: w[2].clone(), b: w[3].clone(), scale: 1.5 / rank as f32, dropout: Some(key) };
            functions::linear_lora(tape, &x[0], &w[0], Some(&w[1]), &lora)
        };
        case(6, &inputs, function).check("linear_lora");
    }
    // As it is used: the weight frozen, the adapter trained.
    let frozen = Random::new(7).tensor(gpu(), &[10, 12]).1;
    let inputs = [Leaf(&[11, 12]), Trained(&[3, 12]), Trained(&[10, 3])];
    case(8, &inputs, &|tape, x, w| {
        let lora = LoraWeights { a: w[0].clone(), b: w[1].clone(), scale: 0.5, dropout: None };
        functions::linear_lora(tape, &x[0], &Weight::frozen(frozen.clone()), None, &lora)
    })
    .check("linear_lora on a frozen weight");
}

#[test]
fn linear_dora_with_and_without_dropout() {
    // The norms are constants to the backward, one of them zero.
    let mut norm = Random::new(71).values(9).into_iter().map(|x| x.abs() + 0.5).collect::<Vec<_>>();
    norm[4] = 0.0;
    let norm = Tensor::from_f32(gpu(), &norm, &[9]);
    let frozen = Weight::frozen(Random::new(7).tensor(gpu(), &[9, 12]).1);
    for (rank, probability) in [(1, 0.0), (3, 0.3), (70, 0.0), (512, 0.2)] {
        let (a, b) = ([rank, 12], [9, rank]);
        let inputs = [Leaf(&[11, 12]), Trained(&a), Trained(&b), Trained(&[9]), Trained(&[9])];
        let key = DropoutKey { probability, seed: 5, stream: 2, step: 9 };
        let scale = 1.5 / rank as f32;
        let function = |tape: &mut Tape, x: &[Var], w: &[Weight], bias: Option<&Weight>| {
            let lora = LoraWeights { a: w[0].clone(), b: w[1].clone(), scale, dropout: Some(key) };
            let dora = DoraWeights { magnitude: w[2].clone(), norm: norm.clone() };
            functions::linear_dora(tape, &x[0], &frozen, bias, &lora, &dora)
        };
        let biased: Function<'_> = &|tape, x, w| function(tape, x, w, Some(&w[3]));
        case(70, &inputs, biased).check("linear_dora");
        let plain: Function<'_> = &|tape, x, w| function(tape, x, w, None);
        case(72, &inputs[..4], plain).check("linear_dora without bias");
    }
}

#[test]
fn add_and_a_value_used_more_than_once() {
    let inputs = [Leaf(&[5, 7]), Leaf(&[5, 7])];
    case(9, &inputs, &|tape, x, _| functions::add(tape, &x[0], &x[1])).check("add");
    // A residual: the gradient that both sides hold must not change under one of them.
    let inputs = [Leaf(&[5, 7]), Trained(&[7, 7])];
    case(10, &inputs, &|tape, x, w| {
        let y = functions::linear(tape, &x[0], &w[0], None);
        let y = functions::add(tape, &x[0], &y);
        let z = functions::activation(tape, &y, Activation::Gelu);
        let z = functions::add(tape, &y, &z);
        functions::add(tape, &z, &x[0])
    })
    .check("residuals");
    case(11, &inputs, &|tape, x, w| {
        let y = functions::linear(tape, &x[0], &w[0], None);
        let y = functions::residual(tape, &x[0], y);
        let z = functions::activation(tape, &y, Activation::Gelu);
        functions::residual(tape, &y, z)
    })
    .check("residuals in place");
}

#[test]
fn norms() {
    for (rows, cols) in [(6, 9), (3, 130)] {
        let (x, w) = ([rows, cols], [cols]);
        let inputs = [Leaf(&x), Trained(&w)];
        case(11, &inputs, &|tape, x, w| functions::rms_norm(tape, &x[0], &w[0], 1e-5)).check("rms_norm");
        let inputs = [Leaf(&x), Trained(&w), Trained(&w)];
        case(12, &inputs, &|tape, x, w| functions::layer_norm(tape, &x[0], &w[0], &w[1], 1e-5)).check("layer_norm");
    }
}

#[test]
fn rotary_embedding() {
    let positions = Tensor::from_u32(gpu(), &[0, 1, 2, 3, 0, 1], &[6]);
    let frequencies = rope::frequencies(10, 10_000.0);
    let table = rope::table(gpu(), (0..16).map(|position| (position, frequencies.as_slice())));
    let inputs = [Leaf(&[6, 30])];
    case(13, &inputs, &|tape, x, _| functions::rope(tape, x[0].clone(), &positions, &table, 3)).check("rope");
}

#[test]
fn attention() {
    // (heads, key/value heads, head size): grouped, and each of the kernels' widths.
    for (heads, kv_heads, head_size) in [(2, 2, 6), (4, 2, 20), (3, 1, 48), (2, 1, 130)] {
        for mask in [Mask::Causal, Mask::Full, Mask::Window(3)] {
            let ranges = Ranges::packed(gpu(), &[5, 1, 9], mask);
            let (q, kv) = ([15, heads * head_size], [15, kv_heads * head_size]);
            let inputs = [Leaf(&q), Leaf(&kv), Leaf(&kv)];
            let shape = Heads { heads, kv_heads, head_size, in_f16: false };
            let function: Function<'_> = &|tape, x, _| {
                let [q, k, v] = [0, 1, 2].map(|at| x[at].clone());
                functions::attention(tape, q, k, v, &ranges, shape)
            };
            case(14, &inputs, function).check(&format!("attention {shape:?} {mask:?}"));
        }
    }
}

#[test]
fn activations() {
    let inputs = [Leaf(&[5, 13]), Leaf(&[5, 13])];
    case(15, &inputs, &|tape, x, _| functions::swiglu(tape, x[0].clone(), x[1].clone())).check("swiglu");
    for kind in [Activation::Gelu, Activation::QuickGelu] {
        case(16, &inputs[..1], &|tape, x, _| functions::activation(tape, &x[0], kind)).check("activation");
    }
}

#[test]
fn embedding_and_rows() {
    // An id used several times, ids never used, and a row that is left to a picture.
    let ids = [3, 0, 3, u32::MAX, 3, 5];
    let inputs = [Trained(&[8, 9])];
    case(17, &inputs, &|tape, _, w| functions::embedding(tape, &w[0], &ids)).check("embedding");

    let rows = Tensor::from_u32(gpu(), &[4, 1], &[2]);
    let inputs = [Trained(&[8, 9]), Leaf(&[2, 9])];
    case(18, &inputs, &|tape, x, w| {
        // The rows that values replace hold nothing that trains.
        let base = functions::embedding(tape, &w[0], &[3, u32::MAX, 0, 3, u32::MAX, 7]);
        functions::place_rows(tape, &base, &rows, &x[0])
    })
    .check("place_rows");

    let inputs = [Leaf(&[6, 9])];
    case(19, &inputs, &|tape, x, _| functions::pick_rows(tape, &x[0], &rows)).check("pick_rows");
    case(20, &inputs, &|tape, x, _| functions::reshape(tape, &x[0], &[2, 3, 9])).check("reshape");
}

#[test]
fn patches() {
    let inputs = [Leaf(&[2, 4, 6]), Trained(&[6]), Trained(&[5, 6])];
    case(21, &inputs, &|tape, x, w| functions::assemble_patches(tape, &x[0], &w[0], &w[1])).check("assemble_patches");
}

#[test]
fn head_and_loss() {
    // L is scale * sum: the function finishes its own gradient, whatever the seed.
    let scale = 0.25;
    let targets: Vec<u32> = (0..10).map(|i| i * 7 % 31).collect();
    let inputs = [Leaf(&[10, 8]), Trained(&[31, 8])];
    let function: Function<'_> = &|tape, x, w| functions::head_loss(tape, &x[0], &w[0], &targets, scale);
    Case { cotangent: Some(scale), ..case(22, &inputs, function) }.check("head_loss");
    // More rows than one chunk holds.
    let targets: Vec<u32> = (0..300).map(|i| i * 7 % 31).collect();
    let inputs = [Leaf(&[300, 8]), Trained(&[31, 8])];
    let function: Function<'_> = &|tape, x, w| functions::head_loss(tape, &x[0], &w[0], &targets, scale);
    Case { cotangent: Some(scale), ..case(23, &inputs, function) }.check("head_loss in chunks");
}

/// Every parameter of a tower of two layers, by way of the layers' own names.
#[test]
fn the_whole_vision_tower() {
    let config = ClipVisionConfig {
        hidden_size: 12,
        intermediate_size: 20,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        num_channels: 3,
        image_size: 4,
        patch_size: 2,
        layer_norm_eps: 1e-5,
        raw: Default::default(),
    };
    let shape = |name: &str| -> Vec<usize> {
        let last = name.rsplit('.').nth(1).unwrap_or_default();
        match (name.rsplit('.').next().unwrap_or_default(), last) {
            ("class_embedding", _) => vec![12],
            ("weight", "position_embedding") => vec![5, 12],
            ("weight", "patch_embedding" | "q_proj" | "k_proj" | "v_proj" | "out_proj") => vec![12, 12],
            ("weight", "fc1") => vec![20, 12],
            ("weight", "fc2") => vec![12, 20],
            ("bias", "fc1") => vec![20],
            _ => vec![12],
        }
    };
    for select in [FeatureSelect::Full, FeatureSelect::Default] {
        let mut names = Vec::new();
        let mut list = |name: &str| {
            names.push(name.to_string());
            Ok(names.len() - 1)
        };
        let tower = ClipVision::new(&config, 2, select, &mut list).unwrap();
        let shapes: Vec<Vec<usize>> = names.iter().map(|name| shape(name)).collect();
        let inputs: Vec<Input<'_>> = shapes.iter().map(|shape| Trained(shape)).collect();
        let patches = Random::new(24).tensor(gpu(), &[8, 12]).1;
        let function: Function<'_> = &|tape, _, weights| {
            let mut parameters = Parameters::default();
            for (name, weight) in names.iter().zip(weights) {
                let id = parameters.insert(name.as_str(), weight.value.clone());
                parameters.place(id, weight.value.clone(), weight.grad.clone());
            }
            tower.forward(&mut Forward { tape, parameters: &parameters, dropout: None, before: None }, &patches)
        };
        let mut case = case(25, &inputs, function);
        for (values, name) in case.values.iter_mut().zip(&names) {
            // Norm weights near one, as trained ones are; a tower of noise would be all but flat.
            let norm = name.contains("norm") && name.ends_with("weight");
            values.iter_mut().for_each(|x| *x = if norm { 1.0 + 0.1 * *x } else { 0.4 * *x });
        }
        case.check(&format!("vision tower {select:?}"));
    }
}
