//! config.json of LLaMA and LLaVA models: fields named as in the file, Hugging Face defaults for what it leaves out.
//!
//! Every config keeps the JSON it came from, so that writing it back loses nothing this program does not know.
//! What each key means is in `config_json`.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{config_fields::Fields, config_json::set_dtype, rotary::RopeScaling};
use crate::error::{Error, Result};

/// The relatives of LLaMA that differ in biases and in how far back a token sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Llama,
    Mistral,
    Qwen2,
}

impl Family {
    pub const ALL: [Self; 3] = [Self::Llama, Self::Mistral, Self::Qwen2];
    pub const NAMES: [&'static str; 3] = ["llama", "mistral", "qwen2"];

    /// `model_type` in config.json.
    pub fn as_str(self) -> &'static str {
        Self::NAMES[self as usize]
    }

    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.as_str() == name)
    }

    /// The class of transformers that loads it.
    pub fn architecture(self) -> &'static str {
        ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"][self as usize]
    }
}

/// Which linears of a decoder layer have a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Biases {
    /// q_proj, k_proj, v_proj
    pub qkv: bool,
    /// o_proj
    pub output: bool,
    /// gate_proj, up_proj, down_proj
    pub mlp: bool,
}

/// A LLaMA-family decoder (`LlamaForCausalLM`, or the `text_config` of a LLaVA).
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    pub family: Family,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    /// Divides `num_attention_heads`; fewer means grouped-query attention.
    pub num_key_value_heads: usize,
    /// Width of one head: `hidden_size / num_attention_heads` where the file does not say.
    pub head_dim: usize,
    pub vocab_size: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    pub biases: Biases,
    /// A token sees itself and the `sliding_window - 1` tokens before it.
    pub sliding_window: Option<usize>,
    pub tie_word_embeddings: bool,
    pub max_position_embeddings: usize,
    pub bos_token_id: Option<u32>,
    /// Any of these ends an answer.
    pub eos_token_ids: Vec<u32>,
    pub pad_token_id: Option<u32>,
    /// The JSON object this came from.
    pub raw: Map<String, Value>,
}

impl LlamaConfig {
    /// How many positions a text may have.
    pub fn positions(&self) -> usize {
        self.rope_scaling.positions(self.max_position_embeddings)
    }
}

/// A CLIP vision tower (`CLIPVisionModel`, or the `vision_config` of a LLaVA). The activation is quick-GELU.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipVisionConfig {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_channels: usize,
    /// Side of the square picture in pixels.
    pub image_size: usize,
    /// Side of a square patch in pixels.
    pub patch_size: usize,
    pub layer_norm_eps: f64,
    /// The JSON object this came from.
    pub raw: Map<String, Value>,
}

impl ClipVisionConfig {
    /// Reads the config.json of a CLIP vision model, or of a whole CLIP, whose `vision_config` it is.
    ///
    /// # Errors
    /// `Data`: another kind of model, a field that cannot work, or is not built.
    pub fn parse(file: &str, json: &[u8]) -> Result<Self> {
        let map = object(file, json)?;
        let fields = Fields { file, path: "", map: &map };
        fields.only("model_type", &["clip_vision_model", "clip"], "clip_vision_model")?;
        if fields.text("model_type")? != Some("clip") {
            return Self::from_fields(&fields);
        }
        // Files of 2021 and 2022 have a second copy, which transformers reads after the first.
        let (mut inner, mut path) = (fields.object("vision_config")?, "vision_config.");
        if let Some(old) = fields.object("vision_config_dict")? {
            (inner, path) = (Some(old), "vision_config_dict.");
        }
        Self::from_fields(&Fields { file, path, map: inner.unwrap_or(&Map::new()) })
    }

    /// The towers that OpenAI released, by the last part of their names.
    pub fn released(name: &str) -> Option<Self> {
        let leaf = name.rsplit('/').next().unwrap_or(name);
        let (image_size, patch_size, [hidden_size, layers, heads]) = match leaf {
            "clip-vit-large-patch14-336" => (336, 14, [1024, 24, 16]),
            "clip-vit-large-patch14" => (224, 14, [1024, 24, 16]),
            "clip-vit-base-patch16" => (224, 16, [768, 12, 12]),
            "clip-vit-base-patch32" => (224, 32, [768, 12, 12]),
            _ => return None,
        };
        Some(Self {
            hidden_size,
            intermediate_size: 4 * hidden_size,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_channels: 3,
            image_size,
            patch_size,
            layer_norm_eps: 1e-5,
            raw: Map::new(),
        })
    }

    /// Patches of one picture, without the class token.
    pub fn num_patches(&self) -> usize {
        (self.image_size / self.patch_size).pow(2)
    }
}

