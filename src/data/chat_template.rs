//! A model's own chat template, rendered as transformers' `apply_chat_template` does.
//!
//! What the assistant says is found by rendering a conversation message by message: what comes after the prompt for
//! an answer is the answer. A template whose text for more messages does not begin with that for fewer has no such
//! places, and is refused for training.

use std::{fmt, ops::Range, time::SystemTime};

use minijinja::{
    Environment, Error as TemplateError, ErrorKind, Value as TemplateValue, escape_formatter, syntax::SyntaxConfig,
};
use minijinja_contrib::pycompat::unknown_method_callback;
use regex::Regex;
use serde_json::{Map, Value, json};

use super::{
    IMAGE_PLACEHOLDER,
    chat_python::{self, to_template},
    record::{Role, Turn},
    template::{Labels, Part},
    version::FileReader,
};
use crate::error::{Error, Result};

/// Work a template may do (minijinja's count of instructions and bytes): far more than any conversation takes.
const FUEL: u64 = 2_000_000;
/// Ten times what the longest known one has.
const MAX_SOURCE: usize = 256 << 10;
/// For each operator and for each list within a list the engine calls itself: this holds as many as there are in
/// `MAX_SOURCE` and as `FUEL` makes.
const STACK: usize = 512 << 20;
/// Stands for a literal `<image>` in somebody's text while a template is rendered; private use characters.
const LITERAL: &str = "\u{f8ff}\u{e0f5}\u{f8ff}";
const KNOWN_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"];

/// How a template wants the pictures of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ContentForm {
    /// As `<image>` in the text.
    Text,
    /// As parts of a list: `{"type": "image"}`, `{"type": "text", "text": ...}`.
    Parts,
}

/// A template among a model's files: what messages call it, its text, and the special tokens.
type Found = (String, String, Map<String, Value>);

/// A template ready to be rendered.
pub struct ChatTemplate {
    name: String,
    environment: Environment<'static>,
    tokens: Map<String, Value>,
    form: ContentForm,
    /// The token that ends an answer.
    end: Option<String>,
    /// The date for templates that name it; the time of rendering where there is none.
    now: Option<SystemTime>,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate").field("name", &self.name).field("form", &self.form).finish_non_exhaustive()
    }
}

/// A conversation as text, with the byte ranges of what the assistant says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    pub text: String,
    pub assistant: Vec<Range<usize>>,
}

