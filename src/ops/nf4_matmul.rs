//! Products with a weight W [N, K] in four bits: Y = X W^T (NT) and dX = dY W (NN) from the same codes. bitsandbytes:
//! `matmul_4bit`.
//!
//! Two ways. *Fused*: the product's kernel decodes what it loads of W. *By scratch*: W is dequantised, a part at a time,
//! and the dense product runs on that. The first reads an eighth of the bytes, but decodes W again for every few rows of
//! the left side; the second decodes once, and writes and reads W in f32.
//!
//! Where rows of W are no whole words (K is no multiple of 8), only the second one serves.
//!
//! A run in f16 or bf16 has the scratch in f16, where the device has cooperative matrices: the dense product then runs on those.

use super::{
    Case, Comparison, Cost, Op, Random, Shapes,
    case::floats,
    cooperative,
    matmul::{self, Epilogue, Layout},
    nf4::{self, ALIGNED, awkward, kind_of, of},
    roof,
    testing::wide,
    tuning::{Family, Trial, exact, exact_value, operand_sets, positions},
    uniform_rows,
};
use crate::{
    error::Result,
    gpu::{Gpu, Question, bucket},
    quant::{BLOCK, QuantType},
    tensor::{ALIGNMENT, Dtype, Rounding, Tensor},
};

/// Up to this many rows of the left side the fused kernel of GPUs is taken: as long as decoding again, an eighth of a
/// tile's work, costs less than passing W through memory.
const FUSED_ROWS_GPU: usize = 256;
/// The same where the dense product runs on cooperative matrices, which take no time beside decoding. Reasoned too.
const FUSED_ROWS_IN_F16: usize = 16;
/// The same for the kernel of host processors, measured (`ways_of_a_product` in tests/nf4.rs; two busy cores, Mesa 22.3):
/// of 576 x 1536 it takes 2.5 ms for one row, 7 for four and 19 for eight, by scratch it is 6, 10 and 24; sixteen rows
/// take 36 and 11.
const FUSED_ROWS_CPU: usize = 8;
/// Bytes of W that are dequantised at a time: a half of 7B's largest in f32, all of it in f16.
const SCRATCH: usize = 96 << 20;
/// Writes (or adds) the product of A and a quantised W into C.
pub(super) fn product_into(layout: Layout, a: &Tensor, w: &Tensor, c: &Tensor, epilogue: Epilogue<'_>) {
    assert!(layout != Layout::Tn, "TN product of {a:?} and {w:?}");
    assert!(a.dtype() == Dtype::F32 && c.dtype() == Dtype::F32, "{layout:?} product of {a:?} and {w:?} into {c:?}");
    let second = epilogue.second;
    let call = Call { layout, a, w, c, factors: nf4::factors(w), epilogue };
    let sizes = [c.rows(), w.rows(), w.cols()];
    let op = QUESTIONS[usize::from(layout == Layout::Nn) + 2 * usize::from(call.in_f16())];
    let question = Question { op, sizes: [bucket(sizes[0]), sizes[1], sizes[2]] };
    let fuses = match w.gpu().chosen(question, sizes) {
        Some(way) => way == FUSED,
        None => call.fuses_by_rule(),
    };
    if fuses || !call.in_f16() {
        // Dense products on matrices alone take a second one along.
        let epilogue = Epilogue { second: None, ..epilogue };
        (if fuses { Way::Fused } else { Way::Scratch }).run(Call { epilogue, ..call });
        if let Some(second) = second {
            second.add_to(layout, c, w.rounding());
        }
        return;
    }
    if let Some(second) = second {
        w.gpu().add_flops(second.flops(c));
    }
    Way::Scratch.run(call);
}

/// The products' names to the tuner, and those of their ways.
const QUESTIONS: [&str; 4] = ["nf4_matmul.nt", "nf4_matmul.nn", "nf4_matmul.nt_in_f16", "nf4_matmul.nn_in_f16"];
const FUSED: &str = "fused";
const BY_SCRATCH: &str = "scratch";

/// What the tuner runs of these products.
pub(super) const FAMILY: Family = Family { ops: || QUESTIONS.to_vec(), ways: || vec![FUSED, BY_SCRATCH], trial };

