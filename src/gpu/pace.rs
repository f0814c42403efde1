//! How much is submitted at a time. Systems reset a device that works on one submission for seconds (Windows after two), so
//! submissions are cut by the time that they will take: the operations that ops tell, at the fastest rate seen so far.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Dispatches per submission: enough to hide its cost, few enough that the device starts early.
pub(super) const DISPATCHES: usize = 64;
/// A twentieth of what Windows allows: a rate may be wrong, and submissions wait for each other.
const SECONDS: f64 = 0.1;
/// Operations of a submission while nothing is known of the device: the slowest GPUs do as many in a tenth of a second.
const FIRST_BUDGET: u64 = 20_000_000_000;

/// What has been recorded since the last submission, and how fast earlier ones went.
#[derive(Default)]
pub(super) struct Pace {
    /// Operations that had been told when the last submission was made.
    before: u64,
    /// Operations a second; 0: not known.
    rate: Arc<AtomicU64>,
}

impl Pace {
    /// Whether so much is recorded that it should go: `flops` have been told by now.
    pub fn is_due(&self, flops: u64) -> bool {
        let budget = match self.rate.load(Ordering::Relaxed) {
            0 => FIRST_BUDGET,
            rate => FIRST_BUDGET.max((rate as f64 * SECONDS) as u64),
        };
        flops - self.before >= budget
    }

    /// What is recorded is submitted now. Gives what is to be called when the device has done it.
    pub fn submitted(&mut self, flops: u64) -> impl FnOnce() + Send + 'static {
        let (submitted, since) = (Instant::now(), flops - std::mem::replace(&mut self.before, flops));
        let rate = self.rate.clone();
        move || note(&rate, since, submitted.elapsed())
    }
}

/// A submission that waits for others seems slow: the fastest one counts. Short ones measure their own cost.
fn note(rate: &AtomicU64, flops: u64, took: Duration) {
    if flops >= FIRST_BUDGET / 10 && !took.is_zero() {
        rate.fetch_max((flops as f64 / took.as_secs_f64()) as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn submissions_grow_with_the_device() {
        let mut pace = Pace::default();
        assert!(!pace.is_due(FIRST_BUDGET - 1) && pace.is_due(FIRST_BUDGET));
        drop(pace.submitted(FIRST_BUDGET));
        assert!(!pace.is_due(2 * FIRST_BUDGET - 1) && pace.is_due(2 * FIRST_BUDGET));
        // Ten TFLOP/s, then a submission that waited, then one that says nothing.
        for (flops, seconds) in [(FIRST_BUDGET, 0.002), (FIRST_BUDGET, 1.0), (1000, 1e-9)] {
            note(&pace.rate, flops, Duration::from_secs_f64(seconds));
        }
        let budget = 1_000_000_000_000;
        assert!(!pace.is_due(FIRST_BUDGET + budget - 1) && pace.is_due(FIRST_BUDGET + budget));
        // A slow device gets no less than one of which nothing is known.
        let slow = Pace::default();
        note(&slow.rate, FIRST_BUDGET, Duration::from_secs(10));
        assert!(!slow.is_due(FIRST_BUDGET - 1) && slow.is_due(FIRST_BUDGET));
    }
}