/// Which rows of the vision tower's output go to the projector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureSelect {
    /// The patches (`default`; `patch` in the original code).
    Default,
    /// The class token and the patches (`full`; `cls_patch` in the original code).
    Full,
}

impl FeatureSelect {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Full => "full",
        }
    }
}

/// What lies between the vision tower and the language model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProjectorType {
    /// One linear layer. Written as `projector_hidden_act = "linear"` with an identity for the second layer.
    Linear,
    /// Linear, exact GELU, linear.
    Mlp2xGelu,
}

impl ProjectorType {
    /// The name that configs of runs use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Mlp2xGelu => "mlp2x_gelu",
        }
    }
}

/// `LlavaForConditionalGeneration`.
#[derive(Clone, Debug, PartialEq)]
pub struct LlavaConfig {
    pub text_config: LlamaConfig,
    pub vision_config: ClipVisionConfig,
    /// `image_token_index` or `image_token_id` in the file: the token that stands for one row of a picture.
    pub image_token_index: u32,
    pub projector: ProjectorType,
    pub multimodal_projector_bias: bool,
    /// Entry of the tower's hidden states, 0 being the embeddings; negative counts from the end.
    pub vision_feature_layer: i64,
    pub vision_feature_select_strategy: FeatureSelect,
    /// The JSON object this came from.
    pub raw: Map<String, Value>,
}

impl LlavaConfig {
    /// A new LLaVA made of two models, with the usual feature choice: patches of the last layer but one.
    pub fn new(
        text_config: LlamaConfig,
        vision_config: ClipVisionConfig,
        projector: ProjectorType,
        image_token_index: u32,
    ) -> Self {
        Self {
            text_config,
            vision_config,
            image_token_index,
            projector,
            multimodal_projector_bias: true,
            vision_feature_layer: -2,
            vision_feature_select_strategy: FeatureSelect::Default,
            raw: Map::new(),
        }
    }

    /// How many of the tower's layers must run to get the selected hidden state.
    pub fn vision_layers_used(&self) -> usize {
        let states = self.vision_config.num_hidden_layers as i64 + 1;
        let entry = self.vision_feature_layer;
        usize::try_from(if entry < 0 { states + entry } else { entry }).unwrap_or(0)
    }

    /// Rows that one picture takes in the sequence (`image_seq_length`).
    pub fn image_seq_length(&self) -> usize {
        let class_token = self.vision_feature_select_strategy == FeatureSelect::Full;
        self.vision_config.num_patches() + usize::from(class_token)
    }
}

/// What a model folder holds.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "there is one of these a model")]
pub enum ModelConfig {
    Llama(LlamaConfig),
    Llava(LlavaConfig),
}

impl ModelConfig {
    /// Reads DIR/config.json, or the file itself.
    pub fn load(path: &Path) -> Result<Self> {
        let file = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
        let text = std::fs::read(&file).map_err(|source| Error::reading(&file, source))?;
        Self::parse(&file.display().to_string(), &text)
    }

    /// `file` is the name that messages give.
    pub fn parse(file: &str, json: &[u8]) -> Result<Self> {
        let map = object(file, json)?;
        let fields = Fields { file, path: "", map: &map };
        match fields.text("model_type")? {
            Some(name) if let Some(family) = Family::parse(name) => {
                Ok(Self::Llama(LlamaConfig::from_fields(&fields, family)?))
            }
            Some("llava") if !map.contains_key("mm_vision_tower") => {
                Ok(Self::Llava(LlavaConfig::from_fields(&fields)?))
            }
            Some("llava" | "llava_llama" | "llava_mistral") => Err(fields
                .bad("model_type", "is that of the original LLaVA authors, whose folders are read from the disk only")),
            Some(other) => Err(fields
                .not_built("model_type", &format!("model type `{other}` is"))
                .hint("`llama`, `mistral`, `qwen2` and `llava` are")),
            None => Err(fields.bad("model_type", "is missing").hint("`llama` or `llava` is expected")),
        }
    }

    /// The name of the vision tower in a config.json of the original LLaVA authors (`mm_vision_tower`); none in any
    /// other's.
    pub fn original_tower(json: &[u8]) -> Option<String> {
        let value: Value = serde_json::from_slice(json).ok()?;
        let ours = value["model_type"].as_str().is_some_and(|kind| kind.starts_with("llava"));
        value["mm_vision_tower"].as_str().filter(|_| ours).map(str::to_owned)
    }

    /// Reads a config.json of the original LLaVA authors, whose vision tower is described elsewhere.
    ///
    /// # Errors
    /// `Data`: a field that cannot work, or is not built.
    pub fn parse_original(file: &str, json: &[u8], vision: ClipVisionConfig) -> Result<Self> {
        let map = object(file, json)?;
        Ok(Self::Llava(LlavaConfig::from_original(&Fields { file, path: "", map: &map }, vision)?))
    }

