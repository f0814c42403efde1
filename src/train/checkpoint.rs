//! Checkpoints: all that an exact resume needs, written so that a kill leaves a whole one.
//!
//! `state.safetensors` holds every tensor that trains with both moments (`optimizer/state.rs`);
//! `trainer_state.json` the step and what the run was. Data order, dropout and schedule follow from the step alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    agreement::told_by_all,
    loss_scale::LossScaler,
    optimizer::{Remembers, State, Updates},
    run_folder::{self, CheckpointWriter},
    team::{Shares, frame, unframe},
};
use crate::{
    error::{Error, Result},
    formats::{
        safetensors::{Checkpoint, Dtype},
        safetensors_writer::{TensorData, TensorHead, sort, write_safetensors},
    },
    hosts::{Digest, Hosts},
};

const STATE_FILE: &str = "state.safetensors";
const TRAINER_FILE: &str = "trainer_state.json";
/// Bytes at each end of a tensor that a digest looks at.
const ENDS: usize = 4096;

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
    /// The devices, on all hosts, with which the config gives so many: those that the run began on. None where it is not
    /// told.
    #[serde(default)]
    pub devices: Option<usize>,
    /// What each device computes, where there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shares: Option<Shares>,
}

/// Writes checkpoint-N and removes the oldest beyond `save_total_limit`: what the `holders` of all hosts remember,
/// together all of it. `extra` writes more into the folder. The first host writes; all have to call.
pub fn save(
    stage_dir: &Path,
    state: &TrainerState,
    holders: &[&dyn Remembers],
    save_total_limit: usize,
    hosts: &mut dyn Hosts,
    extra: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    // The parts that are here of each tensor, each with its holder.
    let mut states: BTreeMap<String, Vec<(usize, State)>> = BTreeMap::new();
    for (holder, states_of) in holders.iter().map(|holder| holder.states()).enumerate() {
        for state in states_of {
            states.entry(state.name.clone()).or_default().push((holder, state));
        }
    }
    let readers = holders.iter().map(|holder| holder.reader()).collect::<Result<Vec<_>>>()?;
    let mut heads = heads(&states, hosts)?;
    let whole = |name: &str, hosts: &mut dyn Hosts| -> Result<Vec<u8>> {
        let mut mine = Vec::new();
        for (holder, state) in states.get(name).into_iter().flatten() {
            mine.push((state.part.start as u64, readers[*holder](state)?));
        }
        // Whoever is alone needs no copies to say so.
        if hosts.count() == 1 {
            mine.sort_by_key(|(start, _)| *start);
            return Ok(mine.into_iter().map(|(_, bytes)| bytes).reduce(|a, b| [a, b].concat()).unwrap_or_default());
        }
        let gathered = hosts.gather(&frame(&mine))?;
        let mut parts: Vec<(u64, &[u8])> = gathered.iter().flat_map(|framed| unframe(framed)).collect();
        parts.sort_by_key(|(start, _)| *start);
        Ok(parts.into_iter().flat_map(|(_, bytes)| bytes).copied().collect())
    };
    if hosts.rank() > 0 {
        sort(&mut heads);
        heads.iter().try_for_each(|head| whole(&head.name, hosts).map(drop))?;
        return Ok(run_folder::checkpoint_dir(stage_dir, state.step));
    }
    let writer = CheckpointWriter::begin(stage_dir, state.step)?;
    write_safetensors(&writer.path().join(STATE_FILE), heads, &mut |head| {
        Ok(TensorData::Raw(whole(&head.name, hosts)?.into()))
    })?;
    let path = writer.path().join(TRAINER_FILE);
    let json = serde_json::to_vec_pretty(state).map_err(|error| Error::failed("trainer state").caused_by(error))?;
    crate::formats::atomic::write_file(&path, &json)?;
    extra(writer.path())?;
    writer.commit(save_total_limit)
}

/// The tensors of all hosts.
fn heads(states: &BTreeMap<String, Vec<(usize, State)>>, hosts: &mut dyn Hosts) -> Result<Vec<TensorHead>> {
    let head = |(name, parts): (&String, &Vec<(usize, State)>)| {
        let (_, State { dtype, shape, .. }) = &parts[0];
        (name.clone(), *dtype, shape.clone())
    };
    let mine: Vec<(String, Dtype, Vec<usize>)> = states.iter().map(head).collect();
    let told = told_by_all(&mine, hosts)?.into_iter().flatten();
    let all: BTreeMap<_, _> = told.map(|(name, dtype, shape)| (name, (dtype, shape))).collect();
    Ok(all.into_iter().map(|(name, (dtype, shape))| TensorHead { name, dtype, shape }).collect())
}

/// Where the run of a checkpoint stands.
///
/// # Errors
/// `Data`: the file is missing or broken.
pub fn read(folder: &Path) -> Result<TrainerState> {
    let path = folder.join(TRAINER_FILE);
    let bytes = std::fs::read(&path).map_err(|error| Error::reading(&path, error))?;
    serde_json::from_slice(&bytes)
        .map_err(|error| Error::data(format!("{} is not what this program wrote", path.display())).caused_by(error))
}

