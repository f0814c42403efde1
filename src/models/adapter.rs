//! LoRA adapters on a loaded model: put on, read back, folded in.

use super::{llava::Llava, names};
use crate::{
    error::{Error, Result},
    formats::{
        HostTensor,
        model_folder::ModelFolder,
        peft::{Adapter, LoraWeights},
    },
    nn::{Dora, Id, Lora},
    ops::{
        cast, dora,
        matmul::{Epilogue, Layout, product_into},
    },
    tensor::{ALIGNMENT, Dtype, Tensor},
};

/// The parameter names of an adapted module's two matrices.
fn matrices(module: &str) -> [String; 2] {
    [format!("{module}.lora_A.weight"), format!("{module}.lora_B.weight")]
}

/// Puts an adapter on the model, frozen: beside the decoder's linear layers that it names, and folded into the others
/// (tower, projector, head, embeddings), after the tensors saved with it have replaced the model's. Gives the canonical
/// module names of the former with the parameters of lora_A [R, K] and lora_B [N, R], in the decoder's order.
///
/// Vision layers behind the selected one, which nothing computes with, are passed over.
///
/// # Errors
/// `Usage` when the model has an adapter already; `Data` when the adapter does not fit the model; whatever has failed on
/// the device.
pub fn attach(model: &mut Llava, adapter: &Adapter, dropout: f64) -> Result<Vec<(String, Id, Id)>> {
    let gpu = model.gpu().clone();
    let unused = names::unused_vision_tensors(&model.config);
    let is_unused = |name: &str| unused.iter().any(|(unused, _)| unused == name);
    if adapter.unties_head {
        untie(model);
    }
    for (name, tensor) in &adapter.saved {
        match model.parameters.find(name) {
            Some(id) => {
                let shape = model.parameters.get(id).value.shape().to_vec();
                if shape.iter().product::<usize>() != tensor.len() {
                    return Err(misfit(format!("the adapter's {name} is {:?}, the model's {shape:?}", tensor.shape)));
                }
                model.parameters.place(id, Tensor::from_f32(&gpu, &tensor.data, &shape), None);
            }
            None if is_unused(name) => {}
            None => return Err(misfit(format!("the adapter's {name} is not in the model"))),
        }
    }
    let attached = attach_decoder(model, adapter, dropout)?;
    for (module, weights) in &adapter.modules {
        if attached.iter().any(|(name, ..)| name == module) || is_unused(&format!("{module}.weight")) {
            continue;
        }
        let merge = |part: &str, model: &mut Llava| -> Result<()> {
            let name = format!("{module}.{part}");
            let id = model
                .parameters
                .find(&name)
                .ok_or_else(|| misfit(format!("the adapter's {name} is not in the model")))?;
            let value = &model.parameters.get(id).value;
            let shape = value.shape().to_vec();
            let mut values = widened(value, 0, value.rows()).to_vec()?;
            if part == "weight" {
                check_shapes(module, weights, &shape)?;
                weights.merge_rows(0, &mut values);
            } else {
                weights.merge_bias(0, &mut values);
            }
            model.parameters.place(id, Tensor::from_f32(&gpu, &values, &shape), None);
            Ok(())
        };
        merge("weight", model)?;
        if weights.bias.is_some() {
            merge("bias", model)?;
        }
    }
    Ok(attached)
}

fn misfit(what: String) -> Error {
    Error::data(what).hint("the adapter was made for another model")
}

fn check_shapes(module: &str, weights: &LoraWeights, weight: &[usize]) -> Result<()> {
    let LoraWeights { lora_a, lora_b, magnitude, bias, .. } = weights;
    let rank = weights.rank();
    let columns = [magnitude, bias].into_iter().flatten().all(|vector| vector.shape == weight[..1]);
    if weight.len() == 2 && lora_a.shape == [rank, weight[1]] && lora_b.shape == [weight[0], rank] && columns {
        return Ok(());
    }
    let shapes = format!("lora_A {:?} and lora_B {:?}", lora_a.shape, lora_b.shape);
    Err(misfit(format!("{module}: {shapes} do not fit the weight {weight:?}")))
}

/// Gives the model a head of its own, with the values of the embeddings.
fn untie(model: &mut Llava) {
    if let Some(id) = model.parameters.find(names::EMBED_TOKENS).filter(|_| model.config.text().tie_word_embeddings) {
        let embeddings = &model.parameters.get(id).value;
        let head = Tensor::empty_of(model.gpu(), embeddings.dtype(), embeddings.shape());
        head.copy_from(embeddings);
        let head = model.parameters.insert(names::LM_HEAD, head);
        model.language.untie(head);
        model.config.text_mut().tie_word_embeddings = false;
    }
}

