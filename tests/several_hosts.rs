//! Training on several hosts gives the model that one host gives. Hosts are threads of this process here, each with
//! devices of its own; what MPI adds is in tests/mpi.rs.

mod common;

use std::{fs, path::Path, sync::atomic::AtomicBool};

use common::{copy_folder, golden, open_gpu, read_lines};
use wgpu_llava::{
    error::{ErrorKind, Result},
    formats::{
        safetensors::Checkpoint,
        safetensors_writer::{TensorData, TensorHead, write_safetensors},
    },
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

/// A folder of the same name on each host is not one folder, whatever is in it.
#[test]
fn hosts_with_output_folders_of_their_own_are_told_so_on_all() {
    let dir = tempfile::tempdir().unwrap();
    let outs = ["one", "other"].map(|name| dir.path().join(name));
    let refused = |resume: bool| {
        for result in threads::on(2, |hosts| train(&outs[hosts.rank()], 1, &[], resume, hosts)) {
            let error = result.unwrap_err();
            assert_eq!(error.kind, ErrorKind::Usage, "{error:?}");
            let told = format!("{} {}", error.message, error.hints.join(" "));
            assert!(told.contains("thread 1 does not see what the first one writes"), "{told}");
            assert!(told.contains("output_dir must be on storage that all hosts share"), "{told}");
        }
    };
    let files = |out: &Path| fs::read_dir(out).map_or(0, |found| found.count());
    outs.iter().for_each(|out| fs::create_dir(out).unwrap());
    refused(false);
    assert!(outs.iter().all(|out| files(out) == 0), "something is left");
    train(&outs[0], 1, &[], false, &mut Alone).unwrap();
    fs::remove_dir_all(outs[0].join("adapter")).unwrap();
    fs::remove_file(outs[0].join("finished.json")).unwrap();
    copy_folder(&outs[0], &outs[1]);
    let before = files(&outs[0]);
    refused(true);
    assert!(outs.iter().all(|out| files(out) == before), "something is left, or lost");
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
        let mut left = fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name());
        assert!(!left.any(|name| name.to_string_lossy().starts_with('.')), "{name}: what tells whether hosts share it");
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
    // A host that loses a card, or is lost itself: the config stays as it is.
    let with_all = dir.path().join("with all");
    threads::on(2, |hosts| train(&with_all, 2, &two, false, hosts)).into_iter().for_each(|result| result.unwrap());
    stop(&with_all);
    let out = dir.path().join("three devices");
    copy_folder(&with_all, &out);
    let left = |hosts: &mut dyn Hosts| train(&out, 2 - hosts.rank(), &two, true, hosts);
    threads::on(2, left).into_iter().for_each(|result| result.unwrap());
    assert_close(&losses(&out), &losses(&whole), "two devices on each of two hosts, then two and one");
    let out = dir.path().join("one host");
    copy_folder(&with_all, &out);
    train(&out, 2, &two, true, &mut Alone).unwrap();
    assert_close(&losses(&out), &losses(&whole), "two devices on each of two hosts, then on one");
}

/// What may differ between hosts must not part them: a checkpoint is saved by all together.
#[test]
fn the_first_host_says_when_a_checkpoint_is_due() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let set = [["save_steps=2", "logging_steps=3"], ["save_steps=3", "logging_steps=1"]];
    for result in threads::on(2, |hosts| train(&out, 1, &set[hosts.rank()], false, hosts)) {
        result.unwrap();
    }
    let saved = [2, 3, 4].map(|step| out.join(format!("checkpoint-{step}")).is_dir());
    assert_eq!(saved, [true, false, true]);
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

/// Adds 1 to a byte.
fn change(file: &Path, at: impl Fn(&[u8]) -> usize) {
    let mut bytes = fs::read(file).unwrap();
    let at = at(&bytes);
    bytes[at] = bytes[at].wrapping_add(1);
    fs::write(file, bytes).unwrap();
}

fn replace(file: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(file).unwrap();
    assert!(text.contains(from), "{}", file.display());
    fs::write(file, text.replacen(from, to, 1)).unwrap();
}

