//! Writing an adapter's folder as PEFT does for a model in transformers 4.52 and later.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde_json::{Map, Value, json};

use super::{
    super::{
        atomic::{NewFolder, write_file},
        hf_write::identity_layer,
        host_tensor::HostTensor,
        safetensors_writer::{TensorData, TensorHead, write_safetensors},
    },
    Adapter, CONFIG_FILE, PREFIX, WEIGHTS_FILE, embeddings, leaf, scale, transposed,
};
use crate::{
    error::{Error, Result},
    models::{config::ModelConfig, names},
};

impl Adapter {
    /// Writes the folder, whole or not at all. `base_model` is what PEFT will take as the model adapted: a folder or a
    /// Hub id.
    ///
    /// # Errors
    /// `Failed`: the folder cannot be written.
    pub fn write(&self, folder: &Path, config: &ModelConfig, base_model: &str) -> Result<()> {
        let tensors = self.tensors(config);
        let heads = tensors.iter().map(|(name, tensor)| TensorHead::f32(name, tensor.shape.clone())).collect();
        let written = NewFolder::create(folder)?;
        write_safetensors(&written.path().join(WEIGHTS_FILE), heads, &mut |head| {
            let tensor = tensors.get(&head.name);
            let tensor = tensor.ok_or_else(|| Error::failed(format!("{} is not in the adapter", head.name)))?;
            Ok(TensorData::F32(tensor.data.as_slice().into()))
        })?;
        let json = self.config_json(config, base_model);
        write_file(&written.path().join(CONFIG_FILE), format!("{json:#}\n").as_bytes())?;
        written.commit()
    }

