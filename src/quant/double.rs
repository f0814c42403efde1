//! Factors in eight bits: their mean is taken off, and what is left is quantised in blocks of 256 with a map whose
//! values lie dense near zero ("dynamic tree", Dettmers 2016).

use std::sync::LazyLock;

use super::NESTED_BLOCK;

/// The factors of a tensor's blocks.
#[derive(Clone, Debug, PartialEq)]
pub enum Factors {
    Plain(Vec<f32>),
    Nested(Nested),
}

impl Factors {
    /// Factors kept as they are, or in eight bits each.
    pub fn new(absmax: Vec<f32>, double: bool) -> Self {
        if double { Self::Nested(Nested::new(&absmax)) } else { Self::Plain(absmax) }
    }

    /// One for each block.
    pub fn values(&self) -> std::borrow::Cow<'_, [f32]> {
        match self {
            Self::Plain(absmax) => absmax.into(),
            Self::Nested(nested) => nested.factors().into(),
        }
    }
}

/// The factors of a tensor's blocks in eight bits each: `map[code] * absmax[block / 256] + offset`.
#[derive(Clone, Debug, PartialEq)]
pub struct Nested {
    pub codes: Vec<u8>,
    pub absmax: Vec<f32>,
    /// 256 values.
    pub map: Vec<f32>,
    pub offset: f32,
}

impl Nested {
    /// Quantises factors. A code is that of the map's nearest value to (factor - offset) / absmax.
    pub fn new(factors: &[f32]) -> Self {
        let (offset, map) = (mean(factors), dynamic_map());
        let mut nested =
            Self { codes: Vec::with_capacity(factors.len()), absmax: Vec::new(), map: map.to_vec(), offset };
        for block in factors.chunks(NESTED_BLOCK) {
            let absmax = block.iter().fold(0.0, |most: f32, factor| most.max((factor - offset).abs()));
            nested.absmax.push(absmax);
            nested.codes.extend(block.iter().map(|factor| nearest(map, factor - offset, absmax)));
        }
        nested
    }

    /// The factors as they are after it.
    pub fn factors(&self) -> Vec<f32> {
        let factor = |(at, &code): (usize, &u8)| {
            let scaled = self.map[usize::from(code)] * self.absmax[at / NESTED_BLOCK];
            scaled + self.offset
        };
        self.codes.iter().enumerate().map(factor).collect()
    }
}

/// The index of the map's nearest value to value / absmax; the lower of two that are as near.
fn nearest(map: &[f32], value: f32, absmax: f32) -> u8 {
    // Exact in f64, or so near it that no tie is lost.
    let x = if absmax > 0.0 { f64::from(value) / f64::from(absmax) } else { 0.0 };
    let above = map.partition_point(|&entry| f64::from(entry) < x);
    let distance = |at: usize| map.get(at).map_or(f64::INFINITY, |&entry| (f64::from(entry) - x).abs());
    let below = above.saturating_sub(1);
    // 256 entries.
    (if distance(below) <= distance(above) { below } else { above }) as u8
}

/// The signed dynamic map: seven decades, each with twice as many values as the one below.
pub fn dynamic_map() -> &'static [f32; 256] {
    static MAP: LazyLock<[f32; 256]> = LazyLock::new(|| {
        let mut map = vec![0.0, 1.0];
        for exponent in 0..7 {
            let points = (1 << exponent) + 1;
            // torch.linspace: from either end to the middle, each point rounded once.
            let step = (1.0f32 - 0.1) / (points - 1) as f32;
            let point = |at: usize| match at < points / 2 {
                true => step.mul_add(at as f32, 0.1),
                false => (-step).mul_add((points - 1 - at) as f32, 1.0),
            };
            let decade = 10f64.powi(exponent - 6) as f32;
            for at in 0..points - 1 {
                let value = decade * ((point(at) + point(at + 1)) / 2.0);
                map.extend([value, -value]);
            }
        }
        map.sort_by(f32::total_cmp);
        std::array::from_fn(|at| map[at])
    });
    &MAP
}

/// The mean as torch takes it of contiguous float32 values in one thread with AVX2: eight lanes times four rows, each
/// summed through four levels. Sums of 32768 and more values depend on the number of threads there, and all on the
/// width of the vectors: no order is the library's own.
fn mean(values: &[f32]) -> f32 {
    if values.is_empty() {
        return 0.0;
    }
    let lanes = if values.len() < LANES { 1 } else { LANES };
    let (vectors, rest) = values.split_at(values.len() / lanes * lanes);
    let count = vectors.len() / lanes;
    let rows = count / ROWS;
    let mut sums = cascade(&vectors[..rows * ROWS * lanes], ROWS * lanes);
    for vector in vectors[rows * ROWS * lanes..].chunks(lanes) {
        sums.iter_mut().zip(vector).for_each(|(sum, value)| *sum += value);
    }
    for row in 1..ROWS {
        for lane in 0..lanes {
            sums[lane] += sums[row * lanes + lane];
        }
    }
    let mut total = 0.0;
    rest.iter().chain(&sums[..lanes]).for_each(|value| total += value);
    total / values.len() as f32
}

const LANES: usize = 8;
const ROWS: usize = 4;
const LEVELS: usize = 4;

/// Sums of columns of a matrix `width` wide.
fn cascade(matrix: &[f32], width: usize) -> Vec<f32> {
    let size = matrix.len() / width;
    let power = (size.max(2).next_power_of_two().ilog2() as usize / LEVELS).max(4);
    let step = 1 << power;
    let mut levels = vec![vec![0.0; width]; LEVELS];
    let add = |sums: &mut [f32], row: &[f32]| sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
    let mut rows = matrix.chunks_exact(width);
    let mut done = 0;
    while done + step <= size {
        rows.by_ref().take(step).for_each(|row| add(&mut levels[0], row));
        done += step;
        for level in 1..LEVELS {
            let (below, above) = levels.split_at_mut(level);
            let below = &mut below[level - 1];
            add(&mut above[0], below);
            below.fill(0.0);
            if done & ((step - 1) << (level * power)) != 0 {
                break;
            }
        }
    }
    rows.for_each(|row| add(&mut levels[0], row));
    let (first, others) = levels.split_at_mut(1);
    others.iter().for_each(|level| add(&mut first[0], level));
    levels.swap_remove(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_factor_is_its_own_mean() {
        let nested = Nested::new(&[0.75]);
        assert_eq!((nested.offset, nested.absmax[0], nested.factors()[0]), (0.75, 0.0, 0.75));
        assert_eq!(Nested::new(&[]).factors(), [0f32; 0]);
    }

    #[test]
    fn codes_are_those_of_the_nearest_value() {
        let map = dynamic_map();
        assert!(map.is_sorted());
        for code in 0..256 {
            assert_eq!(usize::from(nearest(map, map[code], 1.0)), code);
            if code > 0 {
                let middle = (f64::from(map[code - 1]) + f64::from(map[code])) / 2.0;
                assert!(usize::from(nearest(map, middle as f32, 1.0)).abs_diff(code) <= 1);
            }
        }
    }
}
