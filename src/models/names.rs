//! Tensor names: the one place that knows how checkpoints spell them.
//!
//! The canonical name of a tensor is the one that llava-hf files carry on disk: `language_model.model.layers.N…`,
//! `language_model.lm_head.weight`, `vision_tower.vision_model…`, `multi_modal_projector.linear_{1,2}…`. A plain LLaMA
//! has the same names for its parts, so that the model code knows one spelling only.

use super::config::{ClipVisionConfig, LlamaConfig, LlavaConfig, ModelConfig, ProjectorType};

pub const EMBED_TOKENS: &str = "language_model.model.embed_tokens.weight";
/// What the names of everything in the decoder's layers begin with.
pub const DECODER_LAYERS: &str = "language_model.model.layers.";
pub const FINAL_NORM: &str = "language_model.model.norm.weight";
pub const LM_HEAD: &str = "language_model.lm_head.weight";
pub const PROJECTOR: &str = "multi_modal_projector";
pub const VISION_TOWER: &str = "vision_tower";
pub const POSITION_EMBEDDING: &str = "vision_tower.vision_model.embeddings.position_embedding.weight";

/// The decoder layer that a tensor belongs to.
pub fn decoder_layer(name: &str) -> Option<usize> {
    name.strip_prefix(DECODER_LAYERS)?.split_once('.')?.0.parse().ok()
}

/// A tensor's name and shape.
pub type NamedShape = (String, Vec<usize>);

/// The canonical spelling of a name of any layout that transformers or PEFT has written; a name that belongs to no
/// layout comes back as it is.
pub fn canonical(name: &str) -> String {
    let mut name = name;
    for wrapper in ["module.", "_orig_mod.", "base_model.model.", "_orig_mod."] {
        name = name.strip_prefix(wrapper).unwrap_or(name);
    }
    // transformers 4.52 and later at run time
    if let Some(rest) = name.strip_prefix("model.language_model.") {
        return format!("language_model.model.{rest}");
    }
    if let Some(rest) = name.strip_prefix("language_model.") {
        let whole = rest.starts_with("model.") || rest.starts_with("lm_head");
        return if whole { name.to_owned() } else { format!("language_model.model.{rest}") };
    }
    if name.starts_with("lm_head") {
        return format!("language_model.{name}");
    }
    if let Some(part) = of_original_projector(name.strip_prefix("model.").unwrap_or(name)) {
        return format!("{PROJECTOR}.{part}");
    }
    if let Some(rest) = name.strip_prefix("model.") {
        let of_llama = ["embed_tokens.", "layers.", "norm."].iter().any(|part| rest.starts_with(part));
        let of_llava = ["vision_tower.", "multi_modal_projector."].iter().any(|part| rest.starts_with(part));
        if of_llama {
            return format!("language_model.{name}");
        }
        if of_llava {
            name = rest;
        }
    }
    // The original LLaVA keeps its tower in another of the same name.
    while name.starts_with("vision_tower.vision_tower.") {
        name = &name["vision_tower.".len()..];
    }
    if let Some(rest) = name.strip_prefix("vision_tower.") {
        // transformers 5 has no inner vision_model
        let inner = ["embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm."];
        if inner.iter().any(|part| rest.starts_with(part)) {
            return format!("vision_tower.vision_model.{rest}");
        }
    }
    name.to_owned()
}

/// The canonical spelling of a name in a CLIP's own checkpoint; none for what belongs to its text half or is computed
/// here.
pub fn canonical_of_tower(name: &str) -> Option<String> {
    let of_text = ["text_model.", "text_projection.", "visual_projection.", "text_embeds", "logit_scale"];
    if is_ignorable(name) || of_text.iter().any(|part| name.starts_with(part)) {
        return None;
    }
    let bare = name.strip_prefix("vision_model.").unwrap_or(name);
    Some(canonical(&format!("{VISION_TOWER}.{bare}")))
}

/// The projector of the original LLaVA: one linear layer, or layers 0 and 2 around a GELU.
fn of_original_projector(name: &str) -> Option<String> {
    let rest = name.strip_prefix("mm_projector.")?;
    for (number, layer) in [("0.", "linear_1."), ("2.", "linear_2.")] {
        if let Some(part) = rest.strip_prefix(number) {
            return Some(format!("{layer}{part}"));
        }
    }
    ["weight", "bias"].contains(&rest).then(|| format!("linear_1.{rest}"))
}

/// The canonical name of a module, from the name it has in any layout: [`canonical`] of its weight, without that part.
pub fn canonical_module(module: &str) -> String {
    let weight = canonical(&format!("{module}.weight"));
    weight.strip_suffix(".weight").unwrap_or(&weight).to_owned()
}

