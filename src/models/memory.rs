//! What the activations of one micro-batch take on the device, told before anything runs.
//!
//! A pass holds what its layers keep, all of them at once, and what is at work beside that: the head with a chunk of
//! logits, or one layer on its way back. The peak is `layers * kept_per_layer + max(head, working_set)`, in bytes, each
//! tensor in whole units of the device's pool. `tests/memory.rs` measures it. Copies that products make of their operands on
//! older software Vulkan are not in it (`train::estimate` counts them).

use super::config::{ClipVisionConfig, LlamaConfig, LlavaConfig, ProjectorType};
use crate::{
    autograd::{Checkpointing, Checkpoints, functions},
    gpu::UNIT,
    tensor::Dtype,
};

/// Bytes of a tensor of so many elements.
fn bytes(elements: usize, dtype: Dtype) -> u64 {
    ((elements * dtype.bytes()) as u64).next_multiple_of(4).max(1).next_multiple_of(UNIT)
}

fn f32s(elements: usize) -> u64 {
    bytes(elements, Dtype::F32)
}

/// Adapters beside the linear layers of the decoder.
#[derive(Clone, Copy)]
pub struct Adapters<'a> {
    pub r: usize,
    pub dropout: bool,
    pub dora: bool,
    /// Whether a linear of a layer (`self_attn.q_proj`, ...) has one.
    pub on: &'a dyn Fn(&str) -> bool,
}

/// What trains of the decoder's layers.
#[derive(Clone, Copy)]
pub enum Tuning<'a> {
    /// Nothing; gradients pass through.
    Frozen,
    /// All of them.
    Full,
    Lora(Adapters<'a>),
}

/// What a decoder's memory follows from.
#[derive(Clone, Copy)]
pub struct DecoderPass<'a> {
    pub config: &'a LlamaConfig,
    pub tuning: Tuning<'a>,
    pub checkpoints: Checkpoints,
    /// Whether a gradient of the embeddings is wanted: they train, or a projector does.
    pub embeddings_train: bool,
    /// Rows, pictures' included.
    pub tokens: usize,
    /// Rows of the longest sequence among them.
    pub longest: usize,
    /// Supervised positions.
    pub targets: usize,
}

/// Sizes of a layer's values in bytes.
struct Sizes {
    hidden: u64,
    queries: u64,
    keys: u64,
    /// Log-sum-exp and delta.
    stats: u64,
    inner: u64,
    row: u64,
}

