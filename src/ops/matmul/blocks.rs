//! Products on host processors with a copy of A, block by block: in NT and NN with K along rows, so that the elements a
//! thread wants of a column lie at fixed distances (on Mesa 25 1.6 times as fast); and where rows are too long for uniforms.

use super::{Call, Region, length, typed};
use crate::{
    ops::uniform_rows,
    tensor::{Dtype, Tensor},
};

/// Elements that a dispatch's uniforms of A hold.
const ELEMENTS: usize = 4 * crate::gpu::UNIFORM_BYTES as usize / 4;
/// The longest side of a block along K.
const DEPTH: usize = 2048;
/// Fewer columns of B do not pay for the copy.
const LEAST_COLUMNS: usize = 256;

/// A range, cut into pieces of at most `most`.
fn pieces((from, to): (usize, usize), most: usize) -> impl Iterator<Item = (usize, usize)> {
    (from..to).step_by(most).map(move |start| (start, start.saturating_add(most).min(to)))
}

impl Call<'_> {
    /// Whether A is copied. It must be where a row does not fit, or what is a uniform would be storage as well.
    pub(super) fn wants_blocks(&self, region: Region) -> bool {
        let Self { a, a_by_k, b, c, epilogue, .. } = *self;
        let shared = [Some(b), Some(c), epilogue.bias].into_iter().flatten().any(|other| a.shares_buffer(other));
        let long = uniform_rows(a.cols(), Dtype::F32) < if a_by_k { 32 } else { 8 };
        let pays = !a_by_k && length(region.n) >= LEAST_COLUMNS && length(region.m) > 16;
        a.gpu().wants_uniforms() && (shared || long || pays)
    }

    /// Runs a region block by block of A: over K outermost, each block after the first is added to C.
    pub(super) fn by_blocks(&self, region: Region) {
        let moved = |(from, to): (usize, usize), first: usize| (from - first, to - first);
        // In TN a sum goes over all of K: only rows are cut.
        for k in pieces(region.k, if self.a_by_k { usize::MAX } else { DEPTH }) {
            let most = if self.a_by_k { 512 } else { (ELEMENTS / length(k)).max(32) / 32 * 32 };
            for m in pieces(region.m, most) {
                let (rows, cols) = if self.a_by_k { (k, m) } else { (m, k) };
                let copied = block(self.a, moved(rows, self.a_first[0]), moved(cols, self.a_first[1]), !self.a_by_k);
                let call = Call { a: &copied, a_by_k: true, a_first: [k.0, m.0], ..*self };
                call.by_columns(Region { m, k, ..region });
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
