//! C = alpha * op(A) op(B) + bias (+ C): the product behind every linear layer, forward and backward.
//!
//! | layout | A | B | use |
//! |---|---|---|---|
//! | NT | [M, K] | [N, K] | Y = X W^T, `torch.nn.functional.linear` |
//! | NN | [M, K] | [K, N] | dX = dY W |
//! | TN | [K, M] | [K, N] | dW = dY^T X |
//!
//! B may be a weight in 16 bits in NT and NN: GPUs widen it on its way to workgroup memory, host processors into f32
//! scratch of bounded size first (`widened`), unless few rows of A make W's bytes the cost.
//!
//! Which kernel runs is chosen per adapter and shape: GPUs stage tiles in workgroup memory, host processors want
//! their operands as uniforms (`by_uniforms`), and a few rows of A go to a kernel that reads W once.

use super::{Comparison, Cost, Op, Random, cast::cast_into, testing::wide, uniform_rows};
use crate::{
    error::Result,
    gpu::Gpu,
    tensor::{ALIGNMENT, Dtype, Tensor},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    Nt,
    Nn,
    Tn,
}

/// What happens to a product on its way out.
#[derive(Clone, Copy, Default)]
pub struct Epilogue<'a> {
    /// Scales the product; `None` is 1.
    pub alpha: Option<f32>,
    /// [N], added to every row.
    pub bias: Option<&'a Tensor>,
    /// Add to what C holds.
    pub accumulate: bool,
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
fn sizes(layout: Layout, a: &Tensor, b: &Tensor) -> (usize, usize, usize) {
    let (m, k) = if layout == Layout::Tn { (a.cols(), a.rows()) } else { (a.rows(), a.cols()) };
    let (n, bk) = if layout == Layout::Nt { (b.rows(), b.cols()) } else { (b.cols(), b.rows()) };
    assert_eq!(k, bk, "{layout:?} product of {a:?} and {b:?}");
    (m, n, k)
}

/// Writes (or adds) the product into C [M, N].
pub fn product_into(layout: Layout, a: &Tensor, b: &Tensor, c: &Tensor, epilogue: Epilogue<'_>) {
    let (m, n, k) = sizes(layout, a, b);
    assert_eq!((c.rows(), c.cols()), (m, n), "{layout:?} product of {a:?} and {b:?} into {c:?}");
    let packed = b.dtype().is_packed() && layout != Layout::Tn;
    assert!(packed || b.dtype() == Dtype::F32, "{layout:?} product of {a:?} and {b:?}: B's type");
    assert!(a.dtype() == Dtype::F32 && c.dtype() == Dtype::F32, "{layout:?} product of {a:?} and {b:?} into {c:?}");
    if m == 0 || n == 0 {
        return;
    }
    let call = Call { layout, a, b, b_first: 0, c, epilogue };
    call.run(Region { m: (0, m), n: (0, n), k: (0, k) });
}

/// A block of the product: half-open ranges of M, N, K.
#[derive(Clone, Copy)]
struct Region {
    m: (usize, usize),
    n: (usize, usize),
    k: (usize, usize),
}

struct Call<'a> {
    layout: Layout,
    a: &'a Tensor,
    b: &'a Tensor,
    /// Which of the product's rows of B is the first of `b`.
    b_first: usize,
    c: &'a Tensor,
    epilogue: Epilogue<'a>,
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

