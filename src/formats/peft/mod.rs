//! LoRA adapters in PEFT layout: adapter_config.json beside adapter_model.safetensors, a trained projector inside.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde_json::{Map, Value, json};

use super::{
    atomic::{NewFolder, write_file},
    hf_write::identity_layer,
    host_tensor::HostTensor,
    peft_config::{AdapterConfig, CONFIG_FILE},
    safetensors::Checkpoint,
    safetensors_writer::{TensorData, TensorHead, write_safetensors},
};
use crate::{
    error::{Error, Result, nearest},
    models::{config::ModelConfig, names},
};

pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// Before the wrapped model's own module path.
const PREFIX: &str = "base_model.model.";
/// How many names an error lists.
const SHOWN: usize = 6;

/// The two matrices of one adapted linear: y += scale · B·(A·x).
#[derive(Clone, Debug, PartialEq)]
pub struct LoraWeights {
    /// `[r, in]`
    pub lora_a: HostTensor,
    /// `[out, r]`
    pub lora_b: HostTensor,
    /// alpha / r, or alpha / √r for rank-stabilised LoRA.
    pub scale: f64,
}

impl LoraWeights {
    pub fn rank(&self) -> usize {
        self.lora_a.shape.first().copied().unwrap_or(0)
    }
}

/// An adapter of the language model's linears, with whole tensors that were trained beside it.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    pub r: usize,
    pub lora_alpha: f64,
    pub lora_dropout: f64,
    pub use_rslora: bool,
    /// By canonical module name: `language_model.model.layers.0.self_attn.q_proj`.
    pub modules: BTreeMap<String, LoraWeights>,
    /// Tensors that replace the model's, by canonical name; of a `linear` projector the one layer.
    pub saved: BTreeMap<String, HostTensor>,
}

impl Adapter {
    /// One without any weights yet.
    pub fn new(r: usize, lora_alpha: f64, lora_dropout: f64, use_rslora: bool) -> Self {
        Self { r, lora_alpha, lora_dropout, use_rslora, modules: BTreeMap::new(), saved: BTreeMap::new() }
    }

    /// The factor of B·A for a module of rank `r`, before any alpha_pattern.
    pub fn scale(&self, r: usize) -> f64 {
        scale(self.lora_alpha, r, self.use_rslora)
    }

    /// The last parts of the adapted modules' names, sorted: `down_proj`, `q_proj`, …
    pub fn target_modules(&self) -> Vec<String> {
        let leaves: BTreeSet<&str> = self.modules.keys().map(|name| leaf(name)).collect();
        leaves.into_iter().map(str::to_owned).collect()
    }

    /// Reads the folder of an adapter made for a model of this config, whatever release of transformers it was made with.
    /// Every tensor in it must belong to the model.
    pub fn read(folder: &Path, config: &ModelConfig) -> Result<Self> {
        let settings = AdapterConfig::load(folder)?;
        let weights = folder.join(WEIGHTS_FILE);
        if !weights.exists() && folder.join("adapter_model.bin").exists() {
            return Err(Error::data(format!("{}: adapter_model.bin is not readable yet", folder.display()))
                .hint("save the adapter with safetensors: PEFT does by default"));
        }
        let checkpoint = Checkpoint::open(&weights)?;
        let mut sorted = Sorted::of(&checkpoint, config)?;
        sorted.refuse_unmatched(&weights, config)?;

        let mut adapter = Self::new(settings.r, settings.lora_alpha, settings.lora_dropout, settings.use_rslora);
        for (name, shape) in names::decoder_linears(config.text()) {
            if let Some(pair) = sorted.pairs.remove(&name) {
                adapter.modules.insert(name.clone(), pair.read(&weights, &name, shape, &settings)?);
            }
        }
        adapter.saved = sorted.saved;
        adapter.check_saved(&weights, config, &settings)?;
        Ok(adapter)
    }

