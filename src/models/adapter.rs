//! LoRA adapters on a loaded model: put on, read back, folded in.

use super::{llava::Llava, names};
use crate::{
    error::{Error, Result},
    formats::{
        HostTensor,
        model_folder::ModelFolder,
        peft::{Adapter, LoraWeights},
    },
    nn::{Id, Lora},
    ops::matmul::{Epilogue, Layout, product_into},
    tensor::Tensor,
};

/// The parameter names of an adapted module's two matrices.
fn matrices(module: &str) -> [String; 2] {
    [format!("{module}.lora_A.weight"), format!("{module}.lora_B.weight")]
}

/// Puts an adapter beside the linear layers it names, frozen, and replaces the tensors saved with it. Gives the
/// canonical module name with the parameters of lora_A [R, K] and lora_B [N, R], in the decoder's order.
///
/// Tensors of vision layers behind the selected one, which nothing computes with, are passed over.
///
/// # Errors
/// `Usage` when the model has an adapter already; `Data` when the adapter does not fit the model.
pub fn attach(model: &mut Llava, adapter: &Adapter, dropout: f64) -> Result<Vec<(String, Id, Id)>> {
    let misfit = |what: String| Error::data(what).hint("the adapter was made for another model");
    let gpu = model.gpu().clone();
    let unused = names::unused_vision_tensors(&model.config);
    for (name, tensor) in &adapter.saved {
        match model.parameters.find(name) {
            Some(id) => {
                let shape = model.parameters.get(id).value.shape().to_vec();
                if shape.iter().product::<usize>() != tensor.len() {
                    return Err(misfit(format!("the adapter's {name} is {:?}, the model's {shape:?}", tensor.shape)));
                }
                model.parameters.place(id, Tensor::from_f32(&gpu, &tensor.data, &shape), None);
            }
            None if unused.iter().any(|(unused, _)| unused == name) => {}
            None => return Err(misfit(format!("the adapter's {name} is not in the model"))),
        }
    }
    let Llava { language, parameters, .. } = model;
    let mut attached: Vec<(String, Id, Id)> = Vec::new();
    for (index, layer) in language.layers_mut().iter_mut().enumerate() {
        for (name, linear) in layer.linears_mut() {
            let module = format!("language_model.model.layers.{index}.{name}");
            let Some(weights) = adapter.modules.get(&module) else { continue };
            if linear.lora.is_some() {
                return Err(Error::usage(format!("{module} has an adapter already")).hint("load the model afresh"));
            }
            let weight = parameters.get(linear.weight).value.shape().to_vec();
            let (LoraWeights { lora_a, lora_b, scale }, rank) = (weights, weights.rank());
            if lora_a.shape != [rank, weight[1]] || lora_b.shape != [weight[0], rank] {
                let shapes = format!("lora_A {:?} and lora_B {:?}", lora_a.shape, lora_b.shape);
                return Err(misfit(format!("{module}: {shapes} do not fit the weight {weight:?}")));
            }
            let [a, b] = matrices(&module);
            let a = parameters.insert(a, Tensor::from_f32(&gpu, &lora_a.data, &lora_a.shape));
            let b = parameters.insert(b, Tensor::from_f32(&gpu, &lora_b.data, &lora_b.shape));
            linear.lora = Some(Lora { a, b, scale: *scale as f32, dropout, stream: attached.len() as u32 });
            attached.push((module, a, b));
        }
    }
    match adapter.modules.keys().find(|module| !attached.iter().any(|(name, ..)| name == *module)) {
        Some(module) => Err(misfit(format!("the adapter's {module} is not in the model"))),
        None => Ok(attached),
    }
}

/// Folds the model's adapter into its weights, W + scale * B A in f32, and takes it off.
pub fn fold(model: &mut Llava) {
    let Llava { language, parameters, .. } = model;
    for layer in language.layers_mut() {
        for (_, linear) in layer.linears_mut() {
            let Some(lora) = linear.lora.take() else { continue };
            let value = |id: Id| &parameters.get(id).value;
            let epilogue = Epilogue { alpha: Some(lora.scale), bias: None, accumulate: true };
            product_into(Layout::Nn, value(lora.b), value(lora.a), value(linear.weight), epilogue);
        }
    }
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
    for (module, _) in names::decoder_linears(model.config.text()) {
        let [Some(a), Some(b)] = matrices(&module).map(|name| model.parameters.find(&name)) else { continue };
        let [lora_a, lora_b] = [a, b].map(|id| read(id, model.parameters.get(id).value.shape()));
        let lora_a = lora_a?;
        let scale =
            settings.modules.get(&module).map_or_else(|| settings.scale(lora_a.shape[0]), |module| module.scale);
        adapter.modules.insert(module, LoraWeights { lora_a, lora_b: lora_b?, scale });
    }
    if adapter.modules.is_empty() {
        return Err(Error::usage("the model has no adapter to write"));
    }
    for (name, tensor) in &settings.saved {
        let tensor = match model.parameters.find(name) {
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
