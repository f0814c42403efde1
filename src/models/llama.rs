//! The LLaMA decoder: RMSNorm, rotary attention with grouped queries, SwiGLU; no biases.

use std::sync::{Mutex, PoisonError};

use super::{config::LlamaConfig, names};
use crate::{
    autograd::{Var, functions},
    error::Result,
    gpu::Gpu,
    nn::{Forward, Id, Linear},
    ops::{
        attention::{Heads, Ranges},
        embedding, rope,
    },
    tensor::Tensor,
};

pub struct Llama {
    config: LlamaConfig,
    embed_tokens: Id,
    layers: Vec<Layer>,
    norm: Id,
    lm_head: Id,
    rope_table: Mutex<Option<Tensor>>,
}

pub struct Layer {
    input_layernorm: Id,
    post_attention_layernorm: Id,
    /// In the order of [`names::layer_linears`].
    pub q_proj: Linear,
    pub k_proj: Linear,
    pub v_proj: Linear,
    pub o_proj: Linear,
    pub gate_proj: Linear,
    pub up_proj: Linear,
    pub down_proj: Linear,
}

impl Layer {
    /// The seven linear layers by their names within the layer.
    pub fn linears_mut(&mut self) -> [(&'static str, &mut Linear); 7] {
        [
            ("self_attn.q_proj", &mut self.q_proj),
            ("self_attn.k_proj", &mut self.k_proj),
            ("self_attn.v_proj", &mut self.v_proj),
            ("self_attn.o_proj", &mut self.o_proj),
            ("mlp.gate_proj", &mut self.gate_proj),
            ("mlp.up_proj", &mut self.up_proj),
            ("mlp.down_proj", &mut self.down_proj),
        ]
    }
}

/// Where tokens stand and what they see.
pub struct Places<'a> {
    /// u32 [T]: position within each token's sequence.
    pub positions: Tensor,
    /// The largest position.
    pub last_position: usize,
    pub ranges: Ranges,
    /// Earlier keys and values, and the rows (u32 [T]) where these tokens' go.
    pub cache: Option<(&'a KvCache, Tensor)>,
}

impl Places<'_> {
    /// Sequences of the given lengths, packed, each causal within itself.
    pub fn packed(gpu: &Gpu, lengths: &[usize]) -> Self {
        let positions: Vec<u32> = lengths.iter().flat_map(|&length| 0..length as u32).collect();
        Self {
            positions: Tensor::from_u32(gpu, &positions, &[positions.len()]),
            last_position: lengths.iter().max().map_or(0, |longest| longest.saturating_sub(1)),
            ranges: Ranges::packed(gpu, lengths, true),
            cache: None,
        }
    }
}

/// Keys and values of earlier tokens: [rows, K * E] twice for every layer.
pub struct KvCache {
    layers: Vec<(Tensor, Tensor)>,
}

impl KvCache {
    pub fn new(gpu: &Gpu, config: &LlamaConfig, rows: usize) -> Self {
        let shape = [rows, config.num_key_value_heads * config.head_dim];
        let layer = || (Tensor::empty(gpu, &shape), Tensor::empty(gpu, &shape));
        Self { layers: (0..config.num_hidden_layers).map(|_| layer()).collect() }
    }
}

impl Llama {
    /// `load` puts the tensor of a canonical name among the parameters.
    pub fn new(config: &LlamaConfig, load: &mut dyn FnMut(&str) -> Result<Id>) -> Result<Self> {
        let embed_tokens = load(names::EMBED_TOKENS)?;
        let mut layers = Vec::new();
        for layer in 0..config.num_hidden_layers {
            let at = format!("language_model.model.layers.{layer}");
            let mut linear =
                |name: &str| -> Result<Linear> { Ok(Linear::new(load(&format!("{at}.{name}.weight"))?, None)) };
            layers.push(Layer {
                q_proj: linear("self_attn.q_proj")?,
                k_proj: linear("self_attn.k_proj")?,
                v_proj: linear("self_attn.v_proj")?,
                o_proj: linear("self_attn.o_proj")?,
                gate_proj: linear("mlp.gate_proj")?,
                up_proj: linear("mlp.up_proj")?,
                down_proj: linear("mlp.down_proj")?,
                input_layernorm: load(&format!("{at}.input_layernorm.weight"))?,
                post_attention_layernorm: load(&format!("{at}.post_attention_layernorm.weight"))?,
            });
        }
        let norm = load(names::FINAL_NORM)?;
        let lm_head = if config.tie_word_embeddings { embed_tokens } else { load(names::LM_HEAD)? };
        let config = config.clone();
        Ok(Self { config, embed_tokens, layers, norm, lm_head, rope_table: Mutex::default() })
    }

    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The output head [V, D]; the embedding itself when they are tied.
    pub fn lm_head(&self) -> Id {
        self.lm_head
    }

