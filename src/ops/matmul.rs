//! C = alpha * op(A) op(B) + bias (+ C): the product behind every linear layer, forward and backward.
//!
//! | layout | A | B | use |
//! |---|---|---|---|
//! | NT | [M, K] | [N, K] | Y = X W^T, `torch.nn.functional.linear` |
//! | NN | [M, K] | [K, N] | dX = dY W |
//! | TN | [K, M] | [K, N] | dW = dY^T X |
//!
//! B may be a weight in 16 bits in NT and NN; kernels widen what they load of it. Weights in four bits have kernels of
//! their own (`nf4_matmul.rs`).
//!
//! Which kernel runs is chosen per adapter and shape (`ways.rs`): GPUs stage tiles of both operands in workgroup memory,
//! host processors hand rows of A from lane to lane or stage them (`host.rs`), and a few rows of A go to a kernel that reads
//! W once. Few tiles with much to sum are split (`split.rs`).

pub(super) mod bench;
mod host;
mod joint;
pub(super) mod split;
pub(super) mod ways;

use ways::Way;

pub use joint::{JOINT, gated, joint};

use super::{Case, Comparison, Cost, Op, Random, Shapes, cooperative, nf4_matmul, testing::wide};
use crate::{
    error::Result,
    gpu::Gpu,
    tensor::{ALIGNMENT, Dtype, Rounding, Tensor},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    Nt,
    Nn,
    Tn,
}

/// What happens to a product on its way.
#[derive(Clone, Copy, Default)]
pub struct Epilogue<'a> {
    /// Scales the product; `None` is 1.
    pub alpha: Option<f32>,
    /// [N], added to every row.
    pub bias: Option<&'a Tensor>,
    /// Add to what C holds.
    pub accumulate: bool,
    /// On its way in: operands may be rounded where that is faster (`cooperative.rs`), as beside a weight that says
    /// so by itself ([`Tensor::rounding`]).
    pub rounding: Option<Rounding>,
    /// The largest sizes in A, where several products share it ([`cooperative::largest_in`]).
    pub largest: Option<&'a Tensor>,
    /// What is added to it: where that can be done on the way, C is not read and written again for it.
    pub second: Option<Second<'a>>,
}

/// A second product of the same layout beside the first one, with the type f32: `alpha op(A) op(B)`.
#[derive(Clone, Copy)]
pub struct Second<'a> {
    pub a: &'a Tensor,
    pub b: &'a Tensor,
    pub alpha: f32,
}

impl<'a> Second<'a> {
    /// How it is added to C by itself.
    fn epilogue(self, rounding: Option<Rounding>) -> Epilogue<'a> {
        Epilogue { alpha: Some(self.alpha), accumulate: true, rounding, ..Default::default() }
    }

    pub(super) fn flops(self, c: &Tensor) -> u64 {
        2 * (c.len() * self.a.cols()) as u64
    }

    /// Adds it to C.
    pub(super) fn add_to(self, layout: Layout, c: &Tensor, rounding: Option<Rounding>) {
        product_into(layout, self.a, self.b, c, self.epilogue(rounding));
    }
}

/// `op(A) op(B)` in a new tensor [M, N].
pub fn product(layout: Layout, a: &Tensor, b: &Tensor) -> Tensor {
    product_with(layout, a, b, Epilogue::default())
}

/// As [`product`], with an epilogue that does not accumulate.
pub fn product_with(layout: Layout, a: &Tensor, b: &Tensor, epilogue: Epilogue<'_>) -> Tensor {
    let (m, n, _) = sizes(layout, a, b);
    let c = Tensor::empty(a.gpu(), &[m, n]);
    product_into(layout, a, b, &c, Epilogue { accumulate: false, ..epilogue });
    c
}

/// M, N, K.
pub(super) fn sizes(layout: Layout, a: &Tensor, b: &Tensor) -> (usize, usize, usize) {
    let (m, k) = if layout == Layout::Tn { (a.cols(), a.rows()) } else { (a.rows(), a.cols()) };
    let (n, bk) = if layout == Layout::Nt { (b.rows(), b.cols()) } else { (b.cols(), b.rows()) };
    assert_eq!(k, bk, "{layout:?} product of {a:?} and {b:?}");
    (m, n, k)
}

