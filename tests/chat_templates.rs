//! Chat templates against transformers' own rendering (tools/golden_chat_templates.py), and the spans of answers.

mod common;

use std::{collections::BTreeMap, path::Path, sync::Arc};

use serde_json::{Map, Value, json};
use wgpu_llava::{
    data::{
        Content, Encoder, Tokenizer, Version,
        chat_template::ChatTemplate,
        gguf_tokenizer::GgufVocabulary,
        record::{Turn, parse_records},
        template::{Labels, Part},
    },
    error::{ErrorKind, Result},
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
    let trained = |name: &str, system| shown(&template(name).training(&talk(), system).unwrap());
    assert_eq!(
        trained("chatml", Some("S")),
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n@\nq<|im_end|>\n<|im_start|>assistant\n{a<|im_end|>}\n\
         <|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n{b<|im_end|>}\n"
    );
    assert_eq!(
        trained("llama_2", Some("S")),
        "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\n@\nq [/INST]{ a </s>}<s>[INST] r [/INST]{ b </s>}"
    );
    assert_eq!(trained("mistral", None), "<s>[INST] @\nq [/INST]{ a</s>}[INST] r [/INST]{ b</s>}");
    assert_eq!(trained("llava", None), "USER: @\nq ASSISTANT:{ a }USER: r ASSISTANT:{ b }");
    let llama_3 = trained("llama_3", None);
    assert!(llama_3.starts_with("<|begin_of_text|><|start_header_id|>system"), "{llama_3}");
    assert!(llama_3.ends_with("<|start_header_id|>assistant<|end_header_id|>\n\n{b<|eot_id|>}"), "{llama_3}");

    let prompt = shown(&template("llava").prompt(&talk()[..3], None).unwrap());
    assert_eq!(prompt, "USER: @\nq ASSISTANT: a USER: r ASSISTANT:");
    let with_bos = shown(&template("mistral").prompt(&talk()[..1], None).unwrap());
    assert_eq!(with_bos, "<s>[INST] @\nq [/INST]");
}

#[test]
fn a_literal_placeholder_in_a_text_stays_text() {
    let turns = [Turn::human("say <image>", 1), Turn::assistant("<image>")];
    for name in ["llava", "chatml"] {
        let parts = template(name).training(&turns, None).unwrap();
        assert_eq!(parts.iter().filter(|part| **part == Part::Image).count(), 1, "{name}");
        assert!(shown(&parts).contains("@\nsay <image>"), "{name}: {}", shown(&parts));
    }
}

#[test]
fn a_template_that_rewrites_the_past_is_refused_for_training() {
    let turns = [Turn::human("q", 0), Turn::assistant("x</think>a"), Turn::human("r", 0), Turn::assistant("b")];
    let error = template("forgetful").training(&turns, None).unwrap_err();
    assert!(error.message.contains("the chat template of forgetful") && error.message.contains("answer 1"), "{error}");
    assert!(template("forgetful").prompt(&turns[..3], None).is_ok());
}

#[test]
fn templates_are_found_in_folders() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, value: &Value| std::fs::write(folder.path().join(name), value.to_string()).unwrap();
    let read = |name: &str| Ok(std::fs::read(folder.path().join(name)).ok().map(Into::into));
    assert!(ChatTemplate::from_files("m", &read).unwrap().is_none());
    let hello = [json!({"role": "user", "content": "x"})];
    let rendered = || ChatTemplate::from_files("m", &read).unwrap().unwrap().render(&hello, false).unwrap();
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

/// The files of a model that has this template and nothing else.
fn open_version(case: &Value, tokenizer: &Tokenizer) -> Result<Version> {
    let mut config = case["tokens"].clone();
    config["chat_template"] = case["source"].clone();
    let read = |name: &str| Ok((name == "tokenizer_config.json").then(|| config.to_string().into_bytes().into()));
    Version::open("chat", "m", &read, tokenizer)
}

fn tokenizer(name: &str, tokens: &Value) -> Tokenizer {
    if name != "smollm" {
        return Tokenizer::from_folder(&common::golden("parity").join(name).join("model")).unwrap();
    }
    let file = common::read_json(&common::golden("built_tokenizers/smollm.json"));
    let vocabulary = &file["vocabulary"];
    let texts = |key: &str| serde_json::from_value(vocabulary[key].clone()).unwrap();
    let ends_with = |id: &usize| vocabulary["tokens"][id] == tokens["eos_token"];
    let vocabulary = GgufVocabulary {
        name: "m.gguf".to_owned(),
        model: "gpt2".to_owned(),
        pre: Some("smollm".to_owned()),
        tokens: texts("tokens"),
        scores: Vec::new(),
        token_types: serde_json::from_value(vocabulary["token_types"].clone()).unwrap(),
        merges: texts("merges"),
        bos_token_id: Some(1),
        eos_token_id: (0..3).find(ends_with).map(|id| id as _),
        unknown_token_id: None,
        padding_token_id: None,
        add_bos_token: Some(false),
        add_eos_token: None,
        add_space_prefix: Some(false),
        chat_template: None,
        legacy: None,
    };
    vocabulary.tokenizer().unwrap()
}

