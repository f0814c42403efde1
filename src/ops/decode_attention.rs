//! Attention's kernels for few queries over many keys, launched by `attention`: the keys are cut into parts that
//! workgroups take at once, and the parts joined in order. PyTorch: as `attention`; the method is that of Flash-Decoding.
//! There is no backward: what decodes learns nothing, and a batch of few queries has that of `attention`.

use super::{
    Case, Comparison, Cost, Op, Random,
    attention::{self, Heads, Ranges},
    case::floats,
    testing::wide,
    tuning::{Family, Trial, exact, exact_value, operand_sets},
};
use crate::{
    error::Result,
    gpu::{Gpu, Question},
    tensor::{Dtype, Tensor},
};

/// Keys of a part.
const PART: usize = 128;
/// Keys that the bench's cache holds, on host processors too: they take no long time.
pub(super) const CACHED: usize = 2048;

/// Whether these kernels should run. A host processor has no workgroups to fill: there it is `attention`'s kernel that is
/// the faster one, unless heads share keys, which only these read once, or loads of storage are slow.
pub(super) fn serves(gpu: &Gpu, queries: usize, longest: usize, heads: Heads) -> bool {
    let Heads { heads: count, kv_heads, head_size, .. } = heads;
    let scratch = 4 * queries * count * head_size * longest.div_ceil(PART);
    // Not by queries or keys: a result must not depend on what else is in a batch.
    let sizes = [count, kv_heads, head_size];
    let wanted = match gpu.chosen(Question { op: OP.name, sizes }, sizes) {
        Some(way) => way == BY_PARTS,
        None => wanted(gpu, heads),
    };
    wanted && can_serve(head_size) && scratch as u64 <= gpu.max_binding()
}

fn wanted(gpu: &Gpu, Heads { heads, kv_heads, head_size, .. }: Heads) -> bool {
    !gpu.is_cpu() || head_size > 32 && (heads >= 4 * kv_heads || gpu.has_slow_storage())
}

fn can_serve(head_size: usize) -> bool {
    head_size.is_multiple_of(4)
}

/// The names of these kernels and of `attention`'s to the tuner.
const BY_PARTS: &str = "parts";
const WHOLE: &str = "whole";

/// What the tuner runs: one query over [`CACHED`] keys.
pub(super) const FAMILY: Family = Family {
    ops: || vec![OP.name],
    ways: || vec![BY_PARTS, WHOLE],
    trial: |gpu, _, [count, kv_heads, head_size]| {
        Ok(tuned(gpu, Heads { heads: count, kv_heads, head_size, in_f16: false }))
    },
};

fn tuned(gpu: &Gpu, heads: Heads) -> Trial {
    let (width, kv_width) = (heads.heads * heads.head_size, heads.kv_heads * heads.head_size);
    let q = exact(gpu, Dtype::F32, &[1, width], 0);
    let keys = [CACHED, kv_width];
    let sets = operand_sets(gpu, 8 * CACHED * kv_width, || [0, 1].map(|side| exact(gpu, Dtype::F32, &keys, side)));
    let values = |count, side| (0..count).map(|at| exact_value(at, side)).collect::<Vec<_>>();
    let [of_q, k, v] = [values(width, 0), values(CACHED * kv_width, 0), values(CACHED * kv_width, 1)];
    let range = [0, CACHED as u32];
    let want = reference([&of_q, &k, &v], &[range], heads).0.into_iter().enumerate().collect();
    let ranges = Ranges::cached(gpu, &range);
    let mut ways = vec![WHOLE];
    if can_serve(heads.head_size) {
        ways.insert(if wanted(gpu, heads) { 0 } else { 1 }, BY_PARTS);
    }
    let run = Box::new(move |way: &str, turn: usize| {
        let [k, v] = &sets[turn % sets.len()];
        let by_parts = way == BY_PARTS;
        let done = if by_parts {
            forward([&q, k, v], &ranges.of_queries, CACHED, heads)
        } else {
            attention::forward_whole([&q, k, v], &ranges, heads)
        };
        done.0
    });
    Trial { ways, run, out: None, want, tolerance: 1e-5 }
}