fn trial(gpu: &Gpu, question: &Question, [m, n, k]: [usize; 3]) -> Result<Trial> {
    let asked = QUESTIONS.iter().position(|op| *op == question.op).unwrap_or(0);
    let (layout, in_f16) = (if asked % 2 == 0 { Layout::Nt } else { Layout::Nn }, asked >= 2);
    let [columns, sum] = if layout == Layout::Nt { [n, k] } else { [k, n] };
    let sets = operand_sets(gpu, 4 * m * sum + n * k / 2, || {
        let w = nf4::random_quantized(gpu, QuantType::Nf4, &[n, k]);
        [exact(gpu, Dtype::F32, &[m, sum], 0), w.with_rounding(in_f16.then_some(Rounding::Half))]
    });
    let c = Tensor::empty(gpu, &[m, columns]);
    let [a, w] = &sets[0];
    let first = Call { layout, a, w, c: &c, factors: nf4::factors(w), epilogue: Epilogue::default() };
    let by_rule = first.fuses_by_rule();
    let mut ways = vec![if by_rule { FUSED } else { BY_SCRATCH }];
    if first.fused().is_some() {
        ways.push(if by_rule { BY_SCRATCH } else { FUSED });
    }
    let values = w.to_vec()?;
    let operands: [&dyn Fn(usize) -> f64; 2] = [&|at| exact_value(at, 0), &|at| f64::from(values[at])];
    let at = |[row, column]: [usize; 2]| {
        (row * columns + column, matmul::reference_at(layout, operands, [m, columns, sum], [row, column]))
    };
    let want = positions(m, columns).map(at).collect();
    let out = Some(c.clone());
    let run = Box::new(move |way: &str, turn: usize| {
        let [a, w] = &sets[turn % sets.len()];
        let call = Call { layout, a, w, c: &c, factors: nf4::factors(w), epilogue: Epilogue::default() };
        (if way == FUSED { Way::Fused } else { Way::Scratch }).run(call);
        c.clone()
    });
    // Of a sum's terms each has what rounding W to f16 leaves.
    let of_rounding = if in_f16 { 1e-3 } else { 0.0 };
    Ok(Trial { ways, run, out, want, tolerance: of_rounding + 2e-6 * (sum as f64).sqrt().max(2.0) })
}

/// Which kernels decode as they go.
enum Fused {
    /// Of host processors.
    Lanes,
    /// Of GPUs.
    Tiles,
}

struct Call<'a> {
    layout: Layout,
    a: &'a Tensor,
    w: &'a Tensor,
    c: &'a Tensor,
    /// f32, of W's blocks.
    factors: Tensor,
    epilogue: Epilogue<'a>,
}