    fn check_saved(&mut self, weights: &Path, config: &ModelConfig, settings: &AdapterConfig) -> Result<()> {
        let shown = weights.display();
        if let Some(llava) = config.llava() {
            for (name, _) in names::projector_identity_tensors(llava) {
                if self.saved.remove(&name).is_some_and(|tensor| tensor != identity_layer(&tensor.shape)) {
                    let message = format!("{shown}: the model's projector is `linear`, but {name} is not an identity");
                    return Err(Error::data(message).hint("the adapter was made for a model with another projector"));
                }
            }
            let projector = names::projector_tensors(llava);
            let has = |name: &str| self.saved.contains_key(name);
            if projector.iter().any(|(name, _)| has(name))
                && let Some((name, _)) = projector.iter().find(|(name, _)| !has(name))
            {
                return Err(Error::data(format!("{shown} holds a part of the projector, but not {name}")));
            }
        }
        for module in &settings.modules_to_save {
            let within = |name: &String| format!(".{name}.").contains(&format!(".{module}."));
            if !self.saved.keys().any(within) {
                return Err(Error::data(format!("{shown} holds nothing of {module}, which modules_to_save names")));
            }
        }
        if self.modules.is_empty() && self.saved.is_empty() {
            return Err(Error::data(format!("{shown} holds no tensors")));
        }
        Ok(())
    }

    /// Writes the folder, whole or not at all, as PEFT does for a model in transformers 4.52 and later.
    /// `base_model` is what PEFT will take as the model adapted: a folder or a Hub id.
    pub fn write(&self, folder: &Path, config: &ModelConfig, base_model: &str) -> Result<()> {
        let mut tensors: BTreeMap<String, HostTensorRef> = BTreeMap::new();
        for (module, pair) in &self.modules {
            let path = format!("{PREFIX}{}", names::at_runtime(module, config));
            tensors.insert(format!("{path}.lora_A.weight"), HostTensorRef::Borrowed(&pair.lora_a));
            tensors.insert(format!("{path}.lora_B.weight"), HostTensorRef::Borrowed(&pair.lora_b));
        }
        for (name, tensor) in self.on_disk_saved(config) {
            let path = format!("{PREFIX}{}", names::at_runtime(&name, config));
            // A saved tower must be found whole, and transformers 5 has no inner `vision_model`: both spellings.
            if let (HostTensorRef::Borrowed(tensor), true) = (&tensor, name.starts_with(names::VISION_TOWER)) {
                let newer = path.replace(".vision_tower.vision_model.", ".vision_tower.");
                tensors.insert(newer, HostTensorRef::Borrowed(tensor));
            }
            tensors.insert(path, tensor);
        }
        let heads = tensors.iter().map(|(name, tensor)| TensorHead::f32(name, tensor.as_ref().shape.clone())).collect();
        let written = NewFolder::create(folder)?;
        write_safetensors(&written.path().join(WEIGHTS_FILE), heads, &mut |head| {
            let tensor = tensors.get(&head.name);
            let tensor = tensor.ok_or_else(|| Error::failed(format!("{} is not in the adapter", head.name)))?;
            Ok(TensorData::F32(tensor.as_ref().data.as_slice().into()))
        })?;
        let json = self.config_json(config, base_model);
        write_file(&written.path().join(CONFIG_FILE), format!("{json:#}\n").as_bytes())?;
        written.commit()
    }

    /// The saved tensors, a `linear` projector completed by the identity that stands behind it on disk: PEFT loads the
    /// module whole.
    fn on_disk_saved(&self, config: &ModelConfig) -> Vec<(String, HostTensorRef<'_>)> {
        let own = self.saved.iter().map(|(name, tensor)| (name.clone(), HostTensorRef::Borrowed(tensor)));
        let projector = config.llava().filter(|_| self.saved.keys().any(|name| name.starts_with(names::PROJECTOR)));
        let identity = projector.map(names::projector_identity_tensors).unwrap_or_default().into_iter();
        own.chain(identity.map(|(name, shape)| (name, HostTensorRef::Owned(identity_layer(&shape))))).collect()
    }

