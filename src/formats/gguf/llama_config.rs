//! The config.json of `LlamaForCausalLM` that the metadata of a `llama` file stands for.

use serde_json::{Value as Json, json};

use super::{Array, GgufFile, Value, dequant::dequantize, llama};
use crate::error::{Error, Result};

/// What config.json leaves open, as llama.cpp fills it in.
const DEFAULT_THETA: f64 = 10000.0;

/// config.json as transformers writes it for this model, without a dtype: that of the weights is the caller's choice.
///
/// Sizes come from the metadata, vocab_size and tied embeddings from the tensors. Floats are the decimals they were
/// written for: an f32 of 9.9999997e-6 is 1e-5. Scaling of type `llama3` is found again from `rope_freqs.weight`.
///
/// Errors: another architecture, a mixture of experts, sizes that differ from layer to layer, rotation of a part of
/// each head, a missing or mistyped key.
pub fn config_json(file: &GgufFile) -> Result<Json> {
    check_architecture(file)?;
    let heads = heads(file)?;
    let hidden_size = required(file, "embedding_length")?;
    let head_dim = head_dim(file, hidden_size, heads)?;
    let embeddings = file.require("token_embd.weight")?;
    let &[vocab_size, columns] = embeddings.shape else {
        let message = format!("{}: token_embd.weight has shape {:?}, not a matrix", file.name(), embeddings.shape);
        return Err(Error::data(message));
    };
    if columns != hidden_size {
        let message = format!(
            "{}: token_embd.weight has rows of {columns}, and {} is {hidden_size}",
            file.name(),
            key(file, "embedding_length")
        );
        return Err(Error::data(message));
    }
    let epsilon = key(file, "attention.layer_norm_rms_epsilon");
    let theta = file.number(&key(file, "rope.freq_base"))?.unwrap_or(DEFAULT_THETA);
    let id = |name: &str| file.size(&format!("tokenizer.ggml.{name}_token_id"));
    let has = |tensor: &str| file.tensor(tensor).is_some();
    let mut eos = Vec::from_iter(id("eos")?);
    // What ends a turn ends an answer, too, where the file tells the two apart.
    eos.extend(id("eot")?.filter(|turn| !eos.contains(turn)));
    let is_qwen2 = llama::is_qwen2(file);
    let mut config = json!({
        "architectures": [if is_qwen2 { "Qwen2ForCausalLM" } else { "LlamaForCausalLM" }],
        "model_type": if is_qwen2 { "qwen2" } else { "llama" },
        "hidden_size": hidden_size,
        "intermediate_size": required(file, "feed_forward_length")?,
        "num_hidden_layers": required(file, "block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads(file)?,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "vocab_size": vocab_size,
        "max_position_embeddings": required(file, "context_length")?,
        "rms_norm_eps": file.number(&epsilon)?.ok_or_else(|| file.missing(&epsilon))?,
        "rope_theta": theta,
        "rope_scaling": rope_scaling(file, theta, head_dim)?,
        "attention_bias": has("blk.0.attn_q.bias"),
        "mlp_bias": has("blk.0.ffn_up.bias"),
        "tie_word_embeddings": !has("output.weight"),
        "bos_token_id": id("bos")?,
        "eos_token_id": match eos.as_slice() {
            [] => Json::Null,
            [one] => json!(one),
            several => json!(several),
        },
        "pad_token_id": id("padding")?,
    });
    // That family's biases are where they always are.
    if is_qwen2 && let Some(map) = config.as_object_mut() {
        map.retain(|key, _| !key.ends_with("_bias"));
    }
    Ok(config)
}

fn check_architecture(file: &GgufFile) -> Result<()> {
    let name = "general.architecture";
    match file.text(name)? {
        None => return Err(file.missing(name)),
        Some(llama::ARCHITECTURE | llama::QWEN2) => {}
        Some("clip") => {
            return Err(Error::data(format!("{} holds a vision tower and a projector (mmproj)", file.name()))
                .hint("name the GGUF file of the language model"));
        }
        Some(other) => {
            let message = format!("{}: {name} is `{other}`, which is not built yet", file.name());
            return Err(Error::data(message).hint("`llama` and `qwen2` are read"));
        }
    }
    match file.size(&key(file, "expert_count"))? {
        Some(experts) if experts > 0 => {
            let message = format!("{}: a mixture of {experts} experts, which is not built yet", file.name());
            Err(Error::data(message).hint("models of one MLP a layer are read"))
        }
        _ => Ok(()),
    }
}

/// The key of this name of the file's architecture.
fn key(file: &GgufFile, name: &str) -> String {
    let architecture = file.text("general.architecture").ok().flatten();
    format!("{}.{name}", architecture.unwrap_or(llama::ARCHITECTURE))
}

/// Query heads, `llama.attention.head_count`.
pub fn heads(file: &GgufFile) -> Result<usize> {
    required(file, "attention.head_count")
}

/// Key and value heads, `llama.attention.head_count_kv`: as many as query heads where the file does not say.
pub fn key_value_heads(file: &GgufFile) -> Result<usize> {
    match uniform(file, "attention.head_count_kv")? {
        Some(heads) => Ok(heads),
        None => heads(file),
    }
}

fn required(file: &GgufFile, name: &str) -> Result<usize> {
    uniform(file, name)?.ok_or_else(|| file.missing(&key(file, name)))
}

/// A size above zero, or an array that gives each layer the same one.
fn uniform(file: &GgufFile, name: &str) -> Result<Option<usize>> {
    let name = key(file, name);
    let size = match file.value(&name) {
        Some(Value::Array(array @ (Array::U32(_) | Array::I32(_) | Array::U64(_) | Array::I64(_)))) => {
            let sizes = array.as_integers().unwrap_or_default();
            let Some(first) = sizes.first().filter(|first| sizes.iter().all(|size| size == *first)) else {
                let message = format!("{}: {name} differs from layer to layer, which is not built yet", file.name());
                return Err(Error::data(message));
            };
            usize::try_from(*first).ok()
        }
        _ => file.size(&name)?,
    };
    match size {
        Some(0) => Err(Error::data(format!("{}: {name} is 0", file.name()))),
        other => Ok(other),
    }
}

fn head_dim(file: &GgufFile, hidden_size: usize, heads: usize) -> Result<usize> {
    let [keys, values, rotated] = ["attention.key_length", "attention.value_length", "rope.dimension_count"]
        .map(|name| file.size(&key(file, name)).map(|size| size.map(|size| (name, size))));
    let (keys, values, rotated) = (keys?, values?, rotated?);
    let head_dim = match keys.or(rotated) {
        Some((_, size)) => size,
        None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            let message = format!(
                "{}: {} is {hidden_size}, which {heads} heads do not divide",
                file.name(),
                key(file, "embedding_length")
            );
            return Err(Error::data(message));
        }
    };
    for (name, size) in [values, rotated].into_iter().flatten() {
        if size != head_dim {
            let message = format!(
                "{}: {} is {size} and a head is {head_dim} wide, which is not built yet",
                file.name(),
                key(file, name)
            );
            return Err(Error::data(message));
        }
    }
    Ok(head_dim)
}

