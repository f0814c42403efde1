//! What trains under each method, and fresh adapters.

use std::collections::BTreeSet;

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
        if !is_target(&stage.target_modules, &name, config)? {
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
    let alone = match &stage.target_modules {
        TargetModules::Names(listed) => listed.iter().map(|name| TargetModules::Names(vec![name.clone()])).collect(),
        other => vec![other.clone()],
    };
    for targets in alone {
        if targets_of(&targets, config)?.is_empty() {
            let shown = match &targets {
                TargetModules::Names(names) => names.join(", "),
                TargetModules::Pattern(pattern) => pattern.text().to_owned(),
                TargetModules::AllLinear => "all-linear".to_owned(),
            };
            let example = names::decoder_linears(config.text());
            let example = example.first().map(|(name, _)| names::at_runtime(name, config)).unwrap_or_default();
            return Err(Error::usage(format!("target_modules matches no linear layer of the decoder: `{shown}`"))
                .hint("use names such as q_proj and down_proj, or \"all-linear\"")
                .hint(format!("a pattern must match a whole path, such as {example}")));
        }
    }
    Ok(())
}

/// The decoder's linears that `targets` means, by canonical name.
fn targets_of(targets: &TargetModules, config: &ModelConfig) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for (name, _) in names::decoder_linears(config.text()) {
        if is_target(targets, &name, config)? {
            found.insert(name);
        }
    }
    Ok(found)
}

/// Whether `targets` means a linear, by its path in any of the layouts that adapters are made for: transformers now,
/// up to 4.51, and the original LLaVA.
fn is_target(targets: &TargetModules, name: &str, config: &ModelConfig) -> Result<bool> {
    let original = name.strip_prefix("language_model.").unwrap_or(name);
    let now = names::at_runtime(name, config);
    Ok(targets.matches(&now)? || targets.matches(name)? || targets.matches(original)?)
}

/// Settles what the config and the adapter that training starts from both say: what the adapter is cannot be changed,
/// how it is trained can.
///
/// # Errors
/// `Usage`, naming every key that the config gives and the adapter has otherwise.
pub fn settle(stage: &StageConfig, adapter: &mut Adapter, config: &ModelConfig) -> Result<()> {
    if stage.is_given("lora_dropout") {
        adapter.lora_dropout = stage.lora_dropout;
    }
    let mut conflicts = Vec::new();
    let mut compare = |key: &str, given: String, found: String| {
        if stage.is_given(key) && given != found {
            conflicts.push(format!("{key} is {given}, the adapter's {found}"));
        }
    };
    compare("r", stage.r.to_string(), adapter.r.to_string());
    compare("lora_alpha", stage.lora_alpha.to_string(), adapter.lora_alpha.to_string());
    compare("use_rslora", stage.use_rslora.to_string(), adapter.use_rslora.to_string());
    compare("use_dora", stage.use_dora.to_string(), adapter.use_dora().to_string());
    if stage.is_given("target_modules") {
        let wanted = targets_of(&stage.target_modules, config)?;
        if let Some(name) = wanted.iter().find(|name| !adapter.modules.contains_key(*name)) {
            conflicts.push(format!("target_modules has {name}, which is not in the adapter"));
        } else if let Some(name) = adapter.modules.keys().find(|name| !wanted.contains(*name)) {
            conflicts.push(format!("target_modules leaves out {name}, which is in the adapter"));
        }
    }
    if conflicts.is_empty() {
        return Ok(());
    }
    Err(Error::usage(format!("the config does not fit the adapter to start from: {}", conflicts.join("; ")))
        .hint("leave these keys out to go on with the adapter's, or start without adapter_name_or_path"))
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
    if name.starts_with("vision_tower.") {
        return stage.unfreeze_mm_vision_tower.then_some(stage.mm_vision_tower_lr);
    }
    let parts = [".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"];
    let is_lora = parts.iter().any(|part| name.ends_with(part));
    let trains = match stage.method {
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
