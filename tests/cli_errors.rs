//! Bad input: each with its exit code, a message that names the file, key or record, a way out, and nothing written.

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
};

use common::{copy_folder, golden, program, stderr};
use serde_json::{Value, json};

/// A copy of a parity case in which a test breaks something.
struct Case {
    folder: tempfile::TempDir,
}

impl Case {
    fn new() -> Self {
        Self::of("mha_untied_linear")
    }

    fn of(name: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        copy_folder(&golden("parity").join(name), folder.path());
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn out(&self) -> PathBuf {
        self.path("out")
    }

    /// `train full.toml` with `--set`s.
    fn train(&self, set: &[&str]) -> Output {
        let mut command =
            program([Path::new("train"), &self.path("full.toml"), Path::new("--output-dir"), &self.out()]);
        for set in set {
            command.args(["--set", set]);
        }
        command.output().unwrap()
    }

    /// Asserts that training fails as it should and leaves nothing.
    #[track_caller]
    fn refused(&self, set: &[&str], code: i32, words: &[&str]) {
        let output = self.train(set);
        assert_refused(&output, code, words);
        let left = fs::read_dir(self.out()).map_or(0, Iterator::count);
        assert_eq!(left, 0, "the output folder is not empty: {}", stderr(&output));
    }

    fn records(&self, records: &Value) {
        fs::write(self.path("data.jsonl"), records.to_string()).unwrap();
    }

    /// Leaves the model's language model alone, as a plain LLaMA.
    fn forget_the_tower(&self) {
        common::forget_the_tower(&self.path("model"));
    }

    fn weights(&self) -> PathBuf {
        self.path("model/model.safetensors")
    }

    /// Changes the header of the weights, whose data stay where they are.
    fn edit_header(&self, edit: impl FnOnce(&mut Value)) {
        let bytes = fs::read(self.weights()).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        edit(&mut header);
        let mut text = header.to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut new = (text.len() as u64).to_le_bytes().to_vec();
        new.extend(text);
        new.extend(&bytes[8 + length..]);
        fs::write(self.weights(), new).unwrap();
    }

    fn edit_json(&self, file: &str, edit: impl FnOnce(&mut Value)) {
        let mut json: Value = serde_json::from_slice(&fs::read(self.path(file)).unwrap()).unwrap();
        edit(&mut json);
        fs::write(self.path(file), json.to_string()).unwrap();
    }
}

#[track_caller]
fn assert_refused(output: &Output, code: i32, words: &[&str]) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert!(!text.contains("panicked"), "{text}");
    for word in words {
        assert!(text.contains(word), "`{word}` is not in:\n{text}");
    }
}

fn conversation(turns: &[(&str, &str)]) -> Value {
    turns.iter().map(|(from, value)| json!({"from": from, "value": value})).collect()
}

const QUESTION: [(&str, &str); 2] = [("human", "<image>\nWhat is it?"), ("gpt", "A box.")];

#[test]
fn an_unknown_config_key() {
    Case::new().refused(&["learning_rat=1"], 2, &["learning_rat", "learning_rate"]);
    let case = Case::new();
    let mut text = fs::read_to_string(case.path("full.toml")).unwrap();
    text.push_str("gradient_acumulation_steps = 2\n");
    fs::write(case.path("full.toml"), text).unwrap();
    case.refused(&[], 2, &["full.toml", "gradient_acumulation_steps", "gradient_accumulation_steps"]);
    Case::new().refused(&["learning_rate=\"fast\""], 2, &["learning_rate"]);
    Case::new().refused(&["max_steps=0"], 2, &["max_steps"]);
    Case::new().refused(&["version=\"v7\""], 2, &["v7", "v1"]);
}

#[test]
fn a_key_that_is_not_built_yet() {
    Case::new().refused(&["bits=8"], 2, &["bits", "not built yet"]);
}

