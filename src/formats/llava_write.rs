//! Writing a model in the layout of the original LLaVA authors: LLaMA's names, `model.mm_projector.*`, their config.json,
//! and the vision tower in a folder of its own inside.
//!
//! Their pictures are marked by a number that is no token, so the tokens `<image>` and `<pad>` of Hugging Face's layout
//! go, and with them the rows of the embeddings behind the vocabulary.

use std::{collections::BTreeMap, path::Path};

use serde_json::{Map, Value, json};

use super::{
    atomic::{NewFolder, write_file},
    hf_write::{dtype_name, most_bytes, unused_default},
    model_folder::{ModelFolder, joined::PAD},
    processor_files,
    safetensors::Dtype,
    safetensors_writer::{SHARD_BYTES, TensorData, TensorHead, write_sharded},
};
use crate::{
    data::IMAGE_PLACEHOLDER,
    error::{Error, Result},
    models::{
        config::{Family, FeatureSelect, LlamaConfig, LlavaConfig, ModelConfig, ProjectorType},
        names,
    },
};

/// The tower's folder, and its name in config.json.
const TOWER: &str = "vision_tower";
/// Files that do not name tokens by their ids.
const CARRIED: [&str; 5] = ["tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"];

/// Writes `source` into the folder `out`, which appears whole or not at all. Weights are as the source has them unless
/// `dtype` asks for one dtype throughout.
///
/// # Errors
/// `Usage`: a language model without a tower, or of a family that layout has no class for. `Data`: a value that the
/// dtype cannot hold. `Failed`: what the disk refuses.
pub fn write_llava_model(out: &Path, source: &ModelFolder, dtype: Option<Dtype>) -> Result<()> {
    let Some(llava) = source.config().llava() else {
        return Err(Error::usage(format!("{} is a language model without a vision tower", source.name()))
            .hint("use --to hf, or name a LLaVA"));
    };
    if llava.text_config.family == Family::Qwen2 {
        return Err(Error::usage(format!(
            "{}: the original LLaVA has no class for a language model of the family qwen2",
            source.name()
        ))
        .hint("use --to hf"));
    }
    let tokens = Tokens::of(source)?;
    let mut text = llava.text_config.clone();
    text.vocab_size = tokens.rows;
    if text.pad_token_id.is_some_and(|id| tokens.is_dropped(id as usize)) {
        text.pad_token_id = tokens.pad;
    }
    let folder = NewFolder::create(out)?;
    let write_json =
        |name: &str, value: &Value| write_file(&folder.path().join(name), format!("{value:#}\n").as_bytes());
    let kept = write_weights(folder.path(), source, llava, &text, dtype)?;
    write_json("config.json", &config(source, llava, &text, dtype_name(kept))?)?;
    let mut generation = processor_files::generation_config(source.json("generation_config.json")?, &text);
    if generation["pad_token_id"].as_u64().is_some_and(|id| tokens.is_dropped(id as usize)) {
        generation["pad_token_id"] = json!(text.pad_token_id);
    }
    write_json("generation_config.json", &generation)?;
    for name in CARRIED {
        if let Some(bytes) = source.file(name)? {
            write_file(&folder.path().join(name), &bytes)?;
        }
    }
    for (name, value) in tokens.files(source, &text)? {
        write_json(name, &value)?;
    }
    write_tower(&folder.path().join(TOWER), source, llava, dtype)?;
    folder.commit()
}

/// Which tokens stay.
struct Tokens {
    /// Rows of the embeddings that stay.
    rows: usize,
    dropped: Vec<usize>,
    /// What stands for padding in the place of `<pad>`: `<unk>`, as in the original training.
    pad: Option<u32>,
    unknown: Option<String>,
}

