//! Scaled dot-product attention over packed sequences, forward and backward, without a T x T matrix: beside its inputs
//! and its output a pass keeps two numbers for each query and head.
//! PyTorch: `F.scaled_dot_product_attention(q, k, v, attn_mask, scale=E ** -0.5, enable_gqa=True)`.
//!
//! What a query may see is a half-open range of keys, so causal, full, packed and cached attention are one kernel
//! with other ranges. Query head h reads key/value head h * K / H.

use super::{
    Case, Comparison, Cost, Op, Random, Shapes, case::floats, cooperative, cooperative_attention, decode_attention,
    flash_attention, groups_for, roof,
};
use std::sync::Arc;

use crate::{
    error::Result,
    gpu::{Binding, Gpu, UNIFORM_BYTES},
    tensor::{ALIGNMENT, Tensor},
};

/// Which keys each query sees, and the same seen from the keys.
#[derive(Clone)]
pub struct Ranges {
    /// u32 [T, 2]: first key and end.
    pub of_queries: Tensor,
    /// u32 [S, 2]: first query and end; needed by the backward alone.
    pub of_keys: Option<Tensor>,
    /// Lengths of packed sequences; empty where queries and keys are not the same rows.
    lengths: Arc<[usize]>,
    /// Keys that queries see, all counted.
    pairs: u64,
    /// The most keys that one query sees.
    longest: usize,
    /// Whether neighbouring queries see other keys, so that none gains by a neighbour's.
    apart: bool,
}

/// What a token of a packed sequence sees of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// All of it.
    Full,
    /// Itself and what came before.
    Causal,
    /// Itself and the tokens before it, so many in all.
    Window(usize),
}

impl Mask {
    /// The first key that the query at `position` of a causal sequence sees.
    pub fn first_key(self, position: usize) -> usize {
        match self {
            Self::Full | Self::Causal => 0,
            Self::Window(width) => (position + 1).saturating_sub(width),
        }
    }
}

impl Ranges {
    /// Of packed sequences; empty where queries and keys are not the same rows.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Sequences of the given lengths, packed one behind the other; each attends to itself only.
    pub fn packed(gpu: &Gpu, lengths: &[usize], mask: Mask) -> Self {
        let causal = mask != Mask::Full;
        let (mut queries, mut keys, mut start) = (Vec::new(), Vec::new(), 0u32);
        for &length in lengths {
            let end = start + length as u32;
            for t in start..end {
                let first = start + mask.first_key((t - start) as usize) as u32;
                queries.extend([first, if causal { t + 1 } else { end }]);
                let last = if let Mask::Window(width) = mask { end.min(t.saturating_add(width as u32)) } else { end };
                keys.extend([if causal { t } else { start }, last]);
            }
            start = end;
        }
        let total = start as usize;
        Self {
            pairs: pairs(&queries),
            longest: longest(&queries),
            apart: false,
            of_queries: Tensor::from_u32(gpu, &queries, &[total, 2]),
            of_keys: Some(Tensor::from_u32(gpu, &keys, &[total, 2])),
            lengths: lengths.into(),
        }
    }

    /// Queries over rows of a cache, each with its own range of them: first key and end, one query behind the other.
    pub fn cached(gpu: &Gpu, ranges: &[u32]) -> Self {
        let longest = longest(ranges);
        let (first, end) = each(ranges).fold((u32::MAX, 0), |(first, end), &[a, b]| (first.min(a), end.max(b)));
        Self {
            of_queries: Tensor::from_u32(gpu, ranges, &[ranges.len() / 2, 2]),
            of_keys: None,
            lengths: Arc::default(),
            pairs: pairs(ranges),
            longest,
            apart: end.saturating_sub(first) as usize > 2 * longest,
        }
    }

    /// Whole sequences in windows of at most `rows` rows: (first row, rows). `None` when a sequence is longer.
    fn windows(&self, rows: usize) -> Option<Vec<(usize, usize)>> {
        let mut windows: Vec<(usize, usize)> = Vec::new();
        let mut start = 0;
        for &length in self.lengths.iter() {
            match windows.last_mut() {
                Some(last) if last.1 + length <= rows => last.1 += length,
                _ if length <= rows => windows.push((start, length)),
                _ => return None,
            }
            start += length;
        }
        (!windows.is_empty()).then_some(windows)
    }
}

fn each(ranges: &[u32]) -> impl Iterator<Item = &[u32; 2]> {
    ranges.as_chunks().0.iter()
}

fn pairs(ranges: &[u32]) -> u64 {
    each(ranges).map(|[first, end]| u64::from(end.saturating_sub(*first))).sum()
}

