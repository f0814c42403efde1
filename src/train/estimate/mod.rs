//! What a stage will need, before anything is loaded: the stage's own code runs its first steps on a device that only
//! counts ([`Gpu::counting`]), so that no second description of the memory can go wrong.

mod advice;
mod batches;
mod room;
mod traffic;

use std::path::PathBuf;

pub use advice::{Advice, Room, advise};
pub use batches::{Batch, Steps};
pub use room::check;
pub use traffic::{Cluster, Rates, StepTime, Traffic};

use super::{
    config::{GradientCheckpointing, Method, ProjectorType as WantedProjector, Source, StageConfig},
    events::Silent,
    optimizer::Updates,
    pictures::PictureStore,
    start::{self, Prepared},
    step::Step,
    stepper::Stepper,
    team::{Standing, Team},
};
use crate::{
    data::ImageSource,
    error::{Error, Result},
    formats::{model_folder::ModelFolder, safetensors::Dtype},
    gpu::{AdapterFacts, Gpu, Holdings, Launches, STAGING_BYTES},
    models::{batch::PackedBatch, released},
};

/// What one stage needs.
#[derive(Clone, Debug)]
pub struct Estimate {
    pub title: String,
    pub method: Method,
    pub model: String,
    /// Whether the model's files were found; else its shapes are those of the released model of that name.
    pub model_found: bool,
    pub parameters: u64,
    pub trainable: u64,
    /// The largest micro-batch.
    pub batch: Batch,
    pub micro_batches: usize,
    /// When most is held, by the device that holds most.
    pub peak: Holdings,
    /// One, or under `layer_split` one for each device in order.
    pub parts: Vec<Part>,
    /// Of the host's memory that the device sees: what goes to it and comes back passes through.
    pub staging: u64,
    /// What moves in a step, and what the host has for it.
    pub traffic: Traffic,
    pub devices: usize,
    /// Of a step of such micro-batches, recomputation included.
    pub flops: u64,
    /// The kernels of the start and of the steps.
    pub launches: Launches,
}

/// What one device holds when it holds most, and the kernels of the start and of the steps.
#[derive(Clone, Debug)]
pub struct Part {
    pub peak: Holdings,
    pub launches: Launches,
}

impl Estimate {
    /// All of it, bytes.
    pub fn bytes(&self) -> u64 {
        self.peak.held + self.staging
    }
}

/// Stands for a picture that is made up.
pub(super) fn no_picture() -> ImageSource {
    ImageSource::File(PathBuf::new())
}

/// A stage opened, and whether its files are here.
struct Known {
    prepared: Prepared,
    found: bool,
}

/// A model whose shapes are known: its files, or where they are not here, the released model of that name.
///
/// # Errors
/// What is wrong with the files; `Usage` where there are none and the name is none that is known.
fn open(stage: &StageConfig, before: Option<Known>) -> Result<Known> {
    let named = match (&stage.model_name_or_path, before) {
        (None, Some(Known { prepared, found })) => {
            return Ok(Known { prepared: Prepared::after(stage, prepared)?, found });
        }
        (None, None) => return Err(Error::usage("model_name_or_path is required in the first stage")),
        (Some(Source::Embedded(_)), _) => None,
        (Some(Source::Local(path)), _) => (!path.exists()).then(|| path.display().to_string()),
        (Some(Source::Hub(name)), _) => Some(name.clone()),
    };
    let Some(name) = named else { return Ok(Known { prepared: Prepared::open(stage, None)?, found: true }) };
    let unknown = || {
        Error::data(format!("there is no model folder {name}, and its size is not known by that name"))
            .hint("name a folder with config.json, or a LLaMA, Vicuna or LLaVA of 7b, 13b, 33b, 65b or 70b")
    };
    let mut config = released::by_name(&name)?.ok_or_else(unknown)?;
    if let (Some(tower), None) = (&stage.vision_tower, config.llava()) {
        let projector = start::projector_type(stage.mm_projector_type.unwrap_or(WantedProjector::Linear));
        config = released::with_tower(&config, &tower.to_string(), projector)?;
    }
    // 16 bits, as all these models are published.
    let folder = ModelFolder::random(&config, Dtype::BF16, 0)?;
    let alone =
        StageConfig { pretrain_mm_mlp_adapter: None, adapter_name_or_path: None, vision_tower: None, ..stage.clone() };
    Ok(Known { prepared: Prepared::of(&alone, folder)?, found: false })
}

