//! Products on host processors, whose operands are bound as uniforms of 64 KiB: such loads are cheap there, those of
//! storage are not.

use super::{Call, Layout, Region, length, typed};
use crate::{
    gpu::Binding,
    ops::uniform_rows,
    tensor::{Dtype, Tensor},
};

impl Call<'_> {
    /// Cuts a region until the rows of A and of B are uniforms of 64 KiB at most.
    pub(super) fn by_uniforms(&self, region: Region) {
        if self.c.gpu().only_counts() {
            // It can be a hundred thousand launches, none of which allocates.
            return;
        }
        let (fit_a, fit_b) = (uniform_rows(self.a.cols(), Dtype::F32), uniform_rows(self.b.cols(), self.b.dtype()));
        let (m_most, n_most, window) = match self.layout {
            Layout::Nt => (fit_a, fit_b, Window { rows: usize::MAX, count: 1 }),
            Layout::Nn => (fit_a, usize::MAX, Window::new(self.b.cols(), usize::MAX, self.b.dtype())),
            Layout::Tn => (usize::MAX, usize::MAX, Window::new(self.a.cols(), self.b.cols(), Dtype::F32)),
        };
        for m in parts(region.m, m_most) {
            for n in parts(region.n, n_most) {
                for k in parts(region.k, window.most()) {
                    self.launch_uniform(Region { m, n, k }, window);
                }
            }
        }
    }

    /// One dispatch over a region whose operands fit into uniforms.
    fn launch_uniform(&self, region: Region, window: Window) {
        let Self { layout, a, a_first, b, b_first, c, epilogue, .. } = *self;
        let (m, n, k) = (length(region.m), length(region.n), length(region.k));
        let starts =
            |(rows, cols): ((usize, usize), (usize, usize)), first: [usize; 2]| (rows.0 - first[0], cols.0 - first[1]);
        let (a_row, a_col) =
            starts(if layout == Layout::Tn { (region.k, region.m) } else { (region.m, region.k) }, a_first);
        let (b_row, b_col) =
            starts(if layout == Layout::Nt { (region.n, region.k) } else { (region.k, region.n) }, b_first);
        let rows = window.rows.min(k.next_multiple_of(4));
        // A window past the end is bound, and not read: the first one serves.
        let at = |w: usize, row: usize| if w * rows < k { row + w * rows } else { row };
        let b_count = if layout == Layout::Nt { 1 } else { WINDOWS };
        let a_count = if layout == Layout::Tn { WINDOWS } else { 1 };
        let b_bindings: Vec<_> = (0..b_count).map(|w| uniform(b, at(w, b_row) * b.cols())).collect();
        let a_bindings: Vec<_> = (0..a_count).map(|w| a.uniform(at(w, a_row) * a.cols())).collect();
        let (a_offset, b_offset) = (a_bindings[0].1 + a_col, b_bindings[0].1 + b_col);
        let first = region.k.0 == 0;
        let bias = epilogue.bias.filter(|_| first).map(|bias| bias.uniform(region.n.0));
        let (bias_binding, bias_before) = bias.unwrap_or((a_bindings[0].0, 0));

        // vec4 loads need rows that start at, and a fast axis that fills, whole vec4s.
        let fast = if layout == Layout::Tn { m } else { k };
        let mut even = [a.cols(), a_offset, fast].iter().all(|x| x.is_multiple_of(4));
        even &= layout != Layout::Nt || (b.cols().is_multiple_of(4) && b_offset.is_multiple_of(4));
        let wide = n > 48;
        let kernel = match (layout, wide, even) {
            (Layout::Nt, true, true) => "matmul.by_uniform.nt_wide",
            (Layout::Nt, true, false) => "matmul.by_uniform.nt_wide_odd",
            (Layout::Nt, false, true) => "matmul.by_uniform.nt_narrow",
            (Layout::Nt, false, false) => "matmul.by_uniform.nt_narrow_odd",
            (Layout::Nn, true, true) => typed(
                b.dtype(),
                ["matmul.by_uniform.nn_wide", "matmul.by_uniform.nn_wide_bf16", "matmul.by_uniform.nn_wide_f16"],
            ),
            (Layout::Nn, true, false) => typed(
                b.dtype(),
                [
                    "matmul.by_uniform.nn_wide_odd",
                    "matmul.by_uniform.nn_wide_odd_bf16",
                    "matmul.by_uniform.nn_wide_odd_f16",
                ],
            ),
            (Layout::Nn, false, true) => typed(
                b.dtype(),
                ["matmul.by_uniform.nn_narrow", "matmul.by_uniform.nn_narrow_bf16", "matmul.by_uniform.nn_narrow_f16"],
            ),
            (Layout::Nn, false, false) => typed(
                b.dtype(),
                [
                    "matmul.by_uniform.nn_narrow_odd",
                    "matmul.by_uniform.nn_narrow_odd_bf16",
                    "matmul.by_uniform.nn_narrow_odd_f16",
                ],
            ),
            (Layout::Tn, true, true) => "matmul.by_uniform.tn_wide",
            (Layout::Tn, true, false) => "matmul.by_uniform.tn_wide_odd",
            (Layout::Tn, false, true) => "matmul.by_uniform.tn_narrow",
            (Layout::Tn, false, false) => "matmul.by_uniform.tn_narrow_odd",
        };
        let (c_binding, c_before) = c.range_from(region.m.0 * c.cols(), m * c.cols());
        let params = [
            m as u32,
            n as u32,
            k as u32,
            a.cols() as u32,
            b.cols() as u32,
            c.cols() as u32,
            a_offset as u32,
            b_offset as u32,
            (c_before + region.n.0) as u32,
            u32::from(bias.is_some()) | u32::from(epilogue.accumulate || !first) << 1,
            epilogue.alpha.unwrap_or(1.0).to_bits(),
            bias_before as u32,
            rows as u32,
        ];
        let groups = [n.div_ceil(if wide { 128 } else { 32 }) as u32, m.div_ceil(8) as u32, 1];
        let operands = b_bindings.iter().chain(&a_bindings).map(|(binding, _)| *binding);
        let bindings: Vec<_> = [c_binding, bias_binding].into_iter().chain(operands).collect();
        c.gpu().dispatch(kernel, &bindings, &params, groups);
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

/// Uniforms over K in one dispatch of the NN and TN kernels (WINDOWS in shaders/variants).
const WINDOWS: usize = 4;

/// How K is spread over uniforms: `count` windows of `rows` rows each.
#[derive(Clone, Copy)]
struct Window {
    rows: usize,
    count: usize,
}

impl Window {
    /// For operands whose rows have `cols` (and `other`, or `usize::MAX` for none) elements. Several windows need
    /// starts that are aligned alike; where rows are odd there is one.
    fn new(cols: usize, other: usize, dtype: Dtype) -> Self {
        let widest = if other == usize::MAX { cols } else { cols.max(other) };
        let rows = uniform_rows(widest, dtype);
        let aligned = |rows: usize| {
            let starts = |cols: usize| (rows * cols).is_multiple_of(dtype.alignment());
            starts(cols) && (other == usize::MAX || starts(other))
        };
        let even = (1..=rows / 8).rev().map(|eighth| eighth * 8).find(|&rows| aligned(rows));
        even.map_or(Self { rows, count: 1 }, |rows| Self { rows, count: WINDOWS })
    }

    /// Rows of K in one dispatch.
    fn most(self) -> usize {
        self.rows.saturating_mul(self.count)
    }
}

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
