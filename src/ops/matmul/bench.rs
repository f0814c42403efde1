//! What is timed of products: the linears of a decoder, its head, an adapter beside them, and decoding.

use super::{Layout, product};
use crate::{
    gpu::Gpu,
    ops::{
        Case, Cost, Shapes,
        case::{floats, random},
        cooperative, roof,
    },
    tensor::{Dtype, Tensor},
};

/// The products of a layout with B of a type. `m` are rows of activations, `n` and `k` a weight's rows and columns.
pub fn cases(layout: Layout, dtype: Dtype, shapes: &Shapes) -> Vec<Case> {
    let Shapes { tokens, hidden, intermediate, vocab, targets, rank, .. } = *shapes;
    let mut all = vec![("q_proj", tokens, hidden, hidden), ("up_proj", tokens, intermediate, hidden)];
    if dtype != Dtype::F16 {
        all.extend([("down_proj", tokens, hidden, intermediate), ("lm_head", targets, vocab, hidden)]);
    }
    if dtype == Dtype::F32 {
        all.extend([("lora_A", tokens, rank, hidden), ("lora_B", tokens, hidden, rank)]);
    }
    if layout == Layout::Nt {
        all.push(("up_proj, decode", 1, intermediate, hidden));
    }
    // A figure that is known of many programs. On host processors passes are short, and this would take minutes.
    if layout == Layout::Nt && dtype == Dtype::F32 && 2 * tokens == hidden {
        all.push(("square", hidden, hidden, hidden));
    }
    let roof: Arithmetic = match dtype {
        Dtype::F16 | Dtype::Bf16 => cooperative::roof_in_f16,
        _ => |_| roof::FMA,
    };
    let case = |(pass, m, n, k)| case((layout, dtype), (pass, [m, n, k]), roof, move |a, b| product(layout, a, b));
    all.into_iter().map(case).collect()
}

/// The roof of a case's arithmetic on a device.
type Arithmetic = fn(&Gpu) -> &'static str;

/// A product by `run`, for a weight of n x k and m rows of activations.
pub fn case(
    (layout, dtype): (Layout, Dtype),
    (pass, [m, n, k]): (&'static str, [usize; 3]),
    roof: Arithmetic,
    run: impl Fn(&Tensor, &Tensor) -> Tensor + Copy + 'static,
) -> Case {
    let (a, b) = match layout {
        Layout::Nt => ([m, k], [n, k]),
        Layout::Nn => ([m, n], [n, k]),
        Layout::Tn => ([m, n], [m, k]),
    };
    let out = m * n + n * k + m * k - a[0] * a[1] - b[0] * b[1];
    let bytes = 4 * (a[0] * a[1] + out) + dtype.bytes() * b[0] * b[1];
    let cost = Cost { flops: (2 * m * n * k) as u64, bytes: bytes as u64 };
    Case::of(pass, format!("{}x{} by {}x{}", a[0], a[1], b[0], b[1]), cost).limited_by(roof).run(move |gpu| {
        let (a, b) = (floats(gpu, &a), random(gpu, dtype, &b));
        move || run(&a, &b)
    })
}
