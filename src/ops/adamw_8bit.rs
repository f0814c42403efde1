//! AdamW with moments of eight bits (Dettmers et al. 2021), as bitsandbytes' `AdamW8bit` on CUDA: blocks of [`BLOCK`]
//! elements, each with its largest size of either moment, and for every element the index of the nearest of 256 values
//! in units of that. Decay comes after the update: p = (p - lr c2 / c1 m / (sqrt(v) + c2 eps)) (1 - lr wd) with
//! c1 = 1 - b1^t and c2 = sqrt(1 - b2^t). A first moment below zero never becomes zero.
//!
//! A block begins with its tensor: what shares an update begins at multiples of [`BLOCK`], with zeros behind each.

use std::sync::OnceLock;

use super::{
    Case, Comparison, Cost, MAX_GROUPS, Op, Random, Shapes,
    adamw::{Step, Weights, check_narrow},
    case::floats,
    elementwise, groups_for,
    testing::wide,
};
use crate::{
    error::Result,
    gpu::Gpu,
    tensor::{Dtype, Tensor},
};

/// Elements that share a scale.
pub const BLOCK: usize = 256;
/// Smaller tensors keep moments in f32.
pub const LEAST: usize = 4096;
/// The index of zero in the map of the first moment; in that of the second it is 0.
pub const ZERO: u8 = 127;

/// The 256 values of the dynamic map: seven decades from 1e-7 to 1, twice as many values in each as in the one below;
/// `signed`, with those below zero.
pub fn dynamic_map(signed: bool) -> [f32; 256] {
    let mut map = [0.0; 256];
    map[255] = 1.0;
    for decade in 0..7 {
        let count = if signed { 1 << decade } else { 2 << decade };
        // As `torch.linspace(0.1, 1, count + 1)` does it: from both ends, each point rounded once.
        let width = (1.0f32 - 0.1) / count as f32;
        let point = |i: usize| {
            let from_end = (count - i) as f32;
            if i < count.div_ceil(2) { width.mul_add(i as f32, 0.1) } else { (-width).mul_add(from_end, 1.0) }
        };
        let scale = 10f64.powi(decade - 6) as f32;
        for place in 0..count {
            let value = scale * ((point(place) + point(place + 1)) / 2.0);
            if signed {
                map[usize::from(ZERO) + count + place] = value;
                map[usize::from(ZERO) - count - place] = -value;
            } else {
                map[count - 1 + place] = value;
            }
        }
    }
    map
}

/// What lies between neighbours of a map: index k is nearest from `bounds[k]` to `bounds[k + 1]`.
fn bounds(map: &[f32; 256]) -> [f32; 257] {
    let mut bounds = [2.0; 257];
    bounds[0] = -2.0;
    for (bound, pair) in bounds[1..].iter_mut().zip(map.windows(2)) {
        *bound = (pair[0] + pair[1]) * 0.5;
    }
    bounds
}

/// Both maps and their bounds.
fn tables() -> &'static ([f32; 256], [f32; 256], Vec<f32>) {
    static TABLES: OnceLock<([f32; 256], [f32; 256], Vec<f32>)> = OnceLock::new();
    TABLES.get_or_init(|| {
        let (first, second) = (dynamic_map(true), dynamic_map(false));
        let all = [&first[..], &second, &bounds(&first), &bounds(&second)].concat();
        (first, second, all)
    })
}

/// Moments of N parameters, N a multiple of [`BLOCK`].
#[derive(Clone, Debug)]
pub struct Moments {
    /// u32 [N / 4]: indices in the signed map, four to a word, the first in the lowest byte.
    pub first: Tensor,
    /// u32 [N / 4]: indices in the unsigned map.
    pub second: Tensor,
    /// f32 [N / BLOCK, 2]: the largest size of either moment in each block.
    pub absmax: Tensor,
    /// Both maps, and the bounds of each.
    map: Tensor,
}

