//! What trains under each method, and fresh adapters.

use super::{
    config::{Method, StageConfig, TargetModules},
    optimizer::Trainable,
};
use crate::{
    error::{Error, Result},
    formats::{
        HostTensor,
        peft::{Adapter, LoraWeights},
    },
    models::{
        config::ModelConfig,
        llava::Llava,
        names::{self, PROJECTOR},
    },
    rng::Rng,
};

/// A fresh adapter on the modules that the stage asks for: A uniform in ±1/sqrt(in) (PEFT's Kaiming start), B zero.
pub fn fresh_adapter(stage: &StageConfig, config: &ModelConfig) -> Result<Adapter> {
    let mut adapter = Adapter::new(stage.r, stage.lora_alpha, stage.lora_dropout, stage.use_rslora);
    for (name, [outputs, inputs]) in names::decoder_linears(config.text()) {
        if !stage.target_modules.matches(&name) {
            continue;
        }
        let mut rng = Rng::named(stage.seed, &format!("{name}.lora_A"));
        let bound = 1.0 / (inputs as f32).sqrt();
        let a = (0..stage.r * inputs).map(|_| rng.uniform(bound)).collect();
        let (lora_a, lora_b) = (HostTensor::new([stage.r, inputs], a), HostTensor::zeros([outputs, stage.r]));
        let weights = LoraWeights::new(lora_a, lora_b, adapter.scale(stage.r));
        adapter.modules.insert(name, weights);
    }
    Ok(adapter)
}

/// Whether `target_modules` names linear layers of the decoder, each of its names at least one.
///
/// # Errors
/// `Usage`, with the name that matches nothing.
pub fn check_targets(stage: &StageConfig, config: &ModelConfig) -> Result<()> {
    let linears = names::decoder_linears(config.text());
    let matches = |targets: &TargetModules| linears.iter().any(|(name, _)| targets.matches(name));
    let missing = match &stage.target_modules {
        TargetModules::Names(listed) => {
            let alone = |name: &&String| !matches(&TargetModules::Names(vec![(*name).clone()]));
            listed.iter().find(alone).map(|name| format!(": `{name}`"))
        }
        _ => None,
    };
    if missing.is_none() && matches(&stage.target_modules) {
        return Ok(());
    }
    Err(Error::usage(format!("target_modules matches no linear layer of the decoder{}", missing.unwrap_or_default()))
        .hint("use names such as q_proj and down_proj, or \"all-linear\""))
}

/// A fresh projector tensor: uniform in ±1/sqrt(fan_in), weight and bias alike (PyTorch's Linear).
pub fn fresh_projector(seed: u64, config: &ModelConfig, name: &str, shape: &[usize]) -> HostTensor {
    let weight = name.replace(".bias", ".weight");
    let fan_in = config
        .llava()
        .map(names::projector_tensors)
        .and_then(|tensors| tensors.into_iter().find(|(known, _)| *known == weight))
        .map_or(1, |(_, shape)| shape[1]);
    let bound = 1.0 / (fan_in as f32).sqrt();
    let mut rng = Rng::named(seed, name);
    HostTensor::new(shape, (0..shape.iter().product()).map(|_| rng.uniform(bound)).collect())
}

/// The rate at which a parameter trains in a stage; none where it does not.
pub fn trains(stage: &StageConfig, name: &str) -> Option<f64> {
    if name.starts_with(PROJECTOR) {
        let trains = stage.method == Method::Projector || !stage.freeze_mm_mlp_adapter;
        return trains.then_some(stage.mm_projector_lr);
    }
    let is_lora = name.ends_with(".lora_A.weight") || name.ends_with(".lora_B.weight");
    let trains = match stage.method {
        _ if name.starts_with("vision_tower.") => stage.unfreeze_mm_vision_tower,
        Method::Projector => false,
        Method::Full => !is_lora,
        Method::Lora | Method::Qlora => is_lora,
    };
    trains.then_some(stage.learning_rate)
}

/// Every parameter that trains in a stage, with its rate and decay: biases and norms (one dimension) do not decay.
///
/// # Errors
/// `Usage` when nothing would train.
pub fn select(stage: &StageConfig, model: &Llava) -> Result<Vec<Trainable>> {
    let mut trainables = Vec::new();
    for parameter in model.parameters.iter() {
        let name = parameter.name.as_str();
        let rate = trains(stage, name).filter(|_| model.projector.is_some() || !name.starts_with(PROJECTOR));
        if let Some(learning_rate) = rate
            && let Some(id) = model.parameters.find(name)
        {
            let weight_decay = if parameter.value.shape().len() > 1 { stage.weight_decay } else { 0.0 };
            let of_pictures = name.starts_with(PROJECTOR) || name.starts_with("vision_tower.");
            trainables.push(Trainable { id, learning_rate, weight_decay, of_pictures });
        }
    }
    if trainables.is_empty() {
        return Err(Error::usage(format!("{}: nothing would train with method {}", stage.title(), stage.method))
            .hint("a projector needs a LLaVA (a model with a vision tower); a plain LLaMA takes full or lora"));
    }
    Ok(trainables)
}
