//! The differentiable functions: each joins an op's forward with its backward.

use super::{Node, Tape, Var, Weight};
use crate::{
    gpu::{Account, Gpu},
    ops::{
        activation::{self, Activation},
        attention::{self, Heads, Ranges},
        cooperative::{largest_in, largest_in_activation},
        cross_entropy, dora, dropout, elementwise, embedding, layer_norm,
        matmul::{self, Epilogue, Layout, Second, product, product_into, product_with},
        patch_embed, rms_norm, rope,
    },
    tensor::Tensor,
};

/// y = x W^T + b with x [T, K], W [N, K], b [N].
pub fn linear(tape: &mut Tape, x: &Var, weight: &Weight, bias: Option<&Weight>) -> Var {
    let epilogue = Epilogue { bias: bias.map(|bias| &bias.value), ..Default::default() };
    let shape = [x.value.rows(), weight.value.rows()];
    let y = tape.product(shape, x.value.gpu(), || product_with(Layout::Nt, &x.value, &weight.value, epilogue));
    let needed = x.wants_gradient() || weight.trains() || bias.is_some_and(Weight::trains);
    // A frozen weight passes gradients on without the layer's input.
    let (node, x) = (x.node(), weight.trains().then(|| x.value.clone()));
    let (weight, bias) = (weight.clone(), bias.cloned());
    tape.record(y, needed, move |gradients, dy| {
        let largest = largest_in(dy, &weight.value);
        let largest = largest.as_ref();
        if let (Some(dweight), Some(x)) = (&weight.grad, x) {
            product_into(Layout::Tn, dy, &x, dweight, Epilogue { largest, ..adding_beside(&weight) });
            drop(x);
        }
        if let Some(dbias) = bias.as_ref().and_then(|bias| bias.grad.as_ref()) {
            elementwise::add_rows(dy, dbias);
        }
        if node.wants_gradient() {
            gradients.add(node, product_with(Layout::Nn, dy, &weight.value, scaled_by(largest)));
        }
    })
}

/// y_w = x W_w^T of several weights, where nothing is recorded.
pub fn linears<const N: usize>(tape: &Tape, x: &Var, weights: [&Weight; N]) -> [Var; N] {
    assert!(tape.infers(), "joint products have no backward");
    matmul::joint(&x.value, weights.map(|weight| &weight.value)).map(|y| tape.constant(y))
}

/// silu(x G^T) * (x U^T), where nothing is recorded.
pub fn linear_swiglu(tape: &Tape, x: &Var, gate: &Weight, up: &Weight) -> Var {
    assert!(tape.infers(), "a joint product has no backward");
    tape.constant(matmul::gated(&x.value, &gate.value, &up.value))
}

/// residual + x W^T + b in the memory of the residual, where nothing is recorded and nobody else holds that.
pub fn linear_onto(tape: &Tape, x: &Var, weight: &Weight, bias: Option<&Weight>, residual: Var) -> Var {
    assert!(tape.infers() && !residual.value.is_shared(), "a sum in place has no backward");
    let epilogue = Epilogue { bias: bias.map(|bias| &bias.value), accumulate: true, ..Default::default() };
    product_into(Layout::Nt, &x.value, &weight.value, &residual.value, epilogue);
    residual
}

/// For a layer's other products: they round what they multiply where those with its weight may.
fn beside(weight: &Weight) -> Epilogue<'static> {
    Epilogue { rounding: weight.value.rounding(), ..Default::default() }
}

fn adding_beside(weight: &Weight) -> Epilogue<'static> {
    Epilogue { accumulate: true, ..beside(weight) }
}

/// For a product of a gradient with its largest sizes, if they are known.
fn scaled_by(largest: Option<&Tensor>) -> Epilogue<'_> {
    Epilogue { largest, ..Default::default() }
}

pub use dropout::Key as DropoutKey;

