//! One training step of a small LLaMA decoder written with Burn, timed: a rival for `wgpu-llava bench step`.

mod model;
mod options;

use std::{fs, process::ExitCode, time::Instant};

use burn::{
    Tensor,
    module::Module,
    nn::loss::{CrossEntropyLoss, CrossEntropyLossConfig},
    optim::{AdamWConfig, GradientsParams},
    tensor::{Device, Int, TensorData},
};
use serde_json::{Value, json};

use model::{Constants, Decoder};
use options::Options;

/// High enough that the loss falls visibly within a few steps; the time of a step does not depend on it.
const LEARNING_RATE: f64 = 1e-3;

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(message) => {
            eprintln!("error: {message}\n\n{}", options::USAGE);
            return ExitCode::from(2);
        }
    };
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<(), Failure> {
    let (device, setup) = Device::wgpu_options().init_with_setup()?;
    let adapter = setup.adapter.get_info();
    let backend = adapter.backend.to_str();
    println!("adapter      {}, {backend}, {} {}", adapter.name, adapter.driver, adapter.driver_info);

    let device = device.autodiff();
    device.seed(0);
    let mut model = Decoder::new(options, &device);
    let parameters = model.num_params();
    println!("parameters   {parameters}");

    let batch = Batch::random(options, &device);
    // As wgpu-llava's defaults have it: no decay, epsilon 1e-8.
    let mut optimizer = AdamWConfig::new().with_weight_decay(0.0).with_epsilon(1e-8).init();
    let (mut losses, mut warm_up, mut seconds) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..options.warm_up + options.steps {
        let (taken, loss, updated) = timed(&device, || {
            let (loss, gradients) = batch.gradients(&model);
            (loss, optimizer.step(LEARNING_RATE, model, gradients))
        })?;
        model = updated;
        losses.push(loss);
        let (name, times) = if number < options.warm_up { ("warm-up", &mut warm_up) } else { ("step", &mut seconds) };
        times.push(taken);
        println!("{name:<12} {taken:.4} s, loss {loss:.4}");
    }
    let held = device.memory_pool_usage().map(|usage| usage.bytes_reserved);

    // The same step without the optimizer. It has a warm-up of its own: other operations are fused at its end.
    let mut gradients = Vec::new();
    for number in 0..options.warm_up + options.steps {
        let (taken, ..) = timed(&device, || batch.gradients(&model))?;
        if number >= options.warm_up {
            gradients.push(taken);
        }
    }

    let step = median(&seconds);
    let positions = options.batch * options.seq;
    println!("loss         {:.4} at first, {:.4} at last", losses[0], losses[losses.len() - 1]);
    println!("a step       {step:.4} s, median of {}", seconds.len());
    println!("no optimizer {:.4} s, median of {}", median(&gradients), gradients.len());
    println!("positions    {:.1} a second, {positions} a step", positions as f64 / step);
    let Some(path) = &options.json else { return Ok(()) };
    let data = json!({
        "burn": "0.22.1",
        "vulkan_feature": cfg!(feature = "vulkan"),
        "adapter": {
            "name": adapter.name, "backend": backend, "driver": adapter.driver, "driver_info": adapter.driver_info,
        },
        "model": {
            "hidden_size": options.hidden_size, "intermediate_size": options.intermediate_size,
            "num_layers": options.num_layers, "num_heads": options.num_heads, "vocab_size": options.vocab_size,
            "parameters": parameters,
        },
        "batch": options.batch, "seq": options.seq, "positions": positions,
        "losses": losses,
        "warm_up_seconds": warm_up,
        "seconds": seconds,
        "seconds_per_step": step,
        "tokens_per_second": positions as f64 / step,
        "forward_backward": { "seconds": gradients, "seconds_per_step": median(&gradients) },
        "device_bytes": held.map_or(Value::Null, Value::from),
    });
    let text = serde_json::to_string_pretty(&data)? + "\n";
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(())
}

/// Seconds until what `work` returns is computed and its loss is read; the loss; the rest.
fn timed<Rest>(device: &Device, work: impl FnOnce() -> (Tensor<1>, Rest)) -> Result<(f64, f32, Rest), Failure> {
    device.sync()?;
    let begun = Instant::now();
    let (loss, rest) = work();
    let loss = loss.into_scalar::<f32>();
    device.sync()?;
    Ok((begun.elapsed().as_secs_f64(), loss, rest))
}

/// What every step trains on.
struct Batch {
    /// [batch, seq].
    tokens: Tensor<2, Int>,
    /// [batch * seq]: the token that follows each.
    targets: Tensor<1, Int>,
    constants: Constants,
    loss: CrossEntropyLoss,
}

impl Batch {
    fn random(options: &Options, device: &Device) -> Self {
        // One token more a sequence than there are positions, so that every position has a target.
        let mut state = 1;
        let records: Vec<Vec<i32>> = (0..options.batch)
            .map(|_| (0..=options.seq).map(|_| (random(&mut state) % options.vocab_size as u64) as i32).collect())
            .collect();
        let tokens: Vec<i32> = records.iter().flat_map(|record| &record[..options.seq]).copied().collect();
        let targets: Vec<i32> = records.iter().flat_map(|record| &record[1..]).copied().collect();
        let positions = targets.len();
        Self {
            tokens: Tensor::from_data(TensorData::new(tokens, [options.batch, options.seq]), device),
            targets: Tensor::from_data(TensorData::new(targets, [positions]), device),
            constants: Constants::new(options, device),
            loss: CrossEntropyLossConfig::new().init(device),
        }
    }

    /// Forward and backward.
    fn gradients(&self, model: &Decoder) -> (Tensor<1>, GradientsParams) {
        let logits = model.forward(self.tokens.clone(), &self.constants);
        let loss = self.loss.forward(logits, self.targets.clone());
        let gradients = GradientsParams::from_grads(loss.backward(), model);
        (loss, gradients)
    }
}

/// SplitMix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut word = *state;
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// Of at least one value.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) { (sorted[middle - 1] + sorted[middle]) / 2.0 } else { sorted[middle] }
}