/// Opens the last of these stages, and those before it as far as it starts from them.
fn open_last(stages: &[StageConfig]) -> Result<Known> {
    let mut before = None;
    for stage in stages {
        before = Some(open(stage, before)?);
    }
    before.ok_or_else(|| Error::usage("the config has no stage"))
}

/// What every stage needs, on each of so many devices like that of `facts`.
///
/// # Errors
/// As [`Prepared::open`], and where the data is there, as [`Prepared::dataset`].
pub fn estimate(stages: &[StageConfig], facts: &AdapterFacts, devices: usize) -> Result<Vec<Estimate>> {
    let mut before: Option<Known> = None;
    let mut estimates = Vec::new();
    for stage in stages {
        let known = open(stage, before.take())?;
        known.prepared.check_split(stage, devices)?;
        let steps = Steps::of(stage, &known.prepared, known.found, devices)?;
        estimates.push(simulate(stage, &known.prepared, known.found, &steps, facts, devices)?);
        before = Some(known);
    }
    Ok(estimates)
}

/// Runs a stage's start and some of its steps on devices that only count: the first of so many like that of `facts`, or
/// under `layer_split` all of them.
///
/// # Errors
/// A config with which nothing trains.
pub(super) fn simulate(
    stage: &StageConfig,
    prepared: &Prepared,
    found: bool,
    steps: &Steps,
    facts: &AdapterFacts,
    devices: usize,
) -> Result<Estimate> {
    let parts = if stage.layer_split { devices } else { 1 };
    simulate_on(stage, prepared, found, steps, &vec![facts; parts], devices)
}

/// As [`simulate`], on devices like these.
fn simulate_on(
    stage: &StageConfig,
    prepared: &Prepared,
    found: bool,
    steps: &Steps,
    facts: &[&AdapterFacts],
    devices: usize,
) -> Result<Estimate> {
    let gpus: Vec<Gpu> = facts.iter().map(|&facts| Gpu::counting(facts.clone())).collect();
    let ranks = stage.ranks(devices);
    let own = steps.steps.iter().map(Vec::len).max().unwrap_or(1);
    let sharing = Team::sharing(stage, prepared.config(), Standing { first: 0, total: ranks }, 1)[0];
    let resting = Team::resting(stage, ranks);
    let of_all = (own * ranks).max(stage.gradient_accumulation_steps);
    let mut stepper =
        Stepper::new(stage, prepared.load(stage, &gpus, resting.as_ref(), &mut Silent)?, of_all, sharing)?;
    let pictures = PictureStore::made_up(stepper.model(), steps.pictures, !stage.unfreeze_mm_vision_tower)?;
    let (mut flops, mut updates) = (0, Updates::default());
    let done = || gpus.iter().map(Gpu::flops).sum::<u64>();
    // One that is made up stands for all of a step; where they follow each other through parts, more are held at once.
    let times = if steps.largest.from_data { 1 } else { gpus.len().min(stage.gradient_accumulation_steps) };
    for batches in &steps.steps {
        let batches: Vec<PackedBatch> = (0..times).flat_map(|_| batches.iter().cloned()).collect();
        let images: Vec<Vec<ImageSource>> = batches.iter().map(|batch| vec![no_picture(); batch.images]).collect();
        let before = done();
        let step = Step { number: 0, batches: &batches, images: &images, factor: 1.0 };
        stepper.step(stage, &step, &pictures, &mut updates, None)?;
        flops = flops.max(done() - before);
    }
    let micro_batches = own * times;
    let traffic = Traffic::of(stage, &stepper, micro_batches, steps.largest.tokens);
    let parts: Vec<Part> = gpus.iter().map(|gpu| Part { peak: gpu.peak(), launches: gpu.launches() }).collect();
    let mut launches = gpus[0].launches();
    parts.iter().for_each(|part| launches.add_questions(&part.launches));
    Ok(Estimate {
        title: stage.title().to_owned(),
        method: stage.method,
        model: prepared.folder.name().to_owned(),
        model_found: found,
        parameters: stepper.model().parameters.elements() as u64,
        trainable: stepper.optimizer.elements() as u64,
        batch: steps.largest,
        micro_batches,
        peak: parts.iter().map(|part| part.peak).max_by_key(|peak| peak.held).unwrap_or_default(),
        // Uploads of weights have theirs before anything else is there.
        staging: match (&resting, stage.gradient_checkpointing) {
            (None, checkpointing)
                if sharing.is_alone() && parts.len() == 1 && checkpointing != GradientCheckpointing::Offload =>
            {
                0
            }
            _ => 2 * STAGING_BYTES,
        },
        parts,
        traffic,
        devices,
        flops: flops / gpus.len() as u64,
        launches,
    })
}