    fn config_json(&self, config: &ModelConfig, base_model: &str) -> Value {
        let (mut ranks, mut alphas) = (Map::new(), Map::new());
        for (module, pair) in &self.modules {
            let (name, rank) = (names::at_runtime(module, config), pair.rank());
            if rank != self.r {
                ranks.insert(name.clone(), json!(rank));
            }
            if (pair.scale - self.scale(rank)).abs() > 1e-9 * pair.scale.abs() {
                alphas.insert(name, number(pair.scale / scale(1.0, rank, self.use_rslora)));
            }
        }
        let saved: BTreeSet<String> = self.saved.keys().map(|name| saved_module(name, config)).collect();
        json!({
            "alpha_pattern": alphas,
            "auto_mapping": null,
            "base_model_name_or_path": base_model,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layers_pattern": null,
            "layers_to_transform": null,
            "lora_alpha": number(self.lora_alpha),
            "lora_dropout": self.lora_dropout,
            "modules_to_save": if saved.is_empty() { Value::Null } else { json!(saved) },
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": ranks,
            "revision": null,
            "target_modules": self.target_json(config),
            "task_type": "CAUSAL_LM",
            "use_dora": false,
            "use_rslora": self.use_rslora,
        })
    }

    /// Leaf names for a plain LLaMA. In a LLaVA they would hit the vision tower too, so there it is a pattern of whole
    /// paths. An adapter that skips some layers lists its modules one by one.
    fn target_json(&self, config: &ModelConfig) -> Value {
        let targets = self.target_modules();
        let is_target = |name: &str| targets.iter().any(|target| target == leaf(name));
        let linears = names::decoder_linears(config.text());
        let full = linears.iter().filter(|(name, _)| is_target(name)).all(|(name, _)| self.modules.contains_key(name));
        match config {
            _ if !full => self.modules.keys().map(|module| names::at_runtime(module, config)).collect(),
            ModelConfig::Llama(_) => json!(targets),
            ModelConfig::Llava(_) => {
                json!(format!(r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.({})", targets.join("|")))
            }
        }
    }
}

enum HostTensorRef<'a> {
    Borrowed(&'a HostTensor),
    Owned(HostTensor),
}

impl HostTensorRef<'_> {
    fn as_ref(&self) -> &HostTensor {
        match self {
            Self::Borrowed(tensor) => tensor,
            Self::Owned(tensor) => tensor,
        }
    }
}

/// The tensors of a file by what they are.
#[derive(Default)]
struct Sorted {
    pairs: BTreeMap<String, Pair>,
    saved: BTreeMap<String, HostTensor>,
    unmatched: Vec<String>,
}

#[derive(Default)]
struct Pair {
    /// The module's path in the model that was adapted, which rank_pattern and alpha_pattern speak of.
    path: String,
    a: Option<HostTensor>,
    b: Option<HostTensor>,
}

impl Sorted {
    fn of(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<Self> {
        let mut wholes: BTreeMap<String, Vec<usize>> = names::expected_tensors(config).into_iter().collect();
        wholes.extend(config.llava().map(names::projector_identity_tensors).unwrap_or_default());
        wholes.extend(names::unused_vision_tensors(config));
        let linears: BTreeSet<String> =
            names::decoder_linears(config.text()).into_iter().map(|(name, _)| name).collect();
        let mut sorted = Self::default();
        for stored in checkpoint.names() {
            let tensor = checkpoint.require(stored)?;
            // A raw state dict carries the adapter's name, which PEFT strips on saving.
            let plain = stored.replace(".modules_to_save.default.", ".").replace(".default.", ".");
            let path = plain.strip_prefix(PREFIX).unwrap_or(&plain);
            let refuse = |what: &str| Err(Error::data(format!("{}: {stored}: {what} not built yet", tensor.file)));
            if path.contains(".lora_magnitude_vector") {
                return refuse("DoRA is");
            }
            if path.contains(".lora_embedding_") {
                return refuse("adapters of embeddings are");
            }
            if let Some((module, matrix)) = path.split_once(".lora_") {
                let name = names::canonical(module);
                if wholes.contains_key(&format!("{name}.weight")) && !linears.contains(&name) {
                    return refuse("adapters of anything but the decoder's linears are");
                }
                let slot = sorted.pairs.entry(name.clone()).or_default();
                slot.path = module.to_owned();
                let slot = match matrix {
                    _ if !linears.contains(&name) => None,
                    "A.weight" => Some(&mut slot.a),
                    "B.weight" => Some(&mut slot.b),
                    "B.bias" => return refuse("`lora_bias` is"),
                    _ => None,
                };
                match slot {
                    Some(slot @ None) => *slot = Some(tensor.to_f32()?),
                    _ => sorted.unmatched.push(stored.to_owned()),
                }
                continue;
            }
            let name = names::canonical(path);
            match wholes.get(&name) {
                None => sorted.unmatched.push(stored.to_owned()),
                Some(shape) if shape != tensor.shape => {
                    let (file, found) = (tensor.file, tensor.shape);
                    return Err(Error::data(format!("{file}: {stored} is {found:?}, the model asks for {shape:?}"))
                        .hint("the adapter was made for another model"));
                }
                Some(_) => {
                    sorted.saved.insert(name, tensor.to_f32()?);
                }
            }
        }
        Ok(sorted)
    }

    fn refuse_unmatched(&self, weights: &Path, config: &ModelConfig) -> Result<()> {
        let Some(first) = self.unmatched.first() else { return Ok(()) };
        let count = self.unmatched.len();
        let mut listed: Vec<String> = self.unmatched.iter().take(SHOWN).map(|name| format!("  {name}")).collect();
        if count > SHOWN {
            listed.push(format!("  … {} more", count - SHOWN));
        }
        let message = format!("{}: tensors that match nothing in the model:\n{}", weights.display(), listed.join("\n"));
        let known: Vec<String> = names::decoder_linears(config.text())
            .into_iter()
            .map(|(name, _)| format!("{PREFIX}{}.lora_A.weight", names::at_runtime(&name, config)))
            .collect();
        let error = Error::data(message).hint("the adapter was made for another model");
        Err(match nearest(first, known.iter().map(String::as_str)) {
            Some(near) => error.hint(format!("the nearest name that would match is {near}")),
            None => error,
        })
    }
}

impl Pair {
    /// `[out, in]` is the shape of the linear adapted.
    fn read(
        self,
        weights: &Path,
        name: &str,
        [out, inputs]: [usize; 2],
        settings: &AdapterConfig,
    ) -> Result<LoraWeights> {
        let shown = weights.display();
        let (Some(lora_a), Some(lora_b)) = (self.a, self.b) else {
            return Err(Error::data(format!("{shown}: {name} has only one of lora_A and lora_B")));
        };
        let rank = settings.rank_of(&self.path);
        let fits = |tensor: &HostTensor, shape: [usize; 2], which: &str| {
            if tensor.shape == shape {
                return Ok(());
            }
            let message = format!("{shown}: {which} of {name} is {:?}, {shape:?} is expected", tensor.shape);
            Err(Error::data(message).hint(format!("adapter_config.json gives this module the rank {rank}")))
        };
        fits(&lora_a, [rank, inputs], "lora_A")?;
        fits(&lora_b, [out, rank], "lora_B")?;
        let scale = scale(settings.alpha_of(&self.path), rank, settings.use_rslora);
        Ok(LoraWeights { lora_a, lora_b, scale })
    }
}

fn scale(alpha: f64, r: usize, use_rslora: bool) -> f64 {
    alpha / if use_rslora { (r as f64).sqrt() } else { r as f64 }
}

fn leaf(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}

/// Whole numbers as PEFT writes them, without a decimal point.
fn number(value: f64) -> Value {
    let rounded = value.round();
    if (value - rounded).abs() <= 1e-9 * value.abs() && rounded.abs() < 1e15 {
        json!(rounded as i64)
    } else {
        json!(value)
    }
}

/// What modules_to_save calls the module of a saved tensor.
fn saved_module(name: &str, config: &ModelConfig) -> String {
    if let Some(whole) = [names::PROJECTOR, names::VISION_TOWER].into_iter().find(|whole| name.starts_with(whole)) {
        return whole.to_owned();
    }
    let path = names::at_runtime(name, config);
    let module = path.rsplit_once('.').map_or(path.as_str(), |(module, _)| module);
    match name {
        names::LM_HEAD | names::EMBED_TOKENS => leaf(module).to_owned(),
        _ => module.to_owned(),
    }
}
