//! Records as LLaVA keeps them: a JSON array, or JSON Lines, of conversations with pictures.
//!
//! Three shapes are read: `conversations` (`from`, `value`), `messages` (`role`, `content`) and `{"text": ...}`.
//! Every error names the file, the record and the key.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use serde::de::{DeserializeSeed, Deserializer as _, IgnoredAny, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::{IMAGE_PLACEHOLDER, image::ImageSource};
use crate::error::{Error, Result};

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Human,
    Assistant,
}

/// One turn, with its pictures in front: `images` placeholders, each followed by a newline, then `text`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    pub role: Role,
    /// What is said, without placeholders.
    pub text: String,
    pub images: usize,
}

impl Turn {
    pub fn human(text: impl Into<String>, images: usize) -> Self {
        Self { role: Role::Human, text: text.into(), images }
    }
    pub fn assistant(text: impl Into<String>) -> Self {
        Self { role: Role::Assistant, text: text.into(), images: 0 }
    }
}

/// What a record holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Human and assistant by turns, the human first, the assistant last.
    Conversation(Vec<Turn>),
    /// Plain text, supervised from its second token on.
    Text(String),
}

/// What was put right while a record was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Repairs {
    /// Turns before the first human one, and a last human turn without an answer.
    pub dropped_turns: usize,
    /// Placeholders that stood in one turn for one picture, and were taken as one.
    pub merged_placeholders: usize,
    /// Pictures that no turn has a place for, and that are therefore not used.
    pub unplaced_images: usize,
    /// Literal `<image>` in a record without pictures: ordinary text.
    pub literal_placeholders: usize,
}

/// One record of a data set.
#[derive(Clone, Debug)]
pub struct Record {
    /// As the file has it; the record's number (from 1) where the file has none.
    pub id: String,
    /// A system text of its own (a leading `system` message), instead of the template's.
    pub system: Option<String>,
    pub content: Content,
    /// One for each placeholder, in order.
    pub images: Vec<ImageSource>,
    pub repairs: Repairs,
}

impl Record {
    /// Words over all turns, as whitespace parts them; negative without pictures (for grouping by modality and length).
    pub fn modality_length(&self) -> i64 {
        let words = |text: &str| text.split_whitespace().count() as i64;
        let length = match &self.content {
            Content::Conversation(turns) => turns.iter().map(|turn| words(&turn.text) + turn.images as i64).sum(),
            Content::Text(text) => words(text),
        };
        if self.images.is_empty() { -length } else { length }
    }
}

/// Reads the first `limit` records of a file; relative picture paths are joined to `image_folder`.
///
/// Errors (Data): the file cannot be read, is not JSON, holds no record, or a record breaks a rule.
pub fn read_records(path: &Path, image_folder: &Path, limit: Option<usize>) -> Result<Vec<Record>> {
    let bytes = std::fs::read(path).map_err(|source| Error::reading(path, source))?;
    parse_records(&bytes, &path.display().to_string(), image_folder, limit)
}

/// As [`read_records`], from memory; `file` is the name that errors give.
pub fn parse_records(bytes: &[u8], file: &str, image_folder: &Path, limit: Option<usize>) -> Result<Vec<Record>> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let mut reader =
        Reader { file, image_folder, limit: limit.unwrap_or(usize::MAX), records: Vec::new(), error: None };
    let parsed = if bytes.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'[') {
        let mut json = serde_json::Deserializer::from_slice(bytes);
        json.deserialize_seq(&mut reader).and_then(|()| json.end())
    } else {
        reader.lines(bytes)
    };
    if let Some(error) = reader.error {
        return Err(error);
    }
    if let Err(source) = parsed {
        let place = format!("{file}, record {}", reader.records.len() + 1);
        return Err(Error::data(format!("{place}: not valid JSON: {source}"))
            .hint("a data file is one JSON array of records, or JSON Lines with one record a line"));
    }
    if reader.records.is_empty() {
        return Err(Error::data(format!("{file}: the data set is empty")).hint("it needs at least one record"));
    }
    Ok(reader.records)
}

/// Takes records one at a time, so that a large file never stands in memory as a tree of JSON values.
struct Reader<'a> {
    file: &'a str,
    image_folder: &'a Path,
    limit: usize,
    records: Vec<Record>,
    error: Option<Error>,
}

