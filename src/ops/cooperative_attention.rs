//! Attention by cooperative matrices, launched by `attention` for runs that compute in f16: as `flash_attention`, with
//! products as in `cooperative`. PyTorch: as `attention`.
//!
//! Operands are rounded to f16 once, into copies whose heads are padded to whole matrices: every workgroup that walks
//! them reads half the bytes. Scores, softmax and sums are f32; weights (p, and ds in the backward) are rounded to f16.
//! The gradient that comes in is scaled by a power of two as a product's is, though to 2^4: what is made of it must stay
//! within f16 too.

use super::{
    Comparison, Op, Random,
    attention::{self, Heads, Mask, Ranges},
    cooperative::{self, rounded, scale_to},
    decode_attention, groups_for, has_workgroups,
    testing::wide,
};
use crate::{
    error::Result,
    gpu::Gpu,
    tensor::{Dtype, Tensor},
};

/// Rows that a workgroup owns, of queries or keys; and the most, of which what is packed has whole multiples.
const ROWS: usize = 64;
const MOST_ROWS: usize = 128;
/// The most threads of a workgroup, and bytes of workgroup memory: for matrices of side 8, and of side 16.
const THREADS: u32 = 256;
const MEMORY: [u32; 2] = [32 << 10, 48 << 10];
/// Fewer queries leave most of a workgroup's rows empty.
const FEWEST: usize = ROWS;
/// A cache of more rows for each query is not worth a copy in f16.
const MOST_KEYS: usize = 4;
/// Vec4s that a workgroup of `pack` writes.
const PACKED: usize = 1024;
/// Rows of a workgroup of `delta`.
const DELTAS: usize = 32;
/// The incoming gradient's largest is brought to two to this.
const EXPONENT: i32 = 4;

/// The kernels for a device and a head size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kernels {
    /// What heads are padded to: 64 or 128.
    width: usize,
    /// Of the matrices: 8 or 16.
    side: u32,
    /// For 64 lanes a subgroup.
    wide: bool,
    /// Matrices are loaded from arrays of scalars.
    scalar: bool,
}

/// The kernels that attention of these numbers of queries and keys had better run, if any.
pub(super) fn chosen(gpu: &Gpu, heads: Heads, [queries, keys]: [usize; 2]) -> Option<Kernels> {
    let worth = heads.in_f16 && cooperative::serves(gpu) && queries >= FEWEST && keys <= MOST_KEYS * queries;
    let kernels = Kernels::all(gpu, heads.head_size).into_iter().next().filter(|_| worth)?;
    let largest = (queries * heads.heads).max(keys * heads.kv_heads).next_multiple_of(MOST_ROWS) * kernels.width * 4;
    (largest as u64 <= gpu.max_binding()).then_some(kernels)
}

impl Kernels {
    /// Every set of kernels that a device can run, the one that is meant for it first.
    fn all(gpu: &Gpu, head_size: usize) -> Vec<Self> {
        let (Some(side), ..=128) = (gpu.cooperative_side(), head_size) else { return Vec::new() };
        if !has_workgroups(gpu, MEMORY[usize::from(side == 16)], THREADS) {
            return Vec::new();
        }
        let one = Self { width: if head_size <= 64 { 64 } else { 128 }, side, wide: false, scalar: false };
        let scalars = cooperative::loads_scalars(gpu);
        match side {
            16 if cooperative::may_be_wide(gpu) => vec![Self { wide: true, ..one }, one],
            16 if !scalars => vec![one, Self { wide: true, ..one }],
            8 if scalars => vec![Self { scalar: true, ..one }],
            8 => vec![one, Self { scalar: true, ..one }],
            _ => Vec::new(),
        }
    }

    fn name(self, kernel: &str) -> String {
        let Self { width, side, .. } = self;
        let part = |wanted, part| if wanted { part } else { "" };
        let (wide, scalar) = (part(self.wide, "_wide"), part(self.scalar, "_scalar"));
        format!("cooperative_attention.{kernel}e{width}_{side}{wide}{scalar}")
    }