impl ChatTemplate {
    /// A template from its source. `name` is what messages call it; `config` gives the special tokens as
    /// tokenizer_config.json does.
    ///
    /// # Errors
    /// Data: a template that does not parse, with its line.
    pub fn new(name: &str, source: &str, config: &Map<String, Value>) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let unreadable = |error: TemplateError| {
            let place = error.line().map_or_else(String::new, |line| format!(", line {line}"));
            Error::data(format!("the chat template of {name}{place}: it cannot be read")).caused_by(error)
        };
        environment.set_syntax(syntax.map_err(unreadable)?);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.set_fuel(Some(FUEL));
        // An error would carry the template's values out of the thread whose stack can drop them.
        environment.set_debug(false);
        environment.set_formatter(|out, state, value| {
            chat_python::pay_for(state, value, 0)?;
            escape_formatter(out, state, value)
        });
        environment.add_filter("tojson", chat_python::tojson);
        environment.add_function("raise_exception", |message: String| -> Result<String, TemplateError> {
            Err(TemplateError::new(ErrorKind::InvalidOperation, message))
        });
        if source.len() > MAX_SOURCE {
            let message = format!("the chat template of {name} has {} bytes, and {MAX_SOURCE} are read", source.len());
            return Err(Error::data(message));
        }
        let source = without_generation_blocks(source);
        with_deep_stack(|| environment.add_template_owned("chat", source))?.map_err(unreadable)?;
        let token = |key: &str| {
            let token = config.get(key)?;
            Some((key.to_owned(), json!(token.as_str().or_else(|| token.get("content")?.as_str())?)))
        };
        let tokens: Map<String, Value> = KNOWN_TOKENS.iter().filter_map(|key| token(key)).collect();
        let end = tokens.get("eos_token").and_then(Value::as_str).filter(|eos| !eos.is_empty()).map(str::to_owned);
        let form = ContentForm::Text;
        let mut template = Self { name: name.to_owned(), environment, tokens, form, end, now: None };
        template.form = template.probe();
        Ok(template)
    }

    /// The template among a model's files: chat_template.jinja, else chat_template.json, else tokenizer_config.json.
    /// `model` is what messages call it.
    ///
    /// # Errors
    /// Data: a file that cannot be read, or a template that does not parse.
    pub fn from_files(model: &str, read: FileReader<'_>) -> Result<Option<Self>> {
        let Some((name, source, config)) = Self::found(model, read)? else { return Ok(None) };
        Self::new(&name, &source, &config).map(Some)
    }

    /// The text of that template, as it stands in the files.
    ///
    /// # Errors
    /// Data: a file that cannot be read.
    pub fn source(model: &str, read: FileReader<'_>) -> Result<Option<String>> {
        Ok(Self::found(model, read)?.map(|(_, source, _)| source))
    }

    fn found(model: &str, read: FileReader<'_>) -> Result<Option<Found>> {
        let object = |file: &str| -> Result<Map<String, Value>> {
            let Some(bytes) = read(file)? else { return Ok(Map::new()) };
            serde_json::from_slice(&bytes)
                .map_err(|source| Error::data(format!("{model}/{file} does not hold a JSON object")).caused_by(source))
        };
        let mut config = object("tokenizer_config.json")?;
        for (key, token) in object("special_tokens_map.json")? {
            config.entry(key).or_insert(token);
        }
        if let Some(source) = read("chat_template.jinja")? {
            let name = format!("{model}/chat_template.jinja");
            let source = std::str::from_utf8(&source)
                .map_err(|source| Error::data(format!("{name} is not UTF-8")).caused_by(source))?;
            return Ok(Some((name, source.to_owned(), config)));
        }
        for file in ["chat_template.json", "tokenizer_config.json"] {
            if let Some(template) = object(file)?.get("chat_template").filter(|template| !template.is_null()) {
                let name = format!("{model}/{file}");
                let source = default_of(&name, template)?;
                return Ok(Some((name, source, config)));
            }
        }
        Ok(None)
    }

    /// From the value of `chat_template` in a config: a string, or a list of named ones, of which `default` is taken.
    pub fn from_config(name: &str, template: &Value, config: &Map<String, Value>) -> Result<Self> {
        Self::new(name, &default_of(name, template)?, config)
    }

    /// What messages call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The token that ends an answer, where one is known: by default the EOS.
    pub fn end_mark(&self) -> Option<&str> {
        self.end.as_deref()
    }

    /// Looks for the token that ends an answer in what the template writes behind one. `first_added` gives the first
    /// token of a text, where it is one that was added to the vocabulary; the EOS stays where there is none.
    pub fn ended_by(mut self, first_added: impl Fn(&str) -> Option<String>) -> Self {
        const ANSWER: &str = "ANSWER";
        let turns = [Turn::human("QUESTION", 0), Turn::assistant(ANSWER)];
        let text = self.render(&self.messages(&turns, None), false).unwrap_or_default();
        let behind = text.rfind(ANSWER).map(|at| text[at + ANSWER.len()..].trim_start());
        self.end = behind.and_then(first_added).or(self.end);
        self
    }

    /// Fixes the date that templates may write into a prompt.
    pub fn dated(mut self, now: SystemTime) -> Self {
        self.now = Some(now);
        self
    }

    /// The text of messages (`role`, `content`), and the opening of an answer if asked.
    ///
    /// # Errors
    /// Data: what the template itself raises, and faults in it.
    pub fn render(&self, messages: &[Value], add_generation_prompt: bool) -> Result<String> {
        let failed = |error: TemplateError| {
            let place = error.line().map_or_else(String::new, |line| format!(", line {line}"));
            let message = error.detail().map_or_else(|| error.to_string(), str::to_owned);
            Error::data(format!("the chat template of {}{place}: {message}", self.name))
        };
        let now = self.now.unwrap_or_else(SystemTime::now);
        let strftime_now = TemplateValue::from_function(move |format: String| chat_python::strftime(now, &format));
        let entries = self.tokens.iter().map(|(key, token)| (key.as_str(), to_template(token)));
        let context = chat_python::dict(entries.chain([
            ("messages", messages.iter().map(to_template).collect()),
            ("tools", TemplateValue::from(())),
            ("documents", TemplateValue::from(())),
            ("add_generation_prompt", TemplateValue::from(add_generation_prompt)),
            ("strftime_now", strftime_now),
        ]));
        with_deep_stack(|| self.environment.get_template("chat").and_then(|template| template.render(context)))?
            .map_err(failed)
    }

    /// The text of a whole conversation and where in it the assistant speaks: what stands behind the prompt for each
    /// answer, up to and with the token that ends it.
    ///
    /// # Errors
    /// Data: also where an answer cannot be told from what is round it.
    pub fn render_with_spans(&self, messages: &[Value]) -> Result<Rendered> {
        let text = self.render(messages, false)?;
        let mut assistant = Vec::new();
        let is_answer = |message: &Value| message.get("role").and_then(Value::as_str) == Some("assistant");
        for index in (0..messages.len()).filter(|&index| is_answer(&messages[index])) {
            let opened = self.render(&messages[..index], true)?;
            let closed = match index + 1 == messages.len() {
                true => text.clone(),
                false => self.render(&messages[..=index], false)?,
            };
            let span = self.answer(&text, &opened, &closed, &messages[index]).ok_or_else(|| {
                let message = format!(
                    "the chat template of {} writes answer {} otherwise than its prompts ask for it: what the \
                     assistant says cannot be told apart",
                    self.name,
                    assistant.len() + 1
                );
                Error::data(message).hint("train with one of the named templates, such as v1")
            })?;
            assistant.push(span);
        }
        Ok(Rendered { text, assistant })
    }

    /// Where an answer stands in the text of a conversation: `opened` is the prompt for it, `closed` the conversation
    /// up to it. Nothing behind the token that ends it is ever generated, so nothing behind it is part of it.
    fn answer(&self, text: &str, opened: &str, closed: &str, message: &Value) -> Option<Range<usize>> {
        let end = self.end.as_deref();
        if closed.starts_with(opened) && text.starts_with(closed) {
            let said = &closed[opened.len()..];
            let length = end.and_then(|end| said.rfind(end).map(|at| at + end.len())).unwrap_or(said.len());
            return Some(opened.len()..opened.len() + length);
        }
        // Some templates write the latest answer otherwise than earlier ones, for instance with its thoughts.
        let end = end.filter(|end| !message.to_string().contains(end))?;
        let length = text.strip_prefix(opened)?.find(end)? + end.len();
        Some(opened.len()..opened.len() + length)
    }

    /// A whole conversation for training.
    ///
    /// # Errors
    /// As [`ChatTemplate::render_with_spans`].
    pub fn training(&self, turns: &[Turn], system: Option<&str>) -> Result<Vec<Part>> {
        Ok(parts(&self.render_with_spans(&self.messages(turns, system))?))
    }

    /// A question: `turns` end with a human's, and the assistant's is left open.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn prompt(&self, turns: &[Turn], system: Option<&str>) -> Result<Vec<Part>> {
        let text = self.render(&self.messages(turns, system), true)?;
        Ok(parts(&Rendered { text, assistant: Vec::new() }))
    }

    /// Whether a prompt has its BOS already.
    pub fn begins_with_bos(&self, parts: &[Part]) -> bool {
        let bos = self.tokens.get("bos_token").and_then(Value::as_str).filter(|bos| !bos.is_empty());
        matches!((parts.first(), bos), (Some(Part::Text { text, .. }), Some(bos)) if text.starts_with(bos))
    }

    fn messages(&self, turns: &[Turn], system: Option<&str>) -> Vec<Value> {
        let content = |text: &str, images: usize| {
            let text = text.replace(IMAGE_PLACEHOLDER, LITERAL);
            match self.form {
                ContentForm::Text => {
                    let pictures = std::iter::repeat_n(IMAGE_PLACEHOLDER, images);
                    json!(
                        pictures
                            .chain(Some(text.as_str()).filter(|text| !text.is_empty()))
                            .collect::<Vec<_>>()
                            .join("\n")
                    )
                }
                ContentForm::Parts => {
                    let pictures = std::iter::repeat_n(json!({"type": "image"}), images);
                    Value::Array(pictures.chain([json!({"type": "text", "text": text})]).collect())
                }
            }
        };
        let system = system.map(|system| json!({"role": "system", "content": content(system, 0)}));
        let turns = turns.iter().map(|turn| {
            let role = if turn.role == Role::Human { "user" } else { "assistant" };
            json!({"role": role, "content": content(&turn.text, turn.images)})
        });
        system.into_iter().chain(turns).collect()
    }

    /// Whether the template writes pictures that come as parts of a list.
    fn probe(&self) -> ContentForm {
        let parts = json!([{"type": "image"}, {"type": "text", "text": "QUESTION"}]);
        let text = self.render(&[json!({"role": "user", "content": parts})], false).unwrap_or_default();
        let is_written = text.contains("QUESTION") && text.contains(IMAGE_PLACEHOLDER);
        // A template that takes every content for a string prints the list itself.
        if is_written && !text.contains("'text'") && !text.contains("\"text\"") {
            ContentForm::Parts
        } else {
            ContentForm::Text
        }
    }
}

