//! Prompt templates: how turns become text, and which of that text is learned.
//!
//! A template gives [`Part`]s, not a string: what is supervised is known where it is written, so no mask is ever
//! found again by searching or by counting tokens. Layouts follow LLaVA's conversation templates.

use super::{
    IMAGE_PLACEHOLDER,
    record::{Role, Turn},
};
use crate::error::{Error, Result, nearest};

/// Which tokens of a text are supervised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Labels {
    /// None.
    Ignore,
    /// All.
    Learn,
    /// The first n that begin in the text.
    LearnFirst(usize),
}

/// A piece of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    Text { text: String, labels: Labels },
    Image,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// Picture and caption, nothing else.
    Plain,
    /// `SYSTEM###Human: q###Assistant: a###` when asked, `### Human: q\n### Assistant: a\n### ` when trained.
    Single,
    /// `SYSTEM USER: q ASSISTANT: a</s>USER: ...`
    Two,
    /// `[INST] <<SYS>>\nSYSTEM\n<</SYS>>\n\nq [/INST] a </s>`, with this between the rounds.
    Llama2 { between: &'static str },
    /// `<|im_start|>user\nq<|im_end|>...`
    Chatml,
}

/// A named prompt template.
#[derive(Debug, PartialEq, Eq)]
pub struct Template {
    pub name: &'static str,
    /// Other names of the same template.
    pub aliases: &'static [&'static str],
    /// The system text used where nobody gives another.
    pub system: &'static str,
    layout: Layout,
    /// Pictures stand between `<Image>` and `</Image>`.
    tagged: bool,
}

macro_rules! opening {
    ($person:literal) => {
        concat!(
            "A chat between a curious ",
            $person,
            " and an artificial intelligence assistant. ",
            "The assistant gives helpful, detailed, and polite answers to the ",
            $person,
            "'s questions."
        )
    };
}

macro_rules! tagged_opening {
    ($person:literal) => {
        concat!(
            "A chat between a curious ",
            $person,
            " and an artificial intelligence assistant. ",
            "The assistant is able to understand the visual content that the ",
            $person,
            " provides, and assist the ",
            $person,
            " with a variety of tasks using natural language.",
            "The visual content will be provided with the following format: <Image>visual content</Image>."
        )
    };
}

const LLAMA_2_SYSTEM: &str = "You are a helpful, respectful and honest assistant. Always answer as helpfully as \
    possible, while being safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, \
    dangerous, or illegal content. Please ensure that your responses are socially unbiased and positive in nature.\n\n\
    If a question does not make any sense, or is not factually coherent, explain why instead of answering something \
    not correct. If you don't know the answer to a question, please don't share false information.";

const LLAVA_LLAMA_2_SYSTEM: &str = "You are a helpful language and vision assistant. You are able to understand the \
    visual content that the user provides, and assist the user with a variety of tasks using natural language.";

const MPT_SYSTEM: &str = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful \
    and honest answers.";

const fn template(
    name: &'static str,
    aliases: &'static [&'static str],
    layout: Layout,
    system: &'static str,
) -> Template {
    Template { name, aliases, system, layout, tagged: false }
}

static TEMPLATES: [Template; 11] = [
    template("plain", &["v0_plain"], Layout::Plain, ""),
    template("v0", &["default", "llava_v0"], Layout::Single, opening!("human")),
    template("v1", &["vicuna_v1"], Layout::Two, opening!("user")),
    template("llava_v1", &[], Layout::Two, opening!("human")),
    Template { tagged: true, ..template("v0_mmtag", &[], Layout::Single, tagged_opening!("human")) },
    Template { tagged: true, ..template("v1_mmtag", &[], Layout::Two, tagged_opening!("user")) },
    template("llama_2", &[], Layout::Llama2 { between: "<s>" }, LLAMA_2_SYSTEM),
    template("llava_llama_2", &[], Layout::Llama2 { between: "<s>" }, LLAVA_LLAMA_2_SYSTEM),
    template("mistral_instruct", &[], Layout::Llama2 { between: "" }, ""),
    template("mpt", &[], Layout::Chatml, MPT_SYSTEM),
    template("chatml_direct", &[], Layout::Chatml, "Answer the questions."),
];

