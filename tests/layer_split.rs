//! A layer split gives the model that one device gives: the decoder's layers lie on several devices, micro-batches follow
//! each other through them, and each device holds its own layers alone.

mod common;
#[path = "common/team.rs"]
mod team;

use std::{fs, ops::ControlFlow, path::Path, sync::atomic::AtomicBool, time::Instant};

use common::{copy_folder, golden, program, stderr};
use team::{Layout, Outcome, PATIENCE, Run, gpus, write_records};
use wgpu_llava::{
    data::Turn,
    error::ErrorKind,
    generate::{Options, Session, beam_search, generate, session::Pixels},
    gpu::{Account, AdapterFacts, AdapterOptions, Gpu},
    hosts::Alone,
    models::{
        llava::Pictures,
        open::{Place, open as load_model},
    },
    train::{estimate::estimate, events::Silent, run::train, team::Devices},
};

/// What is trained: a name, a parity case, settings, and the numbers of devices.
type Form = (&'static str, &'static str, &'static str, &'static [usize]);

/// Three decoder layers; the head is not the embeddings.
const THREE: &str = "mqa_untied_mlp_full_features";

const FORMS: &[Form] = &[
    ("projector", "llama3_rope_biases", "method = \"projector\"\nversion = \"plain\"\nlearning_rate = 5e-3", &[2]),
    ("lora", THREE, "method = \"lora\"\nr = 4\nlora_dropout = 0.1\nmm_projector_lr = 1e-4", &[2, 3]),
    ("lora full checkpointing", THREE, "method = \"lora\"\nr = 4\ngradient_checkpointing = \"full\"", &[3]),
    ("lora tied", "gqa_tied_mlp_vision", "method = \"lora\"\nr = 4\noptim = \"adamw_8bit\"", &[2]),
    ("lora resting", "qwen2_dynamic", "method = \"lora\"\nr = 4\ngradient_checkpointing = \"offload\"", &[2]),
    ("dora", THREE, "method = \"lora\"\nr = 4\nuse_dora = true", &[2]),
    (
        "some layers",
        THREE,
        "method = \"lora\"\nr = 4\nfreeze_mm_mlp_adapter = true\ntarget_modules = '.*layers\\.2\\..*'",
        &[3],
    ),
    ("qlora", "qlora", "method = \"qlora\"\nr = 4\nlora_dropout = 0.1\ngradient_checkpointing = \"full\"", &[2]),
    ("qlora tied", "gqa_tied_mlp_vision", "method = \"qlora\"\nr = 4\nlora_dropout = 0.1", &[2]),
    ("full", THREE, "method = \"full\"\nweight_decay = 0.1\nunfreeze_mm_vision_tower = true", &[3]),
    ("full tied", "gqa_tied_mlp_vision", "method = \"full\"\nweight_decay = 0.1", &[2]),
];

/// Sums of squares in another order differ in their last bits; the largest seen was 1e-7.
const SUMS: f64 = 1e-5;

