//! A pickle machine that knows only what a state dict is made of.
//!
//! It builds dicts, lists, numbers, strings, and descriptions of tensors. It never calls anything: a callable is one of
//! [`Global`], and what each does to its arguments is written here. Objects live in tables and refer to each other by
//! number, so a pickle that holds itself costs nothing, and what it may allocate is bounded.

use std::collections::HashMap;

use super::{
    super::safetensors::Dtype,
    globals::{self, Global},
};
use crate::error::{Error, Result};

/// A large model's state dict takes some hundred KiB, a trainer's whole state a few MiB.
pub(super) const MAX_PICKLE: usize = 32 << 20;
const MAX_OBJECTS: usize = 1 << 20;
const MAX_STACK: usize = 1 << 20;
/// Items of all dicts, lists, tuples and shapes together.
const MAX_ITEMS: usize = 4 << 20;
/// No call of a state dict has more.
const MAX_ARGUMENTS: usize = 16;
const MAX_DIMENSIONS: usize = 64;

/// A string, by its place in the pickle; known to be UTF-8.
#[derive(Clone, Copy, Debug)]
pub(super) struct Text {
    start: usize,
    end: usize,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Value {
    None,
    Int(i64),
    Text(Text),
    Tuple(usize),
    List(usize),
    Dict(usize),
    Global(Global),
    Storage(usize),
    Tensor(usize),
    /// Something that no tensor depends on: a float, a truth value, bytes, a device.
    Opaque,
}

/// A storage: its entry in the archive, its dtype where it has one, and how many elements (else bytes) it claims.
#[derive(Clone, Copy, Debug)]
pub(super) struct Storage {
    pub(super) key: Text,
    pub(super) dtype: Option<Dtype>,
    pub(super) len: usize,
}

/// A tensor as described; nothing of it is checked against its storage yet. Offset and strides count elements.
#[derive(Clone, Debug)]
pub(super) struct Described {
    pub(super) storage: Storage,
    pub(super) dtype: Dtype,
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<usize>,
}

/// What a pickle holds.
pub(super) struct Unpickled<'a> {
    bytes: &'a [u8],
    pub(super) root: Value,
    dicts: Vec<Vec<(Value, Value)>>,
    pub(super) tensors: Vec<Described>,
}

impl Unpickled<'_> {
    pub(super) fn text(&self, text: Text) -> &str {
        std::str::from_utf8(&self.bytes[text.start..text.end]).unwrap_or_default()
    }

    /// The entries of a dict, in order; a key may come again, and then its last value counts.
    pub(super) fn dict(&self, value: Value) -> Option<&[(Value, Value)]> {
        match value {
            Value::Dict(number) => self.dicts.get(number).map(Vec::as_slice),
            _ => None,
        }
    }
}

/// Reads a pickle of protocol 2 to 5; `file` is what messages call it.
pub(super) fn unpickle<'a>(file: &'a str, bytes: &'a [u8]) -> Result<Unpickled<'a>> {
    let mut machine = Machine {
        file,
        bytes,
        at: 0,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        sequences: Vec::new(),
        dicts: Vec::new(),
        storages: Vec::new(),
        tensors: Vec::new(),
        items: 0,
    };
    if bytes.len() > MAX_PICKLE {
        return Err(machine.broken(&format!("it has {} bytes, and {MAX_PICKLE} is the limit", bytes.len())));
    }
    let root = machine.run()?;
    let Machine { dicts, tensors, .. } = machine;
    Ok(Unpickled { bytes, root, dicts, tensors })
}

struct Machine<'a> {
    file: &'a str,
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    /// Heights of the stack that were marked.
    marks: Vec<usize>,
    memo: HashMap<u64, Value>,
    /// Tuples and lists.
    sequences: Vec<Vec<Value>>,
    dicts: Vec<Vec<(Value, Value)>>,
    storages: Vec<Storage>,
    tensors: Vec<Described>,
    /// How many values the tables hold.
    items: usize,
}

