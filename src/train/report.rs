//! `report.html`: what was trained, curves, results, sample answers with their pictures, in one file without a script.
//!
//! The same figures are in it as JSON, in an element with the id `report-data`.

use crate::error::{Error, Result};
use crate::formats::atomic::write_file;
use serde::Serialize;
use std::{
    fmt::{self, Write},
    path::Path,
};

#[derive(Clone, Debug, Default, Serialize)]
pub struct ReportData {
    pub title: String,
    /// The adapter it ran on.
    pub device: String,
    pub stages: Vec<StageReport>,
    pub results: Vec<ResultRow>,
    pub samples: Vec<SampleAnswer>,
    /// Ready to paste.
    pub next_commands: Vec<String>,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct StageReport {
    pub name: String,
    pub method: String,
    pub model: String,
    pub data: String,
    pub records: usize,
    pub steps: u64,
    pub seconds: f64,
    pub trainable_parameters: u64,
    pub total_parameters: u64,
    /// None: no step was logged.
    pub final_loss: Option<f64>,
    /// The folder written.
    pub output: String,
    /// Keys and values of the config.
    pub settings: Vec<(String, String)>,
    /// The curve, inlined as it is: from [`super::plot::loss_svg`], never from outside.
    #[serde(skip)]
    pub loss_svg: String,
}

/// One evaluation beside its baselines.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ResultRow {
    pub task: String,
    pub correct: usize,
    pub total: usize,
    /// Name and share of right answers, 0 to 1.
    pub baselines: Vec<(String, f64)>,
}

impl ResultRow {
    /// Share of right answers, 0 to 1.
    pub fn accuracy(&self) -> f64 {
        self.correct as f64 / self.total.max(1) as f64
    }
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct SampleAnswer {
    /// A PNG file; empty for a question without a picture.
    #[serde(skip)]
    pub image_png: Vec<u8>,
    pub question: String,
    pub expected: String,
    pub answer: String,
}

impl SampleAnswer {
    fn right(&self) -> bool {
        self.answer.trim().eq_ignore_ascii_case(self.expected.trim())
    }
}

/// Writes [`html`] to `path`.
pub fn write_report(path: &Path, report: &ReportData) -> Result<()> {
    write_file(path, html(report)?.as_bytes())
}

/// The page.
///
/// # Errors
/// [`ErrorKind::Failed`](crate::error::ErrorKind::Failed): it cannot be put together.
pub fn html(report: &ReportData) -> Result<String> {
    let mut page = String::new();
    write_page(&mut page, report)
        .map_err(|error| Error::failed("cannot put the report together").caused_by(error.to_string()))?;
    Ok(page)
}

fn write_page(page: &mut String, report: &ReportData) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let title = escape(&report.title);
    write!(
        page,
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\"><title>{title}</title>\n\
         <style>\n{STYLE}</style></head>\n<body>\n<header><h1>{title}</h1>"
    )?;
    let seconds: f64 = report.stages.iter().map(|stage| stage.seconds).sum();
    writeln!(page, "<p>Trained on {} in {}.</p></header>", escape(&report.device), duration(seconds))?;
    if !report.results.is_empty() {
        page.push_str("<section><h2>Results</h2>\n");
        report.results.iter().try_for_each(|row| write_result(page, row))?;
        page.push_str("</section>\n");
    }
    for stage in &report.stages {
        write_stage(page, stage)?;
    }
    if !report.samples.is_empty() {
        let right = report.samples.iter().filter(|sample| sample.right()).count();
        let total = report.samples.len();
        writeln!(
            page,
            "<section><h2>Sample answers</h2>\n<p>Chosen so that mistakes are among them: {right} of these {total} are right.</p>"
        )?;
        page.push_str("<div class=\"samples\">\n");
        report.samples.iter().try_for_each(|sample| write_sample(page, sample))?;
        page.push_str("</div></section>\n");
    }
    if !report.next_commands.is_empty() {
        page.push_str("<section><h2>What next</h2>\n");
        for command in &report.next_commands {
            writeln!(page, "<pre><code>{}</code></pre>", escape(command))?;
        }
        page.push_str("</section>\n");
    }
    // `</script>` in a string would end the element; JSON may write `<` as an escape instead.
    let json = serde_json::to_string(report)?.replace('<', "\\u003c");
    write!(page, "<script type=\"application/json\" id=\"report-data\">{json}</script>\n</body></html>\n")?;
    Ok(())
}

