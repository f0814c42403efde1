//! Chat templates against transformers' own rendering (tools/golden_chat_templates.py), and the spans of answers.

use std::path::Path;

use serde_json::{Map, Value, json};
use wgpu_llava::{
    data::{
        chat_template::ChatTemplate,
        record::Turn,
        template::{Labels, Part},
    },
    error::ErrorKind,
};

fn golden() -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chat/templates.json");
    let file: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    file["templates"].as_array().unwrap().clone()
}

fn template(name: &str) -> ChatTemplate {
    let golden = golden();
    let entry = golden.iter().find(|entry| entry["name"] == name).unwrap();
    open(name, entry["template"].as_str().unwrap(), &entry["tokens"])
}

fn open(name: &str, source: &str, tokens: &Value) -> ChatTemplate {
    ChatTemplate::new(name, source, tokens.as_object().unwrap()).unwrap()
}

/// Parts as one string: `{...}` round what is learned, `@` for a picture.
fn shown(parts: &[Part]) -> String {
    let one = |part: &Part| match part {
        Part::Image => "@".to_owned(),
        Part::Text { text, labels: Labels::Ignore } => text.clone(),
        Part::Text { text, .. } => format!("{{{text}}}"),
    };
    parts.iter().map(one).collect()
}

fn talk() -> Vec<Turn> {
    vec![Turn::human("q", 1), Turn::assistant("a"), Turn::human("r", 0), Turn::assistant("b")]
}

#[test]
fn texts_are_those_of_transformers() {
    let mut compared = 0;
    for entry in golden() {
        let name = entry["name"].as_str().unwrap();
        let template = template(name);
        for case in entry["cases"].as_array().unwrap() {
            let messages = case["messages"].as_array().unwrap();
            let rendered = template.render(messages, case["add_generation_prompt"].as_bool().unwrap());
            match case.get("error") {
                Some(error) => {
                    let found = rendered.unwrap_err();
                    assert_eq!(found.kind, ErrorKind::Data);
                    assert!(found.message.ends_with(error.as_str().unwrap()), "{name}: {found}");
                    assert!(found.message.starts_with(&format!("the chat template of {name}")), "{found}");
                }
                None => assert_eq!(rendered.unwrap(), case["text"], "{name}: {messages:?}"),
            }
            compared += 1;
        }
    }
    assert!(compared >= 40, "{compared}");
}

#[test]
fn answers_are_found_where_the_template_marks_them() {
    let golden = golden();
    let entry = golden.iter().find(|entry| entry["name"] == "llava").unwrap();
    let case = entry["cases"].as_array().unwrap().iter().find(|case| case.get("generation").is_some()).unwrap();
    let rendered = template("llava").render_with_spans(case["messages"].as_array().unwrap()).unwrap();
    // The space after `ASSISTANT:` is generated too, but stands before the tag.
    let spans: Vec<[usize; 2]> = rendered.assistant.iter().map(|span| [span.start + 1, span.end]).collect();
    assert_eq!(json!(spans), case["generation"]);
}

#[test]
fn only_answers_and_what_ends_them_are_learned() {
    let trained = |name: &str, system| shown(&template(name).training(&talk(), system, true).unwrap());
    assert_eq!(
        trained("chatml", Some("S")),
        "system\nS<|im_end|>\n<|im_start|>user\n@\nq<|im_end|>\n<|im_start|>assistant\n{a<|im_end|>}\n\
         <|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n{b<|im_end|>}\n"
    );
    assert_eq!(
        trained("llama_2", Some("S")),
        "[INST] <<SYS>>\nS\n<</SYS>>\n\n@\nq [/INST]{ a </s>}<s>[INST] r [/INST]{ b </s>}"
    );
    assert_eq!(trained("mistral", None), "[INST] @\nq [/INST]{ a</s>}[INST] r [/INST]{ b</s>}");
    assert_eq!(trained("llava", None), "USER: @\nq ASSISTANT:{ a }USER: r ASSISTANT:{ b }");
    let llama_3 = trained("llama_3", None);
    assert!(llama_3.starts_with("<|start_header_id|>system"), "{llama_3}");
    assert!(llama_3.ends_with("<|start_header_id|>assistant<|end_header_id|>\n\n{b<|eot_id|>}"), "{llama_3}");

    let prompt = shown(&template("llava").prompt(&talk()[..3], None, false).unwrap());
    assert_eq!(prompt, "USER: @\nq ASSISTANT: a USER: r ASSISTANT:");
    let with_bos = shown(&template("mistral").prompt(&talk()[..1], None, false).unwrap());
    assert_eq!(with_bos, "<s>[INST] @\nq [/INST]");
}

