//! Attention's kernels for GPUs, launched by `attention`: the keys pass a block of queries (or the queries a block of
//! keys) through workgroup memory, with the softmax taken as they come. PyTorch: as `attention`; the method is that of
//! FlashAttention-2, with the backward in two kernels so that no two workgroups add to one place.

use super::{
    Op,
    attention::{self, Heads, Mask},
};
use crate::gpu::Gpu;

/// Queries, or keys, of a workgroup.
const TILE: usize = 32;

/// The variant for heads of this size; none for wider ones.
pub(super) fn of_size(head_size: usize) -> Option<&'static str> {
    match head_size {
        ..=32 => Some("e32"),
        33..=64 => Some("e64"),
        65..=128 => Some("e128"),
        _ => None,
    }
}

/// The variant that a device should run, if any: host processors have better ones.
pub(super) fn variant(gpu: &Gpu, heads: Heads) -> Option<&'static str> {
    of_size(heads.head_size).filter(|_| !gpu.is_cpu())
}

/// A kernel's name, and how many queries (or keys) its workgroups own.
pub(super) fn kernel(kernel: &str, variant: &str) -> (String, usize) {
    (format!("flash_attention.{kernel}.{variant}"), TILE)
}

pub const OP: Op = Op {
    name: "flash_attention",
    check: |gpu, n| {
        let mut comparisons = attention::check(Mask::Causal, true, gpu, n)?;
        if n <= 100 {
            comparisons.extend(attention::check(Mask::Full, true, gpu, n)?);
            comparisons.extend(attention::check(Mask::Window(5), true, gpu, n)?);
        }
        Ok(comparisons)
    },
    cost: attention::cost,
    cases: |shapes| attention::cases(shapes.tokens, Mask::Causal, shapes.decoder_heads(), true),
};
