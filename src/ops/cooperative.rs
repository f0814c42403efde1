//! Products by cooperative matrices, which the lanes of a subgroup hold and multiply together: NVIDIA's tensor cores, AMD's
//! WMMA, Apple's simdgroup matrices. Layouts and epilogues as in `matmul.rs`, which comes here.
//!
//! Operands are rounded to f16 on their way through workgroup memory, sums are f32. So these kernels run where that is
//! what a run asked for: beside a weight in 16 bits, or where a caller says so (`Epilogue::rounding`).
//!
//! An operand may be scaled by the power of two that brings the largest of it near the end of f16's range, and the sums are
//! divided by that: nothing of it is lost that matters beside the largest. So are gradients, the left side of NN and TN,
//! which in f16 would vanish rather than overflow. Activations, the left side of NT, and the right side are not in a run
//! in float16: what is beyond 65504 becomes infinite, as in a model that PyTorch runs in it, and loss scaling sees what
//! comes of that. They are in a run in bfloat16, whose range is f32's ([`Rounding::Scaled`]): f16 has three binary digits more
//! than what PyTorch rounds to there. Weights in bfloat16 themselves are not: f16 has all their digits from 6e-5 to 65504, and below
//! that is off by 3e-8 at most.

use half::f16;

use super::{
    Case, Comparison, Cost, Op, Random, Shapes, has_workgroups,
    matmul::{self, Epilogue, Layout, split},
    roof,
    testing::wide,
};
use crate::{
    error::Result,
    gpu::{Binding, Gpu},
    tensor::{Dtype, Rounding, Tensor},
};

/// What a workgroup computes at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kernel {
    /// Of the matrices: 8 or 16.
    side: u32,
    /// How many lanes a subgroup has.
    lanes: Lanes,
    /// A tile of 128 x 128 instead of 64 x 64, in 30 KiB of workgroup memory.
    large: bool,
    /// Rows of all operands are whole vectors of four.
    vectors: bool,
    /// Adds a second product on the way.
    adapted: bool,
    /// B is scaled, which most do where they are told to.
    scales_b: bool,
}

/// What is known of the lanes of a device's subgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lanes {
    /// Nothing.
    Any,
    /// There may be 64.
    Wide,
    /// As many as the matrices' sides ask for: 32 (16), 8 (8); and C has a whole tile at least.
    Exact,
    /// The same, and K is short, of whole steps, and matrices of sums can be stored as they are: none waits in workgroup
    /// memory for it.
    Direct,
}

/// Bytes of workgroup memory of the large tile, and threads.
const LARGE_BYTES: u32 = 30 << 10;
const LARGE_THREADS: u32 = 256;
/// How much of K is staged at a time.
const DEPTH: usize = 32;
/// Up to this K what is on its way to C, and what is added to on its way from there, decides. Measured at 64, as of adapters
/// (a third of the time saved), and at 4096 (5 % lost); reasoned between.
const SHORT: usize = 512;
/// Of the flags of a product, as in the shader.
const ADD_BIAS: u32 = 1;
const ACCUMULATE: u32 = 2;
/// Of A; of B, and of the second A and B, the next ones.
const SCALE: u32 = 4;
/// Where the parameters have them.
const FLAGS: usize = 9;
const ALPHA: usize = 10;
/// Workgroups of `cooperative.largest` (PARTS in the shader).
const PARTS: usize = 256;

/// A product on bound storage, by the parameters of `matmul`'s kernels, of which the first thirteen are these kernels' too:
/// m, n, k, lda, ldb, ldc, a_offset, b_offset, ..
pub(super) struct Product<'a> {
    pub gpu: &'a Gpu,
    pub layout: Layout,
    /// The type of B: f32, f16, or bf16 in whole vectors.
    pub b: Dtype,
    /// A, B, bias, C.
    pub bindings: [Binding<'a>; 4],
    pub params: &'a [u32],
    pub rounding: Rounding,
    /// The largest sizes in A, if they are known ([`largest`]).
    pub largest: Option<&'a Tensor>,
    pub second: Option<SecondPair<'a>>,
}

