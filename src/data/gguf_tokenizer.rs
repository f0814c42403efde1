//! The tokenizer of a GGUF file, from its metadata to `tokenizer.json` and `tokenizer_config.json`.
//!
//! `llama` is a sentencepiece vocabulary (tokens and scores), `gpt2` a byte-level BPE (tokens and merges) whose way to
//! part a text before merging has only a name, `tokenizer.ggml.pre`. What the names stand for is llama.cpp's table.

use std::collections::HashSet;

use serde_json::{Map, Value, json};

use super::{
    sentencepiece::{AddedPiece, Piece, PieceKind, PrefixSpace, Segmentation, SentencePieceModel},
    tokenizer::Tokenizer,
};
use crate::error::{Error, Result, nearest};

const GPT_2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The values `tokenizer.ggml.*` of a GGUF file, and its chat template.
#[derive(Clone, Debug, Default)]
pub struct GgufVocabulary {
    /// What messages call the file.
    pub name: String,
    /// `tokenizer.ggml.model`: `llama` or `gpt2`.
    pub model: String,
    /// `tokenizer.ggml.pre`.
    pub pre: Option<String>,
    pub tokens: Vec<String>,
    /// One for each token, or none at all (`gpt2`).
    pub scores: Vec<f32>,
    /// One for each token, or none at all; the numbers of [`PieceKind::from_number`].
    pub token_types: Vec<i32>,
    /// `left right`, best first.
    pub merges: Vec<String>,
    pub bos_token_id: Option<u32>,
    pub eos_token_id: Option<u32>,
    pub unknown_token_id: Option<u32>,
    pub padding_token_id: Option<u32>,
    pub add_bos_token: Option<bool>,
    pub add_eos_token: Option<bool>,
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
    /// Whether the space in front (`llama`) comes again after every special token, as llama.cpp has it: the key
    /// [`LEGACY_KEY`], which only files written here may have.
    pub legacy: Option<bool>,
}

/// `legacy` of tokenizer_config.json in files written here, where it is false. llama.cpp passes over such keys.
pub const LEGACY_KEY: &str = "wgpu_llava.tokenizer.legacy";

/// How a byte-level vocabulary parts a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pre {
    /// llama.cpp's fallback.
    Default,
    Gpt2,
    /// Digits one by one, then as GPT-2.
    SingleDigits,
    /// As [`Self::Llama3`], and words that are tokens are merged like any other.
    Dbrx,
    /// Words that are tokens are left whole.
    Llama3,
    Qwen2,
}