impl Tokens {
    /// `<image>` and `<pad>` go where no other token comes behind them.
    fn of(source: &ModelFolder) -> Result<Self> {
        let rows = source.config().text().vocab_size;
        let all = Self { rows, dropped: Vec::new(), pad: None, unknown: None };
        let Some(tokenizer) = source.json("tokenizer.json")? else { return Ok(all) };
        let mut ids: BTreeMap<usize, String> = BTreeMap::new();
        let mut add = |text: &str, id: &Value| {
            if let Some(id) = id.as_u64().and_then(|id| usize::try_from(id).ok()) {
                ids.insert(id, text.to_owned());
            }
        };
        let model = tokenizer.get("model").unwrap_or(&Value::Null);
        model["vocab"].as_object().into_iter().flatten().for_each(|(text, id)| add(text, id));
        for token in tokenizer.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
            add(token["content"].as_str().unwrap_or_default(), &token["id"]);
        }
        let mut dropped = Vec::new();
        while let Some(last) = ids.last_entry().filter(|last| [IMAGE_PLACEHOLDER, PAD].contains(&last.get().as_str())) {
            dropped.push(last.remove_entry().0);
        }
        // Only a vocabulary that was grown for pictures shrinks.
        let Some((&highest, _)) = ids.last_key_value().filter(|_| !dropped.is_empty()) else { return Ok(all) };
        let unknown = model["unk_token"].as_str().map(str::to_owned);
        let id_of =
            |text: &str| ids.iter().find(|(_, known)| *known == text).and_then(|(&id, _)| u32::try_from(id).ok());
        let pad = unknown.as_deref().and_then(id_of).or(source.config().text().eos_token_ids.first().copied());
        let listed = model["vocab"].as_array().map_or(0, Vec::len);
        Ok(Self { rows: rows.min((highest + 1).max(listed)), dropped, pad, unknown })
    }

    fn is_dropped(&self, id: usize) -> bool {
        self.dropped.contains(&id)
    }

    /// The files that list tokens, without those that go.
    fn files(&self, source: &ModelFolder, text: &LlamaConfig) -> Result<Vec<(&'static str, Value)>> {
        let mut files = Vec::new();
        let stays = |id: &Value| !id.as_u64().is_some_and(|id| self.is_dropped(id as usize));
        if let Some(mut tokenizer) = source.json("tokenizer.json")? {
            if let Some(added) = tokenizer.get_mut("added_tokens").and_then(Value::as_array_mut) {
                added.retain(|token| stays(&token["id"]));
            }
            if let Some(Value::Object(vocabulary)) = tokenizer.get_mut("model").and_then(|model| model.get_mut("vocab"))
            {
                vocabulary.retain(|_, id| stays(id));
            }
            let tokenizer = Value::Object(tokenizer);
            let present = source.json("tokenizer_config.json")?;
            let mut config = processor_files::tokenizer_config(present, &tokenizer, text);
            if let Value::Object(config) = &mut config {
                self.clean(config);
            }
            files.extend([("tokenizer.json", tokenizer), ("tokenizer_config.json", config)]);
        }
        if let Some(mut map) = source.json("special_tokens_map.json")? {
            self.clean(&mut map);
            files.push(("special_tokens_map.json", Value::Object(map)));
        }
        if let Some(mut added) = source.json("added_tokens.json")? {
            added.retain(|_, id| stays(id));
            if !added.is_empty() {
                files.push(("added_tokens.json", Value::Object(added)));
            }
        }
        Ok(files)
    }

    fn clean(&self, map: &mut Map<String, Value>) {
        if self.dropped.is_empty() {
            return;
        }
        let is_gone = |token: &Value| {
            let text = token.as_str().or_else(|| token["content"].as_str());
            text.is_some_and(|text| [IMAGE_PLACEHOLDER, PAD].contains(&text))
        };
        for key in ["processor_class", "image_token"] {
            map.shift_remove(key);
        }
        if let Some(Value::Object(tokens)) = map.get_mut("added_tokens_decoder") {
            tokens.retain(|id, _| !id.parse().is_ok_and(|id| self.is_dropped(id)));
        }
        for key in ["additional_special_tokens", "extra_special_tokens"] {
            match map.get_mut(key) {
                Some(Value::Array(tokens)) => tokens.retain(|token| !is_gone(token)),
                Some(Value::Object(tokens)) => tokens.retain(|_, token| !is_gone(token)),
                _ => {}
            }
        }
        if map.get("pad_token").is_some_and(is_gone) {
            match &self.unknown {
                Some(unknown) => map.insert("pad_token".to_owned(), json!(unknown)),
                None => map.shift_remove("pad_token"),
            };
        }
    }
}

/// config.json of `LlavaLlamaForCausalLM`.
fn config(source: &ModelFolder, llava: &LlavaConfig, text: &LlamaConfig, dtype: &str) -> Result<Value> {
    let mut map = match ModelConfig::Llama(text.clone()).to_json(dtype) {
        Value::Object(map) => map,
        _ => Map::new(),
    };
    // The key that transformers of that time reads.
    map.shift_remove("dtype");
    let (class, kind) = match text.family {
        Family::Mistral => ("LlavaMistralForCausalLM", "llava_mistral"),
        _ => ("LlavaLlamaForCausalLM", "llava_llama"),
    };
    let feature = match llava.vision_feature_select_strategy {
        FeatureSelect::Default => "patch",
        FeatureSelect::Full => "cls_patch",
    };
    let processing = source.preprocessor_config()?.unwrap_or_default();
    let aspect = if processing.get("do_pad") == Some(&json!(true)) { "pad" } else { "square" };
    let values = [
        ("architectures", json!([class])),
        ("model_type", json!(kind)),
        ("torch_dtype", json!(dtype)),
        ("mm_vision_tower", json!(TOWER)),
        ("mm_hidden_size", json!(llava.vision_config.hidden_size)),
        ("mm_projector_type", json!(llava.projector.as_str())),
        ("mm_vision_select_layer", json!(llava.vision_feature_layer)),
        ("mm_vision_select_feature", json!(feature)),
        ("mm_patch_merge_type", json!("flat")),
        ("image_aspect_ratio", json!(aspect)),
        ("mm_use_im_start_end", json!(false)),
        // Where this is absent, their loader adds a token.
        ("mm_use_im_patch_token", json!(false)),
        ("use_mm_proj", json!(true)),
        ("tune_mm_mlp_adapter", json!(false)),
        ("freeze_mm_mlp_adapter", json!(false)),
        ("tokenizer_padding_side", json!("right")),
        ("use_cache", json!(true)),
    ];
    map.extend(values.map(|(key, value)| (key.to_owned(), value)));
    let length = source.json("tokenizer_config.json")?.and_then(|config| config.get("model_max_length")?.as_u64());
    if let Some(length) = length.filter(|&length| length < 1_000_000_000) {
        map.insert("tokenizer_model_max_length".to_owned(), json!(length));
    }
    Ok(Value::Object(map))
}

