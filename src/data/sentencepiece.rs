//! A sentencepiece `tokenizer.model` as the `tokenizer.json` that transformers would make of it.
//!
//! LLaMA's vocabularies are sentencepiece BPE: a piece has a score, and the two neighbours whose joined piece scores
//! highest are merged first. The `tokenizers` crate wants the merges themselves, so they are listed again from the
//! pieces: every way to part a piece into two others, best piece first.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// What a piece is for, by the numbers of sentencepiece_model.proto (and of GGUF's `token_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PieceKind {
    Normal,
    Unknown,
    /// `<s>`, `</s>`: never found in text by sentencepiece, a special token here.
    Control,
    /// Always one token wherever it stands.
    UserDefined,
    Unused,
    /// `<0x00>` to `<0xFF>`.
    Byte,
}

impl PieceKind {
    /// The kind of a number; an unknown number is an ordinary piece, as in sentencepiece.
    pub fn from_number(number: i64) -> Self {
        match number {
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => Self::Normal,
        }
    }

    /// The reverse of [`Self::from_number`].
    pub fn number(self) -> i32 {
        match self {
            Self::Normal => 1,
            Self::Unknown => 2,
            Self::Control => 3,
            Self::UserDefined => 4,
            Self::Unused => 5,
            Self::Byte => 6,
        }
    }
}

/// One piece; its id is its place.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    pub text: String,
    pub score: f32,
    pub kind: PieceKind,
}

/// How pieces are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segmentation {
    Bpe,
    Unigram,
}

/// The vocabulary of a sentencepiece model and what it does to a text.
#[derive(Clone, Debug)]
pub struct SentencePieceModel {
    /// What messages call it.
    pub name: String,
    pub pieces: Vec<Piece>,
    pub segmentation: Segmentation,
    pub byte_fallback: bool,
    /// Whether a text gets a space in front.
    pub add_dummy_prefix: bool,
    pub unk_id: Option<usize>,
    pub bos_id: Option<usize>,
    pub eos_id: Option<usize>,
}

/// Where a text gets the space in front of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefixSpace {
    Never,
    /// Only at the start of the whole text, if there is none: `legacy = false`.
    First,
    /// At the start and after every special token: `legacy = true`, as sentencepiece itself does.
    Always,
}

/// `tokenizer.json` and `tokenizer_config.json`, as far as the files of a folder say what is in them.
#[derive(Clone, Debug)]
pub struct TokenizerFiles {
    pub tokenizer: Value,
    pub config: Value,
}

impl TokenizerFiles {
    /// Reads `tokenizer.model` of a folder with `tokenizer_config.json`, `special_tokens_map.json` and
    /// `added_tokens.json` where they exist. Without the key `legacy` the behaviour is the legacy one.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.model");
        let bytes = std::fs::read(&path).map_err(|source| Error::reading(&path, source))?;
        let object = |name: &str| -> Result<Map<String, Value>> {
            let path = folder.join(name);
            if !path.exists() {
                return Ok(Map::new());
            }
            let bytes = std::fs::read(&path).map_err(|source| Error::reading(&path, source))?;
            serde_json::from_slice(&bytes).map_err(|source| {
                Error::data(format!("{} does not hold a JSON object", path.display())).caused_by(source)
            })
        };
        let model = SentencePieceModel::parse(&path.display().to_string(), &bytes)?;
        let (special, added) = (object("special_tokens_map.json")?, object("added_tokens.json")?);
        Self::new(&model, object("tokenizer_config.json")?, &special, &added)
    }

    /// From a model and the contents of the JSON files beside it (empty where there are none).
    pub fn new(
        model: &SentencePieceModel,
        mut config: Map<String, Value>,
        special: &Map<String, Value>,
        added: &Map<String, Value>,
    ) -> Result<Self> {
        let piece = |id: Option<usize>| id.and_then(|id| model.pieces.get(id)).map(|piece| json!(piece.text));
        for (key, own) in [("unk_token", model.unk_id), ("bos_token", model.bos_id), ("eos_token", model.eos_id)] {
            if !config.contains_key(key)
                && let Some(token) = special.get(key).cloned().or_else(|| piece(own))
            {
                config.insert(key.to_owned(), token);
            }
        }
        if !config.contains_key("pad_token")
            && let Some(token) = special.get("pad_token")
        {
            config.insert("pad_token".to_owned(), token.clone());
        }
        let legacy = config.get("legacy").and_then(Value::as_bool).unwrap_or(true);
        let prefixed = config.get("add_prefix_space").and_then(Value::as_bool).unwrap_or(model.add_dummy_prefix);
        let prefix = match (prefixed, legacy) {
            (false, _) => PrefixSpace::Never,
            (true, true) => PrefixSpace::Always,
            (true, false) => PrefixSpace::First,
        };
        config.entry("legacy").or_insert(json!(legacy));
        config.entry("tokenizer_class").or_insert(json!("LlamaTokenizer"));
        config.entry("add_bos_token").or_insert(json!(true));
        config.entry("add_eos_token").or_insert(json!(false));
        let tokenizer = model.tokenizer_json(prefix, &added_tokens(&config, special, added))?;
        Ok(Self { tokenizer, config: Value::Object(config) })
    }
}

