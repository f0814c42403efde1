//! LoRA adapters on a loaded model: put on, read back, folded in.

use super::{dora, llava::Llava, names};
use crate::{
    error::{Error, Result},
    formats::{
        HostTensor,
        model_folder::ModelFolder,
        peft::{Adapter, LoraWeights},
    },
    nn::{Dora, Id, Lora},
    ops::{
        dora::scale_rows,
        matmul::{Epilogue, Layout, product_into},
    },
    tensor::Tensor,
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
    let unused = names::unused_vision_tensors(&model.config);
    let is_unused = |name: &str| unused.iter().any(|(unused, _)| unused == name);
    if adapter.unties_head {
        untie(model);
    }
    for (name, tensor) in &adapter.saved {
        match model.parameters.find(name) {
            Some(id) => {
                let replaced = &model.parameters.get(id).value;
                let (gpu, shape) = (replaced.gpu().clone(), replaced.shape().to_vec());
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
            let merged = &model.parameters.get(id).value;
            let (gpu, shape) = (merged.gpu().clone(), merged.shape().to_vec());
            let mut values = dora::weight_rows(&model.parameters, id, 0, shape[0]).to_vec()?;
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
        let last = &model.gpus()[model.gpus().len() - 1];
        let head = if embeddings.gpu().is(last) {
            let head = Tensor::empty_of(last, embeddings.dtype(), embeddings.shape());
            head.copy_from(embeddings);
            head
        } else {
            embeddings.offload().restore_on(last)
        };
        let head = model.parameters.insert(names::LM_HEAD, head);
        model.language.untie(head);
        model.config.text_mut().tie_word_embeddings = false;
    }
}

/// The part of [`attach`] that stays beside the weights.
fn attach_decoder(model: &mut Llava, adapter: &Adapter, dropout: f64) -> Result<Vec<(String, Id, Id)>> {
    let Llava { language, parameters, .. } = model;
    let streaming = language.streaming().cloned();
    let mut attached: Vec<(String, Id, Id)> = Vec::new();
    for (index, layer) in language.layers_mut().iter_mut().enumerate() {
        for (name, linear) in layer.linears_mut() {
            let module = format!("language_model.model.layers.{index}.{name}");
            let Some(weights) = adapter.modules.get(&module) else { continue };
            if linear.lora.is_some() {
                return Err(Error::usage(format!("{module} has an adapter already")).hint("load the model afresh"));
            }
            let adapted = &parameters.get(linear.weight).value;
            check_shapes(&module, weights, adapted.shape())?;
            let gpu = adapted.gpu().clone();
            let upload = |tensor: &HostTensor| Tensor::from_f32(&gpu, &tensor.data, &tensor.shape);
            let (scale, [a, b]) = (weights.scale as f32, matrices(&module));
            let (a, b) = (parameters.insert(a, upload(&weights.lora_a)), parameters.insert(b, upload(&weights.lora_b)));
            let bias = match &weights.bias {
                Some(bias) => {
                    let own = linear.bias.map(|id| parameters.get(id).value.to_vec()).transpose()?;
                    let mut sum = HostTensor::new(bias.shape.clone(), own.unwrap_or_else(|| vec![0.0; bias.len()]));
                    weights.merge_bias(0, &mut sum.data);
                    Some(parameters.insert(format!("{module}.lora_bias"), upload(&sum)))
                }
                None => None,
            };
            let lora =
                linear.lora.insert(Lora { a, b, scale, dropout, stream: attached.len() as u32, bias, dora: None });
            if let Some(magnitude) = &weights.magnitude {
                streaming.iter().for_each(|streaming| streaming.bring(index, Some(index + 1)));
                let norm = dora::norm(parameters, linear.weight, lora);
                let magnitude = parameters.insert(dora::magnitude_name(&module), upload(magnitude));
                lora.dora = Some(Dora { magnitude, norm });
            }
            attached.push((module, a, b));
        }
    }
    Ok(attached)
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
            let merged = dora::weight_rows(parameters, linear.weight, 0, value(linear.weight).rows());
            let epilogue = Epilogue { alpha: Some(lora.scale), accumulate: true, ..Default::default() };
            product_into(Layout::Nn, value(lora.b), value(lora.a), &merged, epilogue);
            if let Some(dora) = &lora.dora {
                scale_rows(&merged, value(dora.magnitude), &dora.norm);
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
        let bias = settings.modules.get(&module).and_then(|module| module.bias.clone());
        let magnitude = model.parameters.find(&dora::magnitude_name(&module));
        let magnitude = magnitude.map(|id| read(id, model.parameters.get(id).value.shape())).transpose()?;
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
