//! `bench step`: whole optimizer steps of a model with random weights.

use std::{env, fmt::Write, path::Path, slice};

use serde_json::{Map, Value, json};

use super::{Outcome, model, model_json, ratios, report::share, today};
use crate::{
    bench,
    cli::{
        args::{BenchArgs, GlobalArgs},
        backend,
        estimate::gigabytes,
        open_device, recipes, tuning,
        ui::Ui,
    },
    error::{Error, Result},
    gpu::{Account, AdapterOptions, Gpu},
    models::config::ModelConfig,
    ops::{
        cooperative,
        roof::{self, Roofs},
    },
    train::{
        config::{Request, RunConfig, Source, StageConfig},
        measure::{Sizes, StepTimes, launches, steps},
        report::grouped,
    },
};

/// Kernels that the text lists; the JSON has all.
const KERNELS_SHOWN: usize = 16;

/// What a stage must have; no file is opened.
const SETTINGS: &str = "model_name_or_path = \"random\"\ndata_path = \"none\"\nwarmup_ratio = 0.0\n";

pub fn run(args: &BenchArgs, global: &GlobalArgs, before: Option<&Value>, ui: &mut Ui) -> Result<Outcome> {
    let stage = stage(args, global)?;
    // A recipe brings its model.
    let named = match &stage.model_name_or_path {
        Some(Source::Hub(name)) if args.recipe.is_some() => Some(name.clone()),
        Some(Source::Local(path)) if args.recipe.is_some() => Some(path.display().to_string()),
        _ => None,
    };
    let config = model(args, named, args.seq)?;
    let gpu = open_device(global, ui)?;
    let batch = args.batch.unwrap_or(4);
    let sizes = Sizes { sequences: batch, length: args.seq, warm_up: args.warm_up, steps: args.steps };
    tuning::prepare(slice::from_ref(&gpu), args.tune.tune, ui, || launches(&stage, &config, sizes, &gpu))?;
    let wanted = [roof::FMA, roof::COOPERATIVE];
    let roofs = Roofs::measure(&gpu, &wanted[..1 + usize::from(cooperative::serves(&gpu))])?;
    let times = steps(&stage, &config, sizes, &gpu, ui)?;
    let mut data = data(&stage, &config, sizes, &times, &gpu, &roofs);
    if args.kernels {
        data["kernels"] = kernels(&stage, &config, sizes, &gpu, global, ui)?;
    }
    let text = text(&stage, &times, &data, before);
    Ok(Outcome { data, text })
}

/// The settings of the step.
fn stage(args: &BenchArgs, global: &GlobalArgs) -> Result<StageConfig> {
    let working_dir =
        env::current_dir().map_err(|error| Error::failed("the current folder is gone").caused_by(error))?;
    let recipe = args.recipe.as_deref().map(recipes::find).transpose()?;
    let mut set = args.set.clone();
    for (key, value) in [("method", &args.method), ("gradient_checkpointing", &args.gradient_checkpointing)] {
        set.extend(value.as_ref().map(|value| format!("{key}={value}")));
    }
    set.extend(global.precision.map(|precision| format!("precision={precision}")));
    let run = RunConfig::resolve(&Request {
        recipe: Some(
            recipe.as_ref().map_or(("bench", SETTINGS), |recipe| (recipe.name.as_ref(), recipe.text.as_ref())),
        ),
        file: None,
        set: &set,
        output_dir: None,
        default_output_dir: Path::new("bench"),
        working_dir: &working_dir,
    })?;
    // A micro-batch is a step here.
    let mut stage = run.stages.into_iter().next_back().ok_or_else(|| Error::usage("the recipe has no stage"))?;
    stage.gradient_accumulation_steps = 1;
    Ok(stage)
}

