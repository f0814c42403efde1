//! Writing a model folder that transformers loads as it is.

use std::{collections::BTreeMap, path::Path};

use serde_json::Value;

use super::{
    atomic::{NewFolder, write_file},
    bitsandbytes::{self, Packing},
    host_tensor::HostTensor,
    model_folder::ModelFolder,
    processor_files,
    safetensors::Dtype,
    safetensors_writer::{SHARD_BYTES, TensorData, TensorHead, write_sharded},
};
use crate::{
    data::{Template, Tokenizer, chat_template::ChatTemplate},
    error::{Error, Result},
    models::{config::ModelConfig, names},
    quant::QuantType,
};

/// Bytes of a tensor that are quantised at a time.
const PACKED_AT_A_TIME: usize = 16 << 20;

/// Files taken over from the model that was trained, where it has them.
const CARRIED: [&str; 9] = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];

/// Gives a tensor by canonical name.
type FetchTensor<'a> = Box<dyn FnMut(&str) -> Result<HostTensor> + 'a>;

/// The tensors that are written otherwise than the source has them.
pub struct Changes<'a> {
    is_changed: Box<dyn Fn(&str) -> bool + 'a>,
    fetch: FetchTensor<'a>,
    /// Of the changed ones; none: as the source keeps each.
    dtype: Option<Dtype>,
    /// Has the last word, once every tensor is written.
    finish: Box<dyn FnOnce() -> Result<()> + 'a>,
}

impl<'a> Changes<'a> {
    /// The source as it is.
    pub fn none() -> Self {
        Self::of(|_| false, |name| Err(Error::failed(format!("{name} has not changed"))), None)
    }

    /// `fetch` gives the tensors that `is_changed` names, by canonical name, one at a time in the order of the file.
    /// They are written in `dtype`, or as the source keeps them.
    pub fn of(
        is_changed: impl Fn(&str) -> bool + 'a,
        fetch: impl FnMut(&str) -> Result<HostTensor> + 'a,
        dtype: Option<Dtype>,
    ) -> Self {
        Self { is_changed: Box::new(is_changed), fetch: Box::new(fetch), dtype, finish: Box::new(|| Ok(())) }
    }

    /// With a last check: where it fails, no folder is left.
    pub fn checked_by(self, finish: impl FnOnce() -> Result<()> + 'a) -> Self {
        Self { finish: Box::new(finish), ..self }
    }
}

/// How a model is written.
#[derive(Clone, Copy, Debug, Default)]
pub struct Writing {
    /// Of all weights; none: each as it is.
    pub dtype: Option<Dtype>,
    /// Written as a chat template where the model brings none.
    pub template: Option<&'static Template>,
    /// Pictures are squared with the mean colour before anything else.
    pub pad: bool,
    /// The linears of the decoder's layers as codes of four bits, in bitsandbytes' layout.
    pub quantize: Option<QuantType>,
}

/// Writes `config`'s model into the folder `out`, which appears whole or not at all and replaces an older one.
///
/// What has not changed comes from `source`, byte for byte unless `writing` asks for one dtype throughout: weights,
/// tokenizer and processor files, and the vision tensors behind the selected layer (zeros, and ones for norm weights,
/// where `source` lacks them: nothing computes with them).
///
/// # Errors
/// `Data`: a value that the dtype cannot hold. `Failed`: what the disk refuses.
pub fn write_model(
    out: &Path,
    source: &ModelFolder,
    config: &ModelConfig,
    changes: Changes<'_>,
    writing: &Writing,
) -> Result<()> {
    let folder = NewFolder::create(out)?;
    let kept = write_weights(folder.path(), source, config, SHARD_BYTES, changes, writing)?;
    let write_json =
        |name: &str, value: Value| write_file(&folder.path().join(name), format!("{value:#}\n").as_bytes());
    let mut json = config.to_json(dtype_name(kept));
    if let Some(kind) = writing.quantize {
        json["quantization_config"] = bitsandbytes::quantization_config(kind, dtype_name(kept), config);
    }
    write_json("config.json", json)?;
    for name in CARRIED {
        if let Some(bytes) = source.file(name)? {
            write_file(&folder.path().join(name), &bytes)?;
        }
    }
    if let Some(template) = writing.template
        && ChatTemplate::source(source.name(), &|name| source.file(name))?.is_none()
        && let Some(template) = template.jinja(writes_bos(source, config)?)
    {
        write_file(&folder.path().join("chat_template.jinja"), template.as_bytes())?;
    }
    let generation = processor_files::generation_config(source.json("generation_config.json")?, config.text());
    write_json("generation_config.json", generation)?;
    if let Some(tokenizer) = source.json("tokenizer.json")? {
        let present = source.json("tokenizer_config.json")?;
        let made = processor_files::tokenizer_config(present, &Value::Object(tokenizer), config.text());
        write_json("tokenizer_config.json", made)?;
    }
    if let Some(llava) = config.llava() {
        let preprocessor = processor_files::preprocessor_config(source.preprocessor_config()?, &llava.vision_config);
        let preprocessor = if writing.pad { processor_files::padded(preprocessor) } else { preprocessor };
        write_json("preprocessor_config.json", preprocessor)?;
        let processor = processor_files::processor_config(source.json("processor_config.json")?, llava);
        write_json("processor_config.json", processor)?;
    }
    folder.commit()
}

