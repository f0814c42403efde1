//! Products on host processors. Operands are bound as uniforms of 64 KiB, whose loads are cheap there: both with K along
//! their rows, or rows of W in lanes where there are few rows of A or of W. Where workgroup memory is cheaper (Mesa 26), A
//! is staged in it instead.

use super::{Call, Layout, Region, length, typed};
use crate::{
    gpu::{Binding, Gpu, UNIFORM_BYTES},
    ops::uniform_rows,
    tensor::{ALIGNMENT, Dtype, Tensor},
};

/// The block of C of a workgroup of `matmul.by_column` or `matmul.by_column_staged`.
#[derive(Clone, Copy)]
struct Block {
    name: &'static str,
    /// ROWS in shaders/variants.
    rows: usize,
    /// COLS times THREADS there.
    cols: usize,
}

/// Blocks for most products, for narrow results, for a few rows of A.
const BLOCKS: [Block; 3] = [
    Block { name: "wide", rows: 32, cols: 64 },
    Block { name: "narrow", rows: 32, cols: 8 },
    Block { name: "few", rows: 8, cols: 64 },
];
const STAGED_BLOCKS: [Block; 3] =
    [Block { cols: 128, ..BLOCKS[0] }, Block { cols: 16, ..BLOCKS[1] }, Block { cols: 128, ..BLOCKS[2] }];
/// So many rows of A or of W are few.
pub(super) const FEW: usize = 32;
/// Columns of A that are staged at a time (DEPTH in shaders/variants).
pub(super) const STAGED_DEPTH: usize = 64;

/// The one of three blocks for a product of m x n.
fn fitting([wide, narrow, _]: &[Block; 3], m: usize, n: usize) -> usize {
    if m < wide.rows {
        2
    } else if n <= 2 * narrow.cols {
        1
    } else {
        0
    }
}

/// The same of a product with A staged.
pub(super) fn fitting_staged(m: usize, n: usize) -> usize {
    fitting(&STAGED_BLOCKS, m, n)
}

/// The kernel and its workgroups for a product with A staged, by one of three blocks.
pub(super) fn staged(layout: Layout, b: Dtype, [m, n]: [usize; 2], block: usize) -> (String, [u32; 3]) {
    let block = STAGED_BLOCKS[block];
    let layout = match layout {
        Layout::Nt => "nt",
        Layout::Nn => "nn",
        Layout::Tn => "tn",
    };
    let name = format!("matmul.by_column_staged.{layout}_{}{}", block.name, typed(b, ["", "_bf16", "_f16"]));
    (name, [n.div_ceil(block.cols) as u32, m.div_ceil(block.rows) as u32, 1])
}

/// An operand with K along its rows, and the column where a region begins in it.
#[derive(Clone, Copy)]
pub(super) struct ByK<'a> {
    pub tensor: &'a Tensor,
    /// Its row of the region's first k.
    pub row: usize,
    pub col: usize,
}

