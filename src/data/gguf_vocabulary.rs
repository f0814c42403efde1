//! A tokenizer as the vocabulary of a GGUF file: what llama.cpp's converter writes for it, and the inverse of
//! `gguf_tokenizer`.
//!
//! A byte-level BPE goes as `gpt2`, with its merges. A BPE with byte fallback is sentencepiece's and goes as `llama`,
//! whose merges are told by scores: those of tokenizer.model, or, where there is only tokenizer.json, the rank in which
//! its merges make each piece (0, -1, -2, ... as in LLaMA's own vocabulary).

use std::collections::{BTreeSet, HashMap, HashSet};

use serde_json::{Map, Value};

use super::{
    IMAGE_PLACEHOLDER,
    gguf_tokenizer::{GgufVocabulary, Pre, pre_tokenizers},
    sentencepiece::{PieceKind, SentencePieceModel},
    tokenizer::Tokenizer,
};
use crate::error::{Error, Result};

/// What converters give a token that was added, and a row that is no token.
const ADDED_SCORE: f32 = -1000.0;
const UNUSED_SCORE: f32 = -10000.0;

/// What the vocabulary is made of.
pub struct Parts<'a> {
    /// What messages call the model.
    pub name: &'a str,
    pub tokenizer: &'a Tokenizer,
    /// tokenizer.json
    pub json: &'a Value,
    /// tokenizer.model, where there is one.
    pub model: Option<&'a SentencePieceModel>,
    /// Rows of the embeddings: those behind the last token become unused tokens `[PAD123]`.
    pub rows: usize,
}

/// A vocabulary, and how many merges llama.cpp will make that the tokenizer does not.
#[derive(Clone, Debug)]
pub struct Written {
    pub vocabulary: GgufVocabulary,
    pub foreign_merges: usize,
}

