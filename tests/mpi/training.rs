//! Trainings of the built program under a real mpirun: they give what one device gives, and whatever happens to one of
//! the ranks, the job ends and goes on to the bytes of one that nothing disturbed.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use wgpu_llava::rng::Rng;

use crate::{
    common::{copy_folder, read_lines, whole_checkpoints},
    mpirun,
    team::{Layout, Outcome, PATIENCE, Run},
};

pub const TRIALS: [(&str, fn()); 3] = [
    ("two_ranks_train_what_one_device_trains_and_the_first_writes", train),
    ("a_killed_rank_ends_a_training_which_goes_on_to_the_same_bytes", || kill_ranks(3, 1)),
    ("a_rank_asked_to_end_has_all_save_and_end_as_interrupted", interrupt),
];

/// Minutes; what is above is a part of it.
pub const LONG_TRIALS: [(&str, fn()); 1] = [("thirty_ranks_killed_at_random_moments", || kill_ranks(30, 2))];

const RANKS: usize = 2;

/// Micro-batches a step, of all ranks.
const MICRO_BATCHES: usize = 4;

const STEPS: usize = 12;

/// Longer than any training here takes on a machine that does other things too.
const LIMIT: Duration = Duration::from_secs(300);

/// What is trained, and its zero_stage.
const KINDS: [(&str, u8); 3] = [
    ("method = \"full\"\nsave_steps = 3", 0),
    ("method = \"full\"\nsave_steps = 2", 2),
    ("method = \"lora\"\nr = 2\nlora_dropout = 0.1\nsave_steps = 3", 0),
];

/// How a rank is started: it notes its process id, and what others than the first make, nobody else may read, so that
/// one sees who has made it.
const START: &str = r#"
rank=${OMPI_COMM_WORLD_RANK:-$PMI_RANK}
echo $$ > "$0/$rank"
[ "$rank" = 0 ] && umask 022 || umask 077
exec "$@"
"#;

fn run_of(kind: usize, out: &Path) -> Run {
    Run::new("mqa_untied_mlp_full_features", KINDS[kind].0, MICRO_BATCHES, out)
}

/// A training that is under way.
struct Job {
    launcher: Child,
    out: PathBuf,
    /// The ranks' process ids, the config, and what was said.
    folder: TempDir,
}

impl Job {
    /// Starts it, or goes on with what is in its folder.
    fn start(kind: usize, out: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("run.toml");
        fs::write(&config, run_of(kind, out).text).unwrap();
        let mut command = mpirun(RANKS);
        command.args(["sh", "-c", START]).arg(folder.path());
        command.args([env!("CARGO_BIN_EXE_wgpu-llava"), "train", "--resume", "--quiet"]).arg(config);
        command.arg("--output-dir").arg(out);
        for set in
            [format!("gradient_accumulation_steps={}", MICRO_BATCHES / RANKS), format!("zero_stage={}", KINDS[kind].1)]
        {
            command.args(["--set", &set]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(fs::File::create(folder.path().join("stderr")).unwrap());
        let launcher = command.spawn().expect("mpirun starts; it comes with Open MPI or MPICH");
        Self { launcher, out: out.to_owned(), folder }
    }

    fn said(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.folder.path().join("stderr")).unwrap()).into_owned()
    }

    fn process(&self, rank: usize) -> String {
        fs::read_to_string(self.folder.path().join(rank.to_string())).unwrap().trim().to_owned()
    }

    /// Lines of metrics.
    fn steps(&self) -> usize {
        let text = fs::read_to_string(self.out.join("metrics.jsonl")).unwrap_or_default();
        text.matches('\n').count()
    }

    /// Waits for something, or the end. Gives whether it still runs.
    #[track_caller]
    fn wait_until(&mut self, mut met: impl FnMut(&Self) -> bool) -> bool {
        let begun = Instant::now();
        while self.launcher.try_wait().unwrap().is_none() {
            if met(self) {
                return true;
            }
            assert!(begun.elapsed() < LIMIT, "a training that hangs: {}", self.said());
            thread::sleep(Duration::from_millis(5));
        }
        false
    }