/// The name in the original layout of a tensor outside the tower.
fn original_name(canonical: &str, projector: ProjectorType) -> String {
    match (canonical.strip_prefix("multi_modal_projector.linear_"), projector) {
        (None, _) => canonical.strip_prefix("language_model.").unwrap_or(canonical).to_owned(),
        (Some(rest), ProjectorType::Linear) => {
            format!("model.mm_projector.{}", rest.strip_prefix("1.").unwrap_or(rest))
        }
        // Counted as their code does: 1 is the activation.
        (Some(rest), ProjectorType::Mlp2xGelu) => match rest.strip_prefix("1.") {
            Some(part) => format!("model.mm_projector.0.{part}"),
            None => format!("model.mm_projector.2.{}", rest.strip_prefix("2.").unwrap_or(rest)),
        },
    }
}

fn write_weights(
    folder: &Path,
    source: &ModelFolder,
    llava: &LlavaConfig,
    text: &LlamaConfig,
    dtype: Option<Dtype>,
) -> Result<Dtype> {
    // Their linears always have a bias.
    let biased = LlavaConfig { multimodal_projector_bias: true, ..llava.clone() };
    let tensors = names::language_tensors(text).into_iter().chain(names::projector_tensors(&biased));
    let tensors = tensors.map(|(name, shape)| (original_name(&name, llava.projector), name, shape));
    write_tensors(folder, source, tensors.collect(), dtype)
}

/// Writes tensors given as (name in the file, canonical name, shape). Biases and parts of
/// the tower that the source lacks are filled in: nothing computes with them.
fn write_tensors(
    folder: &Path,
    source: &ModelFolder,
    tensors: Vec<(String, String, Vec<usize>)>,
    dtype: Option<Dtype>,
) -> Result<Dtype> {
    let (mut heads, mut origins) = (Vec::new(), BTreeMap::new());
    let kept = source.dtype()?;
    for (name, canonical, shape) in tensors {
        let own = if source.has(&canonical) { source.stored(&canonical)?.dtype() } else { kept };
        heads.push(TensorHead { name: name.clone(), dtype: dtype.unwrap_or(own), shape });
        origins.insert(name, canonical);
    }
    let most = most_bytes(&heads);
    write_sharded(folder, heads, SHARD_BYTES, &mut |head| {
        let canonical = origins.get(&head.name).map_or(head.name.as_str(), String::as_str);
        if !source.has(canonical) && (canonical.starts_with(names::VISION_TOWER) || is_projector_bias(canonical)) {
            return Ok(TensorData::F32(unused_default(canonical, &head.shape).data.into()));
        }
        let stored = source.stored(canonical)?;
        let rows = if head.shape.len() > 1 { head.shape[0] } else { 1 };
        Ok(TensorData::Stored(stored.first_rows(rows)))
    })?;
    Ok(most)
}

fn is_projector_bias(canonical: &str) -> bool {
    canonical.starts_with(names::PROJECTOR) && canonical.ends_with(".bias")
}

/// A `CLIPVisionModel` folder.
fn write_tower(folder: &Path, source: &ModelFolder, llava: &LlavaConfig, dtype: Option<Dtype>) -> Result<()> {
    std::fs::create_dir(folder).map_err(|error| Error::writing(folder, error))?;
    let whole = source.config();
    let tensors = names::expected_tensors(whole).into_iter().chain(names::unused_vision_tensors(whole));
    let tensors =
        tensors.filter_map(|(name, shape)| Some((name.strip_prefix("vision_tower.")?.to_owned(), name, shape)));
    let kept = write_tensors(folder, source, tensors.collect(), dtype)?;
    let write_json = |name: &str, value: &Value| write_file(&folder.join(name), format!("{value:#}\n").as_bytes());
    let mut config = whole.to_json(dtype_name(kept))["vision_config"].take();
    config["architectures"] = json!(["CLIPVisionModel"]);
    config["torch_dtype"] = json!(dtype_name(kept));
    write_json("config.json", &config)?;
    let mut processing = processor_files::preprocessor_config(source.preprocessor_config()?, &llava.vision_config);
    if let Value::Object(map) = &mut processing {
        // The model's config says how its pictures are made square.
        map.shift_remove("do_pad");
        map.shift_remove("processor_class");
    }
    write_json("preprocessor_config.json", &processing)
}
