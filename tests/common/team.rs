//! Runs of tiny models in this process, on several devices that all are the same adapter.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError, atomic::AtomicBool, mpsc},
    thread,
    time::Duration,
};

use serde_json::json;
use wgpu_llava::{
    error::Result,
    gpu::{AdapterOptions, Gpu},
    hosts::Alone,
    train::{
        config::{Request, RunConfig},
        events::{Observer, Silent, StepMetrics},
        metrics,
        run::train,
        team::{Devices, SlowLink},
    },
};

use super::common::golden;

/// How a run is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pub devices: usize,
    pub zero_stage: u8,
    pub offload: bool,
    /// Each device has a part of the layers.
    pub layer_split: bool,
}

impl Layout {
    pub const ONE: Self = Self { devices: 1, zero_stage: 0, offload: false, layer_split: false };

    pub const fn new(devices: usize, zero_stage: u8) -> Self {
        Self { devices, zero_stage, ..Self::ONE }
    }

    pub const fn offload(devices: usize, zero_stage: u8) -> Self {
        Self { devices, zero_stage, offload: true, ..Self::ONE }
    }

    pub const fn split(devices: usize) -> Self {
        Self { devices, layer_split: true, ..Self::ONE }
    }

    /// Devices that compute micro-batches of their own.
    pub fn ranks(self) -> usize {
        if self.layer_split { 1 } else { self.devices }
    }
}

/// Within this time everybody must have noticed that somebody is lost.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Opened once: kernels are compiled but once for each. A test that holds them is alone.
static GPUS: Mutex<Vec<Gpu>> = Mutex::new(Vec::new());

/// At least so many devices, and nobody else who uses them.
pub fn gpus(count: usize) -> MutexGuard<'static, Vec<Gpu>> {
    let mut gpus = GPUS.lock().unwrap_or_else(PoisonError::into_inner);
    while gpus.len() < count {
        gpus.push(Gpu::open(&AdapterOptions::default()).expect("an adapter; tools/test installs software Vulkan"));
    }
    gpus
}

/// A run of one stage over a parity case.
#[derive(Clone)]
pub struct Run {
    pub text: String,
    /// Micro-batches a step, of all devices.
    pub micro_batches: usize,
    pub out: PathBuf,
    /// Nothing is left of what was there before.
    pub resume: bool,
    pub slow: Option<SlowLink>,
}

impl Run {
    /// `settings` are lines of TOML.
    pub fn new(case: &str, settings: &str, micro_batches: usize, out: &Path) -> Self {
        let case = golden("parity").join(case);
        let data = ["data.json", "data.jsonl"].into_iter().find(|file| case.join(file).exists()).expect("records");
        let case = case.display();
        let text = format!(
            "model_name_or_path = '{case}/model'\ndata_path = '{case}/{data}'\nimage_folder = '{case}/images'\n\
             precision = \"float32\"\nseed = 7\nper_device_train_batch_size = 1\nmax_steps = 12\n\
             learning_rate = 1e-3\nsave_steps = 100\n"
        );
        // What is given wins over what is said above.
        let key = |line: &str| line.split_once('=').map(|(key, _)| key.trim().to_owned());
        let mut given: Vec<_> = settings.lines().filter_map(key).collect();
        if given.iter().any(|key| key == "num_train_epochs") {
            given.push("max_steps".to_owned());
        }
        let kept = text.lines().filter(|line| key(line).is_none_or(|key| !given.contains(&key)));
        let text = kept.chain(settings.lines()).collect::<Vec<_>>().join("\n");
        Self { text, micro_batches, out: out.to_owned(), resume: false, slow: None }
    }

    /// The config of this run under a layout.
    pub fn config(&self, layout: Layout) -> Result<RunConfig> {
        assert!(self.micro_batches.is_multiple_of(layout.ranks()), "{layout:?}");
        let set = [
            format!("gradient_accumulation_steps={}", self.micro_batches / layout.ranks()),
            format!("zero_stage={}", layout.zero_stage),
            format!("offload={}", layout.offload),
            format!("layer_split={}", layout.layer_split),
        ];
        RunConfig::resolve(&Request {
            recipe: None,
            file: Some((Path::new("run.toml"), &self.text)),
            set: &set,
            output_dir: Some(&self.out),
            default_output_dir: &self.out,
            working_dir: &std::env::current_dir().expect("tests run in a folder"),
        })
    }

