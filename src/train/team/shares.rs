//! Which device computes which micro-batch. Cards that are alike get the same; where they are not, each gets what it was
//! measured to manage.

use serde::{Deserialize, Serialize};

/// Steps that are measured before unlike devices get their shares.
const MEASURED_STEPS: u32 = 20;

/// What part of a step's micro-batches each device computes; a part of every checkpoint, so that a run that goes on deals
/// as it did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shares {
    /// What each device is: shares are for these. Of a checkpoint that does not say: none.
    #[serde(default)]
    kinds: Vec<String>,
    /// In any unit; all above 0.
    speeds: Vec<f64>,
    /// Sums of what was measured; none where nothing is to be measured any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    measuring: Option<Measuring>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Measuring {
    steps: u32,
    tokens: Vec<f64>,
    seconds: Vec<f64>,
}

impl Shares {
    /// Equal ones for devices of these `kinds`, to stay so where all are alike.
    pub fn new(kinds: Vec<String>) -> Self {
        let devices = kinds.len();
        let alike = kinds.windows(2).all(|two| two[0] == two[1]);
        let measuring = Measuring { steps: 0, tokens: vec![0.0; devices], seconds: vec![0.0; devices] };
        Self { kinds, speeds: vec![1.0; devices], measuring: (!alike).then_some(measuring) }
    }

    /// Whether both are for the same devices, in the same order.
    pub fn are_for_those_of(&self, other: &Self) -> bool {
        self.kinds == other.kinds && self.devices() == other.devices()
    }

    pub fn devices(&self) -> usize {
        self.speeds.len()
    }

    /// The device of each of `count` micro-batches: each goes to the one that would have it done first.
    pub fn deal(&self, count: usize) -> Vec<usize> {
        let mut dealt = vec![0_usize; self.speeds.len()];
        let next = |dealt: &[usize]| {
            let done = |device: usize| (dealt[device] + 1) as f64 / self.speeds[device];
            (0..self.speeds.len()).min_by(|&a, &b| done(a).total_cmp(&done(b))).unwrap_or(0)
        };
        (0..count)
            .map(|_| {
                let device = next(&dealt);
                dealt[device] += 1;
                device
            })
            .collect()
    }

    /// Notes tokens per second and tokens of each device in a step. Gives the speeds when they are settled by it: to
    /// two digits, in units of the fastest.
    pub fn note(&mut self, measured: &[(f64, f64)]) -> Option<&[f64]> {
        let measuring = self.measuring.as_mut()?;
        for (device, &(rate, tokens)) in measured.iter().enumerate().filter(|(_, (rate, _))| *rate > 0.0) {
            measuring.tokens[device] += tokens;
            measuring.seconds[device] += tokens / rate;
        }
        measuring.steps += 1;
        let all = measuring.seconds.iter().all(|&seconds| seconds > 0.0);
        if measuring.steps < MEASURED_STEPS || !all {
            return None;
        }
        let rates: Vec<f64> = measuring.tokens.iter().zip(&measuring.seconds).map(|(t, s)| t / s).collect();
        let fastest = rates.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
        self.speeds = rates.iter().map(|rate| ((rate / fastest * 100.0).round() / 100.0).max(0.01)).collect();
        self.measuring = None;
        Some(&self.speeds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn like_devices_take_turns() {
        let mut shares = Shares::new(vec!["a".into(); 3]);
        assert_eq!(shares.deal(7), [0, 1, 2, 0, 1, 2, 0]);
        for _ in 0..2 * MEASURED_STEPS {
            assert_eq!(shares.note(&[(1.0, 1.0), (9.0, 1.0), (1.0, 1.0)]), None);
        }
        assert_eq!(shares.deal(3), [0, 1, 2]);
    }

    #[test]
    fn shares_are_for_the_devices_they_were_measured_of() {
        let of = |kinds: &[&str]| Shares::new(kinds.iter().map(|&kind| kind.into()).collect());
        let (fast_first, slow_first) = (of(&["fast", "slow"]), of(&["slow", "fast"]));
        assert!(fast_first.are_for_those_of(&fast_first) && !fast_first.are_for_those_of(&slow_first));
        let old: Shares = serde_json::from_str(r#"{"speeds": [1.0, 0.5]}"#).unwrap();
        assert!(!old.are_for_those_of(&fast_first));
    }

    #[test]
    fn unlike_devices_get_what_they_manage() {
        let mut shares = Shares::new(vec!["a".into(), "b".into()]);
        for _ in 1..MEASURED_STEPS {
            assert_eq!(shares.note(&[(300.0, 600.0), (100.0, 600.0)]), None);
        }
        assert_eq!(shares.note(&[(300.0, 600.0), (100.0, 600.0)]), Some(&[1.0, 0.33][..]));
        let dealt = shares.deal(8);
        assert_eq!(dealt.iter().filter(|&&device| device == 0).count(), 6);
        // It does not change again.
        assert_eq!(shares.note(&[(1.0, 600.0), (100.0, 600.0)]), None);
    }

    #[test]
    fn a_device_without_micro_batches_is_not_measured() {
        let mut shares = Shares::new(vec!["a".into(), "b".into()]);
        for _ in 0..MEASURED_STEPS {
            assert_eq!(shares.note(&[(300.0, 600.0), (0.0, 0.0)]), None);
        }
        assert!(shares.note(&[(300.0, 600.0), (150.0, 600.0)]).is_some());
    }
}
