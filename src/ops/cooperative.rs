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

mod check;

pub(super) use check::{rounded, scale_of, scale_to};

use check::{cases, check};

use super::{
    Case, Comparison, Cost, Op, Shapes, has_workgroups,
    matmul::{self, Layout, split},
    roof,
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
    /// Matrices are loaded from arrays of scalars, as Metal does; without these its compiler refuses the text.
    scalar: bool,
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

/// Whether a device's matrices are loaded from arrays of scalars only, as Metal's.
pub(super) fn loads_scalars(gpu: &Gpu) -> bool {
    gpu.facts().backend == "metal"
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
        Kernel { side, lanes, large, vectors, adapted, scales_b: self.scales_b(), scalar: loads_scalars(self.gpu) }
    }

    /// Whether the text for so many lanes can run: these are what the device has, C has a whole tile, and the sum a step.
    fn exact(&self, side: u32, large: bool) -> bool {
        let (limits, [m, n, k]) = (&self.gpu.facts().limits, self.sizes());
        let lanes = [limits.subgroup_min_size, limits.subgroup_max_size];
        !loads_scalars(self.gpu)
            && self.vectors()
            && lanes == [exact_lanes(side); 2]
            && m.min(n) >= tile(large)
            && k >= DEPTH
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
        // What is not read is bound all the same.
        let [a, b, bias, c] = bindings;
        let [of_a, parts] = [&of_a, &of_rest].map(|largest| largest.as_ref().map_or(a, Tensor::binding));
        let mut bindings = vec![a, b, bias, c, of_a, parts];
        let mut params: Vec<u32> = params[..13].to_vec();
        params[FLAGS] |= if scales_a { SCALE } else { 0 };
        for (index, one) in rest.into_iter().enumerate() {
            if let (Some((elements, count)), Some(parts)) = (one, &of_rest) {
                largest_into(gpu, elements, count, parts.range(index * PARTS, PARTS));
                params[FLAGS] |= SCALE << (1 + index);
            }
        }
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
        let scalar = part(self.scalar, "_scalar");
        format!("cooperative.product.{operands}_{}{large}{lanes}{odd}{scalar}", self.side)
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
                let scales_b = product.scales_b();
                let one = Self { side, lanes, large, vectors, adapted: false, scales_b, scalar: false };
                all.push(one);
                all.extend(
                    (lanes == Lanes::Exact && product.adapted(side, large)).then_some(Self { adapted: true, ..one }),
                );
                let odd = vectors && !in_vectors_alone && !large && matches!(lanes, Lanes::Any | Lanes::Wide);
                all.extend(odd.then_some(Self { vectors: false, ..one }));
            }
        }
        let of_scalars = |one: &Self| (side == 8 && one.lanes == Lanes::Any).then_some(Self { scalar: true, ..*one });
        let of_scalars: Vec<Self> = all.iter().filter_map(of_scalars).collect();
        if loads_scalars(gpu) {
            return of_scalars;
        }
        all.extend(of_scalars);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        gpu::{AdapterFacts, Cooperative},
        ops::matmul::Epilogue,
    };

    /// What a device launches for 16-bit products of many shapes.
    fn products(facts: AdapterFacts) -> Vec<String> {
        let gpu = Gpu::counting(AdapterFacts { cooperative: vec![Cooperative { side: 8, operands: "f16" }], ..facts });
        for [m, n, k] in [[256, 256, 64], [256, 256, 2048], [64, 65, 66], [8, 8, 8], [100, 132, 36]] {
            for (layout, dtype) in [Layout::Nt, Layout::Nn]
                .into_iter()
                .flat_map(|layout| [Dtype::F32, Dtype::F16, Dtype::Bf16].map(|dtype| (layout, dtype)))
                .chain([(Layout::Tn, Dtype::F32)])
            {
                let [a, b] = match layout {
                    Layout::Nt => [[m, k], [n, k]],
                    Layout::Nn => [[m, k], [k, n]],
                    Layout::Tn => [[k, m], [k, n]],
                };
                let (a, b) = (Tensor::empty(&gpu, &a), Tensor::empty_of(&gpu, dtype, &b));
                let c = Tensor::empty(&gpu, &[m, n]);
                let epilogue = Epilogue { rounding: Some(Rounding::Half), ..Default::default() };
                matmul::product_into(layout, &a, &b, &c, epilogue);
            }
        }
        let launches = gpu.launches();
        launches.names().filter(|name| name.starts_with("cooperative.product")).map(str::to_owned).collect()
    }

    #[test]
    fn metal_loads_matrices_from_scalars() {
        let usual = AdapterFacts::of_a_usual_gpu();
        let elsewhere = products(usual.clone());
        assert!(elsewhere.len() > 7 && elsewhere.iter().all(|name| !name.ends_with("_scalar")), "{elsewhere:?}");
        let metal = products(AdapterFacts { backend: "metal".to_owned(), ..usual });
        assert!(metal.len() >= 7 && metal.iter().all(|name| name.ends_with("_scalar")), "{metal:?}");
    }
}