/// Each of them would train the same into the same folder.
#[test]
#[cfg(not(feature = "mpi"))]
fn several_processes_without_mpi() {
    for (variable, count) in [("OMPI_COMM_WORLD_SIZE", "2"), ("PMI_SIZE", "4"), ("SLURM_STEP_NUM_TASKS", "2")] {
        let case = Case::new();
        let arguments = [Path::new("train"), &case.path("full.toml"), Path::new("--output-dir"), &case.out()];
        let output = program(arguments).env(variable, count).output().unwrap();
        assert_refused(&output, 2, &[&format!("one of {count} processes"), variable, "--features mpi"]);
        assert!(!case.out().exists());
    }
}

#[test]
fn a_config_that_is_not_there_or_no_toml() {
    let case = Case::new();
    let output = program([Path::new("train"), &case.path("nothing.toml")]).output().unwrap();
    assert!([Some(2), Some(3)].contains(&output.status.code()), "{}", stderr(&output));
    assert_refused(&output, output.status.code().unwrap(), &["nothing.toml"]);
    fs::write(case.path("full.toml"), "method = \n").unwrap();
    case.refused(&[], 2, &["full.toml"]);
}

#[test]
fn missing_model_files() {
    for (file, word) in [
        ("model/config.json", "config.json"),
        ("model/model.safetensors", "model.safetensors"),
        ("model/tokenizer.json", "tokenizer.json"),
    ] {
        let case = Case::new();
        fs::remove_file(case.path(file)).unwrap();
        case.refused(&[], 3, &["model", word]);
    }
    let case = Case::new();
    fs::remove_dir_all(case.path("model")).unwrap();
    case.refused(&[], 3, &["model"]);
    let case = Case::of("mha_untied_mlp");
    fs::remove_file(case.path("model/model-00002-of-00004.safetensors")).unwrap();
    case.refused(&[], 3, &["model-00002-of-00004.safetensors"]);
}

#[test]
fn truncated_safetensors() {
    for keep in [3, 100, 20_000] {
        let case = Case::new();
        let bytes = fs::read(case.weights()).unwrap();
        fs::write(case.weights(), &bytes[..keep]).unwrap();
        case.refused(&[], 3, &["model.safetensors", "truncated"]);
    }
}

#[test]
fn lying_safetensors_headers() {
    let case = Case::new();
    let mut bytes = fs::read(case.weights()).unwrap();
    bytes[..8].copy_from_slice(&(1u64 << 60).to_le_bytes());
    fs::write(case.weights(), bytes).unwrap();
    case.refused(&[], 3, &["model.safetensors"]);

    let name = "language_model.model.norm.weight";
    for offsets in [json!([0, u64::MAX]), json!([8, 4]), json!([0, 4]), json!([1_000_000_000, 1_000_000_144])] {
        let case = Case::new();
        case.edit_header(|header| header[name]["data_offsets"] = offsets);
        case.refused(&[], 3, &["model.safetensors"]);
    }
    let case = Case::new();
    case.edit_header(|header| header[name]["shape"] = json!([u64::MAX, u64::MAX]));
    case.refused(&[], 3, &["model.safetensors"]);
    let case = Case::new();
    case.edit_header(|header| header[name]["dtype"] = json!("F7"));
    case.refused(&[], 3, &["model.safetensors"]);
}

#[test]
fn a_shape_that_does_not_fit_the_config() {
    let case = Case::new();
    case.edit_json("model/config.json", |config| config["text_config"]["intermediate_size"] = json!(52));
    case.refused(&[], 3, &["mlp.", "50", "52"]);
    let case = Case::new();
    case.edit_json("model/config.json", |config| config["text_config"]["num_hidden_layers"] = json!(2));
    case.refused(&[], 3, &["layers.1"]);
    let case = Case::new();
    case.edit_json("model/config.json", |config| config["text_config"]["num_attention_heads"] = json!(5));
    case.refused(&[], 3, &["config.json", "num_attention_heads"]);
}