/// A second product of the layout NT or NN, in f32, which is added to the first one: `matmul::Second`, bound.
#[derive(Clone, Copy)]
pub(super) struct SecondPair<'a> {
    /// [M, K]
    pub a: Binding<'a>,
    /// [K, N], or [N, K] in NT: rows of `ldb`, from `b_offset` on.
    pub b: Binding<'a>,
    pub k: usize,
    pub ldb: usize,
    pub b_offset: usize,
    pub alpha: f32,
}

/// Whether products whose operands may be rounded come here at all.
pub fn serves(gpu: &Gpu) -> bool {
    !gpu.is_cpu() && gpu.cooperative_side().is_some()
}

/// The roof of products whose operands may be rounded.
pub(super) fn roof_in_f16(gpu: &Gpu) -> &'static str {
    if serves(gpu) { roof::COOPERATIVE } else { roof::FMA }
}

/// Whether products of these sizes run here: no side is shorter than a matrix. Host processors have no such units; what
/// they offer under this name (lavapipe does) is slower than `matmul`'s.
pub(super) fn fits(gpu: &Gpu, [m, n, k]: [usize; 3]) -> bool {
    serves(gpu) && gpu.cooperative_side().is_some_and(|side| m.min(n) >= side as usize) && k > 0
}

/// Whether a device can run the large tile, on operands that lie as vectors.
pub(super) fn has_large(gpu: &Gpu) -> bool {
    gpu.cooperative_side() == Some(16) && has_workgroups(gpu, LARGE_BYTES, LARGE_THREADS)
}

/// Whether subgroups may have 64 lanes. Metal tells the largest size that there might be; it is 32.
pub(super) fn may_be_wide(gpu: &Gpu) -> bool {
    gpu.facts().limits.subgroup_max_size >= 64 && gpu.facts().backend != "metal"
}

/// The side of a tile.
fn tile(large: bool) -> usize {
    if large { 128 } else { 64 }
}

/// Lanes of a subgroup of which there are then as many as a workgroup has units of work.
fn exact_lanes(side: u32) -> u32 {
    if side == 16 { 32 } else { 8 }
}

/// Whether a product of m x n has so many large tiles that they are worth it.
pub(super) fn wants_large(m: usize, n: usize) -> bool {
    m.div_ceil(128) * n.div_ceil(128) >= split::ENOUGH
}

