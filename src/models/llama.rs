//! The LLaMA decoder and its near relatives: RMSNorm, rotary attention with grouped queries, SwiGLU.

use std::sync::{Arc, Mutex, PoisonError};

use super::{config::LlamaConfig, names, rotary, streaming::Streaming};
use crate::{
    autograd::{Checkpoints, Var, Weight, checkpoint, functions},
    error::Result,
    gpu::Gpu,
    nn::{Forward, Id, Linear, Parameters},
    ops::{
        attention::{Heads, Mask, Ranges},
        elementwise, embedding, rope,
    },
    tensor::Tensor,
};

pub struct Llama {
    config: LlamaConfig,
    embed_tokens: Id,
    /// Shared with what the tape holds to run a layer again.
    layers: Arc<Vec<Layer>>,
    norm: Id,
    lm_head: Id,
    /// Of embeddings that are the head too, and are on another device than the last layers.
    head_copy: Option<Tensor>,
    /// One for each device.
    rope_tables: Mutex<Vec<Tensor>>,
    checkpoints: Checkpoints,
    streaming: Option<Arc<Streaming>>,
}

#[derive(Clone)]
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

/// What all layers share.
#[derive(Clone, Copy)]
struct Shape {
    heads: Heads,
    eps: f32,
}

fn norm(forward: &mut Forward<'_>, weight: Id, x: &Var, shape: Shape) -> Var {
    functions::rms_norm(forward.tape, x, &forward.parameters.weight(weight), shape.eps)
}

/// A layer's keys and values of earlier tokens, and the rows where these tokens' go.
type Cached<'a> = Option<(&'a (Tensor, Tensor), &'a Tensor)>;

/// Values are given away where they are read last, so that their memory is free as early as can be.
impl Layer {
    /// Normalise, attend, add; normalise, transform, add.
    fn forward(&self, forward: &mut Forward<'_>, shape: Shape, x: Var, places: &Places<'_>, cached: Cached<'_>) -> Var {
        let h = norm(forward, self.input_layernorm, &x, shape);
        let attended = self.self_attn(forward, shape, h, places, cached);
        let x = self.o_proj.forward_onto(forward, attended, x);

        let h = norm(forward, self.post_attention_layernorm, &x, shape);
        let product = Linear::forward_gated(&self.gate_proj, &self.up_proj, forward, h);
        // A layer that runs again does so for its inner values alone. DoRA reads what it scales.
        let unread = forward.tape.runs_again() && self.down_proj.lora.as_ref().is_none_or(|lora| lora.dora.is_none());
        forward.tape.unread(unread);
        let y = self.down_proj.forward_onto(forward, product, x);
        forward.tape.unread(false);
        y
    }

    /// Up to the projection of what was attended.
    fn self_attn(
        &self,
        forward: &mut Forward<'_>,
        shape: Shape,
        x: Var,
        places: &Places<'_>,
        cached: Cached<'_>,
    ) -> Var {
        let heads = Heads { in_f16: self.q_proj.may_round(forward), ..shape.heads };
        forward.tape.dear_products(true);
        let [q, k, mut v] = Linear::forward_all([&self.q_proj, &self.k_proj, &self.v_proj], forward, &x);
        forward.tape.dear_products(false);
        drop(x);
        let Rotary { table, rows } = &places.rotary;
        let q = functions::rope(forward.tape, q, rows, table, heads.heads);
        let mut k = functions::rope(forward.tape, k, rows, table, heads.kv_heads);
        if let Some(((keys, values), rows)) = cached {
            embedding::scatter(&k.value, rows, keys);
            embedding::scatter(&v.value, rows, values);
            (k, v) = (forward.tape.constant(keys.clone()), forward.tape.constant(values.clone()));
        }
        functions::attention(forward.tape, q, k, v, &places.ranges, heads)
    }
}

/// Where tokens stand and what they see.
pub struct Places<'a> {
    pub rotary: Rotary,
    pub ranges: Ranges,
    /// Earlier keys and values, and the rows (u32 [T]) where these tokens' go.
    pub cache: Option<(&'a KvCache, Tensor)>,
}

/// How far each token is rotated.
#[derive(Clone)]
pub struct Rotary {
    /// [rows, 2, E/2], see [`rope::table`].
    table: Tensor,
    /// u32 [T]: each token's row; its position, unless frequencies follow the length of its sequence.
    rows: Tensor,
}

/// Neighbouring tokens of a sequence.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// Position of the first one.
    pub first: usize,
    pub count: usize,
    /// Tokens of the sequence as far as it is known.
    pub length: usize,
}

/// Keys and values of earlier tokens: [rows, K * E] twice for every layer.
pub struct KvCache {
    layers: Vec<(Tensor, Tensor)>,
}

