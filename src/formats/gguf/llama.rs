//! The tensors of a file of architecture `llama` (or `qwen2`) as the ones of `LlamaForCausalLM`: names, and the order of rows.
//!
//! llama.cpp rotates pairs of neighbouring channels, Hugging Face channel j with channel j + d/2. Its converter
//! therefore reorders the rows of q and k within each head (`LlamaModel.permute`), and reading undoes that.

use std::ops::Range;

use super::{
    GgmlType, GgufFile, GgufTensor,
    dequant::{dequantize_bytes, is_readable, unreadable},
};
use crate::{
    error::{Error, Result, nearest},
    formats::HostTensor,
};

/// The architecture that LLaMA and most of its relatives have.
pub const ARCHITECTURE: &str = "llama";
/// The same tensors with the rows in Hugging Face's order, and biases on q, k and v.
pub const QWEN2: &str = "qwen2";
/// Factors of `llama3` rotary scaling; no weight, but read by [`super::llama_config::config_json`].
pub const ROPE_FREQS: &str = "rope_freqs.weight";

/// Outside the layers: GGUF, Hugging Face.
const WHOLE: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];
/// Within a layer: `blk.N.` and `model.layers.N.` come first.
const LAYER: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// `blk.3.attn_q.weight` as `model.layers.3.self_attn.q_proj.weight`; none for a name that no LLaMA has.
pub fn hf_name(gguf: &str) -> Option<String> {
    renamed(gguf, "blk.", "model.layers.", |(gguf, hf)| (gguf, hf))
}

/// The reverse of [`hf_name`].
pub fn gguf_name(hf: &str) -> Option<String> {
    renamed(hf, "model.layers.", "blk.", |(gguf, hf)| (hf, gguf))
}

fn renamed(
    name: &str,
    from_layers: &str,
    to_layers: &str,
    side: impl Fn((&'static str, &'static str)) -> (&'static str, &'static str),
) -> Option<String> {
    let (stem, part) = name.rsplit_once('.')?;
    if !matches!(part, "weight" | "bias") {
        return None;
    }
    let find = |table: &[(&'static str, &'static str)], stem: &str| {
        table.iter().map(|&pair| side(pair)).find(|(from, _)| *from == stem).map(|(_, to)| to)
    };
    if let Some(rest) = stem.strip_prefix(from_layers) {
        let (layer, stem) = rest.split_once('.')?;
        // One spelling of each number only, so that the way back gives the same name.
        let layer: usize = layer.parse().ok().filter(|number: &usize| number.to_string() == layer)?;
        return Some(format!("{to_layers}{layer}.{}.{part}", find(&LAYER, stem)?));
    }
    Some(format!("{}.{part}", find(&WHOLE, stem)?))
}

/// The row of the GGUF tensor that is row `row` of the Hugging Face one, in heads of `head_dim` rows.
pub fn gguf_row(row: usize, head_dim: usize) -> usize {
    let (head, row) = (row / head_dim, row % head_dim);
    head * head_dim + row % (head_dim / 2) * 2 + row / (head_dim / 2)
}

/// The reverse of [`gguf_row`]: the Hugging Face row that is the GGUF tensor's row `row`.
pub fn hf_row(row: usize, head_dim: usize) -> usize {
    let (head, row) = (row / head_dim, row % head_dim);
    head * head_dim + row % 2 * (head_dim / 2) + row / 2
}

/// A tensor of the file, with its rows in the order of Hugging Face.
#[derive(Clone, Copy, Debug)]
pub struct LlamaTensor<'a> {
    pub tensor: GgufTensor<'a>,
    /// Rows in one head, where the file has them in llama.cpp's order.
    head_dim: Option<usize>,
}

/// A tensor whose rows are as they are.
impl<'a> From<GgufTensor<'a>> for LlamaTensor<'a> {
    fn from(tensor: GgufTensor<'a>) -> Self {
        Self { tensor, head_dim: None }
    }
}