fn longest(ranges: &[u32]) -> usize {
    each(ranges).map(|[first, end]| end.saturating_sub(*first) as usize).max().unwrap_or(0)
}

/// The widest head that the kernels have registers for.
pub const MAX_HEAD_SIZE: usize = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// H
    pub heads: usize,
    /// K, a divisor of H
    pub kv_heads: usize,
    /// E, [`MAX_HEAD_SIZE`] at most
    pub head_size: usize,
    /// Whether products may round what they multiply to f16 ([`Tensor::rounding`] of the weights that make q, k and v).
    pub in_f16: bool,
}

impl Heads {
    pub(super) fn params(self, queries: usize, keys: usize) -> [u32; 6] {
        let scale = 1.0 / (self.head_size as f32).sqrt();
        [queries as u32, keys as u32, self.heads as u32, self.kv_heads as u32, self.head_size as u32, scale.to_bits()]
    }

    /// On host processors: the windows and the variant of the lane kernels, where heads are whole vec4s, few enough
    /// for registers, and every sequence fits a uniform.
    fn lanes(self, gpu: &Gpu, ranges: &Ranges) -> Option<(Vec<(usize, usize)>, &'static str)> {
        if !gpu.is_cpu() || !self.head_size.is_multiple_of(4) {
            return None;
        }
        let suffix = match self.head_size {
            ..=16 => "e16",
            17..=32 => "e32",
            33..=64 => "e64",
            _ => return None,
        };
        let rows = (UNIFORM_BYTES as usize / 4 - ALIGNMENT) / (self.heads * self.head_size);
        Some((ranges.windows(rows)?, suffix))
    }

    /// The variant for a head size, and how many queries (or keys) its workgroups own.
    fn variant(self, kernel: &str) -> (String, usize) {
        match self.head_size {
            ..=32 => (format!("attention.{kernel}.narrow"), 8),
            33..=128 => (format!("attention.{kernel}"), 4),
            _ => (format!("attention.{kernel}.wide"), if kernel == "backward_key_value" { 2 } else { 4 }),
        }
    }
}

/// Rows of whole sequences that the lane kernels bind as uniforms.
struct Window {
    heads: Heads,
    first: usize,
    rows: usize,
}

impl Window {
    /// This window of a [T, H, E] tensor, and where it begins in the binding, in vec4s.
    fn queries<'t>(&self, tensor: &'t Tensor) -> (Binding<'t>, usize) {
        let (binding, before) = tensor.uniform(self.first * self.heads.heads * self.heads.head_size);
        (binding, before / 4)
    }

    /// As `queries`, of a [T, K, E] tensor.
    fn keys<'t>(&self, tensor: &'t Tensor) -> (Binding<'t>, usize) {
        let (binding, before) = tensor.uniform(self.first * self.heads.kv_heads * self.heads.head_size);
        (binding, before / 4)
    }

    fn params(&self, before: [usize; 5]) -> Vec<u32> {
        let mut params = self.heads.params(0, 0).to_vec();
        params.extend([self.first as u32, self.rows as u32]);
        params.extend(before.map(|words| words as u32));
        params
    }

    fn groups(&self, heads: usize) -> [u32; 3] {
        [self.rows.div_ceil(8) as u32, heads as u32, 1]
    }
}

/// q [T, H, E] over k, v [S, K, E]: the output [T, H, E], and log-sum-exp beside room for delta [T, H, 2].
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor, ranges: &Ranges, heads: Heads) -> (Tensor, Tensor) {
    forward_by(flash_attention::variant(q.gpu(), heads), q, k, v, ranges, heads)
}

/// As [`forward`], by the tiled kernels of this variant.
fn forward_by(
    tiled: Option<&'static str>,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    ranges: &Ranges,
    heads: Heads,
) -> (Tensor, Tensor) {
    let gpu = q.gpu();
    let width = heads.heads * heads.head_size;
    gpu.add_flops(4 * ranges.pairs * width as u64);
    let queries = q.len() / width;
    let alone = queries < 8 || ranges.apart;
    if alone && decode_attention::serves(gpu, queries, ranges.longest, heads) {
        return decode_attention::forward([q, k, v], &ranges.of_queries, ranges.longest, heads);
    }
    whole(tiled, [q, k, v], ranges, heads)
}

/// As [`forward`], never with the keys in parts.
pub(super) fn forward_whole([q, k, v]: [&Tensor; 3], ranges: &Ranges, heads: Heads) -> (Tensor, Tensor) {
    whole(flash_attention::variant(q.gpu(), heads), [q, k, v], ranges, heads)
}