/// The projector of a model, alone; `more` is added to a value in its midst.
fn write_projector(model: &Path, file: &Path, more: f32) {
    let whole = Checkpoint::open(model).unwrap();
    let names: Vec<&str> = whole.names().filter(|name| name.contains("multi_modal_projector")).collect();
    let tensor = |name: &str| whole.require(name).unwrap().to_f32().unwrap();
    let heads = names.iter().map(|name| TensorHead::f32(*name, tensor(name).shape)).collect();
    let values = |name: &str| {
        let mut values = tensor(name).data;
        let middle = values.len() / 2;
        values[middle] += if name.ends_with("linear_1.weight") { more } else { 0.0 };
        values
    };
    write_safetensors(file, heads, &mut |head| Ok(TensorData::F32(values(&head.name).into()))).unwrap();
}

/// Hosts with copies of their own, of which one has changed. That they lie elsewhere is a difference of the config, and
/// the only one where the copies are equal.
#[test]
fn hosts_with_other_files_are_told_which() {
    /// What differs, how it is used, and what is done to it.
    type Kind = (&'static str, &'static [&'static str], fn(&Path));
    let adapter = &["adapter_name_or_path=COPY/adapter-lora", "r=2", "lora_alpha=4", "lora_dropout=0"][..];
    let projector = &["pretrain_mm_mlp_adapter=COPY/projector.safetensors"][..];
    let kinds: [Kind; 9] = [
        ("", &[], |_| {}),
        ("", adapter, |_| {}),
        ("", projector, |_| {}),
        ("records", &[], |copy| replace(&copy.join("data.jsonl"), "A red box.", "A blue box.")),
        ("pictures", &[], |copy| {
            let file = copy.join("images/tall.png");
            fs::write(&file, [&fs::read(&file).unwrap()[..], b"more"].concat()).unwrap();
        }),
        ("settings of the model", &[], |copy| {
            let file = copy.join("model/preprocessor_config.json");
            replace(&file, "\"image_mean\": [", "\"image_mean\": [0.25, 0.25, 0.25], \"was\": [");
        }),
        ("weights", &[], |copy| change(&copy.join("model/model.safetensors"), |bytes| bytes.len() - 4)),
        ("adapter", adapter, |copy| {
            // A value of the first tensor, behind the length and the header.
            let at = |bytes: &[u8]| 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize + 16;
            change(&copy.join("adapter-lora/adapter_model.safetensors"), at);
        }),
        ("projector", projector, |copy| {
            write_projector(&copy.join("model"), &copy.join("projector.safetensors"), 0.5);
        }),
    ];
    for (what, set, change) in kinds {
        let dir = tempfile::tempdir().unwrap();
        let copies = ["first", "second"].map(|name| dir.path().join(name));
        for copy in &copies {
            copy_folder(&golden("parity/mha_untied_linear"), copy);
            write_projector(&copy.join("model"), &copy.join("projector.safetensors"), 0.0);
        }
        change(&copies[1]);
        let results = threads::on(2, |hosts| {
            let copy = copies[hosts.rank()].display().to_string();
            let own = ["model_name_or_path=COPY/model", "data_path=COPY/data.jsonl", "image_folder=COPY/images"];
            let set: Vec<String> = own.iter().chain(set).map(|setting| setting.replace("COPY", &copy)).collect();
            let set: Vec<&str> = set.iter().map(String::as_str).collect();
            train(&dir.path().join("out"), 1, &set, false, hosts)
        });
        let also = if what.is_empty() { String::new() } else { format!(" and {what} (rank 1 (thread 1) differs") };
        let expected = format!("do not have the same config (rank 1 (thread 1) differs from rank 0 (thread 0)){also}");
        let errors: Vec<_> = results.into_iter().map(|result| result.unwrap_err()).collect();
        for error in &errors {
            assert_eq!(error.kind, ErrorKind::Usage, "{what}: {errors:?}");
            let differences = error.message.matches("differs").count();
            assert!(error.message.contains(&expected) && differences == 1 + usize::from(!what.is_empty()), "{error}");
        }
    }
}
