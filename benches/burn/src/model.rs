//! The LLaMA decoder, with the modules of Burn where it has them.

use burn::{
    Tensor,
    module::Module,
    nn::{Embedding, EmbeddingConfig, Initializer, Linear, LinearConfig, RmsNorm, RmsNormConfig},
    tensor::{
        Device, Int, TensorData,
        activation::{silu, softmax},
    },
};

use crate::options::Options;

/// The wavelengths of the rotary embedding grow up to it.
const ROPE_THETA: f64 = 10_000.0;

const EPSILON: f64 = 1e-5;

/// Weights are drawn with it, as LLaMA's are.
const STANDARD_DEVIATION: f64 = 0.02;

/// Added to the scores of later positions. Their exponentials are 0, and nothing becomes infinite.
const MASKED: f32 = -1e9;

/// What every layer uses and nothing trains.
pub struct Constants {
    /// [1, 1, seq, head_dim]: the cosines, the same for both halves.
    cos: Tensor<4>,
    /// [1, 1, seq, head_dim]: the sines, negative in the first half.
    sin: Tensor<4>,
    /// [1, 1, seq, seq]: 0, or [`MASKED`] above the diagonal.
    mask: Tensor<4>,
}

impl Constants {
    pub fn new(options: &Options, device: &Device) -> Self {
        let (seq, head_dim) = (options.seq, options.head_dim());
        let half = head_dim / 2;
        let (mut cos, mut sin, mut mask) = (Vec::new(), Vec::new(), Vec::new());
        for position in 0..seq {
            for element in 0..head_dim {
                let frequency = ROPE_THETA.powf(-((element % half) as f64) / half as f64);
                let angle = position as f64 * frequency;
                cos.push(angle.cos() as f32);
                sin.push(if element < half { -angle.sin() } else { angle.sin() } as f32);
            }
            mask.extend((0..seq).map(|key| if key > position { MASKED } else { 0.0 }));
        }
        let tensor = |values, columns| Tensor::from_data(TensorData::new(values, [1, 1, seq, columns]), device);
        Self { cos: tensor(cos, head_dim), sin: tensor(sin, head_dim), mask: tensor(mask, seq) }
    }

    /// Rotary embedding of [batch, heads, seq, head_dim]: element i turns with element i + head_dim / 2.
    fn rotate(&self, x: Tensor<4>) -> Tensor<4> {
        let [batch, heads, seq, head_dim] = x.dims();
        let halves: Tensor<5> = x.clone().reshape([batch, heads, seq, 2, head_dim / 2]);
        let swapped = halves.flip([3]).reshape([batch, heads, seq, head_dim]);
        x * self.cos.clone() + swapped * self.sin.clone()
    }
}

#[derive(Module, Debug)]
pub struct Decoder {
    embed_tokens: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    lm_head: Linear,
}

impl Decoder {
    pub fn new(options: &Options, device: &Device) -> Self {
        let hidden = options.hidden_size;
        Self {
            embed_tokens: EmbeddingConfig::new(options.vocab_size, hidden).with_initializer(normal()).init(device),
            layers: (0..options.num_layers).map(|_| Layer::new(options, device)).collect(),
            norm: norm(hidden, device),
            lm_head: linear(hidden, options.vocab_size, device),
        }
    }

    /// [batch, seq] -> [batch * seq, vocab_size]: the logits.
    pub fn forward(&self, tokens: Tensor<2, Int>, constants: &Constants) -> Tensor<2> {
        let [batch, seq] = tokens.dims();
        let hidden: Tensor<3> = self.embed_tokens.forward(tokens);
        let [_, _, width] = hidden.dims();
        let mut hidden = hidden.reshape([batch * seq, width]);
        for layer in &self.layers {
            hidden = layer.forward(hidden, batch, constants);
        }
        self.lm_head.forward(self.norm.forward(hidden))
    }
}

#[derive(Module, Debug)]
struct Layer {
    input_layernorm: RmsNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    post_attention_layernorm: RmsNorm,
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    num_heads: usize,
}

impl Layer {
    fn new(options: &Options, device: &Device) -> Self {
        let (hidden, intermediate) = (options.hidden_size, options.intermediate_size);
        Self {
            input_layernorm: norm(hidden, device),
            q_proj: linear(hidden, hidden, device),
            k_proj: linear(hidden, hidden, device),
            v_proj: linear(hidden, hidden, device),
            o_proj: linear(hidden, hidden, device),
            post_attention_layernorm: norm(hidden, device),
            gate_proj: linear(hidden, intermediate, device),
            up_proj: linear(hidden, intermediate, device),
            down_proj: linear(intermediate, hidden, device),
            num_heads: options.num_heads,
        }
    }

    /// [batch * seq, hidden_size], as it comes in.
    fn forward(&self, x: Tensor<2>, batch: usize, constants: &Constants) -> Tensor<2> {
        let x = x.clone() + self.attention(self.input_layernorm.forward(x), batch, constants);
        let normed = self.post_attention_layernorm.forward(x.clone());
        let gate = silu(self.gate_proj.forward(normed.clone()));
        x + self.down_proj.forward(gate * self.up_proj.forward(normed))
    }

    fn attention(&self, x: Tensor<2>, batch: usize, constants: &Constants) -> Tensor<2> {
        let [positions, hidden] = x.dims();
        let (seq, head_dim) = (positions / batch, hidden / self.num_heads);
        let heads = |projected: Tensor<2>| -> Tensor<4> {
            projected.reshape([batch, seq, self.num_heads, head_dim]).swap_dims(1, 2)
        };
        let q = constants.rotate(heads(self.q_proj.forward(x.clone())));
        let k = constants.rotate(heads(self.k_proj.forward(x.clone())));
        let v = heads(self.v_proj.forward(x));
        // Burn's own attention becomes these operations too where gradients are kept, with more beside them: it
        // builds the mask anew and differentiates through the maximum.
        let scores = q.matmul(k.transpose()) / (head_dim as f64).sqrt() + constants.mask.clone();
        let context = softmax(scores, 3).matmul(v);
        self.o_proj.forward(context.swap_dims(1, 2).reshape([positions, hidden]))
    }
}

fn normal() -> Initializer {
    Initializer::Normal { mean: 0.0, std: STANDARD_DEVIATION }
}

fn linear(input: usize, output: usize, device: &Device) -> Linear {
    LinearConfig::new(input, output).with_bias(false).with_initializer(normal()).init(device)
}

fn norm(width: usize, device: &Device) -> RmsNorm {
    RmsNormConfig::new(width).with_epsilon(EPSILON).init(device)
}
