//! The tuner: what it finds is right and is used; what is wrong cannot win; and the command line around it.

mod common;

use std::{collections::HashMap, fs, ops::ControlFlow, path::Path, process::Output};

use common::{program, stderr};
use serde_json::Value;
use wgpu_llava::{
    generate::{Options as Answer, generate},
    gpu::{AdapterOptions, Choices, Gpu, Launches, Question},
    models::{
        batch::PackedBatch,
        llava::Pictures,
        open::{Opened, Place, open},
    },
    ops::{
        attention::{Heads, MAX_HEAD_SIZE, Ranges, forward},
        matmul::{Layout, product},
        tuning,
    },
    quant::QuantType,
    tensor::{Dtype, Tensor},
    tune::{Options, tune},
};

fn device(options: AdapterOptions) -> Gpu {
    Gpu::open(&options).expect("an adapter; tools/test installs software Vulkan")
}

fn tiny(gpu: &Gpu) -> Opened {
    open(std::slice::from_ref(gpu), Place::Embedded("embedded:tiny"), None).unwrap()
}

/// Scores a text and answers it.
fn use_model(opened: &Opened) -> (Vec<f32>, Vec<u32>) {
    let tokens: Vec<i32> = (0..45).map(|at| 3 + at * 7 % 500).collect();
    let mut batch = PackedBatch::default();
    batch.push(&tokens, &tokens, 0);
    let scores = opened.model.score(&batch, Pictures::Pixels(&[])).unwrap();
    let options = Answer::greedy(3, Vec::new());
    let mut go_on = |_, _| ControlFlow::Continue(());
    let answers = generate(&opened.model, &[tokens], Pictures::Pixels(&[]), &options, &mut go_on).unwrap();
    (scores, answers[0].token_ids.clone())
}

/// What a piece of work asks on a device like this.
fn asked(gpu: &Gpu, work: impl FnOnce(&Gpu)) -> Launches {
    let counting = Gpu::counting(gpu.facts().clone());
    work(&counting);
    counting.launches()
}

fn launched(gpu: &Gpu) -> Vec<String> {
    let mut names: Vec<String> = gpu.profile().into_iter().map(|(name, ..)| name).collect();
    names.sort();
    names
}

#[test]
fn the_shapes_of_a_model_are_tuned_and_what_won_is_used() {
    let gpu = device(AdapterOptions::default());
    let launches = asked(&gpu, |gpu| drop(use_model(&tiny(gpu))));
    let (mut told, quick) = (Vec::new(), Options { runs: 5, ..Options::default() });
    let outcomes = tune(&gpu, &launches, &quick, &mut |done, total| told.push((done, total))).unwrap();
    let questions = launches.questions().count();
    assert!(questions >= 8 && outcomes.len() == questions, "{questions} questions, {} answers", outcomes.len());
    assert_eq!((told[0], told[told.len() - 1]), ((0, questions), (questions, questions)));
    for outcome in &outcomes {
        assert!(outcome.wrong.is_empty() && outcome.ways > 1, "{outcome:?}");
        let changed = outcome.winner != outcome.rule;
        assert!(outcome.seconds > 0.0 && if changed { outcome.gain() > 1.05 } else { outcome.gain() == 1.0 });
        println!(
            "{} {:?}: {} to {}, {:.2}",
            outcome.question.op,
            outcome.question.sizes,
            outcome.rule,
            outcome.winner,
            outcome.gain()
        );
    }

    // Whatever won: a table of other ways than the rule's takes other kernels to the same results.
    let others: HashMap<Question, &'static str> = launches
        .questions()
        .map(|(question, sizes)| (question, tuning::trial(&gpu, &question, sizes).unwrap().unwrap().ways[1]))
        .collect();
    let choices = Choices::default();
    choices.set(others);
    let plain = device(AdapterOptions { profile: true, ..AdapterOptions::default() });
    let tuned = device(AdapterOptions { profile: true, choices, ..AdapterOptions::default() });
    let (want, got) = (use_model(&tiny(&plain)), use_model(&tiny(&tuned)));
    let (rules, changed) = (launched(&plain), launched(&tuned));
    println!("{rules:?}\n{changed:?}");
    assert_ne!(rules, changed);
    assert!(changed.iter().any(|name| name.starts_with("matmul.by_subgroup")), "{changed:?}");
    assert_eq!(got.1, want.1);
    assert!(want.0.len() == 44 && want.0.iter().zip(&got.0).all(|(want, got)| (want - got).abs() < 1e-4));
}

/// Products and decoding of every kind that asks.
fn use_ops(gpu: &Gpu) {
    let a = |rows: usize| Tensor::empty(gpu, &[rows, 128]);
    let w = |dtype| Tensor::empty_of(gpu, dtype, &[128, 128]);
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
        for (layout, rows) in [(Layout::Nt, 3), (Layout::Nt, 70), (Layout::Nn, 70)] {
            product(layout, &a(rows), &w(dtype));
        }
    }
    product(Layout::Tn, &a(70), &Tensor::empty(gpu, &[70, 40]));
    let quantized = Tensor::empty_quantized(gpu, QuantType::Nf4, false, &[128, 128]);
    for layout in [Layout::Nt, Layout::Nn] {
        product(layout, &a(9), &quantized);
    }
    let heads = Heads { heads: 4, kv_heads: 2, head_size: MAX_HEAD_SIZE / 4, in_f16: false };
    let keys = Tensor::empty(gpu, &[300, 2 * heads.head_size]);
    let query = Tensor::empty(gpu, &[1, 4 * heads.head_size]);
    forward(&query, &keys, &keys, &Ranges::cached(gpu, &[0, 300]), heads);
}