/// A PNG whose head is sound and promises `side` x `side` pixels.
fn png_of(side: u32) -> Vec<u8> {
    let crc = |bytes: &[u8]| {
        !bytes.iter().fold(u32::MAX, |crc, &byte| {
            (0..8).fold(crc ^ u32::from(byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 })
        })
    };
    let mut png = b"\x89PNG\r\n\x1a\n".to_vec();
    let size = side.to_be_bytes();
    let head = [&size[..], &size[..], &[8, 2, 0, 0, 0]].concat();
    for (kind, data) in [(b"IHDR", head.as_slice()), (b"IDAT", &[0x78, 0x9c, 0x63, 0x00]), (b"IEND", &[])] {
        let body = [&kind[..], data].concat();
        png.extend((data.len() as u32).to_be_bytes());
        png.extend(&body);
        png.extend(crc(&body).to_be_bytes());
    }
    png
}

#[test]
fn unreadable_and_huge_pictures() {
    let case = Case::new();
    let whole = fs::read(case.path("images/wide.png")).unwrap();
    let jpeg = b"\xff\xd8\xff\xe0\x00\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0".to_vec();
    for bytes in [b"no picture at all".to_vec(), Vec::new(), whole[..whole.len() / 2].to_vec(), jpeg] {
        fs::write(case.path("images/wide.png"), bytes).unwrap();
        case.refused(&[], 3, &["wide.png"]);
    }
    fs::write(case.path("images/wide.png"), png_of(100_000)).unwrap();
    case.refused(&[], 3, &["wide.png", "100000x100000"]);
    fs::remove_file(case.path("images/wide.png")).unwrap();
    case.refused(&[], 3, &["wide.png", "image_folder"]);
}

#[test]
fn records_that_cannot_be_used() {
    let case = Case::new();
    case.records(&json!([{"id": "mute", "conversations": conversation(&[("gpt", "I begin, and I end.")])}]));
    case.refused(&[], 3, &["data.jsonl", "mute", "human"]);
    // More picture marks than pictures.
    let twice = conversation(&[QUESTION[0], QUESTION[1], QUESTION[0], QUESTION[1]]);
    case.records(&json!([{"id": "twice", "image": "wide.png", "conversations": twice}]));
    case.refused(&[], 3, &["data.jsonl", "twice", "<image>"]);
    case.records(&json!([{"id": "unknown", "conversations": conversation(&[("robot", "beep"), ("gpt", "boop")])}]));
    case.refused(&[], 3, &["unknown", "robot"]);
    case.records(&json!([{"id": "empty"}]));
    case.refused(&[], 3, &["empty", "conversations"]);
    fs::write(case.path("data.jsonl"), "{\"id\": \"cut").unwrap();
    case.refused(&[], 3, &["data.jsonl"]);
}

#[test]
fn empty_data_sets() {
    for text in ["", "[]", "\n\n"] {
        let case = Case::new();
        fs::write(case.path("data.jsonl"), text).unwrap();
        case.refused(&[], 3, &["data.jsonl", "empty"]);
    }
    let case = Case::new();
    fs::remove_file(case.path("data.jsonl")).unwrap();
    case.refused(&[], 3, &["data.jsonl"]);
}

#[test]
fn records_longer_than_model_max_length_are_cut_and_counted() {
    let case = Case::new();
    let output = case.train(&["model_max_length=150", "max_steps=1"]);
    let text = stderr(&output);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("longer than model_max_length") && text.contains("150"), "{text}");
    // So short that nothing is left to learn.
    Case::new().refused(&["model_max_length=4"], 3, &["model_max_length"]);
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run() {
    let case = Case::new();
    let output =
        case.train(&["learning_rate=1e30", "lr_scheduler_type=\"constant\"", "max_grad_norm=0.0", "save_steps=1"]);
    assert_refused(&output, 1, &["loss became", "learning_rate"]);
    assert!(!case.out().join("model").exists(), "a model was written");
    for entry in fs::read_dir(case.out()).unwrap() {
        let name = entry.unwrap().file_name();
        let name = name.to_string_lossy();
        assert!(!name.contains("tmp") && !name.contains("partial"), "left behind: {name}");
    }
}

