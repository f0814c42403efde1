//! Exactness: the same seed gives the same bytes; so does a run that was killed at any moments and resumed, and one
//! that Ctrl-C stopped.

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    sync::OnceLock,
    thread::sleep,
    time::{Duration, Instant},
};

use common::{golden, program, read_lines, run, stderr};
use serde_json::Value;
use wgpu_llava::ops::Random;

const KILLS: usize = 20;
/// Steps of the two stages.
const STEPS: [usize; 2] = [16, 28];

/// A run of two stages with all that draws random numbers: order, a fresh adapter, dropout; and norms to compute again.
fn write_config(folder: &Path) -> PathBuf {
    let case = golden("parity/mha_untied_linear");
    let path = folder.join("run.toml");
    let case = case.display();
    let [first, second] = STEPS;
    let text = format!(
        "model_name_or_path = '{case}/model'\nimage_folder = '{case}/images'\nseed = 7\nsave_steps = 2\n\
         per_device_train_batch_size = 2\n\n\
         [[stage]]\nname = \"align\"\nmethod = \"projector\"\nversion = \"plain\"\ndata_path = '{case}/captions.json'\n\
         max_steps = {first}\nlearning_rate = 5e-3\n\n\
         [[stage]]\nname = \"tune\"\nmethod = \"lora\"\ndata_path = '{case}/data.jsonl'\nmax_steps = {second}\n\
         r = 4\nlora_dropout = 0.1\nuse_dora = true\nlearning_rate = 2e-3\ngradient_accumulation_steps = 2\n"
    );
    fs::write(&path, text).unwrap();
    path
}

fn train(config: &Path, out: &Path) -> Vec<PathBuf> {
    vec!["train".into(), config.into(), "--output-dir".into(), out.into(), "--resume".into()]
}

/// The weights of both stages, and of every step what does not depend on the clock.
#[derive(PartialEq)]
struct Outcome {
    projector: Vec<u8>,
    adapter: Vec<u8>,
    steps: Vec<Vec<Value>>,
}

impl Outcome {
    fn read(out: &Path) -> Self {
        let bytes = |file: &str| fs::read(out.join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
        let mut steps = Vec::new();
        for stage in ["align", "tune"] {
            for line in read_lines(&out.join(stage).join("metrics.jsonl")) {
                let keys = ["step", "loss", "grad_norm", "learning_rate", "target_tokens"];
                steps.push(keys.iter().map(|key| line[key].clone()).collect());
            }
        }
        let outcome = Self {
            projector: bytes("align/model/model.safetensors"),
            adapter: bytes("tune/adapter/adapter_model.safetensors"),
            steps,
        };
        assert_eq!(outcome.steps.len(), STEPS.iter().sum::<usize>(), "every step once in metrics.jsonl");
        outcome
    }

    #[track_caller]
    fn assert_same(&self, other: &Self, what: &str) {
        for (ours, theirs) in self.steps.iter().zip(&other.steps) {
            assert_eq!(ours, theirs, "{what}: another step");
        }
        assert!(self.projector == other.projector, "{what}: the first stage's model differs");
        assert!(self.adapter == other.adapter, "{what}: the second stage's adapter differs");
    }
}

/// Nothing half-written: what is not whole has a temporary name, and the next start removes it.
fn assert_no_leftovers(folder: &Path) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy();
        assert!(!name.contains("tmp") && !name.contains("partial"), "left behind: {}", path.display());
        if path.is_dir() {
            assert_no_leftovers(&path);
        }
    }
}

/// A run that nothing disturbed, made once.
fn reference() -> &'static Outcome {
    static OUTCOME: OnceLock<Outcome> = OnceLock::new();
    OUTCOME.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("reference");
        run(train(&write_config(folder.path()), &out));
        assert_no_leftovers(&out);
        Outcome::read(&out)
    })
}

#[test]
fn the_same_seed_twice_gives_the_same_bytes_and_another_seed_others() {
    let folder = tempfile::tempdir().unwrap();
    let config = write_config(folder.path());
    let first = reference();
    let again = folder.path().join("again");
    run(train(&config, &again));
    first.assert_same(&Outcome::read(&again), "the same seed");
    let other = folder.path().join("other");
    run(train(&config, &other).into_iter().chain(["--set".into(), "seed=8".into()]));
    assert!(Outcome::read(&other).adapter != first.adapter, "another seed gives the same bytes");
    // What a run wrote down repeats it.
    let repeated = folder.path().join("repeated");
    run([Path::new("train"), &again.join("config.toml"), Path::new("--output-dir"), &repeated]);
    first.assert_same(&Outcome::read(&repeated), "the run's own config.toml");
}

