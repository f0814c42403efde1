//! Devices that are lost and processes that are killed, at random moments of runs on several devices: the run ends at once
//! and says which device it was, its last checkpoint is whole, and from there it comes to the bytes of a run that nothing
//! disturbed.

mod common;
#[path = "common/team.rs"]
mod team;

use std::{
    fs,
    path::Path,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use common::{program, stderr, whole_checkpoints};
use team::{Layout, Outcome, PATIENCE, Run, gpus};
use wgpu_llava::{
    error::ErrorKind,
    gpu::{AdapterOptions, Gpu},
    ops::Random,
    train::{events::Silent, team::SlowLink},
};

/// What is trained, and on what.
const RUNS: [(&str, Layout); 7] = [
    (LORA, Layout::new(2, 0)),
    (FULL, Layout::new(3, 2)),
    (LORA, Layout::new(2, 1)),
    (FULL, Layout::offload(2, 0)),
    (FULL, Layout::new(2, 2)),
    (LORA, Layout::offload(3, 2)),
    (FULL, Layout::new(2, 3)),
];
const LORA: &str = "method = \"lora\"\nr = 2\nlora_dropout = 0.1\nsave_steps = 2";
const FULL: &str = "method = \"full\"\nprecision = \"bfloat16\"\nsave_steps = 3";

fn open(count: usize) -> Vec<Gpu> {
    (0..count).map(|_| Gpu::open(&AdapterOptions::default()).unwrap()).collect()
}

fn run_in(settings: &str, out: &Path) -> Run {
    Run { resume: true, ..Run::new("mqa_untied_mlp_full_features", settings, 6, out) }
}

/// How devices are lost.
enum Loss {
    /// Instead of a dispatch.
    At(u64),
    /// By another thread, whatever is going on.
    After(Duration),
}

/// Loses one of the devices on the way. Gives whether the run has ended by it.
fn lose_one(run: &Run, layout: Layout, victim: usize, loss: &Loss) -> bool {
    let gpus = open(layout.devices);
    let name = gpus[victim].facts().name.clone();
    let gpu = gpus[victim].clone();
    let begun = Instant::now();
    match *loss {
        Loss::At(dispatches) => gpu.lose_after(dispatches),
        Loss::After(time) => drop(thread::spawn(move || {
            thread::sleep(time);
            gpu.lose();
        })),
    }
    let Err(error) = run.go_on_within(gpus, layout, PATIENCE) else { return false };
    let seconds = begun.elapsed().as_secs_f64();
    assert_eq!(error.kind, ErrorKind::Device, "{error:?}");
    let told = format!("device {} of {}: {name} was lost", victim + 1, layout.devices);
    assert_eq!(error.message, told);
    let checkpoints = whole_checkpoints(&run.out);
    println!("  {told}, after {seconds:.1} s; {checkpoints} checkpoints");
    true
}

/// Dispatches of a device in a whole run.
fn dispatches(run: &Run, layout: Layout) -> u64 {
    const MANY: u64 = 1 << 40;
    let gpus = gpus(layout.devices);
    gpus[0].lose_after(MANY);
    run.train_on(&gpus, layout, &mut Silent).unwrap();
    let left = gpus[0].until_loss();
    gpus[0].lose_after(u64::MAX - 1);
    MANY - left
}

fn lose_devices(faults: usize, seed: u64) {
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random::new(seed);
    let mut draw = |below: u64| u64::from(random.indices(1, below as usize)[0]);
    let mut lost = 0;
    for (number, (settings, layout)) in RUNS.into_iter().cycle().enumerate() {
        let wanted = (faults - lost).min(faults.div_ceil(RUNS.len()));
        if wanted == 0 {
            break;
        }
        let whole = run_in(settings, &folder.path().join(format!("whole-{number}")));
        let begun = Instant::now();
        let all = dispatches(&whole, layout);
        let milliseconds = begun.elapsed().as_millis() as u64;
        let undisturbed = Outcome::read(&whole.out);
        println!("{layout:?}: {all} dispatches of each device in {milliseconds} ms");
        let run = run_in(settings, &folder.path().join(format!("lost-{number}")));
        for _ in 0..wanted {
            let victim = draw(layout.devices as u64) as usize;
            let by_clock = draw(3) == 0;
            let loss = match by_clock {
                true => Loss::After(Duration::from_millis(draw(milliseconds))),
                false => Loss::At(draw(all)),
            };
            lost += usize::from(lose_one(&run, layout, victim, &loss));
            if run.out.join("finished.json").exists() {
                break;
            }
        }
        let healthy = gpus(layout.devices)[..layout.devices].to_vec();
        run.go_on_within(healthy, layout, Duration::from_secs(300)).unwrap();
        Outcome::read(&run.out).assert_same(&undisturbed, &format!("{layout:?}"));
    }
    println!("{lost} devices lost");
}

fn command(run: &Run, layout: Layout, file: &Path) -> std::process::Command {
    fs::write(file, &run.text).unwrap();
    let set = [
        format!("devices=[{}]", vec!["0"; layout.devices].join(",")),
        format!("gradient_accumulation_steps={}", run.micro_batches / layout.devices),
        format!("zero_stage={}", layout.zero_stage),
        format!("offload={}", layout.offload),
    ];
    let mut command = program(["train", "--resume", "--quiet"]);
    command.arg(file).arg("--output-dir").arg(&run.out).stderr(Stdio::piped());
    for set in &set {
        command.args(["--set", set]);
    }
    command
}

fn kill_processes(kills: usize, seed: u64) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("run.toml");
    let mut random = Random::new(seed);
    let mut killed = 0;
    for (number, (settings, layout)) in RUNS.into_iter().cycle().enumerate() {
        let wanted = (kills - killed).min(kills.div_ceil(RUNS.len()));
        if wanted == 0 {
            break;
        }
        let whole = run_in(settings, &folder.path().join(format!("whole-{number}")));
        let begun = Instant::now();
        let output = command(&whole, layout, &file).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        let milliseconds = begun.elapsed().as_millis() as usize;
        let undisturbed = Outcome::read(&whole.out);
        let run = run_in(settings, &folder.path().join(format!("killed-{number}")));
        let mut ended = false;
        for _ in 0..wanted {
            let mut child = command(&run, layout, &file).spawn().unwrap();
            let time = Duration::from_millis(random.indices(1, milliseconds)[0].into());
            thread::sleep(time);
            ended = child.try_wait().unwrap().is_some();
            if ended {
                break;
            }
            child.kill().unwrap();
            child.wait().unwrap();
            killed += 1;
            let checkpoints = whole_checkpoints(&run.out);
            println!("  {layout:?} killed after {:.1} s; {checkpoints} checkpoints", time.as_secs_f64());
        }
        if !ended {
            let output = command(&run, layout, &file).output().unwrap();
            assert!(output.status.success(), "{}", stderr(&output));
        }
        Outcome::read(&run.out).assert_same(&undisturbed, &format!("{layout:?}"));
    }
    println!("{killed} processes killed");
}