impl<'a> LlamaTensor<'a> {
    pub fn shape(&self) -> &'a [usize] {
        self.tensor.shape
    }

    pub fn ggml_type(&self) -> GgmlType {
        self.tensor.ggml_type
    }

    /// Values in a row, which is all behind the first dimension; a bias whose values are to be reordered is a column.
    pub fn columns(&self) -> usize {
        match self.tensor.shape {
            [_] if self.head_dim.is_some() => 1,
            [_, rest @ ..] if !rest.is_empty() => rest.iter().product(),
            _ => self.tensor.columns(),
        }
    }

    /// Rows that can be read apart from each other.
    pub fn rows(&self) -> usize {
        self.tensor.rows() * self.tensor.columns() / self.columns()
    }

    /// Writes the f32 values of `rows` to `out`, which holds exactly them.
    pub fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let columns = self.columns();
        self.check(&rows, out.len().checked_div(columns).filter(|count| count * columns == out.len()))?;
        if self.head_dim.is_none() {
            return dequantize_bytes(&self.tensor, self.bytes_of(rows), out);
        }
        for (row, out) in rows.zip(out.chunks_exact_mut(columns)) {
            dequantize_bytes(&self.tensor, self.row(row), out)?;
        }
        Ok(())
    }

    /// Appends the bytes of `rows` as they are in the file, for types that are kept (F32, F16, BF16).
    pub fn raw_rows(&self, rows: Range<usize>, out: &mut Vec<u8>) -> Result<()> {
        self.check(&rows, Some(rows.len()))?;
        match self.head_dim {
            None => out.extend(self.bytes_of(rows)),
            Some(_) => rows.for_each(|row| out.extend(self.row(row))),
        }
        Ok(())
    }

    /// The bytes of `rows` where they lie, for a tensor whose rows are in Hugging Face's order.
    pub fn raw_in_place(&self, rows: Range<usize>) -> Option<&'a [u8]> {
        let whole = rows.start <= rows.end && rows.end <= self.rows();
        (whole && self.head_dim.is_none()).then(|| self.bytes_of(rows))
    }

    /// All values; for tensors that fit in memory.
    pub fn to_f32(&self) -> Result<HostTensor> {
        if !is_readable(self.tensor.ggml_type) {
            return Err(unreadable(&self.tensor));
        }
        let mut data = vec![0.0; self.rows() * self.columns()];
        self.read_rows(0..self.rows(), &mut data)?;
        Ok(HostTensor { shape: self.shape().to_vec(), data })
    }

    /// The bytes of one row of Hugging Face's order.
    fn row(&self, row: usize) -> &'a [u8] {
        let row = self.head_dim.map_or(row, |head_dim| gguf_row(row, head_dim));
        self.bytes_of(row..row + 1)
    }

    /// The bytes of rows in the order of the file.
    fn bytes_of(&self, rows: Range<usize>) -> &'a [u8] {
        let row_bytes = self.tensor.bytes.len() / self.rows();
        &self.tensor.bytes[rows.start * row_bytes..rows.end * row_bytes]
    }

    fn check(&self, rows: &Range<usize>, count: Option<usize>) -> Result<()> {
        if rows.start <= rows.end && rows.end <= self.rows() && count == Some(rows.len()) {
            return Ok(());
        }
        let (file, name, shape) = (self.tensor.file, self.tensor.name, self.shape());
        Err(Error::failed(format!("{file}: {name}: rows {rows:?} of shape {shape:?} for {count:?} rows")))
    }
}