impl Template {
    /// The template of a name or an alias; an unknown one is a Usage error with the nearest known name.
    pub fn named(name: &str) -> Result<&'static Self> {
        let found = TEMPLATES.iter().find(|template| template.name == name || template.aliases.contains(&name));
        found.ok_or_else(|| {
            let error = Error::usage(format!("unknown template {name:?}"));
            let error = match nearest(name, Self::names()) {
                Some(near) => error.hint(format!("did you mean `{near}`?")),
                None => error,
            };
            let names = Self::names().collect::<Vec<_>>().join(", ");
            error.hint(format!("known templates: {names}; and `chat`, the model's own"))
        })
    }

    /// Every name, aliases included.
    pub fn names() -> impl Iterator<Item = &'static str> {
        TEMPLATES.iter().flat_map(|template| std::iter::once(template.name).chain(template.aliases.iter().copied()))
    }

    /// True for `plain`, which takes the first turn's pictures and the first answer only.
    pub fn is_plain(&self) -> bool {
        self.layout == Layout::Plain
    }

    /// The text that ends an answer; where it is a single token of the vocabulary, generation stops at it.
    pub fn stop(&self) -> &'static str {
        match self.layout {
            Layout::Plain => "\n",
            Layout::Single => "###",
            Layout::Two | Layout::Llama2 { .. } => "</s>",
            Layout::Chatml => "<|im_end|>",
        }
    }

    /// Turns for training: human first, by turns, an answer last. `system` replaces the template's own text; an empty
    /// one leaves it out.
    pub fn training(&self, turns: &[Turn], system: Option<&str>) -> Vec<Part> {
        self.layout(turns, system, true)
    }

    /// Turns for asking: the last one is a human's, and the assistant's is left open after it.
    pub fn prompt(&self, turns: &[Turn], system: Option<&str>) -> Vec<Part> {
        self.layout(turns, system, false)
    }

    /// The same as a chat template for transformers, so that a model trained with this one is asked alike there; none
    /// for `plain` and for `v0`, which is trained on another text than it is asked with.
    /// `with_bos`: the template writes the BOS itself.
    pub fn jinja(&self, with_bos: bool) -> Option<String> {
        let (form, between) = match self.layout {
            Layout::Plain | Layout::Single => return None,
            Layout::Two => (include_str!("chat_templates/two.jinja"), ""),
            Layout::Llama2 { between } => (include_str!("chat_templates/llama_2.jinja"), between),
            Layout::Chatml => (include_str!("chat_templates/chatml.jinja"), ""),
        };
        let picture = if self.tagged { "<Image><image></Image>" } else { IMAGE_PLACEHOLDER };
        let system = serde_json::Value::from(self.system).to_string();
        let said = include_str!("chat_templates/said.jinja").replace("SYSTEM", &system).replace("PICTURE", picture);
        let bos = if with_bos { "{{- bos_token -}}\n" } else { "" };
        Some(said + bos + &form.replace("BETWEEN", between))
    }

    fn layout(&self, turns: &[Turn], system: Option<&str>, training: bool) -> Vec<Part> {
        let mut parts = Parts { parts: Vec::new(), tagged: self.tagged };
        let system = system.unwrap_or(self.system);
        match self.layout {
            Layout::Plain => plain(&mut parts, turns, training),
            Layout::Single if training => single_trained(&mut parts, turns, system),
            Layout::Single => single(&mut parts, turns, system),
            Layout::Two => two(&mut parts, turns, system),
            Layout::Llama2 { between } => llama_2(&mut parts, turns, system, between),
            Layout::Chatml => chatml(&mut parts, turns, system),
        }
        if !training {
            // Nothing is learned from a prompt; and a prompt that an answer would follow ends with the open role.
            for part in &mut parts.parts {
                if let Part::Text { labels, .. } = part {
                    *labels = Labels::Ignore;
                }
            }
        }
        parts.parts
    }
}

fn plain(parts: &mut Parts, turns: &[Turn], training: bool) {
    let Some(first) = turns.first() else { return };
    if !training {
        return parts.turn(first, Labels::Ignore);
    }
    (0..first.images).for_each(|_| parts.image());
    if let Some(answer) = turns.iter().find(|turn| turn.role == Role::Assistant) {
        parts.text(&answer.text, Labels::Learn);
        parts.text("\n", Labels::Learn);
    }
}

/// The string LLaVA trains `v0` on; the mark of the next human turn (two tokens of it) ends an answer.
fn single_trained(parts: &mut Parts, turns: &[Turn], system: &str) {
    parts.text(system, Labels::Ignore);
    parts.text("\n\n", Labels::Ignore);
    for turn in turns {
        let (opening, first, rest) = match turn.role {
            Role::Human => ("### Human: ", Labels::LearnFirst(2), Labels::Ignore),
            Role::Assistant => ("### Assistant: ", Labels::Learn, Labels::Learn),
        };
        parts.text(opening, first);
        parts.turn(turn, rest);
        parts.text("\n", rest);
    }
    parts.text("### ", Labels::Learn);
}