impl Product<'_> {
    fn sizes(&self) -> [usize; 3] {
        [self.params[0], self.params[1], self.params[2]].map(|size| size as usize)
    }

    /// Runs the product, which [`fits`]; by the large tile if that is wanted, and can be had. Gives whether the second one,
    /// if there is one, is in it.
    pub fn run(&self, large: bool) -> bool {
        let Some(side) = self.gpu.cooperative_side() else { return false };
        let kernel = self.kernel(side, large);
        self.launch(kernel);
        kernel.adapted
    }

    /// As [`Product::run`], by the tile that suits the sizes.
    fn run_as_suits(&self) -> bool {
        let [m, n, _] = self.sizes();
        self.run(wants_large(m, n))
    }

    fn kernel(&self, side: u32, large: bool) -> Kernel {
        let vectors = self.vectors();
        let large = large && vectors && has_large(self.gpu);
        let adapted = self.adapted(side, large);
        let lanes = match side {
            _ if adapted => Lanes::Exact,
            _ if self.direct(side, large) && !(large && self.scales_b()) && self.sizes()[2] <= SHORT => Lanes::Direct,
            _ if self.exact(side, large) => Lanes::Exact,
            16 if may_be_wide(self.gpu) => Lanes::Wide,
            _ => Lanes::Any,
        };
        Kernel { side, lanes, large, vectors, adapted, scales_b: self.scales_b() }
    }

    /// Whether the text for so many lanes can run: these are what the device has, C has a whole tile, and the sum a step.
    fn exact(&self, side: u32, large: bool) -> bool {
        let (limits, [m, n, k]) = (&self.gpu.facts().limits, self.sizes());
        let lanes = [limits.subgroup_min_size, limits.subgroup_max_size];
        let metal = self.gpu.facts().backend == "metal";
        !metal && self.vectors() && lanes == [exact_lanes(side); 2] && m.min(n) >= tile(large) && k >= DEPTH
    }

    fn scales_b(&self) -> bool {
        self.rounding == Rounding::Scaled && self.b == Dtype::F32
    }

    /// Whether a text takes the second product along: its sum has whole steps, and its rows lie as vectors too.
    fn adapted(&self, side: u32, large: bool) -> bool {
        let fits = |second: &SecondPair<'_>| {
            second.k > 0
                && second.k.is_multiple_of(DEPTH)
                && [second.ldb, second.b_offset].iter().all(|x| x.is_multiple_of(4))
                && second.alpha != 0.0
        };
        let plain = self.params[ALPHA] == 1f32.to_bits() && self.b.is_packed() && self.layout != Layout::Tn;
        plain && self.second.as_ref().is_some_and(fits) && self.exact(side, large)
    }

    /// Whether, in addition, the sum has whole steps, there is no bias, and C, if it is added to, has whole tiles alone: the
    /// last ones overlap those before.
    fn direct(&self, side: u32, large: bool) -> bool {
        let ([m, n, k], flags) = (self.sizes(), self.params[FLAGS]);
        let whole = m.is_multiple_of(tile(large)) && n.is_multiple_of(tile(large));
        let can_add = flags & ACCUMULATE == 0 || whole;
        self.exact(side, large) && k.is_multiple_of(DEPTH) && flags & ADD_BIAS == 0 && can_add
    }

    /// Whether four neighbours in a row of A, B and C lie as a vector, from the first on.
    fn vectors(&self) -> bool {
        let [m, n, k, lda, ldb, ldc, a_offset, b_offset, c_offset] = std::array::from_fn(|at| self.params[at]);
        let a_row = if self.layout == Layout::Tn { m } else { k };
        let b_row = if self.layout == Layout::Nt { k } else { n };
        [a_row, b_row, n, lda, ldb, ldc, a_offset, b_offset, c_offset].iter().all(|x| x.is_multiple_of(4))
    }

    fn launch(&self, kernel: Kernel) {
        let Self { gpu, layout, bindings, params, .. } = *self;
        let ([m, n, k], tile) = (self.sizes(), tile(kernel.large));
        let groups = [n.div_ceil(tile) as u32, m.div_ceil(tile) as u32, 1];
        // All of the rows that are bound, though it may be some columns of them that are multiplied.
        let a_rows = if layout == Layout::Tn { k } else { m };
        let b_rows = if layout == Layout::Nt { n } else { k };
        let scaled = self.rounding == Rounding::Scaled;
        let scales_a = scaled || layout != Layout::Nt;
        let of_a = scales_a.then(|| match self.largest {
            Some(largest) => largest.clone(),
            None => largest(gpu, bindings[0], a_rows * params[3] as usize),
        });
        let second = self.second.as_ref().filter(|_| kernel.adapted);
        let b_count = self.scales_b().then_some(b_rows * params[4] as usize);
        let rest = [
            b_count.map(|count| (bindings[1], count)),
            second.filter(|_| scales_a).map(|second| (second.a, m * second.k)),
            second
                .filter(|_| scaled)
                .map(|second| (second.b, if layout == Layout::Nt { n } else { second.k } * second.ldb)),
        ];
        let of_rest = rest.iter().any(Option::is_some).then(|| Tensor::empty(gpu, &[rest.len(), PARTS]));
        let mut params: Vec<u32> = params[..13].to_vec();
        params[FLAGS] |= if scales_a { SCALE } else { 0 };
        for (index, (elements, count)) in rest.into_iter().enumerate().filter_map(|(at, one)| Some((at, one?))) {
            largest_into(
                gpu,
                elements,
                count,
                of_rest.as_ref().map_or(elements, |rest| rest.range(index * PARTS, PARTS)),
            );
            params[FLAGS] |= SCALE << (1 + index);
        }
        // What is not read is bound all the same.
        let [a, b, bias, c] = bindings;
        let [of_a, of_rest] = [&of_a, &of_rest].map(|largest| largest.as_ref().map_or(a, Tensor::binding));
        let mut bindings = vec![a, b, bias, c, of_a, of_rest];
        if let Some(&SecondPair { a, b, k, ldb, b_offset, alpha }) = second {
            bindings.extend([a, b]);
            params.extend([k as u32, ldb as u32, b_offset as u32, alpha.to_bits()]);
        }
        // Small tiles have few threads each.
        let enough = if kernel.large { split::ENOUGH } else { 4 * split::ENOUGH };
        split::launch_until(enough, gpu, &kernel.name(layout, self.b), &bindings, &params, groups);
    }
}