fn data(stage: &StageConfig, config: &ModelConfig, sizes: Sizes, times: &StepTimes, gpu: &Gpu, roofs: &Roofs) -> Value {
    let seconds = times.seconds_per_step();
    let peak: Map<String, Value> =
        Account::ALL.iter().map(|&account| (account.name().to_owned(), json!(times.peak.of(account)))).collect();
    let mut model = model_json(config, times.parameters);
    model["trainable_parameters"] = json!(times.trainable);
    let rate = times.flops as f64 / seconds;
    let roof = if times.in_f16 { roof::COOPERATIVE } else { roof::FMA };
    let mut data = bench::head("step", gpu, &today());
    let rest = json!({
        "roofs": bench::roofs_json(roofs),
        "model": model,
        "method": stage.method.as_str(),
        "gradient_checkpointing": stage.gradient_checkpointing.as_str(),
        "precision": stage.precision.map(|precision| precision.as_str()),
        "batch": sizes.sequences, "seq": sizes.length,
        "positions": times.positions, "target_tokens": times.target_tokens,
        "loss": times.loss,
        "seconds": times.seconds,
        "seconds_per_step": seconds,
        "tokens_per_second": times.positions as f64 / seconds,
        "flops_per_step": times.flops,
        "flops_per_second": rate,
        "roof": roof,
        "share": roofs.get(roof).map(|roof| rate / roof),
        "parts": {
            "forward": times.phases.forward, "backward": times.phases.backward, "optimizer": times.phases.optimizer,
        },
        "loading_seconds": times.loading_seconds,
        "device_bytes": times.peak.held,
        "estimated_bytes": times.estimated,
        "bytes": peak,
    });
    if let Value::Object(rest) = rest {
        data.extend(rest);
    }
    Value::Object(data)
}

/// What the kernels of one step took, slowest first.
fn kernels(
    stage: &StageConfig,
    config: &ModelConfig,
    sizes: Sizes,
    gpu: &Gpu,
    global: &GlobalArgs,
    ui: &mut Ui,
) -> Result<Value> {
    let facts = gpu.facts();
    // The model is loaded once more: what the steps before have left must not lie beside it.
    gpu.trim();
    gpu.sync()?;
    let options = AdapterOptions {
        device: Some(facts.index.to_string()),
        // An index counts among the adapters of what the user chose.
        backend: backend(global).map(str::to_owned),
        profile: true,
        choices: facts.choices.clone(),
        ..AdapterOptions::default()
    };
    let gpu = Gpu::open(&options)?;
    // The step before has compiled them.
    steps(stage, config, Sizes { warm_up: 1, steps: 1, ..sizes }, &gpu, ui)?;
    let row = |(name, launches, seconds)| json!({"name": name, "launches": launches, "seconds": seconds});
    Ok(gpu.profile().into_iter().map(row).collect())
}

fn text(stage: &StageConfig, times: &StepTimes, data: &Value, before: Option<&Value>) -> String {
    let mut text = String::new();
    let mut row = |name: &str, value: String| {
        // Writing to a string does not fail.
        let _ = writeln!(text, "  {name:<12} {value}");
    };
    let seconds = times.seconds_per_step();
    row(
        "model",
        format!("{} parameters, {} train ({})", grouped(times.parameters), grouped(times.trainable), stage.method),
    );
    row("a step", format!("{seconds:.4} s, median of {}", times.seconds.len()));
    row(
        "positions",
        format!("{:.1} a second, {} a step", times.positions as f64 / seconds, grouped(times.positions as u64)),
    );
    let roof = data["roof"].as_str().unwrap_or_default();
    let reached = data["share"].as_f64().map_or(String::new(), |part| format!(", {} of {roof}", share(part)));
    row("products", format!("{:.3} GFLOP/s{reached}", times.flops as f64 / seconds / 1e9));
    let phases = times.phases;
    row(
        "parts",
        format!(
            "forward {:.4} s, backward {:.4} s, optimizer {:.4} s",
            phases.forward, phases.backward, phases.optimizer
        ),
    );
    row("memory", format!("{}, {} expected", gigabytes(times.peak.held), gigabytes(times.estimated)));
    row("loading", format!("{:.1} s", times.loading_seconds));
    if let Some(kernels) = data["kernels"].as_array() {
        let all: f64 = kernels.iter().filter_map(|kernel| kernel["seconds"].as_f64()).sum();
        row("kernels", format!("{all:.4} s, timed one by one; of these"));
        for kernel in kernels.iter().take(KERNELS_SHOWN) {
            let (name, seconds) =
                (kernel["name"].as_str().unwrap_or_default(), kernel["seconds"].as_f64().unwrap_or(0.0));
            row(&share(seconds / all), format!("{name}, {} launches", kernel["launches"]));
        }
    }
    let keys = ["seconds_per_step", "tokens_per_second", "device_bytes"];
    ratios(data, before, &keys).into_iter().for_each(|(key, value)| row(&key, value));
    text
}
