//! What can be typed. Parsing alone: what it means is for the commands.

mod answering;
mod bench;

pub use answering::{ChatArgs, GenerateArgs, SamplingArgs};
pub use bench::{Bench, BenchArgs};

use crate::{
    formats::safetensors::Dtype,
    quant::QuantType,
    train::config::{DeviceChoice, Precision, Source},
};
use clap::{
    Args, CommandFactory, Parser, Subcommand, ValueEnum, builder::PossibleValuesParser, builder::TypedValueParser,
};
use std::{ffi::OsString, path::PathBuf};

/// Train and run LLaVA vision-language models on any GPU.
#[derive(Debug, Parser)]
#[command(
    name = "wgpu-llava",
    version,
    max_term_width = 100,
    subcommand_required = true,
    arg_required_else_help = true
)]
#[command(after_help = "Exit codes: 0 done, 1 the work failed, 2 wrong use or config, 3 bad data or file, \
                        4 device or memory, 5 network, 130 interrupted after a checkpoint was saved.")]
pub struct Cli {
    #[command(flatten)]
    pub global: GlobalArgs,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Clone, Debug, Default, Args)]
pub struct GlobalArgs {
    /// The adapter to run on, as `devices` lists them: its index, or a part of its name; several indices, as in 0,1, to train on
    /// together, or for parts of a model that is asked
    #[arg(long, global = true, value_name = "INDEX|NAME", help_heading = "Global options")]
    pub device: Option<String>,
    /// Only adapters of this graphics interface
    #[arg(long, global = true, value_enum, value_name = "BACKEND", help_heading = "Global options")]
    pub backend: Option<Backend>,
    /// How weights are kept on the device [default: as the checkpoint has them]
    #[arg(long, global = true, value_parser = precision(), help_heading = "Global options")]
    pub precision: Option<Precision>,
    /// Nothing on stderr but errors
    #[arg(long, short, global = true, conflicts_with = "verbose", help_heading = "Global options")]
    pub quiet: bool,
    /// Every step, and what would otherwise go without saying
    #[arg(long, short, global = true, help_heading = "Global options")]
    pub verbose: bool,
}

impl GlobalArgs {
    /// What `--device` names: an adapter, or several by their indices.
    pub fn devices(&self) -> Option<Vec<DeviceChoice>> {
        let device = self.device.as_ref()?;
        let indices = device.split(',').map(|index| index.trim().parse().map(DeviceChoice::Index));
        // Names may have commas too.
        Some(indices.collect::<Result<_, _>>().unwrap_or_else(|_| vec![DeviceChoice::Name(device.clone())]))
    }
}

fn precision() -> impl TypedValueParser<Value = Precision> {
    // Every possible value is a name, so the fallback is never taken.
    PossibleValuesParser::new(Precision::NAMES).map(|name| Precision::parse(&name).unwrap_or(Precision::Float32))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    Vulkan,
    Metal,
    Dx12,
    Gl,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// List every adapter, its features and limits
    Devices(DevicesArgs),
    /// Run every stage of a config; without one, both stages on the embedded model and data
    Train(TrainArgs),
    /// Answer one prompt, about pictures or not
    Generate(GenerateArgs),
    /// A conversation in the terminal, with pictures
    Chat(ChatArgs),
    /// Log-likelihood of each record's supervised tokens, one JSON line a record
    Score(ScoreArgs),
    /// Run a benchmark
    Eval(EvalArgs),
    /// Write every compiled shader as plain WGSL
    Shaders(ShadersArgs),
    /// The recipes that are in the program
    #[command(subcommand)]
    Recipes(RecipesCommand),
    /// Print a completion script for a shell
    Completions(CompletionsArgs),
    /// Memory and time of a run before it starts
    Estimate(EstimateArgs),
    /// Fold an adapter into the weights
    Merge(MergeArgs),
    /// Convert between model layouts
    Convert(ConvertArgs),
    /// Measure what a device reaches
    Bench(BenchArgs),
}

#[derive(Debug, Args)]
pub struct DevicesArgs {
    /// One JSON object a line, an adapter each, instead of text
    #[arg(long)]
    pub json: bool,
}