#[test]
fn a_split_gives_the_losses_of_one_device() {
    let folder = tempfile::tempdir().unwrap();
    let mut wrong = Vec::new();
    for (name, case, settings, devices) in FORMS {
        let run = Run::new(case, settings, 4, &folder.path().join("run"));
        let one = run.train(Layout::ONE);
        for &devices in *devices {
            let begun = Instant::now();
            let distance = run.train(Layout::split(devices)).distance(&one);
            let line =
                format!("{name:24} {devices} devices: within {distance:.1e}  ({:.1} s)", begun.elapsed().as_secs_f64());
            println!("{line}");
            wrong.extend((distance.is_nan() || distance > SUMS).then_some(line));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Without clipping nothing is added up in another order: gradients come in the order of the micro-batches, though these
/// follow each other through the parts.
#[test]
fn a_split_gives_the_bytes_of_one_device_where_nothing_is_clipped() {
    let folder = tempfile::tempdir().unwrap();
    for (settings, devices) in [
        ("method = \"lora\"\nr = 4\nlora_dropout = 0.1\ngradient_checkpointing = \"selective\"", 3),
        ("method = \"full\"\nunfreeze_mm_vision_tower = true", 2),
        ("method = \"full\"\nprecision = \"bfloat16\"", 3),
        ("method = \"full\"\nprecision = \"float16\"\ninitial_scale_power = 20", 2),
    ] {
        let settings = format!("{settings}\nmax_grad_norm = 0.0\nmax_steps = 4");
        let run = Run::new(THREE, &settings, 7, &folder.path().join("run"));
        let one = run.train(Layout::ONE);
        let split = run.train(Layout::split(devices));
        let losses = |outcome: &Outcome| outcome.steps.iter().map(|step| step.loss).collect::<Vec<_>>();
        assert_eq!(losses(&split), losses(&one), "{settings}");
        assert!(split.weights == one.weights, "{settings}: other weights");
    }
}

#[test]
fn the_same_split_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    for (case, method, devices) in
        [(THREE, "lora\"\nr = 4\nlora_dropout = 0.1", 3), ("gqa_tied_mlp_vision", "full\"\nweight_decay = 0.1", 2)]
    {
        let run = Run::new(case, &format!("method = \"{method}\nmax_steps = 6"), 5, &folder.path().join("run"));
        let layout = Layout::split(devices);
        run.train(layout).assert_same(&run.train(layout), method);
    }
}

/// Hidden states go forward over each border, and their gradients back.
#[test]
fn metrics_tell_what_each_part_did() {
    let folder = tempfile::tempdir().unwrap();
    let run = Run::new(THREE, "method = \"full\"\nmax_steps = 2", 4, &folder.path().join("run"));
    for step in run.train(Layout::split(3)).steps {
        let positions = (step.tokens_per_second * step.step_seconds).round() as u64;
        // The case's hidden_size, in f32, there and back.
        let over_a_border = positions * 40 * 4 * 2;
        let bytes: Vec<u64> = step.devices.iter().map(|device| device.bytes_moved).collect();
        assert_eq!(bytes, [over_a_border, 2 * over_a_border, over_a_border]);
        for device in &step.devices {
            assert!(device.tokens_per_second > 0.0 && device.waiting_seconds > 0.0, "{device:?}");
            assert!(device.waiting_seconds < step.step_seconds, "{device:?}");
        }
    }
}

/// A micro-batch without a picture or without a supervised token, a step without either, and one with fewer micro-batches
/// than there are parts.
#[test]
fn micro_batches_may_lack_pictures_tokens_or_themselves() {
    let folder = tempfile::tempdir().unwrap();
    let data = write_records(folder.path(), "PTTTPtpPtpttTpP");
    for (settings, micro_batches) in
        [("max_steps = 8", 2), ("num_train_epochs = 1.0", 4), ("num_train_epochs = 0.4", 1)]
    {
        let text = format!(
            "data_path = '{}'\nmodel_max_length = 300\nshuffle = false\n{settings}\nmethod = \"lora\"\nr = 2\n\
             lora_dropout = 0.2",
            data.display()
        );
        let run = Run::new(THREE, &text, micro_batches, &folder.path().join("run"));
        let distance = run.train(Layout::split(3)).distance(&run.train(Layout::ONE));
        assert!(distance <= SUMS, "{settings}: {distance:e}");
    }
}

/// Text and a picture, greedily, by beams, and in a talk that goes on; heads that are the embeddings, and a cache that slides.
#[test]
fn a_split_answers_as_one_device_does() {
    let gpus = gpus(3);
    for (case, devices) in [(THREE, 3), ("gqa_tied_mlp_vision", 2), ("mistral_window", 2), ("qwen2_dynamic", 2)] {
        let place = Place::Folder(&golden("parity").join(case).join("model"), None);
        let answers = |gpus: &[Gpu]| {
            let opened = load_model(gpus, place, None).unwrap();
            let model = &opened.model;
            assert_eq!(model.gpus().len(), gpus.len());
            let shown = usize::from(model.vision.is_some());
            let encoder = opened.encoder("v1", Some("Be brief.".into())).unwrap();
            let prompts = ["What is this?", "And that over there, what may it be?"]
                .map(|text| encoder.prompt(&[Turn::human(text, shown)]).unwrap());
            let side = model.config.llava().map_or(0, |llava| llava.vision_config.image_size);
            let pixels: Pixels = (0..3 * side * side).map(|at| (at % 97) as f32 / 50.0 - 1.0).collect();
            let views = vec![&*pixels; shown * prompts.len()];
            let options = Options::greedy(8, opened.stop_ids(&encoder.version).unwrap());
            let mut on_token = |_, _| ControlFlow::Continue(());
            let mut all = generate(model, &prompts, Pictures::Pixels(&views), &options, &mut on_token).unwrap();
            let [first, second] = &prompts;
            let views = Pictures::Pixels(&views[..shown]);
            all.push(beam_search(model, first, views, &options, 3, 1.0).unwrap());
            let mut session = Session::new(model);
            for prompt in [first, second] {
                let pictures = vec![pixels.clone(); shown];
                all.push(session.answer(prompt, &pictures, &options, &mut |_| ControlFlow::Continue(())).unwrap());
            }
            all
        };
        let one = answers(&gpus[..1]);
        assert!(one.iter().all(|answer| !answer.token_ids.is_empty()));
        assert_eq!(answers(&gpus[..devices]), one, "{case}");
    }
}

fn open(count: usize) -> Vec<Gpu> {
    (0..count).map(|_| Gpu::open(&AdapterOptions::default()).unwrap()).collect()
}

/// Every device holds its own layers and no others, and what was told before.
#[test]
fn each_device_holds_its_own_layers_and_what_was_estimated() {
    let folder = tempfile::tempdir().unwrap();
    for (method, mode) in [("qlora", "full"), ("lora", "none")] {
        let settings = format!(
            "model_name_or_path = \"embedded:tiny\"\ndata_path = [{{ path = \"embedded:easy-vqa-questions\", limit = 96 }}]\n\
             method = \"{method}\"\nr = 8\nper_device_train_batch_size = 4\nmax_steps = 10\nprecision = \"float32\"\n\
             gradient_checkpointing = \"{mode}\""
        );
        let run = Run::new(THREE, &settings, 4, &folder.path().join("run"));
        let mut weights = Vec::new();
        for devices in 1..=3 {
            let layout = if devices == 1 { Layout::ONE } else { Layout::split(devices) };
            let gpus = open(devices);
            let _ = fs::remove_dir_all(&run.out);
            run.train_on(&gpus, layout, &mut Silent).unwrap();
            let told = estimate(&run.config(layout).unwrap().stages, gpus[0].facts(), devices).unwrap().remove(0);
            assert_eq!(told.parts.len(), devices);
            for (at, (gpu, part)) in gpus.iter().zip(&told.parts).enumerate() {
                let (held, told) = (gpu.peak().held, part.peak.held);
                let ratio = held as f64 / told as f64;
                println!("{method} {mode}, device {} of {devices}: {told} told, {held} held: {ratio:.4}", at + 1);
                assert!((0.95..1.05).contains(&ratio), "{told} told, {held} held");
            }
            let trained = |gpu: &Gpu| gpu.peak().of(Account::Weights) + gpu.peak().of(Account::Trained);
            weights.push(gpus.iter().map(trained).collect::<Vec<_>>());
        }
        println!("{method}: {weights:?} bytes of weights");
        let [one, two, three] = &weights[..] else { unreachable!() };
        // Of three layers the device in the middle has one and nothing else.
        assert!(3 * three[1] <= one[0] && two[1] < one[0] && two[0] < one[0] && three[0] < two[0], "{weights:?}");
        // Nothing is there twice but the head, where it is the embeddings too and does not train.
        let (all, copy) = (one[0], three[2] - three[1]);
        for parts in [two, three] {
            let sum: u64 = parts.iter().sum();
            // Buffers are of whole units.
            let slack = 1 << 17;
            assert!((all - slack..=all + copy + slack).contains(&sum), "{weights:?}");
        }
    }
}

/// A checkpoint of one layout is gone on with under others, and what is written is whole.
#[test]
fn a_checkpoint_is_gone_on_with_across_layouts() {
    let folder = tempfile::tempdir().unwrap();
    for (begun_with, others) in [
        (Layout::split(3), [Layout::split(3), Layout::ONE, Layout::split(2)]),
        (Layout::ONE, [Layout::ONE, Layout::split(2), Layout::new(2, 1)]),
    ] {
        let whole = folder.path().join("whole");
        let _ = fs::remove_dir_all(&whole);
        let settings = "method = \"lora\"\nr = 4\nlora_dropout = 0.1\nsave_steps = 4";
        let mut run = Run::new(THREE, settings, 4, &whole);
        let undisturbed = run.train(begun_with);
        // What a run would have left that was stopped before step 8.
        for gone in ["checkpoint-8", "adapter"] {
            fs::remove_dir_all(whole.join(gone)).unwrap();
        }
        fs::remove_file(whole.join("finished.json")).unwrap();
        run.resume = true;
        for (at, layout) in others.into_iter().enumerate() {
            run.out = folder.path().join("gone-on");
            let _ = fs::remove_dir_all(&run.out);
            copy_folder(&whole, &run.out);
            let outcome = run.train(layout);
            if at == 0 {
                outcome.assert_same(&undisturbed, "the same layout");
            }
            let distance = outcome.distance(&undisturbed);
            println!("{begun_with:?}, gone on with {layout:?}: within {distance:.1e}");
            assert!(distance <= SUMS, "{layout:?}: {distance:e}");
            assert_eq!(outcome.weights.len(), undisturbed.weights.len());
        }
    }
}

#[test]
fn what_cannot_be_split_is_refused_with_a_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |settings: &str, layout: Layout| {
        let run = Run::new(THREE, settings, layout.ranks(), &folder.path().join("run"));
        let error = run.train_on(&gpus(layout.devices), layout, &mut Silent).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Usage, "{error:?}");
        assert!(!run.out.exists(), "a run that was refused leaves a folder");
        format!("{error} {}", error.hints.join(" "))
    };
    let told = refused("r = 2", Layout::split(1));
    assert!(told.contains("several devices") && told.contains("devices = [0, 1]"), "{told}");
    let told = refused("r = 2", Layout::split(4));
    assert!(told.contains("4 devices") && told.contains("3 layers") && told.contains("at most 3"), "{told}");
    for (layout, key) in [
        (Layout { zero_stage: 1, ..Layout::split(2) }, "zero_stage"),
        (Layout { zero_stage: 3, ..Layout::split(2) }, "zero_stage"),
        (Layout { offload: true, ..Layout::split(2) }, "offload"),
    ] {
        let told = refused("r = 2", layout);
        assert!(told.contains("layer_split") && told.contains(key) && told.contains("leave"), "{told}");
    }
    // Before a device is opened, too.
    let out = folder.path().join("none").display().to_string();
    for command in [&["train", "--dry-run", "--output-dir", &out][..], &["estimate"]] {
        let arguments = ["embedded:tiny", "embedded:easy-vqa-questions"];
        let set = [
            format!("model_name_or_path={}", arguments[0]),
            format!("data_path={}", arguments[1]),
            "layer_split=true".to_owned(),
        ];
        let mut refused = program(command.iter().copied());
        set.iter().for_each(|set| _ = refused.args(["--set", set]));
        let output = refused.output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{command:?}: {}", stderr(&output));
        assert!(stderr(&output).contains("several devices"), "{}", stderr(&output));
    }
}