    /// f32 [N, H, E] of equal sizes as f16 [room, H, width] one behind the other, zeros around. One that comes with the
    /// largest sizes of its elements is scaled.
    fn pack(self, tensors: &[(&Tensor, Option<&Tensor>)], heads: usize, head_size: usize) -> Tensor {
        let (first, _) = tensors[0];
        let gpu = first.gpu();
        let rows = first.len() / head_size;
        let room = (rows / heads).next_multiple_of(MOST_ROWS);
        let y = Tensor::empty_of(gpu, Dtype::F16, &[tensors.len(), room, heads * self.width]);
        let quads = room * heads * self.width / 4;
        for (index, (x, largest)) in tensors.iter().enumerate() {
            let kernel = match (largest, head_size.is_multiple_of(4)) {
                (None, true) => "cooperative_attention.pack",
                (None, false) => "cooperative_attention.pack.odd",
                (Some(_), true) => "cooperative_attention.pack.scaled",
                (Some(_), false) => "cooperative_attention.pack.scaled_odd",
            };
            let params = [rows, quads, head_size, self.width / 4, index * quads].map(|size| size as u32);
            let mut bindings = vec![x.binding(), y.packed_range(0, y.len()).0];
            bindings.extend(largest.map(Tensor::binding));
            gpu.dispatch(kernel, &bindings, &params, groups_for(quads, PACKED));
        }
        y
    }

    fn params(heads: Heads, [queries, keys]: [usize; 2]) -> [u32; 8] {
        let [t, s, h, k, e, scale] = heads.params(queries, keys);
        let [queries_room, keys_room] = [queries, keys].map(|rows| rows.next_multiple_of(MOST_ROWS) as u32);
        [t, s, h, k, e, scale, queries_room, keys_room]
    }

    /// Rows that a workgroup of the forward owns: as ROWS in shaders/variants.
    fn forward_rows(self) -> usize {
        if self.side == 16 && !self.wide { MOST_ROWS } else { ROWS }
    }

    /// As [`attention::forward`].
    pub fn forward(self, [q, k, v]: [&Tensor; 3], of_queries: &Tensor, heads: Heads) -> (Tensor, Tensor) {
        let gpu = q.gpu();
        let Heads { heads: count, kv_heads, head_size, .. } = heads;
        let (queries, keys) = (q.len() / (count * head_size), k.len() / (kv_heads * head_size));
        let own = self.pack(&[(q, None)], count, head_size);
        let walked = self.pack(&[(k, None), (v, None)], kv_heads, head_size);
        let out = Tensor::empty(gpu, &[queries, count * head_size]);
        let stats = Tensor::empty(gpu, &[queries, count, 2]);
        let [own, walked] = [&own, &walked].map(|tensor| tensor.packed_range(0, tensor.len()).0);
        gpu.dispatch(
            &self.name("forward."),
            &[own, walked, of_queries.binding(), out.binding(), stats.binding()],
            &Self::params(heads, [queries, keys]),
            [queries.div_ceil(self.forward_rows()) as u32, count as u32, 1],
        );
        (out, stats)
    }

    /// As [`attention::backward`].
    ///
    /// # Panics
    /// When the ranges lack the keys' side.
    pub fn backward(
        self,
        [q, k, v, out, stats]: [&Tensor; 5],
        dout: &Tensor,
        ranges: &Ranges,
        heads: Heads,
    ) -> (Tensor, Tensor, Tensor) {
        let gpu = q.gpu();
        let Heads { heads: count, kv_heads, head_size, .. } = heads;
        let sizes @ [queries, keys] = [q.len() / (count * head_size), k.len() / (kv_heads * head_size)];
        let largest = cooperative::largest(gpu, dout.binding(), dout.len());
        let of_queries = self.pack(&[(q, None), (dout, Some(&largest))], count, head_size);
        let of_keys = self.pack(&[(k, None), (v, None)], kv_heads, head_size);
        let rows = queries * count;
        let second = of_queries.len() / 8;
        gpu.dispatch(
            "cooperative_attention.delta",
            &[out.binding(), of_queries.packed_range(0, of_queries.len()).0, stats.binding()],
            &[rows, head_size, self.width / 4, second].map(|size| size as u32),
            groups_for(rows, DELTAS),
        );
        let [dq, dk, dv] = [q, k, v].map(|x| Tensor::empty(gpu, x.shape()));
        let [of_queries, of_keys] = [&of_queries, &of_keys].map(|tensor| tensor.packed_range(0, tensor.len()).0);
        let params = Self::params(heads, sizes);
        let seen = &ranges.of_queries;
        gpu.dispatch(
            &self.name("backward.query_"),
            &[of_queries, of_keys, seen.binding(), stats.binding(), largest.binding(), dq.binding()],
            &params,
            [queries.div_ceil(ROWS) as u32, count as u32, 1],
        );
        let seen = ranges.of_keys.as_ref().expect("training ranges know both sides");
        gpu.dispatch(
            &self.name("backward.key_value_"),
            &[of_keys, of_queries, seen.binding(), stats.binding(), largest.binding(), dk.binding(), dv.binding()],
            &params,
            [keys.div_ceil(ROWS) as u32, kv_heads as u32, 1],
        );
        (dq, dk, dv)
    }
}

