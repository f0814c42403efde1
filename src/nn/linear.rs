//! y = x W^T + b, with an optional low-rank adapter. PyTorch: `torch.nn.Linear`, PEFT's `lora.Linear`.

use super::{Forward, Id};
use crate::autograd::{
    Var,
    functions::{self, DropoutKey, LoraWeights},
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
}

impl Linear {
    pub fn new(weight: Id, bias: Option<Id>) -> Self {
        Self { weight, bias, lora: None }
    }

    /// x [T, K] to [T, N].
    pub fn forward(&self, forward: &mut Forward<'_>, x: &Var) -> Var {
        let parameters = forward.parameters;
        let weight = parameters.weight(self.weight);
        let bias = self.bias.map(|bias| parameters.weight(bias));
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
        functions::linear_lora(forward.tape, x, &weight, bias.as_ref(), &weights)
    }
}
