//! Conversations by the built program: models' own chat templates, and `chat` driven through pipes.

mod common;

use std::{
    fs,
    io::Write,
    path::Path,
    process::{Output, Stdio},
};

use common::{assert_close, copy_folder, golden, numbers, program, run, stderr};
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
    // What was trained asks as it was trained.
    assert_eq!(fs::read_to_string(path("out-chat/model/chat_template.jinja")).unwrap(), V1);
    assert_eq!(own.len(), 2);
    for ((own, targets), (named, expected)) in own.into_iter().zip(named) {
        assert_eq!(targets, expected);
        assert_close("a loss", own, named, 1e-5, named);
    }
}

/// What the program does with lines that come through a pipe.
fn chat(arguments: &[&str], lines: &str) -> Output {
    let mut command = program([&["chat"], arguments].concat());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // A program that has ended reads no more.
    let _ = child.stdin.take().unwrap().write_all(lines.as_bytes());
    child.wait_with_output().unwrap()
}

/// The answers of a conversation that goes well.
#[track_caller]
fn talk(arguments: &[&str], lines: &str) -> (String, String) {
    let output = chat(arguments, lines);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(!stderr(&output).contains('\u{1b}'), "{}", stderr(&output));
    (String::from_utf8(output.stdout.clone()).unwrap(), stderr(&output))
}

/// What `generate` answers.
fn generated(arguments: &[&str]) -> String {
    String::from_utf8(run([&["generate"], arguments].concat()).stdout).unwrap()
}

const TINY: [&str; 4] = ["--model", "embedded:tiny", "--max-new-tokens", "12"];

#[test]
fn the_embedded_model_talks_of_text_alone() {
    let (answers, told) = talk(&TINY, "What color is the shape?\n");
    assert_eq!(answers, generated(&[&TINY[..], &["--prompt", "What color is the shape?"]].concat()));
    assert!(told.contains("embedded:tiny: template v1, text alone"), "{told}");
    assert!(!answers.contains('>'), "{answers}");
    // Nothing said, nothing answered; and quiet is quiet.
    let (answers, told) = talk(&[&TINY[..], &["--quiet"]].concat(), "\n");
    assert!(answers.is_empty() && !told.contains("tiny"), "{told}");
    let (answers, told) = talk(&TINY, "/image x.png\n/help\n/quit\nnever asked\n");
    assert_eq!(answers, "");
    assert!(told.contains("no projector") && told.contains("/system TEXT"), "{told}");
}

/// A complete LLaVA, its pictures, and a folder to write to.
struct Llava {
    folder: tempfile::TempDir,
    model: String,
}

impl Llava {
    fn new() -> Self {
        let model = golden("parity/gqa_tied_mlp_vision/model").display().to_string();
        Self { folder: tempfile::tempdir().unwrap(), model }
    }

    fn picture(&self, number: usize) -> String {
        let folder = golden("parity/gqa_tied_mlp_vision/images");
        let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files[number].display().to_string()
    }

    fn file(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    fn talk(&self, more: &[&str], lines: &str) -> (String, String) {
        talk(&[&["--model", &self.model, "--max-new-tokens", "8"], more].concat(), lines)
    }

    fn ask(&self, prompt: &str, pictures: &[&str]) -> String {
        let pictures: Vec<&str> = pictures.iter().flat_map(|picture| ["--image", picture]).collect();
        let arguments = ["--model", &self.model, "--max-new-tokens", "8", "--prompt", prompt];
        generated(&[&arguments[..], &pictures].concat())
    }
}

#[test]
fn pictures_go_with_the_next_message() {
    let llava = Llava::new();
    let (one, two) = (llava.picture(0), llava.picture(1));
    let first = llava.ask("What is it?", &[&one]);
    let both = llava.ask("What is it?", &[&one, &two]);
    assert_ne!(first, both);
    assert_eq!(llava.talk(&["--image", &one], "What is it?\n").0, first);
    let lines = format!("/image {one}\nWhat is it?\n/clear\n/image {one}\n/image \"{two}\"\nWhat is it?\n");
    assert_eq!(llava.talk(&[], &lines).0, format!("{first}{both}"));
    // What cannot be shown is told, and what was shown before it stays.
    let lines = format!("/image {one}\n/image {}\n/image {}\nWhat is it?\n", llava.file("none.png"), llava.file(""));
    let (answers, told) = llava.talk(&[], &lines);
    assert_eq!(answers, first);
    assert!(told.contains("cannot read") && told.contains("none.png"), "{told}");
    // A message that cannot be asked keeps its picture.
    let lines = format!("/image {one}\nWhat is <image>?\nWhat is it?\n");
    assert_eq!(llava.talk(&[], &lines).0, first);
}

#[test]
fn wrong_commands_are_told_and_the_conversation_goes_on() {
    let llava = Llava::new();
    let lines = "/imgae x.png\n/image\n/save\n/clear all\n/save x.json\nWhat is it?\n";
    let (answers, told) = llava.talk(&[], lines);
    assert_eq!(answers, llava.ask("What is it?", &[]));
    for word in ["the nearest is /image", "/image needs", "/save needs", "/clear takes nothing", "nothing was said yet"]
    {
        assert!(told.contains(word), "{word}: {told}");
    }
}

#[test]
fn what_is_wrong_from_the_start_is_refused() {
    let llava = Llava::new();
    let code = |arguments: &[&str]| {
        let output = chat(&[&["--model", &llava.model], arguments].concat(), "Hi\n");
        (output.status.code().unwrap(), stderr(&output))
    };
    for (arguments, expected, word) in [
        (&["--version", "v11"][..], 2, "v11"),
        (&["--version", "plain"], 2, "plain"),
        (&["--version", "chat"], 2, "chat_template.jinja"),
        (&["--image", "none.png"], 3, "none.png"),
        (&["--adapter", "none"], 3, "none"),
    ] {
        let (code, told) = code(arguments);
        assert!(code == expected && told.contains(word), "{arguments:?}: {code}, {told}");
    }
}

#[test]
fn a_saved_conversation_is_scored_as_it_was_had() {
    let llava = Llava::new();
    let (one, two, saved) = (llava.picture(2), llava.picture(1), llava.file("talk.json"));
    let lines = format!(
        "/image {one}\nWhat is it?\nAnd\\\n  why?\n/image {two}\n\"\"\"\n/slash\n\"\"\"\n/save {saved}\n/save {saved}\nBye\n"
    );
    let (answers, told) = llava.talk(&["--verbose"], &lines);
    assert!(told.contains("talk.json is there already"), "{told}");
    let kept: Vec<u64> =
        told.lines().filter_map(|line| line.split_once(" of them kept")?.0.rsplit_once(' ')?.1.parse().ok()).collect();
    assert_eq!((kept.len(), kept[0]), (4, 0), "{told}");
    assert!(kept[1] > 0 && kept[1..].is_sorted(), "{told}");

    let records: Value = common::read_json(Path::new(&saved));
    let turns = records[0]["conversations"].as_array().unwrap();
    let said: Vec<&str> = turns.iter().map(|turn| turn["value"].as_str().unwrap()).collect();
    assert_eq!([said[0], said[2], said[4]], ["<image>\nWhat is it?", "And\n  why?", "<image>\n/slash"]);
    assert_eq!(records[0]["image"], json!([one, two]));
    assert!(answers.starts_with(&[said[1], said[3], said[5], ""].join("\n")), "{answers} {said:?}");
    let scored = scores(&llava.model, &saved, "v1");
    // By hand the same record scores the same.
    let mut by_hand = records.clone();
    by_hand[0]["image"] =
        json!([Path::new(&one).file_name().unwrap().to_str(), Path::new(&two).file_name().unwrap().to_str()]);
    let (again, images) = (llava.file("again.json"), Path::new(&one).parent().unwrap().display().to_string());
    fs::write(&again, by_hand.to_string()).unwrap();
    let output = run(["score", "--model", &llava.model, "--data", &again, "--image-folder", &images]);
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap(), scored[0]);
    assert!(scored[0]["tokens"].as_u64() >= Some(3), "{scored:?}");