/// What does not fit is refused before it is loaded: these devices only count, and one of them has little memory.
#[test]
fn a_part_that_does_not_fit_is_refused_by_its_device() {
    let folder = tempfile::tempdir().unwrap();
    let run = Run::new(THREE, "method = \"lora\"\nr = 2", 2, &folder.path().join("run"));
    let with = |memory: u64| Gpu::counting(AdapterFacts { memory: Some(memory), ..AdapterFacts::of_a_usual_gpu() });
    let refused = |memory: [u64; 2]| {
        let devices = Devices { gpus: memory.map(with).to_vec(), checked: true, slow: None };
        let config = run.config(Layout::split(2)).unwrap();
        let error = train(&config, false, &devices, &mut Alone, &AtomicBool::new(false), &mut Silent).err().unwrap();
        assert!(!run.out.exists());
        error
    };
    let error = refused([8 << 30, 1 << 20]);
    assert_eq!(error.kind, ErrorKind::Memory, "{error:?}");
    assert!(error.message.contains("device 2 of 2") && error.message.contains("needs"), "{error:?}");
    assert!(error.hints.join(" ").contains("--force"), "{error:?}");
    assert!(refused([1 << 20, 8 << 30]).message.contains("device 1 of 2"));
}

fn losing_run(out: &Path) -> Run {
    let settings = "method = \"lora\"\nr = 2\nlora_dropout = 0.1\nsave_steps = 2\nmax_steps = 4";
    Run { resume: true, ..Run::new(THREE, settings, 5, out) }
}