fn whole(tiled: Option<&'static str>, [q, k, v]: [&Tensor; 3], ranges: &Ranges, heads: Heads) -> (Tensor, Tensor) {
    let gpu = q.gpu();
    let width = heads.heads * heads.head_size;
    let (queries, keys) = (q.len() / width, k.len() / (heads.kv_heads * heads.head_size));
    let alone = queries < 8 || ranges.apart;
    if let Some(kernels) = cooperative_attention::chosen(gpu, heads, [queries, keys]).filter(|_| !alone) {
        return kernels.forward([q, k, v], &ranges.of_queries, heads);
    }
    let out = Tensor::empty(gpu, &[queries, width]);
    let stats = Tensor::empty(gpu, &[queries, heads.heads, 2]);
    if let Some((windows, suffix)) = heads.lanes(gpu, ranges).filter(|_| tiled.is_none()) {
        for &(first, rows) in &windows {
            let window = Window { heads, first, rows };
            let ((q, q_before), (k, k_before), (v, v_before)) = (window.queries(q), window.keys(k), window.keys(v));
            let bindings = [q, k, v, ranges.of_queries.binding(), out.binding(), stats.binding()];
            let params = window.params([q_before, k_before, v_before, 0, 0]);
            gpu.dispatch(&format!("attention.lane_forward.{suffix}"), &bindings, &params, window.groups(heads.heads));
        }
        return (out, stats);
    }
    let (kernel, rows) = match tiled {
        _ if alone => ("attention.forward.decode".into(), 1),
        Some(suffix) => flash_attention::kernel("forward", suffix),
        None => heads.variant("forward"),
    };
    let bindings = [q.binding(), k.binding(), v.binding(), ranges.of_queries.binding(), out.binding(), stats.binding()];
    let groups = [queries.div_ceil(rows) as u32, heads.heads as u32, 1];
    gpu.dispatch(&kernel, &bindings, &heads.params(queries, keys), groups);
    (out, stats)
}

/// The gradients of q, k and v from dout [T, H, E].
///
/// # Panics
/// When the ranges lack the keys' side.
pub fn backward(saved: [&Tensor; 5], dout: &Tensor, ranges: &Ranges, heads: Heads) -> (Tensor, Tensor, Tensor) {
    backward_by(flash_attention::variant(dout.gpu(), heads), saved, dout, ranges, heads)
}

/// As [`backward`], by the tiled kernels of this variant.
fn backward_by(
    tiled: Option<&'static str>,
    [q, k, v, out, stats]: [&Tensor; 5],
    dout: &Tensor,
    ranges: &Ranges,
    heads: Heads,
) -> (Tensor, Tensor, Tensor) {
    let gpu = q.gpu();
    let (queries, keys) = (q.len() / (heads.heads * heads.head_size), k.len() / (heads.kv_heads * heads.head_size));
    let params = heads.params(queries, keys);
    gpu.add_flops(10 * ranges.pairs * (heads.heads * heads.head_size) as u64);
    if let Some(kernels) = cooperative_attention::chosen(gpu, heads, [queries, keys]) {
        return kernels.backward([q, k, v, out, stats], dout, ranges, heads);
    }
    gpu.dispatch(
        "attention.backward_delta",
        &[out.binding(), dout.binding(), stats.binding()],
        &params,
        groups_for(queries * heads.heads, 64),
    );
    let [dq, dk, dv] = [q, k, v].map(|x| Tensor::empty(gpu, x.shape()));
    let of_keys = ranges.of_keys.as_ref().expect("training ranges know both sides");
    if let Some((windows, suffix)) = heads.lanes(gpu, ranges).filter(|_| tiled.is_none()) {
        for &(first, rows) in &windows {
            let window = Window { heads, first, rows };
            let ((q, q_before), (k, k_before), (v, v_before), (dout, dout_before)) =
                (window.queries(q), window.keys(k), window.keys(v), window.queries(dout));
            let (row_stats, stats_before) = stats.uniform(first * heads.heads * 2);
            let params = window.params([q_before, k_before, v_before, dout_before, stats_before]);
            let bindings = [q, k, v, ranges.of_queries.binding(), stats.binding(), dout, dq.binding()];
            let kernel = format!("attention.lane_backward_query.{suffix}");
            gpu.dispatch(&kernel, &bindings, &params, window.groups(heads.heads));
            let bindings = [q, k, v, of_keys.binding(), row_stats, dout, dk.binding(), dv.binding()];
            let kernel = format!("attention.lane_backward_key_value.{suffix}");
            gpu.dispatch(&kernel, &bindings, &params, window.groups(heads.kv_heads));
        }
        return (dq, dk, dv);
    }
    let variant = |kernel: &str| tiled.map_or_else(|| heads.variant(kernel), |by| flash_attention::kernel(kernel, by));
    let (kernel, rows) = variant("backward_query");
    gpu.dispatch(
        &kernel,
        &[
            q.binding(),
            k.binding(),
            v.binding(),
            ranges.of_queries.binding(),
            stats.binding(),
            dout.binding(),
            dq.binding(),
        ],
        &params,
        [queries.div_ceil(rows) as u32, heads.heads as u32, 1],
    );
    let (kernel, rows) = variant("backward_key_value");
    gpu.dispatch(
        &kernel,
        &[
            q.binding(),
            k.binding(),
            v.binding(),
            of_keys.binding(),
            stats.binding(),
            dout.binding(),
            dk.binding(),
            dv.binding(),
        ],
        &params,
        [keys.div_ceil(rows) as u32, heads.kv_heads as u32, 1],
    );
    (dq, dk, dv)
}