/// Waits until `done` or the process has ended; true when it still runs.
fn wait_until(child: &mut Child, mut done: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(120) {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        if done() {
            return true;
        }
        sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    panic!("the program neither ended nor did what was waited for");
}

/// Bytes that the run has written into its folder so far, and steps logged.
fn progress(out: &Path) -> usize {
    let lines =
        |stage: &str| fs::read_to_string(out.join(stage).join("metrics.jsonl")).map_or(0, |t| t.lines().count());
    lines("align") + lines("tune")
}

#[test]
fn killed_at_random_moments_and_resumed_it_ends_with_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let config = write_config(folder.path());
    let wanted = reference();
    let mut random = Random::new(20);
    let (mut kills, mut round) = (0, 0);
    while kills < KILLS {
        round += 1;
        let out = folder.path().join(format!("killed-{round}"));
        loop {
            let mut child = program(train(&config, &out)).stderr(Stdio::piped()).spawn().unwrap();
            // Some moments by the clock (loading, compiling), most of them some milliseconds after the next step.
            let by_clock = kills % 4 == 0;
            let millis = u64::from(random.indices(1, if by_clock { 1400 } else { 400 })[0]);
            let before = progress(&out);
            let runs = kills < KILLS && (by_clock || wait_until(&mut child, || progress(&out) > before));
            if runs {
                let deadline = Instant::now() + Duration::from_millis(100 * u64::from(by_clock) + millis);
                wait_until(&mut child, || Instant::now() >= deadline);
            }
            if runs && child.try_wait().unwrap().is_none() {
                child.kill().unwrap();
                child.wait().unwrap();
                kills += 1;
                println!(
                    "kill {kills} of round {round}, at step {} of {}",
                    progress(&out),
                    STEPS.iter().sum::<usize>()
                );
                continue;
            }
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "resumed: {}", stderr(&output));
            break;
        }
        assert_no_leftovers(&out);
        wanted.assert_same(&Outcome::read(&out), &format!("round {round}"));
    }
    println!("{kills} kills in {round} runs");
}

#[cfg(unix)]
#[test]
fn control_c_saves_says_how_to_go_on_and_exits_with_130() {
    let folder = tempfile::tempdir().unwrap();
    let config = write_config(folder.path());
    let wanted = reference();
    let out = folder.path().join("stopped");
    let mut child = program(train(&config, &out)).stderr(Stdio::piped()).spawn().unwrap();
    assert!(wait_until(&mut child, || progress(&out) > STEPS[0]), "the run ended before it could be stopped");
    let signal = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(signal.success());
    let output = child.wait_with_output().unwrap();
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(130), "{text}");
    assert!(text.contains("--resume") && text.contains(&out.display().to_string()), "{text}");
    let saved = fs::read_dir(out.join("tune")).unwrap().any(|entry| {
        let name = entry.unwrap().file_name();
        name.to_string_lossy().starts_with("checkpoint-")
    });
    assert!(saved, "no checkpoint");
    assert!(!out.join("tune/adapter").exists(), "an adapter before the end");
    assert_no_leftovers(&out);
    // As it was told to.
    run(["train".as_ref(), "--resume".as_ref(), "--output-dir".as_ref(), out.as_os_str()]);
    wanted.assert_same(&Outcome::read(&out), "after Ctrl-C");
}

#[test]
fn a_folder_with_a_run_is_not_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let config = write_config(folder.path());
    let out = folder.path().join("out");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("config.toml"), "# of an earlier run").unwrap();
    let output = program([Path::new("train"), &config, Path::new("--output-dir"), &out]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("--resume"), "{}", stderr(&output));
    assert_eq!(fs::read_to_string(out.join("config.toml")).unwrap(), "# of an earlier run");
}

/// The tower's last bits depend on how many pictures go through it at once; a run that goes on meets fewer of them.
#[test]
fn resumed_with_fewer_pictures_left_it_sees_the_same_features() {
    let folder = tempfile::tempdir().unwrap();
    let config = golden("parity/mha_untied_mlp/full.toml");
    let out = folder.path().join("out");
    let train = || {
        let mut command = train(&config, &out);
        for set in ["max_steps=3", "gradient_accumulation_steps=1", "save_steps=1", "save_total_limit=1"] {
            command.extend(["--set".into(), set.into()]);
        }
        run(command);
        fs::read(out.join("model/model.safetensors")).unwrap()
    };
    let whole = train();
    fs::remove_file(out.join("finished.json")).unwrap();
    fs::remove_dir_all(out.join("model")).unwrap();
    assert!(out.join("checkpoint-2").exists(), "the last step has to be done again");
    assert!(train() == whole, "another model");
}

/// Moments in eight bits, masters and their copies, weights rounded at random, the loss's factor: all is in a checkpoint.
#[test]
fn resumed_in_every_form_of_weights_and_moments_it_ends_with_the_same_bytes() {
    let config = golden("parity/gqa_tied_mlp_vision/full_vision.toml");
    let forms: [&[&str]; 5] = [
        &["optim=adamw_8bit"],
        &["precision=bfloat16", "weight_decay=0.1"],
        &["precision=float16", "optim=adamw_8bit", "initial_scale_power=70"],
        &["precision=bfloat16", "stochastic_rounding=true"],
        &["precision=bfloat16", "stochastic_rounding=true", "optim=adamw_8bit", "freeze_mm_mlp_adapter=true"],
    ];
    for form in forms {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let train = || {
            let mut command = train(&config, &out);
            for set in [&["max_steps=4", "save_steps=1", "save_total_limit=3"], form].concat() {
                command.extend(["--set".into(), set.into()]);
            }
            run(command);
            fs::read(out.join("model/model.safetensors")).unwrap()
        };
        let whole = train();
        fs::remove_file(out.join("finished.json")).unwrap();
        fs::remove_dir_all(out.join("model")).unwrap();
        fs::remove_dir_all(out.join("checkpoint-3")).unwrap();
        assert!(out.join("checkpoint-2").exists(), "two steps have to be done again");
        assert!(train() == whole, "{form:?}: another model");
    }
}

#[test]
fn a_finished_run_gone_on_with_keeps_its_report() {
    let folder = tempfile::tempdir().unwrap();
    let config = golden("parity/mha_untied_mlp/full.toml");
    let out = folder.path().join("out");
    let report = || {
        run(train(&config, &out).into_iter().chain(["--set".into(), "max_steps=1".into()]));
        fs::read_to_string(out.join("report.html")).unwrap()
    };
    let first = report();
    assert!(first.contains("(7 records)"), "{first}");
    assert_eq!(report(), first);
}