impl Call<'_> {
    /// Runs a region, cut until each operand's rows can be bound. A cut along K adds its second half to the first.
    fn run(&self, region: Region) {
        let gpu = self.c.gpu();
        let most = gpu.max_binding();
        let bytes = |rows, tensor: &Tensor| (length(rows) * tensor.cols() * tensor.dtype().bytes()) as u64;
        let on_host = gpu.is_cpu() && length(region.m) > ROWS_KERNEL_MOST;
        let (a_rows, b_rows) = self.operand_rows(region);
        let cut = if bytes(region.m, self.c) > most && length(region.m) > 64 {
            region.cut_m(halved(region.m))
        } else if bytes(a_rows, self.a) > most && length(a_rows) > 64 {
            if self.layout == Layout::Tn { region.cut_k(halved(a_rows)) } else { region.cut_m(halved(a_rows)) }
        } else if on_host && self.b.dtype().is_packed() {
            return self.widened(region);
        } else if bytes(b_rows, self.b) > most && length(b_rows) > 64 {
            if self.layout == Layout::Nt { region.cut_n(halved(b_rows)) } else { region.cut_k(halved(b_rows)) }
        } else if on_host {
            return self.by_uniforms(region);
        } else {
            return self.launch(region);
        };
        cut.into_iter().for_each(|part| self.run(part));
    }

    /// The ranges of A's and B's rows that a region needs, as rows of the product.
    fn operand_rows(&self, region: Region) -> ((usize, usize), (usize, usize)) {
        (
            if self.layout == Layout::Tn { region.k } else { region.m },
            if self.layout == Layout::Nt { region.n } else { region.k },
        )
    }

    /// Runs a region with B widened to f32, a range of its rows after the other.
    fn widened(&self, region: Region) {
        let cols = self.b.cols();
        let (_, (from, to)) = self.operand_rows(region);
        let most = (SCRATCH_BYTES / (cols.max(1) * 4) / ALIGNMENT * ALIGNMENT).max(ALIGNMENT);
        for first in (from..to).step_by(most) {
            let rows = (first, (first + most).min(to));
            let scratch = Tensor::empty(self.c.gpu(), &[length(rows), cols]);
            cast_into(self.b, (first - self.b_first) * cols, &scratch, 0, scratch.len());
            let part =
                if self.layout == Layout::Nt { Region { n: rows, ..region } } else { Region { k: rows, ..region } };
            Call { b: &scratch, b_first: first, ..*self }.run(part);
        }
    }

    /// Cuts a region until the rows of A and of B are uniforms of 64 KiB at most; rows longer than that, or so long
    /// that few fit, are served by the tiled kernel.
    fn by_uniforms(&self, region: Region) {
        let (fit_a, fit_b) = (uniform_rows(self.a.cols()), uniform_rows(self.b.cols()));
        if fit_a < 8 || fit_b < 8 {
            return self.launch(region);
        }
        let n = length(region.n);
        let whole_rows = region.k.0 == 0 && length(region.k) == self.b.cols();
        if self.layout == Layout::Nt && fit_b < 64 && whole_rows && uniform_rows(n) > fit_b {
            // Too few rows of W fit to fill the lanes: the transposed matrix has shorter rows.
            let transposed = Tensor::empty(self.c.gpu(), &[length(region.k), n]);
            transpose_rows(self.b, region.n.0 - self.b_first, &transposed);
            let window = Window::new(n, usize::MAX);
            for m in parts(region.m, fit_a) {
                for k in parts(region.k, window.most()) {
                    self.launch_uniform(Region { m, n: region.n, k }, Layout::Nn, &transposed, (k.0, 0), window);
                }
            }
            return;
        }
        let (m_most, n_most, window) = match self.layout {
            Layout::Nt => (fit_a, fit_b, Window { rows: usize::MAX, count: 1 }),
            Layout::Nn => (fit_a, usize::MAX, Window::new(self.b.cols(), usize::MAX)),
            Layout::Tn => (usize::MAX, usize::MAX, Window::new(self.a.cols(), self.b.cols())),
        };
        for m in parts(region.m, m_most) {
            for n in parts(region.n, n_most) {
                for k in parts(region.k, window.most()) {
                    let b_row = self.operand_rows(Region { m, n, k }).1.0 - self.b_first;
                    let b_start = (b_row, if self.layout == Layout::Nt { k.0 } else { n.0 });
                    self.launch_uniform(Region { m, n, k }, self.layout, self.b, b_start, window);
                }
            }
        }
    }

    /// One dispatch over a region whose operands fit into uniforms; B's block starts at row and column `b_start`.
    fn launch_uniform(&self, region: Region, layout: Layout, b: &Tensor, b_start: (usize, usize), window: Window) {
        let Self { a, c, epilogue, .. } = *self;
        let (m, n, k) = (length(region.m), length(region.n), length(region.k));
        let (a_row, a_col) = if layout == Layout::Tn { (region.k.0, region.m.0) } else { (region.m.0, region.k.0) };
        let rows = window.rows.min(k.next_multiple_of(4));
        // A window past the end is bound, and not read: the first one serves.
        let at = |w: usize, row: usize| if w * rows < k { row + w * rows } else { row };
        let b_count = if layout == Layout::Nt { 1 } else { WINDOWS };
        let a_count = if layout == Layout::Tn { WINDOWS } else { 1 };
        let b_bindings: Vec<_> = (0..b_count).map(|w| b.uniform(at(w, b_start.0) * b.cols())).collect();
        let a_bindings: Vec<_> = (0..a_count).map(|w| a.uniform(at(w, a_row) * a.cols())).collect();
        let (a_offset, b_offset) = (a_bindings[0].1 + a_col, b_bindings[0].1 + b_start.1);
        let first = region.k.0 == 0;
        let bias = epilogue.bias.filter(|_| first).map(|bias| bias.uniform(region.n.0));
        let (bias_binding, bias_before) = bias.unwrap_or((a_bindings[0].0, 0));

        // vec4 loads need rows that start at, and a fast axis that fills, whole vec4s.
        let fast = if layout == Layout::Tn { m } else { k };
        let mut even = [a.cols(), a_offset, fast].iter().all(|x| x.is_multiple_of(4));
        even &= layout != Layout::Nt || (b.cols().is_multiple_of(4) && b_offset.is_multiple_of(4));
        let wide = n > 48;
        let kernel = match (layout, wide, even) {
            (Layout::Nt, true, true) => "matmul.by_uniform.nt_wide",
            (Layout::Nt, true, false) => "matmul.by_uniform.nt_wide_odd",
            (Layout::Nt, false, true) => "matmul.by_uniform.nt_narrow",
            (Layout::Nt, false, false) => "matmul.by_uniform.nt_narrow_odd",
            (Layout::Nn, true, true) => "matmul.by_uniform.nn_wide",
            (Layout::Nn, true, false) => "matmul.by_uniform.nn_wide_odd",
            (Layout::Nn, false, true) => "matmul.by_uniform.nn_narrow",
            (Layout::Nn, false, false) => "matmul.by_uniform.nn_narrow_odd",
            (Layout::Tn, true, true) => "matmul.by_uniform.tn_wide",
            (Layout::Tn, true, false) => "matmul.by_uniform.tn_wide_odd",
            (Layout::Tn, false, true) => "matmul.by_uniform.tn_narrow",
            (Layout::Tn, false, false) => "matmul.by_uniform.tn_narrow_odd",
        };
        let (c_binding, c_before) = c.range_from(region.m.0 * c.cols(), m * c.cols());
        let params = [
            m as u32,
            n as u32,
            k as u32,
            a.cols() as u32,
            b.cols() as u32,
            c.cols() as u32,
            a_offset as u32,
            b_offset as u32,
            (c_before + region.n.0) as u32,
            u32::from(bias.is_some()) | u32::from(epilogue.accumulate || !first) << 1,
            epilogue.alpha.unwrap_or(1.0).to_bits(),
            bias_before as u32,
            rows as u32,
        ];
        let groups = [n.div_ceil(if wide { 128 } else { 32 }) as u32, m.div_ceil(8) as u32, 1];
        let operands = b_bindings.iter().chain(&a_bindings).map(|(binding, _)| *binding);
        let bindings: Vec<_> = [c_binding, bias_binding].into_iter().chain(operands).collect();
        c.gpu().dispatch(kernel, &bindings, &params, groups);
    }

    fn launch(&self, region: Region) {
        let Self { layout, a, b, c, epilogue, .. } = *self;
        let (m, n, k) = (length(region.m), length(region.n), length(region.k));
        // Row ranges are bound; column ranges are offsets inside the binding.
        let (a_rows, b_rows) = self.operand_rows(region);
        let a_col = if layout == Layout::Tn { region.m.0 } else { region.k.0 };
        let b_col = if layout == Layout::Nt { region.k.0 } else { region.n.0 };
        let first = region.k.0 == 0;
        let bias = epilogue.bias.filter(|_| first);
        let a_binding = a.range(a_rows.0 * a.cols(), length(a_rows) * a.cols());
        let (b_start, b_count) = ((b_rows.0 - self.b_first) * b.cols(), length(b_rows) * b.cols());
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
            0,
        ];
        let (kernel, groups) = choose(c.gpu(), layout, b.dtype(), m, n);
        c.gpu().dispatch(kernel, &[a_binding, b_binding, bias_binding, c_binding], &params, groups);
    }
}

