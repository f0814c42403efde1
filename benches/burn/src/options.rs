//! The command line.

use std::path::PathBuf;

pub const USAGE: &str = "usage: burn-step [--steps N] [--warm-up N] [--hidden-size N] [--intermediate-size N] \
[--num-layers N]\n                 [--num-heads N] [--vocab-size N] [--batch N] [--seq N] [--json FILE]";

pub struct Options {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub vocab_size: usize,
    pub batch: usize,
    pub seq: usize,
    pub steps: usize,
    pub warm_up: usize,
    pub json: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            hidden_size: 256,
            intermediate_size: 688,
            num_layers: 4,
            num_heads: 4,
            vocab_size: 2048,
            batch: 4,
            seq: 128,
            steps: 5,
            warm_up: 2,
            json: None,
        }
    }
}

impl Options {
    /// # Errors
    /// An unknown option, a value that is none, sizes no model has.
    pub fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = Self::default();
        while let Some(name) = words.next() {
            let value = words.next().ok_or_else(|| format!("{name}: a value is missing"))?;
            let size = match name.as_str() {
                "--hidden-size" => &mut options.hidden_size,
                "--intermediate-size" => &mut options.intermediate_size,
                "--num-layers" => &mut options.num_layers,
                "--num-heads" => &mut options.num_heads,
                "--vocab-size" => &mut options.vocab_size,
                "--batch" => &mut options.batch,
                "--seq" => &mut options.seq,
                "--steps" => &mut options.steps,
                "--warm-up" => &mut options.warm_up,
                "--json" => {
                    options.json = Some(value.into());
                    continue;
                }
                _ => return Err(format!("{name} is not an option")),
            };
            *size = value.parse().map_err(|_| format!("{name}: {value} is not a whole number"))?;
            if *size == 0 && name != "--warm-up" {
                return Err(format!("{name} must not be 0"));
            }
        }
        if !options.hidden_size.is_multiple_of(2 * options.num_heads) {
            return Err("--hidden-size must be a multiple of twice --num-heads".to_owned());
        }
        if i32::try_from(options.vocab_size).is_err() {
            return Err("--vocab-size is too large".to_owned());
        }
        Ok(options)
    }

    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_heads
    }
}