fn single(parts: &mut Parts, turns: &[Turn], system: &str) {
    if !system.is_empty() {
        parts.text(system, Labels::Ignore);
        parts.text("###", Labels::Ignore);
    }
    for turn in turns {
        parts.text(if turn.role == Role::Human { "Human: " } else { "Assistant: " }, Labels::Ignore);
        parts.turn(turn, Labels::Ignore);
        parts.text("###", Labels::Ignore);
    }
    parts.text("Assistant:", Labels::Ignore);
}

/// The space after `ASSISTANT:` belongs to the answer: its first token holds it.
fn two(parts: &mut Parts, turns: &[Turn], system: &str) {
    if !system.is_empty() {
        parts.text(system, Labels::Ignore);
        parts.text(" ", Labels::Ignore);
    }
    for turn in turns {
        match turn.role {
            Role::Human => {
                parts.text("USER: ", Labels::Ignore);
                parts.turn(turn, Labels::Ignore);
                parts.text(" ASSISTANT:", Labels::Ignore);
            }
            Role::Assistant => {
                parts.answer(turn);
                parts.text("</s>", Labels::Learn);
            }
        }
    }
}

fn llama_2(parts: &mut Parts, turns: &[Turn], system: &str, between: &str) {
    for (index, turn) in turns.iter().enumerate() {
        match turn.role {
            Role::Human => {
                if index > 0 {
                    parts.text(between, Labels::Ignore);
                }
                parts.text("[INST] ", Labels::Ignore);
                if index == 0 && !system.is_empty() {
                    parts.text(&format!("<<SYS>>\n{system}\n<</SYS>>\n\n"), Labels::Ignore);
                }
                parts.turn(turn, Labels::Ignore);
                parts.text(" [/INST]", Labels::Ignore);
            }
            Role::Assistant => {
                parts.answer(turn);
                parts.text(" </s>", Labels::Learn);
            }
        }
    }
}

fn chatml(parts: &mut Parts, turns: &[Turn], system: &str) {
    if !system.is_empty() {
        parts.text(&format!("<|im_start|>system\n{system}<|im_end|>"), Labels::Ignore);
    }
    for turn in turns {
        match turn.role {
            Role::Human => {
                parts.text("<|im_start|>user\n", Labels::Ignore);
                parts.turn(turn, Labels::Ignore);
                parts.text("<|im_end|><|im_start|>assistant\n", Labels::Ignore);
            }
            Role::Assistant => {
                parts.turn(turn, Labels::Learn);
                parts.text("<|im_end|>", Labels::Learn);
            }
        }
    }
}

/// Gathers parts, joining texts of one kind.
struct Parts {
    parts: Vec<Part>,
    tagged: bool,
}

impl Parts {
    fn text(&mut self, text: &str, labels: Labels) {
        match self.parts.last_mut() {
            _ if text.is_empty() => {}
            // A counted part begins anew each time, so it is never joined.
            Some(Part::Text { text: last, labels: kind }) if *kind == labels && labels != Labels::LearnFirst(2) => {
                last.push_str(text);
            }
            _ => self.parts.push(Part::Text { text: text.to_owned(), labels }),
        }
    }

    fn image(&mut self) {
        self.parts.push(Part::Image);
    }

    /// Pictures, each with a newline after it, then the text; no newline when there is no text.
    fn turn(&mut self, turn: &Turn, labels: Labels) {
        for index in 0..turn.images {
            self.text(if self.tagged { "<Image>" } else { "" }, labels);
            self.image();
            self.text(if self.tagged { "</Image>" } else { "" }, labels);
            if index + 1 < turn.images || !turn.text.is_empty() {
                self.text("\n", labels);
            }
        }
        self.text(&turn.text, labels);
    }