#[test]
fn a_lost_device_ends_the_run_which_goes_on_to_the_same_bytes() {
    lose_devices(8, 1);
}

/// Others wait in a forward for weights that the lost device has sent, or would have.
#[test]
fn a_device_is_lost_while_weights_are_on_their_way() {
    let folder = tempfile::tempdir().unwrap();
    for (number, layout) in [Layout::new(2, 1), Layout::new(3, 2), Layout::offload(2, 0)].into_iter().enumerate() {
        let whole = run_in(FULL, &folder.path().join(format!("whole-{number}")));
        let all = dispatches(&whole, layout);
        let undisturbed = Outcome::read(&whole.out);
        let out = folder.path().join(format!("lost-{number}"));
        let run = Run { slow: Some(SlowLink { bytes_per_second: 5e5 }), ..run_in(FULL, &out) };
        // In the forward behind a checkpoint, and whenever it is.
        let losses = [Loss::At(all / 12 * 3 + all / 100), Loss::After(Duration::from_millis(1500))];
        for (victim, loss) in losses.iter().enumerate() {
            assert!(lose_one(&run, layout, victim, loss), "{layout:?} has not lost a device");
        }
        let healthy = gpus(layout.devices)[..layout.devices].to_vec();
        Run { slow: None, ..run }.go_on_within(healthy, layout, Duration::from_secs(300)).unwrap();
        Outcome::read(&out).assert_same(&undisturbed, &format!("{layout:?}"));
    }
}

#[test]
fn a_killed_process_goes_on_to_the_same_bytes() {
    kill_processes(4, 2);
}

/// Whatever is asked of a device that is lost, before or while it is waited for, is answered at once.
#[test]
fn nothing_waits_for_a_lost_device() {
    const BYTES: usize = 96 << 20;
    for lost_meanwhile in [false, true] {
        let gpu = open(1).remove(0);
        let buffer = gpu.buffer(BYTES as u64);
        gpu.write(&buffer, 0, &[1, 2, 3, 4]);
        assert_eq!(gpu.read(&buffer, 0, 4).unwrap(), [1, 2, 3, 4]);
        let thief = gpu.clone();
        let steal = thread::spawn(move || {
            thread::sleep(Duration::from_millis(if lost_meanwhile { 30 } else { 0 }));
            thief.lose();
        });
        if !lost_meanwhile {
            steal.join().unwrap();
        }
        let begun = Instant::now();
        // More than staging memory holds, each way.
        let bytes = vec![7; BYTES];
        while gpu.check().is_ok() {
            gpu.write(&buffer, 0, &bytes);
            gpu.downloaded(gpu.download(&[(&buffer, (0, BYTES as u64))]));
        }
        gpu.write(&buffer, 0, &bytes);
        assert_eq!(gpu.downloaded(gpu.download(&[(&buffer, (0, BYTES as u64))])).len(), BYTES);
        let mut arriving = gpu.arriving(BYTES as u64);
        arriving.write(0, &bytes);
        let other = arriving.finish();
        gpu.copy(&other, 0, &buffer, 0, 256);
        gpu.clear(&other, 0, 256);
        for error in [gpu.sync().unwrap_err(), gpu.read(&buffer, 0, 256).unwrap_err(), gpu.check().unwrap_err()] {
            assert_eq!(error.kind, ErrorKind::Device, "{error:?}");
            assert_eq!(error.message, format!("{} was lost", gpu.facts().name));
        }
        gpu.trim();
        drop((buffer, other, gpu));
        assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
    }
}

/// A device for itself: nobody has to be told which.
#[test]
fn a_lost_device_is_told_where_it_is_the_only_one() {
    let folder = tempfile::tempdir().unwrap();
    let run = run_in(LORA, &folder.path().join("run"));
    let gpu = open(1).remove(0);
    gpu.lose_after(500);
    let error = run.go_on_within(vec![gpu.clone()], Layout::ONE, PATIENCE).unwrap_err();
    assert_eq!((error.kind, &error.message), (ErrorKind::Device, &format!("{} was lost", gpu.facts().name)));
    // It stays so, whatever is asked of it.
    let error = run.go_on_within(vec![gpu], Layout::ONE, PATIENCE).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Device);
}

#[test]
#[ignore = "minutes; what is above is a part of it"]
fn thirty_faults_at_random_moments() {
    lose_devices(20, 3);
    kill_processes(10, 4);
}
