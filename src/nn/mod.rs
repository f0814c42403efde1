//! Layers: parameters by name, and the linear layer with an optional adapter. Models are made of these.
//!
//! Must never know: stages, optimisers. Which layer gets an adapter, and what trains, is the trainer's choice.

mod linear;
mod parameters;

pub use linear::{Dora, Linear, Lora};
pub use parameters::{Id, Parameter, Parameters};

use crate::autograd::Tape;

/// What a forward pass carries along.
pub struct Forward<'a> {
    pub tape: &'a mut Tape,
    pub parameters: &'a Parameters,
    /// Seed and step of dropout; `None` outside training.
    pub dropout: Option<(u32, u32)>,
}
