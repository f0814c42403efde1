//! The run folder: everything in it appears whole or not at all.
//!
//! [`crate::formats::atomic`] writes it all, so a kill at any moment leaves whole checkpoints only, and temporary
//! leftovers, which the next start removes.

use crate::{
    error::{Error, Result},
    formats::atomic::{self, NewFolder, write_file},
};
use serde::{Deserialize, Serialize};
use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

/// As resolved; `train DIR/config.toml` repeats the run.
pub const CONFIG_FILE: &str = "config.toml";
const FINISHED_FILE: &str = "finished.json";
const CHECKPOINT_PREFIX: &str = "checkpoint-";
/// What is in a folder, sorted; empty where there is no such folder.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = match fs::read_dir(folder) {
        Ok(found) => found
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<std::io::Result<Vec<_>>>()
            .map_err(|error| Error::reading(folder, error))?,
        Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(Error::reading(folder, error)),
    };
    paths.sort();
    Ok(paths)
}

/// `STAGE_DIR/checkpoint-<step>`.
pub fn checkpoint_dir(stage_dir: &Path, step: u64) -> PathBuf {
    stage_dir.join(format!("{CHECKPOINT_PREFIX}{step}"))
}

/// A checkpoint being written; it gets its name when it is whole.
pub struct CheckpointWriter {
    folder: NewFolder,
    target: PathBuf,
    stage_dir: PathBuf,
}

impl CheckpointWriter {
    pub fn begin(stage_dir: &Path, step: u64) -> Result<Self> {
        let target = checkpoint_dir(stage_dir, step);
        Ok(Self { folder: NewFolder::create(&target)?, target, stage_dir: stage_dir.to_path_buf() })
    }

    /// Where to write the files to.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Makes it `checkpoint-N`, then deletes the oldest until `save_total_limit` (at least 1) are left. One of the
    /// same step that is there already stays: it is the same, and it is whole.
    pub fn commit(self, save_total_limit: usize) -> Result<PathBuf> {
        if !self.target.exists() {
            self.folder.commit()?;
        }
        let found = checkpoints(&self.stage_dir)?;
        for (_, path) in found.iter().take(found.len().saturating_sub(save_total_limit.max(1))) {
            atomic::remove_folder(path)?;
        }
        Ok(self.target)
    }
}

/// Every whole checkpoint of a stage with its step, oldest first.
pub fn checkpoints(stage_dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found: Vec<(u64, PathBuf)> = entries(stage_dir)?
        .into_iter()
        .filter(|path| path.is_dir())
        .filter_map(|path| {
            let name = path.file_name()?.to_str()?.strip_prefix(CHECKPOINT_PREFIX)?;
            Some((name.parse().ok()?, path))
        })
        .collect();
    found.sort();
    Ok(found)
}

/// The newest whole checkpoint of a stage: its step and its folder.
pub fn latest_checkpoint(stage_dir: &Path) -> Result<Option<(u64, PathBuf)>> {
    Ok(checkpoints(stage_dir)?.pop())
}

/// Removes what a killed run left half-written in `folder` (not in the folders below it).
pub fn remove_leftovers(folder: &Path) -> Result<()> {
    for path in entries(folder)? {
        if atomic::is_leftover(&path) {
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(|error| Error::failed(format!("cannot remove {}", path.display())).caused_by(error))?;
        }
    }
    Ok(())
}

/// Written when a stage is done and its output is in place.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FinishedStage {
    pub steps: u64,
    pub seconds: f64,
    /// The output, relative to the stage folder: `model` or `adapter`.
    pub output: String,
    pub records: usize,
    pub trainable_parameters: u64,
    pub total_parameters: u64,
}

pub fn mark_finished(stage_dir: &Path, finished: &FinishedStage) -> Result<()> {
    let path = stage_dir.join(FINISHED_FILE);
    let text = serde_json::to_vec_pretty(finished)
        .map_err(|error| Error::failed(format!("cannot write {}", path.display())).caused_by(error))?;
    write_file(&path, &text)
}