impl Call<'_> {
    fn fused(&self) -> Option<Fused> {
        let k = self.w.cols();
        if self.w.gpu().is_cpu() {
            let fits = k.is_multiple_of(VECTOR) && lane_rows(k) > 0 && uniform_rows(k, Dtype::F32) > 0;
            return (self.layout == Layout::Nt && fits).then_some(Fused::Lanes);
        }
        k.is_multiple_of(8).then_some(Fused::Tiles)
    }

    /// Whether W is dequantised to f16.
    fn in_f16(&self) -> bool {
        self.w.rounding().is_some() && cooperative::serves(self.w.gpu()) && self.w.cols().is_multiple_of(8)
    }

    fn fuses_by_rule(&self) -> bool {
        let rows = self.c.rows();
        match self.fused() {
            Some(Fused::Lanes) => rows <= FUSED_ROWS_CPU,
            Some(Fused::Tiles) if self.in_f16() => rows <= FUSED_ROWS_IN_F16,
            Some(Fused::Tiles) => rows <= FUSED_ROWS_GPU,
            None => false,
        }
    }

    /// Dequantises W in parts of about `bytes` bytes, for dense products.
    fn by_scratch(&self, bytes: usize) {
        let (n, k) = (self.w.rows(), self.w.cols());
        let dtype = if self.in_f16() { Dtype::F16 } else { Dtype::F32 };
        let most = (bytes / dtype.bytes() / k.max(1) / ALIGNMENT).max(1) * ALIGNMENT;
        let step = n.div_ceil(n.div_ceil(most).max(1)).next_multiple_of(ALIGNMENT).min(n);
        // One for all parts: the pool would have to make room for a last one that is smaller, and the device to wait.
        let scratch = Tensor::empty_of(self.w.gpu(), dtype, &[step, k]).with_rounding(self.w.rounding());
        for first in (0..n).step_by(step.max(1)) {
            let rows = step.min(n - first);
            let part = scratch.row_part(0, rows);
            nf4::dequantize_into(self.w, &self.factors, first * k, &part, 0, rows * k);
            matmul::product_of_rows(self.layout, self.a, &part, first, self.c, self.epilogue);
        }
    }

    /// W's codes and factors from an element on that begins a word: bindings, and how many elements before it they
    /// begin.
    fn bind(&self, words: &Tensor, start: usize, count: usize) -> ([(usize, usize); 2], usize) {
        debug_assert!(start.is_multiple_of(8) && words.len() >= (start + count) / 8, "words of W");
        let before = start % ALIGNED;
        let (from, count) = (start - before, before + count);
        ([(from / 8, count.div_ceil(8)), (from / BLOCK, count.div_ceil(BLOCK))], before)
    }

    /// Ranges of rows such that each can be bound, with up to `before` more bytes: `(first, count)`.
    fn bindable(&self, rows: usize, row_bytes: usize, before: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let most = (self.c.gpu().max_binding() as usize).saturating_sub(before) / row_bytes.max(1);
        let step = (most / ALIGNMENT).max(1) * ALIGNMENT;
        (0..rows).step_by(step).map(move |first| (first, step.min(rows - first)))
    }

    fn by_tiles(&self) {
        let Self { layout, a, w, c, factors, epilogue } = self;
        let (n, k, words, kind) = (w.rows(), w.cols(), w.words(), kind_of(w));
        // A part of the rows of A and C, and one of the rows of W: of NT columns of C, of NN a summand.
        for (m_first, m) in self.bindable(c.rows(), 4 * a.cols().max(c.cols()), 0) {
            for (first, rows) in self.bindable(n, k.div_ceil(2), ALIGNED / 2) {
                let ([codes, blocks], before) = self.bind(&words, first * k, rows * k);
                let begins = *layout == Layout::Nt || first == 0;
                let bias = epilogue.bias.filter(|_| begins);
                let columns = if *layout == Layout::Nt { rows } else { k };
                let a_binding = a.range(m_first * a.cols(), m * a.cols());
                let bindings = [
                    a_binding,
                    words.range(codes.0, codes.1),
                    factors.range(blocks.0, blocks.1),
                    bias.map_or(a_binding, Tensor::binding),
                    c.range(m_first * c.cols(), m * c.cols()),
                ];
                let offset = if *layout == Layout::Nt { (0, first) } else { (first, 0) };
                let params = [
                    m as u32,
                    columns as u32,
                    if *layout == Layout::Nt { k } else { rows } as u32,
                    k as u32,
                    a.cols() as u32,
                    c.cols() as u32,
                    offset.0 as u32,
                    before as u32,
                    offset.1 as u32,
                    u32::from(bias.is_some()) | u32::from(epilogue.accumulate || !begins) << 1,
                    epilogue.alpha.unwrap_or(1.0).to_bits(),
                    offset.1 as u32,
                    0,
                    0,
                ];
                let (kernel, groups) = choose(*layout, kind, m, columns);
                c.gpu().dispatch(kernel, &bindings, &params, groups);
            }
        }
    }

    fn by_lanes(&self) {
        let Self { a, w, c, factors, epilogue, .. } = self;
        let (n, k, words, kind) = (w.rows(), w.cols(), w.words(), kind_of(w));
        let window = lane_rows(k).min(1024);
        let most = uniform_rows(k, Dtype::F32);
        for (m_first, m) in (0..c.rows()).step_by(most).map(|first| (first, most.min(c.rows() - first))) {
            for first in (0..n).step_by(window * WINDOWS) {
                let rows = (window * WINDOWS).min(n - first);
                let windows = rows.div_ceil(window);
                // Windows past the last are bound, and not read.
                let starts: [usize; WINDOWS] = std::array::from_fn(|at| (first + at.min(windows - 1) * window) * k);
                let codes = starts.map(|start| words.uniform(start / 8));
                let before = codes
                    .iter()
                    .enumerate()
                    .fold(0, |all, (at, (_, before))| all | ((*before * 8 / VECTOR) as u32) << (4 * at));
                let (blocks, blocks_before) = factors.uniform(starts[0] / BLOCK);
                let (a_binding, a_before) = a.uniform(m_first * k);
                let bias = epilogue.bias.map(|bias| bias.uniform(first));
                let (bias_binding, bias_before) = bias.unwrap_or((a_binding, 0));
                let (c_binding, c_before) = c.range_from(m_first * c.cols(), m * c.cols());
                let params = [
                    m as u32,
                    rows as u32,
                    k as u32,
                    k as u32,
                    k as u32,
                    c.cols() as u32,
                    a_before as u32,
                    (blocks_before * BLOCK + starts[0] % BLOCK) as u32,
                    (c_before + first) as u32,
                    u32::from(bias.is_some()) | u32::from(epilogue.accumulate) << 1,
                    epilogue.alpha.unwrap_or(1.0).to_bits(),
                    bias_before as u32,
                    window as u32,
                    before,
                ];
                let (kernel, m_each) = match m {
                    1 => (of(kind, ["nf4_matmul.by_lane.one", "nf4_matmul.by_lane.one_fp4"]), 1),
                    2..=4 => (of(kind, ["nf4_matmul.by_lane.few", "nf4_matmul.by_lane.few_fp4"]), 4),
                    _ => (of(kind, ["nf4_matmul.by_lane.many", "nf4_matmul.by_lane.many_fp4"]), 8),
                };
                let groups = [window.min(rows).div_ceil(LANES) as u32, m.div_ceil(m_each) as u32, windows as u32];
                let bindings: Vec<_> = [c_binding, bias_binding, a_binding, blocks]
                    .into_iter()
                    .chain(codes.map(|(binding, _)| binding))
                    .collect();
                c.gpu().dispatch(kernel, &bindings, &params, groups);
            }
        }
    }
}

