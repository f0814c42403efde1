//! `bench table`: the table of docs/bench/README.md, made of the results beside it.

use std::{fs, path::Path};

use serde_json::Value;

use super::{
    read,
    report::{self, bytes, flops, share, word},
};
use crate::{
    cli::{args::BenchArgs, report::print_data},
    error::{Error, Result},
    formats::atomic::write_file,
};

const HEAD: &str = "# What devices reach\n\n\
    Each line is a JSON file of this folder, which `wgpu-llava bench --out FILE.json` wrote on that device; `wgpu-llava \
    bench table --report docs/bench/README.md` makes this page of them. To add a card, send its file in an issue or a pull \
    request. Roofs are measured; a share is that of the roof that limits the op.\n\n";

/// Cases that stand for the others: title, op, pass; all of 7B.
const CASES: [(&str, &str, &str); 11] = [
    ("f32 product", "matmul.nt", "up_proj"),
    ("bf16 product", "matmul.nt_bf16", "up_proj"),
    ("f16 product", "cooperative.nt_f16", "up_proj"),
    ("bf16 decode", "matmul.nt_bf16", "up_proj, decode"),
    ("f16 decode", "matmul.nt_f16", "up_proj, decode"),
    ("NF4 product", "nf4_matmul.nt", "up_proj"),
    ("NF4 product in f16", "nf4_matmul.nt", "up_proj, in f16"),
    ("attention", "attention.causal", "forward"),
    ("its backward", "attention.causal", "backward"),
    ("attention in f16", "cooperative_attention", "forward"),
    ("its backward", "cooperative_attention", "backward"),
];

pub fn run(args: &BenchArgs) -> Result<()> {
    let results = results(&args.folder)?;
    let text = format!("{HEAD}{}", table(&results));
    match &args.report {
        Some(path) => write_file(path, text.as_bytes()),
        None => print_data(&text),
    }
}

/// The results of `bench ops` in a folder, by the devices' names.
fn results(folder: &Path) -> Result<Vec<(String, Value)>> {
    let entries = fs::read_dir(folder).map_err(|error| Error::reading(folder, error))?;
    let mut results = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| Error::reading(folder, error))?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let result = read(&path)?;
        if result["bench"] == "ops" {
            results.push((path.file_name().unwrap_or_default().to_string_lossy().into_owned(), result));
        }
    }
    results.sort_by_key(|(file, result)| (result["device"]["name"].to_string(), file.clone()));
    Ok(results)
}

fn table(results: &[(String, Value)]) -> String {
    let mut text = String::from("| device | backend, driver | multiply-add f32 | copy |");
    CASES.iter().for_each(|(title, ..)| text.push_str(&format!(" {title} |")));
    text.push_str(" file |\n|---|---|--:|--:|");
    CASES.iter().for_each(|_| text.push_str("--:|"));
    text.push_str("---|\n");
    for (file, result) in results {
        let roof = |key: &str| report::roof(&result["roofs"][key]).unwrap_or_default();
        text.push_str(&format!(
            "| {} | {}, {} | {} | {} |",
            word(result, "/device/name"),
            word(result, "/device/backend"),
            word(result, "/device/driver"),
            roof("fma_f32"),
            roof("copy"),
        ));
        CASES.iter().for_each(|case| text.push_str(&format!(" {} |", cell(result, case))));
        text.push_str(&format!(" [{}, {}]({file}) |\n", word(result, "/date"), word(result, "/version")));
    }
    text
}

/// What a case reaches, and its share; nothing where it was left out.
fn cell(result: &Value, &(_, op, pass): &(&str, &str, &str)) -> String {
    let same = |row: &&Value| row["op"] == op && row["pass"] == pass && row["model"] == "7b";
    let found = result["rows"].as_array().and_then(|rows| rows.iter().find(same));
    let Some(row) = found else { return String::new() };
    let number = |key: &str| row[key].as_f64().unwrap_or(f64::NAN);
    let moves = row["roof"] == "copy";
    let rate = if moves { bytes(number("bytes_per_second")) } else { flops(number("flops_per_second")) };
    format!("{rate}, {}", share(number("share")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_line_a_file_and_gaps_where_cases_are_missing() {
        let result = json!({
            "bench": "ops", "version": "0.1.0", "date": "2026-01-02",
            "device": {"name": "A card", "backend": "vulkan", "driver": "one 1.2"},
            "roofs": {"fma_f32": {"value": 2e12, "unit": "flop/s"}, "copy": {"value": 3e11, "unit": "byte/s"}},
            "rows": [{"op": "matmul.nt", "pass": "up_proj", "model": "7b", "roof": "fma_f32", "share": 0.5,
                "flops_per_second": 1e12, "bytes_per_second": 1e9}],
        });
        let text = table(&[("card.json".to_owned(), result)]);
        let gaps = "  |".repeat(CASES.len() - 1);
        let line = format!(
            "| A card | vulkan, one 1.2 | 2.00 TFLOP/s | 300 GB/s | 1.00 TFLOP/s, 50.0% |{gaps} \
                    [2026-01-02, 0.1.0](card.json) |"
        );
        assert_eq!(text.lines().nth(2), Some(&line[..]));
    }
}
