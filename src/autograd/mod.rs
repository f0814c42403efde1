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

mod checkpoint;

pub use checkpoint::{Checkpointing, Checkpoints, checkpoint};

use std::{collections::VecDeque, rc::Rc};

use crate::{
    gpu::Gpu,
    ops::{cast::cast, elementwise},
    tensor::{Dtype, Tensor},
};

/// A value on the tape; without a node it is a constant, and gradients end there.
#[derive(Clone, Debug)]
pub struct Var {
    pub value: Tensor,
    node: Node,
}

impl Var {
    /// Whether a gradient for this value is wanted.
    pub fn wants_gradient(&self) -> bool {
        self.node.wants_gradient()
    }

    /// Where this value's gradient goes. What is recorded holds this, and the value only if the backward reads it.
    pub fn node(&self) -> Node {
        self.node
    }
}

/// The place of a value's gradient; none for a constant.
#[derive(Clone, Copy, Debug)]
pub struct Node(Option<usize>);

impl Node {
    pub fn wants_gradient(self) -> bool {
        self.0.is_some()
    }
}

impl From<&Var> for Node {
    fn from(var: &Var) -> Self {
        var.node
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

type Backward = Box<dyn FnOnce(&mut Gradients, Tensor)>;

enum Entry {
    /// A value whose gradient the caller will ask for.
    Leaf,
    Function(Backward),
    Milestone(usize),
    OnReturn(Box<dyn FnOnce()>),
}

/// Records functions in the order of their calls.
#[derive(Default)]
pub struct Tape {
    nodes: Vec<Entry>,
    recording: bool,
    /// Whether something that trains was met, on a silent tape too.
    trains: bool,
    dear: Dear,
    /// What dear results are rounded to, in a layer that rounds.
    dear_dtype: Option<Dtype>,
    /// Whether products are dear where they are called now.
    dear_products: bool,
    runs_again: bool,
    /// Whether nobody will read the values that are computed now.
    unread: bool,
    infers: bool,
    /// See [`Tape::at_crossings`].
    crossing: Option<Rc<dyn Fn(u64)>>,
}

/// Results that are kept because they are dear, when the rest of a layer is computed again.
#[derive(Default)]
enum Dear {
    /// They are what all others are.
    #[default]
    None,
    /// The layer runs for the first time: they are put down, in order.
    PutDown(Vec<Tensor>),
    /// The layer runs again: they are taken up in the same order.
    TakeUp(VecDeque<Tensor>),
}

impl Tape {
    /// A tape for training.
    pub fn recording() -> Self {
        Self { recording: true, ..Self::default() }
    }

    /// A tape that remembers nothing, for inference.
    pub fn silent() -> Self {
        Self { infers: true, ..Self::default() }
    }

    /// Whether values are computed for their own sake: nothing is recorded, and nothing will be computed again, so that
    /// functions may be joined as is fastest.
    pub fn infers(&self) -> bool {
        self.infers
    }

    pub fn is_recording(&self) -> bool {
        self.recording
    }

    /// A value without gradient.
    pub fn constant(&self, value: Tensor) -> Var {
        Var { value, node: Node(None) }
    }

    /// A value whose gradient the caller will ask for.
    pub fn leaf(&mut self, value: Tensor) -> Var {
        self.nodes.push(Entry::Leaf);
        Var { value, node: Node(Some(self.nodes.len() - 1)) }
    }

    /// Marks this place: when the backward comes back to it, whatever was computed behind it has its gradients.
    pub fn milestone(&mut self, number: usize) {
        if self.recording {
            self.nodes.push(Entry::Milestone(number));
        }
    }

    /// Has something done when the backward comes back to this place.
    pub fn on_return(&mut self, call: impl FnOnce() + 'static) {
        if self.recording {
            self.nodes.push(Entry::OnReturn(Box::new(call)));
        }
    }

    /// Has something called whenever a value, or in the backward its gradient, has left a device for another
    /// ([`functions::to_device`]), and before it arrives there; it is told the bytes.
    pub fn at_crossings(&mut self, call: Rc<dyn Fn(u64)>) {
        self.crossing = Some(call);
    }

    /// Puts `value` on the tape, with the function that passes its gradient on. When nothing that trains lies
    /// behind it (`needed` is false), or the tape is silent, `backward` is dropped with all it holds.
    fn record(&mut self, value: Tensor, needed: bool, backward: impl FnOnce(&mut Gradients, &Tensor) + 'static) -> Var {
        self.record_taking(value, needed, move |gradients, dy| backward(gradients, &dy))
    }

    /// As [`Tape::record`], for a function that may use the memory of the gradient that it is given.
    fn record_taking(
        &mut self,
        value: Tensor,
        needed: bool,
        backward: impl FnOnce(&mut Gradients, Tensor) + 'static,
    ) -> Var {
        self.trains |= needed;
        if !self.recording || !needed {
            return Var { value, node: Node(None) };
        }
        self.nodes.push(Entry::Function(Box::new(backward)));
        Var { value, node: Node(Some(self.nodes.len() - 1)) }
    }

    /// Declares the products of what follows dear, or no longer so: where a layer is computed again for its backward
    /// and dear results are kept, these are among them. Attention is dear anywhere.
    pub fn dear_products(&mut self, dear: bool) {
        self.dear_products = dear;
    }

    /// Whether a layer runs again for its backward, so that nobody reads its output.
    pub fn runs_again(&self) -> bool {
        self.runs_again
    }

    /// Declares that nobody reads the values of what follows: products and sums may leave them out.
    pub fn unread(&mut self, unread: bool) {
        self.unread = unread;
    }

    /// `make`, or what it made when the layer ran first; `rounds` says which of it is rounded where dear results are.
    fn dear<const N: usize>(&mut self, rounds: [bool; N], make: impl FnOnce() -> [Tensor; N]) -> [Tensor; N] {
        let kept = if let Dear::TakeUp(list) = &mut self.dear {
            std::array::from_fn(|_| list.pop_front().expect("a layer runs again as it ran first"))
        } else {
            let mut rounds = rounds.into_iter();
            make().map(|value| match self.dear_dtype {
                Some(dtype) if rounds.next() == Some(true) => cast(&value, dtype),
                _ => value,
            })
        };
        if let Dear::PutDown(list) = &mut self.dear {
            list.extend(kept.iter().cloned());
        }
        kept.map(|value| if value.dtype().is_packed() { cast(&value, Dtype::F32) } else { value })
    }

    /// The value [T, N] of a product.
    fn product(&mut self, shape: [usize; 2], gpu: &Gpu, make: impl FnOnce() -> Tensor) -> Tensor {
        if self.unread {
            return Tensor::empty(gpu, &shape);
        }
        if !self.dear_products {
            return make();
        }
        let [value] = self.dear([true], || [make()]);
        value
    }

    /// Walks back from `root`, whose gradient is `seed`. Weights receive theirs where they asked; the result holds
    /// those of the leaves. What a node held is freed as soon as it has run.
    pub fn backward(self, root: impl Into<Node>, seed: Tensor) -> Gradients {
        self.backward_passing(root, seed, &mut |_| ())
    }

    /// As [`Tape::backward`]; `passed` is told the number of each milestone when it is come back to.
    pub fn backward_passing(mut self, root: impl Into<Node>, seed: Tensor, passed: &mut dyn FnMut(usize)) -> Gradients {
        let mut gradients = Gradients { slots: vec![None; self.nodes.len()] };
        gradients.add(root, seed);
        while let Some(entry) = self.nodes.pop() {
            match entry {
                Entry::Leaf => {}
                Entry::Milestone(number) => passed(number),
                Entry::OnReturn(call) => call(),
                Entry::Function(backward) => {
                    if let Some(gradient) = gradients.slots[self.nodes.len()].take() {
                        backward(&mut gradients, gradient);
                    }
                }
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
    /// Adds to the gradient of `node`; nothing happens when it wants none.
    pub fn add(&mut self, node: impl Into<Node>, gradient: Tensor) {
        let Some(node) = node.into().0 else { return };
        let slot = &mut self.slots[node];
        *slot = Some(match slot.take() {
            None => gradient,
            Some(present) if !present.is_shared() => {
                elementwise::add_in_place(&gradient, &present);
                present
            }
            // A shared gradient (both sides of a residual hold it) must not change under its other owner.
            Some(present) if !gradient.is_shared() => {
                elementwise::add_in_place(&present, &gradient);
                gradient
            }
            Some(present) => elementwise::add(&present, &gradient),
        });
    }

    /// The gradient that a leaf has received.
    pub fn of(&self, leaf: impl Into<Node>) -> Option<&Tensor> {
        self.slots[leaf.into().0?].as_ref()
    }

    /// As [`Gradients::of`], given away.
    pub fn take(&mut self, leaf: impl Into<Node>) -> Option<Tensor> {
        self.slots[leaf.into().0?].take()
    }
}