fn ids(value: &Value) -> Vec<i32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn ids_and_labels_are_those_of_transformers() {
    let file = common::read_json(&common::golden("chat/tokens.json"));
    let mut compared = BTreeMap::new();
    for case in file["cases"].as_array().unwrap() {
        let (name, template) = (case["tokenizer"].as_str().unwrap(), case["template"].as_str().unwrap());
        let tokenizer = Arc::new(tokenizer(name, &case["tokens"]));
        let version = open_version(case, &tokenizer).unwrap();
        let image_tokens = if case["sees"] == true { 4 } else { 0 };
        let encoder = Encoder { tokenizer, version, system: None, image_tokens, max_length: None };
        let record = case["record"].to_string();
        let record = parse_records(record.as_bytes(), "test", Path::new(""), None).unwrap().remove(0);
        let sample = encoder.encode(&record).unwrap();
        assert_eq!(sample.tokens, ids(&case["ids"]), "{name} {template} {}", case["record"]);
        assert_eq!(sample.labels, ids(&case["labels"]), "{name} {template} {}", case["record"]);
        let Content::Conversation(turns) = &record.content else { panic!("{template}") };
        let encoder = Encoder { system: record.system.clone(), ..encoder };
        assert_eq!(encoder.prompt(&turns[..turns.len() - 1]).unwrap(), ids(&case["prompt"]), "{name} {template}");
        *compared.entry(template.to_owned()).or_insert(0) += 1;
    }
    assert!(compared.len() == 8 && compared.values().all(|&count| count >= 2), "{compared:?}");
}

#[test]
fn a_conversation_may_end_otherwise_than_an_answer() {
    let file = common::read_json(&common::golden("chat/tokens.json"));
    let cases = file["cases"].as_array().unwrap();
    let end = |template: &str, eos: &str| {
        let case =
            cases.iter().find(|case| case["template"] == template && case["tokens"]["eos_token"] == eos).unwrap();
        let tokenizer = tokenizer(case["tokenizer"].as_str().unwrap(), &case["tokens"]);
        open_version(case, &tokenizer).unwrap().stop().to_owned()
    };
    assert_eq!(end("two_ends", "<|endoftext|>"), "<|im_end|>");
    assert_eq!(end("chatml", "<|endoftext|>"), "<|im_end|>");
    assert_eq!(end("mistral", "</s>"), "</s>");
}

#[test]
fn a_model_without_a_template_says_what_was_looked_for() {
    let tokenizer = tokenizer("mha_untied_mlp", &Value::Null);
    let error = Version::open("chat", "some/model", &|_| Ok(None), &tokenizer).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Usage);
    for word in ["some/model", "chat_template.jinja", "chat_template.json", "tokenizer_config.json"] {
        assert!(error.message.contains(word), "{error}");
    }
    assert!(error.hints[0].contains("v1") && error.hints[0].contains("llava_llama_2"), "{:?}", error.hints);
    let named = Version::open("vicuna_v1", "some/model", &|_| Ok(None), &tokenizer).unwrap();
    assert_eq!((named.name(), named.stop()), ("v1", "</s>"));
    assert!(Version::check("chatt").unwrap_err().hints.iter().any(|hint| hint.contains("`chat`")));
}

#[test]
fn a_refused_system_message_names_the_record() {
    let source = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}\
                  {{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";
    let tokenizer = Arc::new(tokenizer("mha_untied_mlp", &Value::Null));
    let version = open_version(&json!({"tokens": {"eos_token": "</s>"}, "source": source}), &tokenizer).unwrap();
    let encoder = Encoder { tokenizer, version, system: Some("Be kind.".into()), image_tokens: 0, max_length: None };
    let record =
        json!({"id": "r7", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]});
    let record = parse_records(record.to_string().as_bytes(), "test", Path::new(""), None).unwrap().remove(0);
    let error = encoder.encode(&record).unwrap_err();
    assert!(error.message.contains("r7") && error.message.ends_with("no system here"), "{error}");
    assert!(encoder.prompt(&[Turn::human("q", 0)]).unwrap_err().message.ends_with("no system here"));
}