impl Kernel {
    fn name(self, layout: Layout, b: Dtype) -> String {
        let operands = match (layout, b) {
            (Layout::Nt, Dtype::F16) => "nt_f16",
            (Layout::Nt, Dtype::Bf16) => "nt_bf16",
            (Layout::Nt, _) => "nt",
            (Layout::Nn, Dtype::F16) => "nn_f16",
            (Layout::Nn, Dtype::Bf16) => "nn_bf16",
            (Layout::Nn, _) => "nn",
            (Layout::Tn, _) => "tn",
        };
        let part = |wanted, part| if wanted { part } else { "" };
        let lanes = match self.lanes {
            Lanes::Any => "",
            Lanes::Wide => "_wide",
            Lanes::Exact if self.adapted => "_adapted",
            Lanes::Exact if self.large && self.scales_b => "_exact_scaled",
            Lanes::Exact => "_exact",
            Lanes::Direct => "_direct",
        };
        let (large, odd) = (part(self.large, "_large"), part(!self.vectors, "_odd"));
        format!("cooperative.product.{operands}_{}{large}{lanes}{odd}", self.side)
    }

    /// Every kernel that a device can run on these operands, whether it is meant for it or not.
    fn all(gpu: &Gpu, product: &Product<'_>) -> Vec<Self> {
        let Some(side) = gpu.cooperative_side() else { return Vec::new() };
        let vectors = product.vectors();
        let in_vectors_alone = product.b == Dtype::Bf16;
        if in_vectors_alone && !vectors {
            return Vec::new();
        }
        let mut all = Vec::new();
        for (lanes, large) in [Lanes::Any, Lanes::Wide, Lanes::Exact, Lanes::Direct]
            .into_iter()
            .flat_map(|one| [(one, false), (one, true)])
        {
            let fits = match lanes {
                Lanes::Any => true,
                Lanes::Wide => side == 16,
                Lanes::Exact => product.exact(side, large),
                Lanes::Direct => product.direct(side, large) && !(large && product.scales_b()),
            };
            if fits && (!large || vectors && has_large(gpu)) {
                let one = Self { side, lanes, large, vectors, adapted: false, scales_b: product.scales_b() };
                all.push(one);
                all.extend(
                    (lanes == Lanes::Exact && product.adapted(side, large)).then_some(Self { adapted: true, ..one }),
                );
                let odd = vectors && !in_vectors_alone && !large && matches!(lanes, Lanes::Any | Lanes::Wide);
                all.extend(odd.then_some(Self { vectors: false, ..one }));
            }
        }
        all
    }
}

/// The largest sizes in a gradient that is the left side of several products beside a weight, if these may run here.
pub fn largest_in(gradient: &Tensor, weight: &Tensor) -> Option<Tensor> {
    let rounds = weight.rounding().is_some() && serves(gradient.gpu());
    rounds.then(|| largest(gradient.gpu(), gradient.binding(), gradient.len()))
}

/// The same in an activation, which runs in bfloat16 alone scale.
pub fn largest_in_activation(x: &Tensor, weight: &Tensor) -> Option<Tensor> {
    (weight.rounding() == Some(Rounding::Scaled)).then(|| largest_in(x, weight)).flatten()
}

/// The largest sizes among the elements, by parts ([`PARTS`]), as bits.
pub(super) fn largest(gpu: &Gpu, elements: Binding<'_>, count: usize) -> Tensor {
    let largest = Tensor::empty(gpu, &[PARTS]);
    largest_into(gpu, elements, count, largest.binding());
    largest
}

fn largest_into(gpu: &Gpu, elements: Binding<'_>, count: usize, largest: Binding<'_>) {
    let mut params = [0; 13];
    params[0] = count as u32;
    gpu.dispatch("cooperative.largest", &[elements, largest], &params, [PARTS as u32, 1, 1]);
}