/// A token that is matched whole, with the id it must have where a file names one.
#[derive(Clone, Debug)]
pub struct AddedPiece {
    pub id: Option<usize>,
    /// As tokenizer.json writes it: content, special, normalized, lstrip, rstrip, single_word.
    pub token: Map<String, Value>,
}

impl AddedPiece {
    pub fn new(id: Option<usize>, content: &str, special: bool) -> Self {
        Self::described(id, &json!(content), special)
    }

    /// From a string or an object with `content`, as the configs write tokens.
    fn described(id: Option<usize>, described: &Value, special: bool) -> Self {
        let flag = |key: &str, default: bool| described.get(key).and_then(Value::as_bool).unwrap_or(default);
        let token = json!({
            "content": content(described).unwrap_or_default(),
            "single_word": flag("single_word", false),
            "lstrip": flag("lstrip", false),
            "rstrip": flag("rstrip", false),
            "normalized": flag("normalized", !special),
            "special": flag("special", special),
        });
        let Value::Object(token) = token else { return Self { id, token: Map::new() } };
        Self { id, token }
    }

    fn content(&self) -> &str {
        self.token.get("content").and_then(Value::as_str).unwrap_or_default()
    }
}

fn content(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token.get("content")?.as_str())
}

/// What the JSON files add: by id first, then the named and listed ones.
fn added_tokens(
    config: &Map<String, Value>,
    special: &Map<String, Value>,
    added: &Map<String, Value>,
) -> Vec<AddedPiece> {
    let named: Vec<&Value> =
        ["unk_token", "bos_token", "eos_token", "pad_token", "sep_token", "cls_token", "mask_token"]
            .iter()
            .filter_map(|key| config.get(*key).or_else(|| special.get(*key)))
            .chain(["additional_special_tokens", "extra_special_tokens"].iter().flat_map(|key| {
                let list = config.get(*key).or_else(|| special.get(*key)).and_then(Value::as_array);
                list.into_iter().flatten()
            }))
            .filter(|token| content(token).is_some_and(|text| !text.is_empty()))
            .collect();
    let mut tokens = Vec::new();
    for (id, token) in config.get("added_tokens_decoder").and_then(Value::as_object).into_iter().flatten() {
        if let Ok(id) = id.parse() {
            tokens.push(AddedPiece::described(Some(id), token, false));
        }
    }
    for (text, id) in added {
        let is_named = named.iter().any(|token| content(token) == Some(text));
        if let Some(id) = id.as_u64().and_then(|id| usize::try_from(id).ok())
            && !tokens.iter().any(|token| token.content() == text)
        {
            tokens.push(AddedPiece::new(Some(id), text, is_named));
        }
    }
    tokens.sort_by_key(|token| token.id);
    for token in named {
        if !tokens.iter().any(|known| Some(known.content()) == content(token)) {
            tokens.push(AddedPiece::described(None, token, true));
        }
    }
    tokens
}