impl Parts<'_> {
    /// # Errors
    /// `Data`: a kind of tokenizer that GGUF has no name for, more tokens than rows, ids without a token among them.
    pub fn vocabulary(&self) -> Result<Written> {
        let model = &self.json["model"];
        if model["type"] != "BPE" || affixed(model) {
            let kind = model["type"].as_str().unwrap_or("none");
            let error = self.refuse(format!("its tokenizer is of the kind {kind}"));
            return Err(error.hint("byte-level BPE and sentencepiece's BPE are written"));
        }
        if model["byte_fallback"] == true { self.sentencepiece() } else { self.byte_level() }
    }

    fn refuse(&self, what: String) -> Error {
        Error::data(format!("{}: {what}: no vocabulary that a GGUF file can hold", self.name))
    }

    fn byte_level(&self) -> Result<Written> {
        let steps = steps(&self.json["pre_tokenizer"]);
        let ignores = self.json["model"]["ignore_merges"] == true;
        let normalizers = listed(&self.json["normalizer"], "normalizers");
        let fits = |pre: Pre| {
            let wanted: Vec<_> = pre_tokenizers(pre).iter().map(step).collect();
            let normalizer = match normalizers.as_slice() {
                [] => true,
                [one] => pre == Pre::Qwen2 && one["type"] == "NFC",
                _ => false,
            };
            steps == wanted && normalizer && ignores == (pre == Pre::Llama3)
        };
        let Some((name, _)) = Pre::WRITTEN.into_iter().find(|&(_, pre)| fits(pre)) else {
            let known = Pre::WRITTEN.map(|(name, _)| name).join(", ");
            let error = self.refuse("tokenizer.json parts texts in a way of its own (pre_tokenizer)".to_owned());
            return Err(error.hint(format!("the ways that llama.cpp calls {known} are")));
        };
        let mut vocabulary = self.begin("gpt2", name)?;
        vocabulary.scores.clear();
        vocabulary.add_space_prefix = Some(false);
        vocabulary.merges = merges(&self.json["model"]).map(|[left, right]| format!("{left} {right}")).collect();
        Ok(Written { vocabulary, foreign_merges: 0 })
    }

    fn sentencepiece(&self) -> Result<Written> {
        let prefix = self.adds_prefix()?;
        let mut vocabulary = self.begin("llama", "default")?;
        vocabulary.add_space_prefix = Some(prefix);
        // As sentencepiece itself does it, unless the tokenizer says otherwise.
        let first = self.json["pre_tokenizer"]["prepend_scheme"] == "first";
        if prefix && !self.tokenizer.legacy.unwrap_or(!first) {
            vocabulary.legacy = Some(false);
        }
        self.score(&mut vocabulary);
        let foreign_merges = self.foreign_merges(&vocabulary)?;
        // A list of merges has no way to tell a space within a piece from the one between two.
        let spaced = merges(&self.json["model"]).any(|pair| pair.iter().any(|part| part.contains(' ')));
        if foreign_merges > 0 && !spaced {
            vocabulary.merges = merges(&self.json["model"]).map(|[left, right]| format!("{left} {right}")).collect();
        }
        Ok(Written { vocabulary, foreign_merges })
    }

    /// Tokens, their types and the named ones.
    fn begin(&self, model: &str, pre: &str) -> Result<GgufVocabulary> {
        let known = self.tokenizer.vocabulary_size();
        if known > self.rows {
            let message = format!("{}: the tokenizer has {known} tokens, the embeddings {} rows", self.name, self.rows);
            return Err(Error::data(message).hint("tokenizer and weights are of different models"));
        }
        let tokenizer = self.tokenizer;
        let (added, listed_rows) = (self.added(), self.listed_rows());
        let (mut tokens, mut token_types, mut scores) = (Vec::new(), Vec::new(), Vec::new());
        let mut texts = HashSet::new();
        let unk = self.json["model"]["unk_token"].as_str();
        for id in 0..self.rows {
            let text = u32::try_from(id).ok().and_then(|id| tokenizer.id_to_token(id));
            let pad = format!("[PAD{id}]");
            let (kind, score) = match (text.as_deref(), added.get(&id)) {
                (None, _) => (PieceKind::Unused, UNUSED_SCORE),
                (Some(text), None) if text == pad => (PieceKind::Unused, UNUSED_SCORE),
                (Some(text), _) if model == "llama" && unk == Some(text) => (PieceKind::Unknown, 0.0),
                (Some(IMAGE_PLACEHOLDER), _) => (PieceKind::Control, ADDED_SCORE),
                // Not in tokenizer.json: the config named it.
                (Some(_), None) if id >= listed_rows => (PieceKind::Control, ADDED_SCORE),
                (Some(text), None) if model == "llama" && is_byte(text) => (PieceKind::Byte, 0.0),
                (Some(_), None) => (PieceKind::Normal, 0.0),
                (Some(_), Some(special)) => {
                    (if *special { PieceKind::Control } else { PieceKind::UserDefined }, ADDED_SCORE)
                }
            };
            let text = text.unwrap_or(pad);
            if !texts.insert(text.clone()) {
                return Err(self.refuse(format!("the token {text:?} is there twice")));
            }
            tokens.push(text);
            token_types.push(kind.number());
            scores.push(score);
        }
        let around = tokenizer.encode("", true)?;
        let is_added = |id: Option<u32>, found: Option<&i32>| id.is_some_and(|id| found == Some(&(id as i32)));
        let prefix: Vec<i32> = tokenizer.prefix().iter().map(|&id| id as i32).collect();
        let suffix = around.get(prefix.len()..).unwrap_or_default();
        let adds_bos = match prefix.as_slice() {
            [] => false,
            [_] if is_added(tokenizer.bos_id, prefix.first()) => true,
            _ => return Err(self.refuse("the tokenizer puts other tokens than BOS before a text".to_owned())),
        };
        let adds_eos = match suffix {
            [] => false,
            [_] if is_added(tokenizer.eos_id, suffix.first()) => true,
            _ => return Err(self.refuse("the tokenizer puts other tokens than EOS behind a text".to_owned())),
        };
        Ok(GgufVocabulary {
            name: self.name.to_owned(),
            model: model.to_owned(),
            pre: Some(pre.to_owned()),
            tokens,
            scores,
            token_types,
            merges: Vec::new(),
            bos_token_id: tokenizer.bos_id,
            eos_token_id: tokenizer.eos_id,
            unknown_token_id: tokenizer.unk_id,
            padding_token_id: tokenizer.pad_id,
            add_bos_token: Some(adds_bos),
            add_eos_token: adds_eos.then_some(true),
            add_space_prefix: None,
            chat_template: None,
            legacy: None,
        })
    }

    /// Ids of added tokens, and whether they are special.
    fn added(&self) -> HashMap<usize, bool> {
        let tokens = self.json["added_tokens"].as_array().into_iter().flatten();
        let id = |token: &Value| usize::try_from(token["id"].as_u64()?).ok();
        tokens.filter_map(|token| Some((id(token)?, token["special"] == true))).collect()
    }

    /// One more than the highest id that tokenizer.json gives an ordinary token.
    fn listed_rows(&self) -> usize {
        let ids = self.json["model"]["vocab"].as_object().into_iter().flat_map(Map::values).filter_map(Value::as_u64);
        ids.max().and_then(|highest| usize::try_from(highest + 1).ok()).unwrap_or(0)
    }

    /// Scores of ordinary pieces: tokenizer.model's, or by the merges.
    fn score(&self, vocabulary: &mut GgufVocabulary) {
        let mut ranks: HashMap<String, usize> = HashMap::new();
        for [left, right] in merges(&self.json["model"]) {
            let next = ranks.len();
            ranks.entry([left, right].concat()).or_insert(next);
        }
        let mut alone = ranks.len();
        for id in 0..vocabulary.tokens.len() {
            let (text, score) = (&vocabulary.tokens[id], &mut vocabulary.scores[id]);
            let piece = self.model.and_then(|model| model.pieces.get(id)).filter(|piece| piece.text == *text);
            if let Some(piece) = piece {
                *score = piece.score;
            } else if vocabulary.token_types[id] == PieceKind::Normal.number() {
                let rank = ranks.get(text).copied().unwrap_or_else(|| {
                    alone += 1;
                    alone - 1
                });
                *score = -(rank as f32);
            }
        }
    }

    /// Merges that the scores lead to and tokenizer.json lacks, or the reverse.
    fn foreign_merges(&self, vocabulary: &GgufVocabulary) -> Result<usize> {
        let made = vocabulary.tokenizer_json()?;
        let pieces = |json: &Value| -> Vec<String> {
            let mut pieces: Vec<String> = merges(json).map(|pair| pair.concat()).collect();
            pieces.dedup();
            pieces
        };
        let set =
            |json: &Value| -> BTreeSet<[String; 2]> { merges(json).map(|pair| pair.map(str::to_owned)).collect() };
        let (ours, theirs) = (set(&made["model"]), set(&self.json["model"]));
        let differing = ours.symmetric_difference(&theirs).count();
        // The same merges in another order of pieces are other merges, too.
        let reordered = differing == 0 && pieces(&made["model"]) != pieces(&self.json["model"]);
        Ok(if reordered { theirs.len() } else { differing })
    }

    /// Whether a text gets a space in front, from the two ways in which tokenizer.json says so.
    fn adds_prefix(&self) -> Result<bool> {
        let normalizers = listed(&self.json["normalizer"], "normalizers");
        let steps = listed(&self.json["pre_tokenizer"], "pretokenizers");
        let replaces = |step: &Value| step["pattern"]["String"] == " " && step["content"] == "▁";
        let prepends = |step: &Value| step["type"] == "Prepend" && step["prepend"] == "▁";
        match (normalizers.as_slice(), steps.as_slice()) {
            ([first, second], []) if prepends(first) && replaces(second) => Ok(true),
            ([only], []) if replaces(only) => Ok(false),
            ([], [only]) if only["type"] == "Metaspace" && only["replacement"] == "▁" && only["split"] == false => {
                Ok(only["prepend_scheme"] != "never")
            }
            _ => Err(self.refuse("tokenizer.json changes or parts texts before it merges".to_owned())),
        }
    }
}

