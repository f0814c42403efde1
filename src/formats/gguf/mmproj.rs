//! The vision tower and the projector of a LLaVA as the `mmproj` file of llama.cpp's multimodal tools (clip.cpp).
//!
//! clip.cpp knows the projector `mlp`: two linears with a GELU between them. A single linear y = Wx + b is written as
//! such a pair without an error, because gelu(y) - gelu(-y) = y: the first linear gives y and -y, the second subtracts.
//! llama.cpp computes the GELU by its tanh formula, so answers differ a little from the exact one used here. Its releases
//! of 2025 and 2026 put the class token behind the patches, so that position embeddings are off by one; the file holds
//! what the model was trained with (tools/check_gguf.py tells the two apart).

use super::{
    GgmlType, Metadata, Value,
    export::{FileType, Planned, Source},
    write::GgufHead,
};
use crate::{
    error::{Error, Result},
    models::{
        config::{FeatureSelect, LlavaConfig, ModelConfig, ProjectorType},
        names,
    },
};

/// Parts of a tower's names behind `vision_tower.vision_model.` and their names in the file.
pub(super) const TOWER: [(&str, &str); 5] = [
    ("embeddings.class_embedding", "v.class_embd"),
    ("embeddings.patch_embedding.", "v.patch_embd."),
    ("embeddings.position_embedding.", "v.position_embd."),
    ("pre_layrnorm.", "v.pre_ln."),
    ("post_layernorm.", "v.post_ln."),
];
pub(super) const LAYER: [(&str, &str); 8] = [
    ("layer_norm1.", "ln1."),
    ("layer_norm2.", "ln2."),
    ("self_attn.q_proj.", "attn_q."),
    ("self_attn.k_proj.", "attn_k."),
    ("self_attn.v_proj.", "attn_v."),
    ("self_attn.out_proj.", "attn_out."),
    ("mlp.fc1.", "ffn_up."),
    ("mlp.fc2.", "ffn_down."),
];

/// The name in the file of a canonical name of the tower or the projector; none for any other.
pub fn mmproj_name(canonical: &str) -> Option<String> {
    if let Some(rest) = canonical.strip_prefix("multi_modal_projector.linear_") {
        let (number, part) = rest.split_once('.')?;
        // Counted as the original code does: 1 is the activation.
        let number = number.parse::<usize>().ok()?.checked_sub(1)? * 2;
        return Some(format!("mm.{number}.{part}"));
    }
    let rest = canonical.strip_prefix("vision_tower.vision_model.")?;
    let replaced = |table: &[(&str, &str)], rest: &str| {
        table.iter().find_map(|(from, to)| Some(format!("{to}{}", rest.strip_prefix(from)?)))
    };
    match rest.strip_prefix("encoder.layers.") {
        Some(rest) => {
            let (layer, rest) = rest.split_once('.')?;
            Some(format!("v.blk.{layer}.{}", replaced(&LAYER, rest)?))
        }
        None => replaced(&TOWER, rest),
    }
}

/// `pad` or `square`, how the model's pictures were made square in training. llama.cpp pads them all, and passes over
/// this key, which only files written here have.
pub const ASPECT_RATIO_KEY: &str = "wgpu_llava.image_aspect_ratio";

/// Keys of an `mmproj` file. `mean` and `std` are those of the picture processor, `name` is shown to people.
///
/// The tower ends with the selected layer, which `clip.vision.feature_layer` names as well: without that key clip.cpp
/// would leave one more layer out.
pub fn mmproj_metadata(
    config: &LlavaConfig,
    name: &str,
    file_type: FileType,
    mean: [f32; 3],
    std: [f32; 3],
) -> Result<Metadata> {
    if config.vision_feature_select_strategy == FeatureSelect::Full {
        let message = format!("{name}: vision_feature_select_strategy is `full`, and llama.cpp drops the class token");
        return Err(Error::usage(message).hint("write a Hugging Face folder instead"));
    }
    let vision = &config.vision_config;
    let size = |value: usize| Value::U32(u32::try_from(value).unwrap_or(u32::MAX));
    let layers = config.vision_layers_used();
    let pairs: [(&str, Value); 22] = [
        ("general.architecture", "clip".into()),
        ("general.type", "mmproj".into()),
        ("general.name", name.into()),
        ("general.file_type", file_type.code().into()),
        ("clip.has_text_encoder", false.into()),
        ("clip.has_vision_encoder", true.into()),
        ("clip.has_llava_projector", true.into()),
        ("clip.projector_type", "mlp".into()),
        ("clip.use_gelu", false.into()),
        ("clip.vision.projection_dim", size(config.text_config.hidden_size)),
        ("clip.vision.image_size", size(vision.image_size)),
        ("clip.vision.patch_size", size(vision.patch_size)),
        ("clip.vision.embedding_length", size(vision.hidden_size)),
        ("clip.vision.feed_forward_length", size(vision.intermediate_size)),
        ("clip.vision.block_count", size(layers)),
        ("clip.vision.attention.head_count", size(vision.num_attention_heads)),
        ("clip.vision.attention.layer_norm_epsilon", (vision.layer_norm_eps as f32).into()),
        ("clip.vision.image_mean", mean.to_vec().into()),
        ("clip.vision.image_std", std.to_vec().into()),
        ("clip.vision.mm_patch_merge_type", "flat".into()),
        ("clip.vision.feature_layer", vec![layers as i32].into()),
        ("general.quantization_version", 2u32.into()),
    ];
    Ok(pairs.map(|(key, value)| (key.to_owned(), value)).into())
}

