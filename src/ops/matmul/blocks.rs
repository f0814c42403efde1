//! What host processors multiply by columns: blocks of the operands, copied with K along their rows where they are not so
//! already, too long for uniforms, or in 16 bits.

use super::{
    Call, Layout, Region,
    host::{ByK, FEW, lanes_fit, reads_rows},
    length, typed,
};
use crate::{
    ops::uniform_rows,
    tensor::{Dtype, Tensor},
};

/// The longest rows, in elements, that are read as they are: 31 of them fit into a uniform.
const LONGEST: usize = 512;
/// The longest rows of a copy, and the most of them.
const SIDE: usize = 256;
const DEPTH: usize = 2048;

/// A range, cut into pieces of at most `most`.
fn pieces((from, to): (usize, usize), most: usize) -> impl Iterator<Item = (usize, usize)> {
    (from..to).step_by(most).map(move |start| (start, start.saturating_add(most).min(to)))
}

fn moved((from, to): (usize, usize), first: usize) -> (usize, usize) {
    (from - first, to - first)
}

impl Call<'_> {
    /// Runs a region block by block: over K outermost, each block after the first is added to C.
    pub(super) fn by_blocks(&self, region: Region) {
        let Self { layout, a, a_first, b, b_first, c, epilogue, .. } = *self;
        let whole_k = region.k == (0, a.cols()) && a_first == [0, 0] && uniform_rows(a.cols(), Dtype::F32) > 0;
        if layout == Layout::Nn && whole_k && length(region.n) <= FEW && lanes_fit(a.gpu()) {
            // To copy A would cost more than the product: lanes take it as it is.
            let size = [length(region.n), length(region.k)];
            let b = block(b, moved(region.k, b_first[0]), moved(region.n, b_first[1]), size, true);
            return Call { layout: Layout::Nt, b: &b, b_first: [region.n.0, 0], ..*self }.by_lanes(region);
        }
        // A buffer cannot be bound as a uniform and as storage at once.
        let stored = |x: &Tensor| [Some(c), epilogue.bias].into_iter().flatten().any(|other| x.shares_buffer(other));
        let a_by_k = layout == Layout::Tn;
        let a_at =
            |k: (usize, usize), m: (usize, usize)| ByK { tensor: a, row: k.0 - a_first[0], col: m.0 - a_first[1] };
        let whole_a = a_by_k
            && a.cols() <= LONGEST
            && !stored(a)
            && reads_rows(a_at(region.k, region.m), length(region.m), length(region.n));
        let whole_b = layout != Layout::Nt && b.cols() <= LONGEST && b.dtype() == Dtype::F32 && !stored(b);
        for k in pieces(region.k, if whole_a && whole_b { usize::MAX } else { DEPTH }) {
            let a_blocks: Vec<_> = pieces(region.m, if whole_a { usize::MAX } else { SIDE })
                .map(|m| {
                    let (rows, cols) = if a_by_k { (k, m) } else { (m, k) };
                    // Whole vec4s, and a block of C at least.
                    let size = [length(k), length(m).next_multiple_of(32)];
                    let copy = || block(a, moved(rows, a_first[0]), moved(cols, a_first[1]), size, !a_by_k);
                    (m, (!whole_a).then(copy))
                })
                .collect();
            for n in pieces(region.n, if whole_b { usize::MAX } else { SIDE }) {
                let b_block = (!whole_b).then(|| {
                    let (rows, cols) = if layout == Layout::Nt { (n, k) } else { (k, n) };
                    let size = [length(k), length(n)];
                    block(b, moved(rows, b_first[0]), moved(cols, b_first[1]), size, layout == Layout::Nt)
                });
                let b = match &b_block {
                    Some(block) => ByK { tensor: block, row: 0, col: 0 },
                    None => ByK { tensor: b, row: k.0 - b_first[0], col: n.0 - b_first[1] },
                };
                for &(m, ref a_block) in &a_blocks {
                    let a = a_block.as_ref().map_or(a_at(k, m), |block| ByK { tensor: block, row: 0, col: 0 });
                    self.by_columns(Region { m, n, k }, a, b);
                }
            }
        }
    }
}

/// Rows and columns of x (half-open ranges) in f32, `transposed` with columns as rows, in a new tensor of this size, which may
/// have longer rows.
pub(in crate::ops) fn block(
    x: &Tensor,
    rows: (usize, usize),
    cols: (usize, usize),
    size: [usize; 2],
    transposed: bool,
) -> Tensor {
    let (gpu, row) = (x.gpu(), x.cols());
    let (height, width) = (length(rows), length(cols));
    let y = Tensor::empty(gpu, &size);
    let elements = (gpu.max_binding() as usize / x.dtype().bytes()).saturating_sub(x.dtype().alignment());
    let bindable = (elements / row.max(1)).max(1);
    for first in (0..height).step_by(bindable) {
        let height = bindable.min(height - first);
        let (start, count) = ((rows.0 + first) * row, height * row);
        let (source, before) =
            if x.dtype().is_packed() { x.packed_range(start, count) } else { x.range_from(start, count) };
        let (m, n, to) = if transposed { (width, height, first) } else { (height, width, first * y.cols()) };
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
