//! From coefficients to samples to colours, with libjpeg-turbo's rounding.

use super::{Component, ZIGZAG};

impl Component {
    /// A block's coefficients (not in zigzag order), made into its samples: libjpeg's `jpeg_idct_islow`.
    pub fn transform(&mut self, block: usize, coefficients: &[i16; 64]) -> Option<()> {
        let quantisation = self.quantisation?;
        let mut work = [0; 64];
        for (k, &place) in ZIGZAG.iter().enumerate() {
            work[place] = i64::from(coefficients[place]) * i64::from(quantisation[k]);
        }
        for x in 0..8 {
            let column = transformed(std::array::from_fn(|y| work[y * 8 + x]), 11);
            column.iter().enumerate().for_each(|(y, &value)| work[y * 8 + x] = value);
        }
        let stride = self.stride();
        let first = block / self.blocks_wide * 8 * stride + block % self.blocks_wide * 8;
        for (y, row) in work.chunks_exact(8).enumerate() {
            let row = transformed(std::array::from_fn(|x| row[x]), 18);
            let samples = &mut self.samples[first + y * stride..][..8];
            samples.iter_mut().zip(row).for_each(|(sample, value)| *sample = (value + 128).clamp(0, 255) as u8);
        }
        Some(())
    }

    /// Row `y` of the whole picture: libjpeg's upsampling, a triangle filter where the factor is two.
    pub fn upsampled(&self, y: usize, h_most: usize, v_most: usize, out: &mut [u8]) -> Option<()> {
        if !h_most.is_multiple_of(self.h) || !v_most.is_multiple_of(self.v) {
            return None;
        }
        let (across, down) = (h_most / self.h, v_most / self.v);
        let row = y / down;
        // The nearer of the rows above and below; the first and the last have themselves there.
        let neighbour = if y.is_multiple_of(down) { row.saturating_sub(1) } else { (row + 1).min(self.height - 1) };
        let (near, far) = (self.row(row), self.row(neighbour));
        let wide = self.width > 2;
        match (across, down) {
            (1, 1) => out[..self.width].copy_from_slice(near),
            (1, 2) => {
                let bias = if y.is_multiple_of(2) { 1 } else { 2 };
                for ((out, &near), &far) in out.iter_mut().zip(near).zip(far) {
                    *out = ((u32::from(near) * 3 + u32::from(far) + bias) >> 2) as u8;
                }
            }
            (2, 1) if wide => between(|x| u32::from(near[x]), self.width, [1, 2], 2, out),
            (2, 2) if wide => between(|x| u32::from(near[x]) * 3 + u32::from(far[x]), self.width, [8, 7], 4, out),
            _ => out.iter_mut().enumerate().take(self.width * across).for_each(|(x, out)| *out = near[x / across]),
        }
        Some(())
    }
}

/// Doubles a row: each sample weighs three times as much as its neighbour. At the ends a sample is its own neighbour.
fn between(at: impl Fn(usize) -> u32, width: usize, bias: [u32; 2], shift: u32, out: &mut [u8]) {
    for x in 0..width {
        let (left, right) = (at(x.saturating_sub(1)), at((x + 1).min(width - 1)));
        out[2 * x] = ((at(x) * 3 + left + bias[0]) >> shift) as u8;
        out[2 * x + 1] = ((at(x) * 3 + right + bias[1]) >> shift) as u8;
    }
}

/// Eight values through the transform, the sums divided by two to the `shift`.
fn transformed(x: [i64; 8], shift: u32) -> [i64; 8] {
    let z = (x[2] + x[6]) * 4433;
    let (e2, e3) = (z - x[6] * 15137, z + x[2] * 6270);
    let (e0, e1) = ((x[0] + x[4]) << 13, (x[0] - x[4]) << 13);
    let even = [e0 + e3, e1 + e2, e1 - e2, e0 - e3];

    let z = (x[7] + x[3] + x[5] + x[1]) * 9633;
    let (z1, z2) = ((x[7] + x[1]) * -7373, (x[5] + x[3]) * -20995);
    let (z3, z4) = ((x[7] + x[3]) * -16069 + z, (x[5] + x[1]) * -3196 + z);
    let odd = [x[1] * 12299 + z1 + z4, x[3] * 25172 + z2 + z3, x[5] * 16819 + z2 + z4, x[7] * 2446 + z1 + z3];

    let rounded = |sum: i64| (sum + (1 << (shift - 1))) >> shift;
    std::array::from_fn(|k| rounded(if k < 4 { even[k] + odd[k] } else { even[7 - k] - odd[7 - k] }))
}

pub fn ycc_to_rgb(y: u8, cb: u8, cr: u8) -> [u8; 3] {
    let (y, cb, cr) = (i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128);
    let half = 1 << 15;
    let red = y + ((91_881 * cr + half) >> 16);
    let green = y + ((-22_554 * cb - 46_802 * cr + half) >> 16);
    let blue = y + ((116_130 * cb + half) >> 16);
    [red, green, blue].map(|value| value.clamp(0, 255) as u8)
}

/// Pillow's conversion.
pub fn cmyk_to_rgb(cmy: [u8; 3], black: u8) -> [u8; 3] {
    let light = 255 - i32::from(black);
    cmy.map(|ink| {
        let product = i32::from(ink) * light + 128;
        (light - ((product + (product >> 8)) >> 8)).clamp(0, 255) as u8
    })
}
