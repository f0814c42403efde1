//! Training on several hosts gives the model that one host gives. Hosts are threads of this process here, each with
//! devices of its own; what MPI adds is in tests/mpi.rs.

mod common;

use std::{fs, path::Path, sync::atomic::AtomicBool};

use common::{golden, open_gpu, read_lines};
use wgpu_llava::{
    error::{ErrorKind, Result},
    hosts::{Alone, Hosts, threads},
    train::{
        config::{Request, RunConfig},
        events::Silent,
        run,
        team::Devices,
    },
};

fn config(out: &Path, set: &[&str]) -> RunConfig {
    let case = golden("parity/mha_untied_linear");
    let case = case.display();
    let text = format!(
        "model_name_or_path = '{case}/model'\ndata_path = '{case}/data.jsonl'\nimage_folder = '{case}/images'\n\
         max_steps = 6\nsave_steps = 3\nr = 4\nlora_dropout = 0.1\nlearning_rate = 2e-3\n"
    );
    let set: Vec<String> = set.iter().map(|setting| (*setting).to_owned()).collect();
    let request = Request {
        recipe: None,
        file: Some((Path::new("/run.toml"), &text)),
        set: &set,
        output_dir: Some(out),
        default_output_dir: out,
        working_dir: Path::new("/"),
    };
    RunConfig::resolve(&request).unwrap()
}

fn train(out: &Path, devices: usize, set: &[&str], resume: bool, hosts: &mut dyn Hosts) -> Result<()> {
    let gpus = (0..devices).map(|_| open_gpu()).collect();
    let devices = Devices { gpus, checked: false, slow: None };
    run::train(&config(out, set), resume, &devices, hosts, &AtomicBool::new(false), &mut Silent).map(drop)
}

fn losses(out: &Path) -> Vec<f64> {
    read_lines(&out.join("metrics.jsonl")).iter().map(|line| line["loss"].as_f64().unwrap()).collect()
}

fn assert_close(ours: &[f64], theirs: &[f64], what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    let worst = ours.iter().zip(theirs).map(|(a, b)| ((a - b) / b).abs()).fold(0.0, f64::max);
    println!("{what}: {worst:.1e}");
    assert!(worst < 1e-5, "{what}: {ours:?} beside {theirs:?}");
}

fn state(out: &Path) -> Vec<u8> {
    fs::read(out.join("checkpoint-3/state.safetensors")).unwrap()
}

#[test]
fn layers_are_not_split_over_hosts() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let results = threads::on(2, |hosts| train(&out, 2, &["layer_split=true"], false, hosts));
    for result in results {
        let error = result.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Usage, "{error:?}");
        assert!(error.message.contains("one host") && error.hints.join(" ").contains("zero_stage"), "{error:?}");
    }
}

/// Before any of them goes on.
#[test]
fn all_hosts_hear_of_the_one_that_does_not_see_the_folder() {
    let dir = tempfile::tempdir().unwrap();
    let outs = ["shared", "elsewhere"].map(|name| dir.path().join(name));
    for result in threads::on(2, |hosts| train(&outs[hosts.rank()], 1, &[], false, hosts)) {
        let error = result.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Usage, "{error:?}");
        assert!(error.message.contains("does not see") && error.message.contains("elsewhere"), "{error:?}");
    }
    assert!(outs.iter().all(|out| !out.exists()), "a folder is left");
}