/// `rope_scaling`, null where there is none.
fn rope_scaling(file: &GgufFile, theta: f64, head_dim: usize) -> Result<Json> {
    let scaling = |name: &str| key(file, &format!("rope.scaling.{name}"));
    let factor = match file.number(&scaling("factor"))? {
        Some(factor) => Some(factor),
        // The key of files of 2023.
        None => file.number(&key(file, "rope.scale_linear"))?,
    };
    let kind = file.text(&scaling("type"))?.unwrap_or(if factor.is_some() { "linear" } else { "none" });
    let needed = || factor.ok_or_else(|| file.missing(&scaling("factor")));
    let mut json = match kind {
        "none" => return llama3_scaling(file, theta, head_dim),
        "linear" => return Ok(json!({"rope_type": "linear", "factor": needed()?})),
        "yarn" => json!({"rope_type": "yarn", "factor": needed()?}),
        other => {
            let message = format!("{}: {} is `{other}`, which is not built yet", file.name(), scaling("type"));
            return Err(Error::data(message).hint("`none`, `linear` and `yarn` are read"));
        }
    };
    let context = file.size(&scaling("original_context_length"))?;
    json["original_max_position_embeddings"] =
        json!(context.ok_or_else(|| file.missing(&scaling("original_context_length")))?);
    for (name, hf) in
        [("yarn_attn_factor", "attention_factor"), ("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")]
    {
        if let Some(value) = file.number(&scaling(name))? {
            json[hf] = json!(value);
        }
    }
    Ok(json)
}