/// Threads of a workgroup of `nf4_matmul.by_lane`, and uniforms of W in one dispatch (THREADS and WINDOWS in
/// shaders/variants).
const LANES: usize = 8;
const WINDOWS: usize = 8;
/// Codes of a vector of words.
const VECTOR: usize = 32;

/// Rows of W in one uniform of codes, such that the factors of all windows are one uniform too, wherever these begin:
/// whole vectors of lanes, where so many fit.
fn lane_rows(k: usize) -> usize {
    let codes = 2 * crate::gpu::UNIFORM_BYTES as usize;
    let rows = (codes - ALIGNED) / k.max(1);
    if rows >= LANES { rows / LANES * LANES } else { rows }
}

/// The kernel and its workgroups for a product on bound storage.
fn choose(layout: Layout, kind: QuantType, m: usize, n: usize) -> (&'static str, [u32; 3]) {
    if layout == Layout::Nt && m <= 4 {
        let (names, rows_of_w) = match m {
            1 => (["nf4_matmul.rows.nt_one", "nf4_matmul.rows.nt_one_fp4"], 4),
            _ => (["nf4_matmul.rows.nt", "nf4_matmul.rows.nt_fp4"], 2),
        };
        let groups = n.div_ceil(rows_of_w);
        return (of(kind, names), [groups.min(32_768) as u32, 1, groups.div_ceil(32_768) as u32]);
    }
    let small = !matmul::ways::wants_large_tiles(m, n);
    let names = match (layout, small) {
        (Layout::Nt, false) => ["nf4_matmul.tiled.nt", "nf4_matmul.tiled.nt_fp4"],
        (Layout::Nt, true) => ["nf4_matmul.tiled.nt_small", "nf4_matmul.tiled.nt_small_fp4"],
        (_, false) => ["nf4_matmul.tiled.nn", "nf4_matmul.tiled.nn_fp4"],
        (_, true) => ["nf4_matmul.tiled.nn_small", "nf4_matmul.tiled.nn_small_fp4"],
    };
    let side = if small { 32 } else { 64 };
    (of(kind, names), [n.div_ceil(side) as u32, m.div_ceil(side) as u32, 1])
}