/// A low-rank adapter beside a linear layer.
#[derive(Clone, Debug)]
pub struct LoraWeights {
    /// lora_A [R, K]
    pub a: Weight,
    /// lora_B [N, R]
    pub b: Weight,
    pub scale: f32,
    pub dropout: Option<DropoutKey>,
}

/// The lengths [N] that an adapted weight's rows have, and those that they are given.
#[derive(Clone, Debug)]
pub struct DoraWeights {
    pub magnitude: Weight,
    /// A constant to the backward.
    pub norm: Tensor,
}

impl LoraWeights {
    /// The dropout, where it drops anything.
    fn drops(&self) -> Option<DropoutKey> {
        self.dropout.filter(|key| key.probability > 0.0)
    }

    fn dropped(&self, x: &Tensor) -> Tensor {
        self.drops().map_or_else(|| x.clone(), |key| dropout::apply(x, key))
    }

    /// u = input A^T [T, R], which is all that the backward needs of the input; `largest` of that.
    fn shrunk(&self, input: &Tensor, weight: &Weight, largest: Option<&Tensor>) -> Tensor {
        product_with(Layout::Nt, input, &self.a.value, Epilogue { largest, ..beside(weight) })
    }

    /// scale * u B^T, which is added to y.
    fn grown<'a>(&'a self, u: &'a Tensor) -> Second<'a> {
        Second { a: u, b: &self.b.value, alpha: self.scale }
    }

    /// dU A, which is added to dX.
    fn shrinks<'a>(&'a self, du: &'a Tensor) -> Second<'a> {
        Second { a: du, b: &self.a.value, alpha: 1.0 }
    }

    /// Adds the gradients of A and B for dY, that of what [`LoraWeights::grown`] is added to; x before dropout, whose mask is
    /// drawn again; `largest` of dY. Gives dU [T, R].
    fn backward(&self, x: &Tensor, u: &Tensor, dy: &Tensor, weight: &Weight, largest: Option<&Tensor>) -> Tensor {
        if let Some(db) = &self.b.grad {
            let add_scaled = Epilogue { alpha: Some(self.scale), largest, ..adding_beside(weight) };
            product_into(Layout::Tn, dy, u, db, add_scaled);
        }
        let scaled = Epilogue { alpha: Some(self.scale), largest, ..beside(weight) };
        let du = product_with(Layout::Nn, dy, &self.b.value, scaled);
        if let Some(da) = &self.a.grad {
            product_into(Layout::Tn, &du, &self.dropped(x), da, adding_beside(weight));
        }
        du
    }
}

const ADD: Epilogue<'_> =
    Epilogue { alpha: None, bias: None, accumulate: true, rounding: None, largest: None, second: None };

/// y = x W^T + b + scale * dropout(x) A^T B^T. The mask is drawn again in the backward instead of being kept, and
/// dX is (dY B) A, never dY (B A).
pub fn linear_lora(tape: &mut Tape, x: &Var, weight: &Weight, bias: Option<&Weight>, lora: &LoraWeights) -> Var {
    let largest = largest_in_activation(&x.value, &weight.value);
    let largest = largest.as_ref();
    let u = lora.shrunk(&lora.dropped(&x.value), weight, largest.filter(|_| lora.drops().is_none()));
    let shape = [x.value.rows(), weight.value.rows()];
    let y = tape.product(shape, x.value.gpu(), || {
        let (bias, second) = (bias.map(|bias| &bias.value), Some(lora.grown(&u)));
        product_with(Layout::Nt, &x.value, &weight.value, Epilogue { bias, largest, second, ..Default::default() })
    });
    let trains = weight.trains() || lora.a.trains() || lora.b.trains() || bias.is_some_and(Weight::trains);
    let needed = x.wants_gradient() || trains;
    let (Var { value: x, node }, weight, bias, lora) = (x.clone(), weight.clone(), bias.cloned(), lora.clone());
    tape.record(y, needed, move |gradients, dy| {
        let largest = largest_in(dy, &weight.value);
        let largest = largest.as_ref();
        let du = lora.backward(&x, &u, dy, &weight, largest);
        if let Some(dweight) = &weight.grad {
            product_into(Layout::Tn, dy, &x, dweight, Epilogue { largest, ..adding_beside(&weight) });
        }
        if let Some(dbias) = bias.as_ref().and_then(|bias| bias.grad.as_ref()) {
            elementwise::add_rows(dy, dbias);
        }
        // What is read no more is freed before what takes as much is made.
        drop(x);
        if node.wants_gradient() {
            let through = lora.drops().map(|key| (product_with(Layout::Nn, &du, &lora.a.value, beside(&weight)), key));
            let second = through.is_none().then(|| lora.shrinks(&du));
            let dx = product_with(Layout::Nn, dy, &weight.value, Epilogue { second, ..scaled_by(largest) });
            if let Some((through, key)) = through {
                dropout::add_to(&through, key, &dx);
            }
            gradients.add(node, dx);
        }
    })
}