/// Writes (or adds) the product into C [M, N].
pub fn product_into(layout: Layout, a: &Tensor, b: &Tensor, c: &Tensor, epilogue: Epilogue<'_>) {
    let (m, n, k) = sizes(layout, a, b);
    assert_eq!((c.rows(), c.cols()), (m, n), "{layout:?} product of {a:?} and {b:?} into {c:?}");
    a.gpu().add_flops(2 * (m * n * k) as u64);
    if b.dtype().is_quantized() {
        return nf4_matmul::product_into(layout, a, b, c, epilogue);
    }
    let packed = b.dtype().is_packed() && layout != Layout::Tn;
    assert!(packed || b.dtype() == Dtype::F32, "{layout:?} product of {a:?} and {b:?}: B's type");
    assert!(a.dtype() == Dtype::F32 && c.dtype() == Dtype::F32, "{layout:?} product of {a:?} and {b:?} into {c:?}");
    if m == 0 || n == 0 {
        return;
    }
    if let Some(second) = epilogue.second {
        a.gpu().add_flops(second.flops(c));
    }
    Call::new(layout, a, b, c, epilogue).run_as_chosen(Region { m: (0, m), n: (0, n), k: (0, k) });
}

/// The part of a product that the rows of B from `first` on have in it, which are all of `b`: NT columns of C, an NN
/// summand of C that is added to the parts before it.
pub(super) fn product_of_rows(
    layout: Layout,
    a: &Tensor,
    b: &Tensor,
    first: usize,
    c: &Tensor,
    epilogue: Epilogue<'_>,
) {
    let rows = (first, first + b.rows());
    let (n, k) = match layout {
        Layout::Nt => (rows, (0, b.cols())),
        Layout::Nn | Layout::Tn => ((0, b.cols()), rows),
    };
    let call = Call { b_first: first, ..Call::new(layout, a, b, c, epilogue) };
    call.run_as_chosen(Region { m: (0, c.rows()), n, k });
}

/// A block of the product: half-open ranges of M, N, K.
#[derive(Clone, Copy)]
struct Region {
    m: (usize, usize),
    n: (usize, usize),
    k: (usize, usize),
}

#[derive(Clone, Copy)]
struct Call<'a> {
    layout: Layout,
    a: &'a Tensor,
    b: &'a Tensor,
    /// Where B is a part of the whole: its first row there, as regions count them.
    b_first: usize,
    c: &'a Tensor,
    epilogue: Epilogue<'a>,
    rounding: Option<Rounding>,
    /// The way to go wherever it serves; else what the rule says.
    way: Option<Way>,
}

impl Region {
    fn cut_m(self, [first, second]: [(usize, usize); 2]) -> [Self; 2] {
        [Self { m: first, ..self }, Self { m: second, ..self }]
    }

    fn cut_n(self, [first, second]: [(usize, usize); 2]) -> [Self; 2] {
        [Self { n: first, ..self }, Self { n: second, ..self }]
    }

    fn cut_k(self, [first, second]: [(usize, usize); 2]) -> [Self; 2] {
        [Self { k: first, ..self }, Self { k: second, ..self }]
    }
}

fn length((from, to): (usize, usize)) -> usize {
    to - from
}

/// Halves a range at a multiple of 64, so that the second half can be bound.
fn halved((from, to): (usize, usize)) -> [(usize, usize); 2] {
    let middle = from + ((to - from) / 2).next_multiple_of(ALIGNMENT).min(to - from);
    [(from, middle), (middle, to)]
}

impl<'a> Call<'a> {
    fn new(layout: Layout, a: &'a Tensor, b: &'a Tensor, c: &'a Tensor, epilogue: Epilogue<'a>) -> Self {
        let rounding = epilogue.rounding.or_else(|| b.rounding());
        Self { layout, a, b, b_first: 0, c, epilogue, rounding, way: None }
    }