/// q [T, H, E] over k, v [S, K, E], with E a multiple of 4 and ranges u32 [T, 2] of which none is longer than `longest`:
/// the output [T, H, E], and log-sum-exp beside room for delta [T, H, 2].
pub(super) fn forward([q, k, v]: [&Tensor; 3], ranges: &Tensor, longest: usize, heads: Heads) -> (Tensor, Tensor) {
    let Heads { heads: count, kv_heads, head_size, .. } = heads;
    let gpu = q.gpu();
    let queries = q.len() / (count * head_size);
    let parts = longest.div_ceil(PART).max(1);
    let size = match head_size {
        ..=64 => "e64",
        65..=128 => "e128",
        _ => "e256",
    };
    let (rows, kernel) =
        if count == kv_heads { (1, format!("parts.{size}")) } else { (4, format!("parts.{size}_grouped")) };
    let scale = 1.0 / (head_size as f32).sqrt();
    let params = [queries, count, kv_heads, head_size].map(|x| x as u32);
    let params = [&params[..], &[scale.to_bits(), parts as u32]].concat();
    let results = |parts: usize| {
        (Tensor::empty(gpu, &[queries, count * parts * head_size]), Tensor::empty(gpu, &[queries, count * parts, 2]))
    };
    let (out, stats) = results(parts);
    let groups = [parts, kv_heads * (count / kv_heads).div_ceil(rows), queries].map(|x| x as u32);
    let bindings = [q.binding(), k.binding(), v.binding(), ranges.binding(), out.binding(), stats.binding()];
    gpu.dispatch(&format!("decode_attention.{kernel}"), &bindings, &params, groups);
    if parts == 1 {
        return (out, stats);
    }
    let (parts_out, parts_stats) = (out, stats);
    let (out, stats) = results(1);
    let bindings = [parts_out.binding(), parts_stats.binding(), out.binding(), stats.binding()];
    gpu.dispatch("decode_attention.join", &bindings, &params, [count as u32, queries as u32, 1]);
    (out, stats)
}

/// Output, and log-sum-exp [T, H] of the queries that see a key, on the host.
pub(super) fn reference([q, k, v]: [&[f64]; 3], ranges: &[[u32; 2]], heads: Heads) -> (Vec<f64>, Vec<f64>) {
    let Heads { heads: count, kv_heads, head_size, .. } = heads;
    let scale = 1.0 / (head_size as f64).sqrt();
    let (mut out, mut sums) = (vec![0.0; q.len()], Vec::new());
    for (row, (q, out)) in q.chunks_exact(head_size).zip(out.chunks_exact_mut(head_size)).enumerate() {
        let [first, end] = ranges[row / count].map(|key| key as usize);
        if first >= end {
            continue;
        }
        let kv_head = row % count * kv_heads / count;
        let at = |key: usize| (key * kv_heads + kv_head) * head_size..(key * kv_heads + kv_head + 1) * head_size;
        let score = |key: usize| q.iter().zip(&k[at(key)]).map(|(q, k)| q * k).sum::<f64>() * scale;
        let scores: Vec<f64> = (first..end).map(score).collect();
        let largest = scores.iter().fold(f64::MIN, |a, &b| a.max(b));
        let sum: f64 = scores.iter().map(|score| (score - largest).exp()).sum();
        for (key, score) in (first..end).zip(&scores) {
            let weight = (score - largest).exp() / sum;
            out.iter_mut().zip(&v[at(key)]).for_each(|(out, v)| *out += weight * v);
        }
        sums.push(largest + sum.ln());
    }
    (out, sums)
}