impl DecoderPass<'_> {
    fn sizes(&self) -> Sizes {
        let (t, c) = (self.tokens, self.config);
        Sizes {
            hidden: f32s(t * c.hidden_size),
            queries: f32s(t * c.num_attention_heads * c.head_dim),
            keys: f32s(t * c.num_key_value_heads * c.head_dim),
            stats: f32s(t * c.num_attention_heads * 2),
            inner: f32s(t * c.intermediate_size),
            row: f32s(t),
        }
    }

    /// Whether the backward of a linear reads its input.
    fn reads_input(&self, name: &str) -> bool {
        match self.tuning {
            Tuning::Frozen => false,
            Tuning::Full => true,
            Tuning::Lora(adapters) => (adapters.on)(name),
        }
    }

    /// What an adapter's backward reads beside the linear's input: x A^T, and DoRA's columns before they are scaled.
    fn of_adapter(&self, name: &str, outputs: u64) -> u64 {
        match self.tuning {
            Tuning::Lora(adapters) if (adapters.on)(name) => {
                f32s(self.tokens * adapters.r) + if adapters.dora { outputs } else { 0 }
            }
            _ => 0,
        }
    }

    /// Bytes that attention's backward reads.
    fn attention(&self) -> u64 {
        let Sizes { queries, keys, stats, .. } = self.sizes();
        2 * queries + 2 * keys + stats
    }

    /// Bytes that a layer keeps of that where it is dear.
    fn dear(&self) -> u64 {
        let (c, dtype) = (self.config, self.checkpoints.dtype);
        let heads = |count: usize| bytes(self.tokens * count * c.head_dim, dtype);
        2 * heads(c.num_attention_heads) + 2 * heads(c.num_key_value_heads) + self.sizes().stats
    }

    /// Bytes of a layer's inner values that its backward reads.
    fn inner(&self) -> u64 {
        let Sizes { hidden, queries, keys, inner, row, .. } = self.sizes();
        let [q, k, v, o] = ["q", "k", "v", "o"].map(|name| format!("self_attn.{name}_proj"));
        let [gate, up, down] = ["gate", "up", "down"].map(|name| format!("mlp.{name}_proj"));
        let any = |names: &[&String]| u64::from(names.iter().any(|name| self.reads_input(name)));
        let adapters =
            [(&q, queries), (&k, keys), (&v, keys), (&o, hidden), (&gate, inner), (&up, inner), (&down, hidden)];
        let adapters: u64 = adapters.into_iter().map(|(name, outputs)| self.of_adapter(name, outputs)).sum();
        let first = row + any(&[&q, &k, &v]) * hidden + self.attention();
        let second = hidden + row + any(&[&gate, &up]) * hidden + 2 * inner + any(&[&down]) * inner;
        first + second + adapters
    }

    /// Bytes that one layer keeps on the device from the forward to its backward.
    pub fn kept_per_layer(&self) -> u64 {
        let input = bytes(self.tokens * self.config.hidden_size, self.checkpoints.dtype);
        match self.checkpoints.mode {
            Checkpointing::None => self.sizes().hidden + self.inner(),
            Checkpointing::Selective => input + self.dear(),
            Checkpointing::Full => input,
            Checkpointing::Offload => 0,
        }
    }

    /// Bytes that one layer's input takes on the host, where it goes there.
    pub fn host_bytes_per_layer(&self) -> u64 {
        let input = self.tokens * self.config.hidden_size * self.checkpoints.dtype.bytes();
        if self.checkpoints.mode == Checkpointing::Offload { input as u64 } else { 0 }
    }

    /// Bytes at work, beside what all layers keep, while the last layer runs back.
    pub fn working_set(&self) -> u64 {
        let Sizes { hidden, .. } = self.sizes();
        let again = match self.checkpoints.mode {
            Checkpointing::None => return self.backward(0),
            Checkpointing::Selective => self.inner() - self.dear(),
            Checkpointing::Full | Checkpointing::Offload => self.inner(),
        };
        // The input is there as f32, in place of what was kept of it.
        let kept = match self.checkpoints.mode {
            Checkpointing::Offload => 0,
            _ => bytes(self.tokens * self.config.hidden_size, self.checkpoints.dtype),
        };
        again + hidden - kept + self.backward(hidden)
    }

    /// The most that a layer's backward adds to its inner values, whose memory it frees as it goes; `unread` is what
    /// the layer's own output takes when it runs again.
    fn backward(&self, unread: u64) -> u64 {
        let Sizes { hidden, queries, keys, inner, .. } = self.sizes();
        let drops = matches!(self.tuning, Tuning::Lora(adapters) if adapters.dropout);
        // Of a linear: du, then the input with its dropout, then the gradients through adapter and weight.
        let linear = |name: &str, input: u64, last: bool| {
            let (reads, drops) = (self.reads_input(name), drops && self.reads_input(name));
            let freed = if reads && last { input } else { 0 };
            let through = if drops { 2 * input } else { input };
            let masked = if drops { input } else { 0 };
            self.of_adapter(name, 0) as i64 + (masked as i64).max(through as i64 - freed as i64)
        };
        let [hidden, inner] = [hidden, inner].map(|size| size as i64);
        let keeps = |name: &str, size: i64| if self.reads_input(name) { size } else { 0 };
        let down = hidden + linear("mlp.down_proj", inner as u64, true);
        let mut freed = keeps("mlp.down_proj", inner);
        let swiglu = hidden + inner - freed;
        let up = hidden - freed + linear("mlp.up_proj", hidden as u64, false);
        freed += inner;
        let gate = 2 * hidden - freed + linear("mlp.gate_proj", hidden as u64, true);
        freed += inner + keeps("mlp.gate_proj", hidden).max(keeps("mlp.up_proj", hidden));
        let norm = 3 * hidden - freed;
        freed += hidden;
        let output = hidden - freed + linear("self_attn.o_proj", queries, false);
        let attention = hidden - freed + 2 * (queries + keys) as i64;
        let first = unread as i64 + hidden;
        [first, down, swiglu, up, gate, norm, output, attention].into_iter().max().unwrap_or(0).max(0) as u64
    }

    /// Bytes at work, beside what all layers keep, from the last layer's output to the losses and back.
    pub fn head(&self) -> u64 {
        let Sizes { hidden, row, .. } = self.sizes();
        let (d, v) = (self.config.hidden_size, self.config.vocab_size);
        let picked = f32s(self.targets * d);
        let chunk = functions::head_chunk(self.targets, d, v).min(self.targets);
        let logits = f32s(chunk * v) + 2 * f32s(chunk) + f32s(self.targets);
        let backward = 2 * hidden;
        hidden + row + (hidden + picked).max(2 * picked + logits).max(backward)
    }

    /// Bytes that say where tokens stand and what they see.
    pub fn places(&self) -> u64 {
        let positions = self.longest.next_power_of_two().max(256);
        f32s(positions * self.config.head_dim) + 2 * f32s(2 * self.tokens) + 2 * f32s(self.tokens)
    }

    /// The most bytes at once, weights and gradients of weights left out.
    pub fn peak(&self) -> u64 {
        let kept = self.config.num_hidden_layers as u64 * self.kept_per_layer();
        // Nothing runs back through what comes before the first adapter.
        let sizes = self.sizes();
        let unread = self.checkpoints.mode == Checkpointing::None && !self.embeddings_train;
        let less = if unread { sizes.hidden + sizes.row } else { 0 };
        self.places() + kept - less + self.head().max(self.working_set())
    }
}

