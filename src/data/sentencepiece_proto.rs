//! Reading the protocol buffer of a sentencepiece model: the few fields that tokenising needs.

use super::sentencepiece::{Piece, PieceKind, Segmentation, SentencePieceModel};
use crate::error::{Error, Result};

/// More pieces than any vocabulary has.
const MAX_PIECES: usize = 1 << 21;

impl SentencePieceModel {
    /// Reads the bytes of a `tokenizer.model`; `name` is what messages call it.
    ///
    /// # Errors
    /// Data: bytes that are no such model, and models that change a text in other ways than LLaMA's do.
    pub fn parse(name: &str, bytes: &[u8]) -> Result<Self> {
        let broken = || {
            Error::data(format!("{name} is not a sentencepiece model"))
                .hint("the file may be truncated; where the model has a tokenizer.json, that file alone is enough")
        };
        if bytes.starts_with(b"version https://git-lfs") {
            return Err(
                Error::data(format!("{name} is a Git LFS pointer, not the model")).hint("fetch it with `git lfs pull`")
            );
        }
        let mut pieces = Vec::new();
        let mut trainer = Trainer::default();
        let mut normalizer =
            Normalizer { add_dummy_prefix: true, remove_extra_whitespaces: true, ..Normalizer::default() };
        let mut fields = Fields(bytes);
        while let Some((number, value)) = fields.next().ok_or_else(broken)? {
            match (number, value) {
                (1, Field::Bytes(piece)) if pieces.len() < MAX_PIECES => {
                    pieces.push(parse_piece(piece).ok_or_else(broken)?)
                }
                (2, Field::Bytes(spec)) => trainer.read(spec).ok_or_else(broken)?,
                (3, Field::Bytes(spec)) => normalizer.read(spec).ok_or_else(broken)?,
                (1..=3, _) => return Err(broken()),
                _ => {}
            }
        }
        if pieces.is_empty() {
            return Err(broken());
        }
        let unsupported = |what: &str| {
            Err(Error::data(format!("{name}: {what}, which is not read")).hint(
                "save the tokenizer with transformers (AutoTokenizer, save_pretrained) and use its tokenizer.json",
            ))
        };
        let segmentation = match trainer.model_type.unwrap_or(1) {
            1 => Segmentation::Unigram,
            2 => Segmentation::Bpe,
            other => return unsupported(&format!("its model type is {other}, neither BPE nor unigram")),
        };
        if normalizer.has_charsmap {
            return unsupported("it normalises characters before it tokenises");
        }
        if normalizer.remove_extra_whitespaces {
            return unsupported("it removes whitespace before it tokenises");
        }
        if trainer.suffix {
            return unsupported("it puts the space behind words");
        }
        let id = |number: Option<i64>, default: i64| usize::try_from(number.unwrap_or(default)).ok();
        let id = |number, default| id(number, default).filter(|&id| id < pieces.len());
        let (unk_id, bos_id, eos_id) = (id(trainer.unk_id, 0), id(trainer.bos_id, 1), id(trainer.eos_id, 2));
        let byte_fallback = trainer.byte_fallback || pieces.iter().any(|piece| piece.kind == PieceKind::Byte);
        let add_dummy_prefix = normalizer.add_dummy_prefix;
        let name = name.to_owned();
        Ok(Self { name, segmentation, byte_fallback, add_dummy_prefix, unk_id, bos_id, eos_id, pieces })
    }
}

/// The parts of `TrainerSpec` that a vocabulary carries with it.
#[derive(Default)]
struct Trainer {
    model_type: Option<i64>,
    byte_fallback: bool,
    suffix: bool,
    unk_id: Option<i64>,
    bos_id: Option<i64>,
    eos_id: Option<i64>,
}

impl Trainer {
    fn read(&mut self, bytes: &[u8]) -> Option<()> {
        let mut fields = Fields(bytes);
        while let Some((number, value)) = fields.next()? {
            let Field::Number(value) = value else { continue };
            match number {
                3 => self.model_type = Some(value),
                24 => self.suffix = value != 0,
                35 => self.byte_fallback = value != 0,
                40 => self.unk_id = Some(value),
                41 => self.bos_id = Some(value),
                42 => self.eos_id = Some(value),
                _ => {}
            }
        }
        Some(())
    }
}

#[derive(Default)]
struct Normalizer {
    has_charsmap: bool,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
}

impl Normalizer {
    fn read(&mut self, bytes: &[u8]) -> Option<()> {
        let mut fields = Fields(bytes);
        while let Some((number, value)) = fields.next()? {
            match (number, value) {
                (2, Field::Bytes(map)) => self.has_charsmap = !map.is_empty(),
                (3, Field::Number(value)) => self.add_dummy_prefix = value != 0,
                (4, Field::Number(value)) => self.remove_extra_whitespaces = value != 0,
                _ => {}
            }
        }
        Some(())
    }
}

fn parse_piece(bytes: &[u8]) -> Option<Piece> {
    let mut piece = Piece { text: String::new(), score: 0.0, kind: PieceKind::Normal };
    let mut fields = Fields(bytes);
    while let Some((number, value)) = fields.next()? {
        match (number, value) {
            (1, Field::Bytes(text)) => piece.text = std::str::from_utf8(text).ok()?.to_owned(),
            (2, Field::Fixed(bytes)) => piece.score = f32::from_le_bytes(bytes),
            (3, Field::Number(kind)) => piece.kind = PieceKind::from_number(kind),
            _ => {}
        }
    }
    (!piece.text.is_empty()).then_some(piece)
}

/// The fields of a message, one after another.
struct Fields<'a>(&'a [u8]);

enum Field<'a> {
    Number(i64),
    Fixed([u8; 4]),
    Bytes(&'a [u8]),
    Other,
}

impl<'a> Fields<'a> {
    /// None for broken bytes, `Some(None)` at the end.
    #[expect(clippy::option_option, reason = "the outer one is an error")]
    fn next(&mut self) -> Option<Option<(u64, Field<'a>)>> {
        if self.0.is_empty() {
            return Some(None);
        }
        let key = self.varint()?;
        let value = match key & 7 {
            0 => Field::Number(self.varint()? as i64),
            1 => {
                self.take(8)?;
                Field::Other
            }
            2 => {
                let length = usize::try_from(self.varint()?).ok()?;
                Field::Bytes(self.take(length)?)
            }
            5 => Field::Fixed(self.take(4)?.try_into().ok()?),
            _ => return None,
        };
        Some(Some((key >> 3, value)))
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }
}
