//! `loss.svg`: the loss of every logged step, faint, and a smoothed line through it.
//!
//! The picture is complete in itself and readable on light and dark pages: a style inside it swaps the colours.

use super::events::StepMetrics;
use crate::error::{Error, Result};
use crate::formats::atomic::write_file;
use plotters::prelude::*;
use std::path::Path;

/// plotters rounds to whole units; two to a pixel keep the lines smooth.
const SCALE: u32 = 2;
const SIZE: (u32, u32) = (860 * SCALE, 380 * SCALE);
/// More points than pixels only make the file larger.
const MOST_POINTS: usize = 1500;
const INK: RGBColor = RGBColor(0x33, 0x3A, 0x45);
const GRID: RGBColor = RGBColor(0xE3, 0xE6, 0xEB);
const LINE: RGBColor = RGBColor(0x1F, 0x6F, 0xEB);
/// The same colours on a dark page, matched by the attributes that plotters writes, and a page of its own.
const STYLE: &str = "<style>@media (prefers-color-scheme: dark) { .loss-curve .page { fill: #0D1117 } \
    .loss-curve [fill=\"#333A45\"] { fill: #C9D1D9 } .loss-curve [stroke=\"#333A45\"] { stroke: #C9D1D9 } \
    .loss-curve [stroke=\"#E3E6EB\"] { stroke: #30363D } .loss-curve [stroke=\"#1F6FEB\"] { stroke: #6CB0FF } }</style>\
    <rect class=\"page\" width=\"100%\" height=\"100%\" fill=\"#FFFFFF\"/>";

/// The curve as an SVG document. With no step there are only the axes.
///
/// # Errors
/// [`ErrorKind::Failed`](crate::error::ErrorKind::Failed): the picture cannot be drawn.
pub fn loss_svg(title: &str, metrics: &[StepMetrics]) -> Result<String> {
    let raw: Vec<(f64, f64)> = metrics.iter().filter(|m| m.loss.is_finite()).map(|m| (m.step as f64, m.loss)).collect();
    let smooth = smoothed(&raw);
    let mut svg = String::new();
    draw(title, &thinned(&raw), &thinned(&smooth), &mut svg)
        .map_err(|error| Error::failed("cannot draw the loss curve").caused_by(error.to_string()))?;
    // A class for the style to hold on to, a name for screen readers, and a size that follows the page.
    let opening = format!("<svg class=\"loss-curve\" role=\"img\" aria-label=\"{}\" ", super::report::escape(title));
    let (width, height) = (SIZE.0 / SCALE, SIZE.1 / SCALE);
    let svg = svg
        .replacen("<svg ", &opening, 1)
        .replacen(&format!("width=\"{}\"", SIZE.0), &format!("width=\"{width}\""), 1)
        .replacen(&format!("height=\"{}\"", SIZE.1), &format!("height=\"{height}\""), 1);
    Ok(match svg.find('>') {
        Some(end) => format!("{}{STYLE}{}", &svg[..=end], &svg[end + 1..]),
        None => svg,
    })
}

/// Writes [`loss_svg`] to `path`.
pub fn write_loss_svg(path: &Path, title: &str, metrics: &[StepMetrics]) -> Result<()> {
    write_file(path, loss_svg(title, metrics)?.as_bytes())
}

type DrawResult = std::result::Result<(), Box<dyn std::error::Error>>;

fn draw(title: &str, raw: &[(f64, f64)], smooth: &[(f64, f64)], svg: &mut String) -> DrawResult {
    let (low, high) = loss_range(raw);
    let first = raw.first().map_or(0.0, |point| point.0);
    let last = raw.last().map_or(1.0, |point| point.0).max(first + 1.0);
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    let font = |size: u32| ("system-ui, 'DejaVu Sans', sans-serif", size * SCALE).into_font().color(&INK);
    let mut chart = ChartBuilder::on(&root)
        .caption(title, font(18))
        .margin(12 * SCALE)
        .margin_right(24 * SCALE)
        .x_label_area_size(44 * SCALE)
        .y_label_area_size(64 * SCALE)
        .build_cartesian_2d(first..last, low..high)?;
    let digits = decimals(high - low);
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .axis_style(INK)
        .label_style(font(13))
        .axis_desc_style(font(14))
        .x_desc("step")
        .y_desc("loss (nats per token)")
        .x_labels(10)
        .y_labels(7)
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&|loss| format!("{loss:.digits$}"))
        .draw()?;
    chart.draw_series(LineSeries::new(raw.iter().copied(), LINE.mix(0.3).stroke_width(SCALE)))?;
    chart.draw_series(LineSeries::new(smooth.iter().copied(), LINE.stroke_width(2 * SCALE)))?;
    root.present()?;
    // The area borrows `svg`; it must be gone before the text is read.
    Ok(())
}