    /// Waits for the end; its exit code and what was said.
    #[track_caller]
    fn end(mut self) -> (Option<i32>, String) {
        self.wait_until(|_| false);
        (self.launcher.wait().unwrap().code(), self.said())
    }

    /// Waits for an end that is a good one.
    #[track_caller]
    fn finish(self) -> Outcome {
        let out = self.out.clone();
        Self::finished(&out, self.end())
    }

    /// What was made by one that came to a good end.
    #[track_caller]
    fn finished(out: &Path, (code, said): (Option<i32>, String)) -> Outcome {
        assert_eq!(code, Some(0), "{said}");
        assert!(out.join("finished.json").exists());
        Outcome::read(out)
    }

    /// Gives whether the rank was still there.
    fn signal(&self, signal: &str, rank: usize) -> bool {
        Command::new("kill").args([signal, &self.process(rank)]).status().unwrap().success()
    }
}

impl Drop for Job {
    /// Where a test has failed on the way.
    fn drop(&mut self) {
        let _ = self.launcher.kill();
        let _ = self.launcher.wait();
    }
}

/// What two ranks give that nothing disturbs.
#[derive(Clone)]
struct Undisturbed {
    outcome: Outcome,
    /// From the first step's line to the end of the training; its launcher takes a while longer, and nobody is left to be
    /// killed then.
    time: Duration,
}

/// Trained once for all tests.
fn undisturbed(kind: usize) -> Undisturbed {
    static KNOWN: Mutex<[Option<Undisturbed>; KINDS.len()]> = Mutex::new([const { None }; KINDS.len()]);
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let train = || {
        let folder = tempfile::tempdir().unwrap();
        let mut job = Job::start(kind, &folder.path().join("run"));
        job.wait_until(|job| job.steps() > 0);
        let begun = Instant::now();
        job.wait_until(|job| job.out.join("finished.json").exists());
        Undisturbed { time: begun.elapsed(), outcome: job.finish() }
    };
    known[kind].get_or_insert_with(train).clone()
}

/// What is below a folder that others than its owner may not read, as all that a second rank makes.
fn of_others(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    // What is there may be renamed meanwhile.
    for path in fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()) {
        let Ok(metadata) = path.symlink_metadata() else { continue };
        if metadata.permissions().mode() & 0o044 == 0 {
            found.push(path.clone());
        }
        if metadata.is_dir() {
            found.extend(of_others(&path));
        }
    }
    found
}

fn train() {
    for (kind, (settings, zero_stage)) in KINDS.into_iter().enumerate() {
        let what = format!("{settings}, stage {zero_stage}");
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("again");
        let mut job = Job::start(kind, &out);
        while job.wait_until(|_| true) {
            assert_eq!(of_others(&out), Vec::<PathBuf>::new(), "{what}: written by the second rank");
            thread::sleep(Duration::from_millis(5));
        }
        let again = job.finish();
        let first = undisturbed(kind).outcome;
        first.assert_same(&again, &what);
        assert_eq!(first.steps.len(), STEPS);
        assert!(first.steps.iter().all(|step| step.devices.len() == RANKS), "{what}: figures of every device");
        let alone = run_of(kind, &folder.path().join("alone")).train(Layout::ONE);
        let distance = first.distance(&alone);
        println!("{what}: {distance:.1e} from one device");
        assert!(distance < 1e-5, "{what}: {distance:e}");
        assert_eq!(first.weights.len(), alone.weights.len(), "{what}");
    }
}

