//! A conversation as a record of a data set, which `train` and `score` read.

use std::path::Path;

use serde_json::{Value, json};

use crate::{
    data::{IMAGE_PLACEHOLDER, Role, Turn},
    error::{Error, Result},
    formats::atomic::write_file,
};

/// Writes the conversation to a new file, pictures by their absolute paths.
///
/// # Errors
/// `Usage`: nothing was said yet, or the file is there already. `Failed`: it cannot be written.
pub fn save(path: &Path, system: Option<&str>, turns: &[Turn], images: &[&Path]) -> Result<()> {
    if turns.is_empty() {
        return Err(Error::usage("nothing was said yet that could be saved"));
    }
    if path.exists() {
        return Err(Error::usage(format!("{} is there already", path.display())).hint("give /save another name"));
    }
    super::report::check_output_file("/save", path)?;
    write_file(path, format!("{:#}\n", json!([record(system, turns, images)?])).as_bytes())
}

/// LLaVA's shape; with a system text, which that has no place for, the shape of chat messages.
fn record(system: Option<&str>, turns: &[Turn], images: &[&Path]) -> Result<Value> {
    let paths = images.iter().map(|path| {
        let text = path.to_str().map(|text| json!(text));
        text.ok_or_else(|| Error::usage(format!("the name of the picture {} is not UTF-8", path.display())))
    });
    let paths = paths.collect::<Result<Vec<Value>>>()?;
    if !paths.is_empty() && turns.iter().any(|turn| turn.text.contains(IMAGE_PLACEHOLDER)) {
        let message = format!("an answer holds `{IMAGE_PLACEHOLDER}`, which stands for a picture in a record");
        return Err(Error::usage(message).hint("ask again without pictures, or leave the answer out"));
    }
    let text = |turn: &Turn| {
        let pictures = std::iter::repeat_n(IMAGE_PLACEHOLDER, turn.images);
        pictures.chain(Some(turn.text.as_str()).filter(|text| !text.is_empty())).collect::<Vec<_>>().join("\n")
    };
    let mut record = json!({"id": "chat"});
    match paths.len() {
        0 => {}
        1 => record["image"] = paths.into_iter().collect::<Vec<_>>().remove(0),
        _ => record["image"] = Value::Array(paths),
    }
    if let Some(system) = system {
        let role = |turn: &Turn| if turn.role == Role::Human { "user" } else { "assistant" };
        let messages = turns.iter().map(|turn| json!({"role": role(turn), "content": text(turn)}));
        record["messages"] = [json!({"role": "system", "content": system})].into_iter().chain(messages).collect();
    } else {
        let from = |turn: &Turn| if turn.role == Role::Human { "human" } else { "gpt" };
        record["conversations"] = turns.iter().map(|turn| json!({"from": from(turn), "value": text(turn)})).collect();
    }
    Ok(record)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Content, ImageSource, record::parse_records};

    #[test]
    fn what_is_saved_is_read_back() {
        let (one, two) = (Path::new("/p/one.png"), Path::new("/p/two.png"));
        let talk = [
            Turn::human("What?\n  And \"why\"?", 1),
            Turn::assistant("A bus."),
            Turn::human("", 2),
            Turn::assistant(""),
            Turn::human("Größe", 0),
            Turn::assistant("x"),
        ];
        for (turns, images) in [(&talk[..2], &[one][..]), (&talk[4..], &[]), (&talk[..], &[one, two, one])] {
            for system in [None, Some("Be kind.")] {
                let json = json!([record(system, turns, images).unwrap()]).to_string();
                let read = parse_records(json.as_bytes(), "f", Path::new("/other"), None).unwrap().remove(0);
                assert_eq!(read.content, Content::Conversation(turns.to_vec()));
                let files: Vec<ImageSource> = images.iter().map(|path| ImageSource::File(path.into())).collect();
                assert_eq!((read.images, read.system.as_deref()), (files, system));
                assert_eq!(read.repairs, Default::default());
            }
        }
        let literal = [Turn::human("q", 1), Turn::assistant("<image>")];
        assert!(record(None, &literal, &[one]).is_err());
    }

    #[test]
    fn nothing_is_written_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        let turns = [Turn::human("q", 0), Turn::assistant("a")];
        assert!(save(&path, None, &[], &[]).is_err());
        save(&path, None, &turns, &[]).unwrap();
        let before = std::fs::read(&path).unwrap();
        let error = save(&path, Some("other"), &turns, &[]).unwrap_err();
        assert!(error.message.ends_with("a.json is there already"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), before);
        assert!(save(&folder.path().join("none/a.json"), None, &turns, &[]).is_err());
        assert!(save(folder.path(), None, &turns, &[]).is_err());
    }
}
