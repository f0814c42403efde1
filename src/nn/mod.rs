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
    /// Is told each milestone before what stands behind it is computed: weights that it reads may still be on their way.
    pub before: Option<&'a mut dyn FnMut(usize)>,
}

impl Forward<'_> {
    /// As [`Tape::milestone`].
    pub fn milestone(&mut self, number: usize) {
        if let Some(before) = &mut self.before {
            before(number);
        }
        self.tape.milestone(number);
    }
}