impl Pre {
    /// The first name of [`PRE_TOKENIZERS`] for each, which is what files get.
    pub(super) const WRITTEN: [(&'static str, Self); 6] = [
        ("gpt-2", Self::Gpt2),
        ("smollm", Self::SingleDigits),
        ("llama-bpe", Self::Llama3),
        ("dbrx", Self::Dbrx),
        ("qwen2", Self::Qwen2),
        ("default", Self::Default),
    ];
}

const PRE_TOKENIZERS: [(&str, Pre); 27] = [
    ("default", Pre::Default),
    ("gpt-2", Pre::Gpt2),
    ("gpt2", Pre::Gpt2),
    ("mpt", Pre::Gpt2),
    ("olmo", Pre::Gpt2),
    ("phi-2", Pre::Gpt2),
    ("roberta-bpe", Pre::Gpt2),
    ("smollm", Pre::SingleDigits),
    ("starcoder", Pre::SingleDigits),
    ("refact", Pre::SingleDigits),
    ("command-r", Pre::SingleDigits),
    ("codeshell", Pre::SingleDigits),
    ("exaone", Pre::SingleDigits),
    ("minerva-7b", Pre::SingleDigits),
    ("llama-bpe", Pre::Llama3),
    ("llama3", Pre::Llama3),
    ("llama-v3", Pre::Llama3),
    ("falcon3", Pre::Llama3),
    ("falcon-h1", Pre::Llama3),
    ("pixtral", Pre::Llama3),
    ("lfm2", Pre::Llama3),
    ("dbrx", Pre::Dbrx),
    ("smaug-bpe", Pre::Dbrx),
    ("qwen2", Pre::Qwen2),
    ("deepseek-r1-qwen", Pre::Qwen2),
    ("megrez", Pre::Qwen2),
    ("stablelm2", Pre::Qwen2),
];

impl GgufVocabulary {
    /// The tokenizer itself.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let bytes = |value: Value| {
            serde_json::to_vec(&value).map_err(|source| {
                Error::data(format!("{}: its tokenizer cannot be written", self.name)).caused_by(source)
            })
        };
        let config = bytes(self.tokenizer_config()?)?;
        Tokenizer::from_bytes(&bytes(self.tokenizer_json()?)?, Some(&config))
    }

    /// What `tokenizer.json` of the same model would hold.
    ///
    /// # Errors
    /// Data: an unknown model or pre-tokenizer, lists whose lengths do not fit, ids outside the vocabulary.
    pub fn tokenizer_json(&self) -> Result<Value> {
        self.check()?;
        match self.model.as_str() {
            "llama" => self.sentencepiece_json(),
            _ => self.byte_level_json(),
        }
    }

    /// What `tokenizer_config.json` of the same model would hold.
    pub fn tokenizer_config(&self) -> Result<Value> {
        self.check()?;
        let mut config = Map::new();
        let class = if self.model == "llama" { "LlamaTokenizer" } else { "PreTrainedTokenizerFast" };
        config.insert("tokenizer_class".to_owned(), json!(class));
        if self.model == "llama" {
            // llama.cpp puts the space after every special token.
            config.insert("legacy".to_owned(), json!(self.legacy.unwrap_or(true)));
        }
        for (key, id) in self.special_ids() {
            if let Some(token) = id.and_then(|id| self.tokens.get(id as usize)) {
                config.insert(key.to_owned(), json!(token));
            }
        }
        config.insert("add_bos_token".to_owned(), json!(self.adds_bos()?));
        if let Some(adds) = self.add_eos_token {
            config.insert("add_eos_token".to_owned(), json!(adds));
        }
        if let (Some(adds), "gpt2") = (self.add_space_prefix, self.model.as_str()) {
            config.insert("add_prefix_space".to_owned(), json!(adds));
        }
        if let Some(template) = &self.chat_template {
            config.insert("chat_template".to_owned(), json!(template));
        }
        Ok(Value::Object(config))
    }

    /// Named special tokens; a `llama` vocabulary that names none has them where LLaMA has.
    fn special_ids(&self) -> [(&'static str, Option<u32>); 4] {
        let llama = |id| Some(id).filter(|_| self.model == "llama");
        [
            ("bos_token", self.bos_token_id.or(llama(1))),
            ("eos_token", self.eos_token_id.or(llama(2))),
            ("unk_token", self.unknown_token_id.or(llama(0))),
            ("pad_token", self.padding_token_id),
        ]
    }

    fn adds_bos(&self) -> Result<bool> {
        Ok(match self.add_bos_token {
            Some(adds) => adds,
            None => self.model == "llama" || self.pre()? == Pre::Llama3,
        })
    }

    fn check(&self) -> Result<()> {
        let refuse = |what: String| Err(Error::data(format!("{}: {what}", self.name)));
        if !["llama", "gpt2"].contains(&self.model.as_str()) {
            return refuse(format!("tokenizer.ggml.model is {:?}, and `llama` and `gpt2` are read", self.model));
        }
        let count = self.tokens.len();
        let needs_scores = self.model == "llama";
        for (key, len, needed) in
            [("scores", self.scores.len(), needs_scores), ("token_type", self.token_types.len(), false)]
        {
            if len != count && (needed || len > 0) {
                return refuse(format!("tokenizer.ggml.{key} has {len} entries for {count} tokens"));
            }
        }
        for (key, id) in self.special_ids() {
            if let Some(id) = id.filter(|&id| id as usize >= count) {
                return refuse(format!("{key} is {id}, and there are {count} tokens"));
            }
        }
        let mut seen = HashSet::with_capacity(count);
        match self.tokens.iter().find(|token| !seen.insert(token.as_str())) {
            Some(twice) => refuse(format!("the token {twice:?} is there twice")),
            None => Ok(()),
        }
    }

    fn kind(&self, id: usize) -> PieceKind {
        self.token_types.get(id).map_or(PieceKind::Normal, |&kind| PieceKind::from_number(kind.into()))
    }

    fn sentencepiece_json(&self) -> Result<Value> {
        let pieces: Vec<Piece> = self
            .tokens
            .iter()
            .zip(&self.scores)
            .enumerate()
            .map(|(id, (text, &score))| Piece { text: text.clone(), score, kind: self.kind(id) })
            .collect();
        let [(_, bos), (_, eos), (_, unk), _] = self.special_ids();
        let id = |id: Option<u32>| id.map(|id| id as usize);
        let adds_prefix = self.add_space_prefix.unwrap_or(true);
        let model = SentencePieceModel {
            name: self.name.clone(),
            segmentation: Segmentation::Bpe,
            byte_fallback: true,
            add_dummy_prefix: adds_prefix,
            unk_id: id(unk),
            bos_id: id(bos).filter(|_| self.add_bos_token.unwrap_or(true)),
            eos_id: id(eos),
            pieces,
        };
        let prefix = match (adds_prefix, self.legacy) {
            (false, _) => PrefixSpace::Never,
            (true, Some(false)) => PrefixSpace::First,
            (true, _) => PrefixSpace::Always,
        };
        let mut json = model.tokenizer_json(prefix, &[])?;
        // Some files list the merges as well, which say more than the scores.
        if !self.merges.is_empty()
            && let Some(vocabulary) = json["model"]["vocab"].as_object()
            && let Ok(merges) = self.parted_merges(vocabulary)
        {
            json["model"]["merges"] = json!(merges);
        }
        Ok(json)
    }

    /// Left and right part of every merge, all of them tokens and the whole, too.
    fn parted_merges(&self, vocabulary: &Map<String, Value>) -> Result<Vec<[&str; 2]>> {
        let mut merges = Vec::with_capacity(self.merges.len());
        for merge in &self.merges {
            // The space that parts the two is never their first character.
            let space = merge.char_indices().skip(1).find(|&(_, c)| c == ' ');
            let parts = space.map(|(at, _)| [&merge[..at], &merge[at + 1..]]).filter(|[left, right]| {
                let joined = [*left, *right].concat();
                [left, right, joined.as_str()].iter().all(|part| vocabulary.contains_key(*part))
            });
            merges.push(parts.ok_or_else(|| {
                Error::data(format!("{}: the merge {merge:?} does not join two tokens to a third", self.name))
            })?);
        }
        Ok(merges)
    }

    fn pre(&self) -> Result<Pre> {
        let name = self.pre.as_deref().unwrap_or("default");
        let known = || PRE_TOKENIZERS.iter().map(|(name, _)| *name);
        PRE_TOKENIZERS.iter().find(|(known, _)| *known == name).map(|(_, pre)| *pre).ok_or_else(|| {
            let error = Error::data(format!("{}: unknown pre-tokenizer {name:?} (tokenizer.ggml.pre)", self.name));
            let error = match nearest(name, known()) {
                Some(near) => error.hint(format!("the nearest known one is `{near}`")),
                None => error,
            };
            error.hint("use the tokenizer.json of the original model")
        })
    }

    fn byte_level_json(&self) -> Result<Value> {
        let pre = self.pre()?;
        let alphabet: HashSet<char> = (0..=255).map(byte_char).collect();
        let spelled = |token: &str| token.chars().all(|c| alphabet.contains(&c));
        let mut vocabulary = Map::new();
        let mut added = Vec::new();
        for (id, token) in self.tokens.iter().enumerate() {
            let kind = self.kind(id);
            let is_added = matches!(kind, PieceKind::Control | PieceKind::UserDefined | PieceKind::Unknown);
            let text = match is_added || spelled(token) {
                true => token.clone(),
                false => token.bytes().map(byte_char).collect(),
            };
            if is_added {
                let mut piece = AddedPiece::new(Some(id), token, kind != PieceKind::UserDefined).token;
                piece.shift_insert(0, "id".to_owned(), json!(id));
                piece.insert("normalized".to_owned(), json!(false));
                added.push(Value::Object(piece));
            }
            if vocabulary.insert(text, json!(id)).is_some() {
                return Err(Error::data(format!("{}: the token {token:?} is there twice", self.name)));
            }
        }
        let merges = self.parted_merges(&vocabulary)?;
        let model = json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": pre == Pre::Llama3,
            "vocab": vocabulary,
            "merges": merges,
        });
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": if pre == Pre::Qwen2 { json!({"type": "NFC"}) } else { Value::Null },
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers(pre)},
            "post_processor": self.post_processor()?,
            "decoder": byte_level(true),
            "model": model,
        }))
    }

    fn post_processor(&self) -> Result<Value> {
        let [(_, bos), ..] = self.special_ids();
        let Some((id, bos)) = bos.and_then(|id| Some((id, self.tokens.get(id as usize)?))) else {
            return Ok(Value::Null);
        };
        if !self.adds_bos()? {
            return Ok(Value::Null);
        }
        let special = |type_id: u8| json!({"SpecialToken": {"id": bos, "type_id": type_id}});
        let text = |id: &str, type_id: u8| json!({"Sequence": {"id": id, "type_id": type_id}});
        Ok(json!({
            "type": "TemplateProcessing",
            "single": [special(0), text("A", 0)],
            "pair": [special(0), text("A", 0), special(1), text("B", 1)],
            "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}},
        }))
    }
}