/// Output, dq, dk and dv on the host; `lengths` as in [`Ranges::packed`].
pub fn reference([q, k, v, dout]: [&[f64]; 4], lengths: &[usize], mask: Mask, heads: Heads) -> [Vec<f64>; 4] {
    let Heads { heads: h_count, kv_heads, head_size, .. } = heads;
    let scale = 1.0 / (head_size as f64).sqrt();
    let mut result = [q, q, k, v].map(|x| vec![0.0; x.len()]);
    let [out, dq, dk, dv] = &mut result;
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mut start = 0;
    for &length in lengths {
        for t in start..start + length {
            for h in 0..h_count {
                let row = (t * h_count + h) * head_size..(t * h_count + h + 1) * head_size;
                let end = if mask == Mask::Full { start + length } else { t + 1 };
                let keys = start + mask.first_key(t - start)..end;
                let at = |s: usize| {
                    let first = (s * kv_heads + h * kv_heads / h_count) * head_size;
                    first..first + head_size
                };
                let scores: Vec<f64> = keys.clone().map(|s| dot(&q[row.clone()], &k[at(s)]) * scale).collect();
                let largest = scores.iter().fold(f64::MIN, |a, &b| a.max(b));
                let sum: f64 = scores.iter().map(|s| (s - largest).exp()).sum();
                let p: Vec<f64> = scores.iter().map(|s| (s - largest).exp() / sum).collect();
                let dp: Vec<f64> = keys.clone().map(|s| dot(&dout[row.clone()], &v[at(s)])).collect();
                let delta = dot(&p, &dp);
                for ((s, p), dp) in keys.zip(p).zip(dp) {
                    let ds = p * (dp - delta) * scale;
                    for e in 0..head_size {
                        let (r, c) = (row.start + e, at(s).start + e);
                        out[r] += p * v[c];
                        dq[r] += ds * k[c];
                        dk[c] += ds * q[r];
                        dv[c] += p * dout[r];
                    }
                }
            }
        }
        start += length;
    }
    result
}

/// `tiled` forces the tiled kernels where there are some for the head size.
pub(super) fn check(mask: Mask, tiled: bool, gpu: &Gpu, n: usize) -> Result<Vec<Comparison>> {
    let mut comparisons = Vec::new();
    // Every head size class; grouped heads; lengths that share a workgroup and lengths that fill blocks.
    for (kv_heads, head_size) in [(1, 5), (2, 12), (4, 32), (2, 33), (1, 60), (2, 97), (1, 128), (2, 130), (4, 136)] {
        if n > 100 && head_size > 33 {
            continue;
        }
        let heads = Heads { heads: 4, kv_heads, head_size, in_f16: false };
        let by = if tiled { flash_attention::of_size(head_size) } else { flash_attention::variant(gpu, heads) };
        if tiled && by.is_none() {
            continue;
        }
        let lengths = [n, 1, n / 3 + 1];
        let tokens: usize = lengths.iter().sum();
        let mut random = Random::new((n * 7 + kv_heads) as u64);
        let ((q, tq), (dout, tdout)) = (
            random.tensor(gpu, &[tokens, heads.heads * head_size]),
            random.tensor(gpu, &[tokens, heads.heads * head_size]),
        );
        let ((k, tk), (v, tv)) =
            (random.tensor(gpu, &[tokens, kv_heads * head_size]), random.tensor(gpu, &[tokens, kv_heads * head_size]));
        let ranges = Ranges::packed(gpu, &lengths, mask);
        let (out, stats) = forward_by(by, &tq, &tk, &tv, &ranges, heads);
        let (dq, dk, dv) = backward_by(by, [&tq, &tk, &tv, &out, &stats], &tdout, &ranges, heads);
        let wide = [&q, &k, &v, &dout].map(|x| super::testing::wide(x));
        let [want_out, want_dq, want_dk, want_dv] =
            reference([&wide[0], &wide[1], &wide[2], &wide[3]], &lengths, mask, heads);
        // A query that sees one key passes no gradient: what is left of dq is rounding.
        let cancelling = if n < 8 { 3e-4 } else { 2e-5 };
        comparisons.extend([
            Comparison::new("out", out.to_vec()?, want_out, 3e-6),
            Comparison::new("dq", dq.to_vec()?, want_dq, cancelling),
            Comparison::new("dk", dk.to_vec()?, want_dk, cancelling),
            Comparison::new("dv", dv.to_vec()?, want_dv, 2e-5),
        ]);
    }
    Ok(comparisons)
}

