//! From what a pickle holds to named tensors whose bytes lie within their storages.

use std::collections::BTreeMap;

use super::{
    super::safetensors::Dtype,
    archive::{Archive, Span},
    pickle::{Described, Unpickled, Value},
};
use crate::error::{Error, Result};

/// Under one of these a training program keeps the model beside its own state.
const WRAPPERS: [&str; 4] = ["state_dict", "model_state_dict", "model", "module"];
const MAX_TENSORS: usize = 100_000;
const MAX_NAME: usize = 512;
const MAX_DEPTH: usize = 16;
/// An expanded tensor (stride 0) has more elements than its storage; up to this many are believed, of all such
/// together.
const MAX_EXPANDED: usize = 1 << 24;

/// A tensor in its file. Strides count elements; `span` reaches from its first element to its last.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<usize>,
    pub(super) span: Span,
}

/// Finds and checks every tensor of a state dict, alone or inside a training program's checkpoint.
pub(super) fn tensors(
    file: &str,
    pickle: &Unpickled<'_>,
    archive: &Archive,
    prefix: &str,
) -> Result<BTreeMap<String, Stored>> {
    let mut found = Found { file, pickle, tensors: BTreeMap::new(), visited: 0 };
    found.gather(unwrap(pickle), "", 0)?;
    if found.tensors.is_empty() {
        let error = Error::data(format!("{file} holds no tensors"));
        return Err(match keys(pickle, pickle.root) {
            keys if keys.is_empty() => error,
            keys => error.hint(format!("its keys are {}", keys.join(", "))),
        }
        .hint("a state dict is expected: torch.save(model.state_dict(), path)"));
    }
    let mut expanded = 0;
    let placed = found.tensors.into_iter().map(|(name, number)| {
        let stored = place(pickle, &pickle.tensors[number], archive, prefix, &mut expanded);
        let stored = stored.map_err(|what| Error::data(format!("{file}: {name}: {what}")))?;
        Ok((name, stored))
    });
    placed.collect()
}

/// The dict with the model's own tensors.
fn unwrap(pickle: &Unpickled<'_>) -> Value {
    let mut value = pickle.root;
    for _ in 0..MAX_DEPTH {
        let Some(entries) = pickle.dict(value) else { break };
        if entries.iter().any(|(_, value)| matches!(value, Value::Tensor(_))) {
            break;
        }
        let inner = WRAPPERS.iter().find_map(|wrapper| {
            let named = |key: &Value| matches!(key, Value::Text(key) if pickle.text(*key) == *wrapper);
            let (_, value) = entries.iter().rev().find(|(key, _)| named(key))?;
            pickle.dict(*value).map(|_| *value)
        });
        match inner {
            Some(inner) => value = inner,
            None => break,
        }
    }
    value
}

/// A few keys of a dict, for a message.
fn keys(pickle: &Unpickled<'_>, value: Value) -> Vec<String> {
    let entries = pickle.dict(value).unwrap_or_default().iter().take(8);
    let shown = entries.filter_map(|(key, _)| match key {
        Value::Text(key) => Some(pickle.text(*key).chars().take(60).flat_map(char::escape_debug).collect()),
        _ => None,
    });
    shown.collect()
}

struct Found<'a> {
    file: &'a str,
    pickle: &'a Unpickled<'a>,
    /// Name to the number of its tensor.
    tensors: BTreeMap<String, usize>,
    visited: usize,
}

impl Found<'_> {
    /// Takes the tensors of a dict; those of a dict inside it as `outer.inner`.
    fn gather(&mut self, value: Value, prefix: &str, depth: usize) -> Result<()> {
        let refuse = |what: &str| Err(Error::data(format!("{}: {what}", self.file)));
        if depth > MAX_DEPTH {
            return refuse(&format!("dicts lie in dicts more than {MAX_DEPTH} deep"));
        }
        let mut here: BTreeMap<String, Value> = BTreeMap::new();
        for (key, value) in self.pickle.dict(value).unwrap_or_default() {
            self.visited += 1;
            if self.visited > 8 * MAX_TENSORS {
                return refuse("its dicts have too many entries");
            }
            let (Value::Text(key), Value::Tensor(_) | Value::Dict(_)) = (key, value) else { continue };
            let key = self.pickle.text(*key);
            if prefix.len() + key.len() > MAX_NAME {
                return refuse(&format!("the name of a tensor is longer than {MAX_NAME} bytes"));
            }
            here.insert(format!("{prefix}{key}"), *value);
        }
        for (name, value) in here {
            match value {
                Value::Tensor(number) => {
                    if self.tensors.len() == MAX_TENSORS {
                        return Err(Error::data(format!("{}: it has more than {MAX_TENSORS} tensors", self.file)));
                    }
                    if self.tensors.insert(name.clone(), number).is_some() {
                        return Err(Error::data(format!("{}: {name} is there twice", self.file)));
                    }
                }
                _ => self.gather(value, &format!("{name}."), depth + 1)?,
            }
        }
        Ok(())
    }
}

/// Adds the elements of a tensor that repeats some to `expanded`.
fn place(
    pickle: &Unpickled<'_>,
    tensor: &Described,
    archive: &Archive,
    prefix: &str,
    expanded: &mut usize,
) -> Result<Stored, String> {
    let Described { storage, dtype, offset, ref shape, ref strides } = *tensor;
    let key = pickle.text(storage.key);
    let entry = archive.get(&format!("{prefix}data/{}", key.get(..key.len().min(MAX_NAME)).unwrap_or_default()));
    let entry = entry.ok_or_else(|| format!("its storage `{}` is not in the file", key.escape_debug()))?;
    let size = dtype.bitsize() / 8;
    // A storage without a type counts bytes.
    let claimed = match storage.dtype {
        Some(own) if own != dtype => return Err(format!("it is of {dtype:?}, and its storage of {own:?}")),
        Some(_) => storage.len.checked_mul(size),
        None => Some(storage.len),
    };
    if claimed.is_none_or(|claimed| claimed > entry.len) {
        return Err(format!("its storage claims {} elements, and has {} bytes", storage.len, entry.len));
    }
    // Sizes of 0 count last: no product of some of the sizes may overflow.
    let count = shape.iter().try_fold(1usize, |count, &size| count.checked_mul(size.max(1)));
    let outside = || {
        format!(
            "shape {shape:?}, strides {strides:?} and offset {offset} reach outside its storage of {} bytes",
            entry.len
        )
    };
    let count = count.filter(|count| count.checked_mul(size.max(8)).is_some()).ok_or_else(outside)?;
    let count = if shape.contains(&0) { 0 } else { count };
    // Elements from the first to the last, both counted.
    let extent = match count {
        0 => Some(0),
        _ => shape
            .iter()
            .zip(strides)
            .try_fold(1usize, |extent, (&size, &stride)| extent.checked_add((size - 1).checked_mul(stride)?)),
    };
    let start = offset.checked_mul(size);
    let len = extent.and_then(|extent| extent.checked_mul(size));
    let (start, len) = start.zip(len).ok_or_else(outside)?;
    if start.checked_add(len).is_none_or(|end| end > entry.len) {
        return Err(outside());
    }
    if count > extent.unwrap_or(0) {
        *expanded = expanded.saturating_add(count);
        if *expanded > MAX_EXPANDED {
            return Err(format!("shape {shape:?} repeats {len} bytes too many times"));
        }
    }
    let span = Span { start: entry.start + start, len };
    Ok(Stored { dtype, shape: shape.clone(), strides: strides.clone(), span })
}
