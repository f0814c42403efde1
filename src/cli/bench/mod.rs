//! `wgpu-llava bench`: what a device reaches. `ops`: its roofs, and every op beside them; `step`: whole optimizer steps of
//! a model with random weights; `generate`: answers of one; `table`: what is known of devices so far.

mod generate;
mod ops;
mod report;
mod step;
mod table;

use std::{fs, path::Path, time::SystemTime};

use clap::ValueEnum;
use serde_json::{Map, Value, json};

use super::{
    args::{Bench, BenchArgs, GlobalArgs},
    report as cli_report,
    ui::Ui,
};
use crate::{
    error::{Error, Result},
    formats::atomic::write_file,
    models::{config::ModelConfig, released},
    train::run_folder::dated_name,
};

/// A small decoder, where nobody names a size: hidden, intermediate, layers, heads, vocabulary.
const SMALL: [usize; 5] = [256, 688, 4, 4, 2048];

pub fn run(args: &BenchArgs, global: &GlobalArgs) -> Result<()> {
    let before = args.compare.as_deref().map(|path| read_before(path, args.what)).transpose()?;
    for (option, path) in [("--out", &args.out), ("--report", &args.report)] {
        path.as_ref().map_or(Ok(()), |path| cli_report::check_output_file(option, path))?;
    }
    if args.filter.is_some() && args.what != Bench::Ops {
        return Err(Error::usage("--filter chooses among ops").hint("wgpu-llava bench ops --filter rms_norm"));
    }
    if matches!(args.what, Bench::Ops | Bench::Table) && names_a_model(args) {
        return Err(Error::usage(
            "ops have sizes of their own: the options of a model and its training are not theirs",
        )
        .hint("wgpu-llava bench step, or bench generate, with these options"));
    }
    if args.tune.tune && matches!(args.what, Bench::Ops | Bench::Table) {
        return Err(
            Error::usage("--tune is for the shapes of a model").hint("wgpu-llava bench step --tune, or bench generate")
        );
    }
    let mut ui = Ui::new(global.quiet, global.verbose);
    let mut result = match args.what {
        Bench::Ops => ops::run(args, global, before.as_ref(), &mut ui)?,
        Bench::Step => step::run(args, global, before.as_ref(), &mut ui)?,
        Bench::Generate => generate::run(args, global, before.as_ref(), &mut ui)?,
        Bench::Table => return table::run(args),
    };
    if let Some(before) = &before {
        let differences = differences(&result.data, before);
        for difference in &differences {
            result.text.push_str(&format!("  compared with another {difference}\n"));
        }
        result.data["compared"] =
            json!({"commit": before["commit"], "date": before["date"], "differences": differences});
    }
    if let Some(out) = &args.out {
        write_file(out, format!("{:#}\n", result.data).as_bytes())?;
    }
    if let Some(path) = &args.report {
        write_file(path, report::markdown(&result).as_bytes())?;
    }
    if args.json {
        return cli_report::print_data(&format!("{}\n", result.data));
    }
    cli_report::print_data(&result.text)?;
    if args.what == Bench::Ops && args.filter.is_none() {
        let file =
            args.out.as_ref().map_or("NAME.json, which --out writes,".to_owned(), |out| out.display().to_string());
        ui.line(&format!(
            "Is this card in docs/bench/README.md? Send {file} in an issue, or in a pull request that adds it to \
             docs/bench/: `wgpu-llava bench table` makes the table of what is there."
        ));
    }
    Ok(())
}

/// Whether an option is given that only a model has.
fn names_a_model(args: &BenchArgs) -> bool {
    let sizes = [args.hidden_size, args.intermediate_size, args.num_layers, args.num_heads, args.num_kv_heads];
    let words = [&args.recipe, &args.model, &args.method, &args.gradient_checkpointing];
    sizes.iter().chain([&args.vocab_size, &args.batch]).any(Option::is_some)
        || words.iter().any(|word| word.is_some())
        || !args.set.is_empty()
}

/// What a benchmark found.
struct Outcome {
    data: Value,
    /// For the terminal.
    text: String,
}

/// What `--out` wrote before.
fn read(path: &Path) -> Result<Value> {
    let bytes = fs::read(path).map_err(|error| Error::reading(path, error))?;
    serde_json::from_slice(&bytes)
        .map_err(|error| Error::data(format!("{} is no JSON", path.display())).caused_by(error))
}