impl Moments {
    /// Zeros.
    pub fn new(gpu: &Gpu, elements: usize) -> Self {
        assert!(elements.is_multiple_of(BLOCK), "{elements} elements in blocks of {BLOCK}");
        let words = || {
            let words = Tensor::empty_of(gpu, Dtype::U32, &[elements / 4]);
            elementwise::fill(&words, 0.0);
            words
        };
        let map = &tables().2;
        Self {
            first: words(),
            second: words(),
            absmax: elementwise::zeros(gpu, &[elements / BLOCK, 2]),
            map: Tensor::from_f32(gpu, map, &[map.len()]),
        }
    }
}

/// Updates `weights`, all of whose elements are in blocks from `first_block` of the moments on, in place. Otherwise as
/// [`super::adamw::step`].
pub fn step(
    weights: Weights<'_>,
    gradient: &Tensor,
    moments: &Moments,
    first_block: usize,
    square_sum: &Tensor,
    step: &Step,
) {
    let (gpu, count) = (gradient.gpu(), weights.len());
    assert!(gradient.len() == count && count.is_multiple_of(BLOCK), "{weights:?} and {gradient:?} in one update");
    assert!(first_block + count / BLOCK <= moments.absmax.rows(), "{weights:?} from block {first_block} on");
    let kernel = weights.kernel("adamw_8bit.step");
    let most = (gpu.max_binding() as usize / 4 / BLOCK).clamp(1, MAX_GROUPS * MAX_GROUPS);
    for block in (0..count / BLOCK).step_by(most) {
        let blocks = most.min(count / BLOCK - block);
        let (first, elements, word) = (block * BLOCK, blocks * BLOCK, (first_block + block) * BLOCK / 4);
        let (absmax, absmax_before) = moments.absmax.range_from(2 * (first_block + block), 2 * blocks);
        let (last, before) = weights.bindings(first, elements);
        let mut bindings = vec![
            gradient.range(first, elements),
            moments.first.range(word, elements / 4),
            moments.second.range(word, elements / 4),
            absmax,
            moments.map.binding(),
            square_sum.binding(),
        ];
        bindings.extend(last);
        let params = step.params(blocks, &weights, first, before, absmax_before / 2);
        gpu.dispatch(&kernel, &bindings, &params, groups_for(blocks, 1));
    }
}

/// The index of the value of a map that is nearest to x; halfway between two, the even one.
fn nearest(x: f32, bounds: &[f32]) -> u8 {
    let passed = bounds[1..256].iter().enumerate().filter(|&(k, &bound)| x > bound || (x == bound && k % 2 == 1));
    passed.count() as u8
}

/// The state of a tensor on the host.
#[derive(Clone, Debug)]
pub struct Reference {
    pub parameter: Vec<f32>,
    pub first: Vec<u8>,
    pub second: Vec<u8>,
    /// Of both moments, block by block.
    pub absmax: Vec<[f32; 2]>,
}

impl Reference {
    /// Moments are zero.
    pub fn new(parameter: Vec<f32>) -> Self {
        let (zeros, blocks) = (vec![0; parameter.len()], parameter.len().div_ceil(BLOCK));
        Self { parameter, first: zeros.clone(), second: zeros, absmax: vec![[0.0; 2]; blocks] }
    }

    /// Moments as the indices stand for them.
    pub fn moments(&self) -> [Vec<f64>; 2] {
        let (signed, unsigned, _) = tables();
        let decoded = |indices: &[u8], map: &[f32; 256], which: usize| {
            let value = |(i, &index): (usize, &u8)| f64::from(map[usize::from(index)] * self.absmax[i / BLOCK][which]);
            indices.iter().enumerate().map(value).collect()
        };
        [decoded(&self.first, signed, 0), decoded(&self.second, unsigned, 1)]
    }

