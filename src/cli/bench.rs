//! `wgpu-llava bench`: what a device reaches. `step`: whole optimizer steps of a model with random weights.

use std::{env, fmt::Write, fs, path::Path};

use serde_json::{Map, Value, json};

use super::{
    args::{Bench, BenchArgs, GlobalArgs},
    estimate::gigabytes,
    open_device, recipes, report,
    ui::Ui,
};
use crate::{
    error::{Error, Result},
    formats::atomic::write_file,
    gpu::{Account, Gpu},
    models::{config::ModelConfig, released},
    train::{
        config::{Request, RunConfig, Source, StageConfig},
        measure::{Sizes, StepTimes, steps},
        report::grouped,
    },
};

/// A small decoder, where nobody names a size.
const SMALL: [(&str, usize); 5] = [
    ("hidden_size", 256),
    ("intermediate_size", 688),
    ("num_hidden_layers", 4),
    ("num_attention_heads", 4),
    ("vocab_size", 2048),
];
/// What a stage must have; no file is opened.
const SETTINGS: &str = "model_name_or_path = \"random\"\ndata_path = \"none\"\nwarmup_ratio = 0.0\n";

pub fn run(args: &BenchArgs, global: &GlobalArgs) -> Result<()> {
    if args.what != Bench::Step {
        return Err(Error::usage("of `bench`, only `step` is built yet").hint("wgpu-llava bench step"));
    }
    let stage = stage(args, global)?;
    let config = model(args, &stage)?;
    let before = args.compare.as_deref().map(read).transpose()?;
    if let Some(out) = &args.out {
        report::check_output_file("--out", out)?;
    }
    let mut ui = Ui::new(global.quiet, global.verbose);
    let gpu = open_device(global, None, &mut ui)?;
    let sizes = Sizes { sequences: args.batch, length: args.seq, warm_up: args.warm_up, steps: args.steps };
    let times = steps(&stage, &config, sizes, &gpu, &mut ui)?;
    let data = data(&stage, &config, sizes, &times, &gpu);
    if let Some(out) = &args.out {
        write_file(out, format!("{data:#}\n").as_bytes())?;
    }
    if args.json {
        return report::print_data(&format!("{data}\n"));
    }
    report::print_data(&text(&stage, &times, &data, before.as_ref()))
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

/// The model's shapes: of the options, of the released model of that name, or a small one.
fn model(args: &BenchArgs, stage: &StageConfig) -> Result<ModelConfig> {
    let given = [
        ("hidden_size", args.hidden_size),
        ("intermediate_size", args.intermediate_size),
        ("num_hidden_layers", args.num_layers),
        ("num_attention_heads", args.num_heads),
        ("vocab_size", args.vocab_size),
    ];
    let named = match (&args.model, &stage.model_name_or_path) {
        (Some(name), _) => Some(name.clone()),
        (None, Some(Source::Hub(name))) if args.recipe.is_some() => Some(name.clone()),
        (None, Some(Source::Local(path))) if args.recipe.is_some() => Some(path.display().to_string()),
        _ => None,
    };
    if given.iter().all(|(_, value)| value.is_none())
        && let Some(name) = named
    {
        let unknown = || {
            Error::usage(format!("the size of {name} is not known by its name"))
                .hint("llama-7b, llama-13b, llama-33b, llama-65b and llama-70b are, or give --hidden-size and so on")
        };
        return released::by_name(&name)?.ok_or_else(unknown);
    }
    let mut json = Map::from_iter([("model_type".to_owned(), json!("llama"))]);
    for ((key, value), (_, small)) in given.into_iter().zip(SMALL) {
        json.insert(key.to_owned(), json!(value.unwrap_or(small)));
    }
    if let Some(heads) = args.num_kv_heads {
        json.insert("num_key_value_heads".to_owned(), json!(heads));
    }
    json.insert("max_position_embeddings".to_owned(), json!(args.seq.max(2048)));
    ModelConfig::parse("the model of these options", Value::Object(json).to_string().as_bytes())
}

fn data(stage: &StageConfig, config: &ModelConfig, sizes: Sizes, times: &StepTimes, gpu: &Gpu) -> Value {
    let (facts, text, seconds) = (gpu.facts(), config.text(), times.seconds_per_step());
    let peak: Map<String, Value> =
        Account::ALL.iter().map(|&account| (account.name().to_owned(), json!(times.peak.of(account)))).collect();
    json!({
        "bench": "step",
        "version": env!("CARGO_PKG_VERSION"),
        "device": {"name": facts.name, "backend": facts.backend, "driver": facts.driver},
        "model": {
            "hidden_size": text.hidden_size, "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_hidden_layers, "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads, "vocab_size": text.vocab_size,
            "vision": config.llava().is_some(), "parameters": times.parameters,
            "trainable_parameters": times.trainable,
        },
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
        "flops_per_second": times.flops as f64 / seconds,
        "parts": {
            "forward": times.phases.forward, "backward": times.phases.backward, "optimizer": times.phases.optimizer,
        },
        "loading_seconds": times.loading_seconds,
        "device_bytes": times.peak.held,
        "estimated_bytes": times.estimated,
        "bytes": peak,
    })
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
    row("products", format!("{:.3} GFLOP/s", times.flops as f64 / seconds / 1e9));
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
    if let Some(before) = before {
        for key in ["seconds_per_step", "tokens_per_second", "device_bytes"] {
            if let (Some(now), Some(then)) = (data[key].as_f64(), before[key].as_f64()) {
                row(key, format!("{:.3} times what it was", now / then));
            }
        }
    }
    text
}

/// What `--out` wrote before.
fn read(path: &Path) -> Result<Value> {
    let bytes = fs::read(path).map_err(|error| Error::reading(path, error))?;
    serde_json::from_slice(&bytes)
        .map_err(|error| Error::data(format!("--compare: {} is no JSON", path.display())).caused_by(error))
}