/// DoRA: y = g * x (W + scale * B A)^T + b with g = magnitude / norm by columns, W frozen.
///
/// With dropout it is what PEFT trains: x W^T + b + (g - 1) * x' W^T + g * scale * x' A^T B^T with x' = dropout(x), so
/// that what was dropped passes as without an adapter; here (x - x') W^T + b + g * x' (W + scale * B A)^T.
pub fn linear_dora(
    tape: &mut Tape,
    x: &Var,
    weight: &Weight,
    bias: Option<&Weight>,
    lora: &LoraWeights,
    dora: &DoraWeights,
) -> Var {
    assert!(!weight.trains(), "the backward of DoRA has no gradient for the weight under it");
    let input = lora.dropped(&x.value);
    let largest = largest_in_activation(&input, &weight.value);
    let largest = largest.as_ref();
    let u = lora.shrunk(&input, weight, largest);
    let second = Some(lora.grown(&u));
    let z = product_with(Layout::Nt, &input, &weight.value, Epilogue { largest, second, ..Default::default() });
    drop(input);
    let y = dora::scale_columns(&z, &dora.magnitude.value, &dora.norm, bias.map(|bias| &bias.value));
    if let Some(key) = lora.drops() {
        product_into(Layout::Nt, &dropout::rest(&x.value, key), &weight.value, &y, ADD);
    }
    let trains = lora.a.trains() || lora.b.trains() || dora.magnitude.trains() || bias.is_some_and(Weight::trains);
    let (x, weight, bias, lora, dora) = (x.clone(), weight.clone(), bias.cloned(), lora.clone(), dora.clone());
    let needed = x.wants_gradient() || trains;
    tape.record(y, needed, move |gradients, dy| {
        if let Some(dmagnitude) = &dora.magnitude.grad {
            dora::backward_magnitude(&z, &dora.norm, dy, dmagnitude);
        }
        drop(z);
        if let Some(dbias) = bias.as_ref().and_then(|bias| bias.grad.as_ref()) {
            elementwise::add_rows(dy, dbias);
        }
        let dz = dora::scale_columns(dy, &dora.magnitude.value, &dora.norm, None);
        let largest = largest_in(&dz, &weight.value);
        let largest = largest.as_ref();
        let du = lora.backward(&x.value, &u, &dz, &weight, largest);
        if x.wants_gradient() {
            let epilogue = Epilogue { second: Some(lora.shrinks(&du)), ..scaled_by(largest) };
            let through = product_with(Layout::Nn, &dz, &weight.value, epilogue);
            drop(dz);
            gradients.add(
                &x,
                match lora.drops() {
                    Some(key) => {
                        let dx = dropout::rest(&product(Layout::Nn, dy, &weight.value), key);
                        dropout::add_to(&through, key, &dx);
                        dx
                    }
                    None => through,
                },
            );
        }
    })
}