/// What [`mark_finished`] wrote, or none where the stage is not done.
pub fn finished(stage_dir: &Path) -> Result<Option<FinishedStage>> {
    let path = stage_dir.join(FINISHED_FILE);
    match fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|error| {
            Error::data(format!("{} is not what this program wrote", path.display()))
                .caused_by(error)
                .hint("delete the file to do the rest of the stage again from its newest checkpoint")
        }),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::reading(&path, error)),
    }
}

/// Where a run starts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StartPoint {
    /// Index of the first stage that is not finished; the number of stages where all are.
    pub stage: usize,
    /// The newest checkpoint of that stage: its step and its folder.
    pub checkpoint: Option<(u64, PathBuf)>,
    /// Whether an earlier run is being gone on with.
    pub resumed: bool,
}

/// Makes the run folder ready: refuses a folder that holds a run unless `resume`, removes leftovers of a kill, creates
/// the stage folders and finds where to start. With `resume` and no run there, it is a start from the beginning, so
/// that a script may say `--resume` always.
///
/// # Errors
/// [`ErrorKind::Usage`](crate::error::ErrorKind::Usage): the folder holds a run and `resume` is false.
pub fn open_run(output_dir: &Path, stage_dirs: &[PathBuf], resume: bool) -> Result<StartPoint> {
    // The nearest thing on its way that exists must be a folder.
    if let Some(there) = output_dir.ancestors().find(|path| path.exists())
        && !there.is_dir()
    {
        return Err(Error::usage(format!("output_dir: {} is a file, not a folder", there.display())));
    }
    let existing = holds_run(output_dir, stage_dirs)?;
    if existing && !resume {
        return Err(Error::usage(format!("{} already holds a run", output_dir.display()))
            .hint("go on with that run: add --resume")
            .hint("start another one: choose a folder that is not there yet with --output-dir"));
    }
    for folder in std::iter::once(output_dir).chain(stage_dirs.iter().map(PathBuf::as_path)) {
        fs::create_dir_all(folder).map_err(|error| Error::writing(folder, error))?;
        remove_leftovers(folder)?;
    }
    for (stage, folder) in stage_dirs.iter().enumerate() {
        if finished(folder)?.is_none() {
            return Ok(StartPoint { stage, checkpoint: latest_checkpoint(folder)?, resumed: existing });
        }
    }
    Ok(StartPoint { stage: stage_dirs.len(), checkpoint: None, resumed: existing })
}