impl Reader<'_> {
    /// Adds a record; false when reading should stop.
    fn take(&mut self, value: Value) -> bool {
        match Place::new(self.file, self.records.len() + 1, &value).record(value, self.image_folder) {
            Ok(record) => self.records.push(record),
            Err(error) => self.error = Some(error),
        }
        self.error.is_none()
    }

    /// JSON values one after another; line ends between them are usual, not needed.
    fn lines(&mut self, bytes: &[u8]) -> serde_json::Result<()> {
        for value in serde_json::Deserializer::from_slice(bytes).into_iter::<Value>() {
            if self.records.len() >= self.limit || !self.take(value?) {
                break;
            }
        }
        Ok(())
    }
}

impl<'de> Visitor<'de> for &mut Reader<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of records")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<(), A::Error> {
        while self.records.len() < self.limit {
            let Some(value) = sequence.next_element_seed(ValueSeed)? else { return Ok(()) };
            if !self.take(value) {
                return Err(serde::de::Error::custom("stopped at a bad record"));
            }
        }
        while sequence.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }
}

struct ValueSeed;

impl<'de> DeserializeSeed<'de> for ValueSeed {
    type Value = Value;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        serde::Deserialize::deserialize(deserializer)
    }
}

/// Where a record stands, for error messages.
struct Place {
    name: String,
    id: String,
}

/// A turn as the file has it.
struct RawTurn {
    speaker: Speaker,
    text: String,
}

#[derive(Clone, Copy, PartialEq)]
enum Speaker {
    Human,
    Assistant,
    System,
}

impl Place {
    fn new(file: &str, number: usize, value: &Value) -> Self {
        let id = match value.get("id") {
            Some(Value::String(id)) => Some(id.clone()),
            Some(Value::Number(id)) => Some(id.to_string()),
            _ => None,
        };
        let name = match &id {
            Some(id) => format!("{file}, record {number} (id {id:?})"),
            None => format!("{file}, record {number}"),
        };
        Self { name, id: id.unwrap_or_else(|| number.to_string()) }
    }

    fn error(&self, what: impl fmt::Display) -> Error {
        Error::data(format!("{}: {what}", self.name))
    }

    fn record(self, value: Value, image_folder: &Path) -> Result<Record> {
        let Value::Object(mut record) = value else {
            return Err(self
                .error("a record is a JSON object")
                .hint("a record holds `conversations` and maybe `image`"));
        };
        let mut images = self.images(&mut record, image_folder)?;
        let mut repairs = Repairs::default();
        let mut system = None;
        let content = if let Some(turns) = record.remove("conversations") {
            let raw = self.conversations(turns)?;
            Content::Conversation(self.turns(raw, &mut images, "conversations", &mut repairs)?)
        } else if let Some(messages) = record.remove("messages") {
            let mut raw = self.messages(messages, &mut images, image_folder)?;
            if raw.first().is_some_and(|turn| turn.speaker == Speaker::System) {
                system = Some(raw.remove(0).text);
            }
            Content::Conversation(self.turns(raw, &mut images, "messages", &mut repairs)?)
        } else {
            match record.remove("text") {
                Some(Value::String(text)) if images.is_empty() => Content::Text(text),
                Some(Value::String(_)) => return Err(self.error("`image`: a `text` record has no place for a picture")),
                Some(_) => return Err(self.error("`text` is not a string")),
                None => {
                    return Err(self
                        .error("`conversations` is missing")
                        .hint("a record holds `conversations` (from, value), `messages` (role, content) or `text`"));
                }
            }
        };
        Ok(Record { id: self.id, system, content, images, repairs })
    }

    /// `image` or `images`: a path, a list of them, or objects with a `path`; an empty string or null is no picture.
    fn images(&self, record: &mut Map<String, Value>, folder: &Path) -> Result<Vec<ImageSource>> {
        let mut images = Vec::new();
        for key in ["image", "images"] {
            match record.remove(key) {
                None => {}
                Some(Value::Array(items)) => {
                    for item in items {
                        images.extend(self.image(item, key, folder)?);
                    }
                }
                Some(item) => images.extend(self.image(item, key, folder)?),
            }
        }
        Ok(images)
    }

