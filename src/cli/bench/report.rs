//! Results in Markdown, ready to be pasted; and how their numbers are written.

use std::fmt::Write;

use serde_json::Value;

use super::Outcome;

/// With a prefix of thousands, three digits.
fn scaled(value: f64, unit: &str) -> String {
    let steps = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    let (scale, prefix) = steps.into_iter().find(|(scale, _)| value >= *scale).unwrap_or((1.0, ""));
    format!("{} {prefix}{unit}", digits(value / scale))
}

fn digits(value: f64) -> String {
    match value {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

pub fn flops(rate: f64) -> String {
    scaled(rate, "FLOP/s")
}

pub fn bytes(rate: f64) -> String {
    scaled(rate, "B/s")
}

pub fn seconds(seconds: f64) -> String {
    match seconds {
        1.0.. => format!("{} s", digits(seconds)),
        1e-3.. => format!("{} ms", digits(seconds * 1e3)),
        _ => format!("{} us", digits(seconds * 1e6)),
    }
}

pub fn share(share: f64) -> String {
    format!("{:.1}%", share * 100.0)
}

/// A roof's value as people read it.
pub fn roof(roof: &Value) -> Option<String> {
    let value = roof["value"].as_f64()?;
    Some(match roof["unit"].as_str()? {
        "flop/s" => flops(value),
        "byte/s" => bytes(value),
        _ => seconds(value),
    })
}

/// Names and values of all roofs.
pub fn roofs(roofs: &Value) -> Vec<(String, String)> {
    let line = |one: &Value| Some((one["what"].as_str()?.to_owned(), roof(one)?));
    roofs.as_object().map(|roofs| roofs.values().filter_map(line).collect()).unwrap_or_default()
}

/// A text in a result, at a JSON pointer.
pub fn word<'v>(value: &'v Value, path: &str) -> &'v str {
    value.pointer(path).and_then(Value::as_str).unwrap_or("unknown")
}

/// A report of a result: what ran where, roofs, and rows, or for other benchmarks what the terminal shows.
pub fn markdown(result: &Outcome) -> String {
    let data = &result.data;
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = writeln!(text, "## `wgpu-llava bench {}`\n", word(data, "/bench"));
    let _ = writeln!(text, "| | |\n|---|---|");
    for (name, path) in [
        ("adapter", "/device/name"),
        ("backend", "/device/backend"),
        ("driver", "/device/driver"),
        ("version", "/version"),
        ("commit", "/commit"),
        ("date", "/date"),
        ("clock", "/clock"),
    ] {
        if data.pointer(path).is_some() {
            let _ = writeln!(text, "| {name} | {} |", word(data, path));
        }
    }
    for (name, value) in roofs(&data["roofs"]) {
        let _ = writeln!(text, "| {name} | {value} |");
    }
    match data["rows"].as_array() {
        Some(rows) => {
            let _ =
                writeln!(text, "\n| model | op | pass | shape | median | p10 | p90 | runs | FLOP/s | B/s | share |");
            let _ = writeln!(text, "|---|---|---|---|--:|--:|--:|--:|--:|--:|--:|");
            rows.iter().for_each(|row| text.push_str(&line(row)));
        }
        None => {
            let _ = writeln!(text, "\n```\n{}```", result.text);
        }
    }
    text
}

fn line(row: &Value) -> String {
    let number = |key: &str| row[key].as_f64().unwrap_or(f64::NAN);
    let before =
        row["times_before"].as_f64().map_or(String::new(), |times| format!(" ({times:.2} of the time before)"));
    format!(
        "| {} | {} | {} | {} | {}{before} | {} | {} | {} | {} | {} | {} of {} |\n",
        word(row, "/model"),
        word(row, "/op"),
        word(row, "/pass"),
        word(row, "/shape"),
        seconds(number("seconds")),
        seconds(number("p10")),
        seconds(number("p90")),
        row["runs"],
        flops(number("flops_per_second")),
        bytes(number("bytes_per_second")),
        share(number("share")),
        word(row, "/roof"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_and_a_unit() {
        assert_eq!(flops(1.234e12), "1.23 TFLOP/s");
        assert_eq!(bytes(45.67e9), "45.7 GB/s");
        assert_eq!([2.5, 0.0123, 4.56e-5].map(seconds), ["2.50 s", "12.3 ms", "45.6 us"]);
        assert_eq!(share(0.123), "12.3%");
    }
}
