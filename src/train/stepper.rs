//! One optimizer step: micro-batches through the model, gradients into arenas, the update. Holds all of a stage that
//! lives on the device, and knows neither data nor files.

use std::time::Instant;

use super::{
    config::{LossNorm, Method, Optim, Precision, StageConfig},
    loss_scale::{LossScaler, LossScaling},
    optimizer::{AdamW, Keep, Optimizer, Update, Updates},
    pictures::{Loaded, PictureStore},
    start::Start,
    trainable,
};
use crate::{
    autograd::Tape,
    data::image::ImageSource,
    error::Result,
    gpu::Account,
    models::{batch::PackedBatch, dora, llava::Llava},
    nn::Forward,
    ops::{elementwise, reduce},
    tensor::Tensor,
};

/// Seconds of a step's parts, each waited for.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Phases {
    pub forward: f64,
    pub backward: f64,
    /// Gradient norm and update.
    pub optimizer: f64,
}

/// A model, what trains of it, and what its updates need.
pub struct Stepper {
    pub start: Start,
    pub optimizer: Optimizer,
    /// Where the step under way is timed.
    phases: Option<Phases>,
    /// Square sum of the gradients, then one loss sum for each micro-batch.
    sums: Tensor,
}

/// What a step is made of.
pub struct Step<'a> {
    /// Counted from 0; dropout follows from it.
    pub number: u64,
    pub batches: &'a [PackedBatch],
    /// Of each micro-batch, in order.
    pub images: &'a [Vec<ImageSource>],
    /// The schedule's.
    pub factor: f64,
}

/// What a step has measured.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Measured {
    /// Mean over the supervised tokens, or of the micro-batches' means, in nats.
    pub loss: f64,
    /// Before clipping.
    pub grad_norm: f64,
    pub target_tokens: u64,
    /// Text and pictures.
    pub positions: usize,
    /// What the losses were multiplied with, where they were.
    pub loss_scale: Option<f64>,
    /// Where the scaled gradients overflowed, and the step was skipped.
    pub overflow: Option<Overflow>,
}

/// A step that was skipped.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Overflow {
    /// The factor of the next step; none where none is left to try.
    pub next: Option<f64>,
}

impl Stepper {
    /// Moves what trains into the optimizer.
    ///
    /// # Errors
    /// `Usage` when nothing would train.
    pub fn new(stage: &StageConfig, mut start: Start) -> Result<Self> {
        start.model.set_checkpoints(stage.checkpoints());
        let trainables = trainable::select(stage, &start.model)?;
        let settings = AdamW {
            beta1: stage.adam_beta1,
            beta2: stage.adam_beta2,
            epsilon: stage.adam_epsilon,
            max_grad_norm: stage.max_grad_norm,
            moments_8bit: stage.optim == Optim::AdamW8bit,
            keep: kept(stage),
            seed: stage.seed,
        };
        let optimizer = Optimizer::new(&mut start.model.parameters, trainables, settings);
        let gpu = start.model.gpu();
        // What was moved into arenas, and what loading needed.
        gpu.trim();
        let sums = elementwise::zeros(gpu, &[1 + stage.gradient_accumulation_steps]);
        gpu.start_peak();
        Ok(Self { start, optimizer, phases: None, sums })
    }

    pub fn model(&self) -> &Llava {
        &self.start.model
    }

    /// As [`Stepper::step`], with the time of its parts.
    ///
    /// # Errors
    /// As there.
    pub fn timed_step(
        &mut self,
        stage: &StageConfig,
        step: &Step<'_>,
        pictures: &PictureStore,
        updates: &mut Updates,
    ) -> Result<(Measured, Phases)> {
        self.phases = Some(Phases::default());
        let measured = self.step(stage, step, pictures, updates, None);
        let phases = self.phases.take().unwrap_or_default();
        Ok((measured?, phases))
    }

    /// Where the step is timed: waits for the device and notes the seconds since `begun`.
    fn note(&mut self, begun: Instant, phase: fn(&mut Phases) -> &mut f64) -> Result<()> {
        if let Some(phases) = &mut self.phases {
            self.start.model.gpu().sync()?;
            *phase(phases) += begun.elapsed().as_secs_f64();
        }
        Ok(())
    }

