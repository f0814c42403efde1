//! The small JSON files beside a model's weights, made or completed from its config so that transformers loads the folder.

use serde_json::{Map, Value, json};

use crate::models::config::{ClipVisionConfig, LlamaConfig, LlavaConfig};

/// The channel means and deviations CLIP was trained with.
const CLIP_MEAN: [f64; 3] = [0.48145466, 0.4578275, 0.40821073];
const CLIP_STD: [f64; 3] = [0.26862954, 0.26130258, 0.27577711];
/// Pillow's number for bicubic.
const BICUBIC: u8 = 3;
const FAST_TOKENIZER: &str = "PreTrainedTokenizerFast";

/// Sets the keys that `map` does not have.
fn complete<const N: usize>(map: &mut Map<String, Value>, defaults: [(&str, Value); N]) {
    for (key, value) in defaults {
        if map.get(key).is_none_or(Value::is_null) {
            map.insert(key.to_owned(), value);
        }
    }
}

/// preprocessor_config.json: what there was, or CLIP's preprocessing at the tower's size.
pub fn preprocessor_config(present: Option<Map<String, Value>>, vision: &ClipVisionConfig) -> Value {
    let size = vision.image_size;
    let mut map = present.unwrap_or_else(|| {
        let mut map = Map::new();
        complete(
            &mut map,
            [
                ("do_resize", json!(true)),
                ("size", json!({"shortest_edge": size})),
                ("resample", json!(BICUBIC)),
                ("do_center_crop", json!(true)),
                ("crop_size", json!({"height": size, "width": size})),
                ("do_rescale", json!(true)),
                ("rescale_factor", json!(1.0 / 255.0)),
                ("do_normalize", json!(true)),
                ("image_mean", json!(CLIP_MEAN)),
                ("image_std", json!(CLIP_STD)),
                ("do_convert_rgb", json!(true)),
            ],
        );
        map
    });
    // A tower for another size than the processor was made for.
    let made = map.get("crop_size").or(map.get("size")).cloned().unwrap_or(json!(size));
    if resized(&made, size) != made {
        for key in ["size", "crop_size"] {
            if let Some(value) = map.get_mut(key) {
                *value = resized(value, size);
            }
        }
    }
    complete(&mut map, [("image_processor_type", json!("CLIPImageProcessor"))]);
    map.insert("processor_class".into(), json!("LlavaProcessor"));
    Value::Object(map)
}

/// A size in the form that it has: a number, the shortest edge, or both sides.
fn resized(value: &Value, size: usize) -> Value {
    match value {
        Value::Number(_) => json!(size),
        Value::Object(form) if form.contains_key("shortest_edge") => json!({"shortest_edge": size}),
        Value::Object(form) if form.contains_key("height") => json!({"height": size, "width": size}),
        other => other.clone(),
    }
}

/// The same, with pictures squared with the mean colour first, in transformers' words.
pub fn padded(mut preprocessor: Value) -> Value {
    preprocessor["do_pad"] = json!(true);
    preprocessor["image_processor_type"] = json!("LlavaImageProcessor");
    preprocessor
}

/// processor_config.json: how many placeholder tokens a picture takes. Without it, old releases expand each picture to one.
pub fn processor_config(present: Option<Map<String, Value>>, config: &LlavaConfig) -> Value {
    let mut map = present.unwrap_or_default();
    // transformers 5 keeps a copy of preprocessor_config.json in here, and would read that one first.
    map.shift_remove("image_processor");
    let strategy = config.vision_feature_select_strategy.as_str();
    map.insert("processor_class".into(), json!("LlavaProcessor"));
    map.insert("patch_size".into(), json!(config.vision_config.patch_size));
    map.insert("vision_feature_select_strategy".into(), json!(strategy));
    // The class token.
    map.insert("num_additional_image_tokens".into(), json!(1));
    complete(&mut map, [("image_token", json!("<image>"))]);
    Value::Object(map)
}