#[test]
fn two_hosts_train_what_one_device_trains() {
    let dir = tempfile::tempdir().unwrap();
    let alone = dir.path().join("alone");
    train(&alone, 1, &["gradient_accumulation_steps=4"], false, &mut Alone).unwrap();
    let expected = losses(&alone);
    for (name, devices, accumulation, set) in [
        ("one device each", 1, 2, &[][..]),
        ("two devices each", 2, 1, &[][..]),
        ("stage 1", 2, 1, &["zero_stage=1"][..]),
        ("stage 2", 1, 2, &["zero_stage=2"][..]),
        ("stage 3", 1, 2, &["zero_stage=3"][..]),
        ("offload", 1, 2, &["zero_stage=2", "offload=true"][..]),
    ] {
        let out = dir.path().join(name);
        let accumulation = format!("gradient_accumulation_steps={accumulation}");
        let set: Vec<&str> = set.iter().copied().chain([accumulation.as_str()]).collect();
        for result in threads::on(2, |hosts| train(&out, devices, &set, false, hosts)) {
            result.unwrap();
        }
        assert_close(&losses(&out), &expected, name);
        assert!(out.join("adapter/adapter_model.safetensors").exists() && out.join("finished.json").exists());
        let last = read_lines(&out.join("metrics.jsonl")).pop().unwrap();
        assert_eq!(last["devices"].as_array().unwrap().len(), 2 * devices, "{name}: figures of every device");
        assert_eq!(state(&out).len(), state(&alone).len(), "{name}: a whole checkpoint");
    }
}

/// Weights of layers that train rest on each host, and each device's are brought there by its host.
#[test]
fn two_hosts_share_layers_that_train() {
    let dir = tempfile::tempdir().unwrap();
    let alone = dir.path().join("alone");
    let full = |accumulation: &'static str| ["method=full", "learning_rate=1e-3", accumulation];
    train(&alone, 1, &full("gradient_accumulation_steps=4"), false, &mut Alone).unwrap();
    for (name, devices, accumulation, offload) in [
        ("one device each", 1, "gradient_accumulation_steps=2", "offload=false"),
        ("two devices each", 2, "gradient_accumulation_steps=1", "offload=false"),
        ("offload", 1, "gradient_accumulation_steps=2", "offload=true"),
    ] {
        let out = dir.path().join(name);
        let set = [&full(accumulation)[..], &["zero_stage=3", offload]].concat();
        for result in threads::on(2, |hosts| train(&out, devices, &set, false, hosts)) {
            result.unwrap();
        }
        assert_close(&losses(&out), &losses(&alone), name);
        assert_eq!(state(&out).len(), state(&alone).len(), "{name}: a whole checkpoint");
        let size = |out: &Path| fs::metadata(out.join("model/model.safetensors")).unwrap().len();
        assert_eq!(size(&out), size(&alone), "{name}: a whole model");
    }
}

/// A run of two hosts goes on on one, and the other way round.
#[test]
fn a_run_goes_on_with_another_number_of_hosts() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    train(&whole, 1, &["gradient_accumulation_steps=4"], false, &mut Alone).unwrap();
    let stop = |out: &Path| {
        // As if it had been killed behind the checkpoint.
        fs::remove_dir_all(out.join("adapter")).unwrap();
        fs::remove_file(out.join("finished.json")).unwrap();
    };
    let two = ["gradient_accumulation_steps=1", "zero_stage=2"];
    let out = dir.path().join("to one");
    threads::on(2, |hosts| train(&out, 2, &two, false, hosts)).into_iter().for_each(|result| result.unwrap());
    stop(&out);
    train(&out, 1, &["gradient_accumulation_steps=4"], true, &mut Alone).unwrap();
    assert_close(&losses(&out), &losses(&whole), "two hosts, then one");
    let out = dir.path().join("to two");
    train(&out, 1, &["gradient_accumulation_steps=4"], false, &mut Alone).unwrap();
    stop(&out);
    threads::on(2, |hosts| train(&out, 2, &two, true, hosts)).into_iter().for_each(|result| result.unwrap());
    assert_close(&losses(&out), &losses(&whole), "one host, then two");
}

#[test]
fn hosts_that_would_train_something_else_are_told_so_on_all() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let results = threads::on(2, |hosts| {
        let set = if hosts.rank() == 0 { ["learning_rate=1e-3"] } else { ["learning_rate=2e-3"] };
        train(&out, 1, &set, false, hosts)
    });
    for result in results {
        let error = result.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Usage);
        assert!(error.message.contains("config"), "{error}");
    }
}
