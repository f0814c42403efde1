//! Writing weights in four bits: the tensors that a weight becomes, and config.json's word of it.

use std::{collections::BTreeMap, ops::Bound};

use serde_json::{Value, json};

use super::STATE;
use crate::{
    error::{Error, Result},
    formats::{hf_write::dtype_name, safetensors::Dtype, safetensors_writer::TensorHead},
    models::{config::ModelConfig, names},
    quant::{BLOCK, Factors, NESTED_BLOCK, Nested, QuantType, Quantizer},
};

/// Gives a weight's values, piece by piece in order, to who asks.
pub type Values<'a> = dyn FnMut(&mut dyn FnMut(&[f32])) -> Result<()> + 'a;

/// Which weights of a model are written in four bits, with double quantisation. A file wants the parts of all of them by
/// dtype and name: what is small is kept from the first part of a weight to its last, codes are made when they are
/// written.
pub struct Packing<'c> {
    kind: Option<QuantType>,
    config: &'c ModelConfig,
    /// Of weights, by the names in the file.
    weights: BTreeMap<String, Weight>,
}

struct Weight {
    elements: usize,
    shape: Vec<usize>,
    /// Of the source.
    dtype: Dtype,
    nested: Option<Nested>,
}

/// A tensor that is a part of a weight.
pub struct Part {
    /// The weight's name in the file.
    pub weight: String,
    part: String,
}

/// Where the mean of the factors stands in the JSON of a state, whose length must be known before it is: as long as
/// the longest number.
const OFFSET_WIDTH: usize = 25;

impl<'c> Packing<'c> {
    /// With no kind nothing is packed.
    pub fn new(kind: Option<QuantType>, config: &'c ModelConfig) -> Self {
        Self { kind, config, weights: BTreeMap::new() }
    }

    /// Whether the tensor of a canonical name is a linear of a layer of the decoder.
    pub fn takes(&self, canonical: &str) -> bool {
        let module = canonical.strip_suffix(".weight");
        let linears = || names::layer_linears(self.config.text());
        self.kind.is_some()
            && canonical.starts_with(names::DECODER_LAYERS)
            && module.is_some_and(|module| linears().iter().any(|(linear, _)| module.ends_with(linear)))
    }

    /// The tensors that a weight becomes.
    pub fn heads(&mut self, on_disk: &str, shape: &[usize], dtype: Dtype) -> Vec<TensorHead> {
        let Some(kind) = self.kind else { return Vec::new() };
        let elements: usize = shape.iter().product();
        let blocks = elements.div_ceil(BLOCK);
        let weight = Weight { elements, shape: shape.to_vec(), dtype, nested: None };
        let state = state(kind, &weight, 0.0).len();
        self.weights.insert(on_disk.to_owned(), weight);
        let head = |part: &str, dtype, shape: Vec<usize>| TensorHead { name: format!("{on_disk}{part}"), dtype, shape };
        vec![
            head("", Dtype::U8, vec![elements.div_ceil(2), 1]),
            head(".absmax", Dtype::U8, vec![blocks]),
            head(".quant_map", Dtype::F32, vec![16]),
            head(".nested_absmax", Dtype::F32, vec![blocks.div_ceil(NESTED_BLOCK)]),
            head(".nested_quant_map", Dtype::F32, vec![256]),
            head(&format!("{STATE}{}", kind.as_str()), Dtype::U8, vec![state]),
        ]
    }

    /// The weight that a tensor of the file is a part of.
    pub fn part(&self, on_disk: &str) -> Option<Part> {
        let found = self
            .weights
            .range::<str, _>((Bound::Unbounded, Bound::Included(on_disk)))
            .next_back()
            .map(|(weight, _)| weight)?;
        let part = on_disk.strip_prefix(found.as_str())?;
        (part.is_empty() || part.starts_with('.')).then(|| Part { weight: found.clone(), part: part.to_owned() })
    }

    /// The bytes of a part; `values` gives those of the weight, in order, to who asks.
    ///
    /// # Errors
    /// Those of `values`.
    pub fn data(&mut self, part: &Part, values: &mut Values<'_>) -> Result<Vec<u8>> {
        let missing = || Error::failed(format!("{} is not among the weights to be packed", part.weight));
        let kind = self.kind.ok_or_else(missing)?;
        let weight = self.weights.get_mut(&part.weight).ok_or_else(missing)?;
        let floats = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect();
        if part.part == ".quant_map" {
            // FP4's second zero has no sign in the map that bitsandbytes writes.
            let map: Vec<f32> = kind.values().iter().map(|value| value + 0.0).collect();
            return Ok(floats(&map));
        }
        if part.part.is_empty() || weight.nested.is_none() {
            let (mut quantizer, mut codes) = (Quantizer::new(kind, weight.elements), Vec::new());
            let keep = part.part.is_empty();
            values(&mut |values| {
                quantizer.push(values, &mut codes);
                if !keep {
                    codes.clear();
                }
            })?;
            if keep {
                return Ok(codes);
            }
            if let Factors::Nested(nested) = Factors::new(quantizer.finish(), true) {
                weight.nested = Some(nested);
            }
        }
        let nested = weight.nested.as_ref().ok_or_else(missing)?;
        Ok(match part.part.as_str() {
            ".absmax" => nested.codes.clone(),
            ".nested_absmax" => floats(&nested.absmax),
            ".nested_quant_map" => floats(&nested.map),
            _ => state(kind, weight, nested.offset).into_bytes(),
        })
    }
}

/// The JSON of a state, filled up with spaces to a length that does not depend on the offset.
fn state(kind: QuantType, weight: &Weight, offset: f32) -> String {
    let shape: Vec<String> = weight.shape.iter().map(usize::to_string).collect();
    let offset = json!(f64::from(offset)).to_string() + "}";
    format!(
        "{{\"quant_type\": \"{}\", \"blocksize\": {BLOCK}, \"dtype\": \"{}\", \"shape\": [{}], \
         \"nested_blocksize\": {NESTED_BLOCK}, \"nested_dtype\": \"float32\", \"nested_offset\": {offset:OFFSET_WIDTH$}",
        kind.as_str(),
        dtype_name(weight.dtype),
        shape.join(", "),
    )
}

/// `quantization_config` of a config.json: what transformers hands to bitsandbytes. Only the linears of the decoder's
/// layers are packed.
pub fn quantization_config(kind: QuantType, compute: &str, config: &ModelConfig) -> Value {
    let mut skipped = vec!["lm_head"];
    if config.llava().is_some() {
        // As modules are called before transformers 4.52, and since.
        skipped.extend(["multi_modal_projector", "vision_tower"]);
        skipped.extend(["model.multi_modal_projector", "model.vision_tower"]);
    }
    json!({
        "quant_method": "bitsandbytes",
        "_load_in_4bit": true,
        "_load_in_8bit": false,
        "load_in_4bit": true,
        "load_in_8bit": false,
        "bnb_4bit_compute_dtype": compute,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": kind.as_str(),
        "bnb_4bit_use_double_quant": true,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": 6.0,
    })
}