/// The divisors of `llama3` scaling, one for each pair of channels, as llama.cpp's converter computes them (in f32).
///
/// Wavelengths shorter than `original / high` are kept, longer than `original / low` divided by `factor`, between them
/// interpolated.
pub fn llama3_factors(theta: f64, head_dim: usize, [factor, low, high, original]: [f64; 4]) -> Vec<f32> {
    let factor_of = |channel: usize| {
        let frequency = 1.0 / (theta as f32).powf(channel as f32 / head_dim as f32);
        let wavelength = std::f32::consts::TAU / frequency;
        if wavelength < (original / high) as f32 {
            1.0
        } else if wavelength > (original / low) as f32 {
            factor as f32
        } else {
            let smooth = (original as f32 / wavelength - low as f32) / (high - low) as f32;
            1.0 / ((1.0 - smooth) / factor as f32 + smooth)
        }
    };
    (0..head_dim).step_by(2).map(factor_of).collect()
}

/// Llama 3.1's own parameters, and the context that all llama3 models were trained with first.
const LLAMA3_LOW_HIGH: [f64; 2] = [1.0, 4.0];
const LLAMA3_ORIGINAL: f64 = 8192.0;
/// Relative; the file's factors are f32 results of another library's power function.
const LLAMA3_TOLERANCE: f32 = 1e-4;

/// The parameters whose factors `rope_freqs.weight` holds.
fn llama3_scaling(file: &GgufFile, theta: f64, head_dim: usize) -> Result<Json> {
    let Some(tensor) = file.tensor(llama::ROPE_FREQS) else { return Ok(Json::Null) };
    if tensor.rows() != 1 || tensor.columns().checked_mul(2) != Some(head_dim) {
        let (shape, name) = (tensor.shape, tensor.name);
        let message = format!("{}: {name} has shape {shape:?}, for heads of {head_dim} channels", file.name());
        return Err(Error::data(message).hint("one factor for two channels is expected"));
    }
    let factors = dequantize(&tensor)?;
    if factors.iter().all(|&factor| factor == 1.0) {
        return Ok(Json::Null);
    }
    match llama3_parameters(theta, head_dim, &factors) {
        Some([factor, low, high, original]) => Ok(json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original as u64,
        })),
        None => Err(Error::data(format!(
            "{}: {} does not hold the factors of llama3 scaling",
            file.name(),
            llama::ROPE_FREQS
        ))
        .hint("only that kind of scaling by a table is read")),
    }
}

/// Parameters that give these factors: factor, low, high and original context. Several do; the usual ones come first.
fn llama3_parameters(theta: f64, head_dim: usize, factors: &[f32]) -> Option<[f64; 4]> {
    let factor = f64::from(factors.last().copied()?);
    let table = Llama3Table::new(theta, head_dim, factor, factors);
    let [low, high] = LLAMA3_LOW_HIGH;
    let mut candidates = vec![[factor, low, high, LLAMA3_ORIGINAL]];
    candidates.extend(table.original(low, high).map(|original| [factor, low, high, original]));
    candidates.extend(table.line());
    candidates.extend(table.steep_line());
    candidates.into_iter().find(|&parameters| {
        let expected = llama3_factors(theta, head_dim, parameters);
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= LLAMA3_TOLERANCE * b.abs();
        factors.iter().zip(&expected).all(near)
    })
}

/// A table of factors as points: over 1 / wavelength, descending, what `llama3` scaling interpolates with, from 1
/// (wavelengths that are kept) to 0 (divided by the whole factor). The points between lie on a line.
struct Llama3Table {
    factor: f64,
    points: Vec<(f64, f64)>,
}

