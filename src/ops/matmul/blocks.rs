//! Products on host processors whose operands' rows are too long for uniforms: blocks of the operands are copied first,
//! those of B widened, and with rows along C's.

use super::{Call, Layout, Region, length, typed};
use crate::{
    ops::uniform_rows,
    tensor::{Dtype, Tensor},
};

/// The longest side of a block.
const SIDE: usize = 1024;
/// The longest rows that are taken as they are: eight of them are a uniform.
const LONGEST: usize = crate::gpu::UNIFORM_BYTES as usize / 4 / 8;

/// A range, `cut` into pieces of at most [`SIDE`].
fn pieces((from, to): (usize, usize), cut: bool) -> impl Iterator<Item = (usize, usize)> {
    let step = if cut { SIDE } else { (to - from).max(1) };
    (from..to).step_by(step).map(move |start| (start, (start + step).min(to)))
}

impl Call<'_> {
    /// Whether uniforms of whole rows will not do.
    pub(super) fn wants_blocks(&self) -> bool {
        let (a, b) = (self.a.cols(), self.b.cols());
        match self.layout {
            // Lanes want many rows of W in a uniform: the transposed matrix has them.
            Layout::Nt => a > LONGEST || self.b.dtype().is_packed() || uniform_rows(b, Dtype::F32) < 64,
            Layout::Nn | Layout::Tn => a.max(b) > LONGEST,
        }
    }

    /// Runs a region block by block: over K outermost, each block after the first is added to C.
    pub(super) fn by_blocks(&self, region: Region) {
        let Self { layout, a, b, b_first, c, epilogue, .. } = *self;
        let moved = |(from, to): (usize, usize), first: usize| (from - first, to - first);
        let (wide_a, wide_b) = (a.cols() > LONGEST, b.cols() > LONGEST || layout == Layout::Nt);
        // What is copied is cut; of what is not, K stays whole.
        for k in pieces(region.k, length(region.k) > LONGEST) {
            for m in pieces(region.m, wide_a && layout == Layout::Tn) {
                let a_block = wide_a.then(|| match layout {
                    Layout::Tn => block(a, k, m, false),
                    Layout::Nt | Layout::Nn => block(a, m, k, false),
                });
                let (a, a_first) = match (&a_block, layout) {
                    (None, _) => (a, [0, 0]),
                    (Some(block), Layout::Tn) => (block, [k.0, m.0]),
                    (Some(block), Layout::Nt | Layout::Nn) => (block, [m.0, k.0]),
                };
                for n in pieces(region.n, wide_b) {
                    let b_block = wide_b.then(|| match layout {
                        Layout::Nt => block(b, moved(n, b_first[0]), moved(k, b_first[1]), true),
                        Layout::Nn | Layout::Tn => block(b, moved(k, b_first[0]), moved(n, b_first[1]), false),
                    });
                    let (b, b_first) = b_block.as_ref().map_or((b, b_first), |block| (block, [k.0, n.0]));
                    let layout = if layout == Layout::Tn { Layout::Tn } else { Layout::Nn };
                    Call { layout, a, a_first, b, b_first, c, epilogue, rounded: false }.by_uniforms(Region {
                        m,
                        n,
                        k,
                    });
                }
            }
        }
    }
}

/// Rows and columns of x (half-open ranges) in f32, `transposed` with columns as rows.
pub(in crate::ops) fn block(x: &Tensor, rows: (usize, usize), cols: (usize, usize), transposed: bool) -> Tensor {
    let (gpu, row) = (x.gpu(), x.cols());
    let (height, width) = (length(rows), length(cols));
    let y = Tensor::empty(gpu, &if transposed { [width, height] } else { [height, width] });
    let elements = (gpu.max_binding() as usize / x.dtype().bytes()).saturating_sub(x.dtype().alignment());
    let bindable = (elements / row.max(1)).max(1);
    for first in (0..height).step_by(bindable) {
        let height = bindable.min(height - first);
        let (start, count) = ((rows.0 + first) * row, height * row);
        let (source, before) =
            if x.dtype().is_packed() { x.packed_range(start, count) } else { x.range_from(start, count) };
        let (m, n, to) = if transposed { (width, height, first) } else { (height, width, first * width) };
        let params = [m, n, 0, row, 0, y.cols(), before + cols.0, 0, to, 0, 0, 0, 0].map(|value| value as u32);
        let kernel = if transposed {
            typed(x.dtype(), ["matmul.block.transposed", "matmul.block.transposed_bf16", "matmul.block.transposed_f16"])
        } else {
            typed(x.dtype(), ["matmul.block.straight", "matmul.block.straight_bf16", "matmul.block.straight_f16"])
        };
        gpu.dispatch(kernel, &[source, y.binding()], &params, [n.div_ceil(16) as u32, m.div_ceil(16) as u32, 1]);
    }
    y
}
