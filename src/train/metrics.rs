//! `metrics.jsonl`: one line a logged step, appended and flushed, so that a killed run loses at most the line in hand.

use super::events::StepMetrics;
use crate::error::{Error, Result};
use crate::formats::atomic::write_file;
use std::{
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
};

pub const FILE_NAME: &str = "metrics.jsonl";

pub struct MetricsWriter {
    path: PathBuf,
    file: File,
}

impl MetricsWriter {
    /// Starts an empty `metrics.jsonl` in the stage folder `dir`, which must exist.
    pub fn create(dir: &Path) -> Result<Self> {
        let path = dir.join(FILE_NAME);
        let file = File::create(&path).map_err(|error| Error::writing(&path, error))?;
        Ok(Self { path, file })
    }

    /// Goes on with the file of an earlier run: lines of steps after `last_step`, and a line that a kill cut short,
    /// are dropped, because those steps are about to be done again.
    pub fn resume(dir: &Path, last_step: u64) -> Result<Self> {
        let path = dir.join(FILE_NAME);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
            Err(error) => return Err(Error::reading(&path, error)),
        };
        let mut kept = String::with_capacity(text.len());
        for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
            match serde_json::from_str::<StepMetrics>(line) {
                Ok(metrics) if metrics.step <= last_step => kept.push_str(line),
                _ => break,
            }
        }
        write_file(&path, kept.as_bytes())?;
        let file = OpenOptions::new().append(true).open(&path).map_err(|error| Error::writing(&path, error))?;
        Ok(Self { path, file })
    }

    pub fn write(&mut self, metrics: &StepMetrics) -> Result<()> {
        let mut line = serde_json::to_string(metrics)
            .map_err(|error| Error::failed(format!("cannot write step {} as JSON", metrics.step)).caused_by(error))?;
        line.push('\n');
        // One write call a line: a reader never sees half of one, short of a full disk.
        self.file
            .write_all(line.as_bytes())
            .and_then(|()| self.file.flush())
            .map_err(|error| Error::writing(&self.path, error))
    }
}

/// Every whole line of a `metrics.jsonl`, in order. A last line that a kill cut short is left out.
///
/// # Errors
/// [`ErrorKind::Data`](crate::error::ErrorKind::Data): the file is missing, or a line is not a step.
pub fn read(path: &Path) -> Result<Vec<StepMetrics>> {
    let text = fs::read_to_string(path).map_err(|error| Error::reading(path, error))?;
    text.split_inclusive('\n')
        .enumerate()
        .filter(|(_, line)| line.ends_with('\n') && !line.trim().is_empty())
        .map(|(index, line)| {
            serde_json::from_str(line).map_err(|error| {
                Error::data(format!("{}, line {}: not the figures of a step", path.display(), index + 1))
                    .caused_by(error)
            })
        })
        .collect()
}

#[cfg(test)]
pub(crate) fn example(step: u64, loss: f64) -> StepMetrics {
    StepMetrics {
        step,
        epoch: step as f64 / 10.0,
        loss,
        grad_norm: 1.5,
        learning_rate: 1e-4,
        target_tokens: 64,
        tokens_per_second: 1000.0,
        step_seconds: 0.25,
        device_bytes: 1 << 20,
        loss_scale: None,
        skipped_steps: None,
        devices: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_back_as_they_were_written_with_the_documented_keys() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = MetricsWriter::create(dir.path()).unwrap();
        let steps = [example(1, 2.5), example(2, 0.1 + 0.2)];
        for step in &steps {
            writer.write(step).unwrap();
        }
        let path = dir.path().join(FILE_NAME);
        assert_eq!(read(&path).unwrap(), steps);
        let first: serde_json::Value =
            serde_json::from_str(fs::read_to_string(&path).unwrap().lines().next().unwrap()).unwrap();
        let keys: Vec<&str> = first.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(
            keys,
            [
                "step",
                "epoch",
                "loss",
                "grad_norm",
                "learning_rate",
                "target_tokens",
                "tokens_per_second",
                "step_seconds",
                "device_bytes"
            ]
        );
    }

    #[test]
    fn a_skipped_step_has_no_gradient_norm() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = MetricsWriter::create(dir.path()).unwrap();
        let skipped = StepMetrics {
            grad_norm: f64::INFINITY,
            loss_scale: Some(65536.0),
            skipped_steps: Some(1),
            ..example(1, 2.0)
        };
        writer.write(&skipped).unwrap();
        let path = dir.path().join(FILE_NAME);
        assert!(fs::read_to_string(&path).unwrap().contains("\"grad_norm\":null"));
        let read = read(&path).unwrap();
        assert!(read[0].grad_norm.is_nan());
        assert_eq!((read[0].loss_scale, read[0].skipped_steps), (Some(65536.0), Some(1)));
    }

    #[test]
    fn resuming_drops_later_steps_and_a_line_cut_short() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = MetricsWriter::create(dir.path()).unwrap();
        for step in 1..=5 {
            writer.write(&example(step, 1.0)).unwrap();
        }
        let path = dir.path().join(FILE_NAME);
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"step\":6,\"lo").unwrap();
        assert_eq!(read(&path).unwrap().len(), 5);
        let mut writer = MetricsWriter::resume(dir.path(), 3).unwrap();
        writer.write(&example(4, 9.0)).unwrap();
        let steps: Vec<(u64, f64)> = read(&path).unwrap().iter().map(|m| (m.step, m.loss)).collect();
        assert_eq!(steps, [(1, 1.0), (2, 1.0), (3, 1.0), (4, 9.0)]);
        // Nothing to resume is an empty file.
        let empty = tempfile::tempdir().unwrap();
        MetricsWriter::resume(empty.path(), 0).unwrap();
        assert!(read(&empty.path().join(FILE_NAME)).unwrap().is_empty());
    }

    #[test]
    fn a_broken_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        fs::write(&path, "{\"step\":1}\n").unwrap();
        assert!(read(&path).unwrap_err().message.contains("line 1"));
    }
}
