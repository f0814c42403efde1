//! From the tower's width to the language model's: one linear layer, or two with GELU between.

use super::config::{LlavaConfig, ProjectorType};
use crate::{
    autograd::{Var, functions},
    error::Result,
    nn::{Forward, Id, Linear},
    ops::activation::Activation,
};

pub struct Projector {
    linear_1: Linear,
    linear_2: Option<Linear>,
}

impl Projector {
    pub fn new(config: &LlavaConfig, load: &mut dyn FnMut(&str) -> Result<Id>) -> Result<Self> {
        let mut linear = |number: usize| -> Result<Linear> {
            let name = format!("multi_modal_projector.linear_{number}");
            let weight = load(&format!("{name}.weight"))?;
            let bias = if config.multimodal_projector_bias { Some(load(&format!("{name}.bias"))?) } else { None };
            Ok(Linear::new(weight, bias))
        };
        let linear_1 = linear(1)?;
        let linear_2 = if config.projector == ProjectorType::Mlp2xGelu { Some(linear(2)?) } else { None };
        Ok(Self { linear_1, linear_2 })
    }

    /// features [N, Dv] to [N, D].
    pub fn forward(&self, forward: &mut Forward<'_>, features: &Var) -> Var {
        let x = self.linear_1.forward(forward, features);
        let Some(linear_2) = &self.linear_2 else { return x };
        let x = functions::activation(forward.tape, &x, Activation::Gelu);
        linear_2.forward(forward, &x)
    }
}
