//! The factor that losses are multiplied with before they go backward in float16, so that small gradients do not vanish
//! and large ones do not overflow; as DeepSpeed's dynamic loss scaler finds it.
//!
//! Here activations and gradients are f32 whatever the weights are, so an overflow takes a factor near f32's own limit,
//! or weights that have outgrown float16, or, where products run on cooperative matrices, activations that have. What overflows is not used: the step is skipped, and counts as none.

use serde::{Deserialize, Serialize};

use super::config::{Precision, StageConfig};

/// 2^100: its reciprocal is still a normal f32.
const LARGEST: f32 = (1u128 << 100) as f32;

/// How the factor moves. Names as in DeepSpeed's `fp16` section.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossScaling {
    /// Not 0: the factor, always.
    pub loss_scale: f64,
    pub initial_scale_power: i32,
    /// Steps without overflow that double the factor.
    pub loss_scale_window: u64,
    /// Overflows before it is halved.
    pub hysteresis: u32,
    pub min_loss_scale: f64,
}

impl LossScaling {
    /// Of a stage; none where nothing is scaled.
    pub fn of(stage: &StageConfig) -> Option<Self> {
        (stage.precision == Some(Precision::Float16)).then_some(Self {
            loss_scale: stage.loss_scale,
            initial_scale_power: stage.initial_scale_power,
            loss_scale_window: stage.loss_scale_window,
            hysteresis: stage.hysteresis,
            min_loss_scale: stage.min_loss_scale,
        })
    }
}

/// The factor and how it got there; a part of every checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossScaler {
    /// What the next step's losses are multiplied with. An f32 survives being written as JSON to the last bit.
    pub scale: f32,
    /// Steps that overflowed so far.
    pub skipped_steps: u64,
    /// Steps since the last overflow.
    good_steps: u64,
    /// Overflows that are left before the factor is halved.
    hysteresis: u32,
}

impl LossScaler {
    pub fn new(scaling: &LossScaling) -> Self {
        let scale = if scaling.loss_scale > 0.0 {
            scaling.loss_scale
        } else {
            2f64.powi(scaling.initial_scale_power).max(scaling.min_loss_scale)
        };
        Self { scale: (scale as f32).min(LARGEST), skipped_steps: 0, good_steps: 0, hysteresis: scaling.hysteresis }
    }

    /// After a step whose gradients were finite.
    pub fn good(&mut self, scaling: &LossScaling) {
        self.good_steps += 1;
        if scaling.loss_scale == 0.0 && self.good_steps.is_multiple_of(scaling.loss_scale_window) {
            self.hysteresis = scaling.hysteresis;
            self.scale = (self.scale * 2.0).min(LARGEST);
        }
    }

    /// After a step whose gradients were not. False where no smaller factor is left to try.
    #[must_use]
    pub fn overflow(&mut self, scaling: &LossScaling) -> bool {
        (self.good_steps, self.skipped_steps) = (0, self.skipped_steps + 1);
        if scaling.loss_scale > 0.0 {
            return false;
        }
        if self.hysteresis > 1 {
            self.hysteresis -= 1;
            return true;
        }
        let least = scaling.min_loss_scale as f32;
        let more = self.scale > least;
        self.scale = (self.scale / 2.0).max(least).min(self.scale);
        more
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCALING: LossScaling = LossScaling {
        loss_scale: 0.0,
        initial_scale_power: 16,
        loss_scale_window: 3,
        hysteresis: 2,
        min_loss_scale: 16384.0,
    };

    #[test]
    fn it_halves_after_the_second_overflow_and_doubles_after_a_window() {
        let mut scaler = LossScaler::new(&SCALING);
        assert_eq!(scaler.scale, 65536.0);
        assert!(scaler.overflow(&SCALING));
        assert_eq!(scaler.scale, 65536.0);
        assert!(scaler.overflow(&SCALING));
        assert_eq!(scaler.scale, 32768.0);
        // What was spent comes back with a window of good steps.
        assert!(scaler.overflow(&SCALING));
        assert_eq!((scaler.scale, scaler.skipped_steps), (16384.0, 3));
        (0..2).for_each(|_| scaler.good(&SCALING));
        assert_eq!(scaler.scale, 16384.0);
        scaler.good(&SCALING);
        assert_eq!(scaler.scale, 32768.0);
        assert!(scaler.overflow(&SCALING));
        assert_eq!(scaler.scale, 32768.0);
        // An overflow begins the window anew.
        (0..2).for_each(|_| scaler.good(&SCALING));
        assert!(scaler.overflow(&SCALING));
        assert_eq!(scaler.scale, 16384.0);
        assert!(!scaler.overflow(&SCALING), "nothing smaller is left");
        assert_eq!(scaler.scale, 16384.0);
    }

    #[test]
    fn a_factor_that_is_given_stays() {
        let fixed = LossScaling { loss_scale: 128.0, ..SCALING };
        let mut scaler = LossScaler::new(&fixed);
        (0..10).for_each(|_| scaler.good(&fixed));
        assert_eq!(scaler.scale, 128.0);
        assert!(!scaler.overflow(&fixed));
    }

    #[test]
    fn it_never_outgrows_what_can_be_undone_in_f32() {
        let mut scaler = LossScaler::new(&LossScaling { initial_scale_power: 100, ..SCALING });
        (0..30).for_each(|_| scaler.good(&SCALING));
        assert_eq!(scaler.scale, LARGEST);
        assert!((1.0 / scaler.scale).is_normal() && scaler.scale.is_finite());
    }
}