/// The part of [`attach`] that stays beside the weights.
fn attach_decoder(model: &mut Llava, adapter: &Adapter, dropout: f64) -> Result<Vec<(String, Id, Id)>> {
    let gpu = model.gpu().clone();
    let upload = |tensor: &HostTensor| Tensor::from_f32(&gpu, &tensor.data, &tensor.shape);
    let Llava { language, parameters, .. } = model;
    let mut attached: Vec<(String, Id, Id)> = Vec::new();
    for (index, layer) in language.layers_mut().iter_mut().enumerate() {
        for (name, linear) in layer.linears_mut() {
            let module = format!("language_model.model.layers.{index}.{name}");
            let Some(weights) = adapter.modules.get(&module) else { continue };
            if linear.lora.is_some() {
                return Err(Error::usage(format!("{module} has an adapter already")).hint("load the model afresh"));
            }
            let weight = parameters.get(linear.weight).value.clone();
            check_shapes(&module, weights, weight.shape())?;
            let (scale, [a, b]) = (weights.scale as f32, matrices(&module));
            let (a, b) = (parameters.insert(a, upload(&weights.lora_a)), parameters.insert(b, upload(&weights.lora_b)));
            let dora = weights.magnitude.as_ref().map(|magnitude| {
                let matrix = |id: Id| &parameters.get(id).value;
                let norm = adapted_norm(&weight, matrix(a), matrix(b), scale, NORM_BYTES);
                Dora {
                    magnitude: parameters.insert(format!("{module}.lora_magnitude_vector"), upload(magnitude)),
                    norm,
                }
            });
            let bias = match &weights.bias {
                Some(bias) => {
                    let own = linear.bias.map(|id| parameters.get(id).value.to_vec()).transpose()?;
                    let mut sum = HostTensor::new(bias.shape.clone(), own.unwrap_or_else(|| vec![0.0; bias.len()]));
                    weights.merge_bias(0, &mut sum.data);
                    Some(parameters.insert(format!("{module}.lora_bias"), upload(&sum)))
                }
                None => None,
            };
            linear.lora = Some(Lora { a, b, scale, dropout, stream: attached.len() as u32, bias, dora });
            attached.push((module, a, b));
        }
    }
    Ok(attached)
}

/// Bytes of an adapted weight that are computed at a time.
const NORM_BYTES: usize = 64 << 20;

/// The lengths [N] of the rows of W + scale * B A, of which about `bytes` are held at a time.
fn adapted_norm(weight: &Tensor, a: &Tensor, b: &Tensor, scale: f32, bytes: usize) -> Tensor {
    let (n, k) = (weight.rows(), weight.cols());
    let norm = Tensor::empty(weight.gpu(), &[n]);
    let step = (bytes / 4 / k.max(1) / ALIGNMENT).max(1) * ALIGNMENT;
    for first in (0..n).step_by(step) {
        let rows = step.min(n - first);
        let adapted = widened(weight, first, rows);
        let add_scaled = Epilogue { alpha: Some(scale), bias: None, accumulate: true };
        product_into(Layout::Nn, &b.row_part(first, rows), a, &adapted, add_scaled);
        dora::row_norms(&adapted, &norm.part(first, &[rows]));
    }
    norm
}

/// A copy of rows of a weight as f32.
fn widened(weight: &Tensor, first: usize, rows: usize) -> Tensor {
    let (cols, copy) = (weight.cols(), Tensor::empty(weight.gpu(), &[rows, weight.cols()]));
    match weight.dtype() {
        Dtype::F32 => copy.copy_rows(0, weight, first, rows),
        _ => cast::cast_into(weight, first * cols, &copy, 0, rows * cols),
    }
    copy
}

/// Folds the adapter beside the model's weights into them, in f32, and takes it off.
///
/// # Errors
/// `Usage`: the adapter has a bias for a linear that has none. Whatever has failed on the device.
pub fn fold(model: &mut Llava) -> Result<()> {
    let Llava { language, parameters, .. } = model;
    for layer in language.layers_mut() {
        for (name, linear) in layer.linears_mut() {
            let Some(lora) = linear.lora.take() else { continue };
            let value = |id: Id| &parameters.get(id).value;
            let weight = value(linear.weight);
            let merged = widened(weight, 0, weight.rows());
            let epilogue = Epilogue { alpha: Some(lora.scale), bias: None, accumulate: true };
            product_into(Layout::Nn, value(lora.b), value(lora.a), &merged, epilogue);
            if let Some(dora) = &lora.dora {
                dora::scale_rows(&merged, value(dora.magnitude), &dora.norm);
            }
            match (lora.bias, linear.bias) {
                (Some(sum), Some(bias)) => value(bias).copy_from(value(sum)),
                (Some(_), None) => {
                    return Err(Error::usage(format!("the adapter has a bias for {name}, which has none"))
                        .hint("keep the adapter beside the model"));
                }
                (None, _) => {}
            }
            parameters.place(linear.weight, merged, None);
        }
    }
    Ok(())
}

