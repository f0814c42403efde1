//! The tokenizer of a model folder: `tokenizer.json`, with what `tokenizer_config.json` adds to it.
//!
//! A prompt is encoded in chunks, parted at the pictures, as LLaVA's `tokenizer_image_token` does: each chunk is
//! tokenised from its own start, and only the first keeps the BOS. Labels come from the byte offsets of the tokens.

use std::{fmt, path::Path};

use serde_json::{Value, json};
use tokenizers::AddedToken;

use super::{
    IGNORE_INDEX, IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX,
    template::{Labels, Part},
    version::FileReader,
};
use crate::{
    error::{Error, Result},
    panics::caught,
};

/// The added token `<image>` under a name that no text has.
const HIDDEN: &str = "\u{0}picture\u{0}";

/// A tokenizer and its special tokens.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Put in front of a text: the BOS, or nothing.
    prefix: Vec<u32>,
    /// Put behind a whole text (never behind a prompt): an EOS, or, mostly, nothing.
    suffix: Vec<u32>,
    pub bos_id: Option<u32>,
    pub eos_id: Option<u32>,
    pub pad_id: Option<u32>,
    pub unk_id: Option<u32>,
    /// The id of the added token `<image>`, where the vocabulary has one. Texts never encode to it.
    pub image_id: Option<u32>,
    /// The longest sequence the tokenizer's config names, in tokens; absent where it names none.
    pub model_max_length: Option<usize>,
    /// `legacy` of `tokenizer_config.json`.
    pub legacy: Option<bool>,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocabulary", &self.vocabulary_size())
            .field("bos_id", &self.bos_id)
            .field("eos_id", &self.eos_id)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads `tokenizer.json`, and `tokenizer_config.json` and `special_tokens_map.json` where they exist, of a folder.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        Self::from_files(&folder.display().to_string(), &|name| {
            let path = folder.join(name);
            match std::fs::read(&path) {
                Ok(bytes) => Ok(Some(bytes.into())),
                Err(source) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(source) => Err(Error::reading(&path, source)),
            }
        })
    }

    /// As [`Self::from_folder`], of files that `read` gives by name. `model` is what messages call the model.
    pub fn from_files(model: &str, read: FileReader<'_>) -> Result<Self> {
        let Some(bytes) = read("tokenizer.json")? else {
            return Err(Error::data(format!("{model} holds no tokenizer.json"))
                .hint("a model folder holds its tokenizer as tokenizer.json, or as sentencepiece's tokenizer.model"));
        };
        let parse = |name: &str| -> Result<Value> {
            read(name)?.map_or(Ok(Value::Null), |bytes| parse_json(&bytes, &format!("{model}/{name}")))
        };
        let (config, special) = (parse("tokenizer_config.json")?, parse("special_tokens_map.json")?);
        Self::build(&bytes, &format!("{model}/tokenizer.json"), &config, &special)
    }

    /// From the bytes of `tokenizer.json` and, if there is one, `tokenizer_config.json`.
    pub fn from_bytes(tokenizer: &[u8], config: Option<&[u8]>) -> Result<Self> {
        let config = config.map_or(Ok(Value::Null), |bytes| parse_json(bytes, "tokenizer_config.json"))?;
        Self::build(tokenizer, "tokenizer.json", &config, &Value::Null)
    }

    fn build(bytes: &[u8], file: &str, config: &Value, special: &Value) -> Result<Self> {
        let mut json = parse_json(bytes, file)?;
        if !json.is_object() {
            return Err(Error::data(format!("{file} does not hold a JSON object")));
        }
        let legacy = config.get("legacy").and_then(Value::as_bool);
        let class = config.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default();
        if let (Some(legacy), "LlamaTokenizer" | "LlamaTokenizerFast") = (legacy, class) {
            apply_legacy(&mut json, legacy);
        }
        let image_id = hide_placeholder(&mut json);
        // A length and a padding left over from somebody's training run are not the model's.
        json["truncation"] = Value::Null;
        json["padding"] = Value::Null;
        let mut inner: tokenizers::Tokenizer = serde_json::to_vec(&json)
            .map_err(Into::into)
            .and_then(|bytes| guarded(|| tokenizers::Tokenizer::from_bytes(bytes)))
            .map_err(|source| Error::data(format!("{file} is not a tokenizer that can be read")).caused_by(source))?;
        let named = |key: &str| token_text(config.get(key)).or_else(|| token_text(special.get(key)));
        let keys = ["bos_token", "eos_token", "pad_token", "unk_token"];
        let names = keys.map(named);
        add_missing(&mut inner, config, names.iter().flatten());
        let [bos_id, eos_id, pad_id, unk_id] =
            names.each_ref().map(|name| name.as_deref().and_then(|name| inner.token_to_id(name)));

        let (mut prefix, mut suffix) = added_around(&inner, file)?;
        match (config.get("add_bos_token").and_then(Value::as_bool), bos_id) {
            (Some(true), Some(bos)) => prefix = vec![bos],
            (Some(false), _) => prefix.clear(),
            _ => {}
        }
        match (config.get("add_eos_token").and_then(Value::as_bool), eos_id) {
            (Some(true), Some(eos)) => suffix = vec![eos],
            (Some(false), _) => suffix.clear(),
            _ => {}
        }
        // transformers writes 1e30 for "no limit".
        let model_max_length = config
            .get("model_max_length")
            .and_then(Value::as_f64)
            .filter(|&n| (1.0..1e9).contains(&n))
            .map(|n| n as usize);
        Ok(Self { inner, prefix, suffix, bos_id, eos_id, pad_id, unk_id, image_id, model_max_length, legacy })
    }

    /// Ids in use: one more than the highest.
    pub fn vocabulary_size(&self) -> usize {
        self.inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1)
    }

    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        if token == IMAGE_PLACEHOLDER { self.image_id } else { self.inner.token_to_id(token) }
    }

    pub fn id_to_token(&self, id: u32) -> Option<String> {
        if self.image_id == Some(id) { Some(IMAGE_PLACEHOLDER.to_owned()) } else { self.inner.id_to_token(id) }
    }

    /// What is put in front of a text: `[BOS]`, or nothing where the tokenizer adds none.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// The ids of a text; with the special tokens around it (BOS, and EOS where the tokenizer adds one) if asked.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<i32>> {
        let encoding = self.encoding(text)?;
        let (prefix, suffix) = if special { (&*self.prefix, &*self.suffix) } else { (&[][..], &[][..]) };
        Ok(prefix.iter().chain(encoding.get_ids()).chain(suffix).map(|&id| id as i32).collect())
    }

    /// The ids and labels of a prompt: BOS (ignored), then chunk by chunk, [`IMAGE_TOKEN_INDEX`] between them.
    ///
    /// A token is supervised when it holds any of a text that is to be learned.
    pub fn encode_parts(&self, parts: &[Part]) -> Result<(Vec<i32>, Vec<i32>)> {
        let mut tokens: Vec<i32> = self.prefix.iter().map(|&id| id as i32).collect();
        let mut labels = vec![IGNORE_INDEX; tokens.len()];
        for chunk in parts.split_inclusive(|part| *part == Part::Image) {
            self.encode_chunk(chunk, &mut tokens, &mut labels)?;
            if chunk.last() == Some(&Part::Image) {
                tokens.push(IMAGE_TOKEN_INDEX);
                labels.push(IGNORE_INDEX);
            }
        }
        Ok((tokens, labels))
    }

    /// The ids and labels of a text that is tokenised at once, as transformers does with what a chat template renders:
    /// a picture is the vocabulary's own `<image>` in the midst of it, and becomes [`IMAGE_TOKEN_INDEX`]. With `special`
    /// the BOS is put in front. A vocabulary without `<image>` has the text parted at pictures.
    pub fn encode_whole(&self, parts: &[Part], special: bool) -> Result<(Vec<i32>, Vec<i32>)> {
        let Some(image) = self.image_id.filter(|_| parts.contains(&Part::Image)).map(|id| id as i32) else {
            let front = if special { 0 } else { self.prefix.len() };
            let (mut tokens, mut labels) = self.encode_parts(parts)?;
            return Ok((tokens.split_off(front), labels.split_off(front)));
        };
        let mut tokens: Vec<i32> = self.prefix.iter().filter(|_| special).map(|&id| id as i32).collect();
        let mut labels = vec![IGNORE_INDEX; tokens.len()];
        let joined = parts.iter().map(|part| match part {
            Part::Image => Part::Text { text: HIDDEN.to_owned(), labels: Labels::Ignore },
            Part::Text { text, labels } => {
                Part::Text { text: text.replace(HIDDEN, IMAGE_PLACEHOLDER), labels: *labels }
            }
        });
        self.encode_chunk(&joined.collect::<Vec<_>>(), &mut tokens, &mut labels)?;
        tokens.iter_mut().filter(|token| **token == image).for_each(|token| *token = IMAGE_TOKEN_INDEX);
        Ok((tokens, labels))
    }

    /// The first token of a text, where it is one that was added to the vocabulary, such as an end mark.
    pub fn first_added(&self, text: &str) -> Option<String> {
        let added = self.inner.get_added_tokens_decoder();
        let id = *guarded(|| self.inner.encode(text, false)).ok()?.get_ids().first()?;
        added.get(&id).map(|token| token.content.clone()).filter(|token| text.starts_with(token.as_str()))
    }

    fn encode_chunk(&self, parts: &[Part], tokens: &mut Vec<i32>, labels: &mut Vec<i32>) -> Result<()> {
        let mut text = String::new();
        // Where each span ends, and how many of its tokens are still to be learned.
        let mut spans = Vec::new();
        for part in parts {
            if let Part::Text { text: piece, labels } = part {
                text.push_str(piece);
                let budget = match labels {
                    Labels::Ignore => 0,
                    Labels::Learn => usize::MAX,
                    Labels::LearnFirst(n) => *n,
                };
                spans.push((text.len(), budget));
            }
        }
        if text.is_empty() {
            return Ok(());
        }
        let encoding = self.encoding(&text)?;
        for (&id, &(start, end)) in encoding.get_ids().iter().zip(encoding.get_offsets()) {
            let id = id as i32;
            tokens.push(id);
            let first = spans.partition_point(|&(span_end, _)| span_end <= start).min(spans.len() - 1);
            let last = spans.partition_point(|&(span_end, _)| span_end < end).min(spans.len() - 1).max(first);
            // A token across a border counts for the learned side; one that a count holds, for where it begins.
            let learned = spans[first..=last].iter().any(|&(_, budget)| budget == usize::MAX) || spans[first].1 > 0;
            if spans[first].1 != usize::MAX {
                spans[first].1 = spans[first].1.saturating_sub(1);
            }
            labels.push(if learned { id } else { IGNORE_INDEX });
        }
        Ok(())
    }

    fn encoding(&self, text: &str) -> Result<tokenizers::Encoding> {
        guarded(|| self.inner.encode(text, false)).map_err(|source| {
            let shown: String = text.chars().take(40).collect();
            Error::data(format!("cannot tokenise the text that begins {shown:?}")).caused_by(source)
        })
    }

    /// The text of ids, special tokens and picture positions left out.
    pub fn decode(&self, ids: &[i32]) -> Result<String> {
        let ids: Vec<u32> = ids.iter().filter_map(|&id| u32::try_from(id).ok()).collect();
        guarded(|| self.inner.decode(&ids, true))
            .map_err(|source| Error::data("cannot decode token ids").caused_by(source))
    }
}

