//! One optimizer step on one device, or on those that a model is split over: micro-batches through the model, gradients into
//! arenas, the update. Holds all of a stage that lives on a device, and knows neither data nor files.

use std::{sync::Arc, time::Instant};

use super::{
    config::{Method, Optim, Precision, StageConfig},
    loss_scale::LossScaler,
    optimizer::{AdamW, Keep, Optimizer, Sharing, Update, Updates},
    pictures::PictureStore,
    pipeline,
    start::Start,
    step::{Measured, Step},
    trainable,
};
use crate::{
    autograd::Tape,
    error::Result,
    gpu::{Account, Gpu},
    models::{dora, llava::Llava},
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

/// A milestone of the decoder that a pass has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    Forward(usize),
    Backward(usize),
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

impl Stepper {
    /// Moves what trains into the optimizer. A step has at most `micro_batches`, of all devices.
    ///
    /// # Errors
    /// `Usage` when nothing would train.
    pub fn new(stage: &StageConfig, mut start: Start, micro_batches: usize, sharing: Sharing) -> Result<Self> {
        start.model.set_checkpoints(stage.checkpoints());
        let trainables = trainable::select(stage, &start.model)?;
        let Llava { parameters, language, .. } = &mut start.model;
        let streaming = language.streaming().map(Arc::as_ref);
        let optimizer = Optimizer::new(parameters, trainables, settings(stage), sharing, streaming)?;
        // What was moved into arenas, and what loading needed.
        start.model.gpus().iter().for_each(Gpu::trim);
        let sums = elementwise::zeros(start.model.head_gpu(), &[1 + micro_batches]);
        start.model.gpus().iter().for_each(Gpu::start_peak);
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
            self.start.model.gpus().iter().try_for_each(Gpu::sync)?;
            *phase(phases) += begun.elapsed().as_secs_f64();
        }
        Ok(())
    }

    /// One step on this device alone; `updates` counts it. With a `loss_scaler` the losses are scaled, and a step whose
    /// gradients overflow is skipped, which it notes.
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
        let loss_scale = loss_scaler.as_ref().map(|scaler| f64::from(scaler.scale));
        self.begin();
        let mut devices = Vec::new();
        // Parts that are timed take no turns.
        if self.phases.is_none() && pipeline::suits(self) {
            devices = pipeline::run(self, stage, step, loss_scale, pictures)?;
        } else {
            for index in 0..step.batches.len() {
                self.micro_batch(stage, step, index, loss_scale, pictures, &mut |_, _| ())?;
            }
        }
        let begun = Instant::now();
        let before = *updates;
        let update = step.update(updates, loss_scale);
        let square_sum = match self.model().gpus() {
            [_] => {
                self.optimizer.add_square_sum(&self.sums, 0);
                self.optimizer.step(&update, &self.sums);
                None
            }
            _ => Some(self.optimizer.step_apart(&update)?),
        };
        self.settle();
        self.note(begun, |phases| &mut phases.optimizer)?;
        let sums = self.sums.to_vec()?;
        self.model().gpus().iter().try_for_each(Gpu::check)?;
        let sums = (&sums[1..=step.batches.len()], square_sum.unwrap_or(f64::from(sums[0])));
        Ok(Measured { devices, ..step.conclude(stage, sums, (updates, before), loss_scaler) })
    }

    /// Makes ready for the micro-batches of a step.
    pub fn begin(&self) {
        elementwise::fill(&self.sums, 0.0);
        self.optimizer.zero_gradients();
    }

    /// What the token losses of a micro-batch are multiplied with, and the seed and step of its dropout.
    pub(super) fn scale_and_dropout(
        &self,
        stage: &StageConfig,
        step: &Step<'_>,
        index: usize,
        loss_scale: Option<f64>,
    ) -> (f32, (u32, u32)) {
        let scale = step.factor_of(stage, index) * loss_scale.unwrap_or(1.0);
        let pass = step.number * (self.sums.len() - 1) as u64 + index as u64;
        (scale as f32, (stage.seed as u32, pass as u32))
    }

    /// Square sum of the gradients, then the loss sum of each micro-batch.
    pub(super) fn sums(&self) -> &Tensor {
        &self.sums
    }

    /// Forward and backward of one micro-batch of a step; its loss goes to its slot of the sums. `passes` is told the
    /// decoder's milestones, before the forward passes them and when the backward comes back to them.
    ///
    /// # Errors
    /// As [`Stepper::step`].
    pub fn micro_batch(
        &mut self,
        stage: &StageConfig,
        step: &Step<'_>,
        index: usize,
        loss_scale: Option<f64>,
        pictures: &PictureStore,
        passes: &mut dyn FnMut(&Optimizer, Pass),
    ) -> Result<()> {
        let (scale, dropout) = self.scale_and_dropout(stage, step, index, loss_scale);
        let pictures = pictures.load(&step.images[index])?;
        let model = &self.start.model;
        let _activations = model.gpu().account(Account::Activations);
        let (begun, views) = (Instant::now(), pictures.views());
        let mut tape = Tape::recording();
        let before = &mut |milestone| passes(&self.optimizer, Pass::Forward(milestone));
        let (parameters, dropout) = (&model.parameters, Some(dropout));
        let mut forward = Forward { tape: &mut tape, parameters, dropout, before: Some(before) };
        let losses = model.losses(&mut forward, &step.batches[index], pictures.as_pictures(&views), scale)?;
        self.note(begun, |phases| &mut phases.forward)?;
        if let Some(losses) = losses {
            let begun = Instant::now();
            reduce::add_sum(&losses.value, &self.sums, 1 + index);
            let optimizer = &self.optimizer;
            let passed = &mut |milestone| passes(optimizer, Pass::Backward(milestone));
            tape.backward_passing(&losses, losses.value.clone(), passed);
            self.note(begun, |phases| &mut phases.backward)?;
        }
        Ok(())
    }

    /// The loss sums of the step's micro-batches, waited for; zero where another device has computed one.
    ///
    /// # Errors
    /// Whatever has failed on the device so far.
    pub fn losses(&self) -> Result<Vec<f32>> {
        Ok(self.sums.to_vec()?.split_off(1))
    }

    /// What of the step's update is made here, with gradients that came from elsewhere and their square sum. Weights that
    /// others wait for go to `send` ([`Optimizer::step_and_send`]).
    ///
    /// # Errors
    /// Whatever has failed on the device so far.
    pub fn update(&mut self, update: &Update, square_sum: f64, send: &mut dyn FnMut(usize, Vec<u8>)) -> Result<()> {
        self.sums.part(0, &[1]).write(&[square_sum as f32]);
        self.optimizer.step_and_send(update, &self.sums, send)
    }

    /// Makes again what follows from the weights, once they are all new.
    pub fn settle(&mut self) {
        if let Some(streaming) = self.start.model.language.streaming() {
            streaming.renew();
        }
        dora::update_norms(&mut self.start.model);
    }
}

/// The optimizer's settings in a stage.
pub(super) fn settings(stage: &StageConfig) -> AdamW {
    AdamW {
        beta1: stage.adam_beta1,
        beta2: stage.adam_beta2,
        epsilon: stage.adam_epsilon,
        max_grad_norm: stage.max_grad_norm,
        moments_8bit: stage.optim == Optim::AdamW8bit,
        keep: kept(stage),
        seed: stage.seed,
    }
}

/// What of the matrices that train is on the device. Adapters, and a projector that trains without the language model,
/// are small: they stay in f32.
pub(super) fn kept(stage: &StageConfig) -> Keep {
    match stage.precision {
        _ if stage.method != Method::Full => Keep::Full,
        Some(_) if stage.stochastic_rounding => Keep::Stochastic,
        Some(half @ (Precision::Float16 | Precision::Bfloat16)) => Keep::Master(half.dtype()),
        Some(Precision::Float32) | None => Keep::Full,
    }
}