/// a + b
pub fn add(tape: &mut Tape, a: &Var, b: &Var) -> Var {
    let y = elementwise::add(&a.value, &b.value);
    record_sum(tape, y, a.node(), b.node())
}

/// x + h, in the memory of h where nobody else holds that.
pub fn residual(tape: &mut Tape, x: &Var, h: Var) -> Var {
    let node = h.node();
    let y = if tape.unread {
        x.value.clone()
    } else if h.value.is_shared() {
        elementwise::add(&x.value, &h.value)
    } else {
        elementwise::add_in_place(&x.value, &h.value);
        h.value
    };
    record_sum(tape, y, x.node(), node)
}

fn record_sum(tape: &mut Tape, y: Tensor, a: Node, b: Node) -> Var {
    tape.record_taking(y, a.wants_gradient() || b.wants_gradient(), move |gradients, dy| {
        gradients.add(a, dy.clone());
        gradients.add(b, dy);
    })
}

/// Rows of x [T, D] normalised by their root mean square, times weight [D].
pub fn rms_norm(tape: &mut Tape, x: &Var, weight: &Weight, eps: f32) -> Var {
    let (y, rstd) = rms_norm::forward(&x.value, &weight.value, eps);
    let (needed, x, weight) = (x.wants_gradient() || weight.trains(), x.clone(), weight.clone());
    tape.record(y, needed, move |gradients, dy| {
        if let Some(dweight) = &weight.grad {
            rms_norm::backward_weight(&x.value, &rstd, dy, dweight);
        }
        if x.wants_gradient() {
            gradients.add(&x, rms_norm::backward_x(&x.value, &weight.value, &rstd, dy));
        }
    })
}

/// Rows of x [T, D] normalised, times weight [D], plus bias [D]. Both train, or neither.
pub fn layer_norm(tape: &mut Tape, x: &Var, weight: &Weight, bias: &Weight, eps: f32) -> Var {
    let (y, stats) = layer_norm::forward(&x.value, &weight.value, &bias.value, eps);
    let needed = x.wants_gradient() || weight.trains();
    let (x, weight, bias) = (x.clone(), weight.clone(), bias.clone());
    tape.record(y, needed, move |gradients, dy| {
        if let (Some(dweight), Some(dbias)) = (&weight.grad, &bias.grad) {
            layer_norm::backward_weight(&x.value, &stats, dy, dweight, dbias);
        }
        if x.wants_gradient() {
            gradients.add(&x, layer_norm::backward_x(&x.value, &weight.value, &stats, dy));
        }
    })
}

/// x [T, H * E] rotated by its tokens' positions (u32 [T]); `table` from [`rope::table`].
/// Where nobody else holds x, its memory takes the result.
pub fn rope(tape: &mut Tape, x: Var, positions: &Tensor, table: &Tensor, heads: usize) -> Var {
    let Var { value, node } = x;
    let y = rope::rotate(value, positions, table, heads, false);
    let (positions, table) = (positions.clone(), table.clone());
    tape.record_taking(y, node.wants_gradient(), move |gradients, dy| {
        gradients.add(node, rope::rotate(dy, &positions, &table, heads, true));
    })
}

/// Attention of q [T, H * E] over k, v [T, K * E].
pub fn attention(tape: &mut Tape, q: Var, k: Var, v: Var, ranges: &Ranges, heads: Heads) -> Var {
    let [out, stats] =
        tape.dear([true, false], || attention::forward(&q.value, &k.value, &v.value, ranges, heads).into());
    let needed = q.wants_gradient() || k.wants_gradient() || v.wants_gradient();
    let (ranges, kept) = (ranges.clone(), out.clone());
    tape.record(out, needed, move |gradients, dout| {
        let saved = [&q.value, &k.value, &v.value, &kept, &stats];
        let (dq, dk, dv) = attention::backward(saved, dout, &ranges, heads);
        gradients.add(&q, dq);
        gradients.add(&k, dk);
        gradients.add(&v, dv);
    })
}