    /// The update on the host, in f32 as on the device.
    pub fn step(&mut self, gradient: &[f32], square_sum: f64, step: &Step) {
        if !square_sum.is_finite() {
            return;
        }
        let factor = step.gradient_factor(square_sum) as f32;
        let [learning_rate, beta1, beta2, epsilon, decay, c1, c2, ..] = step.constants();
        let rate = learning_rate * c2 / c1;
        let [bounds1, bounds2] = [&tables().2[512..769], &tables().2[769..]];
        let present = self.moments();
        for (block, start) in (0..self.parameter.len()).step_by(BLOCK).enumerate() {
            let range = start..(start + BLOCK).min(self.parameter.len());
            let updated = |state: &[f64], beta: f32, change: fn(f32) -> f32| -> Vec<f32> {
                let pairs = state[range.clone()].iter().zip(&gradient[range.clone()]);
                pairs.map(|(state, g)| beta * *state as f32 + (1.0 - beta) * change(g * factor)).collect()
            };
            let m = updated(&present[0], beta1, |g| g);
            let v = updated(&present[1], beta2, |g| g * g);
            let largest = |values: &[f32]| values.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
            let absmax = [largest(&m), largest(&v)];
            self.absmax[block] = absmax;
            let units = |x: f32, largest: f32| if largest > 0.0 { x / largest } else { 0.0 };
            for (i, (m, v)) in range.zip(m.into_iter().zip(v)) {
                let index = nearest(units(m, absmax[0]), bounds1);
                self.first[i] = if m < 0.0 && index == ZERO { ZERO - 1 } else { index };
                self.second[i] = nearest(units(v, absmax[1]), bounds2);
                self.parameter[i] = (self.parameter[i] - rate * (m / (v.sqrt() + c2 * epsilon))) * decay;
            }
        }
    }
}

/// A tensor's elements in whole blocks, with zeros behind.
fn in_blocks(gpu: &Gpu, values: &[f32]) -> Tensor {
    let mut padded = values.to_vec();
    padded.resize(values.len().next_multiple_of(BLOCK), 0.0);
    Tensor::from_f32(gpu, &padded, &[padded.len()])
}

/// Indices of either moment, and absmax pair by pair.
type OnHost = (Vec<u8>, Vec<u8>, Vec<[f32; 2]>);

/// Moments without what is behind `count` elements from `first` on.
fn read(moments: &Moments, first: usize, count: usize) -> Result<OnHost> {
    let cut = |bytes: Vec<u8>| bytes[first..first + count].to_vec();
    let absmax = moments.absmax.to_vec()?;
    let blocks = absmax.as_chunks().0[first / BLOCK..][..count.div_ceil(BLOCK)].to_vec();
    Ok((cut(moments.first.to_bytes()?), cut(moments.second.to_bytes()?), blocks))
}

/// How much farther than the nearest value the chosen ones are, relative to what they stand for; a first moment below
/// zero that became zero counts 1.
fn excess(indices: &[u8], exact: &[f64], absmax: &[[f32; 2]], which: usize) -> Vec<f32> {
    let map = if which == 0 { &tables().0 } else { &tables().1 };
    let one = |(i, (&index, &exact)): (usize, (&u8, &f64))| {
        let scale = f64::from(absmax[i / BLOCK][which]);
        let x = if scale > 0.0 { exact / scale } else { 0.0 };
        let distance = |index: usize| (f64::from(map[index]) - x).abs();
        let nearest = (0..256).map(distance).fold(f64::INFINITY, f64::min);
        let excess = (distance(index.into()) - nearest) / (x.abs() + 1e-7);
        let below_zero = which == 0 && exact < 0.0;
        match index {
            ZERO if below_zero => 1.0,
            // Where zero is nearer.
            _ if below_zero && index == ZERO - 1 && x > f64::from(map[usize::from(index)]) => 0.0,
            _ => excess as f32,
        }
    };
    indices.iter().zip(exact).enumerate().map(one).collect()
}