fn write_stage(page: &mut String, stage: &StageReport) -> fmt::Result {
    writeln!(page, "<section><h2>Stage <em>{}</em></h2>\n<dl class=\"facts\">", escape(&stage.name))?;
    let share = 100.0 * stage.trainable_parameters as f64 / stage.total_parameters.max(1) as f64;
    let facts = [
        ("method", stage.method.clone()),
        ("model", stage.model.clone()),
        ("data", format!("{} ({} records)", stage.data, grouped(stage.records as u64))),
        (
            "trained",
            format!(
                "{} of {} parameters ({share:.1} %)",
                grouped(stage.trainable_parameters),
                grouped(stage.total_parameters)
            ),
        ),
        ("steps", grouped(stage.steps)),
        ("time", duration(stage.seconds)),
        ("last loss", stage.final_loss.map_or_else(|| "–".into(), |loss| format!("{loss:.4}"))),
        ("written to", stage.output.clone()),
    ];
    for (name, value) in facts {
        writeln!(page, "<div><dt>{name}</dt><dd>{}</dd></div>", escape(&value))?;
    }
    writeln!(page, "</dl>\n<figure>{}</figure>", stage.loss_svg)?;
    if !stage.settings.is_empty() {
        page.push_str("<details><summary>Every setting</summary><table>\n");
        for (key, value) in &stage.settings {
            writeln!(page, "<tr><th scope=\"row\">{}</th><td>{}</td></tr>", escape(key), escape(value))?;
        }
        page.push_str("</table></details>");
    }
    page.push_str("</section>\n");
    Ok(())
}

/// A bar for the model and one for each baseline, with the figures in words beside them.
fn write_result(page: &mut String, row: &ResultRow) -> fmt::Result {
    let (correct, total) = (grouped(row.correct as u64), grouped(row.total as u64));
    writeln!(page, "<h3>{}</h3>\n<table class=\"bars\">", escape(&row.task))?;
    let note = format!("{correct} of {total} right");
    let bars = std::iter::once(("this model", row.accuracy(), note.as_str(), "model"))
        .chain(row.baselines.iter().map(|(name, share)| (name.as_str(), *share, "", "baseline")));
    for (name, share, note, class) in bars {
        let percent = 100.0 * share.clamp(0.0, 1.0);
        writeln!(
            page,
            "<tr class=\"{class}\"><th scope=\"row\">{}</th><td class=\"bar\"><span style=\"width:{percent:.2}%\">\
             </span></td><td class=\"share\">{percent:.1} %</td><td class=\"note\">{note}</td></tr>",
            escape(name)
        )?;
    }
    page.push_str("</table>\n");
    Ok(())
}

fn write_sample(page: &mut String, sample: &SampleAnswer) -> fmt::Result {
    let (class, verdict) = if sample.right() { ("right", "right") } else { ("wrong", "wrong") };
    write!(page, "<article class=\"{class}\">")?;
    if !sample.image_png.is_empty() {
        write!(page, "<img alt=\"\" src=\"data:image/png;base64,{}\">", base64(&sample.image_png))?;
    }
    write!(page, "<div><p class=\"question\">{}</p><p>{}", escape(&sample.question), escape(&sample.answer))?;
    write!(page, " <span class=\"verdict\">{verdict}</span></p>")?;
    if !sample.right() {
        write!(page, "<p class=\"expected\">expected: {}</p>", escape(&sample.expected))?;
    }
    writeln!(page, "</div></article>")
}

/// Text for element content and quoted attributes.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}

/// A number with its thousands set apart: `1,234,567`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `41 s`, `3 min 20 s`, `2 h 05 min`.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0).round() as u64;
    match whole {
        0..60 => format!("{whole} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole / 60 % 60),
    }
}

/// An 8-bit RGB picture, `width * height * 3` bytes, as a PNG file.
///
/// # Errors
/// [`ErrorKind::Failed`](crate::error::ErrorKind::Failed): the number of bytes is not that of the size.
pub fn png(width: u32, height: u32, rgb: &[u8]) -> Result<Vec<u8>> {
    let mut file = std::io::Cursor::new(Vec::new());
    let expected = width as usize * height as usize * 3;
    if rgb.len() != expected {
        return Err(Error::failed(format!("a picture of {width}x{height} has {expected} bytes, not {}", rgb.len())));
    }
    image::write_buffer_with_format(&mut file, rgb, width, height, image::ColorType::Rgb8, image::ImageFormat::Png)
        .map_err(|error| Error::failed("cannot write a picture as PNG").caused_by(error))?;
    Ok(file.into_inner())
}

/// RFC 4648, with padding.
fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits = group.iter().enumerate().fold(0_u32, |bits, (i, byte)| bits | u32::from(*byte) << (16 - 8 * i));
        for position in 0..4 {
            let letter = LETTERS[(bits >> (18 - 6 * position) & 63) as usize];
            text.push(if position <= group.len() { char::from(letter) } else { '=' });
        }
    }
    text
}