    /// Trains on the first of `gpus`.
    pub fn train_on(&self, gpus: &[Gpu], layout: Layout, observer: &mut dyn Observer) -> Result<Outcome> {
        let config = self.config(layout)?;
        let devices = Devices { gpus: gpus[..layout.devices].to_vec(), checked: false, slow: self.slow };
        train(&config, self.resume, &devices, &mut Alone, &AtomicBool::new(false), observer)?;
        Ok(Outcome::read(&self.out))
    }

    /// Goes on, in a thread of its own, so that a run that hangs is no test that hangs.
    pub fn go_on_within(&self, gpus: Vec<Gpu>, layout: Layout, patience: Duration) -> Result<()> {
        let config = self.config(layout).unwrap();
        let (send, done) = mpsc::channel();
        let slow = self.slow;
        thread::spawn(move || {
            let devices = Devices { gpus, checked: false, slow };
            send.send(train(&config, true, &devices, &mut Alone, &AtomicBool::new(false), &mut Silent).map(drop))
        });
        done.recv_timeout(patience).expect("a run that hangs")
    }

    /// Trains, in a folder of its own where it does not go on.
    pub fn train(&self, layout: Layout) -> Outcome {
        let gpus = gpus(layout.devices);
        if !self.resume && self.out.exists() {
            fs::remove_dir_all(&self.out).expect("a temporary folder");
        }
        self.train_on(&gpus, layout, &mut Silent).unwrap_or_else(|error| panic!("{layout:?}: {error:?}"))
    }
}

/// Records by what they are: a picture, text, and either with an answer behind the cut, where nothing is supervised.
pub fn write_records(folder: &Path, kinds: &str) -> PathBuf {
    let long = "a long question ".repeat(80);
    let record = |(at, kind): (usize, char)| {
        let picture = kind == 'P' || kind == 'p';
        let question = if kind.is_uppercase() { format!("What is number {at}?") } else { long.clone() };
        let question = if picture { format!("<image>\n{question}") } else { question };
        let mut record = json!({"id": format!("{kind}-{at}"), "conversations": [
            {"from": "human", "value": question}, {"from": "gpt", "value": format!("It is {at} and no other.")}]});
        if picture {
            record["image"] = ["wide.png", "tall.png", "grey.png"][at % 3].into();
        }
        record
    };
    let records: Vec<_> = kinds.chars().enumerate().map(record).collect();
    let path = folder.join("records.json");
    fs::write(&path, json!(records).to_string()).unwrap();
    path
}

/// Step, loss, norm, supervised tokens, and bytes moved by each device.
pub type Figures = (u64, f64, Option<f64>, u64, Vec<u64>);

/// What a run left.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub steps: Vec<StepMetrics>,
    pub weights: Vec<u8>,
}

impl Outcome {
    pub fn read(out: &Path) -> Self {
        let steps = metrics::read(&out.join(metrics::FILE_NAME)).expect("the run's metrics");
        let files = ["model/model.safetensors", "adapter/adapter_model.safetensors"];
        let written = files.iter().map(|file| out.join(file)).find(|path| path.exists()).expect("what was trained");
        Self { steps, weights: fs::read(written).expect("what was trained can be read") }
    }

    /// The largest relative distance of a loss.
    pub fn distance(&self, other: &Self) -> f64 {
        assert_eq!(self.steps.len(), other.steps.len());
        let pairs = self.steps.iter().zip(&other.steps);
        // A step without a supervised token has no loss.
        let distance = |a: f64, b: f64| if a == b { 0.0 } else { (a - b).abs() / b.abs() };
        let all = pairs.map(|(a, b)| distance(a.loss, b.loss));
        all.fold(0.0, |most, one| if most > one { most } else { one })
    }

    /// Of every step what does not depend on the clock; where steps were skipped the norm is none.
    pub fn figures(&self) -> Vec<Figures> {
        let norm = |step: &StepMetrics| step.grad_norm.is_finite().then_some(step.grad_norm);
        let moved = |step: &StepMetrics| step.devices.iter().map(|device| device.bytes_moved).collect();
        self.steps.iter().map(|s| (s.step, s.loss, norm(s), s.target_tokens, moved(s))).collect()
    }

    #[track_caller]
    pub fn assert_same(&self, other: &Self, what: &str) {
        assert_eq!(self.figures(), other.figures(), "{what}: another step");
        assert!(self.weights == other.weights, "{what}: other weights");
    }
}