    // With a system text of its own a record is made of messages.
    let system = llava.file("system.json");
    let lines = format!("/system Be kind.\nWhat is it?\n/save {system}\n");
    let (answers, _) = llava.talk(&[], &lines);
    let messages = common::read_json(Path::new(&system))[0]["messages"].clone();
    assert_eq!(messages[0], json!({"role": "system", "content": "Be kind."}));
    assert_eq!(messages[2]["content"].as_str(), Some(answers.trim_end()));
    assert_eq!(scores(&llava.model, &system, "v1").len(), 1);
    let asked = generated(&[
        "--model",
        &llava.model,
        "--max-new-tokens",
        "8",
        "--system",
        "Be kind.",
        "--prompt",
        "What is it?",
    ]);
    assert_eq!(answers, asked);
}

#[test]
fn positions_run_out_and_the_conversation_can_begin_anew() {
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&golden("parity/mha_untied_linear/model"), folder.path());
    let path = folder.path().join("config.json");
    let mut config = common::read_json(&path);
    config["text_config"]["max_position_embeddings"] = json!(120);
    fs::write(&path, config.to_string()).unwrap();
    let model = folder.path().display().to_string();
    let arguments = ["--model", &model, "--system", "", "--max-new-tokens", "1000"];
    let long = "why ".repeat(200);
    let (answers, told) = talk(&arguments, &format!("{long}\nWhat is it?\nAnd now?\n/clear\nWhat is it?\n"));
    let asked = generated(&[&arguments[..], &["--prompt", "What is it?"]].concat());
    assert!(answers.starts_with(&asked) && answers.ends_with(&asked), "{answers} {asked}");
    assert!(answers.len() > 2 * asked.len(), "{answers}");
    assert!(told.contains("the model has 120") && told.contains("/clear begins a new conversation"), "{told}");
    assert!(told.contains("120 positions are used up"), "{told}");
}

#[test]
fn a_language_model_talks_in_its_own_template() {
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&golden("parity/mha_untied_linear/model"), folder.path());
    common::forget_the_tower(folder.path());
    let model = folder.path().display().to_string();
    let arguments = ["--model", &model, "--max-new-tokens", "8"];
    let (named, told) = talk(&arguments, "What is it?\nWhy?\n");
    assert!(told.contains("template v1, text alone"), "{told}");
    let own = "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}\
               {% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}";
    fs::write(folder.path().join("chat_template.jinja"), own).unwrap();
    let (answers, told) = talk(&arguments, "What is it?\nWhy?\n");
    assert!(told.contains("template chat, text alone"), "{told}");
    assert_ne!(answers, named);
    let asked = generated(&[&arguments[..], &["--version", "chat", "--prompt", "What is it?"]].concat());
    assert!(answers.starts_with(&asked), "{answers} {asked}");
    let (_, told) = talk(&arguments, "/image x.png\n");
    assert!(told.contains("language model, it cannot see pictures") || told.contains("x.png"), "{told}");
    // What is asked for wins.
    assert_eq!(talk(&[&arguments[..], &["--version", "v1"]].concat(), "What is it?\nWhy?\n").0, named);
}