const STYLE: &str = "\
:root { --ink: #1f2328; --soft: #59636e; --page: #fbfbfa; --card: #fff; --edge: #dfe3e8; --line: #1f6feb; \
--good: #1a7f37; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa4b0; --page: #0d1117; --card: #161b22; \
--edge: #30363d; --line: #6cb0ff; --good: #56d364; --bad: #ff8a80 } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, 'DejaVu Sans', sans-serif; color: var(--ink); background: var(--page); \
max-width: 960px; margin: 0 auto; padding: 32px 20px 64px }
h1 { font-size: 28px; line-height: 1.2; margin: 0 } h2 { font-size: 20px; margin: 0 0 12px } \
h2 em { font-style: normal; color: var(--line) }
h3 { font-size: 16px; margin: 8px 0 }
header p { color: var(--soft); margin: 6px 0 24px }
section { background: var(--card); border: 1px solid var(--edge); border-radius: 12px; padding: 20px 24px; \
margin: 0 0 20px }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 10px 24px; margin: 0 }
dt, .note { color: var(--soft); font-size: 13px } dd { margin: 0; overflow-wrap: anywhere }
figure { margin: 16px 0 0 } figure svg { width: 100%; height: auto } figure .loss-curve .page { fill: none }
table { border-collapse: collapse; width: 100% } th { text-align: left; font-weight: normal }
details { margin-top: 12px } summary { cursor: pointer; color: var(--soft) }
details th, details td { border-top: 1px solid var(--edge); padding: 3px 8px 3px 0; font: 13px/1.5 ui-monospace, \
'DejaVu Sans Mono', monospace; overflow-wrap: anywhere; vertical-align: top }
.bars th, .bars td { padding: 5px 12px 5px 0 } .bars th { width: 34% } .bar { width: 40% }
.bar span { display: block; height: 14px; border-radius: 4px; min-width: 2px; background: var(--soft); opacity: .55 }
.model .bar span { background: var(--line); opacity: 1 } .model th, .model .share { font-weight: 600 }
.share { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(265px, 1fr)); gap: 12px }
article { display: flex; gap: 12px; border: 1px solid var(--edge); border-left: 4px solid var(--good); \
border-radius: 8px; padding: 10px } article.wrong { border-left-color: var(--bad) }
article img { width: 96px; height: 96px; object-fit: contain; image-rendering: pixelated; border-radius: 4px; \
flex: none } article p { margin: 0 0 4px; overflow-wrap: anywhere }
.question { font-weight: 600 } .expected { color: var(--soft) }
.verdict { font-size: 12px; color: var(--good) } .wrong .verdict { color: var(--bad) }
pre { background: var(--page); border: 1px solid var(--edge); border-radius: 8px; padding: 10px 14px; margin: 8px 0; \
overflow-x: auto; font: 14px/1.5 ui-monospace, 'DejaVu Sans Mono', monospace }
";

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> ReportData {
        let stage = StageReport {
            name: "finetune".into(),
            settings: vec![("version".into(), "<v1>".into())],
            loss_svg: super::super::plot::loss_svg("loss", &[]).unwrap(),
            ..StageReport::default()
        };
        let sample = SampleAnswer {
            image_png: png(2, 1, &[255, 0, 0, 0, 0, 255]).unwrap(),
            question: "is there a <b> & \"red\" shape?".into(),
            expected: "yes".into(),
            answer: "</script>no".into(),
        };
        let baselines = vec![("most frequent answer".into(), 0.67)];
        ReportData {
            title: "easy-VQA".into(),
            device: "llvmpipe".into(),
            stages: vec![stage],
            results: vec![ResultRow { task: "easy-vqa".into(), correct: 9673, total: 9673, baselines }],
            samples: vec![sample],
            next_commands: vec!["wgpu-llava generate --prompt 'what <shape>?'".into()],
        }
    }

    #[test]
    fn everything_from_outside_is_escaped() {
        let page = html(&example()).unwrap();
        assert!(page.contains("is there a &lt;b&gt; &amp; &quot;red&quot; shape?"));
        assert!(page.contains("&lt;v1&gt;") && page.contains("&#39;what &lt;shape&gt;?&#39;"));
        assert!(!page.contains("<b>") && page.matches("</script>").count() == 1);
        assert!(page.contains("9,673 of 9,673 right") && page.contains("67.0 %"));
    }

    #[test]
    fn the_figures_are_there_for_programs_too() {
        let page = html(&example()).unwrap();
        let json = page.split_once("id=\"report-data\">").unwrap().1.split_once("</script>").unwrap().0;
        let data: serde_json::Value = serde_json::from_str(json).unwrap();
        assert_eq!(data["samples"][0]["answer"], "</script>no");
        assert_eq!(data["results"][0]["correct"], 9673);
    }

    #[test]
    fn base64_is_that_of_the_rfc() {
        let cases = [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")];
        for (plain, encoded) in cases {
            assert_eq!(base64(plain.as_bytes()), encoded);
        }
        assert_eq!(base64(&[0xfb, 0xff]), "+/8=");
    }

    #[test]
    fn figures_are_written_for_people() {
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([0.4, 59.6, 200.0, 7500.0].map(duration), ["0 s", "1 min 00 s", "3 min 20 s", "2 h 05 min"]);
        assert!(png(2, 2, &[0; 3]).is_err());
    }

    #[test]
    fn an_empty_report_is_a_page() {
        assert!(html(&ReportData::default()).unwrap().ends_with("</html>\n"));
    }
}