impl Llama3Table {
    fn new(theta: f64, head_dim: usize, factor: f64, factors: &[f32]) -> Self {
        let point = |(pair, &value): (usize, &f32)| {
            let frequency = theta.powf(-2.0 * pair as f64 / head_dim as f64);
            (frequency / std::f64::consts::TAU, (1.0 / f64::from(value) - 1.0 / factor) / (1.0 - 1.0 / factor))
        };
        Self { factor, points: factors.iter().enumerate().map(point).collect() }
    }

    fn between(&self) -> impl DoubleEndedIterator<Item = (usize, &(f64, f64))> {
        self.points.iter().enumerate().filter(|(_, (_, smooth))| *smooth > 1e-7 && *smooth < 1.0 - 1e-7)
    }

    /// The original context that goes with these two, a whole number, from the first point between.
    fn original(&self, low: f64, high: f64) -> Option<f64> {
        let (_, &(x, smooth)) = self.between().next()?;
        Some((((high - low) * smooth + low) / x).round())
    }

    /// The line through the first and the last point between. The original context only scales the other two.
    fn line(&self) -> Option<[f64; 4]> {
        let ((_, &(x0, y0)), (_, &(x1, y1))) = (self.between().next()?, self.between().next_back()?);
        let span = LLAMA3_ORIGINAL * (x1 - x0) / (y1 - y0);
        let low = -(y0 - (y1 - y0) / (x1 - x0) * x0) * span;
        let rounded = |value: f64| (value * 1e4).round() / 1e4;
        let parameters = [self.factor, rounded(low), rounded(low + span), LLAMA3_ORIGINAL];
        (span.is_finite() && span > 0.0 && low > 0.0).then_some(parameters)
    }

    /// With one point between or none, lines of many slopes give the table: one that is steep enough.
    fn steep_line(&self) -> Option<[f64; 4]> {
        let kept = self.points.iter().take_while(|(_, smooth)| *smooth >= 1.0 - 1e-7).count();
        let x = |place: usize| self.points.get(place).map(|&(x, _)| x);
        let above = if kept > 0 { x(kept - 1)? } else { 4.0 * x(0)? };
        let (at, smooth, below) = match self.between().next() {
            Some((place, &(at, smooth))) => (at, smooth, x(place + 1).unwrap_or(at / 4.0)),
            None => ((above + x(kept)?) / 2.0, 0.5, x(kept)?),
        };
        let slope = 1.01 * ((1.0 - smooth) / (above - at)).max(smooth / (at - below));
        let span = LLAMA3_ORIGINAL / slope;
        let low = (slope * at - smooth) * span;
        (span.is_finite() && span > 0.0 && low > 0.0).then_some([self.factor, low, low + span, LLAMA3_ORIGINAL])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_found_for_any_number_of_factors_between() {
        let usual = [8.0, 1.0, 4.0, 64.0];
        assert_eq!(llama3_parameters(500_000.0, 12, &llama3_factors(500_000.0, 12, usual)), Some(usual));
        for (theta, head_dim, parameters) in [
            (500_000.0, 128, [8.0, 1.0, 4.0, 8192.0]),
            (10_000.0, 64, [4.0, 2.0, 6.0, 4096.0]),
            (10_000.0, 8, [4.0, 1.0, 1.5, 100.0]),
            (10_000.0, 8, [4.0, 1.5, 7.0, 700.0]),
            (10_000.0, 6, [2.0, 1.0, 1.2, 1000.0]),
            (10_000.0, 64, [3.0, 1.0, 2.5, 20000.0]),
            (10_000.0, 4, [2.0, 1.0, 2.0, 0.5]),
        ] {
            let factors = llama3_factors(theta, head_dim, parameters);
            let found = llama3_parameters(theta, head_dim, &factors);
            let again = llama3_factors(theta, head_dim, found.unwrap_or_else(|| panic!("{parameters:?}: {factors:?}")));
            for (again, factor) in again.iter().zip(&factors) {
                assert!((again - factor).abs() <= 2e-5 * factor, "{parameters:?}: {again} for {factor}");
            }
        }
    }
}
