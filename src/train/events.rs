//! What a training run tells whoever watches it. The trainer never prints: it hands events to an [`Observer`].

use serde::{Deserialize, Deserializer, Serialize};
use std::path::{Path, PathBuf};

use super::team::DeviceTimes;

/// The figures of one optimizer step: one line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Optimizer steps done, counted from 1.
    pub step: u64,
    /// Passes over the data done, as a fraction.
    pub epoch: f64,
    /// Mean negative log-likelihood of the supervised tokens, nats.
    pub loss: f64,
    /// Global L2 norm of the gradients before clipping. Not finite where they overflowed and the step was skipped:
    /// `null` in the file.
    #[serde(deserialize_with = "number_or_null")]
    pub grad_norm: f64,
    /// The rate this step used.
    pub learning_rate: f64,
    /// Supervised tokens in the step.
    pub target_tokens: u64,
    /// Positions (text and picture) per second.
    pub tokens_per_second: f64,
    pub step_seconds: f64,
    /// The most memory of the device that was in use at once during the step, bytes.
    pub device_bytes: u64,
    /// What the loss was multiplied with on its way back, where it is (float16).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f64>,
    /// Steps skipped so far because gradients overflowed, where losses are scaled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped_steps: Option<u64>,
    /// Of each device, where there are several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceTimes>,
}

/// JSON has no number that is not finite; serde writes it as null.
fn number_or_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// What is about to be trained, told once before the first step of a stage.
#[derive(Clone, Debug, PartialEq)]
pub struct StageHeader {
    pub name: String,
    pub method: String,
    pub model: String,
    pub records: usize,
    pub total_steps: u64,
    /// Steps already done: 0, or where a resumed run goes on.
    pub first_step: u64,
    /// Records per optimizer step.
    pub batch: usize,
    pub trainable_parameters: u64,
    pub total_parameters: u64,
    pub output_dir: PathBuf,
}

#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// One line for people: what was computed once, how many records were truncated.
    Note(&'a str),
    /// Loading, features, evaluation.
    Progress {
        what: &'a str,
        done: usize,
        total: usize,
    },
    StageStart(&'a StageHeader),
    /// A step, and how many there will be.
    Step(&'a StepMetrics, u64),
    Saved(&'a Path),
    StageEnd {
        name: &'a str,
        output: &'a Path,
        seconds: f64,
    },
}

impl Event<'static> {
    /// Bytes of weights that are on the device, as progress in megabytes.
    pub fn loaded(done: u64, total: u64) -> Self {
        let megabytes = |bytes: u64| usize::try_from(bytes.div_ceil(1_000_000)).unwrap_or(usize::MAX);
        // Done is only what is done to the last byte.
        let total_megabytes = megabytes(total);
        let most = if done < total { total_megabytes.saturating_sub(1) } else { total_megabytes };
        Self::Progress { what: "MB of weights loaded", done: megabytes(done).min(most), total: total_megabytes }
    }
}

pub trait Observer {
    fn event(&mut self, event: Event<'_>);
}

/// Watches nothing.
pub struct Silent;

impl Observer for Silent {
    fn event(&mut self, _event: Event<'_>) {}
}