#[test]
fn a_literal_placeholder_in_a_text_stays_text() {
    let turns = [Turn::human("say <image>", 1), Turn::assistant("<image>")];
    for name in ["llava", "chatml"] {
        let parts = template(name).training(&turns, None, false).unwrap();
        assert_eq!(parts.iter().filter(|part| **part == Part::Image).count(), 1, "{name}");
        assert!(shown(&parts).contains("@\nsay <image>"), "{name}: {}", shown(&parts));
    }
}

#[test]
fn a_template_that_rewrites_the_past_is_refused_for_training() {
    let turns = [Turn::human("q", 0), Turn::assistant("x</think>a"), Turn::human("r", 0), Turn::assistant("b")];
    let error = template("forgetful").training(&turns, None, false).unwrap_err();
    assert!(error.message.contains("the chat template of forgetful") && error.message.contains("answer 1"), "{error}");
    assert!(template("forgetful").prompt(&turns[..3], None, false).is_ok());
}

#[test]
fn templates_are_found_in_folders() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, value: &Value| std::fs::write(folder.path().join(name), value.to_string()).unwrap();
    assert!(ChatTemplate::from_folder(folder.path()).unwrap().is_none());
    let hello = [json!({"role": "user", "content": "x"})];
    let rendered = || ChatTemplate::from_folder(folder.path()).unwrap().unwrap().render(&hello, false).unwrap();
    write("tokenizer_config.json", &json!({"chat_template": "{{ bos_token }}plain", "bos_token": {"content": "<b>"}}));
    assert_eq!(rendered(), "<b>plain");
    let list =
        json!([{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ eos_token }}default"}]);
    write("tokenizer_config.json", &json!({"chat_template": list}));
    write("special_tokens_map.json", &json!({"eos_token": "<e>"}));
    assert_eq!(rendered(), "<e>default");
    write("chat_template.json", &json!({"chat_template": "processor"}));
    assert_eq!(rendered(), "processor");
    std::fs::write(folder.path().join("chat_template.jinja"), "  {% if true %}\njinja\n{% endif %}\n").unwrap();
    assert_eq!(rendered(), "jinja\n");
}

#[test]
fn faults_and_endless_templates_are_errors() {
    let none = Map::new();
    let error = ChatTemplate::new("m", "a\n{% if %}", &none).err().unwrap();
    assert!(error.message.contains("the chat template of m, line 2"), "{error}");
    let empty = |source: &str| ChatTemplate::new("m", source, &none).unwrap().render(&[], false).unwrap_err();
    assert!(empty("{{ messages[0].role.x }}").message.starts_with("the chat template of m"));
    let endless = ["{% for a in range(9999) %}"; 3].concat() + "{{ a }}" + &["{% endfor %}"; 3].concat();
    assert_eq!(empty(&endless).kind, ErrorKind::Data);
    assert_eq!(empty("{{ 'x' * 100000000000 }}").kind, ErrorKind::Data);
    let list = json!([{"name": "rag", "template": "x"}]);
    assert!(ChatTemplate::from_config("m", &list, &none).err().unwrap().message.contains("(it has: rag)"));
}