/// Which run a command is about.
#[derive(Clone, Debug, Default, Args)]
pub struct RunArgs {
    /// A TOML file; without it, the embedded default
    #[arg(value_name = "CONFIG.toml")]
    pub config: Option<PathBuf>,
    /// An embedded recipe, below the config file if both are given (see `recipes ls`)
    #[arg(long, short, value_name = "NAME")]
    pub recipe: Option<String>,
    /// Override a config key (`recipes keys` lists them), of all stages or of one; may be given several times
    #[arg(long, short, value_name = "[STAGE.]KEY=VALUE")]
    pub set: Vec<String>,
}

/// Whether a command measures before it begins.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct TuneArgs {
    /// First measure which kernels are the fastest for this run, and keep that for later runs on this adapter
    #[arg(long)]
    pub tune: bool,
}

#[derive(Clone, Debug, Default, Args)]
pub struct TrainArgs {
    #[command(flatten)]
    pub run: RunArgs,
    #[command(flatten)]
    pub tune: TuneArgs,
    /// The run folder [default: runs/<date>]
    #[arg(long, short, value_name = "DIR")]
    pub output_dir: Option<PathBuf>,
    /// Go on with the run in the run folder
    #[arg(long)]
    pub resume: bool,
    /// Check models and data, print the config as resolved and where each value came from, and stop
    #[arg(long)]
    pub dry_run: bool,
    /// Start even what does not fit into the device's memory
    #[arg(long)]
    pub force: bool,
}