/// Whichever device is lost, and whenever: the run ends with its name, and goes on to the bytes of one that nothing
/// disturbed.
#[test]
fn a_lost_device_ends_the_run_with_one_message() {
    const MANY: u64 = 1 << 40;
    let folder = tempfile::tempdir().unwrap();
    let layout = Layout::split(3);
    let whole = losing_run(&folder.path().join("whole"));
    let healthy = open(3);
    healthy.iter().for_each(|gpu| gpu.lose_after(MANY));
    whole.go_on_within(healthy.clone(), layout, PATIENCE).unwrap();
    let undisturbed = Outcome::read(&whole.out);
    for (victim, gpu) in healthy.iter().enumerate() {
        let dispatches = MANY - gpu.until_loss();
        let run = losing_run(&folder.path().join(format!("lost-{victim}")));
        // At the start, on the way, and once more where it goes on.
        for eighth in [0, 3, 5] {
            let gpus = open(3);
            gpus[victim].lose_after(dispatches * eighth / 8);
            let name = gpus[victim].facts().name.clone();
            let begun = Instant::now();
            let Err(error) = run.go_on_within(gpus, layout, PATIENCE) else { continue };
            println!("device {} of 3 lost, {:.1} s: {}", victim + 1, begun.elapsed().as_secs_f64(), error.message);
            assert_eq!(error.kind, ErrorKind::Device, "{error:?}");
            assert_eq!(error.message, format!("device {} of 3: {name} was lost", victim + 1));
        }
        assert!(!run.out.join("finished.json").exists(), "nothing was lost");
        run.go_on_within(open(3), layout, PATIENCE).unwrap();
        Outcome::read(&run.out).assert_same(&undisturbed, "gone on with");
    }
}

/// A picture that cannot be read stops the thread that meets it, and with it the others.
#[test]
fn a_broken_picture_ends_the_run_with_one_message() {
    let folder = tempfile::tempdir().unwrap();
    let images = folder.path().join("images");
    copy_folder(&golden("parity").join(THREE).join("images"), &images);
    fs::write(images.join("grey.png"), b"\x89PNG\r\n\x1a\n and no more").unwrap();
    let data = write_records(folder.path(), "PPTPTP");
    let settings = format!(
        "data_path = '{}'\nimage_folder = '{}'\nshuffle = false\nmethod = \"lora\"\nr = 2\nmax_steps = 2\n\
         unfreeze_mm_vision_tower = true",
        data.display(),
        images.display()
    );
    let run = Run { resume: true, ..Run::new(THREE, &settings, 6, &folder.path().join("run")) };
    let error = run.go_on_within(open(3), Layout::split(3), PATIENCE).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Data, "{error:?}");
    assert!(format!("{error}").contains("grey.png"), "{error:?}");
}
