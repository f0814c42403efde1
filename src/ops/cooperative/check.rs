//! Products by cooperative matrices beside those of the host, of operands rounded as there, and what is timed of them.

use half::f16;

use super::{DEPTH, Kernel, Lanes, Product, SecondPair, fits, has_large};
use crate::{
    error::Result,
    gpu::Gpu,
    ops::{
        Case, Comparison, Random, Shapes,
        matmul::{self, Epilogue, Layout},
        roof,
        testing::wide,
    },
    tensor::{Dtype, Rounding, Tensor},
};

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
pub fn rounded(values: &[f32], scale: f64) -> Vec<f64> {
    values.iter().map(|&x| f16::from_f64(f64::from(x) * scale).to_f64() / scale).collect()
}

/// The power of two that brings the largest value to 2^14 and beyond.
pub fn scale_of(values: &[f32]) -> f64 {
    scale_to(14, values)
}

/// The same for another power of two.
pub fn scale_to(exponent: i32, values: &[f32]) -> f64 {
    let largest = values.iter().fold(0f32, |most, x| most.max(x.abs()));
    2f64.powi(exponent - f64::from(largest).log2().floor() as i32)
}

pub fn check(layout: Layout, dtype: Dtype, gpu: &Gpu, n: usize) -> Result<Vec<Comparison>> {
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
pub fn cases(layout: Layout, dtype: Dtype, shapes: &Shapes) -> Vec<Case> {
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
