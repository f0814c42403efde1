//! What a run would do, found out without a device: what `train --dry-run` tells.

use super::{
    config::{RunConfig, StageConfig},
    events::Observer,
    start::Prepared,
    trainer,
};
use crate::{
    data::{ImageSource, dataset::counted, sampler::Plan},
    error::Result,
};

/// Opens every model and data set, tokenises the records, looks for their pictures; one line a stage comes back.
///
/// A stage that begins where another ends is checked against the model that the other one starts from.
///
/// # Errors
/// What the run itself would fail with before its first step, less what only the device can tell.
pub fn check(run: &RunConfig, observer: &mut dyn Observer) -> Result<Vec<String>> {
    let mut before: Option<Prepared> = None;
    let mut lines = Vec::new();
    for stage in &run.stages {
        let prepared = match (&stage.model_name_or_path, before.take()) {
            (None, Some(before)) => Prepared::after(stage, before)?,
            _ => Prepared::open(stage, None)?,
        };
        prepared.check_split(stage, run.devices.len())?;
        let dataset = prepared.dataset(stage, observer)?;
        prepared.processor(stage)?;
        // One of them read shows that the format is built.
        let first = (0..dataset.len()).find_map(|index| dataset.record(index).images.first());
        first.map(ImageSource::load).transpose()?;
        let plan = trainer::plan(stage, &dataset, stage.ranks(run.devices.len().max(1)))?;
        lines.push(line(stage, prepared.folder.name(), dataset.len(), &plan));
        before = Some(prepared);
    }
    Ok(lines)
}

fn line(stage: &StageConfig, model: &str, records: usize, plan: &Plan) -> String {
    let (title, method, steps, batch) = (stage.title(), stage.method_line(), plan.total_steps(), plan.batch());
    format!("{title}: {method} on {model}, {}, {steps} steps of {batch}", counted(records))
}