/// The way a check takes.
type By<'a> = Option<&'a Kernels>;

fn check(gpu: &Gpu, n: usize) -> Result<Vec<Comparison>> {
    let mut out = Vec::new();
    // Head sizes: whole, odd, of whole vectors but not of a matrix; grouped heads. Of large queries the largest score is
    // replaced again and again.
    let cases = [
        (2, 32, Mask::Causal, 1.0, 1.0),
        (4, 64, Mask::Full, 30.0, 1e-12),
        (1, 33, Mask::Window(5), 4.0, 1e9),
        (2, 80, Mask::Causal, 30.0, 1e9),
        (4, 128, Mask::Window(70), 4.0, 1.0),
        (1, 128, Mask::Full, 1.0, 1e-12),
    ];
    for (index, (kv_heads, head_size, mask, sharpness, size)) in cases.into_iter().enumerate() {
        if n > 100 && index % 3 > 0 {
            continue;
        }
        let heads = Heads { heads: 4, kv_heads, head_size, in_f16: true };
        let lengths = [n, 1, n / 3 + 1];
        let case = Checked::new(gpu, heads, &lengths, mask, sharpness, size);
        for kernels in Kernels::all(gpu, head_size) {
            out.extend(case.compare(Some(&kernels))?);
        }
        if chosen(gpu, heads, [case.tokens; 2]).is_some() {
            out.extend(case.compare(None)?);
        }
    }
    for kernels in Kernels::all(gpu, 64) {
        out.extend(unlike(kernels, gpu, n)?);
    }
    Ok(out)
}

/// Attention on random data, and what it must give.
struct Checked {
    heads: Heads,
    ranges: Ranges,
    tokens: usize,
    /// q, k, v, dout
    given: [Tensor; 4],
    /// out, dq, dk, dv
    want: [Vec<f64>; 4],
    /// Of dout.
    size: f64,
    /// What is left of gradients that cancel, as those of queries that see one key do.
    left: f64,
}

impl Checked {
    fn new(gpu: &Gpu, heads: Heads, lengths: &[usize], mask: Mask, sharpness: f32, size: f32) -> Self {
        let tokens: usize = lengths.iter().sum();
        let mut random = Random::new((tokens * 7 + heads.kv_heads + heads.head_size) as u64);
        let widths = [heads.heads, heads.kv_heads, heads.kv_heads, heads.heads].map(|count| count * heads.head_size);
        let values: Vec<Vec<f32>> = (widths.iter().zip([sharpness, 1.0, 1.0, size]))
            .map(|(width, size)| random.values(tokens * width).iter().map(|x| x * size).collect())
            .collect();
        let given = std::array::from_fn(|at| Tensor::from_f32(gpu, &values[at], &[tokens, widths[at]]));
        let left = if lengths[0] < 8 { 3e-4 * f64::from(sharpness) } else { 0.0 };
        let scale = scale_to(EXPONENT, &values[3]);
        let [q, k, v, dout] = [(0, 1.0), (1, 1.0), (2, 1.0), (3, scale)].map(|(at, scale)| rounded(&values[at], scale));
        let want = attention::reference([&q, &k, &v, &dout], lengths, mask, heads);
        Self { heads, ranges: Ranges::packed(gpu, lengths, mask), tokens, given, want, size: size.into(), left }
    }