    /// An answer with the space before it; an empty answer has none.
    fn answer(&mut self, turn: &Turn) {
        if !turn.text.is_empty() || turn.images > 0 {
            self.text(" ", Labels::Learn);
        }
        self.turn(turn, Labels::Learn);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::chat_template::ChatTemplate;

    /// Parts as one string: `{...}` round what is learned, `@` for a picture.
    fn shown(parts: &[Part]) -> String {
        parts
            .iter()
            .map(|part| match part {
                Part::Image => "@".to_owned(),
                Part::Text { text, labels: Labels::Ignore } => text.clone(),
                Part::Text { text, labels: Labels::Learn } => format!("{{{text}}}"),
                Part::Text { text, labels: Labels::LearnFirst(n) } => format!("{{{n}:{text}}}"),
            })
            .collect()
    }

    fn talk() -> Vec<Turn> {
        vec![Turn::human("q", 1), Turn::assistant("a"), Turn::human("q2", 0), Turn::assistant("a2")]
    }

    fn trained(name: &str) -> String {
        shown(&Template::named(name).unwrap().training(&talk(), Some("S")))
    }

    #[test]
    fn layouts_are_as_documented() {
        assert_eq!(trained("plain"), "@{a\n}");
        assert_eq!(trained("v1"), "S USER: @\nq ASSISTANT:{ a</s>}USER: q2 ASSISTANT:{ a2</s>}");
        assert_eq!(
            trained("llava_llama_2"),
            "[INST] <<SYS>>\nS\n<</SYS>>\n\n@\nq [/INST]{ a </s>}<s>[INST] q2 [/INST]{ a2 </s>}"
        );
        assert_eq!(
            shown(&Template::named("mistral_instruct").unwrap().training(&talk(), None)),
            "[INST] @\nq [/INST]{ a </s>}[INST] q2 [/INST]{ a2 </s>}"
        );
        assert_eq!(
            trained("mpt"),
            "<|im_start|>system\nS<|im_end|><|im_start|>user\n@\nq<|im_end|><|im_start|>assistant\n{a<|im_end|>}\
             <|im_start|>user\nq2<|im_end|><|im_start|>assistant\n{a2<|im_end|>}"
        );
        assert_eq!(
            trained("v0"),
            "S\n\n{2:### Human: }@\nq\n{### Assistant: a\n}{2:### Human: }q2\n{### Assistant: a2\n### }"
        );
        assert_eq!(trained("v1_mmtag").replace("S USER: ", ""), trained("v1").replace("S USER: @", "<Image>@</Image>"));
    }

    #[test]
    fn prompts_leave_the_answer_open() {
        let asked = |name: &str, system| shown(&Template::named(name).unwrap().prompt(&talk()[..3], system));
        assert_eq!(asked("v1", Some("S")), "S USER: @\nq ASSISTANT: a</s>USER: q2 ASSISTANT:");
        assert_eq!(asked("v1", Some("")), "USER: @\nq ASSISTANT: a</s>USER: q2 ASSISTANT:");
        assert!(asked("vicuna_v1", None).starts_with("A chat between a curious user and an artificial"));
        assert!(
            asked("llava_v1", None).ends_with("the human's questions. USER: @\nq ASSISTANT: a</s>USER: q2 ASSISTANT:")
        );
        assert_eq!(asked("v0", Some("S")), "S###Human: @\nq###Assistant: a###Human: q2###Assistant:");
        assert_eq!(asked("mistral_instruct", None), "[INST] @\nq [/INST] a </s>[INST] q2 [/INST]");
        assert!(asked("chatml_direct", None).ends_with("<|im_start|>assistant\n"));
        assert_eq!(shown(&Template::named("plain").unwrap().prompt(&[Turn::human("", 1)], None)), "@");
    }

    #[test]
    fn an_empty_answer_is_only_its_end() {
        let parts = Template::named("v1").unwrap().training(&[Turn::human("q", 0), Turn::assistant("")], Some(""));
        assert_eq!(shown(&parts), "USER: q ASSISTANT:{</s>}");
    }

    /// As text, `<image>` for a picture.
    fn text(parts: &[Part]) -> String {
        let text = |part: &Part| match part {
            Part::Image => IMAGE_PLACEHOLDER.to_owned(),
            Part::Text { text, .. } => text.clone(),
        };
        parts.iter().map(text).collect()
    }

    #[test]
    fn chat_templates_ask_and_answer_alike() {
        let config = serde_json::Map::new();
        let mut written = 0;
        for template in &TEMPLATES {
            let Some(source) = template.jinja(false) else { continue };
            let chat = |source: &str, config| ChatTemplate::new(template.name, source, config).unwrap();
            let jinja = chat(&source, &config);
            let bos = serde_json::Map::from_iter([("bos_token".to_owned(), "<s>".into())]);
            let with_bos = text(&chat(&template.jinja(true).unwrap(), &bos).prompt(&talk()[..3], None).unwrap());
            assert_eq!(with_bos, format!("<s>{}", text(&template.prompt(&talk()[..3], None))));
            for system in [None, Some("Be \"brief\".")] {
                let asked = text(&template.prompt(&talk()[..3], system));
                assert_eq!(text(&jinja.prompt(&talk()[..3], system).unwrap()), asked, "{}", template.name);
                let trained = text(&template.training(&talk(), system));
                assert_eq!(text(&jinja.training(&talk(), system).unwrap()), trained, "{}", template.name);
            }
            written += 1;
        }
        assert_eq!(written, 8);
    }

    #[test]
    fn unknown_names_are_usage_errors() {
        let error = Template::named("lava_v1").unwrap_err();
        assert_eq!(error.kind, crate::error::ErrorKind::Usage);
        assert_eq!(error.hints[0], "did you mean `llava_v1`?");
    }
}