/// silu(gate) * up
pub fn swiglu(tape: &mut Tape, gate: Var, up: Var) -> Var {
    let y = activation::swiglu(&gate.value, &up.value);
    let needed = gate.wants_gradient() || up.wants_gradient();
    tape.record(y, needed, move |gradients, dy| {
        let (Var { value: gate, node: gate_node }, Var { value: up, node: up_node }) = (gate, up);
        let (dgate, dup) = activation::swiglu_backward(gate, up, dy);
        gradients.add(gate_node, dgate);
        gradients.add(up_node, dup);
    })
}

/// GELU or quick-GELU.
pub fn activation(tape: &mut Tape, x: &Var, kind: Activation) -> Var {
    let y = kind.forward(&x.value);
    let x = x.clone();
    tape.record(y, x.wants_gradient(), move |gradients, dy| {
        gradients.add(&x, kind.backward(&x.value, dy));
    })
}

/// Rows of the table [V, D] by id into y [T, D]; `u32::MAX` leaves a row to [`place_rows`].
pub fn embedding(tape: &mut Tape, table: &Weight, ids: &[u32]) -> Var {
    let gpu = table.value.gpu();
    let y = if ids.contains(&u32::MAX) {
        elementwise::zeros(gpu, &[ids.len(), table.value.cols()])
    } else {
        Tensor::empty(gpu, &[ids.len(), table.value.cols()])
    };
    embedding::gather_into(&table.value, &Tensor::from_u32(gpu, ids, &[ids.len()]), &y);
    let Some(dtable) = table.grad.clone().filter(|_| tape.is_recording()) else { return tape.constant(y) };
    let csr = embedding::Csr::new(gpu, ids);
    tape.record(y, true, move |_, dy| embedding::scatter_add(dy, &csr, &dtable))
}

/// `base` [T, D] with the rows `rows` (u32 [N], none twice) replaced by `values` [N, D]: pictures among words.
/// `base` must hold nothing that trains in those rows.
pub fn place_rows(tape: &mut Tape, base: &Var, rows: &Tensor, values: &Var) -> Var {
    let y = Tensor::empty(base.value.gpu(), base.value.shape());
    y.copy_from(&base.value);
    embedding::scatter(&values.value, rows, &y);
    let needed = base.wants_gradient() || values.wants_gradient();
    let (base, rows, values) = (base.node(), rows.clone(), values.node());
    tape.record_taking(y, needed, move |gradients, dy| {
        if values.wants_gradient() {
            gradients.add(values, embedding::gather(&dy, &rows));
        }
        gradients.add(base, dy);
    })
}

/// The rows `rows` (u32 [N], none twice) of x [T, D].
pub fn pick_rows(tape: &mut Tape, x: &Var, rows: &Tensor) -> Var {
    let y = embedding::gather(&x.value, rows);
    let (node, shape, rows) = (x.node(), x.value.shape().to_vec(), rows.clone());
    tape.record(y, x.wants_gradient(), move |gradients, dy| {
        let dx = elementwise::zeros(dy.gpu(), &shape);
        embedding::scatter(dy, &rows, &dx);
        gradients.add(node, dx);
    })
}

/// Class token and positions around patches [B, P, D]: [B * (P + 1), D].
pub fn assemble_patches(tape: &mut Tape, patches: &Var, class_embedding: &Weight, position: &Weight) -> Var {
    let y = patch_embed::assemble(&patches.value, &class_embedding.value, &position.value);
    let d = y.cols();
    let y = y.reshape(&[y.len() / d, d]);
    let tokens = position.value.rows();
    let needed = patches.wants_gradient() || position.trains();
    let (node, shape) = (patches.node(), patches.value.shape().to_vec());
    let (class_embedding, position) = (class_embedding.clone(), position.clone());
    tape.record(y, needed, move |gradients, dy| {
        let dy = dy.reshape(&[dy.rows() / tokens, tokens, d]);
        if let (Some(dclass), Some(dposition)) = (&class_embedding.grad, &position.grad) {
            patch_embed::backward_position(&dy, dposition, dclass);
        }
        if node.wants_gradient() {
            gradients.add(node, patch_embed::backward(&dy).reshape(&shape));
        }
    })
}