impl KvCache {
    /// Each layer's part is on the device that has the layer.
    pub fn new(model: &Llama, parameters: &Parameters, rows: usize) -> Self {
        let shape = [rows, model.config.num_key_value_heads * model.config.head_dim];
        let layer = |index| [(); 2].map(|()| Tensor::empty(model.layer_gpu(parameters, index), &shape)).into();
        Self { layers: (0..model.layers.len()).map(layer).collect() }
    }

    /// As [`KvCache::new`], with zeros: rows not written yet then have no weight with any kernel.
    pub fn zeros(model: &Llama, parameters: &Parameters, rows: usize) -> Self {
        let cache = Self::new(model, parameters, rows);
        for (keys, values) in &cache.layers {
            elementwise::fill(keys, 0.0);
            elementwise::fill(values, 0.0);
        }
        cache
    }

    /// Copies `rows` rows, from row `from` on, to another cache's rows from `to` on.
    pub fn copy_rows(&self, other: &Self, from: usize, to: usize, rows: usize) {
        if rows == 0 {
            return;
        }
        for ((keys, values), (other_keys, other_values)) in self.layers.iter().zip(&other.layers) {
            other_keys.copy_rows(to, keys, from, rows);
            other_values.copy_rows(to, values, from, rows);
        }
    }
}