/// The spelling in a written model folder: canonical for a LLaVA, without the first part for a plain LLaMA.
pub fn on_disk(canonical: &str, config: &ModelConfig) -> String {
    match config {
        ModelConfig::Llava(_) => canonical.to_owned(),
        ModelConfig::Llama(_) => canonical.strip_prefix("language_model.").unwrap_or(canonical).to_owned(),
    }
}

/// The spelling inside a loaded model of transformers 4.52 and later, which PEFT uses behind `base_model.model.`
pub fn at_runtime(canonical: &str, config: &ModelConfig) -> String {
    let Some(rest) = canonical.strip_prefix("language_model.") else { return format!("model.{canonical}") };
    match (config, rest.strip_prefix("model.")) {
        (ModelConfig::Llava(_), Some(rest)) => format!("model.language_model.{rest}"),
        _ => rest.to_owned(),
    }
}

/// Buffers that old files carry and that are computed here.
pub fn is_ignorable(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || name.ends_with(".position_ids") || name == "model.image_newline"
}

/// Every tensor that the model computes with, by canonical name. Of the vision tower these are the layers up to the
/// selected one; of a `linear` projector the one layer.
pub fn expected_tensors(config: &ModelConfig) -> Vec<NamedShape> {
    let mut tensors = language_tensors(config.text());
    if let Some(llava) = config.llava() {
        tensors.extend(projector_tensors(llava));
        tensors.extend(vision_tensors(&llava.vision_config, 0..llava.vision_layers_used(), true));
    }
    tensors
}

/// What a whole folder holds besides: the layers behind the selected one and the norm after them.
pub fn unused_vision_tensors(config: &ModelConfig) -> Vec<NamedShape> {
    let Some(llava) = config.llava() else { return Vec::new() };
    let vision = &llava.vision_config;
    let mut tensors = vision_tensors(vision, llava.vision_layers_used()..vision.num_hidden_layers, false);
    for part in ["weight", "bias"] {
        tensors.push((format!("vision_tower.vision_model.post_layernorm.{part}"), vec![vision.hidden_size]));
    }
    tensors
}

/// The language model's tensors; no head where the embeddings serve as one.
pub fn language_tensors(config: &LlamaConfig) -> Vec<NamedShape> {
    let (hidden, vocab) = (config.hidden_size, config.vocab_size);
    let mut tensors = vec![(EMBED_TOKENS.to_owned(), vec![vocab, hidden])];
    for layer in 0..config.num_hidden_layers {
        let prefix = format!("language_model.model.layers.{layer}");
        tensors.push((format!("{prefix}.input_layernorm.weight"), vec![hidden]));
        tensors.push((format!("{prefix}.post_attention_layernorm.weight"), vec![hidden]));
        for (name, [outputs, inputs]) in layer_linears(config) {
            tensors.push((format!("{prefix}.{name}.weight"), vec![outputs, inputs]));
            if has_bias(config, name) {
                tensors.push((format!("{prefix}.{name}.bias"), vec![outputs]));
            }
        }
    }
    tensors.push((FINAL_NORM.to_owned(), vec![hidden]));
    if !config.tie_word_embeddings {
        tensors.push((LM_HEAD.to_owned(), vec![vocab, hidden]));
    }
    tensors
}

