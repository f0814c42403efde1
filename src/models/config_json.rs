//! The three configs from their JSON objects and back: defaults, checks, and the spellings of different releases.

use serde_json::{Map, Value, json};

use super::{
    config::{Biases, ClipVisionConfig, Family, FeatureSelect, LlamaConfig, LlavaConfig, ProjectorType},
    config_fields::Fields,
    rotary::RopeScaling,
};
use crate::{error::Result, ops::attention::MAX_HEAD_SIZE};

/// Old and new spelling, wherever either stands: transformers 5 loads in the dtype it finds here. Weights that were
/// quantised are dense with it, unless who writes them says otherwise.
pub(super) fn set_dtype(map: &mut Map<String, Value>, dtype: &str) {
    map.shift_remove("quantization_config");
    for (key, value) in map.iter_mut() {
        match (key.as_str(), value) {
            ("dtype" | "torch_dtype", value) => *value = json!(dtype),
            ("text_config" | "vision_config", Value::Object(part)) => set_dtype(part, dtype),
            _ => {}
        }
    }
}

impl LlamaConfig {
    /// Defaults are those of the family's class in transformers.
    pub(super) fn from_fields(fields: &Fields, family: Family) -> Result<Self> {
        fields.only("hidden_act", &["silu", "swish"], "silu")?;
        let of = |llama, mistral, qwen2| match family {
            Family::Llama => llama,
            Family::Mistral => mistral,
            Family::Qwen2 => qwen2,
        };
        let (attention_bias, mlp_bias) = match family {
            Family::Llama => (fields.flag("attention_bias", false)?, fields.flag("mlp_bias", false)?),
            Family::Mistral | Family::Qwen2 => (false, false),
        };
        let biases = Biases { qkv: attention_bias || family == Family::Qwen2, output: attention_bias, mlp: mlp_bias };
        let sliding_window = match family {
            Family::Llama => None,
            Family::Mistral if fields.map.contains_key("sliding_window") => fields.optional_size("sliding_window")?,
            Family::Mistral => Some(4096),
            Family::Qwen2 if fields.flag("use_sliding_window", false)? => {
                return Err(fields.not_built("use_sliding_window", "a sliding window in some layers only is"));
            }
            Family::Qwen2 => None,
        };
        let hidden_size = fields.size("hidden_size", 4096)?;
        let num_attention_heads = fields.size("num_attention_heads", 32)?;
        let head_dim = match fields.optional_size("head_dim")? {
            Some(head_dim) => head_dim,
            None => fields.divided(("hidden_size", hidden_size), ("num_attention_heads", num_attention_heads))?,
        };
        if head_dim > MAX_HEAD_SIZE {
            return Err(fields.not_built("head_dim", &format!("heads of {head_dim}, wider than {MAX_HEAD_SIZE}, are")));
        }
        if head_dim % 2 == 1 {
            return Err(fields.bad("head_dim", &format!("is {head_dim}: rotary positions need an even head width")));
        }
        let num_key_value_heads = match fields.optional_size("num_key_value_heads")? {
            Some(heads) => heads,
            // Absent is not null: Mistral's class has a default of its own.
            None if family == Family::Mistral && !fields.map.contains_key("num_key_value_heads") => 8,
            None => num_attention_heads,
        };
        fields.divided(("num_attention_heads", num_attention_heads), ("num_key_value_heads", num_key_value_heads))?;
        let max_position_embeddings = match fields.optional_size("max_position_embeddings")? {
            Some(positions) => positions,
            None => fields.size("max_sequence_length", of(2048, 131_072, 32_768))?,
        };
        let (rope_theta, rope_scaling) = RopeScaling::from_fields(fields, max_position_embeddings)?;
        Ok(Self {
            hidden_size,
            family,
            intermediate_size: fields.size("intermediate_size", of(11008, 14336, 22016))?,
            num_hidden_layers: fields.layers("num_hidden_layers", 32)?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size: fields.size("vocab_size", of(32000, 32000, 151_936))?,
            rms_norm_eps: fields.positive("rms_norm_eps", 1e-6)?,
            rope_theta,
            rope_scaling,
            biases,
            sliding_window,
            tie_word_embeddings: fields.flag("tie_word_embeddings", false)?,
            max_position_embeddings,
            bos_token_id: fields.token_ids("bos_token_id", Some(1))?.first().copied(),
            eos_token_ids: fields.token_ids("eos_token_id", Some(2))?,
            pad_token_id: fields.token_ids("pad_token_id", None)?.first().copied(),
            raw: fields.map.clone(),
        })
    }