#[derive(Clone, Debug, Default, Args)]
pub struct EstimateArgs {
    #[command(flatten)]
    pub run: RunArgs,
    /// Of the card to ask about, such as 24GB [default: what this device has free]
    #[arg(long, value_name = "BYTES", value_parser = memory)]
    pub memory: Option<u64>,
    /// How many such cards, of all hosts [default: as many as the config's `devices`]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub devices: Option<u16>,
    /// How many hosts have them
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub hosts: u16,
    /// What goes between hosts, each way, GB/s
    #[arg(long, value_name = "NUMBER", default_value_t = 1.0, value_parser = above_zero)]
    pub network: f64,
    /// What products reach on the card to ask about, TFLOP/s [default: measured on this device]
    #[arg(long, value_name = "NUMBER", value_parser = above_zero)]
    pub tflops: Option<f64>,
    /// What goes between that card and its host, each way, GB/s [default: measured on this device]
    #[arg(long, value_name = "NUMBER", value_parser = above_zero)]
    pub link: Option<f64>,
    /// What a host's memory reads and writes, GB/s: for gradients that are added up and updates under `offload`
    /// [default: both measured on this machine]
    #[arg(long, value_name = "NUMBER", value_parser = above_zero)]
    pub host_bandwidth: Option<f64>,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

/// Which model a command runs.
#[derive(Clone, Debug, Args)]
pub struct ModelArgs {
    /// A folder in Hugging Face layout, a Hub id, or an embedded name (embedded:tiny)
    #[arg(long, value_name = "DIR")]
    pub model: String,
    /// A PEFT adapter on top of it
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// The vision tower's folder, for a model of the original LLaVA authors that names one elsewhere; a GGUF file's mmproj
    #[arg(long, value_name = "DIR")]
    pub vision_tower: Option<PathBuf>,
}

impl ModelArgs {
    /// `--model`, relative to the working folder.
    pub fn source(&self, working_dir: &std::path::Path) -> Source {
        Source::parse(&self.model, working_dir)
    }
}

#[derive(Debug, Args)]
pub struct ScoreArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// JSON array or JSON Lines
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    /// Where its pictures are [default: the data file's folder]
    #[arg(long, value_name = "DIR")]
    pub image_folder: Option<PathBuf>,
    /// Conversation template; `chat`: the model's own
    #[arg(long, value_name = "T", default_value = "v1")]
    pub version: String,
    #[command(flatten)]
    pub tune: TuneArgs,
    /// A file instead of stdout
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct EvalArgs {
    /// easy-vqa
    #[arg(value_name = "TASK")]
    pub task: String,
    /// A folder in Hugging Face layout, a Hub id, or an embedded name [default: embedded:tiny]
    #[arg(long, value_name = "DIR")]
    pub model: Option<String>,
    /// A PEFT adapter on top of it
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// The benchmark's data; not for easy-vqa, whose data is in the program
    #[arg(long, value_name = "PATH")]
    pub data: Option<PathBuf>,
    /// Conversation template; `chat`: the model's own
    #[arg(long, value_name = "T", default_value = "v1")]
    pub version: String,
    /// Only so many questions
    #[arg(long, value_name = "N", value_parser = at_least_one())]
    pub limit: Option<usize>,
    #[command(flatten)]
    pub tune: TuneArgs,
    /// Write every answer there
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct MergeArgs {
    /// A model in any layout that is read
    #[arg(long, value_name = "DIR")]
    pub model: String,
    /// The PEFT adapter that was trained on it
    #[arg(long, value_name = "DIR")]
    pub adapter: PathBuf,
    /// The folder to write, which must not be there yet
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// The dtype of all weights [default: each as it is; f32 where they are quantised]
    #[arg(long, value_enum, value_name = "DTYPE")]
    pub dtype: Option<FloatDtype>,
    /// The vision tower's folder, for a model of the original LLaVA authors that names one elsewhere; a GGUF file's mmproj
    #[arg(long, value_name = "DIR")]
    pub vision_tower: Option<PathBuf>,
}

/// What weights can be kept in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FloatDtype {
    Float32,
    Float16,
    Bfloat16,
}

impl FloatDtype {
    /// As files have it.
    pub fn stored(self) -> Dtype {
        match self {
            Self::Float32 => Dtype::F32,
            Self::Float16 => Dtype::F16,
            Self::Bfloat16 => Dtype::BF16,
        }
    }
}

#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// A model in any layout that is read: a folder, a GGUF file, or an embedded name
    #[arg(long, value_name = "PATH")]
    pub from: String,
    /// The folder to write, which must not be there yet
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// The layout to write
    #[arg(long, value_enum, value_name = "LAYOUT", default_value_t = Layout::Hf)]
    pub to: Layout,
    /// The dtype of all weights [default: each as it is, f32 where they are quantised; in GGUF float16, or bfloat16
    /// where they are]
    #[arg(long, value_enum, value_name = "DTYPE")]
    pub dtype: Option<WrittenDtype>,
    /// The vision tower's folder, for a model of the original LLaVA authors that names one elsewhere; a GGUF file's mmproj
    #[arg(long, value_name = "DIR")]
    pub vision_tower: Option<PathBuf>,
    /// The conversation template to write for a model without one [default: v1 for the original authors' LLaVA]
    #[arg(long, value_name = "T")]
    pub version: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Layout {
    /// Hugging Face's, for transformers
    Hf,
    /// The original LLaVA authors'
    Llava,
    /// llama.cpp's: a file for the language model, and one (mmproj) for the vision tower
    Gguf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WrittenDtype {
    Float32,
    Float16,
    Bfloat16,
    /// Blocks of 32 values in 8 bits each, in a GGUF file alone
    #[value(name = "q8_0")]
    Q8_0,
    /// The decoder's linears as NF4 with double quantisation, as bitsandbytes has them; all else as it is
    Nf4,
    /// The same as FP4
    Fp4,
}

impl WrittenDtype {
    /// The codes that weights become.
    pub fn quant_type(self) -> Option<QuantType> {
        match self {
            Self::Nf4 => Some(QuantType::Nf4),
            Self::Fp4 => Some(QuantType::Fp4),
            Self::Float32 | Self::Float16 | Self::Bfloat16 | Self::Q8_0 => None,
        }
    }
}

#[derive(Debug, Args)]
pub struct ShadersArgs {
    /// The folder to write them to
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

#[derive(Debug, Subcommand)]
pub enum RecipesCommand {
    /// List them
    Ls,
    /// Print one
    Show {
        #[arg(value_name = "NAME")]
        name: String,
    },
    /// Every config key, with its default and its meaning
    Keys,
    /// Write one to a file, to be changed
    Copy {
        #[arg(value_name = "NAME")]
        name: String,
        /// [default: NAME.toml]
        #[arg(value_name = "FILE")]
        path: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
pub struct CompletionsArgs {
    #[arg(value_name = "SHELL", value_enum)]
    pub shell: clap_complete::Shell,
}

fn at_least_one() -> impl TypedValueParser<Value = usize> {
    clap::value_parser!(u32).range(1..).map(|number| number as usize)
}

fn number(text: &str, valid: impl Fn(f32) -> bool, allowed: &str) -> Result<f32, String> {
    text.parse()
        .ok()
        .filter(|value: &f32| value.is_finite() && valid(*value))
        .ok_or_else(|| format!("must be {allowed}"))
}

/// `24GB`, `24GiB`, `8000MB`, or bytes.
fn above_zero(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|number| number.is_finite() && *number > 0.0);
    number.ok_or_else(|| "it is a number above 0".to_owned())
}

fn memory(text: &str) -> Result<u64, String> {
    let digits = text.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(text.len());
    let unit = match text[digits..].trim().to_lowercase().as_str() {
        "" | "b" => 1.0,
        "mb" | "m" => 1e6,
        "gb" | "g" => 1e9,
        "mib" => f64::from(1 << 20),
        "gib" => f64::from(1 << 30),
        _ => return Err("must be bytes, or end in MB, GB, MiB or GiB".to_owned()),
    };
    let number: f64 = text[..digits].parse().map_err(|_| "must begin with a number".to_owned())?;
    let bytes = (number * unit) as u64;
    if bytes < 1 << 20 { Err(format!("{bytes} bytes are no card's memory: is {number}GB meant?")) } else { Ok(bytes) }
}

/// Parses what was typed. When that does not give a command to run (`--help`, `--version`, wrong use), prints what
/// clap has to say and gives the exit code: 0, or 2 for wrong use.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Cli, u8> {
    Cli::try_parse_from(arguments).map_err(|error| {
        // A closed stdout is no reason to fail.
        let _ = error.print();
        u8::try_from(error.exit_code()).unwrap_or(2)
    })
}

/// The completion script of a shell.
pub fn completions(shell: clap_complete::Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "wgpu-llava", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cli(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("wgpu-llava").chain(line.split_whitespace()))
    }

    #[test]
    fn the_definition_is_sound_and_completes() {
        Cli::command().debug_assert();
        for shell in [clap_complete::Shell::Bash, clap_complete::Shell::Fish] {
            assert!(completions(shell).contains("wgpu-llava"));
        }
    }

    #[test]
    fn every_documented_line_parses() {
        for line in [
            "devices --json",
            "train",
            "train run.toml --recipe default --set r=1 --set finetune.r=2 --output-dir out --resume --dry-run",
            "bench step --hidden-size 64 --intermediate-size 128 --num-layers 2 --num-heads 4 --vocab-size 100 --batch 2 \
             --seq 32 --method full --gradient-checkpointing full --out a.json --compare b.json --json",
            "estimate run.toml --recipe default --set r=1 --memory 24GB --json",
            "generate --model m --adapter a --image a.png --image b.png --prompt hi --system s --version v0 \
             --max-new-tokens 3 --temperature 0.5 --top-p 0.9 --top-k 5 --repetition-penalty 1.1 --stop x --seed 4 --json",
            "generate --model m --prompt p --num-beams 5 --length-penalty -0.5",
            "chat --model m",
            "chat --model m --adapter a --image a.png --system s --version chat --max-new-tokens 3 --temperature 0.5 \
             --top-p 0.9 --top-k 5 --repetition-penalty 1.1 --seed 4",
            "score --model m --adapter a --data d.json --image-folder i --version plain --out o.jsonl",
            "eval easy-vqa",
            "eval easy-vqa --model m --adapter a --data d --limit 10 --out o --json",
            "convert --from a --out b --to gguf --dtype q8_0",
            "merge --model a --adapter b --out c --dtype float16",
            "shaders --out s",
            "recipes ls",
            "recipes show default",
            "recipes keys",
            "recipes copy default mine.toml",
            "completions zsh",
            "--device 0 --backend gl --precision float32 --quiet devices",
            "generate --model m --prompt p --device Radeon --verbose",
        ] {
            assert!(cli(line).is_ok(), "{line}");
        }
    }

    #[test]
    fn wrong_use_is_exit_code_2_and_help_is_0() {
        for line in [
            "trian",
            "generate --model m",
            "generate --model m --prompt p --temperature -1",
            "generate --model m --prompt p --top-p 0",
            "eval easy-vqa --limit 0",
            "estimate --memory lots",
            "estimate --memory 8",
            "--quiet --verbose devices",
            "--precision int8 devices",
            "--backend opengl devices",
        ] {
            assert_eq!(cli(line).unwrap_err().exit_code(), 2, "{line}");
        }
        for line in ["--help", "--version", "train --help"] {
            assert_eq!(cli(line).unwrap_err().exit_code(), 0, "{line}");
        }
    }
}
