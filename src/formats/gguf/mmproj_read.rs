//! Reading an `mmproj` file back: the vision tower and the projector that go with a language model's file.

use serde_json::{Value as Json, json};

use super::{
    GgufFile, Value,
    dequant::dequantize,
    llama::LlamaTensor,
    mmproj::{ASPECT_RATIO_KEY, LAYER, TOWER, mmproj_name},
};
use crate::{
    error::{Error, Result},
    formats::HostTensor,
    models::names,
};

const PREFIX: &str = "vision_tower.vision_model.";

/// The canonical name of a tensor of the file; none for what no such file has. The reverse of [`mmproj_name`].
fn canonical_name(stored: &str) -> Option<String> {
    let replaced = |table: &[(&str, &str)], rest: &str| {
        table.iter().find_map(|(to, from)| Some(format!("{to}{}", rest.strip_prefix(from)?)))
    };
    let name = if let Some(rest) = stored.strip_prefix("mm.") {
        let (number, part) = rest.split_once('.')?;
        let number = number.parse::<usize>().ok().filter(|number| number % 2 == 0)? / 2 + 1;
        format!("{}.linear_{number}.{part}", names::PROJECTOR)
    } else if let Some(rest) = stored.strip_prefix("v.blk.") {
        let (layer, rest) = rest.split_once('.')?;
        format!("{PREFIX}encoder.layers.{layer}.{}", replaced(&LAYER, rest)?)
    } else {
        format!("{PREFIX}{}", replaced(&TOWER, stored)?)
    };
    // One spelling of each name only.
    (mmproj_name(&name).as_deref() == Some(stored)).then_some(name)
}

/// Canonical names of all tensors.
///
/// # Errors
/// `Data`: a tensor that neither a CLIP nor one of the projectors has.
pub fn tensor_names(file: &GgufFile) -> Result<Vec<String>> {
    let name = |stored: &str| {
        canonical_name(stored).ok_or_else(|| {
            Error::data(format!("{}: the tensor {stored} is not one of a CLIP tower or an MLP projector", file.name()))
                .hint("mmproj files of LLaVA 1.5 are read")
        })
    };
    file.tensor_names().map(name).collect()
}

/// A tensor by its canonical name.
pub fn tensor<'a>(file: &'a GgufFile, canonical: &str) -> Result<LlamaTensor<'a>> {
    let missing = || Error::data(format!("{} has no tensor {canonical}", file.name()));
    let mut name = mmproj_name(canonical).ok_or_else(missing)?;
    // Files of before 2025 call the two linears of an MLP the other way round.
    if is_swapped(file) {
        name = if name.contains(".ffn_up.") {
            name.replace(".ffn_up.", ".ffn_down.")
        } else {
            name.replace(".ffn_down.", ".ffn_up.")
        };
    }
    Ok(file.require(&name)?.into())
}

fn is_swapped(file: &GgufFile) -> bool {
    let width = file.tensor("v.class_embd").and_then(|tensor| tensor.shape.last().copied());
    let up = file.tensor("v.blk.0.ffn_up.weight");
    up.is_some_and(|up| up.shape.len() == 2 && up.shape[0] != up.shape[1] && width == Some(up.shape[0]))
}