    pub(super) fn to_map(&self) -> Map<String, Value> {
        let mut map = self.raw.clone();
        let eos = match self.eos_token_ids.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            several => json!(several),
        };
        let values = [
            ("model_type", json!(self.family.as_str())),
            ("hidden_size", json!(self.hidden_size)),
            ("intermediate_size", json!(self.intermediate_size)),
            ("num_hidden_layers", json!(self.num_hidden_layers)),
            ("num_attention_heads", json!(self.num_attention_heads)),
            ("num_key_value_heads", json!(self.num_key_value_heads)),
            ("head_dim", json!(self.head_dim)),
            ("hidden_act", json!("silu")),
            ("vocab_size", json!(self.vocab_size)),
            ("rms_norm_eps", json!(self.rms_norm_eps)),
            ("tie_word_embeddings", json!(self.tie_word_embeddings)),
            ("max_position_embeddings", json!(self.max_position_embeddings)),
            ("bos_token_id", json!(self.bos_token_id)),
            ("eos_token_id", eos),
            ("pad_token_id", json!(self.pad_token_id)),
        ];
        map.extend(values.map(|(key, value)| (key.to_owned(), value)));
        match self.family {
            Family::Llama if self.biases.qkv || map.contains_key("attention_bias") => {
                map.insert("attention_bias".into(), json!(self.biases.qkv));
            }
            Family::Mistral => {
                map.insert("sliding_window".into(), json!(self.sliding_window));
            }
            _ => {}
        }
        if self.biases.mlp {
            map.insert("mlp_bias".into(), json!(true));
        }
        self.rope_scaling.write(self.rope_theta, &mut map);
        map
    }
}

impl ClipVisionConfig {
    pub(super) fn from_fields(fields: &Fields) -> Result<Self> {
        fields.only("hidden_act", &["quick_gelu"], "quick_gelu")?;
        let hidden_size = fields.size("hidden_size", 768)?;
        let num_attention_heads = fields.size("num_attention_heads", 12)?;
        let head_size = fields.divided(("hidden_size", hidden_size), ("num_attention_heads", num_attention_heads))?;
        if head_size > MAX_HEAD_SIZE {
            let what = format!("heads of {head_size}, wider than {MAX_HEAD_SIZE}, are");
            return Err(fields.not_built("num_attention_heads", &what));
        }
        let num_channels = fields.size("num_channels", 3)?;
        if num_channels != 3 {
            return Err(fields.not_built("num_channels", &format!("pictures of {num_channels} channels are")));
        }
        let image_size = fields.pixels("image_size", 224)?;
        let patch_size = fields.pixels("patch_size", 32)?;
        fields.divided(("image_size", image_size), ("patch_size", patch_size))?;
        Ok(Self {
            hidden_size,
            intermediate_size: fields.size("intermediate_size", 3072)?,
            num_hidden_layers: fields.layers("num_hidden_layers", 12)?,
            num_attention_heads,
            num_channels,
            image_size,
            patch_size,
            layer_norm_eps: fields.positive("layer_norm_eps", 1e-5)?,
            raw: fields.map.clone(),
        })
    }

    pub(super) fn to_map(&self) -> Map<String, Value> {
        let mut map = self.raw.clone();
        let values = [
            ("model_type", json!("clip_vision_model")),
            ("hidden_size", json!(self.hidden_size)),
            ("intermediate_size", json!(self.intermediate_size)),
            ("num_hidden_layers", json!(self.num_hidden_layers)),
            ("num_attention_heads", json!(self.num_attention_heads)),
            ("num_channels", json!(self.num_channels)),
            ("image_size", json!(self.image_size)),
            ("patch_size", json!(self.patch_size)),
            ("layer_norm_eps", json!(self.layer_norm_eps)),
            ("hidden_act", json!("quick_gelu")),
        ];
        map.extend(values.map(|(key, value)| (key.to_owned(), value)));
        map
    }
}

