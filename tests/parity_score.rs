//! `score` and `generate` of the built program against PyTorch, transformers and PEFT: tests/golden/parity.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

/// Largest distance of a log-probability, nats.
const TOLERANCE: f64 = 3e-5;

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/parity").join(name)
}

/// What the program prints on stdout.
fn program(arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wgpu-llava"));
    if std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        command.env("XDG_RUNTIME_DIR", std::env::temp_dir());
    }
    let output = command.args(arguments).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {}\n{errors}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

/// Lines of `score` against the expected ones; the largest distance.
fn compare(name: &str, lines: &str, expected: &Value) -> f64 {
    let expected = expected.as_array().unwrap();
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), expected.len(), "{name}: records");
    let mut largest = 0.0f64;
    for (line, expected) in lines.iter().zip(expected) {
        let id = &expected["id"];
        assert_eq!((&line["id"], &line["tokens"]), (id, &expected["tokens"]), "{name}");
        let (ours, theirs) = (numbers(&line["token_logprobs"]), numbers(&expected["token_logprobs"]));
        assert_eq!(ours.len(), theirs.len(), "{name} {id}");
        for (token, (a, b)) in ours.iter().zip(&theirs).enumerate() {
            assert!((a - b).abs() <= TOLERANCE, "{name} {id} token {token}: {a}, expected {b}");
            largest = largest.max((a - b).abs());
        }
        let loss = line["loss"].as_f64().unwrap() - expected["loss"].as_f64().unwrap();
        assert!(loss.abs() <= TOLERANCE, "{name} {id}: the loss is off by {loss}");
    }
    largest
}

fn check(name: &str) {
    let case = case(name);
    let path = |file: &str| case.join(file).display().to_string();
    let expected: Value = serde_json::from_slice(&std::fs::read(case.join("expected.json")).unwrap()).unwrap();
    let (model, data, images) = (path("model"), path("score.json"), path("images"));
    let score = ["score", "--model", &model, "--data", &data, "--image-folder", &images];
    println!("{name}: {:.1e}", compare(name, &program(&score), &expected["score"]));

    for (run, training) in expected["train"].as_object().unwrap() {
        let Some(adapter) = training["adapter"].as_str() else { continue };
        let (name, adapter) = (format!("{name} {run}"), path(adapter));
        let lines = program(&[&score[..], &["--adapter", &adapter]].concat());
        println!("{name}: {:.1e}", compare(&name, &lines, &training["adapter_score"]));
    }

    // In four bits, as transformers and bitsandbytes write it; nothing is quantised again.
    for (folder, lines) in expected["packed_score"].as_object().into_iter().flatten() {
        let (packed, name) = (path(folder), format!("{name} {folder}"));
        let mut arguments = score.to_vec();
        let model_at = arguments.iter().position(|argument| *argument == model).unwrap();
        arguments[model_at] = packed.as_str();
        println!("{name}: {:.1e}", compare(&name, &program(&arguments), lines));
    }

    for search in expected["search"].as_array().unwrap() {
        let text = search["prompt"].as_str().unwrap();
        let image = search["image"].as_str().map(|image| case.join("images").join(image).display().to_string());
        let mut arguments: Vec<String> =
            ["generate", "--model", &model, "--prompt", text, "--max-new-tokens", "10", "--json"]
                .map(Into::into)
                .into();
        arguments.extend(image.iter().flat_map(|image| ["--image".to_owned(), image.clone()]));
        for option in ["num_beams", "repetition_penalty", "length_penalty"] {
            if let Some(value) = search.get(option) {
                arguments.extend([format!("--{}", option.replace('_', "-")), value.to_string()]);
            }
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let answer: Value = serde_json::from_str(&program(&arguments)).unwrap();
        assert_eq!(answer["token_ids"], search["token_ids"], "{name} {search}");
    }

    for prompt in expected["generate"].as_array().unwrap() {
        let ids = &prompt["token_ids"];
        let count = ids.as_array().unwrap().len().to_string();
        let text = prompt["prompt"].as_str().unwrap();
        let image = prompt["image"].as_str().map(|image| case.join("images").join(image).display().to_string());
        let mut arguments = vec!["generate", "--model", &model, "--prompt", text, "--max-new-tokens", &count, "--json"];
        arguments.extend(image.iter().flat_map(|image| ["--image", image.as_str()]));
        let answer: Value = serde_json::from_str(&program(&arguments)).unwrap();
        assert_eq!(&answer["token_ids"], ids, "{name} {text:?}");
        assert_eq!(answer["prompt_tokens"], prompt["prompt_tokens"], "{name} {text:?}");
        assert_eq!(answer["text"], prompt["text"].as_str().unwrap().trim(), "{name} {text:?}");
    }
}

#[test]
fn mha_untied_mlp() {
    check("mha_untied_mlp");
}

#[test]
fn mqa_untied_mlp_full_features() {
    check("mqa_untied_mlp_full_features");
}

#[test]
fn gqa_tied_linear_pad() {
    check("gqa_tied_linear_pad");
}

#[test]
fn gqa_tied_mlp_vision() {
    check("gqa_tied_mlp_vision");
}

#[test]
fn mha_untied_linear() {
    check("mha_untied_linear");
}

#[test]
fn llama3_rope_biases() {
    check("llama3_rope_biases");
}

#[test]
fn mistral_window() {
    check("mistral_window");
}

#[test]
fn qlora() {
    check("qlora");
}

#[test]
fn qwen2_dynamic() {
    check("qwen2_dynamic");
}
