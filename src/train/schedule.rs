//! Learning-rate schedules, each as the Hugging Face trainer computes it (`transformers.optimization`).
//!
//! T is the number of optimizer steps, w the warm-up steps, s the step index from 0. With warm-up the first step's
//! rate is 0.

use super::config::LrSchedulerType;

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    pub kind: LrSchedulerType,
    pub total_steps: u64,
    /// 0 for `constant`, which has no warm-up.
    pub warmup_steps: u64,
}

impl Schedule {
    /// `warmup_steps` wins over `warmup_ratio`; from the ratio it is ceil(ratio T).
    pub fn new(kind: LrSchedulerType, total_steps: u64, warmup_steps: Option<u64>, warmup_ratio: f64) -> Self {
        let from_ratio = (total_steps as f64 * warmup_ratio).ceil().max(0.0) as u64;
        let warmup_steps = match kind {
            LrSchedulerType::Constant => 0,
            _ => warmup_steps.unwrap_or(from_ratio),
        };
        Self { kind, total_steps, warmup_steps }
    }

    /// What the peak rate is multiplied with at step index `step`, from 0.
    pub fn factor(&self, step: u64) -> f64 {
        if self.kind != LrSchedulerType::Constant && step < self.warmup_steps {
            return step as f64 / self.warmup_steps.max(1) as f64;
        }
        let after = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        match self.kind {
            LrSchedulerType::Constant | LrSchedulerType::ConstantWithWarmup => 1.0,
            LrSchedulerType::Linear => self.total_steps.saturating_sub(step) as f64 / after,
            LrSchedulerType::Cosine => {
                let progress = (step - self.warmup_steps) as f64 / after;
                (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
            }
        }
    }

    /// The rate of step index `step` for a parameter group whose peak rate is `peak`.
    pub fn rate(&self, peak: f64, step: u64) -> f64 {
        peak * self.factor(step)
    }
}

/// Optimizer steps of a stage: `max_steps` where given, else ceil(records / global batch) an epoch, the last, shorter
/// batch included. At least 1.
pub fn total_steps(records: usize, global_batch: usize, epochs: f64, max_steps: Option<u64>) -> u64 {
    let an_epoch = records.div_ceil(global_batch.max(1)) as f64;
    max_steps.unwrap_or((an_epoch * epochs).ceil() as u64).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() <= 1e-5 * b.abs(), "{a} is not {b}");
    }

    #[test]
    fn cosine_gives_the_rates_of_the_hugging_face_trainer() {
        let schedule = Schedule::new(LrSchedulerType::Cosine, 100, None, 0.03);
        assert_eq!(schedule.warmup_steps, 3);
        assert_eq!(schedule.rate(2e-5, 0), 0.0);
        for (step, rate) in
            [(1, 6.6667e-6), (2, 1.33333e-5), (3, 2e-5), (4, 1.9994756e-5), (50, 1.0485622e-5), (99, 5.24431e-9)]
        {
            close(schedule.rate(2e-5, step), rate);
        }
    }

    #[test]
    fn linear_falls_to_zero_after_the_warm_up() {
        let schedule = Schedule::new(LrSchedulerType::Linear, 10, Some(2), 0.5);
        let rates: Vec<f64> = (0..=10).map(|step| schedule.rate(1.0, step)).collect();
        assert_eq!(rates, [0.0, 0.5, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0]);
    }

    #[test]
    fn constant_ignores_the_warm_up_and_constant_with_warmup_does_not() {
        let constant = Schedule::new(LrSchedulerType::Constant, 10, Some(4), 0.0);
        assert_eq!([constant.factor(0), constant.factor(9)], [1.0, 1.0]);
        let warmed = Schedule::new(LrSchedulerType::ConstantWithWarmup, 10, Some(4), 0.0);
        assert_eq!([0, 1, 3, 4, 9].map(|step| warmed.factor(step)), [0.0, 0.25, 0.75, 1.0, 1.0]);
    }

    #[test]
    fn warmup_steps_win_and_the_ratio_is_rounded_up() {
        assert_eq!(Schedule::new(LrSchedulerType::Cosine, 12, None, 0.03).warmup_steps, 1);
        assert_eq!(Schedule::new(LrSchedulerType::Cosine, 12, Some(0), 0.03).warmup_steps, 0);
        assert_eq!(Schedule::new(LrSchedulerType::Cosine, 12, Some(0), 0.03).factor(0), 1.0);
        // A warm-up as long as the run never divides by zero.
        assert!(Schedule::new(LrSchedulerType::Cosine, 3, Some(3), 0.0).factor(3).is_finite());
    }

    #[test]
    fn a_short_last_batch_is_a_step_and_max_steps_win() {
        assert_eq!(total_steps(10, 4, 1.0, None), 3);
        assert_eq!(total_steps(10, 4, 2.0, None), 6);
        assert_eq!(total_steps(10, 4, 0.5, None), 2);
        assert_eq!(total_steps(10, 4, 1.0, Some(50)), 50);
    }
}