impl Llama {
    /// `load` puts the tensor of a canonical name among the parameters.
    pub fn new(config: &LlamaConfig, load: &mut dyn FnMut(&str) -> Result<Id>) -> Result<Self> {
        let embed_tokens = load(names::EMBED_TOKENS)?;
        let mut layers = Vec::new();
        for layer in 0..config.num_hidden_layers {
            let at = format!("language_model.model.layers.{layer}");
            let mut linear = |name: &str| -> Result<Linear> {
                let weight = load(&format!("{at}.{name}.weight"))?;
                let bias = names::has_bias(config, name).then(|| load(&format!("{at}.{name}.bias"))).transpose()?;
                Ok(Linear::new(weight, bias))
            };
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
        let layers = Arc::new(layers);
        let checkpoints = Checkpoints::default();
        Ok(Self {
            config,
            embed_tokens,
            layers,
            norm,
            lm_head,
            head_copy: None,
            rope_tables: Mutex::default(),
            checkpoints,
            streaming: None,
        })
    }

    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The device that has a layer.
    fn layer_gpu<'a>(&self, parameters: &'a Parameters, layer: usize) -> &'a Gpu {
        parameters.get(self.layers[layer].input_layernorm).value.gpu()
    }

    /// The output head [V, D]; the embedding itself when they are tied.
    pub fn lm_head(&self) -> Id {
        self.lm_head
    }

    /// The output head as the losses read it.
    pub fn head(&self, parameters: &Parameters) -> Weight {
        self.head_copy.clone().map_or_else(|| parameters.weight(self.lm_head), Weight::frozen)
    }

    /// Where the losses read the output head.
    pub fn head_gpu<'a>(&'a self, parameters: &'a Parameters) -> &'a Gpu {
        self.head_copy.as_ref().unwrap_or(&parameters.get(self.lm_head).value).gpu()
    }

    /// What is read in place of embeddings that are the head too.
    pub fn set_head_copy(&mut self, copy: Tensor) {
        self.head_copy = Some(copy);
    }

    /// Gives a model whose head is its embeddings a head of its own.
    pub fn untie(&mut self, lm_head: Id) {
        (self.lm_head, self.head_copy) = (lm_head, None);
        self.config.tie_word_embeddings = false;
    }

    pub fn layers_mut(&mut self) -> &mut [Layer] {
        Arc::make_mut(&mut self.layers).as_mut_slice()
    }

    /// Layers that take turns on the device.
    pub fn set_streaming(&mut self, streaming: Option<Streaming>) {
        self.streaming = streaming.map(Arc::new);
    }

    pub fn streaming(&self) -> Option<&Arc<Streaming>> {
        self.streaming.as_ref()
    }

    /// What the layers keep for their backward from now on.
    pub fn set_checkpoints(&mut self, checkpoints: Checkpoints) {
        self.checkpoints = checkpoints;
    }

    /// Embeddings of ids [T, D]; `u32::MAX` leaves a row of zeros.
    pub fn embed(&self, forward: &mut Forward<'_>, ids: &[u32]) -> Var {
        functions::embedding(forward.tape, &forward.parameters.weight(self.embed_tokens), ids)
    }

    /// What tokens see of their own sequence.
    pub fn mask(&self) -> Mask {
        self.config.sliding_window.map_or(Mask::Causal, Mask::Window)
    }

    /// Sequences of the given lengths, packed, each attending to itself.
    pub fn packed(&self, gpu: &Gpu, lengths: &[usize]) -> Places<'static> {
        let spans: Vec<Span> = lengths.iter().map(|&length| Span { first: 0, count: length, length }).collect();
        Places { rotary: self.rotary(gpu, &spans), ranges: Ranges::packed(gpu, lengths, self.mask()), cache: None }
    }

    /// Embeddings [T, D] to the last hidden states [T, D], normalised. Before each layer, and before the norm, stands a
    /// milestone with the number of layers before it. What comes to a layer on another device goes there, and where its
    /// tokens stand is asked for each device anew.
    pub fn forward<'a>(
        &self,
        forward: &mut Forward<'_>,
        embeddings: Var,
        places_on: &dyn Fn(&Gpu) -> Places<'a>,
    ) -> Var {
        let mut x = embeddings;
        let mut places = places_on(x.value.gpu());
        for index in 0..self.layers.len() {
            forward.milestone(index);
            if let Some(streaming) = &self.streaming {
                streaming.bring(index, Some(index + 1));
            }
            let gpu = self.layer_gpu(forward.parameters, index);
            if !x.value.gpu().is(gpu) {
                drop(places);
                x = functions::to_device(forward.tape, x, gpu);
                places = places_on(gpu);
            }
            x = self.decoder_layer(forward, index, x, &places);
            if let Some(streaming) = self.streaming.clone() {
                forward.tape.on_return(move || streaming.bring(index, index.checked_sub(1)));
            }
        }
        forward.milestone(self.layers.len());
        norm(forward, self.norm, &x, self.shape())
    }

    /// One decoder layer, x [T, D] to [T, D].
    pub fn decoder_layer(&self, forward: &mut Forward<'_>, index: usize, x: Var, places: &Places<'_>) -> Var {
        let shape = self.shape();
        if !forward.tape.is_recording() {
            let cache = places.cache.as_ref().map(|(cache, rows)| (&cache.layers[index], rows));
            return self.layers[index].forward(forward, shape, x, places, cache);
        }
        assert!(places.cache.is_none(), "a pass that trains has no cache");
        let places = Places { rotary: places.rotary.clone(), ranges: places.ranges.clone(), cache: None };
        let (layers, parameters, dropout) = (self.layers.clone(), forward.parameters.clone(), forward.dropout);
        checkpoint(forward.tape, x, self.checkpoints, move |tape, x| {
            let forward = &mut Forward { tape, parameters: &parameters, dropout, before: None };
            layers[index].forward(forward, shape, x, &places, None)
        })
    }

    fn shape(&self) -> Shape {
        let heads = Heads {
            heads: self.config.num_attention_heads,
            kv_heads: self.config.num_key_value_heads,
            head_size: self.config.head_dim,
            in_f16: false,
        };
        Shape { heads, eps: self.config.rms_norm_eps as f32 }
    }

    /// Whether the rotations of a sequence of this length differ from those of shorter ones.
    pub fn rotates_by_length(&self, length: usize) -> bool {
        rotary::depends_on_length(&self.config, length)
    }

    /// Rotations of tokens that stand in `spans`, in order.
    pub fn rotary(&self, gpu: &Gpu, spans: &[Span]) -> Rotary {
        let upload = |rows: Vec<u32>| Tensor::from_u32(gpu, &rows, &[rows.len()]);
        let end = spans.iter().map(|span| span.first + span.count).max().unwrap_or(0);
        if !spans.iter().any(|span| rotary::depends_on_length(&self.config, span.length)) {
            let rows = spans.iter().flat_map(|span| (span.first..span.first + span.count).map(|row| row as u32));
            return Rotary { rows: upload(rows.collect()), table: self.rope_table(gpu, end) };
        }
        // Every sequence has frequencies of its own: a row for each token.
        let frequencies: Vec<Vec<f32>> =
            spans.iter().map(|span| rotary::frequencies(&self.config, span.length)).collect();
        let rows = spans.iter().zip(&frequencies).flat_map(|(span, frequencies)| {
            (span.first..span.first + span.count).map(|position| (position, frequencies.as_slice()))
        });
        let tokens: usize = spans.iter().map(|span| span.count).sum();
        Rotary { table: rope::table(gpu, rows), rows: upload((0..tokens as u32).collect()) }
    }

    /// Cosines and sines for at least `positions` positions, kept and grown by doubling.
    fn rope_table(&self, gpu: &Gpu, positions: usize) -> Tensor {
        let mut kept = self.rope_tables.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = kept.iter().find(|table| table.gpu().is(gpu) && table.shape()[0] >= positions) {
            return table.clone();
        }
        kept.retain(|table| !table.gpu().is(gpu));
        let size = positions.next_power_of_two().max(256);
        let frequencies = rotary::frequencies(&self.config, 0);
        let table = rope::table(gpu, (0..size).map(|position| (position, frequencies.as_slice())));
        kept.push(table.clone());
        table
    }
}
