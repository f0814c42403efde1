//! The tape: what was computed, remembered so that gradients can be walked back.
//!
//! Must never know: layers, models, optimisers. Functions (`functions.rs`) compute forward through `ops` and record how
//! their inputs' gradients follow from the output's. Only what leads to something trainable is recorded.
//!
//! ```no_run
//! # use wgpu_llava::{gpu::Gpu, tensor::Tensor, autograd::{Tape, functions, Weight}};
//! # fn f(gpu: &Gpu, x: Tensor, w: Tensor, dw: Tensor, dy: Tensor) {
//! let mut tape = Tape::recording();
//! let x = tape.constant(x); // [T, K]
//! let w = Weight { value: w, grad: Some(dw) }; // [N, K]; the gradient is added to dw
//! let y = functions::linear(&mut tape, &x, &w, None);
//! tape.backward(&y, dy);
//! # }
//! ```

pub mod functions;

use crate::{ops::elementwise, tensor::Tensor};

/// A value on the tape; without a node it is a constant, and gradients end there.
#[derive(Clone, Debug)]
pub struct Var {
    pub value: Tensor,
    node: Option<usize>,
}

impl Var {
    /// Whether a gradient for this value is wanted.
    pub fn wants_gradient(&self) -> bool {
        self.node.is_some()
    }
}

/// A parameter as functions see it: its value, and where its gradient is added when it trains.
#[derive(Clone, Debug)]
pub struct Weight {
    pub value: Tensor,
    pub grad: Option<Tensor>,
}

impl Weight {
    pub fn frozen(value: Tensor) -> Self {
        Self { value, grad: None }
    }

    pub fn trains(&self) -> bool {
        self.grad.is_some()
    }
}

type Backward = Box<dyn FnOnce(&mut Gradients, &Tensor)>;

/// Records functions in the order of their calls.
#[derive(Default)]
pub struct Tape {
    nodes: Vec<Option<Backward>>,
    recording: bool,
}

impl Tape {
    /// A tape for training.
    pub fn recording() -> Self {
        Self { nodes: Vec::new(), recording: true }
    }

    /// A tape that remembers nothing, for inference.
    pub fn silent() -> Self {
        Self::default()
    }

    pub fn is_recording(&self) -> bool {
        self.recording
    }

    /// A value without gradient.
    pub fn constant(&self, value: Tensor) -> Var {
        Var { value, node: None }
    }

    /// A value whose gradient the caller will ask for.
    pub fn leaf(&mut self, value: Tensor) -> Var {
        self.nodes.push(None);
        Var { value, node: Some(self.nodes.len() - 1) }
    }

    /// Puts `value` on the tape, with the function that passes its gradient on. When nothing that trains lies
    /// behind it (`needed` is false), or the tape is silent, `backward` is dropped with all it holds.
    fn record(&mut self, value: Tensor, needed: bool, backward: impl FnOnce(&mut Gradients, &Tensor) + 'static) -> Var {
        if !self.recording || !needed {
            return Var { value, node: None };
        }
        self.nodes.push(Some(Box::new(backward)));
        Var { value, node: Some(self.nodes.len() - 1) }
    }

    /// Walks back from `root`, whose gradient is `seed`. Weights receive theirs where they asked; the result holds
    /// those of the leaves. What a node held is freed as soon as it has run.
    pub fn backward(mut self, root: &Var, seed: Tensor) -> Gradients {
        let mut gradients = Gradients { slots: vec![None; self.nodes.len()] };
        gradients.add(root, seed);
        while let Some(node) = self.nodes.pop() {
            let index = self.nodes.len();
            if let Some(backward) = node
                && let Some(gradient) = gradients.slots[index].take()
            {
                backward(&mut gradients, &gradient);
            }
        }
        gradients
    }
}

/// Gradients of tape values, by node.
pub struct Gradients {
    slots: Vec<Option<Tensor>>,
}

impl Gradients {
    /// Adds to the gradient of `var`; nothing happens when it wants none.
    pub fn add(&mut self, var: &Var, gradient: Tensor) {
        let Some(node) = var.node else { return };
        let slot = &mut self.slots[node];
        *slot = Some(match slot.take() {
            None => gradient,
            // A shared gradient (both sides of a residual hold it) must not change under its other owner.
            Some(present) if present.is_shared() => elementwise::add(&present, &gradient),
            Some(present) => {
                elementwise::add_to(&present, &gradient, &present);
                present
            }
        });
    }

    /// The gradient that a leaf has received.
    pub fn of(&self, var: &Var) -> Option<&Tensor> {
        self.slots[var.node?].as_ref()
    }
}