impl<'a> ByK<'a> {
    /// A uniform for each window of `window` rows of `count`, and the elements before the first of each, a byte each. A
    /// window that begins past the end has the last row, of which nothing is summed.
    fn windows(self, window: usize, count: usize) -> ([Binding<'a>; WINDOWS], u32) {
        let Self { tensor, row, .. } = self;
        let windows: [_; WINDOWS] =
            std::array::from_fn(|w| tensor.uniform((row + (w * window).min(count - 1)) * tensor.cols()));
        (
            windows.map(|(binding, _)| binding),
            windows.iter().rev().fold(0, |bytes, (_, before)| bytes << 8 | *before as u32),
        )
    }
}

/// Whether an operand's rows can be read as they are: whole vec4s from where a region begins, and a block wide.
pub(super) fn reads_rows(a: ByK<'_>, m: usize, n: usize) -> bool {
    let whole = [a.tensor.cols(), a.col, m].iter().all(|x| x.is_multiple_of(4));
    whole && m >= BLOCKS[fitting(&BLOCKS, m, n)].rows
}

impl Call<'_> {
    /// A region of operands with K along their rows, in as many dispatches as their uniforms want.
    pub(super) fn by_columns(&self, region: Region, a: ByK<'_>, b: ByK<'_>) {
        if self.c.gpu().only_counts() {
            // It can be thousands of launches, none of which allocates.
            return;
        }
        let (m, n) = (length(region.m), length(region.n));
        let block = BLOCKS[fitting(&BLOCKS, m, n)];
        // What is read in vain beyond a short row lies in the uniform too.
        let fit = |cols: usize, block: usize| {
            let slack = block.saturating_sub(cols) + ALIGNMENT;
            (UNIFORM_BYTES as usize / 4 - slack) / cols
        };
        let most = fit(a.tensor.cols(), block.rows).min(fit(b.tensor.cols(), block.cols)) * WINDOWS;
        for k in parts(region.k, most) {
            let (done, count) = (k.0 - region.k.0, length(k));
            let window = count.div_ceil(WINDOWS);
            let [a, b] = [a, b].map(|operand| ByK { row: operand.row + done, ..operand });
            let ((a_bindings, a_before), (b_bindings, b_before)) = (a.windows(window, count), b.windows(window, count));
            let (c_binding, c_before) = self.c.range_from(region.m.0 * self.c.cols(), m * self.c.cols());
            let first = k.0 == 0;
            let bias = self.epilogue.bias.filter(|_| first).map(|bias| bias.range_from(region.n.0, n));
            let (bias_binding, bias_before) = bias.unwrap_or((c_binding, 0));
            let params = [
                m as u32,
                n as u32,
                count as u32,
                a.tensor.cols() as u32,
                b.tensor.cols() as u32,
                self.c.cols() as u32,
                a.col as u32,
                b.col as u32,
                (c_before + region.n.0) as u32,
                u32::from(bias.is_some()) | u32::from(self.epilogue.accumulate || !first) << 1,
                self.epilogue.alpha.unwrap_or(1.0).to_bits(),
                bias_before as u32,
                window as u32,
                a_before,
                b_before,
            ];
            let kernel = format!("matmul.by_column.{}", block.name);
            let bindings: Vec<_> = [c_binding, bias_binding].into_iter().chain(a_bindings).chain(b_bindings).collect();
            let groups = [n.div_ceil(block.cols) as u32, m.div_ceil(block.rows) as u32, 1];
            self.c.gpu().dispatch(&kernel, &bindings, &params, groups);
        }
    }

    /// Whether an NT product goes to [`Call::by_lanes`]: each row is a uniform, and there are few of A or of W; or
    /// hardly more, of W in 16 bits where operands are best taken as uniforms.
    pub(super) fn wants_lanes(&self, region: Region) -> bool {
        let (fit_a, fit_b) = (uniform_rows(self.a.cols(), Dtype::F32), uniform_rows(self.b.cols(), self.b.dtype()));
        let few = length(region.m).min(length(region.n)) <= FEW;
        let packed = self.b.dtype().is_packed() && self.c.gpu().wants_uniforms() && length(region.m) <= 2 * FEW;
        lanes_fit(self.c.gpu()) && fit_a > 0 && fit_b > 0 && (few || (packed && fit_a >= 8))
    }

    /// NT: rows of W are spread over lanes, as many as fit into LANE_WINDOWS uniforms a dispatch.
    pub(super) fn by_lanes(&self, region: Region) {
        let (fit_a, fit_b) = (uniform_rows(self.a.cols(), Dtype::F32), uniform_rows(self.b.cols(), self.b.dtype()));
        if self.c.gpu().only_counts() {
            return;
        }
        // Whole vectors of lanes; and few enough columns that their bias is one uniform.
        let window = (if fit_b >= LANES { fit_b / LANES * LANES } else { fit_b }).min(1024);
        for m in parts(region.m, fit_a) {
            for first in (region.n.0..region.n.1).step_by(window * LANE_WINDOWS) {
                let n = (first, (first + window * LANE_WINDOWS).min(region.n.1));
                self.launch_lanes(Region { m, n, k: region.k }, window);
            }
        }
    }