    /// Runs a region, cut until each operand's rows can be bound. A cut along K adds its second half to the first.
    fn run(&self, region: Region) {
        let (way, most) = (self.way(region), self.c.gpu().max_binding());
        let bytes = |rows, tensor: &Tensor| (length(rows) * tensor.cols() * tensor.dtype().bytes()) as u64;
        let (a_rows, b_rows) = self.operand_rows(region);
        let cut = if bytes(region.m, self.c) > most && length(region.m) > 64 {
            region.cut_m(halved(region.m))
        } else if bytes(a_rows, self.a) > most && length(a_rows) > 64 {
            if self.layout == Layout::Tn { region.cut_k(halved(a_rows)) } else { region.cut_m(halved(a_rows)) }
        } else if way == Way::Lanes {
            return self.by_lanes(region);
        } else if bytes(b_rows, self.b) > most && length(b_rows) > 64 {
            if self.layout == Layout::Nt { region.cut_n(halved(b_rows)) } else { region.cut_k(halved(b_rows)) }
        } else {
            return self.launch(region, way);
        };
        cut.into_iter().for_each(|part| self.run(part));
    }

    /// The ranges of A's and B's rows that a region needs.
    fn operand_rows(&self, region: Region) -> ((usize, usize), (usize, usize)) {
        (
            if self.layout == Layout::Tn { region.k } else { region.m },
            if self.layout == Layout::Nt { region.n } else { region.k },
        )
    }

    fn launch(&self, region: Region, way: Way) {
        let Self { layout, a, b, b_first, c, epilogue, .. } = *self;
        let (m, n, k) = (length(region.m), length(region.n), length(region.k));
        // Row ranges are bound; column ranges are offsets inside the binding.
        let (a_rows, b_rows) = self.operand_rows(region);
        let a_col = if layout == Layout::Tn { region.m.0 } else { region.k.0 };
        let b_col = if layout == Layout::Nt { region.k.0 } else { region.n.0 };
        let first = region.k.0 == 0;
        let bias = epilogue.bias.filter(|_| first);
        let a_binding = a.range(a_rows.0 * a.cols(), length(a_rows) * a.cols());
        let (b_start, b_count) = ((b_rows.0 - b_first) * b.cols(), length(b_rows) * b.cols());
        let (b_binding, b_before) =
            if b.dtype().is_packed() { b.packed_range(b_start, b_count) } else { (b.range(b_start, b_count), 0) };
        let c_binding = c.range(region.m.0 * c.cols(), m * c.cols());
        let bias_binding = bias.map_or(a_binding, |bias| bias.range(region.n.0, n));
        let params = [
            m as u32,
            n as u32,
            k as u32,
            a.cols() as u32,
            b.cols() as u32,
            c.cols() as u32,
            a_col as u32,
            (b_before + b_col) as u32,
            region.n.0 as u32,
            u32::from(bias.is_some()) | u32::from(epilogue.accumulate || !first) << 1,
            epilogue.alpha.unwrap_or(1.0).to_bits(),
            0,
            host::STAGED_DEPTH as u32,
        ];
        let bindings = [a_binding, b_binding, bias_binding, c_binding];
        if let Way::Cooperative { large } = way {
            let (gpu, b, largest) = (c.gpu(), b.dtype(), epilogue.largest);
            let rounding = self.rounding.unwrap_or(Rounding::Scaled);
            let second = epilogue.second.filter(|_| first).map(|second| self.bind_second(second, region));
            let product = cooperative::Product { gpu, layout, b, bindings, params: &params, rounding, largest, second };
            if !product.run(large) {
                self.add_second(region);
            }
            return;
        }
        let (kernel, groups) = self.kernel(way, region);
        match way {
            // Of 256 threads, or of 64.
            Way::Tiles(128) => split::launch(c.gpu(), &kernel, &bindings, &params, groups),
            Way::Tiles(_) => split::launch_until(4 * split::ENOUGH, c.gpu(), &kernel, &bindings, &params, groups),
            _ => c.gpu().dispatch(&kernel, &bindings, &params, groups),
        }
    }

