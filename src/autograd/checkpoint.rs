//! Gradient checkpointing: a layer's inner values are not kept for its backward but computed again from its input.
//! PyTorch: `torch.utils.checkpoint`.
//!
//! Every mode gives the bytes that [`Checkpointing::None`] gives: the same kernels run on the same values, dropout draws
//! by counter, and gradients are added in the same order.

use super::{Dear, Tape, Var};
use crate::{
    ops::cast::cast,
    tensor::{Dtype, Offloaded, Tensor},
};

/// What a layer keeps for its backward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checkpointing {
    /// All that the backward reads.
    #[default]
    None,
    /// Its input and what is dear to compute: queries, keys and values before their rotation, attention's output and
    /// statistics.
    Selective,
    /// Its input.
    Full,
    /// Nothing on the device: its input goes to the host and comes back.
    Offload,
}

/// How the layers of a stack are kept.
#[derive(Clone, Copy, Debug)]
pub struct Checkpoints {
    pub mode: Checkpointing,
    /// The type that layers' inputs and dear results are rounded to, in every mode; gradients pass straight through.
    pub dtype: Dtype,
}

impl Default for Checkpoints {
    fn default() -> Self {
        Self { mode: Checkpointing::None, dtype: Dtype::F32 }
    }
}

enum Kept {
    Device(Tensor),
    Host(Offloaded),
}

/// `layer` of x, which it takes as f32. On a recording tape x is rounded, and what is kept follows the mode. `layer` may
/// run twice and must do the same both times.
pub fn checkpoint(
    tape: &mut Tape,
    x: Var,
    checkpoints: Checkpoints,
    layer: impl Fn(&mut Tape, Var) -> Var + 'static,
) -> Var {
    if !tape.is_recording() {
        return layer(tape, x);
    }
    let Var { value, node } = x;
    let narrow = cast(&value, checkpoints.dtype);
    drop(value);
    let value = cast(&narrow, Dtype::F32);
    let dear_dtype = Some(checkpoints.dtype).filter(|dtype| dtype.is_packed());
    if checkpoints.mode == Checkpointing::None {
        drop(narrow);
        tape.dear_dtype = dear_dtype;
        let y = layer(tape, Var { value, node });
        tape.dear_dtype = None;
        return y;
    }
    let selective = checkpoints.mode == Checkpointing::Selective;
    let dear = if selective { Dear::PutDown(Vec::new()) } else { Dear::None };
    let mut first = Tape { dear, dear_dtype, ..Tape::default() };
    let input = first.constant(value);
    let kept = match checkpoints.mode {
        Checkpointing::Offload => Kept::Host(narrow.offload()),
        _ => Kept::Device(narrow.clone()),
    };
    drop(narrow);
    let output = layer(&mut first, input).value;
    let needed = node.wants_gradient() || first.trains;
    let dear = match first.dear {
        Dear::PutDown(list) => Dear::TakeUp(list.into()),
        other => other,
    };
    tape.record_taking(output, needed, move |gradients, dy| {
        let narrow = match kept {
            Kept::Device(narrow) => narrow,
            Kept::Host(offloaded) => offloaded.restore(),
        };
        let value = cast(&narrow, Dtype::F32);
        drop(narrow);
        let mut again = Tape { dear, dear_dtype, runs_again: true, ..Tape::recording() };
        let x = if node.wants_gradient() { again.leaf(value) } else { again.constant(value) };
        let leaf = x.node();
        let root = layer(&mut again, x).node();
        if let Some(dx) = again.backward(root, dy).take(leaf) {
            gradients.add(node, dx);
        }
    })
}