/// What the tokenizers crate answers, or an error where it panics: it does on files that are valid JSON and no valid
/// tokenizer, such as a `Precompiled` table that points outside itself.
fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    caught(work).unwrap_or_else(|said| Err(format!("the tokenizer is broken: {said}").into()))
}

fn parse_json(bytes: &[u8], file: &str) -> Result<Value> {
    serde_json::from_slice(bytes).map_err(|source| Error::data(format!("{file} is not valid JSON")).caused_by(source))
}

/// A token is written as a string, or as an object with its `content`.
fn token_text(value: Option<&Value>) -> Option<String> {
    let value = value?;
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

/// `legacy` tells whether text after a special token gets a space of its own, `</s>USER` being `▁USER` or `USER`.
///
/// A Llama tokenizer that says so explicitly is taken at its word: the normaliser `Prepend` works like `legacy = true`,
/// the pre-tokeniser `Metaspace` with the scheme `first` like `false`. Otherwise tokenizer.json stays as it is.
fn apply_legacy(json: &mut Value, legacy: bool) {
    if legacy {
        if json.pointer("/pre_tokenizer/prepend_scheme").and_then(Value::as_str) == Some("first") {
            json["pre_tokenizer"]["prepend_scheme"] = json!("always");
        }
        return;
    }
    let normalizers = json.pointer("/normalizer/normalizers").and_then(Value::as_array);
    let prepends = normalizers.is_some_and(|steps| {
        steps.len() == 2
            && steps[0]["type"] == "Prepend"
            && steps[0]["prepend"] == "▁"
            && steps[1]["type"] == "Replace"
            && steps[1]["content"] == "▁"
    });
    if prepends && json["pre_tokenizer"].is_null() {
        json["normalizer"] = Value::Null;
        json["pre_tokenizer"] =
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
    }
}

/// Renames the added token `<image>`, so that the literal in somebody's text stays text; returns its id.
fn hide_placeholder(json: &mut Value) -> Option<u32> {
    let token = json.get_mut("added_tokens")?.as_array_mut()?.iter_mut().find(|t| t["content"] == IMAGE_PLACEHOLDER)?;
    token["content"] = json!(HIDDEN);
    let id = token["id"].as_u64().and_then(|id| u32::try_from(id).ok());
    if let Some(vocabulary) = json.pointer_mut("/model/vocab").and_then(Value::as_object_mut)
        && let Some(id) = vocabulary.remove(IMAGE_PLACEHOLDER)
    {
        vocabulary.insert(HIDDEN.to_owned(), id);
    }
    id
}

/// Special tokens that only the config knows, added as transformers adds them.
fn add_missing<'a>(inner: &mut tokenizers::Tokenizer, config: &Value, named: impl Iterator<Item = &'a String>) {
    let known: Vec<String> = inner.get_added_tokens_decoder().into_values().map(|token| token.content).collect();
    let mut listed: Vec<(u64, String, bool)> = Vec::new();
    if let Some(tokens) = config.get("added_tokens_decoder").and_then(Value::as_object) {
        for (id, token) in tokens {
            if let (Ok(id), Some(text)) = (id.parse(), token_text(Some(token))) {
                listed.push((id, text, token["special"].as_bool().unwrap_or(true)));
            }
        }
    }
    listed.sort();
    let listed = listed.into_iter().map(|(_, text, special)| (text, special));
    for (text, special) in listed.chain(named.map(|text| (text.clone(), true))) {
        if text != IMAGE_PLACEHOLDER && !known.contains(&text) {
            // A token of the vocabulary keeps its id; the others come after the last one. The same text twice is ignored.
            let _ = guarded(|| inner.add_tokens([AddedToken::from(text, special).normalized(!special)]));
        }
    }
}

/// What the post-processor puts in front of a text and behind it.
fn added_around(inner: &tokenizers::Tokenizer, file: &str) -> Result<(Vec<u32>, Vec<u32>)> {
    let encoding = guarded(|| inner.encode("a", true)).map_err(|source| {
        Error::data(format!("{file}: the tokenizer cannot encode the text \"a\"")).caused_by(source)
    })?;
    let mask = encoding.get_special_tokens_mask();
    let ids = encoding.get_ids();
    let front = mask.iter().take_while(|&&special| special == 1).count();
    let back = mask[front..].iter().rev().take_while(|&&special| special == 1).count();
    Ok((ids[..front].to_vec(), ids[ids.len() - back..].to_vec()))
}