impl SentencePieceModel {
    /// `tokenizer.json` with these tokens added to it.
    ///
    /// # Errors
    /// Data: a piece that comes twice, and an added token whose id leaves a gap.
    pub fn tokenizer_json(&self, prefix: PrefixSpace, added: &[AddedPiece]) -> Result<Value> {
        let mut pieces = self.pieces.clone();
        let mut listed: Vec<AddedPiece> = pieces
            .iter()
            .enumerate()
            .filter(|(_, piece)| matches!(piece.kind, PieceKind::Control | PieceKind::UserDefined | PieceKind::Unknown))
            .map(|(id, piece)| {
                let mut own = AddedPiece::new(Some(id), &piece.text, piece.kind != PieceKind::UserDefined);
                own.token.insert("normalized".to_owned(), json!(false));
                own
            })
            .collect();
        let mut next = pieces.len();
        for token in added {
            let text = token.content();
            let known = listed.iter().position(|listed| listed.content() == text);
            let place = pieces.iter().position(|piece| piece.text == text);
            let id = match (token.id, place) {
                (None, Some(place)) => place,
                (Some(id), Some(place)) if id == place => id,
                // A placeholder of the model that the config gives another name.
                (Some(id), None) if id < self.pieces.len() => {
                    listed.retain(|listed| listed.id != Some(id));
                    pieces[id] = Piece { text: text.to_owned(), score: 0.0, kind: PieceKind::Control };
                    id
                }
                (id, None) => match known.and_then(|known| listed[known].id) {
                    Some(known) if id.is_none_or(|id| id == known) => known,
                    None if id.is_none_or(|id| id == next) => {
                        next += 1;
                        next - 1
                    }
                    _ => {
                        let id = id.unwrap_or_default();
                        return Err(Error::data(format!(
                            "{}: the added token {text:?} has the id {id}, but {next} is the next free one",
                            self.name
                        )));
                    }
                },
                (Some(id), Some(place)) => {
                    let message = format!(
                        "{}: the added token {text:?} has the id {id}, and the model's piece {place}",
                        self.name
                    );
                    return Err(Error::data(message));
                }
            };
            // A special piece that is only named again stays as it is: old configs call it `normalized`, which would
            // keep it from being found.
            if token.id.is_none() && known.is_some() {
                continue;
            }
            listed.retain(|listed| listed.content() != text);
            listed.push(AddedPiece { id: Some(id), token: token.token.clone() });
        }
        listed.sort_by_key(|token| token.id);
        let listed = listed.into_iter().map(|AddedPiece { id, mut token }| {
            token.shift_insert(0, "id".to_owned(), json!(id));
            Value::Object(token)
        });
        let (normalizer, pre_tokenizer) = spaces(prefix);
        let mut decoder = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if prefix != PrefixSpace::Never {
            decoder.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": listed.collect::<Vec<_>>(),
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": self.post_processor(),
            "decoder": {"type": "Sequence", "decoders": decoder},
            "model": self.model_json(&pieces)?,
        }))
    }

    fn post_processor(&self) -> Value {
        let Some((id, bos)) = self.bos_id.and_then(|id| Some((id, self.pieces.get(id)?))) else { return Value::Null };
        let (bos, text) = (&bos.text, json!({"Sequence": {"id": "A", "type_id": 0}}));
        let special = json!({"SpecialToken": {"id": bos, "type_id": 0}});
        let second = json!({"Sequence": {"id": "B", "type_id": 1}});
        json!({
            "type": "TemplateProcessing",
            "single": [special, text],
            "pair": [special, text, {"SpecialToken": {"id": bos, "type_id": 1}}, second],
            "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}},
        })
    }

    fn model_json(&self, pieces: &[Piece]) -> Result<Value> {
        let mut ids: HashMap<&str, usize> = HashMap::with_capacity(pieces.len());
        for (id, piece) in pieces.iter().enumerate() {
            if let Some(first) = ids.insert(&piece.text, id) {
                return Err(Error::data(format!("{}: pieces {first} and {id} are both {:?}", self.name, piece.text)));
            }
        }
        let unk = self.unk_id.and_then(|id| pieces.get(id));
        if self.segmentation == Segmentation::Unigram {
            let vocabulary: Vec<Value> = pieces.iter().map(|piece| json!([piece.text, piece.score])).collect();
            return Ok(json!({
                "type": "Unigram",
                "unk_id": unk.and(self.unk_id),
                "vocab": vocabulary,
                "byte_fallback": self.byte_fallback,
            }));
        }
        let vocabulary: Map<String, Value> =
            pieces.iter().enumerate().map(|(id, piece)| (piece.text.clone(), json!(id))).collect();
        Ok(json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": unk.map(|piece| &piece.text),
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": self.byte_fallback,
            "ignore_merges": false,
            "vocab": vocabulary,
            "merges": merges(pieces, &ids),
        }))
    }
}

/// Every way to part an ordinary piece into two pieces; best score first, then lowest id, then shortest left part.
fn merges(pieces: &[Piece], ids: &HashMap<&str, usize>) -> Vec<[String; 2]> {
    let joins = |kind| matches!(kind, PieceKind::Normal | PieceKind::UserDefined);
    let mut order: Vec<&Piece> = pieces.iter().filter(|piece| joins(piece.kind)).collect();
    // Stable, so that equal scores stay in the order of their ids.
    order.sort_by(|a, b| b.score.total_cmp(&a.score));
    // By lengths first: the parts of one very long piece are otherwise a work of the square of its length.
    let lengths: HashSet<usize> = order.iter().map(|piece| piece.text.len()).collect();
    let is_part = |text: &str| ids.get(text).is_some_and(|&id| joins(pieces[id].kind));
    let mut merges = Vec::new();
    for piece in order {
        for (at, _) in piece.text.char_indices().skip(1) {
            if !lengths.contains(&at) || !lengths.contains(&(piece.text.len() - at)) {
                continue;
            }
            let (left, right) = piece.text.split_at(at);
            if is_part(left) && is_part(right) {
                merges.push([left.to_owned(), right.to_owned()]);
            }
        }
    }
    merges
}

/// The normaliser and the pre-tokeniser that turn spaces into `▁`.
fn spaces(prefix: PrefixSpace) -> (Value, Value) {
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    match prefix {
        PrefixSpace::Always => {
            let prepend = json!({"type": "Prepend", "prepend": "▁"});
            (json!({"type": "Sequence", "normalizers": [prepend, replace]}), Value::Null)
        }
        PrefixSpace::First | PrefixSpace::Never => {
            let scheme = if prefix == PrefixSpace::First { "first" } else { "never" };
            let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false});
            (Value::Null, metaspace)
        }
    }
}