fn check(gpu: &Gpu, n: usize) -> Result<Vec<Comparison>> {
    let mut out = Vec::new();
    for max_norm in [0.0, 0.1] {
        let mut random = Random::new(n as u64);
        let count = n * (n + 3);
        let (p, tp) = random.tensor(gpu, &[count]);
        drop(tp);
        let tp = in_blocks(gpu, &p);
        // Not the first blocks of the moments, nor the last.
        let (ahead, blocks) = (3, count.div_ceil(BLOCK));
        let moments = Moments::new(gpu, (ahead + blocks + 1) * BLOCK);
        let mut host = Reference::new(p);
        let constants = Step {
            learning_rate: 0.01,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.1,
            max_norm,
            gradient_scale: 0.25,
            t: 0,
        };
        for t in 1..=3 {
            // Of many sizes, and zeros among them.
            let mut g = random.values(count);
            g.iter_mut().step_by(3).for_each(|g| *g *= 1e-4);
            g.iter_mut().step_by(7).for_each(|g| *g *= 1e-5);
            g.iter_mut().step_by(11).for_each(|g| *g = 0.0);
            let square_sum = g.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>();
            let constants = Step { t, ..constants };
            let tsum = Tensor::from_f32(gpu, &[square_sum as f32], &[1]);
            let factor = constants.gradient_factor(square_sum);
            let [m, v] = host.moments();
            let moved = |state: &[f64], beta: f64, square: bool| -> Vec<f64> {
                let beta = f64::from(beta as f32);
                let change = |g: f32| if square { (f64::from(g) * factor).powi(2) } else { f64::from(g) * factor };
                state.iter().zip(&g).map(|(state, &g)| beta * state + (1.0 - beta) * change(g)).collect()
            };
            let (m, v) = (moved(&m, 0.9, false), moved(&v, 0.999, true));
            step(Weights::Full(&tp), &in_blocks(gpu, &g), &moments, ahead, &tsum, &constants);
            host.step(&g, square_sum, &constants);
            let (first, second, absmax) = read(&moments, ahead * BLOCK, count)?;
            let flat = |pairs: &[[f32; 2]], which: usize| pairs.iter().map(|pair| pair[which]).collect::<Vec<_>>();
            let zeros = vec![0.0; count];
            out.extend([
                Comparison::new("largest first moments", flat(&absmax, 0), wide(&flat(&host.absmax, 0)), 1e-6),
                Comparison::new("largest second moments", flat(&absmax, 1), wide(&flat(&host.absmax, 1)), 1e-6),
                Comparison::new("first moments' indices", excess(&first, &m, &absmax, 0), zeros.clone(), 2e-3),
                Comparison::new("second moments' indices", excess(&second, &v, &absmax, 1), zeros, 2e-3),
                Comparison::new("parameter", tp.to_vec()?[..count].to_vec(), wide(&host.parameter), 1e-6),
            ]);
            // What is nearest may differ by one where two values are equally near; from there on both go on alike.
            (host.first, host.second, host.absmax) = (first, second, absmax);
            host.parameter = tp.to_vec()?[..count].to_vec();
        }
        let before = (tp.to_vec()?, moments.first.to_bytes()?, moments.second.to_bytes()?, moments.absmax.to_vec()?);
        for bad in [f32::INFINITY, f32::NAN] {
            let g = in_blocks(gpu, &random.values(count));
            let square_sum = Tensor::from_f32(gpu, &[bad], &[1]);
            step(Weights::Full(&tp), &g, &moments, ahead, &square_sum, &Step { t: 4, ..constants });
        }
        let after = (tp.to_vec()?, moments.first.to_bytes()?, moments.second.to_bytes()?, moments.absmax.to_vec()?);
        let changed = f32::from(u8::from(before != after));
        out.push(Comparison::new("after a gradient that is not finite", vec![changed], vec![0.0], 0.0));
        let whole = count.next_multiple_of(BLOCK);
        let (g, tg) = random.tensor(gpu, &[whole]);
        let square_sum = Tensor::from_f32(gpu, &[g.iter().map(|g| g * g).sum()], &[1]);
        out.extend(check_narrow(gpu, whole, |weights| {
            let moments = Moments::new(gpu, whole + ahead * BLOCK);
            step(weights, &tg, &moments, ahead, &square_sum, &Step { t: 1, ..constants });
        })?);
    }
    Ok(out)
}