    fn image(&self, value: Value, key: &str, folder: &Path) -> Result<Option<ImageSource>> {
        let path = match value {
            Value::Null => return Ok(None),
            Value::String(path) => path,
            Value::Object(mut object) => match object.remove("path") {
                Some(Value::String(path)) => path,
                _ => return Err(self.error(format_args!("`{key}`: a picture given as an object needs a `path`"))),
            },
            _ => return Err(self.error(format_args!("`{key}` is not a path, nor a list of paths"))),
        };
        if path.is_empty() {
            return Ok(None);
        }
        if path.starts_with("http://") || path.starts_with("https://") || path.starts_with("data:") {
            let shown: String = path.chars().take(60).collect();
            return Err(self
                .error(format_args!("`{key}`: {shown:?} is not a file"))
                .hint("pictures are read from files: download them, and give their paths"));
        }
        // `join` keeps an absolute path as it is.
        Ok(Some(ImageSource::File(folder.join(PathBuf::from(path)))))
    }

    fn conversations(&self, value: Value) -> Result<Vec<RawTurn>> {
        let Value::Array(turns) = value else { return Err(self.error("`conversations` is not a list of turns")) };
        let mut raw = Vec::with_capacity(turns.len());
        for (index, mut turn) in turns.into_iter().enumerate() {
            let key = format!("`conversations[{index}]");
            let speaker = self.speaker(turn.get("from"), &format!("{key}.from`"))?;
            let Some(Value::String(text)) = turn.get_mut("value").map(Value::take) else {
                return Err(self.error(format_args!("{key}.value` is missing or not a string")));
            };
            raw.push(RawTurn { speaker, text });
        }
        Ok(raw)
    }

    /// Chat messages; a part `{"type": "image"}` becomes a placeholder, and its path, if it has one, a picture.
    fn messages(&self, value: Value, images: &mut Vec<ImageSource>, folder: &Path) -> Result<Vec<RawTurn>> {
        let Value::Array(messages) = value else { return Err(self.error("`messages` is not a list of messages")) };
        let mut raw = Vec::with_capacity(messages.len());
        for (index, mut message) in messages.into_iter().enumerate() {
            let key = format!("messages[{index}].content");
            let speaker = self.speaker(message.get("role"), &format!("`messages[{index}].role`"))?;
            let text = match message.get_mut("content").map(Value::take) {
                Some(Value::String(text)) => text,
                Some(Value::Array(parts)) => {
                    let mut text = String::new();
                    for part in parts {
                        text += &self.part(part, &key, images, folder)?;
                    }
                    text
                }
                _ => return Err(self.error(format_args!("`{key}` is missing, or neither a string nor a list"))),
            };
            raw.push(RawTurn { speaker, text });
        }
        Ok(raw)
    }

    fn part(&self, mut part: Value, key: &str, images: &mut Vec<ImageSource>, folder: &Path) -> Result<String> {
        match part.get("type").and_then(Value::as_str) {
            Some("text") => match part.get_mut("text").map(Value::take) {
                Some(Value::String(text)) => Ok(text),
                _ => Err(self.error(format_args!("`{key}`: a text part has no `text`"))),
            },
            Some("image" | "image_url") => {
                for source in ["path", "image", "url", "image_url"] {
                    if let Some(value) = part.get_mut(source).map(Value::take) {
                        images.extend(self.image(value, key, folder)?);
                    }
                }
                Ok(IMAGE_PLACEHOLDER.to_owned())
            }
            _ => Err(self.error(format_args!("`{key}`: a part has the `type` \"text\" or \"image\""))),
        }
    }

    fn speaker(&self, value: Option<&Value>, key: &str) -> Result<Speaker> {
        match value.and_then(Value::as_str) {
            Some("human" | "user") => Ok(Speaker::Human),
            Some("gpt" | "assistant" | "model") => Ok(Speaker::Assistant),
            Some("system") => Ok(Speaker::System),
            Some(other) => Err(self
                .error(format_args!("{key}: unknown speaker {other:?}"))
                .hint("speakers are `human` and `gpt`, or `user` and `assistant`")),
            None => Err(self.error(format_args!("{key} is missing or not a string"))),
        }
    }