fn holds_run(output_dir: &Path, stage_dirs: &[PathBuf]) -> Result<bool> {
    if output_dir.join(CONFIG_FILE).exists() {
        return Ok(true);
    }
    for folder in stage_dirs {
        let files = [super::metrics::FILE_NAME, FINISHED_FILE];
        if files.iter().any(|file| folder.join(file).exists()) || latest_checkpoint(folder)?.is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The run below `runs` whose config was written last.
pub fn latest_run(runs: &Path) -> Result<Option<PathBuf>> {
    let mut found: Vec<(SystemTime, PathBuf)> = entries(runs)?
        .into_iter()
        .filter_map(|path| Some((path.join(CONFIG_FILE).metadata().ok()?.modified().ok()?, path)))
        .collect();
    found.sort();
    Ok(found.pop().map(|(_, path)| path))
}

/// A folder name that sorts by time: `2026-02-28_23-59-59`, UTC.
pub fn dated_name(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
    // Days to a civil date by Howard Hinnant's `civil_from_days`: years that begin in March, eras of 400 of them.
    let days = seconds / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}_{hour:02}-{minute:02}-{second:02}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use std::time::Duration;

    fn save(stage: &Path, step: u64, limit: usize) -> PathBuf {
        let writer = CheckpointWriter::begin(stage, step).unwrap();
        fs::write(writer.path().join("state"), step.to_string()).unwrap();
        writer.commit(limit).unwrap()
    }

    fn names(folder: &Path) -> Vec<String> {
        entries(folder).unwrap().iter().map(|path| path.file_name().unwrap().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn rotation_deletes_the_oldest_by_number() {
        let dir = tempfile::tempdir().unwrap();
        for step in [2, 10, 9, 100] {
            save(dir.path(), step, 10);
        }
        assert_eq!(latest_checkpoint(dir.path()).unwrap().unwrap().0, 100);
        save(dir.path(), 101, 2);
        assert_eq!(names(dir.path()), ["checkpoint-100", "checkpoint-101"]);
        // Even a limit of 0 keeps the newest.
        save(dir.path(), 102, 0);
        assert_eq!(names(dir.path()), ["checkpoint-102"]);
    }

    #[test]
    fn an_unfinished_checkpoint_is_none_and_its_leftovers_go() {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), 1, 2);
        let half = CheckpointWriter::begin(dir.path(), 2).unwrap();
        fs::write(half.path().join("state"), "half").unwrap();
        assert_eq!(latest_checkpoint(dir.path()).unwrap().unwrap().0, 1);
        std::mem::forget(half); // as a kill does
        assert_eq!(names(dir.path()).len(), 2);
        remove_leftovers(dir.path()).unwrap();
        assert_eq!(names(dir.path()), ["checkpoint-1"]);
        // Given up on without a kill, it takes its temporary folder along.
        drop(CheckpointWriter::begin(dir.path(), 3).unwrap());
        assert_eq!(names(dir.path()), ["checkpoint-1"]);
    }

    #[test]
    fn a_checkpoint_of_the_same_step_stays() {
        let dir = tempfile::tempdir().unwrap();
        let first = save(dir.path(), 5, 2);
        let again = CheckpointWriter::begin(dir.path(), 5).unwrap();
        fs::write(again.path().join("other"), "").unwrap();
        assert_eq!(again.commit(2).unwrap(), first);
        assert_eq!(names(&first), ["state"]);
    }

    #[test]
    fn a_folder_with_a_run_is_refused_with_both_ways_out() {
        let dir = tempfile::tempdir().unwrap();
        let stages = [dir.path().join("run/a"), dir.path().join("run/b")];
        let run = dir.path().join("run");
        let fresh = StartPoint { stage: 0, checkpoint: None, resumed: false };
        assert_eq!(open_run(&run, &stages, false).unwrap(), fresh);
        // Nothing was done yet: with and without --resume it is a fresh start.
        assert_eq!(open_run(&run, &stages, true).unwrap(), fresh);
        write_file(&run.join(CONFIG_FILE), b"").unwrap();
        let error = open_run(&run, &stages, false).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Usage);
        assert!(error.hints[0].contains("--resume") && error.hints[1].contains("--output-dir"));
    }

    #[test]
    fn resuming_finds_the_stage_and_the_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let stages = [dir.path().join("a"), dir.path().join("b")];
        let start = |resume| open_run(dir.path(), &stages, resume).unwrap();
        start(false);
        let checkpoint = save(&stages[0], 7, 2);
        fs::create_dir(stages[0].join(".checkpoint-9.partial")).unwrap();
        assert_eq!(start(true), StartPoint { stage: 0, checkpoint: Some((7, checkpoint)), resumed: true });
        assert_eq!(names(&stages[0]), ["checkpoint-7"]);
        let done = FinishedStage { steps: 9, seconds: 1.5, output: "model".into(), ..FinishedStage::default() };
        mark_finished(&stages[0], &done).unwrap();
        assert_eq!(finished(&stages[0]).unwrap(), Some(done.clone()));
        assert_eq!(start(true), StartPoint { stage: 1, checkpoint: None, resumed: true });
        mark_finished(&stages[1], &done).unwrap();
        assert_eq!(start(true).stage, 2);
    }

    #[test]
    fn dates_are_civil_dates() {
        for (seconds, name) in [
            (0, "1970-01-01_00-00-00"),
            (951_782_399, "2000-02-28_23-59-59"),
            (951_782_400, "2000-02-29_00-00-00"),
            (1_767_225_599, "2025-12-31_23-59-59"),
        ] {
            assert_eq!(dated_name(UNIX_EPOCH + Duration::from_secs(seconds)), name);
        }
    }
}