/// Where the run of a checkpoint stands, and of each tensor its name, its shape and its ends.
///
/// # Errors
/// `Data`: a file that is missing or broken.
pub fn digest(folder: &Path) -> Result<u64> {
    let path = folder.join(TRAINER_FILE);
    let mut digest = Digest::default();
    digest.add(&std::fs::read(&path).map_err(|error| Error::reading(&path, error))?);
    let checkpoint = Checkpoint::open(&folder.join(STATE_FILE))?;
    for name in checkpoint.names() {
        let tensor = checkpoint.require(name)?;
        digest.add(name.as_bytes());
        digest.add(format!("{:?} {:?}", tensor.dtype, tensor.shape).as_bytes());
        let end = tensor.bytes.len().min(ENDS);
        digest.add(&tensor.bytes[..end]);
        digest.add(&tensor.bytes[tensor.bytes.len() - end..]);
    }
    Ok(digest.value())
}

/// Reads a checkpoint back into those who remember it together, however it was divided when it was written. `fresh` is
/// what the run would begin with.
///
/// # Errors
/// `Data` when the checkpoint belongs to another run: other tensors, shapes, records or steps.
pub fn load(
    folder: &Path,
    holders: &mut [&mut dyn Remembers],
    fresh: &TrainerState,
    hosts: &mut dyn Hosts,
) -> Result<TrainerState> {
    let TrainerState { records, total_steps, .. } = *fresh;
    let state = read(folder)?;
    let other = |what: String| {
        Error::data(format!("{} belongs to another run: {what}", folder.display()))
            .hint("resume with the config and data the run was started with, or start anew with another --output-dir")
    };
    if state.records != records {
        return Err(other(format!("it had {} records, the data has {records}", state.records)));
    }
    if state.total_steps != total_steps {
        return Err(other(format!("it had {} steps, the config asks for {total_steps}", state.total_steps)));
    }
    let checkpoint = Checkpoint::open(&folder.join(STATE_FILE))?;
    let mine: BTreeSet<String> = holders.iter().flat_map(|holder| holder.states()).map(|state| state.name).collect();
    let names: BTreeSet<String> = told_by_all(&mine, hosts)?.into_iter().flatten().collect();
    if checkpoint.names().count() != names.len() {
        return Err(other("other tensors trained, or the optimizer kept them otherwise".into()));
    }
    for holder in holders {
        holder.restore(&mut |wanted| {
            let name = &wanted.name;
            let stored = checkpoint.get(name).ok_or_else(|| other(format!("it holds no {name}")))?;
            if (stored.dtype, stored.shape) != (wanted.dtype, &wanted.shape[..]) {
                let (is, now) = ((stored.dtype, stored.shape), (wanted.dtype, &wanted.shape));
                return Err(other(format!("{name} is {is:?}, now {now:?}")));
            }
            Ok(stored.bytes)
        })?;
    }
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes a checkpoint of two tensors.
    fn write(folder: &Path, step: u64, first: &[f32], last: &[f32]) {
        let tensors = BTreeMap::from([("a", first), ("b", last)]);
        let heads = tensors.iter().map(|(name, values)| TensorHead::f32(*name, vec![values.len()])).collect();
        std::fs::create_dir_all(folder).unwrap();
        write_safetensors(&folder.join(STATE_FILE), heads, &mut |head| {
            Ok(TensorData::F32(tensors[head.name.as_str()].to_vec().into()))
        })
        .unwrap();
        std::fs::write(folder.join(TRAINER_FILE), format!("{{\"step\": {step}}}")).unwrap();
    }

    #[test]
    fn checkpoints_of_other_steps_shapes_or_values_have_other_digests() {
        let dir = tempfile::tempdir().unwrap();
        let long = vec![1.0_f32; 3 * ENDS];
        let changed = |at: usize| {
            let mut values = long.clone();
            values[at] = 2.0;
            values
        };
        let kinds = [
            (3, long.clone(), vec![0.5; 4]),
            (4, long.clone(), vec![0.5; 4]),
            (3, changed(0), vec![0.5; 4]),
            (3, changed(long.len() - 1), vec![0.5; 4]),
            (3, long.clone(), vec![0.5; 5]),
        ];
        let mut seen = Vec::new();
        for (number, (step, first, last)) in kinds.iter().enumerate() {
            let folders = ["one", "two"].map(|copy| dir.path().join(format!("{copy}-{number}")));
            folders.iter().for_each(|folder| write(folder, *step, first, last));
            let [one, two] = folders.map(|folder| digest(&folder).unwrap());
            assert_eq!(one, two, "equal copies");
            assert!(!seen.contains(&one), "kind {number} has the digest of another");
            seen.push(one);
        }
        std::fs::remove_file(dir.path().join("one-0").join(TRAINER_FILE)).unwrap();
        assert_eq!(digest(&dir.path().join("one-0")).unwrap_err().kind, crate::error::ErrorKind::Data);
    }
}