/// How a product is computed, for checks and measurements.
#[derive(Clone, Copy, Debug)]
pub enum Way {
    /// As the number of rows says.
    Chosen,
    Scratch,
    /// By scratch where no kernel decodes as it goes.
    Fused,
    /// By scratch, in parts of 64 rows.
    Parts,
}

impl Way {
    /// The product of a (f32) and a quantised w, in a new tensor.
    pub fn product(self, layout: Layout, a: &Tensor, w: &Tensor) -> Tensor {
        let columns = if layout == Layout::Nt { w.rows() } else { w.cols() };
        let c = Tensor::empty(a.gpu(), &[a.rows(), columns]);
        self.run(Call { layout, a, w, c: &c, factors: nf4::factors(w), epilogue: Epilogue::default() });
        c
    }

    fn run(self, call: Call<'_>) {
        match (self, call.fused()) {
            (Self::Chosen, _) => matmul::product_into(call.layout, call.a, call.w, call.c, call.epilogue),
            (Self::Fused, Some(Fused::Lanes)) => call.by_lanes(),
            (Self::Fused, Some(Fused::Tiles)) => call.by_tiles(),
            (Self::Parts, _) => call.by_scratch(1),
            (Self::Scratch | Self::Fused, _) => call.by_scratch(SCRATCH),
        }
    }
}

fn check(layout: Layout, kind: QuantType, gpu: &Gpu, n: usize) -> Result<Vec<Comparison>> {
    let mut out = Vec::new();
    // Rows of W of whole vectors, of whole words and of neither; one row, a few and many on the left.
    let (even, words) = (n.next_multiple_of(VECTOR), n.next_multiple_of(8));
    for [m, rows, k] in [[n, n + 2, even], [1, n, even], [3, n, words], [n, 9, n + 1], [70, n, words]] {
        let mut random = Random::new((m * 31 + rows * 7 + k) as u64);
        let values = awkward(&mut random, rows * k);
        let w = nf4::quantized(gpu, kind, m % 2 == 1, &values, &[rows, k])?;
        let (a, ta) = random.tensor(gpu, &if layout == Layout::Nt { [m, k] } else { [m, rows] });
        let [columns, sum] = if layout == Layout::Nt { [rows, k] } else { [k, rows] };
        let (bias, tbias) = random.tensor(gpu, &[columns]);
        let plain = matmul::reference(layout, &wide(&a), &wide(&w.to_vec()?), [m, columns, sum]);
        let want: Vec<f64> = plain.iter().enumerate().map(|(at, x)| 0.75 * x + f64::from(bias[at % columns])).collect();
        let tolerance = 2e-6 * (sum as f64).sqrt().max(2.0);
        let (first, second) = (
            Epilogue { alpha: Some(0.5), bias: Some(&tbias), ..Default::default() },
            Epilogue { alpha: Some(0.25), accumulate: true, ..Default::default() },
        );
        for (what, way) in [("as chosen", Way::Chosen), ("by scratch", Way::Parts), ("fused", Way::Fused)] {
            let c = Tensor::empty(gpu, &[m, columns]);
            for epilogue in [first, second] {
                way.run(Call { layout, a: &ta, w: &w, c: &c, factors: nf4::factors(&w), epilogue });
            }
            out.push(Comparison::new(what, c.to_vec()?, want.clone(), tolerance));
        }
        let w = w.with_rounding(Some(Rounding::Half));
        let in_f16 = Call { layout, a: &ta, w: &w, c: &ta, factors: nf4::factors(&w), epilogue: first }.in_f16();
        let scale = if layout == Layout::Nt { 1.0 } else { cooperative::scale_of(&a) };
        // Shorter sides than a matrix are summed in f32.
        if in_f16 && gpu.cooperative_side().is_some_and(|side| m.min(rows).min(k) >= side as usize) {
            let (a, w_values) = (cooperative::rounded(&a, scale), cooperative::rounded(&w.to_vec()?, 1.0));
            let plain = matmul::reference(layout, &a, &w_values, [m, columns, sum]);
            let want = plain.iter().enumerate().map(|(at, x)| 0.75 * x + f64::from(bias[at % columns])).collect();
            let c = Tensor::empty(gpu, &[m, columns]);
            for epilogue in [first, second] {
                Way::Scratch.run(Call { layout, a: &ta, w: &w, c: &c, factors: nf4::factors(&w), epilogue });
            }
            out.push(Comparison::new("by scratch, in f16", c.to_vec()?, want, tolerance));
        }
    }
    Ok(out)
}