pub(super) fn cost(n: usize) -> Cost {
    let (n, width) = (n as u64, 4 * 33);
    Cost { flops: 4 * n * n * width, bytes: 16 * n * width }
}

/// Forward and backward of one sequence. `tiled` forces the tiled kernels.
pub(super) fn cases(tokens: usize, mask: Mask, heads: Heads, tiled: bool) -> Vec<Case> {
    let Heads { heads: h, head_size, .. } = heads;
    let size = [tokens, h * head_size];
    let shape = format!("{tokens}x{h}x{head_size}");
    let pairs: usize = match mask {
        Mask::Full => tokens * tokens,
        _ => (0..tokens).map(|position| position + 1 - mask.first_key(position)).sum(),
    };
    let elements = size[0] * size[1];
    let roof: fn(&Gpu) -> _ = if heads.in_f16 { cooperative::roof_in_f16 } else { |_| roof::FMA };
    let case = |pass, products: usize, tensors: usize| {
        let cost = Cost { flops: (2 * products * pairs * size[1]) as u64, bytes: (4 * tensors * elements) as u64 };
        Case::of(pass, shape.clone(), cost).limited_by(roof)
    };
    let by = move |gpu: &Gpu| {
        if tiled { flash_attention::of_size(head_size) } else { flash_attention::variant(gpu, heads) }
    };
    let inputs = move |gpu: &Gpu| ([(); 3].map(|()| floats(gpu, &size)), Ranges::packed(gpu, &[tokens], mask));
    vec![
        case("forward", 2, 4).run(move |gpu| {
            let (by, ([q, k, v], ranges)) = (by(gpu), inputs(gpu));
            move || forward_by(by, &q, &k, &v, &ranges, heads)
        }),
        case("backward", 5, 8).run(move |gpu| {
            let (by, ([q, k, v], ranges), dout) = (by(gpu), inputs(gpu), floats(gpu, &size));
            let (out, stats) = forward_by(by, &q, &k, &v, &ranges, heads);
            move || backward_by(by, [&q, &k, &v, &out, &stats], &dout, &ranges, heads)
        }),
    ]
}

impl Shapes {
    /// The decoder's heads.
    pub(super) fn decoder_heads(&self) -> Heads {
        Heads { heads: self.heads, kv_heads: self.heads, head_size: self.head_size, in_f16: false }
    }

    /// The tower's, of 64 channels, or as many as the tiny model's.
    pub(super) fn tower_heads(&self) -> Heads {
        let head_size = self.head_size.min(64);
        let heads = self.vision_hidden / head_size;
        Heads { heads, kv_heads: heads, head_size, in_f16: false }
    }
}

pub const CAUSAL: Op = Op {
    name: "attention.causal",
    check: |gpu, n| check(Mask::Causal, false, gpu, n),
    cost,
    cases: |shapes| {
        let mut cases = cases(shapes.tokens, Mask::Causal, shapes.decoder_heads(), false);
        cases.push(decode_attention::case(
            decode_attention::CACHED,
            shapes.decoder_heads(),
            |[q, k, v], ranges, heads| forward(q, k, v, ranges, heads),
        ));
        cases
    },
};
pub const FULL: Op = Op {
    name: "attention.full",
    check: |gpu, n| check(Mask::Full, false, gpu, n),
    cost,
    cases: |shapes| cases(shapes.patches + 1, Mask::Full, shapes.tower_heads(), false),
};
pub const WINDOW: Op = Op {
    name: "attention.window",
    check: |gpu, n| check(Mask::Window(5), false, gpu, n),
    cost,
    cases: |shapes| cases(shapes.tokens, Mask::Window(shapes.tokens / 4), shapes.decoder_heads(), false),
};
