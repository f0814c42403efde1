//! What products reach on a device: a short measurement, for estimates of time.

use std::time::Instant;

use super::matmul::{Layout, product};
use crate::{error::Result, gpu::Gpu, tensor::Tensor};

/// Longer than the overhead of a submission, by far.
const ENOUGH: f64 = 0.1;
const LARGEST: usize = 4096;

/// Floating-point operations a second of a square f32 product, the best of a few runs.
///
/// # Errors
/// Whatever fails on the device.
pub fn products(gpu: &Gpu) -> Result<f64> {
    let mut size = 256;
    loop {
        let shape = [size, size];
        let (a, b) = (Tensor::empty(gpu, &shape), Tensor::empty(gpu, &shape));
        super::elementwise::fill(&a, 0.5);
        super::elementwise::fill(&b, 0.5);
        // The first run compiles.
        drop(product(Layout::Nt, &a, &b));
        gpu.sync()?;
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            let started = Instant::now();
            drop(product(Layout::Nt, &a, &b));
            gpu.sync()?;
            best = best.min(started.elapsed().as_secs_f64());
        }
        if best > ENOUGH || size >= LARGEST {
            gpu.trim();
            return Ok(2.0 * (size as f64).powi(3) / best);
        }
        size *= 2;
    }
}
