//! Several ranks under a real mpirun: what they add up, gather and tell, and how the job ends when one of them fails.
//!
//! The ranks are this test's own binary, started once more with a role to play. They write what they found to files.
//! Trainings of the program are in mpi/training.rs.

mod common;
#[path = "common/team.rs"]
mod team;
#[path = "mpi/training.rs"]
mod training;

use std::{
    env,
    fmt::Write,
    fs,
    path::{Path, PathBuf},
    process::{self, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use libtest_mimic::{Arguments, Trial};
use wgpu_llava::{
    error::ErrorKind,
    hosts::{self, Alike, Digest, Hosts, Launch, same_on_all},
    rng::Rng,
};

/// What the first argument is when a rank is started.
const RANK: &str = "--as-rank";

/// Beyond this a job counts as hanging. It is far more than any of them takes.
const LIMIT: Duration = Duration::from_secs(60);

/// Within this the others are gone after one rank has failed.
const SOON: Duration = Duration::from_secs(20);

/// Elements that go in one piece (hosts/mpi.rs).
const PIECE: usize = (16 << 20) / 4;

const TRIALS: [(&str, fn()); 9] = [
    ("sums_have_the_same_bytes_everywhere_and_again", sums),
    ("lists_of_bytes_arrive_in_order", lists),
    ("a_rank_with_another_config_is_told_on_all", differences),
    ("an_abort_ends_all_ranks_with_its_code", abort),
    ("ranks_out_of_step_are_told", out_of_step),
    ("an_exit_with_an_error_ends_all_ranks", exit),
    ("leaving_without_finish_ends_all_ranks", leave),
    ("a_killed_rank_ends_all_ranks", kill),
    ("a_launcher_of_another_mpi_is_told", another_launcher),
];

fn main() {
    let arguments: Vec<String> = env::args().collect();
    if let [_, flag, role, ranks, folder] = &arguments[..]
        && flag == RANK
    {
        play(role, ranks.parse().unwrap(), Path::new(folder));
        return;
    }
    let mut arguments = Arguments::from_args();
    // Each is several processes.
    arguments.test_threads = Some(1);
    let mut trials: Vec<Trial> = TRIALS.into_iter().chain(training::TRIALS).map(trial).collect();
    trials.extend(training::LONG_TRIALS.map(|long| trial(long).with_ignored_flag(true)));
    libtest_mimic::run(&arguments, trials).exit();
}

fn trial((name, test): (&'static str, fn())) -> Trial {
    Trial::test(name, move || {
        test();
        Ok(())
    })
}

/// `mpirun -n RANKS`.
fn mpirun(ranks: usize) -> Command {
    let mut command = Command::new("mpirun");
    command.args(["-n", &ranks.to_string()]);
    // By variables, which other launchers than Open MPI's do not mind: as root, more ranks than cores, all of them for
    // each.
    command.envs([
        ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
        ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
        ("OMPI_MCA_rmaps_base_oversubscribe", "1"),
        ("OMPI_MCA_hwloc_base_binding_policy", "none"),
        ("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe"),
        ("PRTE_MCA_hwloc_default_binding_policy", "none"),
    ]);
    command
}

/// A job that has ended.
struct Job {
    folder: tempfile::TempDir,
    code: Option<i32>,
    stderr: String,
    start: Instant,
    ranks: usize,
}

impl Job {
    /// Starts `ranks` ranks of a role.
    fn run(role: &str, ranks: usize) -> Self {
        Self::wait(mpirun(ranks), role, ranks)
    }

    fn wait(mut command: Command, role: &str, ranks: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let errors = folder.path().join("stderr");
        command.arg(env::current_exe().unwrap()).args([RANK, role, &ranks.to_string()]).arg(folder.path());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(&errors).unwrap());
        let start = Instant::now();
        let mut launcher = command.spawn().expect("mpirun starts; it comes with Open MPI or MPICH");
        let status = loop {
            if let Some(status) = launcher.try_wait().unwrap() {
                break status;
            }
            if start.elapsed() > LIMIT {
                launcher.kill().unwrap();
                launcher.wait().unwrap();
                panic!("{role} hangs: {}", fs::read_to_string(&errors).unwrap());
            }
            thread::sleep(Duration::from_millis(10));
        };
        let stderr = String::from_utf8_lossy(&fs::read(&errors).unwrap()).into_owned();
        Self { folder, code: status.code(), stderr, start, ranks }
    }

    fn ended_well(self) -> Self {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self
    }

    fn path(&self, rank: usize) -> PathBuf {
        self.folder.path().join(rank.to_string())
    }

    /// What a rank wrote.
    #[track_caller]
    fn said(&self, rank: usize) -> String {
        fs::read_to_string(self.path(rank)).unwrap_or_else(|_| panic!("rank {rank} wrote nothing: {}", self.stderr))
    }

    /// The job ended soon, and no rank that said its process id is there any more.
    #[track_caller]
    fn all_gone(&self) {
        for rank in 0..self.ranks {
            let process = Path::new("/proc").join(self.said(rank));
            // The launcher may end before the last of them.
            while process.exists() {
                assert!(self.start.elapsed() < SOON, "rank {rank} is still there: {}", self.stderr);
                thread::sleep(Duration::from_millis(10));
            }
        }
        assert!(self.start.elapsed() < SOON, "{}", self.stderr);
    }
}

// What the ranks do.

fn play(role: &str, ranks: usize, folder: &Path) {
    if role == "alone" {
        return;
    }
    let launch = Launch { ranks: Some(ranks), variable: "the test".into() };
    let mut hosts = match hosts::join(Some(launch)) {
        Ok(hosts) => hosts,
        Err(error) => {
            fs::write(folder.join("0"), format!("{:?} {}", error.kind, error.message)).unwrap();
            process::exit(2);
        }
    };
    assert_eq!(hosts.count(), ranks);
    let file = folder.join(hosts.rank().to_string());
    match role {
        "sums" => fs::write(file, play_sums(&mut *hosts)).unwrap(),
        "lists" => fs::write(file, play_lists(&mut *hosts)).unwrap(),
        _ => {
            // Those that do not end well: first the process id, so that the test can look for it.
            if role != "differences" && role != "out_of_step" {
                fs::write(&file, process::id().to_string()).unwrap();
            }
            hosts.barrier().unwrap();
            play_failure(role, hosts, &file);
            return;
        }
    }
    hosts.finish().unwrap();
}

/// A rank's values: of very different sizes, so that another order of adding gives other bytes.
fn values_of(rank: usize, length: usize) -> Vec<f32> {
    let mut rng = Rng::new(7, (rank * 1_000_003 + length) as u64);
    let value = |_| {
        let bits = rng.next_u32();
        let size = 2_f32.powi((bits & 31) as i32 - 16);
        if bits & 32 == 0 { size } else { -size * (1.0 + (bits >> 9) as f32 / 8_388_608.0) }
    };
    (0..length).map(value).collect()
}

fn play_sums(hosts: &mut dyn Hosts) -> String {
    let mut text = String::new();
    for length in [0, 1, 2, 3, 5, 1000, 1023, PIECE, 2 * PIECE + 7] {
        let mut values = values_of(hosts.rank(), length);
        hosts.add_up(&mut values).unwrap();
        let mut expected = values_of(0, length);
        for rank in 1..hosts.count() {
            for (sum, value) in expected.iter_mut().zip(values_of(rank, length)) {
                *sum += value;
            }
        }
        let bytes: &[u8] = bytemuck::cast_slice(&values);
        assert!(bytes == bytemuck::cast_slice::<f32, u8>(&expected), "{length}: not the sum in the order of the ranks");
        writeln!(text, "{length} {:x}", Digest::of(bytes)).unwrap();
    }
    text
}

fn play_lists(hosts: &mut dyn Hosts) -> String {
    let (rank, count) = (hosts.rank(), hosts.count());
    let before = hosts.sent();
    let bytes = |rank: usize, length: usize| -> Vec<u8> { (0..length).map(|i| (i * 31 + rank * 7) as u8).collect() };
    // Lengths for each rank; none, and more than a piece.
    for lengths in [[0, 0, 0], [5, 0, 1], [3, 17 << 20, 40_000_001], [0, 1, 0]] {
        let gathered = hosts.gather(&bytes(rank, lengths[rank])).unwrap();
        assert_eq!(gathered.len(), count);
        for (from, gathered) in gathered.iter().enumerate() {
            assert!(*gathered == bytes(from, lengths[from]), "{lengths:?}: from rank {from}");
        }
    }
    for (from, length) in [(0, 0), (count - 1, 1), (0, 12345), (1, (33 << 20) + 1)] {
        let mut told = bytes(rank, rank * 10);
        if rank == from {
            told = bytes(from, length);
        }
        hosts.broadcast(from, &mut told).unwrap();
        assert!(told == bytes(from, length), "{length} bytes from rank {from}");
    }
    assert!(hosts.broadcast(count, &mut Vec::new()).is_err(), "there is no such rank");
    assert!(hosts.sent() > before);
    // A value may go to another thread, and be used there.
    thread::scope(|scope| scope.spawn(|| hosts.barrier()).join().unwrap()).unwrap();
    let things = [Alike::setting("config", 1), Alike::file("data", 2)];
    same_on_all(hosts, &things).unwrap();
    "fine".into()
}

fn play_failure(role: &str, mut hosts: Box<dyn Hosts>, file: &Path) {
    let rank = hosts.rank();
    match role {
        "differences" => {
            let weights = if rank == 1 { 5 } else { 6 };
            let things = [Alike::setting("config", 1), Alike::file("weights", weights)];
            let error = same_on_all(&mut *hosts, &things).unwrap_err();
            fs::write(file, format!("{:?} {}", error.kind, error.message)).unwrap();
            // All have written when the first aborts.
            hosts.barrier().unwrap();
            hosts.abort(3);
        }
        "out_of_step" => {
            let error = if rank == 0 { hosts.add_up(&mut [1.0; 4]) } else { hosts.add_up(&mut [1.0; 5]) };
            let error = error.unwrap_err();
            hosts.barrier().unwrap();
            let other = if rank == 0 { hosts.barrier() } else { hosts.gather(&[]).map(|_| ()) };
            fs::write(file, format!("{}\n{}", error.message, other.unwrap_err().message)).unwrap();
            hosts.finish().unwrap();
        }
        "abort" if rank == 1 => {
            hosts.abort(5);
            unreachable!("the launcher ends this process");
        }
        "exit" if rank == 1 => process::exit(4),
        "leave" if rank == 1 => drop(hosts),
        "kill" | "kill_idle" if rank == 1 => {
            let _ = Command::new("kill").args(["-9", &process::id().to_string()]).status();
        }
        // Busy in something else than MPI.
        "kill_idle" => {
            ignore_requests_to_end();
            thread::sleep(LIMIT);
        }
        _ => {
            ignore_requests_to_end();
            hosts.add_up(&mut [1.0; 100]).unwrap();
            unreachable!("rank 1 never comes");
        }
    }
}

/// As a training does, which would finish its step first.
fn ignore_requests_to_end() {
    ctrlc::set_handler(|| ()).unwrap();
}

// What is asked of them.

fn sums() {
    for ranks in [1, 2, 3] {
        let first = Job::run("sums", ranks).ended_well();
        let again = Job::run("sums", ranks).ended_well();
        for rank in 0..ranks {
            assert_eq!(first.said(rank), first.said(0), "rank {rank} of {ranks}");
            assert_eq!(again.said(rank), first.said(0), "rank {rank} of {ranks}, repeated");
        }
    }
}

fn lists() {
    for ranks in [2, 3] {
        let job = Job::run("lists", ranks).ended_well();
        assert!((0..ranks).all(|rank| job.said(rank) == "fine"));
    }
}

fn differences() {
    let job = Job::run("differences", 3);
    for rank in 0..3 {
        let said = job.said(rank);
        assert!(said.starts_with(&format!("{:?} the hosts do not have the same weights (rank 1 (", ErrorKind::Data)));
        assert_eq!(said, job.said(0));
    }
    assert_eq!(job.code, Some(3), "{}", job.stderr);
}

fn abort() {
    let job = Job::run("abort", 2);
    assert_eq!(job.code, Some(5), "{}", job.stderr);
    job.all_gone();
}

fn out_of_step() {
    let job = Job::run("out_of_step", 2).ended_well();
    assert_eq!(
        job.said(0),
        "the ranks are not in step: rank 0 adds up 4 values, rank 1 5\nthe ranks are not in step: rank 0 calls barrier, \
         rank 1 gather"
    );
}

fn exit() {
    let job = Job::run("exit", 2);
    assert_eq!(job.code, Some(4), "{}", job.stderr);
    job.all_gone();
}

fn leave() {
    // MPICH ends the others as well, but calls it success; whoever leaves this way has an exit code of its own.
    Job::run("leave", 2).all_gone();
}

fn kill() {
    for role in ["kill", "kill_idle"] {
        let job = Job::run(role, 2);
        assert_ne!(job.code, Some(0), "{}", job.stderr);
        job.all_gone();
    }
}

/// Started without mpirun, as by a launcher that this MPI does not know.
fn another_launcher() {
    let mut command = Command::new("env");
    command.args(["OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"]);
    let job = Job::wait(command, "sums", 2);
    assert_eq!(job.code, Some(2), "{}", job.stderr);
    let said = job.said(0);
    assert!(said.starts_with("Usage this is one of 2 processes (the test), but the MPI that"), "{said}");
}