fn ranges(keys: usize) -> [[u32; 2]; 7] {
    let end = keys as u32;
    // All keys, windows, a range that ends early, one key, a range over parts' borders, none.
    [
        [0, end],
        [end.saturating_sub(5), end],
        [end / 3, end],
        [0, end.div_ceil(2)],
        [end - 1, end],
        [end / 9, end - end / 7],
        [end / 2, end / 2],
    ]
}

fn check(gpu: &Gpu, n: usize) -> Result<Vec<Comparison>> {
    let mut comparisons = Vec::new();
    for (count, kv_heads, head_size) in
        [(4, 4, 32), (2, 1, 60), (14, 2, 64), (6, 2, 96), (3, 3, 128), (8, 1, 128), (4, 2, 136), (2, 2, 256)]
    {
        let heads = Heads { heads: count, kv_heads, head_size, in_f16: false };
        // Several parts at every n.
        let n = if head_size == 128 { n + 2 * PART } else { n };
        let ranges = ranges(n);
        // Alone, and beside others of other lengths.
        for ranges in [&ranges[..1], &ranges[..]] {
            let mut random = Random::new((n * 11 + count * kv_heads + head_size) as u64);
            let (q, tq) = random.tensor(gpu, &[ranges.len(), count * head_size]);
            let (k, tk) = random.tensor(gpu, &[n, kv_heads * head_size]);
            let (v, tv) = random.tensor(gpu, &[n, kv_heads * head_size]);
            // Of scores that differ a little every weight is alike, and a wrong one would not be seen.
            let q: Vec<f32> = q.iter().map(|x| x * 4.0).collect();
            tq.write(&q);
            let of_queries = Tensor::from_u32(gpu, ranges.as_flattened(), &[ranges.len(), 2]);
            let (out, stats) = forward([&tq, &tk, &tv], &of_queries, n, heads);
            let (want_out, want_sums) = reference([&wide(&q), &wide(&k), &wide(&v)], ranges, heads);
            let stats = stats.to_vec()?;
            let sees = |row: usize| ranges[row / count][0] < ranges[row / count][1];
            let sums = stats.as_chunks::<2>().0.iter().enumerate().filter(|&(row, _)| sees(row)).map(|(_, s)| s[0]);
            comparisons.extend([
                Comparison::new("out", out.to_vec()?, want_out, 3e-6),
                Comparison::new("log-sum-exp", sums.collect(), want_sums, 3e-6),
            ]);
        }
    }
    Ok(comparisons)
}

/// One query over a cache of `keys` rows, by `forward`.
pub(super) fn case(
    keys: usize,
    heads: Heads,
    forward: impl Fn([&Tensor; 3], &Ranges, Heads) -> (Tensor, Tensor) + Copy + 'static,
) -> Case {
    let (width, kv_width) = (heads.heads * heads.head_size, heads.kv_heads * heads.head_size);
    let grouped = if heads.heads == heads.kv_heads { String::new() } else { format!(" of {}", heads.kv_heads) };
    let shape = format!("1 over {keys}x{}{grouped}x{}", heads.heads, heads.head_size);
    let cost = Cost { flops: (4 * keys * width) as u64, bytes: (8 * keys * kv_width) as u64 };
    Case::of("decode", shape, cost).run(move |gpu| {
        let [k, v] = [(); 2].map(|()| floats(gpu, &[keys, kv_width]));
        let q = floats(gpu, &[1, width]);
        let ranges = Ranges::cached(gpu, &[0, keys as u32]);
        move || forward([&q, &k, &v], &ranges, heads)
    })
}

pub const OP: Op = Op {
    name: "decode_attention",
    check,
    cost: |n| Cost { flops: (4 * n * 4 * 32) as u64, bytes: (8 * n * 4 * 32) as u64 },
    cases: |shapes| {
        let heads = shapes.decoder_heads();
        let grouped = Heads { kv_heads: heads.heads / 4, ..heads };
        [heads, grouped]
            .map(|heads| case(CACHED, heads, |x, ranges, heads| forward(x, &ranges.of_queries, CACHED, heads)))
            .into()
    },
};
