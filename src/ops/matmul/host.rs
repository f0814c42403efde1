//! Products on host processors. Lanes of a subgroup hand each other rows of A, which is staged in workgroup memory where
//! subgroups are not known. With few rows of A or of W, rows of W lie in lanes, as uniforms of 64 KiB, whose loads are cheap
//! there.

use super::{Call, Layout, Region, length, typed};
use crate::{
    gpu::{Binding, Gpu},
    ops::uniform_rows,
    tensor::{Dtype, Tensor},
};

/// The block of C of a workgroup of `matmul.by_subgroup` or `matmul.by_column_staged`.
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
    Block { name: "wide", rows: 32, cols: 32 },
    Block { name: "narrow", rows: 32, cols: 16 },
    Block { name: "few", rows: 8, cols: 32 },
];
const STAGED_BLOCKS: [Block; 3] = [Block { cols: 128, ..BLOCKS[0] }, BLOCKS[1], Block { cols: 128, ..BLOCKS[2] }];
/// So many rows of A or of W are few, where subgroups are not known.
const FEW: usize = 32;
/// Columns of A that are staged at a time (DEPTH in shaders/variants).
pub(super) const STAGED_DEPTH: usize = 64;

/// The one of three blocks for a product of m x n.
pub(super) fn fitting(m: usize, n: usize) -> usize {
    let [wide, narrow, _] = BLOCKS;
    if 4 * m < 3 * wide.rows {
        2
    } else if n <= narrow.cols {
        1
    } else {
        0
    }
}

/// The kernel and its workgroups for a product with A staged, by one of three blocks.
pub(super) fn staged(layout: Layout, b: Dtype, size: [usize; 2], block: usize) -> (String, [u32; 3]) {
    kernel("by_column_staged", layout, b, size, STAGED_BLOCKS[block])
}

/// The same by subgroups.
pub(super) fn by_subgroup(layout: Layout, b: Dtype, size: [usize; 2], block: usize) -> (String, [u32; 3]) {
    kernel("by_subgroup", layout, b, size, BLOCKS[block])
}

fn kernel(kernel: &str, layout: Layout, b: Dtype, [m, n]: [usize; 2], block: Block) -> (String, [u32; 3]) {
    let layout = match layout {
        Layout::Nt => "nt",
        Layout::Nn => "nn",
        Layout::Tn => "tn",
    };
    let name = format!("matmul.{kernel}.{layout}_{}{}", block.name, typed(b, ["", "_bf16", "_f16"]));
    (name, [n.div_ceil(block.cols) as u32, m.div_ceil(block.rows) as u32, 1])
}

/// Whether subgroups are those of `matmul.by_subgroup` (THREADS in shaders/variants).
pub(super) fn has_subgroups(gpu: &Gpu) -> bool {
    gpu.facts().lanes == Some(8)
}

impl Call<'_> {
    /// Whether an NT product goes to [`Call::by_lanes`]: each row is a uniform, and there is one of A, or few of A
    /// or of W where subgroups are not known.
    pub(super) fn wants_lanes(&self, region: Region) -> bool {
        let (fit_a, fit_b) = (uniform_rows(self.a.cols(), Dtype::F32), uniform_rows(self.b.cols(), self.b.dtype()));
        let (m, n) = (length(region.m), length(region.n));
        let few = if has_subgroups(self.c.gpu()) { m == 1 } else { m.min(n) <= FEW };
        lanes_fit(self.c.gpu()) && fit_a > 0 && fit_b > 0 && few
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
            std::array::from_fn(|w| uniform(b, (region.n.0 - b_first + w.min(windows - 1) * window) * b.cols()));
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