    /// Forward and backward, by these kernels or as attention comes here.
    fn run(&self, by: By<'_>) -> Result<[Vec<f32>; 4]> {
        let ([q, k, v, dout], ranges, heads) = (&self.given, &self.ranges, self.heads);
        let (out, (dq, dk, dv)) = match by {
            None => {
                let (out, stats) = attention::forward(q, k, v, ranges, heads);
                let gradients = attention::backward([q, k, v, &out, &stats], dout, ranges, heads);
                (out, gradients)
            }
            Some(kernels) => {
                let (out, stats) = kernels.forward([q, k, v], &ranges.of_queries, heads);
                let gradients = kernels.backward([q, k, v, &out, &stats], dout, ranges, heads);
                (out, gradients)
            }
        };
        Ok([out.to_vec()?, dq.to_vec()?, dk.to_vec()?, dv.to_vec()?])
    }

    fn compare(&self, by: By<'_>) -> Result<Vec<Comparison>> {
        let once = self.run(by)?;
        let again = self.run(by)?;
        let mut comparisons = Vec::new();
        for (at, (once, again)) in once.into_iter().zip(again).enumerate() {
            comparisons.push(Comparison::new("the same bytes again", again, wide(&once), 0.0));
            let (what, tolerance) = TOLERANCES[at];
            // Comparisons are of values not far from 1.
            let size = if at == 0 { 1.0 } else { self.size };
            let got = once.iter().map(|&x| (f64::from(x) / size) as f32).collect();
            let want = self.want[at].iter().map(|x| x / size).collect();
            let tolerance = if matches!(at, 1 | 2) { tolerance.max(self.left) } else { tolerance };
            comparisons.push(Comparison::new(what, got, want, tolerance));
        }
        Ok(comparisons)
    }
}

/// Weights are rounded to f16, by 2^-11 at most, once for out and dv; for ds they come from others that are, and scores of
/// tens are f32.
const TOLERANCES: [(&str, f64); 4] = [("out", 5e-4), ("dq", 2e-3), ("dk", 2e-3), ("dv", 5e-4)];

/// Queries over another number of keys, some of which see one key or none.
fn unlike(kernels: Kernels, gpu: &Gpu, n: usize) -> Result<[Comparison; 2]> {
    let heads = Heads { heads: 3, kv_heads: 3, head_size: 40, in_f16: true };
    let keys = n / 2 + 3;
    let ranges: Vec<[u32; 2]> = (0..n).map(|t| [t * 5 % 7 % keys, t * 11 % (keys + 1)].map(|key| key as u32)).collect();
    let ranges: Vec<[u32; 2]> = ranges.into_iter().map(|[first, end]| [first, end.max(first)]).collect();
    let mut random = Random::new(n as u64);
    let [(q, tq), (k, tk), (v, tv)] = [n, keys, keys].map(|rows| random.tensor(gpu, &[rows, 3 * 40]));
    let of_queries = Tensor::from_u32(gpu, ranges.as_flattened(), &[n, 2]);
    let (out, stats) = kernels.forward([&tq, &tk, &tv], &of_queries, heads);
    let [q, k, v] = [q, k, v].map(|values| rounded(&values, 1.0));
    let (want, want_sums) = decode_attention::reference([&q, &k, &v], &ranges, heads);
    let stats = stats.to_vec()?;
    let sees = |row: usize| ranges[row / 3][0] < ranges[row / 3][1];
    let sums = stats.as_chunks::<2>().0.iter().enumerate().filter(|&(row, _)| sees(row)).map(|(_, s)| s[0]);
    Ok([
        Comparison::new("out over other keys", out.to_vec()?, want, TOLERANCES[0].1),
        Comparison::new("log-sum-exp", sums.collect(), want_sums, 3e-6),
    ])
}

pub const OP: Op = Op {
    name: "cooperative_attention",
    check,
    cost: attention::cost,
    cases: |shapes| {
        let [decoder, tower] =
            [shapes.decoder_heads(), shapes.tower_heads()].map(|heads| Heads { in_f16: true, ..heads });
        let mut cases = attention::cases(shapes.tokens, Mask::Causal, decoder, false);
        cases.extend(attention::cases(shapes.patches + 1, Mask::Full, tower, false));
        cases
    },
};