/// How many rows of logits [.., V] are there at once for `n` rows [.., D]: they cost about what the hidden states do.
pub fn head_chunk(n: usize, d: usize, vocab_size: usize) -> usize {
    n.div_ceil(vocab_size.div_ceil(d)).next_power_of_two().max(512)
}

/// The token losses [N] of hidden rows x [N, D] under the head W [V, D] for `targets` (u32 [N]). The gradient of
/// `scale` times their sum is finished here, in the forward, while the logits are at hand: seed the backward with
/// anything. Rows go in chunks ([`head_chunk`]).
pub fn head_loss(tape: &mut Tape, x: &Var, head: &Weight, targets: &[u32], scale: f32) -> Var {
    let gpu = x.value.gpu();
    let (n, d, vocab_size) = (targets.len(), x.value.cols(), head.value.rows());
    let losses = Tensor::empty(gpu, &[n]);
    let needed = tape.is_recording() && (x.wants_gradient() || head.trains());
    let dx = (needed && x.wants_gradient()).then(|| Tensor::empty(gpu, &[n, d]));
    let chunk = head_chunk(n, d, vocab_size);
    let _logits = gpu.account(Account::Logits);
    for first in (0..n).step_by(chunk) {
        let rows = chunk.min(n - first);
        let part = x.value.row_part(first, rows);
        let logits = product(Layout::Nt, &part, &head.value);
        let targets = Tensor::from_u32(gpu, &targets[first..first + rows], &[rows]);
        let chunk_losses = if needed {
            cross_entropy::loss_and_gradient(&logits, &targets, scale)
        } else {
            cross_entropy::loss(&logits, &targets)
        };
        losses.reshape(&[n, 1]).copy_rows(first, &chunk_losses.reshape(&[rows, 1]), 0, rows);
        let largest = needed.then(|| largest_in(&logits, &head.value)).flatten();
        let largest = largest.as_ref();
        if let Some(dx) = &dx {
            product_into(Layout::Nn, &logits, &head.value, &dx.row_part(first, rows), scaled_by(largest));
        }
        if let Some(dhead) = head.grad.as_ref().filter(|_| needed) {
            product_into(Layout::Tn, &logits, &part, dhead, Epilogue { largest, ..adding_beside(head) });
        }
    }
    let node = x.node();
    tape.record(losses, needed, move |gradients, _| {
        if let Some(dx) = dx {
            gradients.add(node, dx);
        }
    })
}

/// The same elements under another shape.
pub fn reshape(tape: &mut Tape, x: &Var, shape: &[usize]) -> Var {
    let y = x.value.reshape(shape);
    let (node, shape) = (x.node(), x.value.shape().to_vec());
    tape.record_taking(y, x.wants_gradient(), move |gradients, dy| gradients.add(node, dy.reshape(&shape)))
}

/// The same elements on another device, by way of the host, as their gradient goes back; nothing where they are there.
pub fn to_device(tape: &mut Tape, x: Var, gpu: &Gpu) -> Var {
    let Var { value, node } = x;
    if value.gpu().is(gpu) {
        return Var { value, node };
    }
    let (from, crossing) = (value.gpu().clone(), tape.crossing.clone());
    let cross = move |value: Tensor, to: &Gpu| {
        let offloaded = value.offload();
        let bytes = (value.len() * value.dtype().bytes()) as u64;
        // A device does what it is told in order: the memory may be used again.
        drop(value);
        if let Some(crossing) = &crossing {
            crossing(bytes);
        }
        offloaded.restore_on(to)
    };
    let y = cross(value, gpu);
    tape.record_taking(y, node.wants_gradient(), move |gradients, dy| gradients.add(node, cross(dy, &from)))
}
