//! Checkpoints: all that an exact resume needs, written so that a kill leaves a whole one.
//!
//! `state.safetensors` holds every tensor that trains with both moments (`optimizer_state.rs`);
//! `trainer_state.json` the step and what the run was. Data order, dropout and schedule follow from the step alone.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{
    loss_scale::LossScaler,
    optimizer::{Optimizer, Updates},
    optimizer_state::State,
    run_folder::CheckpointWriter,
    team::Shares,
};
use crate::{
    error::{Error, Result},
    formats::{
        safetensors::Checkpoint,
        safetensors_writer::{TensorData, TensorHead, write_safetensors},
    },
};

const STATE_FILE: &str = "state.safetensors";
const TRAINER_FILE: &str = "trainer_state.json";

/// Where a run stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// Optimizer steps done.
    pub step: u64,
    /// Updates so far.
    pub updates: Updates,
    pub total_steps: u64,
    /// Records of the data set: another number means other data.
    pub records: usize,
    /// Seconds trained so far.
    pub seconds: f64,
    /// Where losses are scaled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scaler: Option<LossScaler>,
    /// Micro-batches of a step, on all devices together.
    #[serde(default)]
    pub micro_batches: usize,
    /// What each device computes, where there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shares: Option<Shares>,
}

/// Writes checkpoint-N and removes the oldest beyond `save_total_limit`. `extra` writes more into the folder.
pub fn save(
    stage_dir: &Path,
    state: &TrainerState,
    optimizer: &Optimizer,
    save_total_limit: usize,
    extra: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let writer = CheckpointWriter::begin(stage_dir, state.step)?;
    let mut states = optimizer.states();
    states.sort_by(|a, b| a.name.cmp(&b.name));
    let head = |state: &State| TensorHead { name: state.name.clone(), dtype: state.dtype, shape: state.shape.clone() };
    let (heads, absmax) = (states.iter().map(head).collect(), optimizer.absmax()?);
    write_safetensors(&writer.path().join(STATE_FILE), heads, &mut |head| {
        let at = states.binary_search_by(|state| state.name.cmp(&head.name));
        let at = at.map_err(|_| Error::failed(format!("{} has no state", head.name)))?;
        Ok(TensorData::Raw(optimizer.read(&states[at], &absmax)?.into()))
    })?;
    let path = writer.path().join(TRAINER_FILE);
    let json = serde_json::to_vec_pretty(state).map_err(|error| Error::failed("trainer state").caused_by(error))?;
    crate::formats::atomic::write_file(&path, &json)?;
    extra(writer.path())?;
    writer.commit(save_total_limit)
}

/// Reads a checkpoint back into the optimizer. `fresh` is what the run would begin with.
///
/// # Errors
/// `Data` when the checkpoint belongs to another run: other tensors, shapes, records or steps.
pub fn load(folder: &Path, optimizer: &Optimizer, fresh: &TrainerState) -> Result<TrainerState> {
    let TrainerState { records, total_steps, micro_batches, .. } = *fresh;
    let path = folder.join(TRAINER_FILE);
    let bytes = std::fs::read(&path).map_err(|error| Error::reading(&path, error))?;
    let state: TrainerState = serde_json::from_slice(&bytes)
        .map_err(|error| Error::data(format!("{} is not what this program wrote", path.display())).caused_by(error))?;
    let other = |what: String| {
        Error::data(format!("{} belongs to another run: {what}", folder.display()))
            .hint("resume with the config and data the run was started with, or start anew with another --output-dir")
    };
    if state.records != records {
        return Err(other(format!("it had {} records, the data has {records}", state.records)));
    }
    // Those written before there were several devices do not say.
    if state.micro_batches != 0 && state.micro_batches != micro_batches {
        return Err(Error::usage(format!(
            "{} was trained with {} micro-batches a step, and now there are {micro_batches}",
            folder.display(),
            state.micro_batches
        ))
        .hint("devices times gradient_accumulation_steps must stay as it was: set the latter accordingly"));
    }
    if state.total_steps != total_steps {
        return Err(other(format!("it had {} steps, the config asks for {total_steps}", state.total_steps)));
    }
    let checkpoint = Checkpoint::open(&folder.join(STATE_FILE))?;
    if checkpoint.names().count() != optimizer.states().len() {
        return Err(other("other tensors trained, or the optimizer kept them otherwise".into()));
    }
    optimizer.restore(|wanted| {
        let name = &wanted.name;
        let stored = checkpoint.get(name).ok_or_else(|| other(format!("it holds no {name}")))?;
        if (stored.dtype, stored.shape) != (wanted.dtype, &wanted.shape[..]) {
            let (is, now) = ((stored.dtype, stored.shape), (wanted.dtype, &wanted.shape));
            return Err(other(format!("{name} is {is:?}, now {now:?}")));
        }
        Ok(stored.bytes)
    })?;
    Ok(state)
}