    fn launch_lanes(&self, region: Region, window: usize) {
        let Self { a, b, b_first, c, epilogue, .. } = *self;
        let (m, n, k) = (length(region.m), length(region.n), length(region.k));
        let windows = n.div_ceil(window);
        // Windows past the last are bound, and not read.
        let b_bindings: [_; LANE_WINDOWS] =
            std::array::from_fn(|w| uniform(b, (region.n.0 - b_first[0] + w.min(windows - 1) * window) * b.cols()));
        let (a_binding, a_before) = a.uniform(region.m.0 * a.cols());
        let bias = epilogue.bias.map(|bias| bias.uniform(region.n.0));
        let (bias_binding, bias_before) = bias.unwrap_or((a_binding, 0));
        let (c_binding, c_before) = c.range_from(region.m.0 * c.cols(), m * c.cols());
        let quad = 16 / b.dtype().bytes();
        let even = b_bindings.iter().map(|(_, elements)| *elements).chain([k]).all(|x| x.is_multiple_of(quad));
        let even = even && a_before.is_multiple_of(4);
        let (names, rows) = match (m, even) {
            (1, true) => (["matmul.by_lane.one", "matmul.by_lane.one_bf16", "matmul.by_lane.one_f16"], 1),
            (1, false) => (["matmul.by_lane.one_odd", "matmul.by_lane.one_bf16_odd", "matmul.by_lane.one_f16_odd"], 1),
            (2..=4, true) => (["matmul.by_lane.few", "matmul.by_lane.few_bf16", "matmul.by_lane.few_f16"], 4),
            (2..=4, false) => {
                (["matmul.by_lane.few_odd", "matmul.by_lane.few_bf16_odd", "matmul.by_lane.few_f16_odd"], 4)
            }
            (_, true) => (["matmul.by_lane.many", "matmul.by_lane.many_bf16", "matmul.by_lane.many_f16"], 8),
            (_, false) => {
                (["matmul.by_lane.many_odd", "matmul.by_lane.many_bf16_odd", "matmul.by_lane.many_f16_odd"], 8)
            }
        };
        let params = [
            m as u32,
            n as u32,
            k as u32,
            a.cols() as u32,
            b.cols() as u32,
            c.cols() as u32,
            a_before as u32,
            0,
            (c_before + region.n.0) as u32,
            u32::from(bias.is_some()) | u32::from(epilogue.accumulate) << 1,
            epilogue.alpha.unwrap_or(1.0).to_bits(),
            bias_before as u32,
            window as u32,
            b_bindings[0].1 as u32,
        ];
        let groups = [window.min(n).div_ceil(LANES) as u32, m.div_ceil(rows) as u32, windows as u32];
        let bindings: Vec<_> =
            [c_binding, bias_binding, a_binding].into_iter().chain(b_bindings.map(|(binding, _)| binding)).collect();
        c.gpu().dispatch(typed(b.dtype(), names), &bindings, &params, groups);
    }
}

/// Threads of a workgroup of `matmul.by_lane`, and uniforms of W in one dispatch (THREADS and WINDOWS in
/// shaders/variants).
const LANES: usize = 8;
const LANE_WINDOWS: usize = 12;

/// Whether a kernel may have so many uniforms: those, bias, A, and parameters where there is no immediate data. All software
/// Vulkan that is known has them.
pub(super) fn lanes_fit(gpu: &Gpu) -> bool {
    gpu.facts().limits.max_uniform_buffers_per_shader_stage as usize >= LANE_WINDOWS + 3
}

/// Uniforms of each operand in a dispatch of `matmul.by_column` (WINDOWS in shaders/variants).
const WINDOWS: usize = 4;

/// A range in equal parts of at most `most`, cut at multiples of 16: two threads then have as many workgroups each.
fn parts((from, to): (usize, usize), most: usize) -> impl Iterator<Item = (usize, usize)> {
    let grain = if most >= 16 { 16 } else { 8 };
    let most = if most >= grain { most / grain * grain } else { most.max(1) };
    let count = (to - from).div_ceil(most).max(1);
    let step = (to - from).div_ceil(count).next_multiple_of(grain).min(most).max(1);
    (from..to).step_by(step).map(move |start| (start, (start + step).min(to)))
}

/// A uniform of a weight of either kind.
fn uniform(tensor: &Tensor, start: usize) -> (Binding<'_>, usize) {
    if tensor.dtype().is_packed() { tensor.packed_uniform(start) } else { tensor.uniform(start) }
}