fn cases(shapes: &Shapes) -> Vec<Case> {
    let size = [shapes.hidden, shapes.hidden];
    let elements = size[0] * size[1];
    // 8 more bytes of either moment's scale, read and written, for each block.
    let cost = Cost { flops: 50 * elements as u64, bytes: (16 * elements + elements / BLOCK * 16) as u64 };
    let case = Case::of("f32", format!("{}x{}", size[0], size[1]), cost).run(move |gpu| {
        let (p, g, moments) = (floats(gpu, &size), floats(gpu, &size), Moments::new(gpu, elements));
        let square_sum = Tensor::from_f32(gpu, &[1.0], &[1]);
        move || step(Weights::Full(&p), &g, &moments, 0, &square_sum, &Step::usual())
    });
    vec![case]
}

pub const OP: Op = Op {
    name: "adamw_8bit",
    check,
    cases,
    cost: |n| {
        let elements = (n * (n + 3)) as u64;
        Cost { flops: 50 * elements, bytes: 16 * elements + elements / 16 }
    },
};

#[cfg(test)]
mod tests {
    use super::*;

    /// As bitsandbytes' `create_dynamic_map` gives them.
    #[test]
    fn maps_have_the_published_values() {
        let (signed, unsigned) = (dynamic_map(true), dynamic_map(false));
        let near = |got: f32, want: f32| assert!((got - want).abs() <= want.abs() * 1e-6, "{got} for {want}");
        for (index, want) in [(0, -0.992_968_7), (1, -0.978_906_3), (63, -0.107_031_3), (126, -5.5e-7), (128, 5.5e-7)] {
            near(signed[index], want);
        }
        for (index, want) in [(129, 3.25e-6), (130, 7.75e-6), (191, 0.107_031_3), (254, 0.992_968_7), (255, 1.0)] {
            near(signed[index], want);
        }
        for (index, want) in [(1, 3.25e-7), (2, 7.75e-7), (3, 2.125e-6), (4, 4.375e-6), (127, 0.103_515_6)] {
            near(unsigned[index], want);
        }
        for (index, want) in [(128, 0.110_546_9), (254, 0.996_484_4), (255, 1.0)] {
            near(unsigned[index], want);
        }
        assert_eq!((signed[usize::from(ZERO)], unsigned[0]), (0.0, 0.0));
        assert!(signed.is_sorted() && unsigned.is_sorted());
        // FNV-1a over the words of `create_dynamic_map(signed=...)`, bitsandbytes 0.50.2: equal to the last bit.
        let hash = |map: &[f32; 256]| {
            let step = |hash: u64, value: &f32| (hash ^ u64::from(value.to_bits())).wrapping_mul(0x100_0000_01b3);
            map.iter().fold(0xcbf2_9ce4_8422_2325, step)
        };
        assert_eq!((hash(&signed), hash(&unsigned)), (0x690c_a6ad_558a_2475, 0xa9aa_f4b4_f33a_51e3));
    }

    #[test]
    fn the_even_index_wins_halfway_and_a_moment_below_zero_stays_so() {
        let map = dynamic_map(true);
        let bounds = bounds(&map);
        for k in [0usize, 1, 126, 127, 200, 253] {
            let even = if k % 2 == 0 { k } else { k + 1 };
            assert_eq!(usize::from(nearest(bounds[k + 1], &bounds)), even);
        }
        assert_eq!((nearest(1.0, &bounds), nearest(-1.0, &bounds), nearest(0.0, &bounds)), (255, 0, ZERO));
        let constants = Step {
            learning_rate: 0.1,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            max_norm: 0.0,
            gradient_scale: 1.0,
            t: 1,
        };
        let mut host = Reference::new(vec![0.0; 3]);
        host.step(&[1.0, -1e-9, 1e-9], 1.0, &constants);
        assert_eq!(host.first, [255, ZERO - 1, ZERO]);
    }
}