/// Does the work on a thread of its own, with as much stack as a hostile template may need.
fn with_deep_stack<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work);
        let thread =
            thread.map_err(|source| Error::failed("cannot start a thread for the chat template").caused_by(source))?;
        Ok(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

fn parts(rendered: &Rendered) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut push = |range: Range<usize>, labels: Labels| {
        let Some(text) = rendered.text.get(range) else { return };
        for (index, text) in text.split(IMAGE_PLACEHOLDER).enumerate() {
            if index > 0 {
                parts.push(Part::Image);
            }
            if !text.is_empty() {
                parts.push(Part::Text { text: text.replace(LITERAL, IMAGE_PLACEHOLDER), labels });
            }
        }
    };
    let mut at = 0;
    for answer in &rendered.assistant {
        push(at..answer.start, Labels::Ignore);
        push(answer.clone(), Labels::Learn);
        at = answer.end;
    }
    push(at..rendered.text.len(), Labels::Ignore);
    parts
}

/// The text in a config's `chat_template`: a string, or the one called `default` in a list or an object of named ones.
fn default_of(name: &str, template: &Value) -> Result<String> {
    let named =
        |entry: &Value| Some((entry.get("name")?.as_str()?.to_owned(), entry.get("template")?.as_str()?.to_owned()));
    let list: Vec<(String, String)> = match template {
        Value::String(source) => return Ok(source.clone()),
        Value::Array(entries) => entries.iter().filter_map(named).collect(),
        Value::Object(entries) => {
            let text = |(key, value): (&String, &Value)| Some((key.clone(), value.as_str()?.to_owned()));
            entries.iter().filter_map(text).collect()
        }
        _ => Vec::new(),
    };
    match list.iter().find(|(name, _)| name == "default") {
        Some((_, source)) => Ok(source.clone()),
        None => {
            let names: Vec<&str> = list.iter().map(|(name, _)| name.as_str()).collect();
            Err(Error::data(format!("{name}: chat_template names no `default` (it has: {})", names.join(", "))))
        }
    }
}

/// transformers has a tag `generation` round what the assistant says; here it only has to leave its content be.
fn without_generation_blocks(source: &str) -> String {
    let replaced = [
        (r"\{%([-+]?)\s*generation\s*([-+]?)%\}", "{%$1 if true $2%}"),
        (r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}", "{%$1 endif $2%}"),
    ];
    replaced.into_iter().fold(source.to_owned(), |source, (tag, with)| match Regex::new(tag) {
        Ok(tag) => tag.replace_all(&source, with).into_owned(),
        Err(_) => source,
    })
}