/// `[left, right]` of every merge, in either spelling.
fn merges(model: &Value) -> impl Iterator<Item = [&str; 2]> {
    model["merges"].as_array().into_iter().flatten().filter_map(|merge| match merge {
        Value::String(text) => text.split_once(' ').map(|(left, right)| [left, right]),
        _ => Some([merge[0].as_str()?, merge[1].as_str()?]),
    })
}

fn affixed(model: &Value) -> bool {
    let is_set = |key: &str| model[key].as_str().is_some_and(|text| !text.is_empty());
    is_set("continuing_subword_prefix") || is_set("end_of_word_suffix")
}

/// `<0x0A>`
fn is_byte(token: &str) -> bool {
    let hex = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    hex.is_some_and(|hex| hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok())
}

/// The members of a sequence of steps, a step alone, or nothing.
fn listed(value: &Value, key: &str) -> Vec<Value> {
    match value {
        Value::Null => Vec::new(),
        _ if value["type"] == "Sequence" => value[key].as_array().cloned().unwrap_or_default(),
        one => vec![one.clone()],
    }
}

fn steps(pre_tokenizer: &Value) -> Vec<Vec<String>> {
    listed(pre_tokenizer, "pretokenizers").iter().map(step).collect()
}

/// What matters of a step that parts texts.
fn step(step: &Value) -> Vec<String> {
    let flag = |key: &str, default: bool| step[key].as_bool().unwrap_or(default).to_string();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let kind = text(&step["type"]);
    match kind.as_str() {
        "Split" => {
            vec![kind, text(&step["pattern"]["Regex"]), text(&step["behavior"]), flag("invert", false)]
        }
        "Digits" => vec![kind, flag("individual_digits", false)],
        "ByteLevel" => vec![kind, flag("add_prefix_space", true), flag("use_regex", true)],
        _ => vec![kind, step.to_string()],
    }
}