    /// One step; `updates` counts it. With a `loss_scaler` the losses are scaled, and a step whose gradients overflow is
    /// skipped, which it notes.
    ///
    /// # Errors
    /// A picture that cannot be read; whatever fails on the device.
    pub fn step(
        &mut self,
        stage: &StageConfig,
        step: &Step<'_>,
        pictures: &PictureStore,
        updates: &mut Updates,
        loss_scaler: Option<&mut LossScaler>,
    ) -> Result<Measured> {
        let batches = step.batches;
        let target_tokens: usize = batches.iter().map(|batch| batch.targets.len()).sum();
        let loss_scale = loss_scaler.as_ref().map(|scaler| f64::from(scaler.scale));
        elementwise::fill(&self.sums, 0.0);
        self.optimizer.zero_gradients();
        for (index, (images, batch)) in step.images.iter().zip(batches).enumerate() {
            let scale = match stage.loss_norm {
                LossNorm::GlobalTokens => 1.0 / target_tokens.max(1) as f64,
                LossNorm::MicroMean => 1.0 / (batch.targets.len().max(1) * batches.len()) as f64,
            };
            let scale = scale * loss_scale.unwrap_or(1.0);
            let pass = step.number * stage.gradient_accumulation_steps as u64 + index as u64;
            let dropout = (stage.seed as u32, pass as u32);
            self.micro_batch(batch, &pictures.load(images)?, scale as f32, dropout, index)?;
        }
        let begun = Instant::now();
        self.optimizer.add_square_sum(&self.sums, 0);
        let sees = batches.iter().any(|batch| batch.images > 0);
        let before = *updates;
        updates.language += 1;
        updates.pictures += u64::from(sees);
        let update = Update {
            factor: step.factor,
            updates: *updates,
            pictures: sees,
            loss_scale: loss_scale.unwrap_or(1.0),
            step: step.number,
        };
        self.optimizer.step(&update, &self.sums);
        dora::update_norms(&mut self.start.model);
        self.note(begun, |phases| &mut phases.optimizer)?;

        let sums = self.sums.to_vec()?;
        let losses =
            sums[1..=batches.len()].iter().zip(batches).map(|(&sum, batch)| (f64::from(sum), batch.targets.len()));
        let loss = match stage.loss_norm {
            LossNorm::GlobalTokens => losses.map(|(sum, _)| sum).sum::<f64>() / target_tokens.max(1) as f64,
            LossNorm::MicroMean => {
                losses.map(|(sum, count)| sum / count.max(1) as f64).sum::<f64>() / batches.len() as f64
            }
        };
        let grad_norm = f64::from(sums[0]).sqrt() / update.loss_scale;
        let mut overflow = None;
        if let (Some(scaling), Some(scaler)) = (LossScaling::of(stage), loss_scaler.filter(|_| loss.is_finite())) {
            if grad_norm.is_finite() {
                scaler.good(&scaling);
            } else {
                *updates = before;
                let more = scaler.overflow(&scaling);
                overflow = Some(Overflow { next: more.then_some(f64::from(scaler.scale)) });
            }
        }
        Ok(Measured {
            loss,
            grad_norm,
            target_tokens: target_tokens as u64,
            positions: batches.iter().map(PackedBatch::tokens).sum(),
            loss_scale,
            overflow,
        })
    }

    /// Forward and backward of one micro-batch; its loss goes to its slot of `sums`.
    fn micro_batch(
        &mut self,
        batch: &PackedBatch,
        pictures: &Loaded,
        scale: f32,
        dropout: (u32, u32),
        index: usize,
    ) -> Result<()> {
        let model = &self.start.model;
        let _activations = model.gpu().account(Account::Activations);
        let (begun, views) = (Instant::now(), pictures.views());
        let mut tape = Tape::recording();
        let mut forward = Forward { tape: &mut tape, parameters: &model.parameters, dropout: Some(dropout) };
        let losses = model.losses(&mut forward, batch, pictures.as_pictures(&views), scale)?;
        self.note(begun, |phases| &mut phases.forward)?;
        if let Some(losses) = losses {
            let begun = Instant::now();
            reduce::add_sum(&losses.value, &self.sums, 1 + index);
            tape.backward(&losses, losses.value.clone());
            self.note(begun, |phases| &mut phases.backward)?;
        }
        Ok(())
    }
}

/// What of the matrices that train is on the device. Adapters, and a projector that trains without the language model,
/// are small: they stay in f32.
fn kept(stage: &StageConfig) -> Keep {
    match stage.precision {
        _ if stage.method != Method::Full => Keep::Full,
        Some(_) if stage.stochastic_rounding => Keep::Stochastic,
        Some(half @ (Precision::Float16 | Precision::Bfloat16)) => Keep::Master(half.dtype()),
        Some(Precision::Float32) | None => Keep::Full,
    }
}