    /// The language model.
    pub fn text(&self) -> &LlamaConfig {
        match self {
            Self::Llama(config) => config,
            Self::Llava(config) => &config.text_config,
        }
    }

    pub fn text_mut(&mut self) -> &mut LlamaConfig {
        match self {
            Self::Llama(config) => config,
            Self::Llava(config) => &mut config.text_config,
        }
    }

    /// The parts that see, where there are any.
    pub fn llava(&self) -> Option<&LlavaConfig> {
        match self {
            Self::Llama(_) => None,
            Self::Llava(config) => Some(config),
        }
    }

    /// The file's JSON with this config's values in it. `dtype` is that of the weights written beside it.
    pub fn to_json(&self, dtype: &str) -> Value {
        let mut map = match self {
            Self::Llama(config) => config.to_map(),
            Self::Llava(config) => config.to_map(),
        };
        map.entry("architectures").or_insert_with(|| json!([self.text().family.architecture()]));
        map.insert("dtype".into(), json!(dtype));
        set_dtype(&mut map, dtype);
        Value::Object(map)
    }
}

fn object(file: &str, json: &[u8]) -> Result<Map<String, Value>> {
    let value: Value = serde_json::from_slice(json)
        .map_err(|source| Error::data(format!("{file} is not valid JSON")).caused_by(source))?;
    match value {
        Value::Object(map) => Ok(map),
        _ => Err(Error::data(format!("{file} does not hold a JSON object"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<ModelConfig> {
        ModelConfig::parse("m/config.json", json.as_bytes())
    }

    #[test]
    fn what_a_sparse_file_leaves_out_has_the_hugging_face_defaults() {
        let sparse = parse(
            r#"{"model_type": "llava", "image_token_index": 32000, "text_config": {"model_type": "llama", "vocab_size": 32064,
                "rms_norm_eps": 1e-05, "max_position_embeddings": 4096}, "vision_config": {"patch_size": null}}"#,
        );
        let config = sparse.unwrap();
        let (llava, text) = (config.llava().unwrap(), config.text());
        assert_eq!(
            (text.hidden_size, text.num_key_value_heads, text.head_dim, text.vocab_size),
            (4096, 32, 128, 32064)
        );
        assert_eq!((text.rms_norm_eps, text.rope_theta, text.tie_word_embeddings), (1e-5, 1e4, false));
        assert_eq!((text.bos_token_id, text.eos_token_ids.as_slice(), text.pad_token_id), (Some(1), &[2][..], None));
        let vision = &llava.vision_config;
        assert_eq!(
            (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size),
            (768, 12, 224, 32)
        );
        let released = parse(r#"{"model_type": "llava"}"#).unwrap();
        let released = released.llava().unwrap();
        assert_eq!((released.image_seq_length(), released.vision_layers_used()), (576, 23));
        assert_eq!(released.projector, ProjectorType::Mlp2xGelu);
    }

    #[test]
    fn both_spellings_of_the_same_thing_are_read() {
        let theta = |json: &str| parse(json).unwrap().text().rope_theta;
        assert_eq!(theta(r#"{"model_type": "llama", "rope_theta": 5e5, "rope_scaling": null}"#), 5e5);
        let parameters = r#""rope_parameters": {"rope_type": "default", "rope_theta": 7e4}"#;
        assert_eq!(theta(&format!(r#"{{"model_type": "llama", "rope_theta": 1e4, {parameters}}}"#)), 7e4);
        for json in [
            r#"{"model_type": "llava", "tie_word_embeddings": true}"#,
            r#"{"model_type": "llava", "text_config": {"tie_word_embeddings": true}}"#,
            r#"{"model_type": "llava", "tie_word_embeddings": false, "text_config": {"tie_word_embeddings": true}}"#,
        ] {
            assert!(parse(json).unwrap().text().tie_word_embeddings);
        }
        let id = parse(r#"{"model_type": "llava", "image_token_id": 9, "vision_feature_layer": [3]}"#).unwrap();
        assert_eq!((id.llava().unwrap().image_token_index, id.llava().unwrap().vision_layers_used()), (9, 3));
        let top = parse(
            r#"{"model_type": "llava", "pad_token_id": 4, "eos_token_id": 7, "text_config": {"eos_token_id": 2}}"#,
        );
        let top = top.unwrap();
        assert_eq!((top.text().eos_token_ids.as_slice(), top.text().pad_token_id), (&[2][..], Some(4)));
        let eos = parse(r#"{"model_type": "llama", "eos_token_id": [4, 5], "pad_token_id": -1}"#).unwrap();
        assert_eq!((eos.text().eos_token_ids.as_slice(), eos.text().pad_token_id), (&[4, 5][..], None));
    }

    #[test]
    fn writing_back_loses_nothing_and_reads_the_same() {
        let json = r#"{"model_type": "llava", "x": {"y": [1]}, "torch_dtype": "float16", "projector_hidden_act": "linear",
            "text_config": {"dtype": "float16", "z": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 7e4}},
            "vision_config": {"hidden_size": 24, "w": 2}, "vision_feature_select_strategy": "full"}"#;
        let config = parse(json).unwrap();
        let written = config.to_json("float32");
        assert_eq!((&written["x"], &written["text_config"]["z"]), (&json!({"y": [1]}), &json!(1)));
        assert_eq!((&written["vision_config"]["w"], &written["projector_hidden_act"]), (&json!(2), &json!("linear")));
        assert_eq!((&written["dtype"], &written["torch_dtype"]), (&json!("float32"), &json!("float32")));
        assert_eq!(written["text_config"]["dtype"], "float32");
        assert_eq!(written["image_seq_length"], 50);
        let again = parse(&written.to_string()).unwrap();
        assert_eq!(again.to_json("float32"), written);
        assert_eq!(again.llava().unwrap().vision_config.hidden_size, 24);
    }

    #[test]
    fn what_cannot_work_is_named_by_file_and_key() {
        let llama = |fields: &str| format!(r#"{{"model_type": "llama", {fields}}}"#);
        let vision = |fields: &str| format!(r#"{{"model_type": "llava", "vision_config": {{{fields}}}}}"#);
        let rows = [
            ("[1]".to_owned(), "JSON object"),
            ("{".to_owned(), "not valid JSON"),
            ("{}".to_owned(), "model_type is missing"),
            (r#"{"model_type": "gemma2"}"#.to_owned(), "`gemma2` is not built yet"),
            (r#"{"model_type": "qwen2", "use_sliding_window": true}"#.to_owned(), "use_sliding_window: "),
            (r#"{"model_type": "llava", "mm_vision_tower": "x"}"#.to_owned(), "original LLaVA authors"),
            (llama(r#""hidden_size": 0"#), "hidden_size is 0"),
            (llama(r#""hidden_size": "wide""#), "hidden_size is \"wide\""),
            (llama(r#""num_hidden_layers": 99999999999"#), "num_hidden_layers is 99999999999"),
            (llama(r#""num_attention_heads": 30"#), "hidden_size is 4096, which num_attention_heads = 30"),
            (llama(r#""num_key_value_heads": 5"#), "num_attention_heads is 32, which num_key_value_heads = 5"),
            (llama(r#""head_dim": 33"#), "head_dim is 33"),
            (llama(r#""head_dim": 258"#), "head_dim: heads of 258, wider than 256, are not built yet"),
            (vision(r#""hidden_size": 514, "num_attention_heads": 2"#), "heads of 257, wider than 256"),
            (llama(r#""rms_norm_eps": 0"#), "rms_norm_eps is 0"),
            (llama(r#""hidden_act": "gelu""#), "hidden_act: `gelu` is not built yet"),
            (
                llama(r#""rope_scaling": {"rope_type": "yarn", "factor": 8}"#),
                "rope_scaling.rope_type: rotary scaling of type `yarn`",
            ),
            (llama(r#""rope_scaling": {"type": "linear"}"#), "rope_scaling.factor is missing"),
            (llama(r#""eos_token_id": "x""#), "eos_token_id is \"x\""),
            (vision(r#""image_size": 225"#), "vision_config.image_size is 225, which vision_config.patch_size = 32"),
            (vision(r#""hidden_act": "gelu""#), "vision_config.hidden_act: `gelu`"),
            (vision(r#""model_type": "siglip_vision_model""#), "vision_config.model_type: `siglip_vision_model`"),
            (r#"{"model_type": "llava", "vision_feature_layer": -26}"#.to_owned(), "vision_feature_layer is -26"),
            (r#"{"model_type": "llava", "vision_feature_layer": [1, 2]}"#.to_owned(), "several layers"),
            (r#"{"model_type": "llava", "projector_hidden_act": "relu"}"#.to_owned(), "`relu` is not built yet"),
            (
                r#"{"model_type": "llava", "text_config": {"model_type": "opt"}}"#.to_owned(),
                "text_config.model_type: `opt`",
            ),
        ];
        for (json, expected) in rows {
            let error = parse(&json).expect_err(&json);
            assert!(error.message.contains("m/config.json") && error.message.contains(expected), "{expected}: {error}");
            assert_eq!(error.kind, crate::error::ErrorKind::Data);
        }
    }
}
