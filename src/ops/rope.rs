//! Rotary position embedding, halves convention (Hugging Face LLaMA): with e = E/2, channel j < e pairs with j + e,
//! out_j = x_j cos - x_{j+e} sin, out_{j+e} = x_{j+e} cos + x_j sin, angle = position * theta^(-2j/E).

use super::{Case, Comparison, Cost, Op, Random, Shapes, THREADS, bindable_rows, by_columns, case::floats, groups_for};
use crate::{error::Result, gpu::Gpu, tensor::Tensor};

/// Cosines and sines [rows, 2, E/2], a row a position with its frequencies (radians per position, [E/2]). The angle is
/// rounded to f32 as transformers rounds it, cosine and sine are exact: devices may be coarse at large angles.
pub fn table<'f>(gpu: &Gpu, rows: impl IntoIterator<Item = (usize, &'f [f32])>) -> Tensor {
    let (mut data, mut count, mut half) = (Vec::new(), 0, 0);
    for (position, frequencies) in rows {
        let angles = frequencies.iter().map(|&frequency| f64::from(position as f32 * frequency));
        data.extend(angles.clone().map(|angle| angle.cos() as f32));
        data.extend(angles.map(|angle| angle.sin() as f32));
        (count, half) = (count + 1, frequencies.len());
    }
    Tensor::from_f32(gpu, &data, &[count, 2, half])
}

/// theta^(-2j/E) for j below E/2.
pub fn frequencies(head_size: usize, theta: f64) -> Vec<f32> {
    (0..head_size / 2).map(|j| (1.0 / theta.powf(2.0 * j as f64 / head_size as f64)) as f32).collect()
}

/// Rotates x [T, H, E] by the rows of the table that its tokens name (u32 [T]; their positions, mostly); `inverse` for
/// the backward. Where nobody else holds x, its own memory takes the result.
pub fn rotate(x: Tensor, positions: &Tensor, table: &Tensor, heads: usize, inverse: bool) -> Tensor {
    let gpu = x.gpu();
    let (tokens, width) = (positions.len(), x.len() / positions.len().max(1));
    let y = if x.is_shared() { Some(Tensor::empty(gpu, x.shape())) } else { None };
    let half = width / heads / 2;
    let (kernel, pairs) = match y {
        Some(_) => by_columns(["rope.rotate", "rope.rotate.vec"], half),
        None => by_columns(["rope.rotate.in_place", "rope.rotate.vec_in_place"], half),
    };
    let sign: f32 = if inverse { -1.0 } else { 1.0 };
    for (first, rows) in bindable_rows(gpu, tokens, width) {
        let (start, count) = (first * width, rows * width);
        let bindings = [x.range(start, count), positions.range(first, rows), table.binding()];
        let params = [rows as u32, heads as u32, half as u32, sign.to_bits()];
        let groups = groups_for(rows * heads * half / pairs, THREADS);
        let bindings = bindings.into_iter().chain(y.as_ref().map(|y| y.range(start, count))).collect::<Vec<_>>();
        gpu.dispatch(kernel, &bindings, &params, groups);
    }
    y.unwrap_or(x)
}

/// The same on the host, angles in f64.
pub fn reference(x: &[f32], positions: &[u32], heads: usize, head_size: usize, theta: f64) -> Vec<f64> {
    let half = head_size / 2;
    let mut y = vec![0.0; x.len()];
    for (t, &position) in positions.iter().enumerate() {
        for h in 0..heads {
            let base = (t * heads + h) * head_size;
            for j in 0..half {
                let frequency = (1.0 / theta.powf(2.0 * j as f64 / head_size as f64)) as f32;
                let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
                let (a, b) = (f64::from(x[base + j]), f64::from(x[base + half + j]));
                y[base + j] = a * cos - b * sin;
                y[base + half + j] = b * cos + a * sin;
            }
        }
    }
    y
}

fn check(gpu: &Gpu, n: usize) -> Result<Vec<Comparison>> {
    let mut random = Random::new(n as u64);
    let (heads, head_size, theta) = (3, 2 * (n % 37 + 1), 10_000.0);
    let (x, tx) = random.tensor(gpu, &[n, heads, head_size]);
    let positions = random.indices(n, 600);
    let tpositions = Tensor::from_u32(gpu, &positions, &[n]);
    let frequencies = frequencies(head_size, theta);
    let table = table(gpu, (0..600).map(|position| (position, frequencies.as_slice())));
    let y = rotate(tx.clone(), &tpositions, &table, heads, false);
    let back = rotate(y.clone(), &tpositions, &table, heads, true);
    let (out, want) = (y.to_vec()?, reference(&x, &positions, heads, head_size, theta));
    let in_place = rotate(tx, &tpositions, &table, heads, false);
    Ok(vec![
        Comparison::new("y", out.clone(), want, 1e-6),
        Comparison::new("y in place of x", in_place.to_vec()?, super::testing::wide(&out), 0.0),
        Comparison::new("the inverse brings x back", back.to_vec()?, super::testing::wide(&x), 1e-6),
    ])
}

fn cases(shapes: &Shapes) -> Vec<Case> {
    let Shapes { tokens, heads, head_size, .. } = *shapes;
    let shape = format!("{tokens}x{heads}x{head_size}");
    let case = |pass, inverse| {
        let cost = Cost::each(tokens * heads * head_size, 3, 8);
        Case::of(pass, shape.clone(), cost).run(move |gpu| {
            let positions: Vec<u32> = (0..tokens as u32).collect();
            let positions = Tensor::from_u32(gpu, &positions, &[tokens]);
            let frequencies = frequencies(head_size, 10_000.0);
            let table = table(gpu, (0..tokens).map(|position| (position, frequencies.as_slice())));
            // In place, as models rotate.
            let mut x = Some(floats(gpu, &[tokens, heads, head_size]));
            move || {
                x = x.take().map(|x| rotate(x, &positions, &table, heads, inverse));
            }
        })
    };
    vec![case("forward", false), case("backward", true)]
}

pub const OP: Op = Op {
    name: "rope",
    check,
    cases,
    cost: |n| {
        let elements = (n * 3 * 2 * (n % 37 + 1)) as u64;
        Cost { flops: 3 * elements, bytes: 8 * elements }
    },
};
