//! CLIP's position embeddings for pictures of another size: the grid of patches stretched bicubically, as transformers'
//! `interpolate_pos_encoding` does (PyTorch: `interpolate(mode="bicubic", align_corners=False)`, no antialiasing).

use super::ModelFolder;
use crate::{
    error::{Error, Result},
    formats::HostTensor,
    models::{config::ModelConfig, names},
};

/// PyTorch's sharpness of the cubic; Pillow's is -0.5.
const A: f32 = -0.75;

/// Pixels a side, at most.
const MAX_SIZE: usize = 1 << 12;

impl ModelFolder {
    /// The same model for pictures of `size` x `size` pixels. A plain LLaMA, and a size that is the tower's, are left
    /// as they are.
    ///
    /// # Errors
    /// `Usage`: the tower's patches do not fill such a picture.
    pub fn with_image_size(mut self, size: usize) -> Result<Self> {
        let ModelConfig::Llava(llava) = &mut self.config else { return Ok(self) };
        let vision = &mut llava.vision_config;
        if vision.image_size == size {
            return Ok(self);
        }
        if size > MAX_SIZE {
            return Err(Error::usage(format!(
                "pictures of {size} pixels are larger than {MAX_SIZE}, the largest taken"
            )));
        }
        if size == 0 || !size.is_multiple_of(vision.patch_size) {
            let message = format!("pictures of {size} pixels are not whole patches of {}", vision.patch_size);
            return Err(Error::usage(message).hint(format!("choose a multiple of {}", vision.patch_size)));
        }
        vision.image_size = size;
        let grid = size / vision.patch_size;
        let resized = resized(&self.tensor(names::POSITION_EMBEDDING)?, grid);
        self.replaced.insert(names::POSITION_EMBEDDING.to_owned(), resized);
        Ok(self)
    }
}

/// Embeddings [1 + s * s, D] of a class token and a grid as [1 + grid * grid, D].
fn resized(embeddings: &HostTensor, grid: usize) -> HostTensor {
    let (rows, width) = (embeddings.shape[0], embeddings.shape[1]);
    let side = (rows - 1).isqrt();
    let (class, patches) = embeddings.data.split_at(width);
    let taps = taps(side, grid);
    let mut data = class.to_vec();
    for (row_taps, column_taps) in taps.iter().flat_map(|row| taps.iter().map(move |column| (row, column))) {
        let mut sum = vec![0f32; width];
        for &(row, row_weight) in row_taps {
            for &(column, column_weight) in column_taps {
                let from = &patches[(row * side + column) * width..][..width];
                sum.iter_mut().zip(from).for_each(|(sum, value)| *sum += row_weight * column_weight * value);
            }
        }
        data.extend(sum);
    }
    HostTensor::new([1 + grid * grid, width], data)
}

/// For each of `to` places, the four of `from` that it is made of, and their weights; places beyond the edge are the
/// edge's.
fn taps(from: usize, to: usize) -> Vec<[(usize, f32); 4]> {
    let scale = from as f32 / to as f32;
    let near = |x: f32| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
    let far = |x: f32| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A;
    let tap = |place: usize| {
        let at = scale * (place as f32 + 0.5) - 0.5;
        let (first, t) = (at.floor(), at - at.floor());
        let weights = [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)];
        std::array::from_fn(|n| ((first as isize - 1 + n as isize).clamp(0, from as isize - 1) as usize, weights[n]))
    };
    (0..to).map(tap).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// torch 2.15, `interpolate(arange(9).reshape(1, 1, 3, 3).float(), size=(n, n), mode="bicubic")`.
    #[test]
    fn grids_are_those_of_pytorch() {
        let grid: Vec<f32> = [-7.0].into_iter().chain((0..9).map(|value| value as f32)).collect();
        let embeddings = HostTensor::new([10, 1], grid);
        for (size, expected) in [(2, &TWO[..]), (5, &FIVE[..]), (3, &THREE[..])] {
            let found = resized(&embeddings, size);
            assert_eq!(found.shape, [1 + size * size, 1]);
            assert_eq!(found.data[0], -7.0);
            for (found, expected) in found.data[1..].iter().zip(expected) {
                assert!((f64::from(*found) - expected).abs() < 1e-5, "{size}: {found} for {expected}");
            }
        }
    }

    const TWO: [f64; 4] = [0.765625, 2.3828125, 5.6171875, 7.234375];
    const THREE: [f64; 9] = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
    #[rustfmt::skip]
    const FIVE: [f64; 25] = [
        -0.38399985, 0.028000668, 0.71200025, 1.3960004, 1.8080006, 0.8520015, 1.2640017, 1.9480014, 2.6320012,
        3.0440018, 2.9040003, 3.3160002, 4.0, 4.684, 5.0960007, 4.9560003, 5.368, 6.052, 6.7360005, 7.148001, 6.192002,
        6.6040006, 7.2880011, 7.9720025, 8.3840017,
    ];
}
