//! One optimizer step as its records make it, whoever computes it: what each micro-batch's losses are divided by, and
//! what comes of them.

use super::{
    config::{LossNorm, StageConfig},
    loss_scale::{LossScaler, LossScaling},
    optimizer::{Update, Updates},
    team::DeviceTimes,
};
use crate::{data::image::ImageSource, models::batch::PackedBatch};

/// What a step is made of.
pub struct Step<'a> {
    /// Counted from 0; dropout follows from it.
    pub number: u64,
    /// Of all devices.
    pub batches: &'a [PackedBatch],
    /// Of each micro-batch, in order.
    pub images: &'a [Vec<ImageSource>],
    /// The schedule's.
    pub factor: f64,
}

/// What a step has measured.
#[derive(Clone, Debug, Default, PartialEq)]
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
    /// Of each device, where there are several.
    pub devices: Vec<DeviceTimes>,
}

/// A step that was skipped.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Overflow {
    /// The factor of the next step; none where none is left to try.
    pub next: Option<f64>,
}

impl Step<'_> {
    fn targets(&self) -> usize {
        self.batches.iter().map(|batch| batch.targets.len()).sum()
    }

    /// What each token loss of micro-batch `index` is multiplied with before it goes backward.
    pub fn factor_of(&self, stage: &StageConfig, index: usize) -> f64 {
        match stage.loss_norm {
            LossNorm::GlobalTokens => 1.0 / self.targets().max(1) as f64,
            LossNorm::MicroMean => 1.0 / (self.batches[index].targets.len().max(1) * self.batches.len()) as f64,
        }
    }

    /// The update that the step makes; it is counted in `updates`.
    pub fn update(&self, updates: &mut Updates, loss_scale: Option<f64>) -> Update {
        let pictures = self.batches.iter().any(|batch| batch.images > 0);
        updates.language += 1;
        updates.pictures += u64::from(pictures);
        Update {
            factor: self.factor,
            updates: *updates,
            pictures,
            loss_scale: loss_scale.unwrap_or(1.0),
            step: self.number,
        }
    }

    /// What comes of the micro-batches' loss sums and the square sum of the scaled gradients. Where these overflowed
    /// the step was skipped: `updates` are those `before` it again, and the scaler notes it.
    pub fn conclude(
        &self,
        stage: &StageConfig,
        (sums, square_sum): (&[f32], f64),
        (updates, before): (&mut Updates, Updates),
        loss_scaler: Option<&mut LossScaler>,
    ) -> Measured {
        let targets = self.targets();
        let losses = sums.iter().zip(self.batches).map(|(&sum, batch)| (f64::from(sum), batch.targets.len()));
        let loss = match stage.loss_norm {
            LossNorm::GlobalTokens => losses.map(|(sum, _)| sum).sum::<f64>() / targets.max(1) as f64,
            LossNorm::MicroMean => {
                losses.map(|(sum, count)| sum / count.max(1) as f64).sum::<f64>() / self.batches.len() as f64
            }
        };
        let loss_scale = loss_scaler.as_ref().map(|scaler| f64::from(scaler.scale));
        let grad_norm = square_sum.sqrt() / loss_scale.unwrap_or(1.0);
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
        Measured {
            loss,
            grad_norm,
            target_tokens: targets as u64,
            positions: self.batches.iter().map(PackedBatch::tokens).sum(),
            loss_scale,
            overflow,
            devices: Vec::new(),
        }
    }
}