/// What the memory of a tower that trains follows from.
#[derive(Clone, Copy)]
pub struct TowerPass<'a> {
    pub config: &'a ClipVisionConfig,
    /// Those that are run ([`super::config::LlavaConfig::vision_layers_used`]).
    pub layers: usize,
    pub checkpoints: Checkpoints,
    pub pictures: usize,
}

impl TowerPass<'_> {
    fn rows(&self) -> usize {
        self.pictures * (self.config.num_patches() + 1)
    }

    /// Bytes of [rows, D], [rows, F], and attention's and a norm's statistics.
    fn sizes(&self) -> [u64; 4] {
        let (rows, c) = (self.rows(), self.config);
        [rows * c.hidden_size, rows * c.intermediate_size, rows * c.num_attention_heads * 2, rows * 2].map(f32s)
    }

    fn inner(&self) -> u64 {
        let [hidden, inner, stats, norm] = self.sizes();
        7 * hidden + stats + 2 * norm + 2 * inner
    }

    /// As [`DecoderPass::kept_per_layer`].
    pub fn kept_per_layer(&self) -> u64 {
        let [hidden, _, stats, _] = self.sizes();
        let input = bytes(self.rows() * self.config.hidden_size, self.checkpoints.dtype);
        match self.checkpoints.mode {
            Checkpointing::None => hidden + self.inner(),
            Checkpointing::Selective => 5 * input + stats,
            Checkpointing::Full => input,
            Checkpointing::Offload => 0,
        }
    }

    /// As [`DecoderPass::working_set`].
    pub fn working_set(&self) -> u64 {
        let [hidden, inner, stats, _] = self.sizes();
        let backward = hidden + inner;
        let input = bytes(self.rows() * self.config.hidden_size, self.checkpoints.dtype);
        match self.checkpoints.mode {
            Checkpointing::None => backward,
            Checkpointing::Selective => self.inner() - stats + hidden - 5 * input + backward,
            Checkpointing::Full => self.inner() + hidden - input + backward,
            Checkpointing::Offload => self.inner() + hidden + backward,
        }
    }

    /// Bytes that are kept of what comes before the layers: patches, and what the first norm reads.
    pub fn before(&self) -> u64 {
        let c = self.config;
        let [hidden, _, _, norm] = self.sizes();
        let patches = self.pictures * c.num_patches() * c.num_channels * c.patch_size * c.patch_size;
        f32s(patches) + hidden + norm
    }

    /// The most bytes at once while the tower runs and nothing is kept: it is frozen.
    pub fn frozen(&self) -> u64 {
        let [hidden, inner, stats, _] = self.sizes();
        (5 * hidden + stats).max(hidden + 2 * inner)
    }

    /// Bytes that stay from the tower's forward to its backward.
    pub fn kept(&self) -> u64 {
        self.before() + self.layers as u64 * self.kept_per_layer()
    }
}

/// Where a pass has its pictures' features from.
#[derive(Clone, Copy)]
pub enum Features<'a> {
    /// They were computed before, and are there while the pass lasts.
    Given,
    Frozen(TowerPass<'a>),
    Trained(TowerPass<'a>),
}

/// What the memory of a LLaVA's pass follows from.
#[derive(Clone, Copy)]
pub struct LlavaPass<'a> {
    pub config: &'a LlavaConfig,
    pub decoder: DecoderPass<'a>,
    pub features: Features<'a>,
    pub projector_trains: bool,
    pub pictures: usize,
}

impl LlavaPass<'_> {
    /// Bytes that are kept before the decoder begins.
    fn kept(&self) -> u64 {
        let (rows, c) = (self.pictures * self.config.image_seq_length(), self.config);
        let (features, projected) = (f32s(rows * c.vision_config.hidden_size), f32s(rows * c.text_config.hidden_size));
        let (tower, given) = match self.features {
            Features::Given => (0, true),
            Features::Frozen(_) => (0, false),
            Features::Trained(tower) => (tower.kept(), false),
        };
        let passes = self.projector_trains || matches!(self.features, Features::Trained(_));
        let read = if c.projector == ProjectorType::Mlp2xGelu {
            u64::from(passes) * projected + u64::from(self.projector_trains) * projected
        } else {
            0
        };
        tower + u64::from(given || self.projector_trains) * features + read + f32s(rows)
    }

    /// As [`DecoderPass::peak`], of the whole.
    pub fn peak(&self) -> u64 {
        let decoder = self.kept() + self.decoder.peak();
        match self.features {
            Features::Given => decoder,
            Features::Frozen(tower) => decoder.max(tower.frozen()),
            Features::Trained(tower) => decoder.max(tower.kept() + tower.working_set()),
        }
    }
}
