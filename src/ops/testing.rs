//! What the ops' `check` functions share: random inputs and comparisons.

use crate::{gpu::Gpu, tensor::Tensor};

/// A device result beside its reference.
pub struct Comparison {
    pub what: &'static str,
    pub got: Vec<f32>,
    pub want: Vec<f64>,
    /// Largest |got - want| allowed, relative to the largest |want| (at least 1e-3).
    pub tolerance: f64,
}

impl Comparison {
    pub fn new(what: &'static str, got: Vec<f32>, want: Vec<f64>, tolerance: f64) -> Self {
        Self { what, got, want, tolerance }
    }

    /// The largest difference, over the largest reference value; infinite when lengths differ or a value is not finite.
    pub fn error(&self) -> f64 {
        if self.got.len() != self.want.len() || self.got.iter().any(|x| !x.is_finite()) {
            return f64::INFINITY;
        }
        let scale = self.want.iter().fold(1e-3f64, |scale, x| scale.max(x.abs()));
        self.got.iter().zip(&self.want).map(|(&got, want)| (f64::from(got) - want).abs() / scale).fold(0.0, f64::max)
    }
}

/// Deterministic inputs: a 64-bit mix of a running counter.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    /// Uniform in [-1, 1).
    pub fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| ((self.next() >> 40) as f32) / (1u64 << 23) as f32 - 1.0).collect()
    }

    /// Uniform in 0..below.
    pub fn indices(&mut self, n: usize, below: usize) -> Vec<u32> {
        (0..n).map(|_| (self.next() % below as u64) as u32).collect()
    }

    pub fn tensor(&mut self, gpu: &Gpu, shape: &[usize]) -> (Vec<f32>, Tensor) {
        let values = self.values(shape.iter().product());
        let tensor = Tensor::from_f32(gpu, &values, shape);
        (values, tensor)
    }
}

/// Widens a slice for a reference in f64.
pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}
