//! Pillow's resampling, byte for byte: two integer passes, 22-bit weights, 8 bits between them.
//!
//! No crate does this (they differ in the order of the passes and in rounding), and features of a vision tower depend
//! on it. The method is that of Pillow's `libImaging/Resample.c`.

use std::ops::Range;

use image::RgbImage;

/// Fraction bits of the weights: 32 less 8 for a pixel and 2 for sums that leave its range.
const PRECISION_BITS: u32 = 22;

/// A resampling filter, numbered as Pillow and `preprocessor_config.json` number them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    Nearest = 0,
    Lanczos = 1,
    Bilinear = 2,
    Bicubic = 3,
    Box = 4,
    Hamming = 5,
}

impl Filter {
    pub fn from_number(number: u64) -> Option<Self> {
        [Self::Nearest, Self::Lanczos, Self::Bilinear, Self::Bicubic, Self::Box, Self::Hamming]
            .get(usize::try_from(number).ok()?)
            .copied()
    }

    /// Half the width of the filter, in source pixels when enlarging.
    fn support(self) -> f64 {
        match self {
            Self::Nearest => 0.0,
            Self::Box => 0.5,
            Self::Bilinear | Self::Hamming => 1.0,
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        let sinc = |x: f64| if x == 0.0 { 1.0 } else { (x * std::f64::consts::PI).sin() / (x * std::f64::consts::PI) };
        let t = x.abs();
        match self {
            Self::Nearest => 0.0,
            Self::Box => f64::from(u8::from(x > -0.5 && x <= 0.5)),
            Self::Bilinear => (1.0 - t).max(0.0),
            Self::Hamming if t == 0.0 => 1.0,
            Self::Hamming if t >= 1.0 => 0.0,
            Self::Hamming => {
                let angle = t * std::f64::consts::PI;
                angle.sin() / angle * (0.54 + 0.46 * angle.cos())
            }
            Self::Bicubic => {
                const A: f64 = -0.5;
                if t < 1.0 {
                    ((A + 2.0) * t - (A + 3.0)) * t * t + 1.0
                } else if t < 2.0 {
                    (((t - 5.0) * t + 8.0) * t - 4.0) * A
                } else {
                    0.0
                }
            }
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Lanczos => 0.0,
        }
    }
}

/// A rectangle, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    pub x: u32,
    pub y: u32,
    pub width: u32,
    pub height: u32,
}

/// The whole picture at `width` x `height`.
pub fn resize(picture: &RgbImage, width: u32, height: u32, filter: Filter) -> RgbImage {
    resize_region(picture, width, height, filter, Region { x: 0, y: 0, width, height })
}

/// The `region` of the picture resized to `width` x `height`; nothing outside it is computed.
///
/// The region lies inside the resized picture; no side is zero.
pub fn resize_region(picture: &RgbImage, width: u32, height: u32, filter: Filter, region: Region) -> RgbImage {
    debug_assert!(region.x + region.width <= width && region.y + region.height <= height);
    let columns = region.x..region.x + region.width;
    let rows = region.y..region.y + region.height;
    if filter == Filter::Nearest {
        let columns = nearest(picture.width(), width, columns);
        let rows = nearest(picture.height(), height, rows);
        return RgbImage::from_fn(region.width, region.height, |x, y| {
            *picture.get_pixel(columns[x as usize], rows[y as usize])
        });
    }
    let columns = windows(picture.width(), width, columns, filter);
    let rows = windows(picture.height(), height, rows, filter);
    let (source, source_width) = (picture.as_raw().as_slice(), picture.width() as usize);
    // Only what the second pass reads goes through the first.
    let out = if vertical_first(picture.dimensions(), (width, height)) {
        let (left, right) = extent(&columns);
        let middle = vertical(source, source_width, left..right, &rows, 0);
        horizontal(&middle, right - left, 0..rows.len(), &columns, left)
    } else {
        let (top, bottom) = extent(&rows);
        let middle = horizontal(source, source_width, top..bottom, &columns, 0);
        vertical(&middle, columns.len(), 0..columns.len(), &rows, top)
    };
    let mut result = RgbImage::new(region.width, region.height);
    result.copy_from_slice(&out);
    result
}

/// Which pass comes first matters, for the values between them are cut to 8 bits. Old Pillows always began with the
/// horizontal one; Pillow 13 begins with the vertical one where it takes away more than twice as many pixels (found by
/// trying sizes; among pictures that keep their shape, that is those more than twice as high as wide, made smaller).
fn vertical_first((width, height): (u32, u32), (new_width, new_height): (u32, u32)) -> bool {
    let rows_less = i64::from(height) - i64::from(new_height);
    let columns_less = i64::from(width) - i64::from(new_width);
    rows_less > 0 && rows_less > 2 * columns_less
}

