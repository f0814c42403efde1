//! Products on host processors. Rows of A go by uniforms of 64 KiB, whose loads are cheap there, or are staged in
//! workgroup memory where that is cheaper; a few of them meet rows of W in lanes.

use super::{Call, Layout, Region, length, typed};
use crate::{
    gpu::Binding,
    ops::uniform_rows,
    tensor::{Dtype, Tensor},
};

/// The block of C of a workgroup of `matmul.by_column` and `matmul.by_column_staged`.
#[derive(Clone, Copy)]
struct Block {
    name: &'static str,
    /// ROWS in shaders/variants.
    rows: usize,
    /// COLS times THREADS there.
    cols: usize,
    /// Uniforms that A is bound as; in NT and NN each of them has [`WINDOW_ROWS`] of the block's rows.
    windows: usize,
}

/// Blocks for most products, for narrow results, for a few rows of A.
const BLOCKS: [Block; 3] = [
    Block { name: "wide", rows: 32, cols: 64, windows: 4 },
    Block { name: "narrow", rows: 32, cols: 8, windows: 4 },
    Block { name: "few", rows: 8, cols: 64, windows: 1 },
];
const STAGED_BLOCKS: [Block; 3] =
    [Block { cols: 128, ..BLOCKS[0] }, Block { cols: 16, ..BLOCKS[1] }, Block { cols: 128, ..BLOCKS[2] }];

/// ROWS / WINDOWS of every block.
const WINDOW_ROWS: usize = 8;
/// Columns of A that are staged at a time (DEPTH in shaders/variants).
const STAGED_DEPTH: usize = 64;

/// The one of three blocks for a product of m x n.
fn fitting([wide, narrow, few]: [Block; 3], m: usize, n: usize) -> Block {
    if m < wide.rows {
        few
    } else if n <= 2 * narrow.cols {
        narrow
    } else {
        wide
    }
}

/// How a block's kernel gets A.
struct Operand<'a> {
    bindings: Vec<Binding<'a>>,
    /// Elements before the first, in all bindings.
    offset: usize,
    /// Elements more in each, a byte each.
    before: u32,
    /// Rows of a binding, or columns that are staged at a time.
    window: usize,
}

