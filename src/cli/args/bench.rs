//! What is typed to measure.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{TuneArgs, at_least_one};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Bench {
    /// What the device reaches at most, and every op beside it
    Ops,
    /// Optimizer steps of a model with random weights
    Step,
    /// Answers of a model with random weights
    Generate,
    /// The table of docs/bench, made of the results there
    Table,
}

#[derive(Clone, Debug, Args)]
pub struct BenchArgs {
    #[arg(value_enum, value_name = "WHAT", default_value_t = Bench::Ops)]
    pub what: Bench,
    /// Of ops, those cases with this text in their names, such as rms_norm or "7b matmul"
    #[arg(long, value_name = "TEXT")]
    pub filter: Option<String>,
    /// The settings and the model's size of a recipe's last stage (see `recipes ls`)
    #[arg(long, short, value_name = "NAME")]
    pub recipe: Option<String>,
    /// Override a config key; may be given several times
    #[arg(long, short, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// A released model's size by its name, such as llama-7b; sizes that are given take the place of its own
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    #[arg(long, value_name = "N", value_parser = at_least_one())]
    pub hidden_size: Option<usize>,
    #[arg(long, value_name = "N", value_parser = at_least_one())]
    pub intermediate_size: Option<usize>,
    #[arg(long, value_name = "N", value_parser = at_least_one())]
    pub num_layers: Option<usize>,
    #[arg(long, value_name = "N", value_parser = at_least_one())]
    pub num_heads: Option<usize>,
    /// Key and value heads [default: as many as heads, or the named model's]
    #[arg(long, value_name = "N", value_parser = at_least_one())]
    pub num_kv_heads: Option<usize>,
    #[arg(long, value_name = "N", value_parser = at_least_one())]
    pub vocab_size: Option<usize>,
    /// Sequences of a step, or prompts answered at once [default: 4, 1]
    #[arg(long, value_name = "N", value_parser = at_least_one())]
    pub batch: Option<usize>,
    /// Positions of each
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = at_least_one())]
    pub seq: usize,
    /// projector, full, lora or qlora; of answers, qlora means weights in four bits
    #[arg(long, value_name = "M")]
    pub method: Option<String>,
    /// none, selective, full or offload
    #[arg(long, value_name = "G")]
    pub gradient_checkpointing: Option<String>,
    /// Tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = at_least_one())]
    pub tokens: usize,
    /// Steps, or answers, that are timed; the median counts
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = at_least_one())]
    pub steps: usize,
    /// Steps before them
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub warm_up: usize,
    /// Of a step, tell the kernels that take its time, each timed by itself in one more step
    #[arg(long)]
    pub kernels: bool,
    #[command(flatten)]
    pub tune: TuneArgs,
    /// Write the JSON there too
    #[arg(long, value_name = "FILE.json")]
    pub out: Option<PathBuf>,
    /// Write a report in Markdown there, ready to be pasted
    #[arg(long, value_name = "FILE.md")]
    pub report: Option<PathBuf>,
    /// The results that a table is made of
    #[arg(long, value_name = "DIR", default_value = "docs/bench")]
    pub folder: PathBuf,
    /// Show the ratios to a run that `--out` wrote, and what else differs from it
    #[arg(long, value_name = "FILE.json")]
    pub compare: Option<PathBuf>,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
}
