//! What is typed, or comes through a pipe: lines, joined to messages and told from commands.

use std::{
    cell::Cell,
    io::{BufRead, IsTerminal, Write},
};

use rustyline::{
    Behavior, Config, Context, Editor, Helper, completion::Completer, error::ReadlineError, highlight::Highlighter,
    hint::Hinter, history::DefaultHistory, validate::Validator,
};

use crate::error::{Error, Result};

const PROMPT: &str = "> ";
const MORE: &str = ". ";
/// Begins and ends a message of several lines.
const BLOCK: &str = "\"\"\"";

/// What a person wants.
#[derive(Debug, PartialEq, Eq)]
pub enum Entry {
    Message(String),
    /// A line that begins with `/`.
    Command(String),
    End,
}

enum Line {
    Text(String),
    /// Ctrl-C, and whether it dropped anything.
    Interrupted {
        dropped: bool,
    },
    End,
}

/// Watches the line that is being typed: the editor does not tell what Ctrl-C dropped.
#[derive(Default)]
pub struct Watch {
    is_empty: Cell<bool>,
}

impl Hinter for Watch {
    type Hint = String;

    fn hint(&self, line: &str, _: usize, _: &Context<'_>) -> Option<String> {
        self.is_empty.set(line.is_empty());
        None
    }
}

impl Completer for Watch {
    type Candidate = String;
}

impl Highlighter for Watch {}
impl Validator for Watch {}
impl Helper for Watch {}

/// Where lines come from.
pub enum Input {
    Terminal(Box<Editor<Watch, DefaultHistory>>),
    Pipe(Box<dyn BufRead>),
}

impl Input {
    /// A line editor where stdin is a terminal.
    ///
    /// # Errors
    /// `Failed`: the terminal cannot be used.
    pub fn open() -> Result<Self> {
        if !std::io::stdin().is_terminal() {
            return Ok(Self::Pipe(Box::new(std::io::stdin().lock())));
        }
        // Where stdout is no terminal it holds the answers alone, and what is typed is shown on the terminal itself.
        let behavior = if std::io::stdout().is_terminal() { Behavior::Stdio } else { Behavior::PreferTerm };
        let editor = Editor::with_config(Config::builder().behavior(behavior).build());
        let mut editor = editor.map_err(|source| Error::failed("cannot read from the terminal").caused_by(source))?;
        editor.set_helper(Some(Watch::default()));
        Ok(Self::Terminal(Box::new(editor)))
    }

    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal(_))
    }

    /// The next message or command; white space round a message is left out, and empty ones are passed over.
    ///
    /// A line that ends with `\` goes on in the next one; what stands between `"""` and `"""` is one message.
    /// Ctrl-C drops what was begun; where nothing was, twice in a row is the end.
    ///
    /// # Errors
    /// `Failed`: input cannot be read.
    pub fn entry(&mut self) -> Result<Entry> {
        let mut interrupted = false;
        loop {
            let line = match self.line(PROMPT)? {
                Line::Text(line) => line,
                Line::Interrupted { dropped: true } => {
                    interrupted = false;
                    continue;
                }
                Line::Interrupted { .. } if interrupted => return Ok(Entry::End),
                Line::Interrupted { .. } => {
                    interrupted = true;
                    // Nobody left to read it is no reason to stop.
                    let _ = writeln!(std::io::stderr(), "(Ctrl-C once more, Ctrl-D or /quit ends the conversation)");
                    continue;
                }
                Line::End => return Ok(Entry::End),
            };
            interrupted = false;
            if line.starts_with('/') {
                self.remember(&line);
                return Ok(Entry::Command(line.trim().to_owned()));
            }
            let Some(message) = self.message(line)? else { continue };
            if !message.trim().is_empty() {
                self.remember(&message);
                return Ok(Entry::Message(message.trim().to_owned()));
            }
        }
    }

    /// The message that a line begins; none where it was dropped.
    fn message(&mut self, line: String) -> Result<Option<String>> {
        if let Some(opening) = line.trim_start().strip_prefix(BLOCK) {
            let (mut text, mut rest) = (String::new(), opening.to_owned());
            loop {
                if let Some(last) = rest.trim_end().strip_suffix(BLOCK) {
                    return Ok(Some(text + last));
                }
                text = text + &rest + "\n";
                rest = match self.line(MORE)? {
                    Line::Text(line) => line,
                    Line::Interrupted { .. } => return Ok(None),
                    Line::End => return Ok(Some(text)),
                };
            }
        }
        let mut text = line;
        while let Some(before) = text.strip_suffix('\\') {
            let before = format!("{before}\n");
            text = match self.line(MORE)? {
                Line::Text(line) => before + &line,
                Line::Interrupted { .. } => return Ok(None),
                Line::End => return Ok(Some(before)),
            };
        }
        Ok(Some(text))
    }

    fn remember(&mut self, text: &str) {
        if let Self::Terminal(editor) = self {
            // A line that cannot be kept is only not there to be called back.
            let _ = editor.add_history_entry(text);
        }
    }

    fn line(&mut self, prompt: &str) -> Result<Line> {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| {
            Error::failed("cannot read what is typed").caused_by(source)
        };
        match self {
            Self::Terminal(editor) => {
                if let Some(watch) = editor.helper() {
                    watch.is_empty.set(true);
                }
                match editor.readline(prompt) {
                    Ok(line) => Ok(Line::Text(line)),
                    Err(ReadlineError::Interrupted) => {
                        let dropped = editor.helper().is_some_and(|watch| !watch.is_empty.get());
                        Ok(Line::Interrupted { dropped })
                    }
                    Err(ReadlineError::Eof) => Ok(Line::End),
                    Err(source) => Err(failed(source.into())),
                }
            }
            Self::Pipe(lines) => {
                let mut bytes = Vec::new();
                if lines.read_until(b'\n', &mut bytes).map_err(|source| failed(source.into()))? == 0 {
                    return Ok(Line::End);
                }
                let line = String::from_utf8_lossy(&bytes);
                Ok(Line::Text(line.trim_end_matches(['\r', '\n']).to_owned()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(text: &'static str) -> Vec<Entry> {
        let mut input = Input::Pipe(Box::new(text.as_bytes()));
        let mut entries = Vec::new();
        loop {
            match input.entry().unwrap() {
                Entry::End => return entries,
                entry => entries.push(entry),
            }
        }
    }

    fn message(text: &str) -> Entry {
        Entry::Message(text.to_owned())
    }

    #[test]
    fn lines_are_joined_to_messages() {
        assert_eq!(
            entries("\n  Hello  \r\n\n/clear \nlast"),
            [message("Hello"), Entry::Command("/clear".into()), message("last")]
        );
        assert_eq!(entries("one\\\n  two\\\nthree\nfour\n"), [message("one\n  two\nthree"), message("four")]);
        assert_eq!(
            entries("\"\"\"one\n/two \n\n three\"\"\" \nfour"),
            [message("one\n/two \n\n three"), message("four")]
        );
        assert_eq!(entries("\"\"\"\none\n\"\"\"\n\"\"\"two\"\"\""), [message("one"), message("two")]);
        assert_eq!(entries("\"\"\"\n\"\"\"\nx"), [message("x")]);
        // What is not closed ends with the input.
        assert_eq!(entries("\"\"\"one\ntwo"), [message("one\ntwo")]);
        assert_eq!(entries("one\\"), [message("one")]);
        assert_eq!(entries("/save C:\\\nx"), [Entry::Command("/save C:\\".into()), message("x")]);
    }
}