/// The file of `--compare`, which is of the same benchmark.
fn read_before(path: &Path, what: Bench) -> Result<Value> {
    let before = read(path).map_err(|error| Error { message: format!("--compare: {}", error.message), ..error })?;
    let name = what.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
    match before["bench"].as_str() {
        Some(its) if its == name => Ok(before),
        Some(its) => Err(Error::usage(format!("--compare: {} is of bench {its}, not of bench {name}", path.display()))
            .hint(format!("wgpu-llava bench {its} --compare {}", path.display()))),
        None => Err(Error::data(format!("--compare: {} is no result of a benchmark", path.display()))
            .hint("wgpu-llava bench --out FILE.json writes one")),
    }
}

/// What ratios to a run before say nothing about: what ran elsewhere, or of other sizes.
fn differences(now: &Value, before: &Value) -> Vec<String> {
    let sizes = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"];
    let of_model = sizes.map(|key| format!("/model/{key}"));
    let own = ["method", "gradient_checkpointing", "precision", "bits", "batch", "seq", "prompt_tokens", "new_tokens"];
    let own = own.map(|key| format!("/{key}"));
    let device = ["/device/name", "/device/backend", "/device/driver", "/clock"].map(str::to_owned);
    let name = |path: &str| match path {
        "/device/name" => "adapter".to_owned(),
        _ => path.rsplit('/').next().unwrap_or_default().replace('_', " "),
    };
    let text = |value: &Value| value.as_str().map_or(value.to_string(), str::to_owned);
    let differs = |path: &String| match (now.pointer(path), before.pointer(path)) {
        (Some(now), Some(then)) if now != then => Some(format!("{}: {}, here {}", name(path), text(then), text(now))),
        _ => None,
    };
    device.iter().chain(&of_model).chain(&own).filter_map(differs).collect()
}

/// A day, UTC.
pub fn today() -> String {
    dated_name(SystemTime::now()).split('_').next().unwrap_or_default().to_owned()
}

/// The model's shapes: those of the released model of that name, or of a small one, but for sizes that are given; with
/// these it is a language model alone.
fn model(args: &BenchArgs, named: Option<String>, positions: usize) -> Result<ModelConfig> {
    let name = args.model.clone().or(named);
    let released = name.as_deref().map(released::by_name).transpose()?.flatten();
    let given = [
        ("hidden_size", args.hidden_size),
        ("intermediate_size", args.intermediate_size),
        ("num_hidden_layers", args.num_layers),
        ("num_attention_heads", args.num_heads),
        ("vocab_size", args.vocab_size),
    ];
    let as_named = given.iter().all(|(_, value)| value.is_none()) && args.num_kv_heads.is_none();
    if let Some(name) = name.filter(|_| released.is_none() && (as_named || args.model.is_some())) {
        return Err(Error::usage(format!("the size of {name} is not known by its name"))
            .hint("llama-7b, llama-13b, llama-33b, llama-65b and llama-70b are, or give --hidden-size and so on"));
    }
    let (sizes, kv_heads) = match released {
        Some(config) if as_named => return Ok(config),
        Some(config) => {
            let text = config.text();
            let (layers, heads) = (text.num_hidden_layers, text.num_attention_heads);
            // Heads of keys and values are as many as there are heads, where these are given.
            let kv_heads = args.num_heads.is_none().then_some(text.num_key_value_heads);
            ([text.hidden_size, text.intermediate_size, layers, heads, text.vocab_size], kv_heads)
        }
        None => (SMALL, None),
    };
    let mut json = Map::from_iter([("model_type".to_owned(), json!("llama"))]);
    json.extend(
        given.into_iter().zip(sizes).map(|((key, value), size)| (key.to_owned(), json!(value.unwrap_or(size)))),
    );
    if let Some(heads) = args.num_kv_heads.or(kv_heads) {
        json.insert("num_key_value_heads".to_owned(), json!(heads));
    }
    json.insert("max_position_embeddings".to_owned(), json!(positions.max(2048)));
    ModelConfig::parse("the model of these options", Value::Object(json).to_string().as_bytes())
}

/// The model of a result.
fn model_json(config: &ModelConfig, parameters: u64) -> Value {
    let text = config.text();
    json!({
        "hidden_size": text.hidden_size, "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers, "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads, "vocab_size": text.vocab_size,
        "vision": config.llava().is_some(), "parameters": parameters,
    })
}

/// Lines of how much each of these numbers is of what it was.
fn ratios(data: &Value, before: Option<&Value>, keys: &[&str]) -> Vec<(String, String)> {
    let mut lines = Vec::new();
    for &key in keys {
        if let (Some(now), Some(then)) = (data[key].as_f64(), before.and_then(|before| before[key].as_f64())) {
            lines.push((key.to_owned(), format!("{:.3} times what it was", now / then)));
        }
    }
    lines
}