/// Whether a chat template must write the BOS itself: transformers adds none to what a template rendered, but for a
/// LLaVA, whose processor tokenises it like any text.
fn writes_bos(source: &ModelFolder, config: &ModelConfig) -> Result<bool> {
    if config.llava().is_some() || source.file("tokenizer.json")?.is_none() {
        return Ok(false);
    }
    let tokenizer = Tokenizer::from_files(source.name(), &|name| source.file(name))?;
    Ok(!tokenizer.prefix().is_empty())
}

/// As config.json calls it.
pub fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
        _ => "float32",
    }
}

/// Where a tensor to be written comes from.
#[derive(Clone)]
enum Origin {
    Source,
    Changed,
    /// Zeros, ones or an identity that the layout asks for.
    Filled(HostTensor),
}

/// Gives the dtype that most bytes are written in.
fn write_weights(
    folder: &Path,
    source: &ModelFolder,
    config: &ModelConfig,
    shard_bytes: u64,
    mut changes: Changes<'_>,
    writing: &Writing,
) -> Result<Dtype> {
    let dtype = writing.dtype;
    let mut packing = Packing::new(writing.quantize, config);
    let mut origins: BTreeMap<String, Origin> = BTreeMap::new();
    let (mut heads, kept) = (Vec::new(), source.dtype()?);
    let mut plan = |name: String, shape: Vec<usize>, origin: Origin| -> Result<()> {
        if matches!(origin, Origin::Source) && !source.has(&name) {
            return Err(Error::data(format!(
                "{} has no tensor {name}, and a whole model is to be written",
                source.name()
            )));
        }
        let own = match &origin {
            Origin::Changed if changes.dtype.is_some() => changes.dtype.unwrap_or(kept),
            Origin::Source | Origin::Changed if source.has(&name) => source.stored(&name)?.dtype(),
            Origin::Source | Origin::Changed | Origin::Filled(_) => kept,
        };
        let (on_disk, dtype) = (names::on_disk(&name, config), dtype.unwrap_or(own));
        if packing.takes(&name) {
            let parts = packing.heads(&on_disk, &shape, dtype);
            origins.extend(parts.iter().map(|part| (part.name.clone(), origin.clone())));
            heads.extend(parts);
        } else {
            origins.insert(on_disk.clone(), origin);
            heads.push(TensorHead { name: on_disk, dtype, shape });
        }
        Ok(())
    };
    for (name, shape) in names::expected_tensors(config) {
        let origin = if (changes.is_changed)(&name) { Origin::Changed } else { Origin::Source };
        plan(name, shape, origin)?;
    }
    for (name, shape) in config.llava().map(names::projector_identity_tensors).unwrap_or_default() {
        let filled = identity_layer(&shape);
        plan(name, shape, Origin::Filled(filled))?;
    }
    for (name, shape) in names::unused_vision_tensors(config) {
        let origin = match (changes.is_changed)(&name) {
            true => Origin::Changed,
            false if source.has(&name) => Origin::Source,
            false => Origin::Filled(unused_default(&name, &shape)),
        };
        plan(name, shape, origin)?;
    }
    let most = most_bytes(&heads);
    write_sharded(folder, heads, shard_bytes, &mut |head| {
        if let Some(part) = packing.part(&head.name) {
            let name = names::canonical(&part.weight);
            let mut values = |out: &mut dyn FnMut(&[f32])| match origins.get(&head.name) {
                Some(Origin::Source) => {
                    let stored = source.stored(&name)?;
                    stored.row_chunks(PACKED_AT_A_TIME).try_for_each(|rows| {
                        out(&stored.rows_f32(rows)?);
                        Ok(())
                    })
                }
                _ => {
                    out(&(changes.fetch)(&name)?.data);
                    Ok(())
                }
            };
            return Ok(TensorData::Raw(packing.data(&part, &mut values)?.into()));
        }
        let name = names::canonical(&head.name);
        let tensor = match origins.remove(&head.name) {
            Some(Origin::Source) => return Ok(TensorData::Stored(source.stored(&name)?)),
            Some(Origin::Filled(tensor)) => tensor,
            Some(Origin::Changed) | None => (changes.fetch)(&name)?,
        };
        if tensor.shape != head.shape {
            let (found, wanted) = (&tensor.shape, &head.shape);
            return Err(Error::failed(format!("{name} to be written is {found:?}, the config asks for {wanted:?}")));
        }
        Ok(TensorData::F32(tensor.data.into()))
    })?;
    (changes.finish)()?;
    Ok(most)
}

/// The dtype of most bytes.
pub(super) fn most_bytes(heads: &[TensorHead]) -> Dtype {
    let bytes_in = |dtype| heads.iter().filter(|head| head.dtype == dtype).map(TensorHead::bytes).sum::<u64>();
    [Dtype::F16, Dtype::BF16, Dtype::F32].into_iter().max_by_key(|&dtype| bytes_in(dtype)).unwrap_or(Dtype::F32)
}

/// What stands on disk behind a `linear` projector: weight `[h, h]`, bias `[h]`.
pub(super) fn identity_layer(shape: &[usize]) -> HostTensor {
    match shape {
        &[size, _] => HostTensor::identity(size),
        _ => HostTensor::zeros(shape),
    }
}

/// What stands for a vision tensor that nothing computes with.
pub fn unused_default(name: &str, shape: &[usize]) -> HostTensor {
    let norm_weight = shape.len() == 1 && name.ends_with(".weight");
    HostTensor::filled(shape, if norm_weight { 1.0 } else { 0.0 })
}
