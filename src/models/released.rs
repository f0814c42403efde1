//! The shapes of released models by their names, for what is asked about a model that is not here.

use serde_json::json;

use super::config::{ClipVisionConfig, ModelConfig, ProjectorType};
use crate::error::Result;

/// Name, hidden_size, intermediate_size, layers, heads, key/value heads; LLaMA 1 and 2.
const SIZES: [(&str, usize, usize, usize, usize, usize); 6] = [
    ("7b", 4096, 11_008, 32, 32, 32),
    ("13b", 5120, 13_824, 40, 40, 40),
    ("30b", 6656, 17_920, 60, 52, 52),
    ("33b", 6656, 17_920, 60, 52, 52),
    ("65b", 8192, 22_016, 80, 64, 64),
    ("70b", 8192, 28_672, 80, 64, 8),
];
const VOCABULARY: usize = 32_000;
/// The tower of the released LLaVAs.
const TOWER: &str = "clip-vit-large-patch14-336";

/// The config of a LLaMA, Vicuna or LLaVA whose name holds its size, as `lmsys/vicuna-7b-v1.5` does; and of what a stage 1
/// will leave in the run folder of a recipe, `runs/7b-pretrain/model`.
///
/// # Errors
/// None that a caller could cause: the shapes are this file's own.
pub fn by_name(name: &str) -> Result<Option<ModelConfig>> {
    let name = name.to_lowercase();
    let parts = name.split(['/', '\\']).rev();
    let size_in = |part: &str| {
        let words: Vec<&str> = part.split(['-', '_', '.', ' ']).collect();
        let known = ["llama", "vicuna", "llava", "alpaca", "pretrain"].iter().any(|family| part.contains(family));
        SIZES.iter().find(|(size, ..)| known && words.contains(size))
    };
    let Some((leaf, &(_, hidden, intermediate, layers, heads, kv_heads))) =
        parts.take(2).find_map(|part| Some((part, size_in(part)?)))
    else {
        return Ok(None);
    };
    let text = json!({
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
    });
    let config = ModelConfig::parse(&name, text.to_string().as_bytes())?;
    let pretrained = leaf.contains("pretrain") && !leaf.contains("v1.5");
    let projector = if pretrained { ProjectorType::Linear } else { ProjectorType::Mlp2xGelu };
    let sees = leaf.contains("llava") || leaf.contains("pretrain");
    Ok(Some(if sees { with_tower(&config, TOWER, projector)? } else { config }))
}

/// A LLaVA of a language model and a tower that OpenAI released; other names count as the usual one, whose size they
/// have nearly all.
///
/// # Errors
/// `Data`: the language model's config cannot be part of a LLaVA.
pub fn with_tower(language: &ModelConfig, tower: &str, projector: ProjectorType) -> Result<ModelConfig> {
    let released = |name| ClipVisionConfig::released(name);
    let Some(vision) = released(tower).or_else(|| released(TOWER)) else { return Ok(language.clone()) };
    let text = language.text();
    let json = json!({
        "model_type": "llava",
        "text_config": {
            "model_type": text.family.as_str(), "vocab_size": (text.vocab_size + 2).next_multiple_of(64),
            "hidden_size": text.hidden_size, "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_hidden_layers, "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads, "head_dim": text.head_dim,
            "tie_word_embeddings": text.tie_word_embeddings,
            "max_position_embeddings": text.max_position_embeddings,
        },
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size, "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads, "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
        "image_token_index": text.vocab_size,
        // As transformers names the two.
        "projector_hidden_act": if projector == ProjectorType::Linear { "linear" } else { "gelu" },
    });
    ModelConfig::parse(tower, json.to_string().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::names::expected_tensors;

    fn parameters(config: &ModelConfig) -> usize {
        expected_tensors(config).iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }

    #[test]
    fn released_models_have_their_sizes() {
        for (name, wanted) in [
            ("lmsys/vicuna-7b-v1.3", 6_738_415_616),
            ("meta-llama/Llama-2-13b-hf", 13_015_864_320),
            ("vicuna-33b-v1.3", 32_528_943_616),
            ("llama-65b", 65_285_660_672),
            ("/models/Llama-2-70b", 68_976_648_192),
        ] {
            assert_eq!(parameters(&by_name(name).unwrap().unwrap()), wanted, "{name}");
        }
        let llava = by_name("llava-hf/llava-1.5-7b-hf").unwrap().unwrap();
        // 23 layers of the tower, 64 rows more in embeddings and head, and the projector.
        assert_eq!(parameters(&llava), 6_738_415_616 + 2 * 64 * 4096 + 290_909_184 + 20_979_712);
        let left = by_name("runs/7b-pretrain/model").unwrap().unwrap();
        assert_eq!(parameters(&left), 6_738_415_616 + 2 * 64 * 4096 + 290_909_184 + 4_198_400);
        for name in ["gpt2-7b", "vicuna", "llama-8b", "runs/7b/model"] {
            assert!(by_name(name).unwrap().is_none(), "{name}");
        }
    }
}