impl Machine<'_> {
    fn broken(&self, what: &str) -> Error {
        Error::data(format!("{}: the pickle is broken at byte {}: {what}", self.file, self.at))
    }

    fn run(&mut self) -> Result<Value> {
        loop {
            let [opcode] = self.take()?;
            if opcode == b'.' {
                return self.pop();
            }
            self.step(opcode)?;
            if self.stack.len() > MAX_STACK || self.marks.len() > MAX_STACK {
                return Err(self.broken("its stack grows too high"));
            }
            let objects = self.sequences.len() + self.dicts.len() + self.storages.len() + self.tensors.len();
            if objects > MAX_OBJECTS || self.memo.len() > MAX_OBJECTS || self.items > MAX_ITEMS {
                return Err(self.broken("it holds too many objects"));
            }
        }
    }

    fn step(&mut self, opcode: u8) -> Result<()> {
        match opcode {
            0x80 => {
                let [protocol] = self.take()?;
                if !(2..=5).contains(&protocol) {
                    return Err(self.broken(&format!("protocol {protocol} is not one of 2 to 5")));
                }
            }
            0x95 => _ = self.take::<8>()?,
            b'(' => self.marks.push(self.stack.len()),
            b'0' => _ = self.pop()?,
            b'1' => _ = self.pop_mark()?,
            b'2' => {
                let top = self.top()?;
                self.stack.push(top);
            }
            b'N' => self.stack.push(Value::None),
            0x88 | 0x89 => self.stack.push(Value::Opaque),
            b'J' => {
                let number = i32::from_le_bytes(self.take()?);
                self.stack.push(Value::Int(number.into()));
            }
            b'K' | b'M' => {
                let number = self.length(if opcode == b'K' { 1 } else { 2 })?;
                self.stack.push(Value::Int(number as i64));
            }
            0x8a | 0x8b => self.long(if opcode == 0x8a { 1 } else { 4 })?,
            b'G' => {
                self.take::<8>()?;
                self.stack.push(Value::Opaque);
            }
            b'X' | b'T' => self.push_text(4)?,
            b'U' | 0x8c => self.push_text(1)?,
            0x8d => self.push_text(8)?,
            b'B' | b'C' | 0x8e => {
                let length = self.length(match opcode {
                    b'B' => 4,
                    b'C' => 1,
                    _ => 8,
                })?;
                self.skip(length)?;
                self.stack.push(Value::Opaque);
            }
            b')' => self.push_sequence(Vec::new(), Value::Tuple),
            b']' => self.push_sequence(Vec::new(), Value::List),
            b't' => {
                let items = self.pop_mark()?;
                self.push_sequence(items, Value::Tuple);
            }
            0x85..=0x87 => {
                let mut items = (0x85..=opcode).map(|_| self.pop()).collect::<Result<Vec<_>>>()?;
                items.reverse();
                self.push_sequence(items, Value::Tuple);
            }
            b'a' => {
                let item = self.pop()?;
                self.extend_list(vec![item])?;
            }
            b'e' => {
                let items = self.pop_mark()?;
                self.extend_list(items)?;
            }
            b'}' => self.push_dict(),
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.extend_dict(&[key, value])?;
            }
            b'u' => {
                let items = self.pop_mark()?;
                self.extend_dict(&items)?;
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push_global(module, name)?;
            }
            0x93 => {
                let (Value::Text(name), Value::Text(module)) = (self.pop()?, self.pop()?) else {
                    return Err(self.broken("the name of a global is not a string"));
                };
                self.push_global(module, name)?;
            }
            b'R' | 0x81 => {
                let (arguments, callee) = (self.pop()?, self.pop()?);
                let Value::Global(callee) = callee else { return Err(self.broken("it calls what is no function")) };
                let arguments = self.arguments(arguments)?;
                let result = self.call(callee, &arguments, true)?;
                self.stack.push(result);
            }
            // The state of an object: `_metadata` of a state dict, attributes of a tensor. No value depends on it.
            b'b' => {
                self.pop()?;
                if !matches!(self.top()?, Value::Dict(_) | Value::Tensor(_) | Value::Opaque) {
                    return Err(self.broken("it sets the state of what has none"));
                }
            }
            b'Q' => self.persistent()?,
            b'q' | b'r' => {
                let slot = self.length(if opcode == b'q' { 1 } else { 4 })?;
                let top = self.top()?;
                self.memo.insert(slot, top);
            }
            0x94 => {
                let top = self.top()?;
                self.memo.insert(self.memo.len() as u64, top);
            }
            b'h' | b'j' => {
                let slot = self.length(if opcode == b'h' { 1 } else { 4 })?;
                let value = self.memo.get(&slot).copied();
                self.stack.push(value.ok_or_else(|| self.broken(&format!("nothing was kept under {slot}")))?);
            }
            _ => {
                let message = format!("the operation {opcode:#04x} is not one that a state dict needs");
                return Err(self.broken(&message).hint("save the model's state_dict() alone, best as safetensors"));
            }
        }
        Ok(())
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let found = self.bytes[self.at..].first_chunk().copied();
        let found = found.ok_or_else(|| self.broken("it ends too early"))?;
        self.at += N;
        Ok(found)
    }

    /// A little-endian number of 1, 2, 4 or 8 bytes.
    fn length(&mut self, bytes: usize) -> Result<u64> {
        (0..bytes).try_fold(0, |value, index| Ok(value | u64::from(self.take::<1>()?[0]) << (8 * index)))
    }

    fn skip(&mut self, length: u64) -> Result<()> {
        let end = usize::try_from(length).ok().and_then(|length| self.at.checked_add(length));
        self.at = end.filter(|&end| end <= self.bytes.len()).ok_or_else(|| self.broken("it ends too early"))?;
        Ok(())
    }

    fn text_between(&self, start: usize, end: usize) -> Result<Text> {
        match std::str::from_utf8(&self.bytes[start..end]) {
            Ok(_) => Ok(Text { start, end }),
            Err(_) => Err(self.broken("a string is not UTF-8")),
        }
    }

    fn push_text(&mut self, width: usize) -> Result<()> {
        let length = self.length(width)?;
        let start = self.at;
        self.skip(length)?;
        let text = self.text_between(start, self.at)?;
        self.stack.push(Value::Text(text));
        Ok(())
    }

    /// Up to the next newline, which is skipped.
    fn line(&mut self) -> Result<Text> {
        let start = self.at;
        let length = self.bytes[start..].iter().position(|&byte| byte == b'\n');
        let end = start + length.ok_or_else(|| self.broken("it ends too early"))?;
        self.at = end + 1;
        self.text_between(start, end)
    }

    fn long(&mut self, width: usize) -> Result<()> {
        let length = self.length(width)?;
        let start = self.at;
        self.skip(length)?;
        let digits = &self.bytes[start..self.at];
        let negative = digits.last().is_some_and(|byte| byte & 0x80 != 0);
        let mut number = [if negative { 0xff } else { 0 }; 8];
        self.stack.push(match number.get_mut(..digits.len()) {
            Some(low) => {
                low.copy_from_slice(digits);
                Value::Int(i64::from_le_bytes(number))
            }
            // The state of a random generator, not a size.
            None => Value::Opaque,
        });
        Ok(())
    }

    fn top(&self) -> Result<Value> {
        let above_mark = self.stack.len() > self.marks.last().copied().unwrap_or(0);
        let top = self.stack.last().copied().filter(|_| above_mark);
        top.ok_or_else(|| self.broken("it takes from an empty stack"))
    }

    fn pop(&mut self) -> Result<Value> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    fn pop_mark(&mut self) -> Result<Vec<Value>> {
        let mark = self.marks.pop().ok_or_else(|| self.broken("it has no mark"))?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn push_sequence(&mut self, items: Vec<Value>, kind: fn(usize) -> Value) {
        self.items += items.len();
        self.stack.push(kind(self.sequences.len()));
        self.sequences.push(items);
    }

    fn push_dict(&mut self) {
        self.stack.push(Value::Dict(self.dicts.len()));
        self.dicts.push(Vec::new());
    }

    fn extend_list(&mut self, items: Vec<Value>) -> Result<()> {
        let Value::List(list) = self.top()? else { return Err(self.broken("it appends to what is no list")) };
        self.items += items.len();
        self.sequences[list].extend(items);
        Ok(())
    }

    fn extend_dict(&mut self, items: &[Value]) -> Result<()> {
        let Value::Dict(dict) = self.top()? else { return Err(self.broken("it sets an item of what is no dict")) };
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(self.broken("a key has no value"));
        }
        self.items += items.len();
        self.dicts[dict].extend(pairs.iter().map(|&[key, value]| (key, value)));
        Ok(())
    }

    fn push_global(&mut self, module: Text, name: Text) -> Result<()> {
        let shown = |text: Text| std::str::from_utf8(&self.bytes[text.start..text.end.min(text.start + 200)]);
        let (module, name) = (shown(module).unwrap_or("?"), shown(name).unwrap_or("?"));
        let global = globals::resolve(self.file, module, name)?;
        self.stack.push(Value::Global(global));
        Ok(())
    }

    fn sequence(&self, value: Value) -> Result<&[Value]> {
        match value {
            Value::Tuple(number) | Value::List(number) => Ok(&self.sequences[number]),
            _ => Err(self.broken("a tuple is missing")),
        }
    }

    fn arguments(&self, value: Value) -> Result<Vec<Value>> {
        let arguments = self.sequence(value)?;
        if arguments.len() > MAX_ARGUMENTS {
            return Err(self.broken("a call has too many arguments"));
        }
        Ok(arguments.to_vec())
    }

    /// `("storage", type, key, location, length)`: where the bytes of tensors are.
    fn persistent(&mut self) -> Result<()> {
        let value = self.pop()?;
        let [Value::Text(kind), Value::Global(Global::Storage(dtype)), Value::Text(key), _, Value::Int(len), ..] =
            *self.sequence(value)?
        else {
            return Err(self.broken("a reference to outside the pickle is not one to a storage"));
        };
        if &self.bytes[kind.start..kind.end] != b"storage" {
            return Err(self.broken("a reference to outside the pickle is not one to a storage"));
        }
        let len = usize::try_from(len).map_err(|_| self.broken("a storage has a negative size"))?;
        self.stack.push(Value::Storage(self.storages.len()));
        self.storages.push(Storage { key, dtype, len });
        Ok(())
    }

    fn call(&mut self, callee: Global, arguments: &[Value], outermost: bool) -> Result<Value> {
        match (callee, arguments) {
            (Global::Dict, []) => {
                self.dicts.push(Vec::new());
                Ok(Value::Dict(self.dicts.len() - 1))
            }
            // The old way: a list of pairs.
            (Global::Dict, &[list]) => {
                let pairs = self.sequence(list)?.iter().map(|&pair| match self.sequence(pair)? {
                    &[key, value] => Ok((key, value)),
                    _ => Err(self.broken("an item of a dict is not a pair")),
                });
                let pairs = pairs.collect::<Result<Vec<_>>>()?;
                self.items += 2 * pairs.len();
                self.dicts.push(pairs);
                Ok(Value::Dict(self.dicts.len() - 1))
            }
            (Global::Size, &[size @ (Value::Tuple(_) | Value::List(_))]) => Ok(size),
            (Global::Device, _) => Ok(Value::Opaque),
            (Global::RebuildTensor, &[storage, offset, size, stride, _, _, ref metadata @ ..]) => {
                self.tensor(storage, offset, size, stride, None, metadata)
            }
            (Global::RebuildTypedTensor, &[storage, offset, size, stride, _, _, dtype, ref metadata @ ..]) => {
                let Value::Global(Global::Dtype(dtype)) = dtype else { return Err(self.broken("a dtype is missing")) };
                self.tensor(storage, offset, size, stride, Some(dtype), metadata)
            }
            (Global::RebuildParameter, &[tensor @ Value::Tensor(_), ..]) => Ok(tensor),
            (Global::RebuildFromType, &[Value::Global(inner), Value::Global(Global::TensorType), arguments, _])
                if outermost =>
            {
                let arguments = self.arguments(arguments)?;
                self.call(inner, &arguments, false)
            }
            _ => Err(self.broken(&format!("{callee:?} is called with other arguments than its own"))),
        }
    }

    fn tensor(
        &mut self,
        storage: Value,
        offset: Value,
        size: Value,
        stride: Value,
        dtype: Option<Dtype>,
        metadata: &[Value],
    ) -> Result<Value> {
        let (Value::Storage(storage), Value::Int(offset)) = (storage, offset) else {
            return Err(self.broken("a tensor has no storage"));
        };
        let storage = self.storages[storage];
        // Views that are conjugated or negated when they are read are marked here.
        let plain = |value: &Value| match value {
            Value::None => true,
            Value::Dict(number) => self.dicts[*number].is_empty(),
            _ => false,
        };
        if !metadata.iter().all(plain) {
            return Err(self.broken("a tensor is marked as conjugated or negated").hint("save it with .contiguous()"));
        }
        let dtype = dtype.or(storage.dtype).ok_or_else(|| self.broken("a tensor has no dtype"))?;
        let (shape, strides) = (self.sizes(size)?, self.sizes(stride)?);
        if shape.len() != strides.len() || shape.len() > MAX_DIMENSIONS {
            return Err(self.broken("a tensor's shape and strides do not fit"));
        }
        let offset = usize::try_from(offset).map_err(|_| self.broken("a tensor has a negative offset"))?;
        self.items += shape.len() + strides.len();
        self.tensors.push(Described { storage, dtype, offset, shape, strides });
        Ok(Value::Tensor(self.tensors.len() - 1))
    }

    fn sizes(&self, value: Value) -> Result<Vec<usize>> {
        let sizes = self.sequence(value)?.iter().take(MAX_DIMENSIONS + 1).map(|value| match value {
            Value::Int(size) => usize::try_from(*size).ok(),
            _ => None,
        });
        sizes.collect::<Option<_>>().ok_or_else(|| self.broken("a shape or a stride is not a natural number"))
    }
}