impl Call<'_> {
    /// Runs a region in as many dispatches as A's uniforms want.
    pub(super) fn by_columns(&self, region: Region) {
        if self.c.gpu().only_counts() {
            // It can be thousands of launches, none of which allocates.
            return;
        }
        if !self.c.gpu().wants_uniforms() {
            return self.launch_staged(region);
        }
        let (m, n, k) = (length(region.m), length(region.n), length(region.k));
        // vec4 loads need rows that start at, and a fast axis that fills, whole vec4s.
        let fast = if self.a_by_k { m } else { k };
        let even = [self.a.cols(), self.a_start(region).1, fast].iter().all(|x| x.is_multiple_of(4));
        let block = fitting(BLOCKS, m, n);
        // With K along rows a block may begin before its place, but not before the first row of C.
        let even = even && (!self.a_by_k || m >= block.rows);
        let block = if even { block } else { BLOCKS[0] };
        let fit = uniform_rows(self.a.cols(), Dtype::F32);
        let (m_most, k_most) = if self.a_by_k {
            (usize::MAX, fit * block.windows)
        } else {
            (fit / WINDOW_ROWS * WINDOW_ROWS * block.windows, usize::MAX)
        };
        for m in parts(region.m, m_most) {
            for k in parts(region.k, k_most) {
                self.launch_columns(Region { m, k, ..region }, block, even);
            }
        }
    }

    /// Row and column of A's first element in a region.
    fn a_start(&self, region: Region) -> (usize, usize) {
        let (rows, cols) = if self.a_by_k { (region.k, region.m) } else { (region.m, region.k) };
        (rows.0 - self.a_first[0], cols.0 - self.a_first[1])
    }

    /// One dispatch over a region whose rows of A fit into a block's uniforms.
    fn launch_columns(&self, region: Region, block: Block, even: bool) {
        let (rows, (a_row, a_col)) = (length(self.operand_rows(region).0), self.a_start(region));
        let window = rows.div_ceil(block.windows).next_multiple_of(if self.a_by_k { 1 } else { WINDOW_ROWS });
        // A window that begins past the end has the last row, of which nothing is written or summed.
        let windows: Vec<_> =
            (0..block.windows).map(|w| self.a.uniform((a_row + (w * window).min(rows - 1)) * self.a.cols())).collect();
        let operand = Operand {
            bindings: windows.iter().map(|(binding, _)| *binding).collect(),
            offset: a_col,
            before: windows.iter().rev().fold(0, |bytes, (_, before)| bytes << 8 | *before as u32),
            window,
        };
        let tiles = if self.a_by_k { length(region.m).div_ceil(block.rows) } else { window / WINDOW_ROWS };
        self.launch_block(region, "by_column", (block, if even { "" } else { "_odd" }), operand, tiles);
    }

    /// One dispatch over any region, A staged in workgroup memory.
    fn launch_staged(&self, region: Region) {
        let block = fitting(STAGED_BLOCKS, length(region.m), length(region.n));
        let (a_row, a_col) = self.a_start(region);
        let count = length(self.operand_rows(region).0) * self.a.cols();
        let (binding, before) = self.a.range_from(a_row * self.a.cols(), count);
        let operand = Operand { bindings: vec![binding], offset: before + a_col, before: 0, window: STAGED_DEPTH };
        self.launch_block(region, "by_column_staged", (block, ""), operand, length(region.m).div_ceil(block.rows));
    }

    fn launch_block(
        &self,
        region: Region,
        kernel: &str,
        (block, suffix): (Block, &str),
        operand: Operand<'_>,
        tiles: usize,
    ) {
        let Self { layout, a, b, b_first, c, epilogue, .. } = *self;
        let (m, n, k) = (length(region.m), length(region.n), length(region.k));
        let (b_rows, b_cols) = if layout == Layout::Nt { (region.n, region.k) } else { (region.k, region.n) };
        let (b_start, b_count) = ((b_rows.0 - b_first[0]) * b.cols(), length(b_rows) * b.cols());
        let (b_binding, b_before) =
            if b.dtype().is_packed() { b.packed_range(b_start, b_count) } else { b.range_from(b_start, b_count) };
        let (c_binding, c_before) = c.range_from(region.m.0 * c.cols(), m * c.cols());
        let first = region.k.0 == 0;
        let bias = epilogue.bias.filter(|_| first).map(|bias| bias.range_from(region.n.0, n));
        let (bias_binding, bias_before) = bias.unwrap_or((c_binding, 0));
        let params = [
            m as u32,
            n as u32,
            k as u32,
            a.cols() as u32,
            b.cols() as u32,
            c.cols() as u32,
            operand.offset as u32,
            (b_before + b_cols.0 - b_first[1]) as u32,
            (c_before + region.n.0) as u32,
            u32::from(bias.is_some()) | u32::from(epilogue.accumulate || !first) << 1,
            epilogue.alpha.unwrap_or(1.0).to_bits(),
            bias_before as u32,
            operand.window as u32,
            operand.before,
            0,
        ];
        let (a_letter, b_letter) = (if self.a_by_k { 't' } else { 'n' }, if layout == Layout::Nt { 't' } else { 'n' });
        let dtype = typed(b.dtype(), ["", "_bf16", "_f16"]);
        let kernel = format!("matmul.{kernel}.{a_letter}{b_letter}_{}{suffix}{dtype}", block.name);
        let bindings: Vec<_> = [c_binding, bias_binding, b_binding].into_iter().chain(operand.bindings).collect();
        c.gpu().dispatch(&kernel, &bindings, &params, [n.div_ceil(block.cols) as u32, tiles as u32, 1]);
    }

    /// Whether an NT product goes to [`Call::by_lanes`]: each row is a uniform, and there are few of A, or W is in 16 bits.
    pub(super) fn wants_lanes(&self, region: Region) -> bool {
        let (fit_a, fit_b) = (uniform_rows(self.a.cols(), Dtype::F32), uniform_rows(self.b.cols(), self.b.dtype()));
        let few = length(region.m) <= 32;
        fit_a > 0 && fit_b > 0 && (few || (self.b.dtype().is_packed() && fit_a >= 8))
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
        let mut before = [0u32; LANE_WINDOWS / 4];
        for (w, (_, elements)) in b_bindings.iter().enumerate() {
            before[w / 4] |= (*elements as u32) << (8 * (w % 4));
        }
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
            before[0],
            before[1],
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
const LANE_WINDOWS: usize = 8;

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
