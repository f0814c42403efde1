//! The commands of a conversation: lines that begin with `/`.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result, nearest};

/// Told by `/help`: the command, and what it does.
const COMMANDS: [(&str, &str); 6] = [
    ("/image PATH", "show a picture with the next message; several are shown in their order"),
    ("/clear", "begin a new conversation"),
    ("/save FILE", "write the conversation as a record that `train` and `score` read"),
    ("/system TEXT", "another system text from here on; without TEXT the template's own"),
    ("/help", "this list"),
    ("/quit", "end, as Ctrl-D does"),
];

#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    Image(PathBuf),
    Clear,
    Save(PathBuf),
    /// None: the template's own text.
    System(Option<String>),
    Help,
    Quit,
}

impl Command {
    /// # Errors
    /// `Usage`: an unknown command, with the nearest one; a path that is missing, or words where there should be none.
    pub fn parse(line: &str) -> Result<Self> {
        let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        let needs = |what: &str| Error::usage(format!("{name} needs {what}")).hint("/help tells the commands");
        let command = match name {
            "/image" if rest.is_empty() => return Err(needs("the path of a picture")),
            "/image" => return Ok(Self::Image(path(rest))),
            "/save" if rest.is_empty() => return Err(needs("the name of a file")),
            "/save" => return Ok(Self::Save(path(rest))),
            "/system" => return Ok(Self::System(Some(rest.to_owned()).filter(|text| !text.is_empty()))),
            "/clear" => Self::Clear,
            "/help" => Self::Help,
            "/quit" | "/exit" => Self::Quit,
            _ => {
                let names = COMMANDS.iter().filter_map(|(usage, _)| usage.split(' ').next());
                let near = nearest(name, names).unwrap_or_default();
                return Err(Error::usage(format!("there is no command {name}; the nearest is {near}"))
                    .hint("/help tells the commands; a message that begins with / goes between \"\"\" and \"\"\""));
            }
        };
        if rest.is_empty() { Ok(command) } else { Err(Error::usage(format!("{name} takes nothing behind it"))) }
    }
}

/// What `/help` shows.
pub fn help() -> String {
    let mut text = String::new();
    for (usage, what) in COMMANDS {
        text += &format!("  {usage:13} {what}\n");
    }
    text + "A line that ends with \\ goes on in the next one; what stands between \"\"\" and \"\"\" is one message.\n\
            Ctrl-C stops an answer."
}

/// A path as people paste it: in quotation marks, or from the home folder.
fn path(text: &str) -> PathBuf {
    let quoted = |mark: char| text.strip_prefix(mark)?.strip_suffix(mark);
    let text = quoted('"').or_else(|| quoted('\'')).unwrap_or(text);
    match (text.strip_prefix("~/"), std::env::home_dir()) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => Path::new(text).to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_read_and_wrong_ones_named() {
        let parse = |line: &str| Command::parse(line).unwrap();
        assert_eq!(parse("/image  a b.png "), Command::Image("a b.png".into()));
        assert_eq!(parse("/image \"a b.png\""), Command::Image("a b.png".into()));
        assert_eq!(parse("/save '/x/y.json'"), Command::Save("/x/y.json".into()));
        assert_eq!(parse("/system Be  kind."), Command::System(Some("Be  kind.".into())));
        assert_eq!(parse("/system"), Command::System(None));
        assert_eq!((parse("/clear"), parse("/quit"), parse("/exit")), (Command::Clear, Command::Quit, Command::Quit));
        let message = |line: &str| Command::parse(line).unwrap_err().message;
        assert_eq!(message("/imgae x.png"), "there is no command /imgae; the nearest is /image");
        assert_eq!(message("/sav"), "there is no command /sav; the nearest is /save");
        assert!(message("/image").contains("path of a picture"));
        assert!(message("/save  ").contains("name of a file"));
        assert!(message("/clear all").contains("/clear takes nothing"));
        for (usage, _) in COMMANDS {
            assert!(help().contains(usage));
        }
    }
}