/// Reads the model's adapter back, with the ranks, factors and settings that `settings` has; with the projector as it
/// is now where it was trained beside it, and every tensor saved with `settings`.
///
/// # Errors
/// `Usage` when the model has no adapter; whatever has failed on the device.
pub fn export(model: &Llava, settings: &Adapter, with_projector: bool) -> Result<Adapter> {
    let Adapter { r, lora_alpha, lora_dropout, use_rslora, .. } = *settings;
    let read = |id: Id, shape: &[usize]| -> Result<HostTensor> {
        Ok(HostTensor::new(shape, model.parameters.get(id).value.to_vec()?))
    };
    let mut adapter = Adapter::new(r, lora_alpha, lora_dropout, use_rslora);
    adapter.unties_head = settings.unties_head;
    // What is folded into the weights, and what nothing computes with, is as it was.
    adapter.modules.clone_from(&settings.modules);
    for (module, _) in names::decoder_linears(model.config.text()) {
        let [Some(a), Some(b)] = matrices(&module).map(|name| model.parameters.find(&name)) else { continue };
        let [lora_a, lora_b] = [a, b].map(|id| read(id, model.parameters.get(id).value.shape()));
        let lora_a = lora_a?;
        let scale =
            settings.modules.get(&module).map_or_else(|| settings.scale(lora_a.shape[0]), |module| module.scale);
        let (magnitude, bias) = settings
            .modules
            .get(&module)
            .map_or((None, None), |module| (module.magnitude.clone(), module.bias.clone()));
        adapter.modules.insert(module, LoraWeights { lora_a, lora_b: lora_b?, scale, magnitude, bias });
    }
    if adapter.modules.is_empty() {
        return Err(Error::usage("the model has no adapter to write"));
    }
    for (name, tensor) in &settings.saved {
        let module = name.rsplit_once('.').map_or("", |(module, _)| module);
        let tensor = match model.parameters.find(name).filter(|_| !settings.modules.contains_key(module)) {
            Some(id) => read(id, &tensor.shape)?,
            None => tensor.clone(),
        };
        adapter.saved.insert(name.clone(), tensor);
    }
    if let Some(llava) = model.config.llava().filter(|_| with_projector) {
        for (name, shape) in names::projector_tensors(llava) {
            if let Some(id) = model.parameters.find(&name) {
                adapter.saved.insert(name, read(id, &shape)?);
            }
        }
    }
    Ok(adapter)
}

/// Puts the vision tower, as it is now, among the tensors saved with an adapter. PEFT replaces a saved module whole, so
/// the layers that the model does not compute come along from its `folder`.
///
/// # Errors
/// Whatever has failed on the device, or with the folder's files.
pub fn save_tower(model: &Llava, folder: &ModelFolder, adapter: &mut Adapter) -> Result<()> {
    for (name, _) in names::unused_vision_tensors(&model.config) {
        if folder.has(&name) && !adapter.saved.contains_key(&name) {
            adapter.saved.insert(name.clone(), folder.tensor(&name)?);
        }
    }
    for (name, shape) in names::expected_tensors(&model.config) {
        if let Some(id) = model.parameters.find(&name).filter(|_| name.starts_with(names::VISION_TOWER)) {
            adapter.saved.insert(name, HostTensor::new(shape, model.parameters.get(id).value.to_vec()?));
        }
    }
    Ok(())
}

/// [`export`] for an adapter whose modules all have the factor of `lora_alpha` and their rank.
///
/// # Errors
/// As [`export`].
pub fn to_adapter(
    model: &Llava,
    r: usize,
    lora_alpha: f64,
    lora_dropout: f64,
    use_rslora: bool,
    with_projector: bool,
) -> Result<Adapter> {
    export(model, &Adapter::new(r, lora_alpha, lora_dropout, use_rslora), with_projector)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        gpu::{AdapterOptions, Gpu},
        ops::Random,
    };

    #[test]
    fn norms_are_the_same_however_few_rows_are_held() {
        let gpu = Gpu::open(&AdapterOptions::default()).unwrap();
        let mut random = Random::new(3);
        let ((w, weight), (_, a), (_, b)) =
            (random.tensor(&gpu, &[150, 70]), random.tensor(&gpu, &[3, 70]), random.tensor(&gpu, &[150, 3]));
        let whole = adapted_norm(&weight, &a, &b, 0.5, NORM_BYTES).to_vec().unwrap();
        let parts = adapted_norm(&weight, &a, &b, 0.5, 1).to_vec().unwrap();
        let mut weights = LoraWeights::new(
            HostTensor::new([3, 70], a.to_vec().unwrap()),
            HostTensor::new([150, 3], b.to_vec().unwrap()),
            0.5,
        );
        let mut merged = w.clone();
        weights.merge_rows(0, &mut merged);
        for (row, (whole, part)) in merged.chunks(70).zip(whole.iter().zip(&parts)) {
            let norm = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            assert!((f64::from(*whole) - norm).abs() <= 1e-5 && (f64::from(*part) - norm).abs() <= 1e-5);
        }
        // The host's DoRA gives rows the lengths that it is told.
        weights.magnitude = Some(HostTensor::filled([150], 2.0));
        let mut merged = w;
        weights.merge_rows(0, &mut merged);
        for row in merged.chunks(70) {
            let norm = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            assert!((norm - 2.0).abs() <= 1e-5, "{norm}");
        }
    }
}