/// Whether a key of the original authors' config.json says nothing of the language model.
fn is_of_original(key: &str) -> bool {
    let prefixes =
        ["mm_", "tune_mm", "freeze_mm", "unfreeze_mm", "image_", "tokenizer_", "vision_tower", "_name_or_path"];
    prefixes.iter().any(|prefix| key.starts_with(prefix))
        || ["use_mm_proj", "architectures", "auto_map", "pretrain_mm_mlp_adapter", "transformers_version"]
            .contains(&key)
}

/// The tower of LLaVA-1.5, CLIP ViT-L/14 at 336 pixels: what a LLaVA without a vision_config has.
const RELEASED_VISION: [(&str, usize); 8] = [
    ("hidden_size", 1024),
    ("intermediate_size", 4096),
    ("num_hidden_layers", 24),
    ("num_attention_heads", 16),
    ("image_size", 336),
    ("patch_size", 14),
    ("projection_dim", 768),
    ("vocab_size", 32000),
];

impl LlavaConfig {
    pub(super) fn from_fields(fields: &Fields) -> Result<Self> {
        let empty = Map::new();
        let text_fields =
            Fields { path: "text_config.", map: fields.object("text_config")?.unwrap_or(&empty), ..*fields };
        text_fields.only("model_type", &Family::NAMES, "llama")?;
        let family = text_fields.text("model_type")?.and_then(Family::parse).unwrap_or(Family::Llama);
        let mut text_config = LlamaConfig::from_fields(&text_fields, family)?;
        // transformers 4 reads the text_config's, 5 ties if either says so.
        text_config.tie_word_embeddings |= fields.flag("tie_word_embeddings", false)?;
        // Old files keep these ids at the top alone.
        let at_top = |key: &str| !text_fields.map.contains_key(key) && fields.map.contains_key(key);
        if at_top("bos_token_id") {
            text_config.bos_token_id = fields.token_ids("bos_token_id", None)?.first().copied();
        }
        if at_top("eos_token_id") {
            text_config.eos_token_ids = fields.token_ids("eos_token_id", None)?;
        }
        if at_top("pad_token_id") {
            text_config.pad_token_id = fields.token_ids("pad_token_id", None)?.first().copied();
        }

        let released = Map::from_iter(RELEASED_VISION.map(|(key, value)| (key.to_owned(), json!(value))));
        let vision_map = fields.object("vision_config")?.unwrap_or(&released);
        let vision_fields = Fields { path: "vision_config.", map: vision_map, ..*fields };
        vision_fields.only("model_type", &["clip_vision_model"], "clip_vision_model")?;

        let projector = match fields.text("projector_hidden_act")?.unwrap_or("gelu") {
            "gelu" => ProjectorType::Mlp2xGelu,
            "linear" => ProjectorType::Linear,
            other => return Err(fields.not_built("projector_hidden_act", &format!("`{other}` is"))),
        };
        let strategy = match fields.text("vision_feature_select_strategy")?.unwrap_or("default") {
            "default" | "patch" => FeatureSelect::Default,
            "full" | "cls_patch" => FeatureSelect::Full,
            other => {
                let problem = format!("is `{other}`, but `default` or `full` is expected");
                return Err(fields.bad("vision_feature_select_strategy", &problem));
            }
        };
        let image_token_index = match fields.token_ids("image_token_index", None)?.first() {
            Some(&id) => id,
            None => fields.token_ids("image_token_id", Some(32000))?.first().copied().unwrap_or(32000),
        };
        let config = Self {
            text_config,
            vision_config: ClipVisionConfig::from_fields(&vision_fields)?,
            image_token_index,
            projector,
            multimodal_projector_bias: fields.flag("multimodal_projector_bias", true)?,
            vision_feature_layer: fields.feature_layer("vision_feature_layer", -2)?,
            vision_feature_select_strategy: strategy,
            raw: fields.map.clone(),
        };
        config.check_feature_layer(fields)?;
        Ok(config)
    }