/// Resamples the given rows of a picture of `width`; `offset` is the column at which `source` begins.
fn horizontal(source: &[u8], width: usize, rows: Range<usize>, columns: &[Window], offset: usize) -> Vec<u8> {
    let stride = columns.len() * 3;
    let mut out = vec![0; rows.len() * stride];
    let lines = source.chunks_exact(width * 3).skip(rows.start);
    for (line, out) in lines.zip(out.chunks_exact_mut(stride)) {
        for (window, pixel) in columns.iter().zip(out.chunks_exact_mut(3)) {
            let mut sums = [1_i32 << (PRECISION_BITS - 1); 3];
            for (weight, source) in window.weights.iter().zip(line[(window.start - offset) * 3..].chunks_exact(3)) {
                for (sum, &value) in sums.iter_mut().zip(source) {
                    *sum += weight * i32::from(value);
                }
            }
            pixel.copy_from_slice(&sums.map(clip));
        }
    }
    out
}

/// Resamples the given columns of a picture of `width`; `offset` is the row at which `source` begins.
fn vertical(source: &[u8], width: usize, columns: Range<usize>, rows: &[Window], offset: usize) -> Vec<u8> {
    let stride = columns.len() * 3;
    let mut out = vec![0; rows.len() * stride];
    let mut sums = vec![0_i32; stride];
    for (window, out) in rows.iter().zip(out.chunks_exact_mut(stride)) {
        sums.fill(1 << (PRECISION_BITS - 1));
        let lines = source.chunks_exact(width * 3).skip(window.start - offset);
        for (weight, line) in window.weights.iter().zip(lines) {
            for (sum, &value) in sums.iter_mut().zip(&line[columns.start * 3..columns.end * 3]) {
                *sum += weight * i32::from(value);
            }
        }
        out.iter_mut().zip(&sums).for_each(|(value, &sum)| *value = clip(sum));
    }
    out
}

/// The first source position that windows read, and the one after the last.
fn extent(windows: &[Window]) -> (usize, usize) {
    let start = windows.iter().map(|window| window.start).min().unwrap_or(0);
    let end = windows.iter().map(|window| window.start + window.weights.len()).max().unwrap_or(0);
    (start, end)
}

fn clip(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// The source pixels of one target pixel, and their fixed-point weights.
struct Window {
    start: usize,
    weights: Vec<i32>,
}

fn windows(source: u32, target: u32, range: Range<u32>, filter: Filter) -> Vec<Window> {
    if source == target {
        // Pillow leaves this pass out.
        return range.map(|at| Window { start: at as usize, weights: vec![1 << PRECISION_BITS] }).collect();
    }
    let scale = f64::from(source) / f64::from(target);
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    let shrink = 1.0 / stretch;
    range
        .map(|at| {
            let centre = (f64::from(at) + 0.5) * scale;
            // Truncation towards zero, as the C casts do; both ends are then kept inside the picture.
            let start = ((centre - support + 0.5) as i64).max(0) as usize;
            let end = ((centre + support + 0.5) as i64).min(i64::from(source)) as usize;
            let mut weights: Vec<f64> =
                (start..end).map(|x| filter.weight((x as f64 - centre + 0.5) * shrink)).collect();
            let total: f64 = weights.iter().sum();
            if total != 0.0 {
                weights.iter_mut().for_each(|weight| *weight /= total);
            }
            let one = f64::from(1_u32 << PRECISION_BITS);
            let fixed =
                |weight: f64| if weight < 0.0 { (weight * one - 0.5) as i32 } else { (weight * one + 0.5) as i32 };
            Window { start, weights: weights.into_iter().map(fixed).collect() }
        })
        .collect()
}

/// The source position of each target position; Pillow adds up the step, so the same roundings happen here.
fn nearest(source: u32, target: u32, range: Range<u32>) -> Vec<u32> {
    let step = f64::from(source) / f64::from(target);
    let mut at = step * 0.5;
    let mut positions = Vec::with_capacity(range.len());
    for index in 0..range.end {
        if index >= range.start {
            positions.push((at as u32).min(source - 1));
        }
        at += step;
    }
    positions
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gradient(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| image::Rgb([x as u8, y as u8, (x + y) as u8]))
    }

    #[test]
    fn the_same_size_changes_nothing() {
        let picture = gradient(31, 17);
        for filter in [Filter::Bicubic, Filter::Bilinear, Filter::Lanczos, Filter::Nearest] {
            assert_eq!(resize(&picture, 31, 17, filter), picture);
        }
    }

    #[test]
    fn a_region_is_a_part_of_the_whole() {
        let picture = gradient(300, 91);
        for filter in [Filter::Bicubic, Filter::Box, Filter::Hamming, Filter::Nearest] {
            let whole = resize(&picture, 97, 140, filter);
            let region = Region { x: 13, y: 40, width: 60, height: 77 };
            let part = resize_region(&picture, 97, 140, filter, region);
            let cropped = image::imageops::crop_imm(&whole, 13, 40, 60, 77).to_image();
            assert_eq!(part, cropped);
        }
    }

    #[test]
    fn constant_pictures_stay_constant() {
        let picture = RgbImage::from_pixel(50, 20, image::Rgb([122, 116, 104]));
        for filter in [Filter::Bicubic, Filter::Bilinear, Filter::Lanczos, Filter::Box, Filter::Hamming] {
            assert!(resize(&picture, 33, 47, filter).pixels().all(|pixel| pixel.0 == [122, 116, 104]));
        }
    }
}
