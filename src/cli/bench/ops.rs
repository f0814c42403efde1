//! `bench ops`: roofs, and every op at the shapes of 7B and of the embedded model.

use std::fmt::Write;

use serde_json::{Value, json};

use super::{
    Outcome,
    report::{self, bytes, flops, seconds, share},
    today,
};
use crate::{
    bench::{self, Row},
    cli::{
        args::{BenchArgs, GlobalArgs},
        open_device,
        ui::Ui,
    },
    error::{Error, Result},
    ops::{
        OPS,
        roof::{self, Roofs},
    },
    train::events::{Event, Observer},
};

pub fn run(args: &BenchArgs, global: &GlobalArgs, before: Option<&Value>, ui: &mut Ui) -> Result<Outcome> {
    let gpu = open_device(global, ui)?;
    let cases = bench::cases(&gpu, args.filter.as_deref());
    if let (true, Some(filter)) = (cases.is_empty(), &args.filter) {
        let known: Vec<&str> = OPS.iter().map(|op| op.name).collect();
        return Err(Error::usage(format!("--filter {filter}: no case of any op has that in its name"))
            .hint(format!("ops are {}", known.join(", "))));
    }
    ui.line("  roofs");
    let roofs = Roofs::measure(&gpu, &[])?;
    let (mut rows, mut left_out) = (Vec::new(), Vec::new());
    for (done, case) in cases.iter().enumerate() {
        let name = case.name();
        ui.event(Event::Progress { what: "cases", done, total: cases.len() });
        match bench::measure(&gpu, &roofs, case)? {
            Some(row) => rows.push(row),
            None => left_out.push(name),
        }
    }
    ui.event(Event::Progress { what: "cases", done: cases.len(), total: cases.len() });
    let mut data = bench::head("ops", &gpu, &today());
    data.insert("clock".into(), json!(roofs.clock.as_str()));
    data.insert("roofs".into(), bench::roofs_json(&roofs));
    let rows_json: Vec<Value> = rows.iter().map(|row| with_ratio(row, before)).collect();
    let text = text(&roofs, &rows, &rows_json, &left_out);
    data.insert("rows".into(), Value::Array(rows_json));
    data.insert("left_out".into(), json!(left_out));
    Ok(Outcome { data: Value::Object(data), text })
}

/// The row, with its time over that of the same row of `--compare`, where there is one.
fn with_ratio(row: &Row, before: Option<&Value>) -> Value {
    let mut json = row.json();
    let same = |other: &&Value| ["op", "pass", "model", "shape"].iter().all(|key| other[*key] == json[*key]);
    let then = before.and_then(|before| before["rows"].as_array()?.iter().find(same)?["seconds"].as_f64());
    if let Some(then) = then.filter(|&then| then > 0.0) {
        json["times_before"] = json!(row.samples.median() / then);
    }
    json
}

fn text(roofs: &Roofs, rows: &[Row], json: &[Value], left_out: &[String]) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    for (name, value) in report::roofs(&bench::roofs_json(roofs)) {
        let _ = writeln!(text, "  {name:<30} {value}");
    }
    let _ = writeln!(text, "  {:<30} {}", "clock", roofs.clock.as_str());
    let mut heading = ("", "");
    for (row, json) in rows.iter().zip(json) {
        if heading != (row.model, row.op) {
            heading = (row.model, row.op);
            let _ = writeln!(text, "\n{}  {}", row.model, row.op);
        }
        let rate = if row.roof == roof::COPY { bytes(row.bytes_per_second()) } else { flops(row.flops_per_second()) };
        let spread = format!("{} to {}", seconds(row.samples.quantile(0.1)), seconds(row.samples.quantile(0.9)));
        let runs = row.samples.seconds.len();
        let before =
            json["times_before"].as_f64().map_or(String::new(), |times| format!("  {times:.2} of the time before"));
        let cached = if row.cached { ", in caches" } else { "" };
        let clock = if row.samples.clock == roofs.clock { "" } else { ", by the host's clock" };
        let _ = writeln!(
            text,
            "  {:<22} {:<28} {:>9}  {spread:<22} {runs:>3} runs  {rate:>14}  {:>5} of {}{cached}{clock}{before}",
            row.pass,
            row.shape,
            seconds(row.samples.median()),
            share(row.share),
            row.roof,
        );
    }
    if !left_out.is_empty() {
        let _ = writeln!(text, "\nleft out, for their size: {}", left_out.join("; "));
    }
    text
}