/// Up to this many rows of A, W is read once by `matmul.rows`.
const ROWS_KERNEL_MOST: usize = 4;

/// The most f32 scratch that a packed B is widened to at once, unless 64 of its rows take more.
const SCRATCH_BYTES: usize = 32 << 20;

/// Uniforms over K in one dispatch of the NN and TN kernels (WINDOWS in shaders/variants).
const WINDOWS: usize = 4;

/// How K is spread over uniforms: `count` windows of `rows` rows each.
#[derive(Clone, Copy)]
struct Window {
    rows: usize,
    count: usize,
}

impl Window {
    /// For operands whose rows have `cols` (and `other`, or `usize::MAX` for none) elements. Several windows need
    /// starts that are aligned alike; where rows are odd there is one.
    fn new(cols: usize, other: usize) -> Self {
        let widest = if other == usize::MAX { cols } else { cols.max(other) };
        let rows = uniform_rows(widest);
        let aligned = |rows: usize| {
            (rows * cols).is_multiple_of(ALIGNMENT) && (other == usize::MAX || (rows * other).is_multiple_of(ALIGNMENT))
        };
        let even = (1..=rows / 8).rev().map(|eighth| eighth * 8).find(|&rows| aligned(rows));
        even.map_or(Self { rows, count: 1 }, |rows| Self { rows, count: WINDOWS })
    }