    /// Every tensor of the file by its name there.
    fn tensors(&self, config: &ModelConfig) -> BTreeMap<String, Cow<'_, HostTensor>> {
        let mut tensors = BTreeMap::new();
        for (module, pair) in &self.modules {
            let mut parts = match module == embeddings() {
                true => vec![
                    ("lora_embedding_A", Cow::Owned(transposed(&pair.lora_b))),
                    ("lora_embedding_B", Cow::Owned(transposed(&pair.lora_a))),
                ],
                false => {
                    vec![("lora_A.weight", Cow::Borrowed(&pair.lora_a)), ("lora_B.weight", Cow::Borrowed(&pair.lora_b))]
                }
            };
            parts.extend(pair.magnitude.iter().map(|tensor| ("lora_magnitude_vector", Cow::Borrowed(tensor))));
            parts.extend(pair.bias.iter().map(|tensor| ("lora_B.bias", Cow::Borrowed(tensor))));
            for path in spellings(module, config) {
                tensors.extend(parts.iter().map(|(part, tensor)| (format!("{PREFIX}{path}.{part}"), tensor.clone())));
            }
        }
        for (name, tensor) in self.on_disk_saved(config) {
            let (module, part) = name.rsplit_once('.').unwrap_or((&name, ""));
            // PEFT keeps the layer that it wraps under this name.
            let base = if self.modules.contains_key(module) { ".base_layer" } else { "" };
            for path in spellings(module, config) {
                tensors.insert(format!("{PREFIX}{path}{base}.{part}"), tensor.clone());
            }
        }
        tensors
    }

    /// The saved tensors, a `linear` projector completed by the identity that stands behind it on disk: PEFT loads the
    /// module whole.
    fn on_disk_saved(&self, config: &ModelConfig) -> Vec<(String, Cow<'_, HostTensor>)> {
        let own = self.saved.iter().map(|(name, tensor)| (name.clone(), Cow::Borrowed(tensor)));
        let weight = |name: &String| name.starts_with(names::PROJECTOR) && name.ends_with(".weight");
        let projector = config.llava().filter(|_| self.saved.keys().any(weight));
        let identity = projector.map(names::projector_identity_tensors).unwrap_or_default().into_iter();
        let identity = identity.map(|(name, shape)| (name, Cow::Owned(identity_layer(&shape))));
        // Embeddings that stay tied to the head: PEFT replaces each by its name.
        let tied = config.text().tie_word_embeddings && !self.unties_head;
        let head = self.saved.get(names::EMBED_TOKENS).filter(|_| tied);
        own.chain(identity).chain(head.map(|tensor| (names::LM_HEAD.to_owned(), Cow::Borrowed(tensor)))).collect()
    }

    /// Whether a saved tensor is a bias alone, of a module that is not saved as a whole: PEFT's `bias = "all"`.
    fn is_lone_bias(&self, name: &str) -> bool {
        let module = name.strip_suffix(".bias");
        let weight = |module: &str| self.saved.contains_key(&format!("{module}.weight"));
        module.is_some_and(|module| !weight(module) || self.modules.contains_key(module))
    }

    fn config_json(&self, config: &ModelConfig, base_model: &str) -> Value {
        let (mut ranks, mut alphas) = (Map::new(), Map::new());
        for (module, pair) in &self.modules {
            let rank = pair.rank();
            for name in spellings(module, config) {
                if rank != self.r {
                    ranks.insert(name.clone(), json!(rank));
                }
                if (pair.scale - self.scale(rank)).abs() > 1e-9 * pair.scale.abs() {
                    alphas.insert(name, number(pair.scale / scale(1.0, rank, self.use_rslora)));
                }
            }
        }
        let whole = |name: &&String| {
            let module = name.rsplit_once('.').map_or(name.as_str(), |(module, _)| module);
            !self.is_lone_bias(name) && !self.modules.contains_key(module)
        };
        let on_disk = self.on_disk_saved(config);
        let names = on_disk.iter().map(|(name, _)| name);
        let saved: BTreeSet<String> = names.filter(whole).map(|name| saved_module(name, config)).collect();
        let lone_biases = self.saved.keys().any(|name| self.is_lone_bias(name));
        json!({
            "alpha_pattern": alphas,
            "auto_mapping": null,
            "base_model_name_or_path": base_model,
            "bias": if lone_biases { "all" } else { "none" },
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layers_pattern": null,
            "layers_to_transform": null,
            "lora_alpha": number(self.lora_alpha),
            "lora_bias": self.modules.values().any(|module| module.bias.is_some()),
            "lora_dropout": self.lora_dropout,
            "modules_to_save": if saved.is_empty() { Value::Null } else { json!(saved) },
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": ranks,
            "revision": null,
            "target_modules": self.target_json(config),
            "task_type": "CAUSAL_LM",
            "use_dora": self.use_dora(),
            "use_rslora": self.use_rslora,
        })
    }

    /// Leaf names for a plain LLaMA. In a LLaVA they would hit the vision tower too, so there it is a pattern of whole
    /// paths. An adapter that skips some layers, or adapts more than the decoder, lists its modules one by one.
    fn target_json(&self, config: &ModelConfig) -> Value {
        let targets = self.target_modules();
        let is_target = |name: &str| targets.iter().any(|target| target == leaf(name));
        let linears = names::decoder_linears(config.text());
        let full = linears.iter().filter(|(name, _)| is_target(name)).all(|(name, _)| self.modules.contains_key(name));
        let only = self.modules.keys().all(|module| linears.iter().any(|(name, _)| name == module));
        match config {
            _ if !full || !only => self.modules.keys().flat_map(|module| spellings(module, config)).collect(),
            ModelConfig::Llama(_) => json!(targets),
            ModelConfig::Llava(_) => {
                json!(format!(r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.({})", targets.join("|")))
            }
        }
    }
}

/// A module's path in the loaded model. The tower's has two: transformers 5 has no inner `vision_model`.
fn spellings(module: &str, config: &ModelConfig) -> Vec<String> {
    let path = names::at_runtime(module, config);
    let newer = path.replace(".vision_tower.vision_model.", ".vision_tower.");
    if newer == path { vec![path] } else { vec![newer, path] }
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
