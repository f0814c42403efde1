//! Module paths by regular expressions, as PEFT takes them: Python's, with look-around, against a whole path.

use fancy_regex::{Error, Regex};

/// An expression that a whole module path matches, or its end from a dot on.
#[derive(Clone, Debug)]
pub struct Pattern {
    text: String,
    regex: Regex,
}

impl Pattern {
    /// `re.fullmatch(text, path)`: PEFT's target_modules.
    ///
    /// # Errors
    /// Not a regular expression.
    pub fn whole(text: &str) -> Result<Self, Box<Error>> {
        Self::compile(text, "")
    }

    /// `re.match(rf"(.*\.)?({text})$", path)`: PEFT's rank_pattern and alpha_pattern.
    ///
    /// # Errors
    /// As [`Pattern::whole`].
    pub fn end(text: &str) -> Result<Self, Box<Error>> {
        Self::compile(text, r"(?:.*\.)?")
    }

    fn compile(text: &str, before: &str) -> Result<Self, Box<Error>> {
        // Alone first: `a)|(b` must not close the group that is put around it.
        Regex::new(text)?;
        Ok(Self { text: text.to_owned(), regex: Regex::new(&format!(r"\A{before}(?:{text})\z"))? })
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    /// # Errors
    /// Trying all ways to match takes too long.
    pub fn matches(&self, path: &str) -> Result<bool, Box<Error>> {
        Ok(self.regex.is_match(path)?)
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Python 3.13's re.fullmatch says.
    #[test]
    fn matches_as_pythons_fullmatch() {
        let path = "model.language_model.layers.1.self_attn.q_proj";
        for (text, expected) in [
            (r"model\.language_model\.layers\.\d+\.self_attn\.(q|v)_proj", true),
            ("q_proj", false),
            (".*q_proj", true),
            (".*q_pro", false),
            // Alternatives do not escape the whole.
            ("model|.*v_proj", false),
            (".*v_proj|.*q_proj", true),
            // A first alternative that matches a part does not hide the second, which matches all.
            ("model|model.*", true),
            ("(?!.*vision_tower).*(?:q_proj|v_proj)", true),
            ("(?!.*language_model).*q_proj", false),
            (r".*(?<=self_attn\.)q_proj", true),
            (r".*(l)ayers.*\1anguage.*", false),
            (r".*(l)anguage.*\1ayers.*", true),
            ("^(?i:MODEL).*proj$", true),
        ] {
            assert_eq!(Pattern::whole(text).unwrap().matches(path).unwrap(), expected, "{text}");
        }
        for broken in ["(", "a)|(b", "*a", "[z-a]"] {
            assert!(Pattern::whole(broken).is_err(), "{broken}");
        }
    }

    #[test]
    fn ends_match_from_a_dot_on() {
        let path = "layers.1.mlp.up_proj";
        for (text, expected) in
            [("up_proj", true), ("mlp.up_proj", true), ("p_proj", false), (path, true), ("mlp", false), (r"\d.*", true)]
        {
            assert_eq!(Pattern::end(text).unwrap().matches(path).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn a_pattern_without_end_is_an_error() {
        let endless = Pattern::whole(r"((a*)*)*(?=x)\2b").unwrap();
        assert!(endless.matches(&"a".repeat(200)).is_err());
    }
}