#[test]
fn every_way_is_right_on_a_processor_and_with_the_kernels_of_gpus() {
    for treat_as_gpu in [false, true] {
        let gpu = device(AdapterOptions { treat_as_gpu, ..AdapterOptions::default() });
        let launches = asked(&gpu, use_ops);
        let questions: Vec<_> = launches.questions().collect();
        let outcomes = tune(&gpu, &launches, &Options { runs: 1, ..Options::default() }, &mut |_, _| ()).unwrap();
        let kinds = ["matmul.nt", "matmul.nn_f16", "matmul.tn", "nf4_matmul.nt", "decode_attention"];
        for kind in kinds {
            assert!(outcomes.iter().any(|outcome| outcome.question.op == kind), "{kind}: {questions:?}");
        }
        for outcome in &outcomes {
            assert!(outcome.wrong.is_empty(), "{outcome:?}");
        }
        let most = outcomes.iter().map(|outcome| outcome.ways).max();
        assert!(most >= Some(3), "{outcomes:?}");
    }
}

#[test]
fn a_way_with_wrong_results_cannot_win() {
    let gpu = device(AdapterOptions::default());
    let launches = asked(&gpu, |gpu| {
        product(Layout::Nt, &Tensor::empty(gpu, &[40, 64]), &Tensor::empty(gpu, &[96, 64]));
    });
    let (question, sizes) = launches.questions().next().unwrap();
    assert_eq!((question.sizes, sizes), ([64, 96, 64], [40, 96, 64]));
    let ways = tuning::trial(&gpu, &question, sizes).unwrap().unwrap().ways;
    assert!(ways.len() > 2, "{ways:?}");
    for &spoiled in &ways {
        // Any other way wins for the smallest gain.
        let options = Options { runs: 1, least_gain: 0.0, spoiled: Some(spoiled) };
        let outcome = tune(&gpu, &launches, &options, &mut |_, _| ()).unwrap().remove(0);
        assert_eq!(outcome.wrong, [spoiled]);
        assert!(outcome.winner != spoiled && ways.contains(&outcome.winner), "{outcome:?}");
    }
}

fn generate_with(cache: &Path, others: &[&str]) -> Output {
    let arguments =
        ["generate", "--model", "embedded:tiny", "--prompt", "what color?", "--max-new-tokens", "3", "--json"];
    let mut command = program(arguments.iter().chain(others));
    let output = command.env("XDG_CACHE_HOME", cache).output().expect("the program starts");
    assert!(output.status.success(), "{}", stderr(&output));
    output
}

fn devices(cache: &Path) -> Value {
    let output = program(["devices", "--json"]).env("XDG_CACHE_HOME", cache).output().expect("the program starts");
    let first = String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned();
    serde_json::from_str(&first).expect("a JSON object a line")
}

#[test]
fn results_are_kept_for_the_driver_and_dropped_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let plain = generate_with(dir.path(), &[]);
    assert!(!stderr(&plain).contains("--tune") && devices(dir.path())["tuned"].is_null());
    let tuned = generate_with(dir.path(), &["--tune"]);
    let told = stderr(&tuned);
    assert!(told.contains("default") && told.contains("matmul.nt 1x128x128") && told.contains("kept in"), "{told}");
    let folder = dir.path().join("wgpu-llava/tuned");
    let files: Vec<_> = fs::read_dir(&folder).unwrap().map(|file| file.unwrap().path()).collect();
    let [path] = &files[..] else { panic!("{files:?}") };
    let table = common::read_json(path);
    for key in ["adapter", "backend", "driver", "version", "date"] {
        assert!(table[key].as_str().is_some_and(|text| !text.is_empty()), "{key}: {table}");
    }
    assert_eq!(devices(dir.path())["tuned"]["shapes"], table["results"].as_array().unwrap().len());

    // Taken up without being asked for, with the same answer.
    let again = generate_with(dir.path(), &[]);
    assert!(stderr(&again).contains("as --tune found them on"), "{}", stderr(&again));
    let ids = |output: &Output| serde_json::from_slice::<Value>(&output.stdout).unwrap()["token_ids"].clone();
    assert_eq!((ids(&again), ids(&tuned)), (ids(&plain), ids(&plain)));

    // Another driver: told once, and gone.
    let text = fs::read_to_string(path).unwrap();
    let driver = table["driver"].as_str().unwrap();
    fs::write(path, text.replace(driver, "another driver 1.0")).unwrap();
    assert!(devices(dir.path())["tuned"].is_null());
    let other = stderr(&generate_with(dir.path(), &[]));
    assert!(other.contains("is dropped: driver was another driver 1.0") && !path.exists(), "{other}");
    assert!(!stderr(&generate_with(dir.path(), &[])).contains("tune"));

    // Broken: told, and no reason to stop.
    fs::write(path, &text[..text.len() / 2]).unwrap();
    let broken = stderr(&generate_with(dir.path(), &[]));
    assert!(broken.contains("warning") && broken.contains("is ignored"), "{broken}");
}

#[test]
fn a_place_for_the_results_is_looked_for_before_anything_is_measured() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let arguments = ["generate", "--model", "embedded:tiny", "--prompt", "what color?", "--tune"];
    let output = program(arguments).env("XDG_CACHE_HOME", &file).output().unwrap();
    let told = stderr(&output);
    assert!(output.status.code() == Some(1) && told.contains("set XDG_CACHE_HOME"), "{told}");
    assert!(!told.contains("shapes tuned"), "{told}");
}

#[test]
fn what_has_no_shapes_of_a_model_cannot_be_tuned() {
    let output = program(["bench", "ops", "--tune"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("bench step --tune"));
}