/// The last step's update has no further loss that would show what it did.
#[test]
fn a_last_step_that_breaks_the_weights_leaves_no_model() {
    for (method, output) in [("full", "model"), ("lora", "adapter")] {
        let case = Case::new();
        let set = ["max_steps=1", "warmup_steps=0", "learning_rate=1e39", &format!("method=\"{method}\"")];
        assert_refused(&case.train(&set), 1, &["finite", "learning_rate"]);
        assert!(!case.out().join(output).exists(), "{method} was written");
    }
}

#[test]
fn pictures_that_nothing_can_use_and_a_projector_without_any() {
    let case = Case::new();
    case.records(&json!([{"id": "words", "conversations": conversation(&[("human", "Hi"), ("gpt", "Hello.")])}]));
    case.refused(&["method=\"projector\""], 3, &["picture", "projector"]);
    let case = Case::new();
    case.forget_the_tower();
    case.refused(&[], 2, &["model", "cannot see", "pictures"]);
    // What it says to type next is what a language model can do.
    case.records(&json!([{"text": "A river runs to the sea."}]));
    let output = case.train(&["max_steps=1"]);
    let text = stderr(&output);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("wgpu-llava generate") && !text.contains("--image"), "{text}");
    assert!(!text.contains("eval easy-vqa"), "{text}");
}

