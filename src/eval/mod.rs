//! Benchmarks: a model is asked what it has never seen, and its answers are counted.
//!
//! Must never know: the terminal. What happens is told to an [`Observer`]; [`Outcome::table`] is for people.

pub mod easy_vqa;

use std::{fmt::Write, path::Path};

use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    data::{Template, Version},
    error::{Error, Result, nearest},
    formats::atomic::write_file,
    gpu::Gpu,
    hub::id_or_path,
    models::open::{Place, open},
    train::{
        events::Observer,
        report::{ResultRow, SampleAnswer, grouped},
    },
};

/// The benchmarks there are.
pub const TASKS: [&str; 1] = [easy_vqa::TASK];

/// What to evaluate.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// One of [`TASKS`].
    pub task: &'a str,
    /// The template to ask in.
    pub version: &'a str,
    /// A folder, or `embedded:NAME`.
    pub model: &'a str,
    pub adapter: Option<&'a Path>,
    /// So many questions, drawn once and for all; all when absent.
    pub limit: Option<usize>,
    /// Writes `answers.jsonl` and `results.json` there.
    pub out: Option<&'a Path>,
    pub data: Option<&'a Path>,
}

impl Request<'_> {
    /// What can be known to be wrong before a device is opened.
    ///
    /// # Errors
    /// `Usage`: an unknown task, or data for one that brings its own.
    pub fn check(&self) -> Result<()> {
        if !TASKS.contains(&self.task) {
            let near = nearest(self.task, TASKS).unwrap_or_default();
            return Err(Error::usage(format!("there is no benchmark `{}`; the nearest is `{near}`", self.task))
                .hint(format!("there are: {}", TASKS.join(", "))));
        }
        Version::check(self.version)?;
        if Template::named(self.version).is_ok_and(Template::is_plain) {
            return Err(Error::usage(format!("--version {} has no place for a question", self.version))
                .hint("leave it out, or name the template that the model was tuned with, such as v1"));
        }
        if self.data.is_some() {
            return Err(Error::usage("`--data` for easy-vqa is known, but not built yet")
                .hint("leave it out: the data set is in the program"));
        }
        Ok(())
    }
}

/// One question and what was answered.
#[derive(Clone, Debug, Serialize)]
pub struct Answer {
    /// Number of the question in the test set, from 0.
    pub question_id: usize,
    pub image: String,
    pub question: String,
    pub expected: String,
    pub answer: String,
    pub correct: bool,
    /// What the baselines answer, in the order of the row.
    pub baselines: Vec<String>,
}

/// The result of a benchmark.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub row: ResultRow,
    /// How many questions the test set has.
    pub available: usize,
    pub answers: Vec<Answer>,
    /// A few of the answers, with their pictures.
    pub samples: Vec<SampleAnswer>,
    pub seconds: f64,
}

/// Runs a benchmark on a model, whose layers are in parts where there are several devices.
///
/// # Errors
/// `Usage`: an unknown task, or a model that cannot do it.
pub fn run(gpus: &[Gpu], request: &Request<'_>, observer: &mut dyn Observer) -> Result<Outcome> {
    request.check()?;
    let opened = open(gpus, Place::parse(request.model), request.adapter)?;
    let outcome = easy_vqa::evaluate(&opened, request.version, request.limit, observer)?;
    if let Some(out) = request.out {
        outcome.write(out, request)?;
    }
    Ok(outcome)
}

impl Outcome {
    /// What `--json` prints and `results.json` holds.
    pub fn json(&self) -> Value {
        let baselines: serde_json::Map<String, Value> =
            self.row.baselines.iter().map(|(name, share)| (name.clone(), json!(share))).collect();
        json!({
            "task": self.row.task,
            "correct": self.row.correct,
            "total": self.row.total,
            "accuracy": self.row.accuracy(),
            "baselines": baselines,
            "questions_available": self.available,
            "seconds": self.seconds,
        })
    }

    /// The accuracy above the baselines, a line each.
    pub fn table(&self) -> String {
        let (total, available) = (grouped(self.row.total as u64), grouped(self.available as u64));
        let mut text = format!("{} · {total} of {available} test questions", self.row.task);
        let own = [("this model".to_string(), self.row.accuracy())];
        let rows = own.iter().chain(&self.row.baselines);
        let width = rows.clone().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        for (name, share) in rows {
            // Writing to a string does not fail.
            let _ = write!(text, "\n  {name:width$}  {:5.1} %", 100.0 * share);
        }
        text
    }

    fn write(&self, out: &Path, request: &Request<'_>) -> Result<()> {
        std::fs::create_dir_all(out).map_err(|source| Error::writing(out, source))?;
        let failed = |error: serde_json::Error| Error::failed("cannot write an answer as JSON").caused_by(error);
        let mut lines = String::new();
        for answer in &self.answers {
            lines += &serde_json::to_string(answer).map_err(failed)?;
            lines.push('\n');
        }
        write_file(&out.join("answers.jsonl"), lines.as_bytes())?;
        let mut results = self.json();
        results["model"] = json!(id_or_path(request.model));
        results["version"] = json!(request.version);
        results["adapter"] = json!(request.adapter.map(|path| id_or_path(&path.display().to_string())));
        write_file(&out.join("results.json"), format!("{results:#}\n").as_bytes())
    }
}