    pub fn layers_mut(&mut self) -> &mut [Layer] {
        &mut self.layers
    }

    /// Embeddings of ids [T, D]; `u32::MAX` leaves a row of zeros.
    pub fn embed(&self, forward: &mut Forward<'_>, ids: &[u32]) -> Var {
        functions::embedding(forward.tape, &forward.parameters.weight(self.embed_tokens), ids)
    }

    /// Embeddings [T, D] to the last hidden states [T, D], normalised.
    pub fn forward(&self, forward: &mut Forward<'_>, embeddings: &Var, places: &Places<'_>) -> Var {
        let table = self.rope_table(embeddings.value.gpu(), places.last_position + 1);
        let mut x = embeddings.clone();
        for (index, layer) in self.layers.iter().enumerate() {
            x = self.layer(forward, index, layer, &x, places, &table);
        }
        self.norm(forward, self.norm, &x)
    }

    /// One decoder layer alone, x [T, D] to [T, D].
    pub fn decoder_layer(&self, forward: &mut Forward<'_>, index: usize, x: &Var, places: &Places<'_>) -> Var {
        let table = self.rope_table(x.value.gpu(), places.last_position + 1);
        self.layer(forward, index, &self.layers[index], x, places, &table)
    }

    fn norm(&self, forward: &mut Forward<'_>, weight: Id, x: &Var) -> Var {
        functions::rms_norm(forward.tape, x, &forward.parameters.weight(weight), self.config.rms_norm_eps as f32)
    }

    /// Normalise, attend, add; normalise, transform, add.
    fn layer(
        &self,
        forward: &mut Forward<'_>,
        index: usize,
        layer: &Layer,
        x: &Var,
        places: &Places<'_>,
        table: &Tensor,
    ) -> Var {
        let h = self.norm(forward, layer.input_layernorm, x);
        let attended = self.self_attn(forward, index, layer, &h, places, table);
        let x = functions::add(forward.tape, x, &attended);

        let h = self.norm(forward, layer.post_attention_layernorm, &x);
        let gate = layer.gate_proj.forward(forward, &h);
        let up = layer.up_proj.forward(forward, &h);
        let h = functions::swiglu(forward.tape, &gate, &up);
        let h = layer.down_proj.forward(forward, &h);
        functions::add(forward.tape, &x, &h)
    }

    fn self_attn(
        &self,
        forward: &mut Forward<'_>,
        index: usize,
        layer: &Layer,
        x: &Var,
        places: &Places<'_>,
        table: &Tensor,
    ) -> Var {
        let heads = Heads {
            heads: self.config.num_attention_heads,
            kv_heads: self.config.num_key_value_heads,
            head_size: self.config.head_dim,
        };
        let q = layer.q_proj.forward(forward, x);
        let k = layer.k_proj.forward(forward, x);
        let mut v = layer.v_proj.forward(forward, x);
        let q = functions::rope(forward.tape, &q, &places.positions, table, heads.heads);
        let mut k = functions::rope(forward.tape, &k, &places.positions, table, heads.kv_heads);
        if let Some((cache, rows)) = &places.cache {
            let (keys, values) = &cache.layers[index];
            embedding::scatter(&k.value, rows, keys);
            embedding::scatter(&v.value, rows, values);
            (k, v) = (forward.tape.constant(keys.clone()), forward.tape.constant(values.clone()));
        }
        let attended = functions::attention(forward.tape, &q, &k, &v, &places.ranges, heads);
        layer.o_proj.forward(forward, &attended)
    }

    /// Cosines and sines for at least `positions` positions, kept and grown by doubling.
    fn rope_table(&self, gpu: &Gpu, positions: usize) -> Tensor {
        let mut kept = self.rope_table.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = kept.as_ref().filter(|table| table.shape()[0] >= positions) {
            return table.clone();
        }
        let size = positions.next_power_of_two().max(256);
        kept.insert(rope::table(gpu, size, self.config.head_dim, self.config.rope_theta)).clone()
    }
}