#[test]
fn devices_that_are_not_there() {
    let output = program(["devices"]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let case = Case::new();
    let config = case.path("full.toml");
    let out = case.out();
    let arguments = ["--device".as_ref(), "99".as_ref(), "train".as_ref(), config.as_os_str()];
    let output = program(arguments).arg("--output-dir").arg(&out).output().unwrap();
    assert_refused(&output, 4, &["99", "0: "]);
    assert!(!out.exists());
}

#[cfg(target_os = "linux")]
#[test]
fn a_machine_without_any_adapter() {
    let case = Case::new();
    let mut command = program([Path::new("train"), &case.path("full.toml"), Path::new("--output-dir"), &case.out()]);
    for variable in ["VK_ICD_FILENAMES", "VK_DRIVER_FILES"] {
        command.env(variable, "/nonexistent/icd.json");
    }
    let output = command.output().unwrap();
    assert_refused(&output, 4, &["no GPU adapter", "mesa-vulkan-drivers"]);
    assert!(!case.out().exists());
}

/// The limit on the size of files stands for the end of the disk: writes fail at any place.
#[cfg(unix)]
#[test]
fn a_disk_that_takes_no_more() {
    use std::process::Command;
    let case = Case::new();
    let script = "trap '' XFSZ; ulimit -f 100; exec \"$@\"";
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh", env!("CARGO_BIN_EXE_wgpu-llava"), "train"]).arg(case.path("full.toml"));
    let output = command.arg("--output-dir").arg(case.out()).output().unwrap();
    assert_refused(&output, 1, &["cannot write", "model"]);
    assert!(!case.out().join("model").exists(), "half a model");
    for entry in fs::read_dir(case.out()).unwrap() {
        let name = entry.unwrap().file_name();
        let name = name.to_string_lossy();
        assert!(!name.contains("tmp") && !name.contains("partial"), "left behind: {name}");
    }
}

#[test]
fn other_commands_name_what_is_wrong_too() {
    let case = Case::new();
    let model = case.path("model");
    let with = |command: &str, arguments: &[&Path]| {
        program([Path::new(command), Path::new("--model"), &model]).args(arguments).output().unwrap()
    };
    let (prompt, image, data) = (Path::new("--prompt"), Path::new("--image"), Path::new("--data"));
    let bad = case.path("bad.png");
    fs::write(&bad, "no picture").unwrap();
    assert_refused(&with("generate", &[prompt, Path::new("hi"), image, &bad]), 3, &["bad.png"]);
    let none = case.path("none.png");
    assert_refused(&with("generate", &[prompt, Path::new("hi"), image, &none]), 3, &["none.png"]);
    case.records(&json!([{"id": "mute", "conversations": conversation(&[("gpt", "Only me.")])}]));
    let records = case.path("data.jsonl");
    let scores = case.path("scores.jsonl");
    let output = with("score", &[data, &records, Path::new("--out"), &scores]);
    assert_refused(&output, 3, &["mute", "human"]);
    assert!(!scores.exists(), "half a file of scores");
    let missing = case.path("no-model");
    let output = program([Path::new("generate"), Path::new("--model"), &missing, prompt, Path::new("hi")]).output();
    assert_refused(&output.unwrap(), 3, &["no-model"]);
    let output = with("generate", &[prompt, Path::new("hi"), image, &model]);
    assert_refused(&output, 3, &["is a folder"]);
    let nowhere = case.path("misspelt");
    let resume = [Path::new("train"), Path::new("--resume"), Path::new("--output-dir"), &nowhere];
    assert_refused(&program(resume).output().unwrap(), 2, &["misspelt", "to go on with", "config"]);
    assert!(!nowhere.exists(), "a folder for no run");
    // Where nothing can be written is told before the work.
    for out in [&model, &case.path("nowhere/scores.jsonl")] {
        let output = with("score", &[data, &records, Path::new("--out"), out]);
        assert_refused(&output, 2, &["--out", "folder"]);
    }
    let output = program([Path::new("eval"), Path::new("easy-vqa"), Path::new("--out"), &records]).output().unwrap();
    assert_refused(&output, 2, &["--out", "not a folder"]);
    assert_refused(&program(["eval", "chess"]).output().unwrap(), 2, &["chess", "easy-vqa"]);
    assert_refused(&program(["trian"]).output().unwrap(), 2, &["trian", "train"]);
}

#[test]
fn a_chat_template_that_is_not_there_or_broken() {
    let case = Case::new();
    let model = case.path("model").display().to_string();
    let words = ["chat_template.jinja", "tokenizer_config.json", "v1"];
    case.refused(&["version=\"chat\""], 2, &words);
    let ask = |version: &str| {
        program(["generate", "--model", &model, "--prompt", "Hi", "--version", version]).output().unwrap()
    };
    assert_refused(&ask("chat"), 2, &words);
    assert_refused(&ask("chta"), 2, &["chta", "`chat`"]);
    fs::write(case.path("model/chat_template.jinja"), "{% for m in messages %}\n{{ m.content }").unwrap();
    assert_refused(&ask("chat"), 3, &["chat_template.jinja, line 2"]);
    case.refused(&["version=\"chat\""], 3, &["chat_template.jinja, line 2"]);
    let refuses = "{{ raise_exception('This model takes no conversation.') }}";
    fs::write(case.path("model/chat_template.jinja"), refuses).unwrap();
    assert_refused(&ask("chat"), 3, &["chat_template.jinja", "This model takes no conversation."]);
    case.refused(&["version=\"chat\""], 3, &["This model takes no conversation.", "record"]);
    let output = program(["eval", "easy-vqa", "--version", "plain"]).output().unwrap();
    assert_refused(&output, 2, &["plain", "question"]);
}

#[cfg(not(feature = "hub"))]
#[test]
fn an_id_of_the_hub_names_the_feature_that_is_missing() {
    let words = ["someone/model", "built without the Hub", "--features hub"];
    for line in ["generate --prompt hi", "score --data data.jsonl --image-folder images"] {
        let case = Case::new();
        let mut command = program(line.split(' '));
        let output = command.args(["--model", "someone/model"]).current_dir(case.folder.path()).output().unwrap();
        assert_refused(&output, 3, &words);
    }
    let case = Case::new();
    case.refused(&["model_name_or_path=someone/model"], 3, &words);
    case.refused(&["adapter_name_or_path=someone/model@v1"], 3, &["someone/model@v1", "--features hub"]);
    let output = program(["eval", "easy-vqa", "--model", "someone/model"]).output().unwrap();
    assert_refused(&output, 3, &words);
}