fn kill_ranks(kills: usize, seed: u64) {
    let mut random = Rng::new(seed, 0);
    let mut draw = |below: u64| (u64::from(random.next_u32()) * below) >> 32;
    let (mut killed, mut longest) = (0, Duration::ZERO);
    // One that has ended before it is killed is another try.
    for number in 0..2 * kills {
        if killed == kills {
            break;
        }
        let kind = number % KINDS.len();
        let Undisturbed { outcome, time } = undisturbed(kind);
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("run");
        let mut job = Job::start(kind, &out);
        assert!(job.wait_until(|job| job.steps() > 0), "it ended before its first step: {}", job.said());
        let (rank, delay) = (draw(RANKS as u64) as usize, Duration::from_millis(draw(time.as_millis() as u64)));
        let begun = Instant::now();
        if !job.wait_until(|_| begun.elapsed() >= delay) {
            continue;
        }
        let (ranks, steps) = ([0, 1].map(|rank| job.process(rank)), job.steps());
        let there = job.signal("-KILL", rank);
        let begun = Instant::now();
        let (code, said) = job.end();
        if !there || code == Some(0) {
            // It had done its part, and its launcher was about to see that; until then there is a process to signal.
            Job::finished(&out, (code, said)).assert_same(&outcome, &format!("kind {kind}"));
            continue;
        }
        let ended = begun.elapsed();
        assert!(ended < PATIENCE, "the job ended after {ended:?}: {said}");
        assert!(code.is_some_and(|code| code != 0), "{code:?}: {said}");
        assert_eq!(said.matches("signal 9").count(), 1, "who was killed is told once: {said}");
        for noise in ["panicked", "error:", "Finishing"] {
            assert!(!said.contains(noise), "{noise} is told as well: {said}");
        }
        // The launcher may end before the last of them.
        while ranks.iter().any(|process| Path::new("/proc").join(process).exists()) {
            assert!(begun.elapsed() < PATIENCE, "a rank is still there: {said}");
            thread::sleep(Duration::from_millis(10));
        }
        let checkpoints = whole_checkpoints(&out);
        println!("  kind {kind}, rank {rank} killed in step {steps}, {checkpoints} checkpoints: over in {ended:.1?}");
        if killed == 0 {
            go_on_alone(kind, &out, &folder.path().join("alone"), &outcome);
        }
        Job::start(kind, &out).finish().assert_same(&outcome, &format!("kind {kind}"));
        killed += 1;
        longest = longest.max(ended);
    }
    println!("{killed} ranks killed, every job over in {longest:.1?}");
    assert_eq!(killed, kills, "the others had ended before");
}

/// Goes on with a copy of a run on one device, which computes what all ranks would have.
fn go_on_alone(kind: usize, run: &Path, copy: &Path, outcome: &Outcome) {
    copy_folder(run, copy);
    let alone = Run { resume: true, ..run_of(kind, copy) }.train(Layout::ONE);
    let distance = alone.distance(outcome);
    println!("  kind {kind}, gone on with on one device: {distance:.1e} from the ranks");
    assert!(distance < 1e-5, "kind {kind}: {distance:e}");
}

fn interrupt() {
    for (rank, kind) in [(0, 2), (1, 1)] {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("run");
        let mut job = Job::start(kind, &out);
        assert!(job.wait_until(|job| job.steps() > 0), "it ended before its first step: {}", job.said());
        assert!(job.signal("-TERM", rank), "rank {rank} is gone: {}", job.said());
        let begun = Instant::now();
        let (code, said) = job.end();
        assert!(begun.elapsed() < PATIENCE, "{said}");
        assert_eq!(code, Some(130), "{said}");
        let steps = read_lines(&out.join("metrics.jsonl")).len();
        assert!(steps < STEPS, "rank {rank} was asked in the first step: {said}");
        let told = format!("stopped after step {steps} of {STEPS}; a checkpoint is saved");
        assert_eq!(said.matches(&told).count(), 1, "{told} is not told once: {said}");
        assert!(said.contains("2 hosts") && said.contains("--resume"), "how to go on: {said}");
        assert!(whole_checkpoints(&out) > 0 && out.join(format!("checkpoint-{steps}")).exists(), "{said}");
        assert!(!out.join("finished.json").exists(), "{said}");
        println!("  rank {rank}: {told}");
        Job::start(kind, &out).finish().assert_same(&undisturbed(kind).outcome, &format!("kind {kind}"));
    }
}