/// The tower up to the selected layer, and the projector. Position embeddings are F32, the patch embedding F16 in an
/// F16 file and F32 in any other, as llama.cpp's converter stores them.
pub fn mmproj_plan(config: &LlavaConfig, file_type: FileType) -> Result<Vec<Planned>> {
    let mut plan = Vec::new();
    let whole = ModelConfig::Llava(config.clone());
    let tower = names::expected_tensors(&whole).into_iter().filter(|(name, _)| name.starts_with(names::VISION_TOWER));
    for (canonical, shape) in tower {
        let ggml_type = match canonical.as_str() {
            name if name.contains("patch_embedding") && file_type == FileType::F16 => GgmlType::F16,
            name if name.contains("patch_embedding") || name.contains("position_embedding") => GgmlType::F32,
            _ => file_type.stored(&shape),
        };
        plan.push(planned(canonical, shape, ggml_type)?);
    }
    let (width, outputs) = (config.vision_config.hidden_size, config.text_config.hidden_size);
    let mut mm = |name: &str, shape: &[usize], ggml_type: GgmlType, source: Source| {
        plan.push(Planned { head: GgufHead { name: name.into(), ggml_type, shape: shape.to_vec() }, source });
    };
    // clip.cpp adds the biases unasked.
    let bias = |number: usize| match config.multimodal_projector_bias {
        true => Source::Tensor(format!("{}.linear_{number}.bias", names::PROJECTOR)),
        false => Source::Values(vec![0.0; outputs]),
    };
    let weight = |number: usize| format!("{}.linear_{number}.weight", names::PROJECTOR);
    match config.projector {
        ProjectorType::Mlp2xGelu => {
            for (number, inputs) in [(1, width), (2, outputs)] {
                let (name, shape) = (2 * (number - 1), [outputs, inputs]);
                mm(&format!("mm.{name}.weight"), &shape, file_type.stored(&shape), Source::Tensor(weight(number)));
                mm(&format!("mm.{name}.bias"), &[outputs], GgmlType::F32, bias(number));
            }
        }
        ProjectorType::Linear => {
            let (first, second) = ([2 * outputs, width], [outputs, 2 * outputs]);
            mm("mm.0.weight", &first, file_type.stored(&first), Source::Mirrored(weight(1)));
            let mirrored = match bias(1) {
                Source::Tensor(name) => Source::Mirrored(name),
                _ => Source::Values(vec![0.0; 2 * outputs]),
            };
            mm("mm.0.bias", &[2 * outputs], GgmlType::F32, mirrored);
            // Q8_0 would not hold ones exactly.
            let exact = match file_type {
                FileType::Q8_0 => FileType::F16,
                other => other,
            };
            mm("mm.2.weight", &second, exact.stored(&second), Source::Difference);
            mm("mm.2.bias", &[outputs], GgmlType::F32, Source::Values(vec![0.0; outputs]));
        }
    }
    Ok(plan)
}

fn planned(canonical: String, shape: Vec<usize>, ggml_type: GgmlType) -> Result<Planned> {
    match mmproj_name(&canonical) {
        Some(name) => Ok(Planned { head: GgufHead { name, ggml_type, shape }, source: Source::Tensor(canonical) }),
        None => Err(Error::failed(format!("{canonical} has no name in an mmproj file"))),
    }
}
