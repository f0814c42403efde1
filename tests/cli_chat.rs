//! Conversations by the built program: models' own chat templates, and `chat` driven through pipes.

mod common;

use std::fs;

use common::{assert_close, copy_folder, golden, numbers, run};
use serde_json::{Value, json};

/// LLaVA's `v1` as a chat template.
const V1: &str = "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content + ' ' }}\
    {% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}\
    {{ 'USER: ' + m.content + ' ASSISTANT:' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}";

/// The lines of `score` for records, in a template.
fn scores(model: &str, data: &str, version: &str) -> Vec<Value> {
    let output = run(["score", "--model", model, "--data", data, "--version", version]);
    String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_models_own_template_scores_generates_and_trains() {
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&golden("parity/mha_untied_mlp"), folder.path());
    let path = |name: &str| folder.path().join(name).display().to_string();
    fs::write(path("model/chat_template.jinja"), V1).unwrap();
    let system = "A chat between a curious user and an artificial intelligence assistant. \
                  The assistant gives helpful, detailed, and polite answers to the user's questions.";
    let record = |id: usize, talk: &[(&str, &str)]| {
        let turns = talk.iter().map(|(role, text)| json!({"role": role, "content": text}));
        let messages: Vec<Value> = [json!({"role": "system", "content": system})].into_iter().chain(turns).collect();
        json!({"id": id, "messages": messages})
    };
    let records = json!([
        record(1, &[("user", "What is red?"), ("assistant", "A bus."), ("user", "Why?"), ("assistant", "Paint.")]),
        record(2, &[("user", "Say nothing"), ("assistant", "")]),
    ]);
    fs::write(path("talk.json"), records.to_string()).unwrap();
    let (own, named) =
        (scores(&path("model"), &path("talk.json"), "chat"), scores(&path("model"), &path("talk.json"), "v1"));
    for (own, named) in own.iter().zip(&named).take(1) {
        assert_eq!((&own["id"], &own["tokens"]), (&named["id"], &named["tokens"]));
        for (own, named) in numbers(&own["token_logprobs"]).into_iter().zip(numbers(&named["token_logprobs"])) {
            assert_close("a log-probability", own, named, 1e-5, 1.0);
        }
    }
    // An empty answer is a space and the end in this template, the end alone in `v1`.
    assert_eq!((own.len(), named[1]["tokens"].as_u64()), (2, Some(1)));

    let ask = |version: &str| {
        let model = path("model");
        let arguments = ["generate", "--model", &model, "--prompt", "What is red?", "--system", system, "--json"];
        let output = run([&arguments[..], &["--max-new-tokens", "8", "--version", version]].concat());
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        (answer["token_ids"].clone(), answer["prompt_tokens"].clone())
    };
    assert_eq!(ask("chat"), ask("v1"));

    let losses = |version: &str| {
        let (config, out) = (path("full.toml"), path(&format!("out-{version}")));
        let (data, version) = (format!("data_path=\"{}\"", path("talk.json")), format!("version=\"{version}\""));
        let set = ["--set", &data, "--set", &version, "--set", "max_steps=2", "--set", "model_max_length=512"];
        run([&["train", &config, "--output-dir", &out, "--quiet"][..], &set].concat());
        let lines = common::read_lines(&folder.path().join(&out).join("metrics.jsonl"));
        lines
            .iter()
            .map(|line| (line["loss"].as_f64().unwrap(), line["target_tokens"].as_u64().unwrap()))
            .collect::<Vec<_>>()
    };
    fs::write(path("talk.json"), json!([records[0], records[0], records[0]]).to_string()).unwrap();
    let (own, named) = (losses("chat"), losses("v1"));
    assert_eq!(own.len(), 2);
    for ((own, targets), (named, expected)) in own.into_iter().zip(named) {
        assert_eq!(targets, expected);
        assert_close("a loss", own, named, 1e-5, named);
    }
}
