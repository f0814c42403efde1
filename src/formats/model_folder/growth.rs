//! Embeddings of new tokens, as transformers' `resize_token_embeddings` draws them: from a normal distribution with the
//! mean of the old rows and a small part of their covariance, so that a new token begins as likely as an average one.

use rayon::prelude::*;

use crate::{
    error::Result,
    formats::{HostTensor, stored::StoredTensor},
    rng::Rng,
};

/// What of the covariance transformers takes (4.46 and later).
const COVARIANCE: f64 = 1e-9;
/// Bytes of old rows held at a time.
const CHUNK: usize = 32 << 20;

/// `count` new rows [count, D] after those of `tensor` [V, D].
///
/// With the old rows x_i, their mean m and z_i standard normal, m + sqrt(c / V) sum_i z_i (x_i - m) has mean m and
/// covariance c times theirs: no covariance matrix is ever made.
pub(super) fn new_rows(tensor: &StoredTensor, count: usize, seed: u64, name: &str) -> Result<HostTensor> {
    let (rows, columns) = (tensor.rows(), tensor.columns());
    let mut mean = vec![0f64; columns];
    for range in tensor.row_chunks(CHUNK) {
        for row in tensor.rows_f32(range)?.chunks_exact(columns.max(1)) {
            mean.iter_mut().zip(row).for_each(|(mean, &value)| *mean += f64::from(value));
        }
    }
    mean.iter_mut().for_each(|mean| *mean /= rows as f64);

    let mut sums = vec![vec![0f64; columns]; count];
    let mut draws: Vec<Rng> = (0..count).map(|row| Rng::named(seed, &format!("{name}.new.{row}"))).collect();
    for range in tensor.row_chunks(CHUNK) {
        let values = tensor.rows_f32(range)?;
        sums.par_iter_mut().zip(&mut draws).for_each(|(sum, rng)| {
            for row in values.chunks_exact(columns.max(1)) {
                let z = f64::from(rng.normal());
                for ((sum, &value), mean) in sum.iter_mut().zip(row).zip(&mean) {
                    *sum += z * (f64::from(value) - mean);
                }
            }
        });
    }
    let scale = (COVARIANCE / rows as f64).sqrt();
    let data = sums.iter().flat_map(|sum| sum.iter().zip(&mean).map(|(sum, mean)| (mean + scale * sum) as f32));
    Ok(HostTensor::new([count, columns], data.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scaled back, many draws have the mean and the covariance of the old rows.
    #[test]
    fn new_rows_are_distributed_as_the_old_ones() {
        let mut rng = Rng::new(3, 0);
        // Two columns that go together, one alone.
        let old: Vec<f32> = (0..400)
            .flat_map(|_| {
                let (a, b) = (rng.normal(), rng.normal());
                [1.0 + a, -2.0 + 0.5 * a, 3.0 * b]
            })
            .collect();
        let old = HostTensor::new([400, 3], old);
        let stored = StoredTensor::host("w", "memory", &old);
        let count = 4000;
        let new = new_rows(&stored, count, 1, "w").unwrap();
        let moments = |tensor: &HostTensor, scale: f64| {
            let rows = tensor.shape[0] as f64;
            let mean: Vec<f64> = (0..3)
                .map(|c| tensor.data.iter().skip(c).step_by(3).map(|&x| f64::from(x)).sum::<f64>() / rows)
                .collect();
            let covariance = |i: usize, j: usize| {
                let products =
                    tensor.data.chunks(3).map(|r| (f64::from(r[i]) - mean[i]) * (f64::from(r[j]) - mean[j]) * scale);
                products.sum::<f64>() / rows
            };
            (mean.clone(), [covariance(0, 0), covariance(0, 1), covariance(1, 1), covariance(2, 2), covariance(0, 2)])
        };
        let ((old_mean, old_covariance), (new_mean, new_covariance)) =
            (moments(&old, 1.0), moments(&new, 1.0 / COVARIANCE));
        for (old, new) in old_mean.iter().zip(&new_mean) {
            assert!((old - new).abs() < 1e-4, "{old} and {new}");
        }
        for (old, new) in old_covariance.iter().zip(&new_covariance) {
            assert!((old - new).abs() < 0.1 * old.abs().max(2.0), "{old_covariance:?} and {new_covariance:?}");
        }
        assert_eq!(new, new_rows(&stored, count, 1, "w").unwrap());
        assert_ne!(new, new_rows(&stored, count, 2, "w").unwrap());
    }
}
