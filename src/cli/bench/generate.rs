//! `bench generate`: answers of a model with random weights.

use std::fmt::Write;

use serde_json::{Value, json};

use super::{
    Outcome, model, model_json, ratios,
    report::{bytes, seconds, share},
    today,
};
use crate::{
    bench::{
        self,
        answers::{Sizes, measure},
    },
    cli::{
        args::{BenchArgs, GlobalArgs},
        estimate::gigabytes,
        open_device, tuning,
        ui::Ui,
    },
    error::{Error, Result},
    gpu::Gpu,
    models::loading::Quantization,
    ops::roof::{self, Roofs},
    quant::QuantType,
    train::report::grouped,
};

pub fn run(args: &BenchArgs, global: &GlobalArgs, before: Option<&Value>, ui: &mut Ui) -> Result<Outcome> {
    let quantization = match args.method.as_deref() {
        None | Some("lora" | "full" | "projector") => None,
        Some("qlora") => Some(Quantization { kind: QuantType::Nf4, double: true, lm_head: false }),
        Some(other) => {
            return Err(Error::usage(format!("--method {other}: use qlora for weights in four bits, or none")));
        }
    };
    if args.recipe.is_some() || !args.set.is_empty() || args.gradient_checkpointing.is_some() {
        return Err(Error::usage("bench generate has no settings of training")
            .hint("leave --recipe, --set and --gradient-checkpointing out"));
    }
    let tokens = args.tokens;
    let config = model(args, None, args.seq + tokens)?;
    let sizes = Sizes { sequences: args.batch.unwrap_or(1), prompt: args.seq, tokens, runs: args.steps };
    sizes.check(&config)?;
    let gpu = open_device(global, ui)?;
    let precision = global.precision.map(|precision| precision.dtype());
    tuning::prepare(std::slice::from_ref(&gpu), args.tune.tune, ui, || {
        let counting = Gpu::counting(gpu.facts().clone());
        measure(&counting, &config, precision, quantization, Sizes { tokens: 2.min(tokens), runs: 0, ..sizes })?;
        Ok(counting.launches())
    })?;
    let roofs = Roofs::measure(&gpu, &[roof::COPY])?;
    let times = measure(&gpu, &config, precision, quantization, sizes)?;
    let median = |seconds: &[f64]| seconds.get(seconds.len() / 2).copied();
    let positions = (sizes.sequences * sizes.prompt) as f64;
    let prefill = median(&times.prefill).unwrap_or_default();
    let step = median(&times.decode);
    let read = (times.weight_bytes + times.cache_bytes) as f64;
    let copy = roofs.get(roof::COPY);

    let mut data = bench::head("generate", &gpu, &today());
    for (key, value) in [
        ("roofs", bench::roofs_json(&roofs)),
        ("model", model_json(&config, times.parameters)),
        ("precision", json!(global.precision.map(|precision| precision.as_str()))),
        ("bits", json!(quantization.map(|_| 4))),
        ("batch", json!(sizes.sequences)),
        ("prompt_tokens", json!(sizes.prompt)),
        ("new_tokens", json!(sizes.tokens)),
        ("runs", json!(sizes.runs)),
        ("prefill_seconds", json!(prefill)),
        ("prefill_tokens_per_second", json!(positions / prefill)),
        ("seconds_per_token", json!(step)),
        ("decode_tokens_per_second", json!(step.map(|step| sizes.sequences as f64 / step))),
        ("bytes_per_token", json!(times.weight_bytes + times.cache_bytes)),
        ("decode_bytes_per_second", json!(step.map(|step| read / step))),
        ("share", json!(step.zip(copy).map(|(step, copy)| read / step / copy))),
        ("device_bytes", json!(times.device_bytes)),
    ] {
        data.insert(key.to_owned(), value);
    }
    let data = Value::Object(data);

    let mut text = String::new();
    let mut row = |name: &str, value: String| {
        // Writing to a string does not fail.
        let _ = writeln!(text, "  {name:<12} {value}");
    };
    row("model", format!("{} parameters", grouped(times.parameters)));
    row(
        "prompt",
        format!("{:.1} tokens a second, {} in {}", positions / prefill, grouped(positions as u64), seconds(prefill)),
    );
    if let (Some(step), Some(copy)) = (step, copy) {
        row("answer", format!("{:.2} tokens a second, {} a step", sizes.sequences as f64 / step, seconds(step)));
        row(
            "reads",
            format!("{} a step, {}: {} of copy", gigabytes(read as u64), bytes(read / step), share(read / step / copy)),
        );
    }
    row("memory", gigabytes(times.device_bytes));
    let keys = ["prefill_tokens_per_second", "decode_tokens_per_second", "device_bytes"];
    ratios(&data, before, &keys).into_iter().for_each(|(key, value)| row(&key, value));
    Ok(Outcome { data, text })
}