    /// The config of the original authors: LLaMA's fields at the top, those of pictures beside them as `mm_…`. Pictures
    /// are marked by a number that is no token, so `image_token_index` is the first id behind the vocabulary.
    pub(super) fn from_original(fields: &Fields, vision_config: ClipVisionConfig) -> Result<Self> {
        let family = match fields.text("model_type")? {
            Some("llava_mistral") => Family::Mistral,
            _ => Family::Llama,
        };
        let mut text_config = LlamaConfig::from_fields(fields, family)?;
        text_config.raw.retain(|key, _| !is_of_original(key));
        let projector = match fields.text("mm_projector_type")?.unwrap_or("linear") {
            "linear" => ProjectorType::Linear,
            "mlp2x_gelu" => ProjectorType::Mlp2xGelu,
            other => {
                let error = fields.not_built("mm_projector_type", &format!("`{other}` is"));
                return Err(error.hint("`linear` and `mlp2x_gelu` are"));
            }
        };
        let width = fields.size("mm_hidden_size", vision_config.hidden_size)?;
        if width != vision_config.hidden_size {
            let problem = format!("is {width}, and the vision tower is {} wide", vision_config.hidden_size);
            return Err(fields
                .bad("mm_hidden_size", &problem)
                .hint("the tower is another than the model was trained with"));
        }
        fields.only("mm_patch_merge_type", &["flat"], "flat")?;
        fields.only("mm_resampler_type", &["identity"], "identity")?;
        if fields.flag("mm_use_im_start_end", false)? {
            return Err(fields.not_built("mm_use_im_start_end", "pictures between tokens of their own are"));
        }
        let strategy = match fields.text("mm_vision_select_feature")?.unwrap_or("patch") {
            "patch" => FeatureSelect::Default,
            "cls_patch" => FeatureSelect::Full,
            other => {
                let problem = format!("is `{other}`, but `patch` or `cls_patch` is expected");
                return Err(fields.bad("mm_vision_select_feature", &problem));
            }
        };
        let image_token_index = u32::try_from(text_config.vocab_size).unwrap_or(u32::MAX);
        let config = Self {
            vision_feature_layer: fields.feature_layer("mm_vision_select_layer", -2)?,
            vision_feature_select_strategy: strategy,
            ..Self::new(text_config, vision_config, projector, image_token_index)
        };
        config.check_feature_layer(fields)?;
        Ok(config)
    }

    fn check_feature_layer(&self, fields: &Fields) -> Result<()> {
        let layers = self.vision_config.num_hidden_layers as i64;
        if (-layers - 1..=layers).contains(&self.vision_feature_layer) {
            return Ok(());
        }
        let problem = format!("is {}, but the tower has {layers} layers", self.vision_feature_layer);
        Err(fields.bad("vision_feature_layer", &problem))
    }

    pub(super) fn to_map(&self) -> Map<String, Value> {
        let mut map = self.raw.clone();
        let act = match self.projector {
            ProjectorType::Linear => "linear",
            ProjectorType::Mlp2xGelu => "gelu",
        };
        let values = [
            ("architectures", json!(["LlavaForConditionalGeneration"])),
            ("model_type", json!("llava")),
            ("image_token_index", json!(self.image_token_index)),
            ("projector_hidden_act", json!(act)),
            ("multimodal_projector_bias", json!(self.multimodal_projector_bias)),
            ("vision_feature_layer", json!(self.vision_feature_layer)),
            ("vision_feature_select_strategy", json!(self.vision_feature_select_strategy.as_str())),
            ("image_seq_length", json!(self.image_seq_length())),
            ("tie_word_embeddings", json!(self.text_config.tie_word_embeddings)),
            ("text_config", Value::Object(self.text_config.to_map())),
            ("vision_config", Value::Object(self.vision_config.to_map())),
        ];
        map.extend(values.map(|(key, value)| (key.to_owned(), value)));
        if map.contains_key("image_token_id") {
            map.insert("image_token_id".into(), json!(self.image_token_index));
        }
        map
    }
}