/// The tensor that Hugging Face calls `hf`, from a file of this architecture.
pub fn tensor<'a>(file: &'a GgufFile, hf: &str) -> Result<LlamaTensor<'a>> {
    let Some(name) = gguf_name(hf) else {
        return Err(Error::data(format!("{}: {hf} is no tensor that a GGUF file of a LLaMA has", file.name())));
    };
    let tensor = file.require(&name)?;
    let head_dim = match head_count(file, &name)? {
        None => None,
        Some(heads) => {
            let rows = tensor.shape.first().copied().unwrap_or(1);
            // A vector of blocks has no single values to reorder.
            let whole = tensor.shape.len() > 1 || tensor.ggml_type.block_values() == 1;
            let head_dim = rows.checked_div(heads).filter(|&head_dim| whole && head_dim * heads == rows);
            let Some(head_dim) = head_dim.filter(|&head_dim| head_dim > 0 && head_dim % 2 == 0) else {
                let (shape, kind) = (tensor.shape, tensor.ggml_type.name());
                let message = format!("{}: {name}, {kind} {shape:?}, does not split into {heads} heads", file.name());
                return Err(Error::data(message));
            };
            Some(head_dim)
        }
    };
    Ok(LlamaTensor { tensor, head_dim })
}

pub(super) fn is_qwen2(file: &GgufFile) -> bool {
    matches!(file.text("general.architecture"), Ok(Some(QWEN2)))
}

/// Heads of a tensor whose rows are in llama.cpp's order.
fn head_count(file: &GgufFile, name: &str) -> Result<Option<usize>> {
    if is_qwen2(file) {
        Ok(None)
    } else if name.contains(".attn_q.") {
        super::llama_config::heads(file).map(Some)
    } else if name.contains(".attn_k.") {
        super::llama_config::key_value_heads(file).map(Some)
    } else {
        Ok(None)
    }
}

/// Names of all tensors as Hugging Face has them, sorted as in the file. A tensor that no LLaMA has is an error.
pub fn tensor_names(file: &GgufFile) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for name in file.tensor_names().filter(|name| !is_ignorable(name)) {
        names.push(hf_name(name).ok_or_else(|| unknown(file, name))?);
    }
    Ok(names)
}

/// Tables that old files carry and that are computed here, or read with the config.
fn is_ignorable(name: &str) -> bool {
    name == ROPE_FREQS || name.ends_with(".attn_rot_embd.weight") || name.ends_with(".attn_rot_embd")
}

fn unknown(file: &GgufFile, name: &str) -> Error {
    let error = Error::data(format!("{}: the tensor {name} is not one of a LLaMA", file.name()));
    let layer = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).map(|(layer, _)| layer);
    let whole = WHOLE.iter().map(|(stem, _)| format!("{stem}.weight"));
    let known: Vec<String> = match layer {
        Some(layer) => LAYER.iter().map(|(stem, _)| format!("blk.{layer}.{stem}.weight")).collect(),
        None => whole.collect(),
    };
    match nearest(name, known.iter().map(String::as_str)) {
        Some(near) => error.hint(format!("the nearest name is {near}; mixtures of experts and adapters are not read")),
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        let rows = [
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("output.weight", "lm_head.weight"),
            ("output_norm.weight", "model.norm.weight"),
            ("blk.0.attn_q.bias", "model.layers.0.self_attn.q_proj.bias"),
            ("blk.12.attn_output.weight", "model.layers.12.self_attn.o_proj.weight"),
            ("blk.12.ffn_norm.weight", "model.layers.12.post_attention_layernorm.weight"),
        ];
        for (gguf, hf) in rows {
            assert_eq!(hf_name(gguf).as_deref(), Some(hf));
            assert_eq!(gguf_name(hf).as_deref(), Some(gguf));
        }
        for name in ["blk.01.attn_q.weight", "blk.x.attn_q.weight", "blk.0.ffn_gate_exps.weight", "output", "blk.0"] {
            assert_eq!(hf_name(name), None, "{name}");
        }
    }

    #[test]
    fn rows_are_paired_as_each_side_rotates_them() {
        let order: Vec<usize> = (0..12).map(|row| gguf_row(row, 6)).collect();
        assert_eq!(order, [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]);
        assert!((0..128).all(|row| hf_row(gguf_row(row, 64), 64) == row));
    }
}