    /// The rules for turns: human first, by turns, an answer last; pictures in front of the turn that shows them.
    fn turns(
        &self,
        mut raw: Vec<RawTurn>,
        images: &mut Vec<ImageSource>,
        key: &str,
        repairs: &mut Repairs,
    ) -> Result<Vec<Turn>> {
        let Some(first) = raw.iter().position(|turn| turn.speaker == Speaker::Human) else {
            return Err(self.error(format_args!("`{key}` has no human turn")).hint("remove the record, or mend it"));
        };
        raw.drain(..first);
        repairs.dropped_turns += first;
        for (index, turn) in raw.iter().enumerate() {
            let expected = if index % 2 == 0 { Speaker::Human } else { Speaker::Assistant };
            if turn.speaker != expected {
                return Err(self
                    .error(format_args!("`{key}[{}]`: human and assistant do not take turns", first + index))
                    .hint("join the turns of one speaker, or remove the record"));
            }
        }
        if raw.len() % 2 == 1 {
            raw.pop();
            repairs.dropped_turns += 1;
        }
        if raw.is_empty() {
            return Err(self.error(format_args!("`{key}`: the human turn has no answer")).hint("remove the record"));
        }
        self.place_images(raw, images, repairs)
    }

    /// Placeholders move to the front of their turn. A record with one picture keeps one placeholder a turn, as LLaVA
    /// does; with several pictures each placeholder stands for one of them.
    fn place_images(
        &self,
        raw: Vec<RawTurn>,
        images: &mut Vec<ImageSource>,
        repairs: &mut Repairs,
    ) -> Result<Vec<Turn>> {
        let mut turns = Vec::with_capacity(raw.len());
        for RawTurn { speaker, text } in raw {
            let role = if speaker == Speaker::Human { Role::Human } else { Role::Assistant };
            let found = text.matches(IMAGE_PLACEHOLDER).count();
            if images.is_empty() || found == 0 {
                repairs.literal_placeholders += found;
                turns.push(Turn { role, text, images: 0 });
                continue;
            }
            let kept = if images.len() == 1 { 1 } else { found };
            repairs.merged_placeholders += found - kept;
            let text = text.replace(IMAGE_PLACEHOLDER, "").trim().to_owned();
            turns.push(Turn { role, text, images: kept });
        }
        let placed: usize = turns.iter().map(|turn| turn.images).sum();
        if placed > images.len() {
            return Err(self
                .error(format_args!("{placed} `<image>` in the text, but {} in `image`", images.len()))
                .hint("give a picture for each `<image>`, or remove the placeholders that have none"));
        }
        repairs.unplaced_images += images.len() - placed;
        images.truncate(placed);
        Ok(turns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Vec<Record>> {
        parse_records(json.as_bytes(), "data.json", Path::new("/pictures"), None)
    }

    fn turns(record: &Record) -> &[Turn] {
        match &record.content {
            Content::Conversation(turns) => turns,
            Content::Text(_) => panic!("not a conversation"),
        }
    }

    fn message(json: &str) -> String {
        let error = parse(json).unwrap_err();
        assert_eq!(error.kind, crate::error::ErrorKind::Data);
        error.message
    }

    const TALK: &str = r#"[{"from":"human","value":"What?\n<image>"},{"from":"gpt","value":"A bus."}]"#;

    #[test]
    fn arrays_and_lines_are_told_apart() {
        let one = format!(r#"{{"id":"a","image":"x/1.png","conversations":{TALK}}}"#);
        let two = format!(r#"{{"id":7,"image":"/abs/2.png","conversations":{TALK}}}"#);
        for file in [format!(" [{one},\n{two}]\n"), format!("{one}\n\n{two}\n"), format!("\u{feff}[{one},{two}]")] {
            let records = parse(&file).unwrap();
            assert_eq!(records.len(), 2);
            assert_eq!((records[0].id.as_str(), records[1].id.as_str()), ("a", "7"));
            assert_eq!(records[0].images, [ImageSource::File("/pictures/x/1.png".into())]);
            assert_eq!(records[1].images, [ImageSource::File("/abs/2.png".into())]);
            assert_eq!(turns(&records[0]), [Turn::human("What?", 1), Turn::assistant("A bus.")]);
        }
        let records = parse_records(format!("[{one},{two}]").as_bytes(), "f", Path::new(""), Some(1)).unwrap();
        assert_eq!(records.len(), 1);
    }

    #[test]
    fn leading_and_trailing_turns_are_dropped() {
        let json = r#"[{"image":"","conversations":[{"from":"gpt","value":"Welcome"},{"from":"human","value":"Hi <image>"},
            {"from":"gpt","value":"Hello"},{"from":"human","value":"Bye"}]}]"#;
        let record = &parse(json).unwrap()[0];
        assert_eq!(record.id, "1");
        assert_eq!(turns(record), [Turn::human("Hi <image>", 0), Turn::assistant("Hello")]);
        assert_eq!(record.repairs, Repairs { dropped_turns: 2, literal_placeholders: 1, ..Repairs::default() });
        assert_eq!(record.modality_length(), -3);
    }

    #[test]
    fn placeholders_are_moved_merged_and_counted() {
        let talk = |text: &str, more: &str| {
            format!(
                r#"[{{"image":{more},"conversations":[{{"from":"human","value":"{text}"}},{{"from":"gpt","value":"a"}}]}}]"#
            )
        };
        let record = &parse(&talk("<image> Look <image>", "\"a.png\"")).unwrap()[0];
        assert_eq!(turns(record)[0], Turn::human("Look", 1));
        assert_eq!(record.repairs.merged_placeholders, 1);
        let record = &parse(&talk("x <image> y <image>", r#"["a.png","b.png","c.png"]"#)).unwrap()[0];
        assert_eq!(turns(record)[0], Turn::human("x  y", 2));
        assert_eq!((record.images.len(), record.repairs.unplaced_images), (2, 1));
        let record = &parse(&talk("nothing", "\"a.png\"")).unwrap()[0];
        assert_eq!((record.images.len(), record.repairs.unplaced_images), (0, 1));
        assert_eq!(
            message(&talk("<image><image><image>", r#"["a.png","b.png"]"#)),
            "data.json, record 1: 3 `<image>` in the text, but 2 in `image`"
        );
    }

    #[test]
    fn messages_and_text_are_read() {
        let json = r#"{"messages":[{"role":"system","content":"Be brief."},
            {"role":"user","content":[{"type":"image","path":"p.png"},{"type":"text","text":"What?"}]},
            {"role":"assistant","content":"A cat."}]}
            {"id":"t","text":"Once upon a time"}"#;
        let records = parse(json).unwrap();
        assert_eq!(records[0].system.as_deref(), Some("Be brief."));
        assert_eq!(turns(&records[0])[0], Turn::human("What?", 1));
        assert_eq!(records[0].images.len(), 1);
        assert_eq!(records[1].content, Content::Text("Once upon a time".into()));
    }

    #[test]
    fn errors_name_file_record_and_key() {
        assert_eq!(message("[]"), "data.json: the data set is empty");
        assert_eq!(message(""), "data.json: the data set is empty");
        assert!(message("[{\"id\": 1,").starts_with("data.json, record 1: not valid JSON: "));
        assert!(message("not json").starts_with("data.json, record 1: not valid JSON: "));
        assert_eq!(message("[3]"), "data.json, record 1: a record is a JSON object");
        assert_eq!(message(r#"[{"id":"x"}]"#), "data.json, record 1 (id \"x\"): `conversations` is missing");
        let bad = |turns: &str| message(&format!(r#"[{{"id":"x","conversations":{turns}}}]"#));
        assert_eq!(bad("[]"), "data.json, record 1 (id \"x\"): `conversations` has no human turn");
        assert_eq!(
            bad(r#"[{"from":"gpt","value":"a"}]"#),
            "data.json, record 1 (id \"x\"): `conversations` has no human turn"
        );
        assert_eq!(
            bad(r#"[{"from":"human","value":"a"}]"#),
            "data.json, record 1 (id \"x\"): `conversations`: the human turn has no answer"
        );
        assert_eq!(
            bad(r#"[{"from":"human","value":3}]"#),
            "data.json, record 1 (id \"x\"): `conversations[0].value` is missing or not a string"
        );
        assert_eq!(
            bad(r#"[{"from":"dog","value":"a"}]"#),
            "data.json, record 1 (id \"x\"): `conversations[0].from`: unknown speaker \"dog\""
        );
        assert!(
            bad(r#"[{"from":"human","value":"a"},{"from":"human","value":"b"}]"#)
                .contains("[1]`: human and assistant do not")
        );
    }
}