/// The seven linears of a decoder layer, each `[out, in]`, named within the layer.
pub fn layer_linears(config: &LlamaConfig) -> [(&'static str, [usize; 2]); 7] {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let queries = config.num_attention_heads * config.head_dim;
    let keys = config.num_key_value_heads * config.head_dim;
    [
        ("self_attn.q_proj", [queries, hidden]),
        ("self_attn.k_proj", [keys, hidden]),
        ("self_attn.v_proj", [keys, hidden]),
        ("self_attn.o_proj", [hidden, queries]),
        ("mlp.gate_proj", [inner, hidden]),
        ("mlp.up_proj", [inner, hidden]),
        ("mlp.down_proj", [hidden, inner]),
    ]
}

/// Whether a linear of [`layer_linears`] has a bias.
pub fn has_bias(config: &LlamaConfig, linear: &str) -> bool {
    match linear {
        "self_attn.o_proj" => config.biases.output,
        _ if linear.starts_with("self_attn.") => config.biases.qkv,
        _ => config.biases.mlp,
    }
}

/// The linears of all decoder layers by canonical module name (without `.weight`), each `[out, in]`: what LoRA adapts.
pub fn decoder_linears(config: &LlamaConfig) -> Vec<(String, [usize; 2])> {
    let layers = 0..config.num_hidden_layers;
    let of_layer = |layer| {
        let linears = layer_linears(config).into_iter();
        linears.map(move |(name, shape)| (format!("language_model.model.layers.{layer}.{name}"), shape))
    };
    layers.flat_map(of_layer).collect()
}

/// Every linear of the model, decoder, head, projector and tower (the layers behind the selected one too), by canonical
/// module name, each `[out, in]`: what PEFT can adapt. A head that is tied to the embeddings counts as a linear.
pub fn linears(config: &ModelConfig) -> Vec<(String, [usize; 2])> {
    let text = config.text();
    let mut linears = decoder_linears(text);
    linears.push((LM_HEAD.trim_end_matches(".weight").to_owned(), [text.vocab_size, text.hidden_size]));
    for (name, shape) in expected_tensors(config).into_iter().chain(unused_vision_tensors(config)) {
        let outside = name.starts_with(PROJECTOR) || name.starts_with(VISION_TOWER);
        if let (true, Some(module), &[outputs, inputs]) = (outside, name.strip_suffix(".weight"), &shape[..])
            && !module.ends_with(".position_embedding")
        {
            linears.push((module.to_owned(), [outputs, inputs]));
        }
    }
    linears
}

/// The projector's own tensors.
pub fn projector_tensors(config: &LlavaConfig) -> Vec<NamedShape> {
    let (inputs, outputs) = (config.vision_config.hidden_size, config.text_config.hidden_size);
    let mut tensors = projector_layer(1, inputs, outputs, config.multimodal_projector_bias);
    if config.projector == ProjectorType::Mlp2xGelu {
        tensors.extend(projector_layer(2, outputs, outputs, config.multimodal_projector_bias));
    }
    tensors
}

/// The second layer that a `linear` projector has on disk only: an identity with zero bias. Empty for the others.
pub fn projector_identity_tensors(config: &LlavaConfig) -> Vec<NamedShape> {
    let outputs = config.text_config.hidden_size;
    match config.projector {
        ProjectorType::Linear => projector_layer(2, outputs, outputs, config.multimodal_projector_bias),
        ProjectorType::Mlp2xGelu => Vec::new(),
    }
}

fn projector_layer(number: usize, inputs: usize, outputs: usize, bias: bool) -> Vec<NamedShape> {
    let mut tensors = vec![(format!("{PROJECTOR}.linear_{number}.weight"), vec![outputs, inputs])];
    if bias {
        tensors.push((format!("{PROJECTOR}.linear_{number}.bias"), vec![outputs]));
    }
    tensors
}

fn vision_tensors(config: &ClipVisionConfig, layers: std::ops::Range<usize>, embeddings: bool) -> Vec<NamedShape> {
    let (width, inner) = (config.hidden_size, config.intermediate_size);
    let root = "vision_tower.vision_model";
    let mut tensors = Vec::new();
    if embeddings {
        let patch = config.patch_size;
        tensors.push((format!("{root}.embeddings.class_embedding"), vec![width]));
        let kernel = vec![width, config.num_channels, patch, patch];
        tensors.push((format!("{root}.embeddings.patch_embedding.weight"), kernel));
        tensors.push((format!("{root}.embeddings.position_embedding.weight"), vec![config.num_patches() + 1, width]));
        // The misspelling is the real name.
        for part in ["weight", "bias"] {
            tensors.push((format!("{root}.pre_layrnorm.{part}"), vec![width]));
        }
    }
    for layer in layers {
        let prefix = format!("{root}.encoder.layers.{layer}");
        for norm in ["layer_norm1", "layer_norm2"] {
            for part in ["weight", "bias"] {
                tensors.push((format!("{prefix}.{norm}.{part}"), vec![width]));
            }
        }
        let attention =
            ["q_proj", "k_proj", "v_proj", "out_proj"].map(|name| (format!("self_attn.{name}"), width, width));
        let mlp = [("mlp.fc1".to_owned(), inner, width), ("mlp.fc2".to_owned(), width, inner)];
        for (name, outputs, inputs) in attention.into_iter().chain(mlp) {
            tensors.push((format!("{prefix}.{name}.weight"), vec![outputs, inputs]));
            tensors.push((format!("{prefix}.{name}.bias"), vec![outputs]));
        }
    }
    tensors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_layout_has_one_canonical_name() {
        let rows = [
            (
                "language_model.model.layers.3.mlp.up_proj.weight",
                vec![
                    "language_model.model.layers.3.mlp.up_proj.weight",
                    "model.language_model.layers.3.mlp.up_proj.weight",
                    "language_model.layers.3.mlp.up_proj.weight",
                    "model.layers.3.mlp.up_proj.weight",
                    "base_model.model.model.language_model.layers.3.mlp.up_proj.weight",
                    "base_model.model.language_model.model.layers.3.mlp.up_proj.weight",
                    "base_model.model.model.layers.3.mlp.up_proj.weight",
                    "module._orig_mod.model.layers.3.mlp.up_proj.weight",
                ],
            ),
            (LM_HEAD, vec![LM_HEAD, "lm_head.weight", "base_model.model.lm_head.weight"]),
            (EMBED_TOKENS, vec![EMBED_TOKENS, "model.embed_tokens.weight", "model.language_model.embed_tokens.weight"]),
            (FINAL_NORM, vec![FINAL_NORM, "model.norm.weight", "language_model.norm.weight"]),
            (
                "vision_tower.vision_model.pre_layrnorm.bias",
                vec![
                    "vision_tower.vision_model.pre_layrnorm.bias",
                    "model.vision_tower.vision_model.pre_layrnorm.bias",
                    "vision_tower.pre_layrnorm.bias",
                    "model.vision_tower.pre_layrnorm.bias",
                    "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias",
                ],
            ),
            (
                "multi_modal_projector.linear_1.bias",
                vec![
                    "multi_modal_projector.linear_1.bias",
                    "model.multi_modal_projector.linear_1.bias",
                    "base_model.model.model.multi_modal_projector.linear_1.bias",
                    "model.mm_projector.0.bias",
                    "mm_projector.0.bias",
                    "model.mm_projector.bias",
                    "base_model.model.model.mm_projector.0.bias",
                ],
            ),
            ("multi_modal_projector.linear_2.weight", vec!["model.mm_projector.2.weight"]),
            (
                "vision_tower.vision_model.embeddings.class_embedding",
                vec![
                    "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding",
                    "model.vision_tower.vision_tower.embeddings.class_embedding",
                ],
            ),
            ("model.mm_projector.1.weight", vec!["model.mm_projector.1.weight"]),
            ("model.image_newline", vec!["model.image_newline"]),
        ];
        for (expected, spellings) in rows {
            for name in spellings {
                assert_eq!(canonical(name), expected, "{name}");
            }
        }
    }

    #[test]
    fn a_tower_of_its_own_has_the_same_names() {
        let name = |stored: &str| canonical_of_tower(stored);
        let expected = Some("vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias".to_owned());
        assert_eq!(name("vision_model.encoder.layers.0.mlp.fc1.bias"), expected);
        assert_eq!(name("encoder.layers.0.mlp.fc1.bias"), expected);
        for other in ["text_model.encoder.layers.0.mlp.fc1.bias", "logit_scale", "vision_model.embeddings.position_ids"]
        {
            assert_eq!(name(other), None);
        }
    }

    #[test]
    fn names_of_a_plain_llama_and_of_a_llava_go_both_ways() {
        let llama = ModelConfig::parse("config.json", br#"{"model_type": "llama"}"#).unwrap();
        let llava = ModelConfig::parse("config.json", br#"{"model_type": "llava"}"#).unwrap();
        for config in [&llama, &llava] {
            for (name, _) in expected_tensors(config) {
                assert_eq!(canonical(&on_disk(&name, config)), name);
                assert_eq!(canonical(&format!("base_model.model.{}", at_runtime(&name, config))), name);
            }
        }
        assert_eq!(on_disk(LM_HEAD, &llama), "lm_head.weight");
        assert_eq!(at_runtime(LM_HEAD, &llava), "lm_head.weight");
        assert_eq!(at_runtime(FINAL_NORM, &llava), "model.language_model.norm.weight");
        assert_eq!(at_runtime(FINAL_NORM, &llama), "model.norm.weight");
    }

    /// Counts of the published models: language model 6 738 415 616, projector 20 979 712, CLIP up to layer 22
    /// 290 909 184 and whole 303 507 456, with a vocabulary of 32 000.
    #[test]
    fn the_7b_model_has_its_published_number_of_parameters() {
        let config = ModelConfig::parse("config.json", br#"{"model_type": "llava"}"#).unwrap();
        let count =
            |tensors: &[NamedShape]| tensors.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum::<usize>();
        let vision = 290_909_184;
        assert_eq!(count(&language_tensors(config.text())), 6_738_415_616);
        assert_eq!(count(&expected_tensors(&config)), 6_738_415_616 + 20_979_712 + vision);
        assert_eq!(count(&unused_vision_tensors(&config)), 303_507_456 - vision);
        assert_eq!(expected_tensors(&config).len() + unused_vision_tensors(&config).len(), 291 + 4 + 391);
        let rank_one: usize = decoder_linears(config.text()).iter().map(|(_, [out, inputs])| out + inputs).sum();
        assert_eq!(rank_one, 2_498_560);
    }
}