fn cost(n: usize) -> Cost {
    let [m, n, k] = [n, n + 2, n.next_multiple_of(VECTOR)].map(|x| x as u64);
    Cost { flops: 2 * m * n * k, bytes: 4 * (m * k + m * n) + n * k * 9 / 16 }
}

/// The case of a run in f16.
const IN_F16: &str = "up_proj, in f16";

/// The products of a decoder's linears with a W in four bits: all of them, or the widest alone.
fn cases(layout: Layout, kind: QuantType, shapes: &Shapes) -> Vec<Case> {
    let Shapes { tokens, hidden, intermediate, .. } = *shapes;
    let all = [
        ("q_proj", tokens, hidden, hidden),
        ("up_proj", tokens, intermediate, hidden),
        ("down_proj", tokens, hidden, intermediate),
        (IN_F16, tokens, intermediate, hidden),
        ("up_proj, decode", 1, intermediate, hidden),
    ];
    let cut = match (layout, kind) {
        (Layout::Nt, QuantType::Nf4) => &all[..],
        (_, QuantType::Nf4) => &all[..4],
        _ => &all[1..2],
    };
    let case = |&(pass, m, n, k): &(&'static str, usize, usize, usize)| {
        // Either layout reads an A of m rows and all of W, and writes m rows.
        let bytes = 4 * m * (n + k) + n * k / 2 + n * k / BLOCK;
        let cost = Cost { flops: (2 * m * n * k) as u64, bytes: bytes as u64 };
        let columns = if layout == Layout::Nt { k } else { n };
        let roof: fn(&Gpu) -> _ = if pass == IN_F16 { cooperative::roof_in_f16 } else { |_| roof::FMA };
        Case::of(pass, format!("{m}x{columns} by {n}x{k}"), cost).limited_by(roof).run(move |gpu| {
            let (a, w) = (floats(gpu, &[m, columns]), nf4::random_quantized(gpu, kind, &[n, k]));
            let w = w.with_rounding((pass == IN_F16).then_some(Rounding::Half));
            move || matmul::product(layout, &a, &w)
        })
    };
    cut.iter().map(case).collect()
}

const fn op(
    name: &'static str,
    check: fn(&Gpu, usize) -> Result<Vec<Comparison>>,
    cases: fn(&Shapes) -> Vec<Case>,
) -> Op {
    Op { name, check, cost, cases }
}

pub const NT_NF4: Op = op(
    "nf4_matmul.nt",
    |gpu, n| check(Layout::Nt, QuantType::Nf4, gpu, n),
    |shapes| cases(Layout::Nt, QuantType::Nf4, shapes),
);
pub const NT_FP4: Op = op(
    "nf4_matmul.nt_fp4",
    |gpu, n| check(Layout::Nt, QuantType::Fp4, gpu, n),
    |shapes| cases(Layout::Nt, QuantType::Fp4, shapes),
);
pub const NN_NF4: Op = op(
    "nf4_matmul.nn",
    |gpu, n| check(Layout::Nn, QuantType::Nf4, gpu, n),
    |shapes| cases(Layout::Nn, QuantType::Nf4, shapes),
);
pub const NN_FP4: Op = op(
    "nf4_matmul.nn_fp4",
    |gpu, n| check(Layout::Nn, QuantType::Fp4, gpu, n),
    |shapes| cases(Layout::Nn, QuantType::Fp4, shapes),
);
