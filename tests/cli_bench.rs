//! `bench` on the command line: well-formed results, comparisons, the table, and what is refused.

mod common;

use std::{fs, path::Path};

use common::{program, read_json, run, stderr};
use serde_json::{Value, json};

/// One small case.
const FILTER: &str = "tiny rms_norm forward";

fn result(output: &std::process::Output) -> Value {
    serde_json::from_slice(&output.stdout).expect("one JSON object on stdout")
}

fn check_roofs(data: &Value) {
    for key in ["fma_f32", "copy", "read", "workgroup_read", "dispatch", "latency", "to_device", "to_host"] {
        let value = data["roofs"][key]["value"].as_f64();
        assert!(value.is_some_and(|value| value > 0.0 && value.is_finite()), "{key}: {value:?}");
    }
}

fn check_row(row: &Value) {
    let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key} of {row}"));
    assert!(number("p10") > 0.0 && number("p10") <= number("seconds") && number("seconds") <= number("p90"), "{row}");
    assert!(number("share") > 0.0 && number("share") <= 1.5, "{row}");
    assert!(number("runs") >= 3.0 && number("sets") >= 1.0 && number("bytes") > 0.0, "{row}");
    let rate = number("bytes") / number("seconds");
    assert!((number("bytes_per_second") / rate - 1.0).abs() < 1e-9, "{row}");
    assert!(["device", "host"].contains(&row["clock"].as_str().expect("a clock")), "{row}");
}

#[test]
fn ops_are_timed_compared_and_made_into_a_table() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (out, report, table) = (path("this.json"), path("report.md"), path("README.md"));
    let first = result(&run(["bench", "--filter", FILTER, "--json", "--out", &out, "--report", &report]));
    assert_eq!(read_json(Path::new(&out)), first);
    check_roofs(&first);
    let rows = first["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 1, "{rows:?}");
    check_row(&rows[0]);
    assert_eq!([&rows[0]["op"], &rows[0]["pass"], &rows[0]["model"]], ["rms_norm", "forward", "tiny"]);
    let report = fs::read_to_string(report).unwrap();
    assert!(report.contains(first["device"]["name"].as_str().unwrap()) && report.contains("| rms_norm | forward |"));

    let again = result(&run(["bench", "ops", "--filter", FILTER, "--json", "--compare", &out]));
    let times = again["rows"][0]["times_before"].as_f64().expect("a ratio");
    let want = again["rows"][0]["seconds"].as_f64().unwrap() / rows[0]["seconds"].as_f64().unwrap();
    assert!((times / want - 1.0).abs() < 1e-9, "{times} instead of {want}");
    assert_eq!(again["compared"]["differences"], json!([]), "{}", again["compared"]);

    // Another card's, and another benchmark's.
    let mut other = first.clone();
    other["device"]["name"] = "Another Card".into();
    fs::write(path("other.json"), other.to_string()).unwrap();
    let told = run(["bench", "--filter", FILTER, "--compare", &path("other.json")]);
    let told = String::from_utf8(told.stdout).unwrap();
    assert!(told.contains("compared with another adapter: Another Card, here "), "{told}");
    fs::remove_file(path("other.json")).unwrap();
    let refused = program(["bench", "step", "--compare", &out]).output().unwrap();
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    assert!(stderr(&refused).contains("is of bench ops, not of bench step"), "{}", stderr(&refused));

    run(["bench", "table", "--folder", &folder.path().display().to_string(), "--report", &table]);
    let table = fs::read_to_string(table).unwrap();
    assert!(table.contains("(this.json)") && table.contains(first["device"]["driver"].as_str().unwrap()), "{table}");
}

#[test]
fn answers_are_timed() {
    let sizes = ["--hidden-size", "64", "--intermediate-size", "96", "--num-layers", "1", "--num-heads", "2"];
    let mut arguments = vec!["bench", "generate", "--json", "--seq", "16", "--tokens", "4", "--steps", "1"];
    arguments.extend(sizes);
    arguments.extend(["--vocab-size", "64"]);
    let data = result(&run(arguments));
    for key in ["prefill_tokens_per_second", "decode_tokens_per_second", "seconds_per_token", "share"] {
        assert!(data[key].as_f64().is_some_and(|value| value > 0.0), "{key}: {data}");
    }
    // A layer's seven matrices and the head, two bytes each; its norms; keys and values of 18 positions.
    let linears = 4 * 64 * 64 + 3 * 64 * 96 + 64 * 64;
    assert_eq!(data["bytes_per_token"], linears * 2 + 2 * 64 * 4 + 2 * 18 * 64 * 4);
}

#[test]
fn a_step_tells_its_share() {
    let data = result(&run([
        "bench",
        "step",
        "--json",
        "--batch",
        "1",
        "--seq",
        "16",
        "--steps",
        "1",
        "--warm-up",
        "0",
        "--method",
        "full",
    ]));
    for key in ["seconds_per_step", "tokens_per_second", "device_bytes", "estimated_bytes", "share"] {
        assert!(data[key].as_f64().is_some_and(|value| value > 0.0), "{key}: {data}");
    }
    assert!(data["parts"]["backward"].as_f64().is_some_and(|seconds| seconds > 0.0));
}

#[test]
fn sizes_that_are_given_replace_those_of_the_named_model() {
    let small = ["--hidden-size", "64", "--intermediate-size", "96", "--vocab-size", "64", "--model", "llama-70b"];
    let times = ["bench", "step", "--json", "--batch", "1", "--seq", "4", "--steps", "1", "--warm-up", "0"];
    let model = |more: &[&str]| {
        result(&run(times.iter().chain(&small).chain(more).copied().collect::<Vec<_>>()))["model"].clone()
    };
    for (more, layers, heads, kv_heads) in [
        (vec!["--num-layers", "1", "--num-heads", "2"], 1, 2, 2),
        (vec!["--num-layers", "2", "--num-heads", "4", "--num-kv-heads", "2"], 2, 4, 2),
        (vec!["--num-heads", "1"], 80, 1, 1),
    ] {
        let found = model(&more);
        assert_eq!(found["hidden_size"], 64);
        assert_eq!(found["num_hidden_layers"], layers, "{more:?}");
        assert_eq!([&found["num_attention_heads"], &found["num_key_value_heads"]], [heads, kv_heads], "{more:?}");
    }
}

#[test]
fn wrong_use_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("broken.json");
    fs::write(&broken, "no JSON").unwrap();
    let broken = broken.display().to_string();
    let missing = folder.path().join("missing/x.json").display().to_string();
    for (arguments, code, said) in [
        (vec!["ops", "--filter", "no such op"], 2, "no such op"),
        (vec!["step", "--filter", "matmul"], 2, "--filter"),
        (vec!["nothing"], 2, "nothing"),
        (vec!["--hidden-size", "64"], 2, "bench step"),
        (vec!["generate", "--set", "seed=1"], 2, "--set"),
        (vec!["ops", "--out", &missing], 2, "--out"),
        (vec!["ops", "--compare", &broken], 3, "--compare"),
        (vec!["generate", "--method", "prefix"], 2, "prefix"),
        (vec!["generate", "--seq", "4000", "--tokens", "4000", "--model", "llama-7b"], 2, "positions"),
        (vec!["step", "--model", "llama-8b-nothing", "--num-layers", "1"], 2, "llama-8b-nothing"),
        (vec!["table", "--folder", &missing], 3, "missing"),
    ] {
        let output = program(["bench"].into_iter().chain(arguments.iter().copied())).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(said), "{arguments:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty(), "{arguments:?}");
    }
}