/// The steps of tokenizer.json that part a text.
pub(super) fn pre_tokenizers(pre: Pre) -> Vec<Value> {
    let split =
        |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    match pre {
        Pre::Gpt2 => vec![byte_level(true)],
        Pre::SingleDigits => vec![json!({"type": "Digits", "individual_digits": true}), byte_level(true)],
        Pre::Llama3 | Pre::Dbrx => vec![split(LLAMA_3), byte_level(false)],
        Pre::Qwen2 => vec![split(QWEN_2), byte_level(false)],
        Pre::Default => {
            let steps = [r"[\p{P}\$\+<=>\^~\|]+", GPT_2, r"\p{N}+", "[0-9][0-9][0-9]"];
            steps.into_iter().map(split).chain([byte_level(false)]).collect()
        }
    }
}

/// The step that writes bytes as characters; with `use_regex` it parts a text as GPT-2 does first.
fn byte_level(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

/// The printable character that stands for a byte in byte-level vocabularies: GPT-2's `bytes_to_unicode`.
fn byte_char(byte: u8) -> char {
    let moved = match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => return char::from(byte),
        0..=0x20 => u32::from(byte),
        0x7f..=0xa0 => u32::from(byte) - 0x7f + 0x21,
        0xad => 0x43,
    };
    char::from_u32(0x100 + moved).unwrap_or(char::REPLACEMENT_CHARACTER)
}