    /// Rows of K in one dispatch.
    fn most(self) -> usize {
        self.rows.saturating_mul(self.count)
    }
}

/// A range in equal parts of at most `most`, cut at multiples of 16: two threads then have as many workgroups each.
fn parts((from, to): (usize, usize), most: usize) -> impl Iterator<Item = (usize, usize)> {
    let grain = if most >= 16 { 16 } else { 8 };
    let most = if most >= grain { most / grain * grain } else { most.max(1) };
    let count = (to - from).div_ceil(most).max(1);
    let step = (to - from).div_ceil(count).next_multiple_of(grain).min(most).max(1);
    (from..to).step_by(step).map(move |start| (start, (start + step).min(to)))
}

/// Writes rows of `from` [.., K], starting at `first`, as the columns of `to` [K, N].
fn transpose_rows(from: &Tensor, first: usize, to: &Tensor) {
    let (k, n) = (to.rows(), to.cols());
    let (source, before) = from.range_from(first * k, n * k);
    let params = [n as u32, k as u32, 0, k as u32, 0, n as u32, before as u32, 0, 0, 0, 0, 0, 0];
    let groups = [n.div_ceil(16) as u32, k.div_ceil(16) as u32, 1];
    to.gpu().dispatch("matmul.transpose", &[source, to.binding()], &params, groups);
}

