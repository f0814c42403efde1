//! What is in the program itself: the tiny base model, and the easy-VQA data set.

mod easy_vqa;

pub use easy_vqa::{EasyVqa, Question, Split, easy_vqa, records};

use crate::{
    error::{Error, Result, nearest},
    formats::model_folder::{FileBytes, ModelFolder},
};

/// Before the name of what is embedded.
pub const PREFIX: &str = "embedded:";
const MODELS: [&str; 1] = ["tiny"];

macro_rules! files {
    ($folder:literal: $($name:literal),+) => {
        [$(($name, include_bytes!(concat!("../../assets/", $folder, "/", $name)).as_slice())),+]
    };
}

static TINY: [(&str, &[u8]); 6] = files!("tiny":
    "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json",
    "tokenizer_config.json"
);

/// An embedded model; `embedded:` may stand before its name. It may lack a projector.
///
/// # Errors
/// `Usage`: there is none of that name.
pub fn model(name: &str) -> Result<ModelFolder> {
    let short = name.strip_prefix(PREFIX).unwrap_or(name);
    if short != "tiny" {
        return Err(unknown("model", name, &MODELS));
    }
    let file = |&(name, bytes): &(&'static str, &'static [u8])| (name.to_owned(), FileBytes::Borrowed(bytes));
    ModelFolder::in_memory("embedded:tiny", TINY.iter().map(file))
}

fn unknown(what: &str, name: &str, known: &[&str]) -> Error {
    let near = nearest(name.strip_prefix(PREFIX).unwrap_or(name), known.iter().copied()).unwrap_or_default();
    Error::usage(format!("there is no embedded {what} `{name}`")).hint(format!("there is `{PREFIX}{near}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tiny_model_opens_and_others_are_refused() {
        for name in ["tiny", "embedded:tiny"] {
            assert!(model(name).unwrap().config().llava().is_some());
        }
        assert!(model("embedded:tyni").err().unwrap().hints[0].contains("embedded:tiny"));
    }
}
