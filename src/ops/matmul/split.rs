//! Split-K: where C has too few tiles to keep a GPU busy and K is long (gradients of LoRA, short prompts), workgroups sum parts
//! of K, and a second dispatch adds these in order. When and how finely: ggml's rule, with a guess at the number of cores,
//! which WebGPU does not tell.

use crate::{
    gpu::{Binding, Gpu},
    tensor::Tensor,
};

/// So many workgroups of 128 threads and more keep a GPU busy. Reasoned: the largest have about as many cores.
pub const ENOUGH: usize = 128;
/// K from which it may pay, what a part has at least, in multiples of which it comes, and the most parts.
const LEAST_K: usize = 2048;
const GRAIN: usize = 256;
const MOST_PARTS: usize = 8;
/// Flags of what happens to sums: a bias, and what is added to.
const ON_THE_WAY_OUT: u32 = 3;

/// How much of K each part has, and how many parts there are.
fn parts(enough: usize, tiles: usize, k: usize) -> (usize, usize) {
    let wanted = if k < LEAST_K || tiles == 0 { 1 } else { (enough / tiles).clamp(1, MOST_PARTS) };
    let part = k.div_ceil(wanted).next_multiple_of(GRAIN);
    (part, k.div_ceil(part))
}

/// Launches a kernel of products that may sum K in parts. Bindings are A, B, bias, C and what more it reads; parameters
/// are `matmul`'s, of which this fills in what a part has.
pub fn launch(gpu: &Gpu, kernel: &str, bindings: &[Binding<'_>], params: &[u32], groups: [u32; 3]) {
    launch_until(ENOUGH, gpu, kernel, bindings, params, groups);
}

/// The same of workgroups of which `enough` keep a GPU busy.
pub fn launch_until(
    enough: usize,
    gpu: &Gpu,
    kernel: &str,
    bindings: &[Binding<'_>],
    params: &[u32],
    groups: [u32; 3],
) {
    let [m, n, k] = [params[0], params[1], params[2]].map(|size| size as usize);
    let (part, count) = parts(enough, groups[0] as usize * groups[1] as usize, k);
    let whole = count < 2 || (count * m * n * 4) as u64 > gpu.max_binding();
    let mut of_part = params.to_vec();
    of_part[12] = if whole { k } else { part } as u32;
    if whole {
        return gpu.dispatch(kernel, bindings, &of_part, groups);
    }
    let sums = Tensor::empty(gpu, &[count, m, n]);
    let [ldc, c_offset, flags, alpha] = [5, 8, 9, 10];
    (of_part[ldc], of_part[c_offset], of_part[alpha]) = (n as u32, 0, 1f32.to_bits());
    of_part[flags] &= !ON_THE_WAY_OUT;
    let mut to_sums = bindings.to_vec();
    to_sums[3] = sums.binding();
    gpu.dispatch(kernel, &to_sums, &of_part, [groups[0], groups[1], count as u32]);
    let mut of_sum = params.to_vec();
    of_sum[2] = count as u32;
    let groups = [n.div_ceil(64) as u32, m as u32, 1];
    gpu.dispatch("matmul.sum_parts", &[sums.binding(), bindings[2], bindings[3]], &of_sum, groups);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_k_where_tiles_are_few_and_k_is_long() {
        // lora_A of 7B over 2048 tokens, its gradient, a square product, a short sum.
        assert_eq!(parts(ENOUGH, 32, 4096), (1024, 4));
        assert_eq!(parts(ENOUGH, 64, 2048), (1024, 2));
        assert_eq!(parts(4 * ENOUGH, 64, 4096), (512, 8));
        assert_eq!(parts(ENOUGH, 4096, 4096).1, 1);
        assert_eq!(parts(ENOUGH, 1, 2047).1, 1);
        for (tiles, k) in [(1, 2048), (1, 2049), (3, 11_008), (100, 5000), (17, 65_537)] {
            let (part, count) = parts(ENOUGH, tiles, k);
            assert!((count - 1) * part < k && k <= count * part && count <= MOST_PARTS, "{tiles} {k}: {part} {count}");
        }
    }
}