    /// The second product's part in a region.
    fn bind_second(&self, Second { a, b, alpha }: Second<'a>, region: Region) -> cooperative::SecondPair<'a> {
        let (k, m, n) = (a.cols(), length(region.m), length(region.n));
        let (b, offset) = match self.layout {
            Layout::Nt => (b.range(region.n.0 * k, n * k), 0),
            Layout::Nn | Layout::Tn => (b.binding(), region.n.0),
        };
        let ldb = if self.layout == Layout::Nt { k } else { self.c.cols() };
        cooperative::SecondPair { a: a.range(region.m.0 * k, m * k), b, k, ldb, b_offset: offset, alpha }
    }

    /// Adds what has not been added on the way.
    fn add_second(&self, region: Region) {
        if let Some(second) = self.epilogue.second.filter(|_| region.k.0 == 0) {
            let region = Region { k: (0, second.a.cols()), ..region };
            Call::new(self.layout, second.a, second.b, self.c, second.epilogue(self.rounding)).run_as_chosen(region);
        }
    }
}

/// A kernel's name by B's type: f32, bf16, f16.
fn typed(dtype: Dtype, [f32, bf16, f16]: [&'static str; 3]) -> &'static str {
    match dtype {
        Dtype::Bf16 => bf16,
        Dtype::F16 => f16,
        Dtype::F32 | Dtype::U32 | Dtype::Quantized(_) => f32,
    }
}

/// The same product on the host, in f64.
pub fn reference(layout: Layout, a: &[f64], b: &[f64], [m, n, k]: [usize; 3]) -> Vec<f64> {
    let mut c = vec![0.0; m * n];
    for i in 0..m {
        for l in 0..k {
            let x = if layout == Layout::Tn { a[l * m + i] } else { a[i * k + l] };
            for j in 0..n {
                c[i * n + j] += x * if layout == Layout::Nt { b[j * k + l] } else { b[l * n + j] };
            }
        }
    }
    c
}

/// One element of the same, of operands whose elements are told by their places.
pub(super) fn reference_at(
    layout: Layout,
    [a, b]: [&dyn Fn(usize) -> f64; 2],
    [m, n, k]: [usize; 3],
    [row, column]: [usize; 2],
) -> f64 {
    let of_a = |l| a(if layout == Layout::Tn { l * m + row } else { row * k + l });
    let of_b = |l| b(if layout == Layout::Nt { column * k + l } else { l * n + column });
    (0..k).map(|l| of_a(l) * of_b(l)).sum()
}

/// Products with longer sides are checked in the chosen way alone, where they are not of whole vectors.
const EACH_WAY: usize = 80;
const EACH_WAY_OF_VECTORS: usize = 280;

fn check(layout: Layout, dtype: Dtype, gpu: &Gpu, n: usize) -> Result<Vec<Comparison>> {
    let mut out = Vec::new();
    // Square, a few rows, a narrow result; sides that fill whole vectors, all or some, one row and a few; and each side
    // longer than a block.
    let (even, long) = (n.next_multiple_of(8), n + 2051);
    let short = [[n, n + 2, n + 1], [3, n, n], [n, 8, n], [1, n, n]];
    let vectors = [[even, even + 4, even + 12], [even, n, even], [even, even, n], [1, n, even], [3, even, even]];
    let longer = [[long, 34, n], [34, long, n], [34, n, long], [36, even, even + 2056]];
    for [m, n, k] in short.into_iter().chain(vectors).chain(longer) {
        let mut random = Random::new((m * 31 + n * 7 + k) as u64);
        let mut a = random.values(m * k);
        // What kernels that may round have nothing to round of: those have checks of their own.
        if dtype.is_packed() && cooperative::serves(gpu) {
            a = cooperative::rounded(&a, 1.0).into_iter().map(|x| x as f32).collect();
        }
        let ta = Tensor::from_f32(gpu, &a, &if layout == Layout::Tn { [k, m] } else { [m, k] });
        let b = dtype.narrow(&random.values(n * k));
        let tb = Tensor::from_bytes(gpu, dtype, &b, &if layout == Layout::Nt { [n, k] } else { [k, n] });
        let b = dtype.widen(&b);
        let (bias, tbias) = random.tensor(gpu, &[n]);
        let first = Epilogue { alpha: Some(0.5), bias: Some(&tbias), ..Default::default() };
        let second = Epilogue { alpha: Some(0.25), accumulate: true, ..Default::default() };
        let plain = reference(layout, &wide(&a), &wide(&b), [m, n, k]);
        let want: Vec<f64> = plain.iter().enumerate().map(|(at, x)| 0.75 * x + f64::from(bias[at % n])).collect();
        // As chosen; and of small ones, every way that there is.
        let c = Tensor::empty(gpu, &[m, n]);
        let call = |epilogue| Call::new(layout, &ta, &tb, &c, epilogue);
        let most = if [m, n, k].iter().all(|x| x % 4 == 0) { EACH_WAY_OF_VECTORS } else { EACH_WAY };
        let ways = if m.max(n).max(k) <= most { call(first).ways() } else { Vec::new() };
        for way in [None].into_iter().chain(ways.into_iter().map(Some)) {
            for epilogue in [first, second] {
                match way {
                    None => product_into(layout, &ta, &tb, &c, epilogue),
                    way => Call { way, ..call(epilogue) }.run(call(epilogue).whole()),
                }
            }
            let what = way.map_or("alpha A B + bias, then + alpha A B", Way::name);
            out.push(Comparison::new(what, c.to_vec()?, want.clone(), 2e-6 * (k as f64).sqrt().max(2.0)));
        }
    }
    Ok(out)
}

/// Of the first product of a check, with B of a type.
pub(super) fn cost(dtype: Dtype, n: usize) -> Cost {
    let [m, n, k] = [n, n + 2, n + 1];
    Cost { flops: (2 * m * n * k) as u64, bytes: (4 * (m * k + m * n) + dtype.bytes() * n * k) as u64 }
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
    "matmul.nt",
    |gpu, n| check(Layout::Nt, Dtype::F32, gpu, n),
    |n| cost(Dtype::F32, n),
    |s| bench::cases(Layout::Nt, Dtype::F32, s),
);
pub const NN: Op = op(
    "matmul.nn",
    |gpu, n| check(Layout::Nn, Dtype::F32, gpu, n),
    |n| cost(Dtype::F32, n),
    |s| bench::cases(Layout::Nn, Dtype::F32, s),
);
pub const TN: Op = op(
    "matmul.tn",
    |gpu, n| check(Layout::Tn, Dtype::F32, gpu, n),
    |n| cost(Dtype::F32, n),
    |s| bench::cases(Layout::Tn, Dtype::F32, s),
);
pub const NT_BF16: Op = op(
    "matmul.nt_bf16",
    |gpu, n| check(Layout::Nt, Dtype::Bf16, gpu, n),
    |n| cost(Dtype::Bf16, n),
    |s| bench::cases(Layout::Nt, Dtype::Bf16, s),
);
pub const NT_F16: Op = op(
    "matmul.nt_f16",
    |gpu, n| check(Layout::Nt, Dtype::F16, gpu, n),
    |n| cost(Dtype::F16, n),
    |s| bench::cases(Layout::Nt, Dtype::F16, s),
);
pub const NN_BF16: Op = op(
    "matmul.nn_bf16",
    |gpu, n| check(Layout::Nn, Dtype::Bf16, gpu, n),
    |n| cost(Dtype::Bf16, n),
    |s| bench::cases(Layout::Nn, Dtype::Bf16, s),
);
pub const NN_F16: Op = op(
    "matmul.nn_f16",
    |gpu, n| check(Layout::Nn, Dtype::F16, gpu, n),
    |n| cost(Dtype::F16, n),
    |s| bench::cases(Layout::Nn, Dtype::F16, s),
);