/// The whole product of A and B, for checks and measurements: bound whole, by `run`.
fn whole<R>(
    layout: Layout,
    (a, b, c): (&Tensor, &Tensor, &Tensor),
    epilogue: Epilogue<'_>,
    run: impl FnOnce(&Product<'_>) -> R,
) -> R {
    let second = epilogue.second.map(|matmul::Second { a, b, alpha }| SecondPair {
        a: a.binding(),
        b: b.binding(),
        k: a.cols(),
        ldb: b.cols(),
        b_offset: 0,
        alpha,
    });
    let (a_binding, c_binding) = (a.binding(), c.binding());
    let b_binding = if b.dtype().is_packed() { b.packed_range(0, b.len()).0 } else { b.binding() };
    let bias = epilogue.bias.map_or(a_binding, Tensor::binding);
    let k = if layout == Layout::Tn { a.rows() } else { a.cols() };
    let flags = u32::from(epilogue.bias.is_some()) | u32::from(epilogue.accumulate) << 1;
    let sizes = [c.rows(), c.cols(), k, a.cols(), b.cols(), c.cols()].map(|size| size as u32);
    let rest = [0, 0, 0, flags, epilogue.alpha.unwrap_or(1.0).to_bits(), 0, 0];
    let params = [&sizes[..], &rest].concat();
    let bindings = [a_binding, b_binding, bias, c_binding];
    let rounding = epilogue.rounding.or_else(|| b.rounding()).unwrap_or(Rounding::Half);
    let (gpu, b, largest) = (a.gpu(), b.dtype(), epilogue.largest);
    run(&Product { gpu, layout, b, bindings, params: &params, rounding, largest, second })
}

/// f16, of values that are divided again by what they are multiplied with first.
pub(super) fn rounded(values: &[f32], scale: f64) -> Vec<f64> {
    values.iter().map(|&x| f16::from_f64(f64::from(x) * scale).to_f64() / scale).collect()
}

/// The power of two that brings the largest value to 2^14 and beyond.
pub(super) fn scale_of(values: &[f32]) -> f64 {
    scale_to(14, values)
}

/// The same for another power of two.
pub(super) fn scale_to(exponent: i32, values: &[f32]) -> f64 {
    let largest = values.iter().fold(0f32, |most, x| most.max(x.abs()));
    2f64.powi(exponent - f64::from(largest).log2().floor() as i32)
}

fn check(layout: Layout, dtype: Dtype, gpu: &Gpu, n: usize) -> Result<Vec<Comparison>> {
    let mut out = Vec::new();
    let (even, long) = (n.next_multiple_of(8), n + 131);
    // Odd and whole vectors, a row, a column, little to sum, each side beyond a tile, so much to sum that it is cut into
    // parts; gradients small and large.
    let shapes = [[n, n + 2, n + 1], [even, even + 8, even], [1, n, even], [n, 1, 3], [long, 34, n], [34, long, even]];
    let shapes = shapes.into_iter().chain([[n, n + 2, 2051], [even, 8, even + 2056]]);
    // Whole tiles, and of K whole steps too: whose matrices go to C as they are.
    let whole_tiles = |k| [n.next_multiple_of(128), 256, k];
    let shapes = shapes.chain([whole_tiles(even), whole_tiles(n.next_multiple_of(DEPTH))]);
    let roundings: &[Rounding] =
        if dtype == Dtype::Bf16 { &[Rounding::Scaled] } else { &[Rounding::Half, Rounding::Scaled] };
    for (turn, sizes) in shapes.enumerate() {
        // Of two ways of rounding the second has some of the shapes, of each kind one.
        for &rounding in &roundings[..roundings.len().min(1 + turn % 2)] {
            out.extend(compare((layout, dtype, rounding), gpu, turn, sizes)?);
        }
    }
    if gpu.cooperative_side().is_some() {
        for &rounding in roundings {
            out.push(overflow((layout, dtype, rounding), gpu)?);
            if layout != Layout::Tn && dtype.is_packed() {
                out.extend(with_second((layout, dtype, rounding), gpu, n)?);
            }
        }
    }
    Ok(out)
}

/// A second product beside the first one: of its sizes, far larger and smaller, nothing; summed in parts; of a K that the
/// texts do not take along; each as products come here, and by every text that takes it along.
fn with_second((layout, dtype, rounding): (Layout, Dtype, Rounding), gpu: &Gpu, n: usize) -> Result<Vec<Comparison>> {
    let mut out = Vec::new();
    let even = n.next_multiple_of(4) + 64;
    let large = if has_large(gpu) { 2048 } else { 0 };
    let scaled = rounding == Rounding::Scaled;
    let cases = [
        ([even, 132, 96], 64, [1.0, 1.0], 2.0),
        ([even, 132, 36], 32, [1e-9, if scaled { 1e-9 } else { 1.0 }], 0.25),
        ([132, even, 68], 32, [if scaled || layout == Layout::Nn { 1e6 } else { 30.0 }, 30.0], -1.5),
        ([132, 132, 2052], 32, [1.0, 0.0], 1.0),
        ([132, 132, 2080], 96, [1.0, 1.0], 1.0),
        ([132, 136, 64], 20, [1.0, 1.0], 0.5),
        ([large, 2048, 64], 64, [1.0, 1.0], 0.5),
    ];
    for ([m, n, k], k2, sizes, alpha) in cases.into_iter().filter(|([m, ..], ..)| *m > 0) {
        let mut random = Random::new((m * 31 + n * 7 + k + k2) as u64);
        let mut values = |count: usize, size: f32| random.values(count).iter().map(|x| x * size).collect::<Vec<_>>();
        let b_shape = |k: usize| if layout == Layout::Nt { [n, k] } else { [k, n] };
        let (a, a2, b2) = (values(m * k, 1.0), values(m * k2, sizes[0]), values(n * k2, sizes[1]));
        let b = dtype.narrow(&values(n * k, 1.0));
        let (bias, tbias) = random.tensor(gpu, &[n]);
        let [ta, ta2] = [(&a, k), (&a2, k2)].map(|(a, k)| Tensor::from_f32(gpu, a, &[m, k]));
        let (tb, tb2) = (Tensor::from_bytes(gpu, dtype, &b, &b_shape(k)), Tensor::from_f32(gpu, &b2, &b_shape(k2)));
        let scale = |scales: bool, values: &[f32]| {
            if scales && values.iter().any(|x| *x != 0.0) { scale_of(values) } else { 1.0 }
        };
        let scales_a = scaled || layout == Layout::Nn;
        let product = |a: &[f32], b: &[f32], scales_b: bool, k: usize| {
            let (a, b) = (rounded(a, scale(scales_a, a)), rounded(b, scale(scales_b, b)));
            matmul::reference(layout, &a, &b, [m, n, k])
        };
        let (plain, beside) = (product(&a, &dtype.widen(&b), false, k), product(&a2, &b2, scaled, k2));
        let both = plain.iter().zip(&beside).map(|(x, y)| x + f64::from(alpha) * y);
        let want: Vec<f64> = both.enumerate().map(|(at, sum)| sum + f64::from(bias[at % n])).collect();
        let second = Some(matmul::Second { a: &ta2, b: &tb2, alpha });
        let epilogue = Epilogue { bias: Some(&tbias), rounding: Some(rounding), second, ..Default::default() };
        let tolerance = 2e-6 * ((k + k2) as f64).sqrt();
        let c = Tensor::empty(gpu, &[m, n]);
        matmul::product_into(layout, &ta, &tb, &c, epilogue);
        out.push(Comparison::new("a second product beside it", c.to_vec()?, want.clone(), tolerance));
        let kernels = whole(layout, (&ta, &tb, &c), epilogue, |product| Kernel::all(gpu, product));
        for kernel in kernels.into_iter().filter(|kernel| kernel.adapted) {
            whole(layout, (&ta, &tb, &c), epilogue, |product| product.launch(kernel));
            out.push(Comparison::new("a second product on the way", c.to_vec()?, want.clone(), tolerance));
        }
    }
    Ok(out)
}

/// Every kernel, and products as they come here; operands are of other sizes in every turn, where they are scaled.
fn compare(
    (layout, dtype, rounding): (Layout, Dtype, Rounding),
    gpu: &Gpu,
    turn: usize,
    [m, n, k]: [usize; 3],
) -> Result<Vec<Comparison>> {
    let mut out = Vec::new();
    let mut random = Random::new((m * 31 + n * 7 + k) as u64);
    let scales_a = layout != Layout::Nt || rounding == Rounding::Scaled;
    let scales_b = dtype == Dtype::F32 && rounding == Rounding::Scaled;
    let a_size = if scales_a { [1.0, 1e-12, 1e9][turn % 3] } else { 1.0 };
    let b_size = if scales_b { [1e9, 1.0, 1e-12][turn % 3] } else { 1.0 };
    let mut values = |count: usize, size: f32| random.values(count).iter().map(|x| x * size).collect::<Vec<_>>();
    let a = values(m * k, a_size);
    let ta = Tensor::from_f32(gpu, &a, &if layout == Layout::Tn { [k, m] } else { [m, k] });
    let b = dtype.narrow(&values(n * k, b_size));
    let tb = Tensor::from_bytes(gpu, dtype, &b, &if layout == Layout::Nt { [n, k] } else { [k, n] });
    let b = dtype.widen(&b);
    let (bias, tbias) = random.tensor(gpu, &[n]);
    let scale = |scales: bool, values: &[f32]| if scales { scale_of(values) } else { 1.0 };
    let (a, b) = (rounded(&a, scale(scales_a, &a)), rounded(&b, scale(scales_b, &b)));
    let plain = matmul::reference(layout, &a, &b, [m, n, k]);
    let alpha = 0.5 / (a_size * b_size);
    let unbiased: Vec<f64> = plain.iter().map(|x| 1.5 * f64::from(alpha) * x).collect();
    let want: Vec<f64> = unbiased.iter().enumerate().map(|(at, x)| x + f64::from(bias[at % n])).collect();
    let rounding = Some(rounding);
    let first = Epilogue { alpha: Some(alpha), bias: Some(&tbias), rounding, ..Default::default() };
    let second = Epilogue { alpha: Some(alpha / 2.0), accumulate: true, rounding, ..Default::default() };
    let tolerance = 2e-6 * (k as f64).sqrt().max(2.0);
    let c = Tensor::empty(gpu, &[m, n]);
    let kernels = whole(layout, (&ta, &tb, &c), first, |product| Kernel::all(gpu, product));
    for kernel in kernels.into_iter().filter(|kernel| kernel.lanes != Lanes::Direct) {
        whole(layout, (&ta, &tb, &c), first, |product| product.launch(kernel));
        let once = c.to_vec()?;
        whole(layout, (&ta, &tb, &c), first, |product| product.launch(kernel));
        out.push(Comparison::new("the same bytes again", c.to_vec()?, wide(&once), 0.0));
        whole(layout, (&ta, &tb, &c), second, |product| product.launch(kernel));
        out.push(Comparison::new("alpha A B + bias, then + alpha A B", c.to_vec()?, want.clone(), tolerance));
    }
    let bare = Epilogue { bias: None, ..first };
    let kernels = whole(layout, (&ta, &tb, &c), bare, |product| Kernel::all(gpu, product));
    for kernel in kernels.into_iter().filter(|kernel| kernel.lanes == Lanes::Direct) {
        whole(layout, (&ta, &tb, &c), bare, |product| product.launch(kernel));
        let once = c.to_vec()?;
        whole(layout, (&ta, &tb, &c), bare, |product| product.launch(kernel));
        out.push(Comparison::new("the same bytes again", c.to_vec()?, wide(&once), 0.0));
        whole(layout, (&ta, &tb, &c), second, |product| product.run(kernel.large));
        out.push(Comparison::new("alpha A B, then + alpha A B", c.to_vec()?, unbiased.clone(), tolerance));
    }
    // As products come here; what bf16 has no text for is not rounded.
    let rounds = dtype != Dtype::Bf16 || [k, n].iter().all(|side| side.is_multiple_of(4));
    if fits(gpu, [m, n, k]) && rounds {
        matmul::product_into(layout, &ta, &tb, &c, first);
        matmul::product_into(layout, &ta, &tb, &c, second);
        out.push(Comparison::new("the same as chosen", c.to_vec()?, want, tolerance));
    }
    Ok(out)
}

/// What is beyond f16, or where A is scaled beyond f32, is seen in its own row of C, and nowhere else.
fn overflow((layout, dtype, rounding): (Layout, Dtype, Rounding), gpu: &Gpu) -> Result<Comparison> {
    let n = 40;
    let (mut a, b) = (vec![1.0; n * n], dtype.narrow(&vec![0.5; n * n]));
    let scaled = layout != Layout::Nt || rounding == Rounding::Scaled;
    a[0] = if scaled { f32::INFINITY } else { 70_000.0 };
    let (a, b) = (Tensor::from_f32(gpu, &a, &[n, n]), Tensor::from_bytes(gpu, dtype, &b, &[n, n]));
    let c = Tensor::empty(gpu, &[n, n]);
    let epilogue = Epilogue { rounding: Some(rounding), ..Default::default() };
    whole(layout, (&a, &b, &c), epilogue, |product| product.run_as_suits());
    let finite = c.to_vec()?.iter().map(|x| f32::from(u8::from(x.is_finite()))).collect();
    let want = (0..n * n).map(|at| f64::from(u8::from(at >= n))).collect();
    Ok(Comparison::new("what is finite", finite, want, 0.0))
}

/// The linears of a decoder, as `matmul` has them; on the device's own matrices whatever the device is.
fn cases(layout: Layout, dtype: Dtype, shapes: &Shapes) -> Vec<Case> {
    let Shapes { tokens, hidden, intermediate, .. } = *shapes;
    let run = move |a: &Tensor, b: &Tensor| {
        let (m, n, _) = matmul::sizes(layout, a, b);
        let c = Tensor::empty(a.gpu(), &[m, n]);
        whole(layout, (a, b, &c), Epilogue::default(), |product| product.run_as_suits());
        c
    };
    [("q_proj", hidden, hidden), ("up_proj", intermediate, hidden), ("down_proj", hidden, intermediate)]
        .map(|(pass, n, k)| matmul::bench::case((layout, dtype), (pass, [tokens, n, k]), |_| roof::COOPERATIVE, run))
        .into()
}

const fn op(
    name: &'static str,
    check: fn(&Gpu, usize) -> Result<Vec<Comparison>>,
    cost: fn(usize) -> Cost,
    cases: fn(&Shapes) -> Vec<Case>,
) -> Op {
    Op { name, check, cost, cases }
}

pub const NT: Op = op(
    "cooperative.nt",
    |gpu, n| check(Layout::Nt, Dtype::F32, gpu, n),
    |n| matmul::cost(Dtype::F32, n),
    |shapes| cases(Layout::Nt, Dtype::F32, shapes),
);
pub const NN: Op = op(
    "cooperative.nn",
    |gpu, n| check(Layout::Nn, Dtype::F32, gpu, n),
    |n| matmul::cost(Dtype::F32, n),
    |shapes| cases(Layout::Nn, Dtype::F32, shapes),
);
pub const TN: Op = op(
    "cooperative.tn",
    |gpu, n| check(Layout::Tn, Dtype::F32, gpu, n),
    |n| matmul::cost(Dtype::F32, n),
    |shapes| cases(Layout::Tn, Dtype::F32, shapes),
);
pub const NT_F16: Op = op(
    "cooperative.nt_f16",
    |gpu, n| check(Layout::Nt, Dtype::F16, gpu, n),
    |n| matmul::cost(Dtype::F16, n),
    |shapes| cases(Layout::Nt, Dtype::F16, shapes),
);
pub const NT_BF16: Op = op(
    "cooperative.nt_bf16",
    |gpu, n| check(Layout::Nt, Dtype::Bf16, gpu, n),
    |n| matmul::cost(Dtype::Bf16, n),
    |shapes| cases(Layout::Nt, Dtype::Bf16, shapes),
);
pub const NN_BF16: Op = op(
    "cooperative.nn_bf16",
    |gpu, n| check(Layout::Nn, Dtype::Bf16, gpu, n),
    |n| matmul::cost(Dtype::Bf16, n),
    |shapes| cases(Layout::Nn, Dtype::Bf16, shapes),
);
pub const NN_F16: Op = op(
    "cooperative.nn_f16",
    |gpu, n| check(Layout::Nn, Dtype::F16, gpu, n),
    |n| matmul::cost(Dtype::F16, n),
    |shapes| cases(Layout::Nn, Dtype::F16, shapes),
);
