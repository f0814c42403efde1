//! Timed optimizer steps of a model with random weights and made-up records: what `bench step` measures.

use std::time::Instant;

use super::{
    config::StageConfig,
    estimate::{self, Estimate, Steps, no_picture},
    events::{Event, Observer},
    optimizer::{Sharing, Updates},
    pictures::PictureStore,
    start::Prepared,
    step::Step,
    stepper::{Phases, Stepper},
};
use crate::{
    data::ImageSource,
    error::Result,
    formats::{model_folder::ModelFolder, safetensors::Dtype},
    gpu::{Gpu, Holdings, Launches},
    models::config::ModelConfig,
    tensor::Dtype as Kept,
};

/// What was measured.
#[derive(Clone, Debug)]
pub struct StepTimes {
    /// Of each timed step, in order.
    pub seconds: Vec<f64>,
    /// Of the last one.
    pub phases: Phases,
    /// Until the weights were on the device.
    pub loading_seconds: f64,
    pub positions: usize,
    pub target_tokens: u64,
    pub loss: f64,
    pub flops: u64,
    /// Whether products are by matrices in f16: their roof is another one.
    pub in_f16: bool,
    pub parameters: u64,
    pub trainable: u64,
    /// When most was held during the steps: a [`Stepper`] counts from its start.
    pub peak: Holdings,
    /// What was expected to be held at most, bytes ([`estimate`]).
    pub estimated: u64,
}

impl StepTimes {
    /// The median step.
    pub fn seconds_per_step(&self) -> f64 {
        let mut sorted = self.seconds.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => 0.0,
            length if length.is_multiple_of(2) => (sorted[middle - 1] + sorted[middle]) / 2.0,
            _ => sorted[middle],
        }
    }
}

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub sequences: usize,
    /// Positions of each.
    pub length: usize,
    /// Before the timed steps: kernels compile, buffers are found.
    pub warm_up: usize,
    pub steps: usize,
}

/// What such steps launch.
///
/// # Errors
/// A config with which nothing trains.
pub fn launches(stage: &StageConfig, config: &ModelConfig, sizes: Sizes, gpu: &Gpu) -> Result<Launches> {
    Ok(rehearse(stage, config, sizes, gpu)?.2.launches)
}

fn rehearse(stage: &StageConfig, config: &ModelConfig, sizes: Sizes, gpu: &Gpu) -> Result<(Prepared, Steps, Estimate)> {
    let stored = match stage.precision.map(|precision| precision.dtype()) {
        Some(Kept::Bf16) | None => Dtype::BF16,
        Some(Kept::F16) => Dtype::F16,
        Some(_) => Dtype::F32,
    };
    let prepared = Prepared::of(stage, ModelFolder::random(config, stored, stage.seed)?)?;
    let made_up = Steps::of_length(sizes.sequences, sizes.length, config);
    let estimate = estimate::simulate(stage, &prepared, true, &made_up, gpu.facts(), 1)?;
    Ok((prepared, made_up, estimate))
}

/// Runs steps of `stage` on a model of this config.
///
/// # Errors
/// A config with which nothing trains; whatever fails on the device.
pub fn steps(
    stage: &StageConfig,
    config: &ModelConfig,
    sizes: Sizes,
    gpu: &Gpu,
    observer: &mut dyn Observer,
) -> Result<StepTimes> {
    let (prepared, made_up, estimate) = rehearse(stage, config, sizes, gpu)?;
    let estimated = estimate.peak.held;
    let in_f16 = estimate.launches.names().any(|name| name.starts_with("cooperative.product"));
    gpu.compile_ahead(estimate.launches);
    observer.event(Event::Note(&format!("expected: {:.2} GB of device memory", estimated as f64 / 1e9)));
    let begun = Instant::now();
    let mut stepper =
        Stepper::new(stage, prepared.load(stage, std::slice::from_ref(gpu), None, observer)?, 1, Sharing::ALONE)?;
    let pictures = PictureStore::made_up(stepper.model(), made_up.pictures, !stage.unfreeze_mm_vision_tower)?;
    gpu.sync()?;
    let loading_seconds = begun.elapsed().as_secs_f64();

    let batches = &made_up.steps[0][..1];
    let images: Vec<Vec<ImageSource>> = batches.iter().map(|batch| vec![no_picture(); batch.images]).collect();
    let (mut seconds, mut updates, mut flops, mut last) = (Vec::new(), Updates::default(), 0, None);
    for number in 0..sizes.warm_up + sizes.steps.max(1) {
        if number == sizes.warm_up {
            gpu.start_profile();
        }
        let before = gpu.flops();
        let step = Step { number: number as u64, batches, images: &images, factor: 1.0 };
        let begun = Instant::now();
        let measured = stepper.timed_step(stage, &step, &pictures, &mut updates)?;
        if number >= sizes.warm_up {
            seconds.push(begun.elapsed().as_secs_f64());
        }
        flops = gpu.flops() - before;
        last = Some(measured);
    }
    let (measured, phases) = last.unwrap_or_default();
    Ok(StepTimes {
        seconds,
        phases,
        loading_seconds,
        positions: measured.positions,
        target_tokens: measured.target_tokens,
        loss: measured.loss,
        flops,
        in_f16,
        parameters: stepper.model().parameters.elements() as u64,
        trainable: stepper.optimizer.elements() as u64,
        peak: gpu.peak(),
        estimated,
    })
}
