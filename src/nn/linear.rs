//! y = x W^T + b, with an optional low-rank adapter, LoRA or DoRA. PyTorch: `torch.nn.Linear`, PEFT's `lora.Linear`.

use super::{Forward, Id};
use crate::{
    autograd::{
        Var,
        functions::{self, DoraWeights, DropoutKey, LoraWeights},
    },
    tensor::Tensor,
};

#[derive(Clone, Debug)]
pub struct Linear {
    /// [N, K]
    pub weight: Id,
    /// [N]
    pub bias: Option<Id>,
    pub lora: Option<Lora>,
}

#[derive(Clone, Debug)]
pub struct Lora {
    /// lora_A [R, K]
    pub a: Id,
    /// lora_B [N, R]
    pub b: Id,
    /// alpha / r, or alpha / sqrt(r)
    pub scale: f32,
    pub dropout: f64,
    /// Distinguishes this adapter's dropout from others'.
    pub stream: u32,
    /// [N], in place of the layer's bias: that and scale times lora_B's.
    pub bias: Option<Id>,
    pub dora: Option<Dora>,
}

/// The lengths that an adapted weight's rows have, and those that they are given: y = magnitude / norm * x (W + ..)^T + b.
#[derive(Clone, Debug)]
pub struct Dora {
    /// [N]
    pub magnitude: Id,
    /// [N], of W + scale * B A as it is; whoever changes A or B computes it again.
    pub norm: Tensor,
}

impl Linear {
    pub fn new(weight: Id, bias: Option<Id>) -> Self {
        Self { weight, bias, lora: None }
    }

    /// x [T, K] to [T, N].
    pub fn forward(&self, forward: &mut Forward<'_>, x: &Var) -> Var {
        let parameters = forward.parameters;
        let weight = parameters.weight(self.weight);
        let bias = self.lora.as_ref().and_then(|lora| lora.bias).or(self.bias);
        let bias = bias.map(|bias| parameters.weight(bias));
        let Some(lora) = &self.lora else {
            return functions::linear(forward.tape, x, &weight, bias.as_ref());
        };
        let dropout = forward.dropout.map(|(seed, step)| DropoutKey {
            probability: lora.dropout,
            seed,
            stream: lora.stream,
            step,
        });
        let weights =
            LoraWeights { a: parameters.weight(lora.a), b: parameters.weight(lora.b), scale: lora.scale, dropout };
        let Some(dora) = &lora.dora else {
            return functions::linear_lora(forward.tape, x, &weight, bias.as_ref(), &weights);
        };
        let dora = DoraWeights { magnitude: parameters.weight(dora.magnitude), norm: dora.norm.clone() };
        functions::linear_dora(forward.tape, x, &weight, bias.as_ref(), &weights, &dora)
    }

    /// residual + what [`Linear::forward`] gives: in one product where nothing is recorded and nobody else holds the residual.
    pub fn forward_onto(&self, forward: &mut Forward<'_>, x: Var, residual: Var) -> Var {
        if self.lora.is_some() || !forward.tape.infers() || residual.value.is_shared() {
            let y = self.forward(forward, &x);
            drop(x);
            return functions::residual(forward.tape, &residual, y);
        }
        let bias = self.bias.map(|bias| forward.parameters.weight(bias));
        functions::linear_onto(forward.tape, &x, &forward.parameters.weight(self.weight), bias.as_ref(), residual)
    }

    /// Several layers of the same x: in one dispatch where nothing is recorded and each is its weight alone.
    pub fn forward_all<const N: usize>(layers: [&Self; N], forward: &mut Forward<'_>, x: &Var) -> [Var; N] {
        if !forward.tape.infers() || !layers.iter().all(|layer| layer.is_weight_alone()) {
            return layers.map(|layer| layer.forward(forward, x));
        }
        let weights = layers.map(|layer| forward.parameters.weight(layer.weight));
        functions::linears(forward.tape, x, weights.each_ref())
    }

    /// silu(gate(x)) * up(x), likewise.
    pub fn forward_gated(gate: &Self, up: &Self, forward: &mut Forward<'_>, x: Var) -> Var {
        if forward.tape.infers() && gate.is_weight_alone() && up.is_weight_alone() {
            let [gate, up] = [gate, up].map(|layer| forward.parameters.weight(layer.weight));
            return functions::linear_swiglu(forward.tape, &x, &gate, &up);
        }
        let gate = gate.forward(forward, &x);
        let up = up.forward(forward, &x);
        drop(x);
        functions::swiglu(forward.tape, gate, up)
    }

    /// Whether its products may round what they multiply to f16.
    pub fn may_round(&self, forward: &Forward<'_>) -> bool {
        forward.parameters.weight(self.weight).value.rounding().is_some()
    }

    fn is_weight_alone(&self) -> bool {
        self.bias.is_none() && self.lora.is_none()
    }
}
