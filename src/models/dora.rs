//! DoRA's lengths of rows: those that adapted weights have, which follow every change of A and B, and those that they
//! are given, which start as the former and train.

use super::llava::Llava;
use crate::{
    nn::{Dora, Id, Lora, Parameters},
    ops::{
        cast,
        dora::row_norms,
        matmul::{Epilogue, Layout, product_into},
        nf4,
    },
    tensor::{ALIGNMENT, Dtype, Tensor},
};

/// What the names of such magnitudes end in.
const MAGNITUDE: &str = ".lora_magnitude_vector";

/// Bytes of an adapted weight that are computed at a time.
const NORM_BYTES: usize = 64 << 20;

/// The parameter name of an adapted module's magnitudes.
pub fn magnitude_name(module: &str) -> String {
    format!("{module}{MAGNITUDE}")
}

/// Makes DoRA of every plain LoRA on the decoder, with the lengths that the adapted rows have as their magnitudes: what
/// the model computes stays as it is.
pub fn start(model: &mut Llava) {
    let Llava { language, parameters, .. } = model;
    let streaming = language.streaming().cloned();
    for (index, layer) in language.layers_mut().iter_mut().enumerate() {
        for (name, linear) in layer.linears_mut() {
            let Some(lora) = linear.lora.as_mut().filter(|lora| lora.dora.is_none()) else { continue };
            streaming.iter().for_each(|streaming| streaming.bring(index, Some(index + 1)));
            let norm = norm(parameters, linear.weight, lora);
            let magnitude = Tensor::empty(norm.gpu(), norm.shape());
            magnitude.copy_from(&norm);
            let name = magnitude_name(&format!("language_model.model.layers.{index}.{name}"));
            lora.dora = Some(Dora { magnitude: parameters.insert(name, magnitude), norm });
        }
    }
}

/// Whether a model has such lengths.
pub fn is_in(model: &Llava) -> bool {
    model.parameters.iter().any(|parameter| parameter.name.ends_with(MAGNITUDE))
}

/// Computes the norms again, after A and B have changed.
pub fn update_norms(model: &mut Llava) {
    let Llava { language, parameters, .. } = model;
    let streaming = language.streaming().cloned();
    for (index, layer) in language.layers_mut().iter_mut().enumerate() {
        for (_, linear) in layer.linears_mut() {
            if let Some(lora) = &linear.lora
                && let Some(dora) = &lora.dora
            {
                streaming.iter().for_each(|streaming| streaming.bring(index, Some(index + 1)));
                write_norm(parameters, linear.weight, lora, &dora.norm, NORM_BYTES);
            }
        }
    }
}

/// The lengths [N] of the rows of W + scale * B A.
pub(super) fn norm(parameters: &Parameters, weight: Id, lora: &Lora) -> Tensor {
    let w = &parameters.get(weight).value;
    let norm = Tensor::empty(w.gpu(), &[w.rows()]);
    write_norm(parameters, weight, lora, &norm, NORM_BYTES);
    norm
}

/// Writes [`norm`] with about `bytes` of the adapted weight held at a time.
fn write_norm(parameters: &Parameters, weight: Id, lora: &Lora, norm: &Tensor, bytes: usize) {
    let value = |id: Id| &parameters.get(id).value;
    let (n, k) = (value(weight).rows(), value(weight).cols());
    let step = (bytes / 4 / k.max(1) / ALIGNMENT).max(1) * ALIGNMENT;
    for first in (0..n).step_by(step) {
        let rows = step.min(n - first);
        let adapted = weight_rows(parameters, weight, first, rows);
        let add_scaled = Epilogue { alpha: Some(lora.scale), accumulate: true, ..Default::default() };
        product_into(Layout::Nn, &value(lora.b).row_part(first, rows), value(lora.a), &adapted, add_scaled);
        row_norms(&adapted, &norm.part(first, &[rows]));
    }
}

/// A copy of rows of a weight as f32, however the weight is kept.
pub(super) fn weight_rows(parameters: &Parameters, weight: Id, first: usize, rows: usize) -> Tensor {
    let weight = &parameters.get(weight).value;
    let (cols, copy) = (weight.cols(), Tensor::empty(weight.gpu(), &[rows, weight.cols()]));
    match weight.dtype() {
        Dtype::F32 => copy.copy_rows(0, weight, first, rows),
        Dtype::Quantized(_) => nf4::dequantize_into(weight, &nf4::factors(weight), first * cols, &copy, 0, rows * cols),
        _ => cast::cast_into(weight, first * cols, &copy, 0, rows * cols),
    }
    copy
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        formats::{HostTensor, peft::LoraWeights},
        gpu::{AdapterOptions, Gpu},
        ops::Random,
        quant::QuantType,
    };

    fn length(row: &[f32]) -> f64 {
        row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt()
    }

    #[test]
    fn norms_are_the_same_however_few_rows_are_held_and_however_the_weight_is_kept() {
        let gpu = Gpu::open(&AdapterOptions::default()).unwrap();
        let mut random = Random::new(3);
        let (w, (a, ta), (b, tb)) =
            (random.values(150 * 70), random.tensor(&gpu, &[3, 70]), random.tensor(&gpu, &[150, 3]));
        let host = LoraWeights::new(HostTensor::new([3, 70], a), HostTensor::new([150, 3], b), 0.5);
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            let bytes = dtype.narrow(&w);
            let mut parameters = Parameters::default();
            let weight = parameters.insert("w", Tensor::from_bytes(&gpu, dtype, &bytes, &[150, 70]));
            let (a, b) = (parameters.insert("a", ta.clone()), parameters.insert("b", tb.clone()));
            let lora = Lora { a, b, scale: 0.5, dropout: 0.0, stream: 0, bias: None, dora: None };
            let whole = norm(&parameters, weight, &lora).to_vec().unwrap();
            let parts = Tensor::empty(&gpu, &[150]);
            write_norm(&parameters, weight, &lora, &parts, 1);
            assert_eq!(parts.to_vec().unwrap(), whole);
            let mut merged: Vec<f32> = dtype.widen(&bytes);
            host.merge_rows(0, &mut merged);
            for (row, &got) in merged.chunks(70).zip(&whole) {
                assert!((f64::from(got) - length(row)).abs() <= 1e-5, "{dtype:?}: {got} for {}", length(row));
            }
        }
        let four_bits = nf4::quantized(&gpu, QuantType::Nf4, true, &w, &[150, 70]).unwrap();
        let mut merged = four_bits.to_vec().unwrap();
        let mut parameters = Parameters::default();
        let weight = parameters.insert("w", four_bits);
        let (a, b) = (parameters.insert("a", ta), parameters.insert("b", tb));
        let lora = Lora { a, b, scale: 0.5, dropout: 0.0, stream: 0, bias: None, dora: None };
        let lengths = norm(&parameters, weight, &lora).to_vec().unwrap();
        host.merge_rows(0, &mut merged);
        for (row, &got) in merged.chunks(70).zip(&lengths) {
            assert!((f64::from(got) - length(row)).abs() <= 1e-5, "four bits: {got} for {}", length(row));
        }
        // The host's DoRA gives rows the lengths that it is told.
        let mut dora = host;
        dora.magnitude = Some(HostTensor::filled([150], 2.0));
        let mut merged = w;
        dora.merge_rows(0, &mut merged);
        assert!(merged.chunks(70).all(|row| (length(row) - 2.0).abs() <= 1e-5));
    }
}