/// config.json of the whole LLaVA: `text` is that of its language model, `image` the id of its token `<image>`.
///
/// # Errors
/// `Data`: another kind of tower or projector, a missing or mistyped key.
pub fn config_json(file: &GgufFile, text: Json, image: Option<usize>) -> Result<Json> {
    let wrong = |what: String| Error::data(format!("{}: {what}", file.name()));
    match file.text("general.architecture")? {
        Some("clip") => {}
        other => return Err(wrong(format!("general.architecture is {other:?}, and `clip` is expected of an mmproj"))),
    }
    match file.text("clip.projector_type")?.unwrap_or("mlp") {
        "mlp" => {}
        other => {
            let error = wrong(format!("clip.projector_type is `{other}`, which is not built yet"));
            return Err(error.hint("`mlp` is read, the projector of LLaVA 1.5"));
        }
    }
    if file.flag("clip.use_gelu")? == Some(true) || file.flag("clip.use_silu")? == Some(true) {
        return Err(wrong("its tower's activation is not quick-GELU, and no other is built yet".to_owned()));
    }
    let size = |name: &str| -> Result<usize> {
        let key = format!("clip.vision.{name}");
        file.size(&key)?.ok_or_else(|| file.missing(&key))
    };
    let layers = size("block_count")?;
    // Converters leave the layers behind the selected one out. (Some releases of llama.cpp leave out another one where
    // the file does not say which, which no model was trained with.)
    let selected = match file.value("clip.vision.feature_layer") {
        None => layers as i64,
        Some(Value::Array(array)) => match array.as_integers().as_deref() {
            Some(&[one]) => i64::try_from(one).unwrap_or(i64::MAX),
            _ => return Err(wrong("features of several layers together are not built yet".to_owned())),
        },
        Some(_) => file.size("clip.vision.feature_layer")?.map_or(0, |layer| layer as i64),
    };
    let epsilon = "clip.vision.attention.layer_norm_epsilon";
    let vocabulary = text["vocab_size"].clone();
    Ok(json!({
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image.map_or(vocabulary, |id| json!(id)),
        "projector_hidden_act": if linear_projector(file)?.is_some() { "linear" } else { "gelu" },
        "vision_feature_layer": selected,
        "vision_feature_select_strategy": "default",
        "text_config": text,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": size("embedding_length")?,
            "intermediate_size": size("feed_forward_length")?,
            "num_hidden_layers": layers,
            "num_attention_heads": size("attention.head_count")?,
            "image_size": size("image_size")?,
            "patch_size": size("patch_size")?,
            "layer_norm_eps": file.number(epsilon)?.ok_or_else(|| file.missing(epsilon))?,
            "hidden_act": "quick_gelu",
        },
    }))
}

/// preprocessor_config.json: CLIP's at the tower's size, squared by padding as llama.cpp does unless the file says
/// otherwise.
pub fn preprocessor_json(file: &GgufFile) -> Result<Json> {
    let channels = |name: &str| -> Result<Json> {
        let key = format!("clip.vision.{name}");
        let values = file.floats(&key)?.ok_or_else(|| file.missing(&key))?;
        // The shortest decimals, as the original file had them.
        let decimals: Vec<f64> = values.iter().filter_map(|value| value.to_string().parse().ok()).collect();
        Ok(json!(decimals))
    };
    let size = file.size("clip.vision.image_size")?.ok_or_else(|| file.missing("clip.vision.image_size"))?;
    Ok(json!({
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": true,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": true,
        "crop_size": {"height": size, "width": size},
        "do_rescale": true,
        "rescale_factor": 1.0 / 255.0,
        "do_normalize": true,
        "image_mean": channels("image_mean")?,
        "image_std": channels("image_std")?,
        "do_convert_rgb": true,
        "do_pad": file.text(ASPECT_RATIO_KEY)? != Some("square"),
    }))
}

/// A projector that is a single linear written as a pair: that linear, and the identity that stands behind it in
/// Hugging Face's layout. None for an honest pair.
pub fn linear_projector(file: &GgufFile) -> Result<Option<[(String, HostTensor); 4]>> {
    let (Some(first), Some(second)) = (file.tensor("mm.0.weight"), file.tensor("mm.2.weight")) else { return Ok(None) };
    let (&[doubled, width], &[outputs, inputs]) = (first.shape, second.shape) else { return Ok(None) };
    if doubled != inputs || inputs != 2 * outputs {
        return Ok(None);
    }
    let mirrored = |name: &str| -> Result<Option<Vec<f32>>> {
        let mut values = dequantize(&file.require(name)?)?;
        let negated = values.split_off(values.len() / 2);
        Ok(values.iter().zip(&negated).all(|(value, negated)| *value == -negated).then_some(values))
    };
    let sign =
        |row: usize, column: usize| f32::from(u8::from(row == column)) - f32::from(u8::from(row + outputs == column));
    let subtracts = dequantize(&second)?.iter().enumerate().all(|(at, &value)| value == sign(at / inputs, at % inputs));
    let shifts = dequantize(&file.require("mm.2.bias")?)?.iter().any(|&value| value != 0.0);
    let (Some(weight), Some(bias), true, false) = (mirrored("mm.0.weight")?, mirrored("mm.0.bias")?, subtracts, shifts)
    else {
        return Ok(None);
    };
    let name = |part: &str| format!("{}.linear_{part}", names::PROJECTOR);
    Ok(Some([
        (name("1.weight"), HostTensor::new([outputs, width], weight)),
        (name("1.bias"), HostTensor::new([outputs], bias)),
        (name("2.weight"), HostTensor::identity(outputs)),
        (name("2.bias"), HostTensor::zeros([outputs])),
    ]))
}