/// The kernel and its workgroups for a product on bound storage.
fn choose(gpu: &Gpu, layout: Layout, b: Dtype, m: usize, n: usize) -> (&'static str, [u32; 3]) {
    // Names by B's type: f32, bf16, f16.
    let typed = |[f32, bf16, f16]: [&'static str; 3]| match b {
        Dtype::Bf16 => bf16,
        Dtype::F16 => f16,
        _ => f32,
    };
    if layout == Layout::Nt && m <= ROWS_KERNEL_MOST {
        let kernel = if gpu.is_cpu() {
            ["matmul.rows.nt_cpu", "matmul.rows.nt_cpu_bf16", "matmul.rows.nt_cpu_f16"]
        } else {
            ["matmul.rows.nt", "matmul.rows.nt_bf16", "matmul.rows.nt_f16"]
        };
        return (typed(kernel), [n.min(32_768) as u32, 1, n.div_ceil(32_768) as u32]);
    }
    let small = m <= 32 || n <= 32 || m.div_ceil(64) * n.div_ceil(64) < 32;
    let kernel = match (layout, small) {
        (Layout::Nt, false) => typed(["matmul.tiled.nt", "matmul.tiled.nt_bf16", "matmul.tiled.nt_f16"]),
        (Layout::Nn, false) => typed(["matmul.tiled.nn", "matmul.tiled.nn_bf16", "matmul.tiled.nn_f16"]),
        (Layout::Tn, false) => "matmul.tiled.tn",
        (Layout::Nt, true) => {
            typed(["matmul.tiled.nt_small", "matmul.tiled.nt_small_bf16", "matmul.tiled.nt_small_f16"])
        }
        (Layout::Nn, true) => {
            typed(["matmul.tiled.nn_small", "matmul.tiled.nn_small_bf16", "matmul.tiled.nn_small_f16"])
        }
        (Layout::Tn, true) => "matmul.tiled.tn_small",
    };
    let side = if small { 32 } else { 64 };
    (kernel, [n.div_ceil(side) as u32, m.div_ceil(side) as u32, 1])
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

fn check(layout: Layout, dtype: Dtype, gpu: &Gpu, n: usize) -> Result<Vec<Comparison>> {
    let mut out = Vec::new();
    // Square, a few rows, a narrow result, and sides that fill whole vec4s.
    for [m, n, k] in [[n, n + 2, n + 1], [3, n, n], [n, 8, n], [n.next_multiple_of(4), n, n.next_multiple_of(4)]] {
        let mut random = Random::new((m * 31 + n * 7 + k) as u64);
        let (a, ta) = random.tensor(gpu, &if layout == Layout::Tn { [k, m] } else { [m, k] });
        let b = dtype.narrow(&random.values(n * k));
        let tb = Tensor::from_bytes(gpu, dtype, &b, &if layout == Layout::Nt { [n, k] } else { [k, n] });
        let b = dtype.widen(&b);
        let (bias, tbias) = random.tensor(gpu, &[n]);
        let c = product_with(layout, &ta, &tb, Epilogue { alpha: Some(0.5), bias: Some(&tbias), accumulate: false });
        product_into(layout, &ta, &tb, &c, Epilogue { alpha: Some(0.25), bias: None, accumulate: true });
        let plain = reference(layout, &wide(&a), &wide(&b), [m, n, k]);
        let want = plain.iter().enumerate().map(|(at, x)| 0.75 * x + f64::from(bias[at % n])).collect();
        out.push(Comparison::new(
            "alpha A B + bias, then + alpha A B",
            c.to_vec()?,
            want,
            2e-6 * (k as f64).sqrt().max(2.0),
        ));
    }
    Ok(out)
}

fn cost(n: usize) -> Cost {
    let [m, n, k] = [n, n + 2, n + 1].map(|x| x as u64);
    Cost { flops: 2 * m * n * k, bytes: 4 * (m * k + n * k + m * n) }
}

/// Less B's bytes than [`cost`].
fn packed_cost(n: usize) -> Cost {
    let Cost { flops, bytes } = cost(n);
    Cost { flops, bytes: bytes - 2 * ((n + 2) * (n + 1)) as u64 }
}

const fn op(name: &'static str, check: fn(&Gpu, usize) -> Result<Vec<Comparison>>, cost: fn(usize) -> Cost) -> Op {
    Op { name, check, cost }
}

pub const NT: Op = op("matmul.nt", |gpu, n| check(Layout::Nt, Dtype::F32, gpu, n), cost);
pub const NN: Op = op("matmul.nn", |gpu, n| check(Layout::Nn, Dtype::F32, gpu, n), cost);
pub const TN: Op = op("matmul.tn", |gpu, n| check(Layout::Tn, Dtype::F32, gpu, n), cost);
pub const NT_BF16: Op = op("matmul.nt_bf16", |gpu, n| check(Layout::Nt, Dtype::Bf16, gpu, n), packed_cost);
pub const NT_F16: Op = op("matmul.nt_f16", |gpu, n| check(Layout::Nt, Dtype::F16, gpu, n), packed_cost);
pub const NN_BF16: Op = op("matmul.nn_bf16", |gpu, n| check(Layout::Nn, Dtype::Bf16, gpu, n), packed_cost);
pub const NN_F16: Op = op("matmul.nn_f16", |gpu, n| check(Layout::Nn, Dtype::F16, gpu, n), packed_cost);