/// The axis: from 0 where the curve comes near it, else from a little below; without the few first steps' peak cut off.
fn loss_range(raw: &[(f64, f64)]) -> (f64, f64) {
    let low = raw.iter().map(|point| point.1).fold(f64::INFINITY, f64::min);
    let high = raw.iter().map(|point| point.1).fold(f64::NEG_INFINITY, f64::max);
    if !low.is_finite() || !high.is_finite() {
        return (0.0, 1.0);
    }
    let margin = ((high - low) * 0.05).max(high.abs() * 1e-3).max(1e-6);
    let floor = if low >= 0.0 && low < high * 0.4 { 0.0 } else { low - margin };
    (floor, high + margin)
}

/// Decimals that tell the labels of an axis of this length apart.
fn decimals(length: f64) -> usize {
    (1.0 - length.max(1e-9).log10().floor()).clamp(0.0, 8.0) as usize
}

/// Exponential means with a memory of a fortieth of the curve, forwards and then backwards, so that the line does not
/// lag behind a falling loss.
fn smoothed(raw: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let decay = 1.0 - 1.0 / (raw.len() as f64 / 40.0).max(2.0);
    let mut line = raw.to_vec();
    for _ in 0..2 {
        // Divided by the weights so far, as Adam corrects its moments: no pull towards 0 at the start.
        let (mut mean, mut weight) = (0.0, 0.0);
        for point in &mut line {
            mean = decay * mean + (1.0 - decay) * point.1;
            weight = decay * weight + (1.0 - decay);
            point.1 = mean / weight;
        }
        line.reverse();
    }
    line
}

/// At most about [`MOST_POINTS`] points: of each stretch its lowest and its highest, so that no spike is lost.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= MOST_POINTS {
        return points.to_vec();
    }
    let stretch = (2 * points.len()).div_ceil(MOST_POINTS);
    let mut kept = Vec::with_capacity(MOST_POINTS + 2);
    for part in points.chunks(stretch) {
        let lowest = part.iter().copied().min_by(|a, b| a.1.total_cmp(&b.1));
        let highest = part.iter().copied().max_by(|a, b| a.1.total_cmp(&b.1));
        let mut pair: Vec<(f64, f64)> = lowest.into_iter().chain(highest).collect();
        pair.sort_by(|a, b| a.0.total_cmp(&b.0));
        pair.dedup();
        kept.extend(pair);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::{super::metrics::example, *};

    #[test]
    fn a_curve_of_any_length_is_a_small_svg() {
        for steps in [0, 1, 2, 40, 20_000] {
            let metrics: Vec<StepMetrics> =
                (1..=steps).map(|step| example(step, 3.0 * (-(step as f64) / 50.0).exp() + 0.2)).collect();
            let svg = loss_svg("loss of <pretrain>", &metrics).unwrap();
            assert!(svg.starts_with("<svg class=\"loss-curve\"") && svg.trim_end().ends_with("</svg>"));
            assert!(svg.contains("&lt;pretrain&gt;") && !svg.contains("<pretrain>"));
            assert!(svg.len() < 120_000, "{} bytes for {steps} steps", svg.len());
        }
    }

    #[test]
    fn a_loss_that_is_no_number_leaves_a_gap_only() {
        let metrics = [example(1, f64::NAN), example(2, 1.0), example(3, 1.0)];
        assert!(!loss_svg("loss", &metrics).unwrap().contains("NaN"));
    }

    #[test]
    fn smoothing_keeps_a_constant_and_thinning_keeps_a_spike() {
        let flat: Vec<(f64, f64)> = (0..5000).map(|step| (step as f64, 2.0)).collect();
        assert!(smoothed(&flat).iter().all(|point| (point.1 - 2.0).abs() < 1e-9));
        let mut spiked = flat;
        spiked[1234].1 = 9.0;
        let kept = thinned(&spiked);
        assert!(kept.len() <= MOST_POINTS + 2 && kept.iter().any(|point| point.1 == 9.0));
    }
}
