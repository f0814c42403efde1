//! The operations: one file per family, named as its shader, with launches forward and backward, a CPU reference,
//! FLOPs and bytes.
//!
//! Must never know: the tape, layers, models. [`OPS`] is the one list that tests, benches and estimates walk.
//! README.md in this folder tells how to add an op.

pub mod activation;
pub mod adamw;
pub mod adamw_8bit;
pub mod attention;
pub mod case;
pub mod cast;
pub mod cooperative;
pub mod cooperative_attention;
pub mod cross_entropy;
pub mod decode_attention;
pub mod dora;
pub mod dropout;
pub mod elementwise;
pub mod embedding;
pub mod flash_attention;
pub mod layer_norm;
pub mod matmul;
pub mod nf4;
pub mod nf4_matmul;
pub mod patch_embed;
pub mod reduce;
pub mod rms_norm;
pub mod roof;
pub mod rope;
pub mod tuning;

mod testing;

pub use case::{Case, Shapes};
pub use testing::{Comparison, Random};

use crate::{
    error::Result,
    gpu::{AdapterFacts, Gpu, UNIFORM_BYTES},
    tensor::{Dtype, Tensor},
};

/// Operations and memory traffic of one launch at the size that `check` uses for `n`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// Floating-point operations, a fused multiply-add counted as two.
    pub flops: u64,
    /// Bytes that must be read and written at least once.
    pub bytes: u64,
}

/// An operation, as tests and benches see it.
pub struct Op {
    /// `family.what`; the family is a file here and in `shaders/`.
    pub name: &'static str,
    /// Runs forward and backward on random data of awkward sizes made from `n`, and the CPU reference beside it.
    pub check: fn(gpu: &Gpu, n: usize) -> Result<Vec<Comparison>>,
    /// What the forward launch of `check` costs at `n`.
    pub cost: fn(n: usize) -> Cost,
    /// What is timed of it at the shapes of a model, forward and backward.
    pub cases: fn(shapes: &Shapes) -> Vec<Case>,
}

impl Op {
    /// What a device lacks for it: there is nothing to check or to time then.
    pub fn missing(&self, facts: &AdapterFacts) -> Option<&'static str> {
        let cooperative = self.name.starts_with("cooperative");
        let found = facts.cooperative.iter().any(|one| one.operands == "f16");
        (cooperative && !found).then_some("cooperative matrices of f16, summed in f32")
    }
}

/// Every operation.
pub const OPS: &[Op] = &[
    matmul::NT,
    matmul::NN,
    matmul::TN,
    matmul::NT_BF16,
    matmul::NT_F16,
    matmul::NN_BF16,
    matmul::NN_F16,
    matmul::JOINT,
    cooperative::NT,
    cooperative::NN,
    cooperative::TN,
    cooperative::NT_BF16,
    cooperative::NT_F16,
    cooperative::NN_BF16,
    cooperative::NN_F16,
    nf4::NF4,
    nf4::FP4,
    nf4_matmul::NT_NF4,
    nf4_matmul::NT_FP4,
    nf4_matmul::NN_NF4,
    nf4_matmul::NN_FP4,
    rms_norm::OP,
    layer_norm::OP,
    rope::OP,
    activation::SWIGLU,
    activation::GELU,
    activation::QUICK_GELU,
    attention::CAUSAL,
    attention::FULL,
    attention::WINDOW,
    flash_attention::OP,
    cooperative_attention::OP,
    decode_attention::OP,
    embedding::OP,
    patch_embed::OP,
    cross_entropy::OP,
    elementwise::OP,
    reduce::OP,
    dora::OP,
    dropout::OP,
    cast::OP,
    adamw::OP,
    adamw_8bit::OP,
];

/// Threads of the elementwise kernels' workgroups.
const THREADS: usize = 64;
/// Workgroups along one dimension: WebGPU's floor.
const MAX_GROUPS: usize = 65_535;

/// Workgroups for `n` items, `per_group` each, folded into two dimensions (kernels see `x + y * groups.x`), with fewer to
/// spare than there are rows of them.
fn groups_for(n: usize, per_group: usize) -> [u32; 3] {
    let groups = n.div_ceil(per_group);
    let y = groups.div_ceil(MAX_GROUPS).max(1);
    [groups.div_ceil(y) as u32, y as u32, 1]
}

/// Whether a device has room for workgroups of so many bytes of their memory, and so many threads.
fn has_workgroups(gpu: &Gpu, bytes: u32, threads: u32) -> bool {
    let limits = &gpu.facts().limits;
    limits.max_compute_workgroup_storage_size >= bytes && limits.max_compute_invocations_per_workgroup >= threads
}

/// Whether rows of so many columns go in vec4s, by workgroups of four times the threads: on GPUs, whose memory wants many
/// bytes under way. Host processors have as many lanes whatever a workgroup is, and pay for each of its barriers.
fn goes_wide(gpu: &Gpu, cols: usize) -> bool {
    !gpu.is_cpu() && cols.is_multiple_of(4)
}

/// Of two kernels, the second where rows are whole vec4s, and how many elements of a row a thread of it takes at once.
fn by_columns([any, vec]: [&str; 2], cols: usize) -> (&str, usize) {
    if cols.is_multiple_of(4) { (vec, 4) } else { (any, 1) }
}

/// Of two kernels with a workgroup a row, of 64 threads and of 256 that take vec4s, the one that serves.
fn by_rows<'a>(gpu: &Gpu, cols: usize, [narrow, wide]: [&'a str; 2]) -> &'a str {
    if goes_wide(gpu, cols) { wide } else { narrow }
}

/// Of two kernels that sum the rows of x, a thread a column and as `shaders/shared/column_sums.wgsl`, the one that
/// serves, and its workgroups.
fn column_sums(x: &Tensor, [narrow, wide]: [&'static str; 2]) -> (&'static str, [u32; 3]) {
    let cols = x.cols();
    if goes_wide(x.gpu(), cols) { (wide, groups_for(cols, 32)) } else { (narrow, groups_for(cols, THREADS)) }
}

/// Cuts `rows` rows of at most `row_words` words (or packed elements) each into parts that can be bound:
/// `(first, count)`. Parts start at multiples of 64 rows, so that their offsets are aligned whatever the row's length.
fn bindable_rows(gpu: &Gpu, rows: usize, row_words: usize) -> impl Iterator<Item = (usize, usize)> {
    let most = (gpu.max_binding() as usize / (row_words.max(1) * 4)).min(MAX_GROUPS) / 64 * 64;
    let step = most.max(64);
    (0..rows).step_by(step).map(move |first| (first, step.min(rows - first)))
}

/// On host processors, rows of whole vec4s in windows that fit a uniform: `(first, count)`. `None` where the kernels
/// for storage must serve: on GPUs, for odd or very long rows, and where the outputs cannot be bound whole.
fn uniform_windows(gpu: &Gpu, rows: usize, cols: usize) -> Option<impl Iterator<Item = (usize, usize)>> {
    let most = uniform_rows(cols, Dtype::F32);
    let fits = gpu.is_cpu() && cols.is_multiple_of(4) && most >= 8 && (rows * cols * 4) as u64 <= gpu.max_binding();
    fits.then(|| (0..rows).step_by(most).map(move |first| (first, most.min(rows - first))))
}

/// How many rows of `cols` elements one uniform holds, wherever the first begins.
fn uniform_rows(cols: usize, dtype: Dtype) -> usize {
    let slack = if cols.is_multiple_of(dtype.alignment()) { 0 } else { dtype.alignment() };
    (UNIFORM_BYTES as usize / dtype.bytes() - slack) / cols.max(1)
}
