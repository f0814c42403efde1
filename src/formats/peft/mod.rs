//! LoRA and DoRA adapters in PEFT layout: adapter_config.json beside adapter_model.safetensors (or .bin), with the
//! tensors that were trained whole inside, or beside it in the original LLaVA's non_lora_trainables.bin.
//!
//! `read` and `write` are the two directions, `config` what adapter_config.json says, `merge` what an adapter makes of
//! a model's weights.

use std::collections::{BTreeMap, BTreeSet};

use super::host_tensor::HostTensor;
use crate::models::{config::ModelConfig, names};

mod config;
mod merge;
mod pattern;
mod read;
mod write;

pub use config::CONFIG_FILE;
pub use merge::{Merge, MergeReport};
pub use pattern::Pattern;

pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// As PEFT wrote it up to 0.5, and on request since.
pub const TORCH_WEIGHTS_FILE: &str = "adapter_model.bin";
/// What the original LLaVA's trainer saves beside the adapter: the projector.
pub const NON_LORA_FILE: &str = "non_lora_trainables.bin";
/// Before the wrapped model's own module path.
const PREFIX: &str = "base_model.model.";

/// What adapts one linear: y += scale · B·(A·x), and for DoRA the output's columns times magnitude / ‖W + scale·B·A‖.
///
/// The embeddings, whose weight is `[V, D]`, have the same form: PEFT's lora_embedding_B transposed is A, and
/// lora_embedding_A transposed is B.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraWeights {
    /// `[r, in]`
    pub lora_a: HostTensor,
    /// `[out, r]`
    pub lora_b: HostTensor,
    /// alpha / r, or alpha / √r for rank-stabilised LoRA.
    pub scale: f64,
    /// DoRA's `lora_magnitude_vector` `[out]`: the length of each row of the adapted weight.
    pub magnitude: Option<HostTensor>,
    /// The bias `[out]` of lora_B, where the adapter was made with `lora_bias`; it counts times `scale`.
    pub bias: Option<HostTensor>,
}

impl LoraWeights {
    /// Plain LoRA.
    pub fn new(lora_a: HostTensor, lora_b: HostTensor, scale: f64) -> Self {
        Self { lora_a, lora_b, scale, magnitude: None, bias: None }
    }

    pub fn rank(&self) -> usize {
        self.lora_a.shape.first().copied().unwrap_or(0)
    }
}

/// An adapter of a model's linears and embeddings, with whole tensors that were trained beside it.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    pub r: usize,
    pub lora_alpha: f64,
    pub lora_dropout: f64,
    pub use_rslora: bool,
    /// By canonical module name: `language_model.model.layers.0.self_attn.q_proj`.
    pub modules: BTreeMap<String, LoraWeights>,
    /// Tensors that replace the model's, by canonical name; of a `linear` projector the one layer.
    pub saved: BTreeMap<String, HostTensor>,
    /// The model ties its head to its embeddings, and the adapter changes one of them alone: as in PEFT, the other
    /// keeps the model's values.
    pub unties_head: bool,
}

impl Adapter {
    /// One without any weights yet.
    pub fn new(r: usize, lora_alpha: f64, lora_dropout: f64, use_rslora: bool) -> Self {
        let (modules, saved) = (BTreeMap::new(), BTreeMap::new());
        Self { r, lora_alpha, lora_dropout, use_rslora, modules, saved, unties_head: false }
    }

    /// The factor of B·A for a module of rank `r`, before any alpha_pattern.
    pub fn scale(&self, r: usize) -> f64 {
        scale(self.lora_alpha, r, self.use_rslora)
    }

    /// The last parts of the adapted modules' names, sorted: `down_proj`, `q_proj`, …
    pub fn target_modules(&self) -> Vec<String> {
        let leaves: BTreeSet<&str> = self.modules.keys().map(|name| leaf(name)).collect();
        leaves.into_iter().map(str::to_owned).collect()
    }

    /// Whether the adapter is of DoRA's kind.
    pub fn use_dora(&self) -> bool {
        self.modules.values().any(|module| module.magnitude.is_some())
    }

    /// What in this adapter goes beyond A, B and magnitudes of the decoder's linears, which is what training moves;
    /// `None` when nothing does.
    pub fn beyond_training(&self, config: &ModelConfig) -> Option<String> {
        let linears: BTreeSet<String> =
            names::decoder_linears(config.text()).into_iter().map(|(name, _)| name).collect();
        if self.modules.values().any(|module| module.bias.is_some()) {
            return Some("lora_bias".to_owned());
        }
        self.modules.keys().find(|name| !linears.contains(*name)).map(|name| format!("LoRA on {name}"))
    }
}

/// The module that holds the word embeddings.
fn embeddings() -> &'static str {
    names::EMBED_TOKENS.trim_end_matches(".weight")
}

/// The output head's module.
fn head() -> &'static str {
    names::LM_HEAD.trim_end_matches(".weight")
}

fn scale(alpha: f64, r: usize, use_rslora: bool) -> f64 {
    alpha / if use_rslora { (r as f64).sqrt() } else { r as f64 }
}

fn leaf(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}

/// The matrix `[rows, columns]` the other way round.
fn transposed(matrix: &HostTensor) -> HostTensor {
    let &[rows, columns] = matrix.shape.as_slice() else { return matrix.clone() };
    let data = (0..columns).flat_map(|column| (0..rows).map(move |row| matrix.data[row * columns + column]));
    HostTensor::new([columns, rows], data.collect())
}
