//! CLIP's vision tower up to the hidden state that LLaVA selects; what comes after it is never computed.

use std::sync::Arc;

use super::config::{ClipVisionConfig, FeatureSelect};
use crate::{
    autograd::{Checkpoints, Var, checkpoint, functions},
    error::Result,
    nn::{Forward, Id, Linear},
    ops::{
        activation::Activation,
        attention::{Heads, Mask, Ranges},
    },
    tensor::Tensor,
};

pub struct ClipVision {
    config: ClipVisionConfig,
    select: FeatureSelect,
    patch_embedding: Linear,
    class_embedding: Id,
    position_embedding: Id,
    pre_layrnorm: LayerNorm,
    /// Shared with what the tape holds to run a layer again.
    layers: Arc<Vec<Layer>>,
    checkpoints: Checkpoints,
}

struct LayerNorm {
    weight: Id,
    bias: Id,
}

struct Layer {
    layer_norm1: LayerNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

impl ClipVision {
    /// A tower of the first `layers` layers; `load` puts the tensor of a canonical name among the parameters.
    pub fn new(
        config: &ClipVisionConfig,
        layers: usize,
        select: FeatureSelect,
        load: &mut dyn FnMut(&str) -> Result<Id>,
    ) -> Result<Self> {
        let root = "vision_tower.vision_model";
        let norm = |load: &mut dyn FnMut(&str) -> Result<Id>, name: String| -> Result<LayerNorm> {
            Ok(LayerNorm { weight: load(&format!("{name}.weight"))?, bias: load(&format!("{name}.bias"))? })
        };
        let linear = |load: &mut dyn FnMut(&str) -> Result<Id>, name: String| -> Result<Linear> {
            Ok(Linear::new(load(&format!("{name}.weight"))?, Some(load(&format!("{name}.bias"))?)))
        };
        let mut stack = Vec::new();
        for layer in 0..layers {
            let at = format!("{root}.encoder.layers.{layer}");
            stack.push(Layer {
                layer_norm1: norm(load, format!("{at}.layer_norm1"))?,
                q_proj: linear(load, format!("{at}.self_attn.q_proj"))?,
                k_proj: linear(load, format!("{at}.self_attn.k_proj"))?,
                v_proj: linear(load, format!("{at}.self_attn.v_proj"))?,
                out_proj: linear(load, format!("{at}.self_attn.out_proj"))?,
                layer_norm2: norm(load, format!("{at}.layer_norm2"))?,
                fc1: linear(load, format!("{at}.mlp.fc1"))?,
                fc2: linear(load, format!("{at}.mlp.fc2"))?,
            });
        }
        Ok(Self {
            config: config.clone(),
            select,
            patch_embedding: Linear::new(load(&format!("{root}.embeddings.patch_embedding.weight"))?, None),
            class_embedding: load(&format!("{root}.embeddings.class_embedding"))?,
            position_embedding: load(&format!("{root}.embeddings.position_embedding.weight"))?,
            pre_layrnorm: norm(load, format!("{root}.pre_layrnorm"))?,
            layers: Arc::new(stack),
            checkpoints: Checkpoints::default(),
        })
    }

    /// What the layers keep for their backward from now on, where they train.
    pub fn set_checkpoints(&mut self, checkpoints: Checkpoints) {
        self.checkpoints = checkpoints;
    }

    /// patches [B * P, C * p * p] (`ops::patch_embed::patchify`) to the selected features [B * N, D].
    pub fn forward(&self, forward: &mut Forward<'_>, patches: &Tensor) -> Var {
        let gpu = patches.gpu();
        let p = self.config.num_patches();
        let (images, tokens) = (patches.rows() / p, p + 1);
        let heads = Heads {
            heads: self.config.num_attention_heads,
            kv_heads: self.config.num_attention_heads,
            head_size: self.config.hidden_size / self.config.num_attention_heads,
            in_f16: false,
        };
        let ranges = Ranges::packed(gpu, &vec![tokens; images], Mask::Full);

        let patches = forward.tape.constant(patches.clone());
        let embedded = self.patch_embedding.forward(forward, &patches);
        let class_embedding = forward.parameters.weight(self.class_embedding);
        let position = forward.parameters.weight(self.position_embedding);
        let shaped = functions::reshape(forward.tape, &embedded, &[images, p, self.config.hidden_size]);
        let assembled = functions::assemble_patches(forward.tape, &shaped, &class_embedding, &position);
        let eps = self.config.layer_norm_eps as f32;
        let mut x = self.pre_layrnorm.forward(forward, &assembled, eps);
        drop((patches, embedded, shaped, assembled));
        for index in 0..self.layers.len() {
            // Features of a frozen tower are the same whether they are computed in a step or before.
            if !x.wants_gradient() {
                x = self.layers[index].forward(forward, x, &ranges, heads, eps);
                continue;
            }
            let (layers, parameters, dropout) = (self.layers.clone(), forward.parameters.clone(), forward.dropout);
            let ranges = ranges.clone();
            x = checkpoint(forward.tape, x, self.checkpoints, move |tape, x| {
                let forward = &mut Forward { tape, parameters: &parameters, dropout, before: None };
                layers[index].forward(forward, x, &ranges, heads, eps)
            });
        }
        match self.select {
            FeatureSelect::Full => x,
            FeatureSelect::Default => {
                let rows: Vec<u32> =
                    (0..(images * tokens) as u32).filter(|row| !row.is_multiple_of(tokens as u32)).collect();
                functions::pick_rows(forward.tape, &x, &Tensor::from_u32(gpu, &rows, &[rows.len()]))
            }
        }
    }
}

impl LayerNorm {
    fn forward(&self, forward: &mut Forward<'_>, x: &Var, eps: f32) -> Var {
        let (weight, bias) = (forward.parameters.weight(self.weight), forward.parameters.weight(self.bias));
        functions::layer_norm(forward.tape, x, &weight, &bias, eps)
    }
}

/// Values are given away where they are read last, so that their memory is free as early as can be.
impl Layer {
    /// Normalise, attend, add; normalise, transform, add.
    fn forward(&self, forward: &mut Forward<'_>, x: Var, ranges: &Ranges, heads: Heads, eps: f32) -> Var {
        let h = self.layer_norm1.forward(forward, &x, eps);
        forward.tape.dear_products(true);
        let heads = Heads { in_f16: self.q_proj.may_round(forward), ..heads };
        let q = self.q_proj.forward(forward, &h);
        let k = self.k_proj.forward(forward, &h);
        let v = self.v_proj.forward(forward, &h);
        forward.tape.dear_products(false);
        drop(h);
        let attended = functions::attention(forward.tape, q, k, v, ranges, heads);
        let h = self.out_proj.forward(forward, &attended);
        drop(attended);
        let x = functions::residual(forward.tape, &x, h);

        let h = self.layer_norm2.forward(forward, &x, eps);
        let inner = self.fc1.forward(forward, &h);
        drop(h);
        let activated = functions::activation(forward.tape, &inner, Activation::QuickGelu);
        drop(inner);
        let unread = forward.tape.runs_again() && self.fc2.lora.is_none();
        forward.tape.unread(unread);
        let h = self.fc2.forward(forward, &activated);
        drop(activated);
        let y = functions::residual(forward.tape, &x, h);
        forward.tape.unread(false);
        y
    }
}