/// generation_config.json: what there was, or the config's special tokens.
pub fn generation_config(present: Option<Map<String, Value>>, text: &LlamaConfig) -> Value {
    let mut map = present.unwrap_or_else(|| Map::from_iter([("_from_model_config".to_owned(), json!(true))]));
    let eos = match text.eos_token_ids.as_slice() {
        [] => Value::Null,
        [one] => json!(one),
        several => json!(several),
    };
    let ids =
        [("bos_token_id", json!(text.bos_token_id)), ("eos_token_id", eos), ("pad_token_id", json!(text.pad_token_id))];
    complete(&mut map, ids);
    map.retain(|_, value| !value.is_null());
    Value::Object(map)
}

/// tokenizer_config.json: what there was, or the plainest one for tokenizer.json, special tokens by their ids.
pub fn tokenizer_config(present: Option<Map<String, Value>>, tokenizer: &Value, text: &LlamaConfig) -> Value {
    if let Some(mut map) = present {
        // The name transformers 5 gives it; both 4 and 5 know the older one.
        if map.get("tokenizer_class").is_some_and(|class| class == "TokenizersBackend") {
            map.insert("tokenizer_class".to_owned(), json!(FAST_TOKENIZER));
        }
        return Value::Object(map);
    }
    let mut map = Map::from_iter([
        ("tokenizer_class".to_owned(), json!(FAST_TOKENIZER)),
        ("clean_up_tokenization_spaces".to_owned(), json!(false)),
        ("model_max_length".to_owned(), json!(text.max_position_embeddings)),
        // No token_type_ids, which no model here takes.
        ("model_input_names".to_owned(), json!(["input_ids", "attention_mask"])),
    ]);
    let special = [
        ("bos_token", text.bos_token_id),
        ("eos_token", text.eos_token_ids.first().copied()),
        ("pad_token", text.pad_token_id),
    ];
    for (key, id) in special {
        if let Some(token) = id.and_then(|id| token_of(tokenizer, id)) {
            map.insert(key.to_owned(), json!(token));
        }
    }
    if let Some(token) = tokenizer["model"]["unk_token"].as_str() {
        map.insert("unk_token".to_owned(), json!(token));
    }
    Value::Object(map)
}

/// The text of a token in a tokenizer.json.
fn token_of(tokenizer: &Value, id: u32) -> Option<&str> {
    let is_id = |value: &Value| value.as_u64() == Some(id.into());
    let added = tokenizer["added_tokens"].as_array().into_iter().flatten();
    let added = added.filter(|token| is_id(&token["id"])).find_map(|token| token["content"].as_str());
    let vocab = tokenizer["model"]["vocab"].as_object().into_iter().flatten();
    added.or_else(|| vocab.filter(|(_, value)| is_id(value)).map(|(token, _)| token.as_str()).next())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::config::ModelConfig;

    #[test]
    fn the_plainest_tokenizer_config_names_the_special_tokens() {
        let config =
            ModelConfig::parse("c", br#"{"model_type": "llama", "pad_token_id": 7, "eos_token_id": [2, 3]}"#).unwrap();
        let tokenizer = json!({
            "added_tokens": [{"id": 1, "content": "<s>"}, {"id": 2, "content": "</s>"}],
            "model": {"unk_token": "<unk>", "vocab": {"<unk>": 0, "pad": 7}},
        });
        let made = tokenizer_config(None, &tokenizer, config.text());
        assert_eq!((&made["bos_token"], &made["eos_token"]), (&json!("<s>"), &json!("</s>")));
        assert_eq!((&made["pad_token"], &made["unk_token"]), (&json!("pad"), &json!("<unk>")));
    }

    #[test]
    fn generation_config_keeps_what_there_was() {
        let config = ModelConfig::parse("c", br#"{"model_type": "llama"}"#).unwrap();
        let present = Map::from_iter([("eos_token_id".to_owned(), json!([5])), ("top_p".to_owned(), json!(0.5))]);
        let made = generation_config(Some(present), config.text());
        assert_eq!(made, json!({"eos_token_id": [5], "top_p": 0.5, "bos_token_id": 1}));
    }
}
