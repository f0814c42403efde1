//! An answer as it comes: shown on the way, held back where a stop text may begin, cut where one does.

use std::{
    io::{IsTerminal, Write},
    ops::ControlFlow,
    path::PathBuf,
};

use crate::{
    data::{ImageSource, Tokenizer, Version},
    error::{Error, Result},
};

/// What has been said so far, and how much of it was shown.
pub struct Answer<'a> {
    tokenizer: &'a Tokenizer,
    /// Any of these ends the answer, and is not part of it.
    stop: Vec<&'a str>,
    stop_ids: &'a [u32],
    ids: Vec<i32>,
    /// Bytes of the text.
    shown: usize,
    stream: bool,
}

impl<'a> Answer<'a> {
    /// `stop` are texts that end the answer beside the version's own mark, where that is no single token of
    /// `stop_ids`.
    pub fn new(tokenizer: &'a Tokenizer, version: &'a Version, stop_ids: &'a [u32], stop: &'a [String]) -> Self {
        let mark = version.stop();
        let mark = tokenizer.token_to_id(mark).is_none().then_some(mark).filter(|mark| !mark.is_empty());
        let stop = mark.into_iter().chain(stop.iter().map(String::as_str)).collect();
        Self { tokenizer, stop, stop_ids, ids: Vec::new(), shown: 0, stream: false }
    }

    /// Shows words as they come.
    pub fn streaming(mut self, stream: bool) -> Self {
        self.stream = stream;
        self
    }

    /// Up to the stop text, white space around it left out.
    pub fn text(&self) -> Result<String> {
        let text = self.tokenizer.decode(&self.ids)?;
        let end = self.stop.iter().filter_map(|stop| text.find(stop)).min().unwrap_or(text.len());
        Ok(text[..end].trim().to_owned())
    }

    /// What of the text was not shown yet.
    pub fn rest(&self) -> Result<String> {
        Ok(self.text()?.get(self.shown..).unwrap_or_default().to_owned())
    }

    /// Takes a token; breaks where the answer is over, or nobody reads it any more.
    pub fn push(&mut self, token: u32) -> Result<ControlFlow<()>> {
        if self.stop_ids.contains(&token) {
            return Ok(ControlFlow::Break(()));
        }
        self.ids.push(token as i32);
        if !self.stop.is_empty() {
            let text = self.tokenizer.decode(&self.ids)?;
            if self.stop.iter().any(|stop| text.contains(stop)) {
                return Ok(ControlFlow::Break(()));
            }
        }
        if !self.stream {
            return Ok(ControlFlow::Continue(()));
        }
        let text = self.ready()?;
        if text.len() > self.shown && text.is_char_boundary(self.shown) {
            let mut out = std::io::stdout().lock();
            let written = out.write_all(&text.as_bytes()[self.shown..]).and_then(|()| out.flush());
            self.shown = text.len();
            if written.is_err() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// As much of the text as will stay whatever follows.
    fn ready(&self) -> Result<String> {
        let mut text = self.text()?;
        // The beginning of a stop text is held back until it is clear that it is none.
        let begun =
            |stop: &&str| (1..stop.len()).rev().find(|&n| stop.is_char_boundary(n) && text.ends_with(&stop[..n]));
        let held = self.stop.iter().filter_map(begun).max().unwrap_or(0);
        text.truncate(text.len() - held);
        // A character may need more tokens than there are yet.
        let whole = text.trim_end_matches('\u{FFFD}').len();
        text.truncate(whole);
        Ok(text)
    }
}

/// Whether what is written to stdout is read as it comes.
pub fn stdout_is_terminal() -> bool {
    std::io::stdout().is_terminal()
}

/// The pictures of `--image`.
///
/// # Errors
/// `Data`: one is not there.
pub fn picture_files(paths: &[PathBuf]) -> Result<Vec<ImageSource>> {
    if let Some(missing) = paths.iter().find(|path| !path.is_file()) {
        let what = if missing.is_dir() { "is a folder, not a picture" } else { "is not there" };
        return Err(Error::data(format!("--image: {} {what}", missing.display())));
    }
    Ok(paths.iter().cloned().map(ImageSource::File).collect())
}
