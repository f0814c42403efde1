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
    shown: String,
    stream: bool,
}

impl<'a> Answer<'a> {
    /// `stop` are texts that end the answer beside the version's own mark, where that is no single token of
    /// `stop_ids`.
    pub fn new(tokenizer: &'a Tokenizer, version: &'a Version, stop_ids: &'a [u32], stop: &'a [String]) -> Self {
        let mark = version.stop();
        let mark = tokenizer.token_to_id(mark).is_none().then_some(mark).filter(|mark| !mark.is_empty());
        let stop = mark.into_iter().chain(stop.iter().map(String::as_str)).collect();
        Self { tokenizer, stop, stop_ids, ids: Vec::new(), shown: String::new(), stream: false }
    }

    /// Shows words as they come.
    pub fn streaming(mut self, stream: bool) -> Self {
        self.stream = stream;
        self
    }

    /// Up to the stop text, white space around it left out.
    pub fn text(&self) -> Result<String> {
        self.text_of(&self.ids)
    }

    fn text_of(&self, ids: &[i32]) -> Result<String> {
        let text = self.tokenizer.decode(ids)?;
        let end = self.stop.iter().filter_map(|stop| text.find(stop)).min().unwrap_or(text.len());
        Ok(text[..end].trim().to_owned())
    }

    /// What of the text was not shown yet.
    pub fn rest(&self) -> Result<String> {
        Ok(behind(&self.text()?, &self.shown).to_owned())
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
        let more = self.advance()?;
        let mut out = std::io::stdout().lock();
        Ok(match out.write_all(more.as_bytes()).and_then(|()| out.flush()) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        })
    }

    /// What can be shown now and could not before: text that will stay whatever follows.
    fn advance(&mut self) -> Result<String> {
        // Tokens of single bytes are read together with the bytes that follow them.
        let is_byte = |id: &&i32| {
            let token = u32::try_from(**id).ok().and_then(|id| self.tokenizer.id_to_token(id));
            token.is_some_and(|token| token.len() == 6 && token.starts_with("<0x") && token.ends_with('>'))
        };
        let open = self.ids.iter().rev().take_while(is_byte).count();
        let mut text = self.text_of(&self.ids[..self.ids.len() - open])?;
        // The beginning of a stop text is held back until it is clear that it is none.
        let begun =
            |stop: &&str| (1..stop.len()).rev().find(|&n| stop.is_char_boundary(n) && text.ends_with(&stop[..n]));
        let held = self.stop.iter().filter_map(begun).max().unwrap_or(0);
        text.truncate(text.len() - held);
        // A character may need more tokens than there are yet; white space may be the last of the answer.
        let whole = text.trim_end_matches('\u{FFFD}').trim_end().len();
        text.truncate(whole);
        let more = behind(&text, &self.shown).to_owned();
        if !more.is_empty() {
            self.shown = text;
        }
        Ok(more)
    }
}

/// What a text has behind what it has in common with one that was shown.
fn behind<'t>(text: &'t str, shown: &str) -> &'t str {
    text.strip_prefix(shown).unwrap_or_else(|| {
        let same = text.char_indices().zip(shown.chars()).find(|&((_, ours), theirs)| ours != theirs);
        same.map_or("", |((at, _), _)| &text[at..])
    })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{data::Template, embedded, models::open::tokenizer};

    /// The pieces in which an answer of these tokens is shown, and its text.
    fn shown(ids: &[u32], stop: &[&str]) -> (Vec<String>, String) {
        let tokenizer = tokenizer(&embedded::model("tiny").unwrap()).unwrap();
        let version = Version::Named(Template::named("v1").unwrap());
        let stop: Vec<String> = stop.iter().map(|&stop| stop.to_owned()).collect();
        let mut answer = Answer::new(&tokenizer, &version, &[2], &stop);
        let mut pieces = Vec::new();
        for &id in ids {
            if answer.push(id).unwrap().is_break() {
                break;
            }
            pieces.extend(Some(answer.advance().unwrap()).filter(|piece| !piece.is_empty()));
        }
        pieces.push(answer.rest().unwrap());
        (pieces, answer.text().unwrap())
    }

    fn ids(tokens: &[&str]) -> Vec<u32> {
        let tokenizer = tokenizer(&embedded::model("tiny").unwrap()).unwrap();
        tokens.iter().map(|token| tokenizer.token_to_id(token).unwrap_or_else(|| panic!("{token}"))).collect()
    }

    #[test]
    fn what_is_shown_is_the_text() {
        let red = ids(&["▁red"])[0];
        let bytes = ids(&["<0xC3>", "<0xB6>", "<0x5F>", "<0x91>", "<0x8C>", "<0x20>"]);
        for answer in [
            vec![red, red, 2, red],
            vec![red, bytes[0], bytes[1], red],
            vec![red, bytes[2], bytes[3], bytes[4], red],
            vec![bytes[0], bytes[2], red, bytes[3], bytes[5], bytes[5]],
            vec![red, bytes[0]],
            vec![2],
        ] {
            let (pieces, text) = shown(&answer, &[]);
            assert_eq!(pieces.concat(), text, "{answer:?}");
        }
        assert_eq!(
            shown(&[red, red, 2, red], &[]),
            (vec!["red".into(), " red".into(), String::new()], "red red".into())
        );
        assert_eq!(shown(&[red, bytes[0], bytes[1], red], &[]).1, "redö red");
    }

    #[test]
    fn a_stop_text_is_held_back_and_cut() {
        let tokens = ids(&["▁red", "▁is", "▁red", "▁it"]);
        let (pieces, text) = shown(&tokens, &["red it"]);
        assert_eq!((pieces.concat().as_str(), text.as_str()), ("red is", "red is"));
        let (pieces, text) = shown(&tokens[..3], &["red it"]);
        assert_eq!((pieces, text.as_str()), (vec!["red is".to_owned(), " red".into()], "red is red"));
    }
}
