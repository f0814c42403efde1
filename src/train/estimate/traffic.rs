//! What moves between devices and host in a step, and how long a step takes with it.

use crate::train::{
    config::StageConfig,
    optimizer::{Bucket, Sharing},
    stepper::Stepper,
};

/// Forward is a third of a micro-batch, backward the rest: two products for each one of the forward.
const BACKWARD: f64 = 2.0 / 3.0;

/// Bytes that one device moves in a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Gradients that leave: beside the backward.
    pub gradients_down: u64,
    /// Sums that come back.
    pub sums_up: u64,
    /// Weights that it has updated.
    pub weights_down: u64,
    /// Weights that others have, or the host.
    pub weights_up: u64,
    /// Layers that come in for their turn: beside the layers before.
    pub layers_up: u64,
    /// What goes from one part of the layers to the next for a micro-batch, and as much comes back.
    pub crossing: u64,
    /// That train, all of them.
    trained: u64,
    /// At rest on the host.
    resting: u64,
}

/// How fast a machine is.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// Floating-point operations of one device, a second.
    pub flops: f64,
    /// Bytes a second from one device to the host, and to the device.
    pub down: f64,
    pub up: f64,
    /// Bytes of gradients that the host adds up in a second, of all devices together.
    pub adding: f64,
    /// Bytes a second from a host to others, each way.
    pub network: f64,
}

/// Where a step is computed.
#[derive(Clone, Copy, Debug)]
pub struct Cluster {
    /// Of all hosts.
    pub devices: usize,
    pub hosts: usize,
    /// Whether gradients leave after every micro-batch.
    pub passing: bool,
    /// Of the layers, each on a device; else 1.
    pub parts: usize,
}

/// The parts of a step, in seconds. What hides behind the computation is in none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepTime {
    pub compute: f64,
    /// Gradients and layers, as far as nothing hides them.
    pub waiting: f64,
    /// Weights that are exchanged after the update.
    pub weights: f64,
}

impl StepTime {
    pub fn seconds(&self) -> f64 {
        self.compute + self.waiting + self.weights
    }
}

impl Traffic {
    /// Of a step of so many micro-batches a device, of so many `tokens` at most.
    pub(super) fn of(stage: &StageConfig, stepper: &Stepper, micro_batches: usize, tokens: usize) -> Self {
        let optimizer = &stepper.optimizer;
        let sharing = optimizer.sharing();
        let resting = stepper.model().streamed_bytes();
        let rounds = stage.gradient_accumulation_steps.max(micro_batches) as u64;
        // Forward and backward of each micro-batch; what the turns hold at the end of one is there for the next.
        let layers_up = 2 * resting * rounds;
        let gradients = 4 * optimizer.buckets().iter().map(Bucket::elements).sum::<usize>() as u64;
        let trained = optimizer.weight_bytes(None);
        let width = stepper.model().config.text().hidden_size;
        let crossing = if stepper.model().gpus().len() > 1 { 4 * (tokens * width) as u64 } else { 0 };
        let idle = Self { layers_up, crossing, trained: optimizer.elements() as u64, resting, ..Self::default() };
        if sharing.is_alone() {
            return idle;
        }
        let devices = sharing.devices as u64;
        let gradients_down = gradients * if sharing.gradients_pass() { rounds } else { 1 };
        match (sharing.offload, sharing.weights_return()) {
            (true, _) => Self { gradients_down, weights_up: trained, ..idle },
            (false, true) => Self {
                gradients_down,
                sums_up: gradients / devices,
                weights_down: trained / devices,
                weights_up: trained - trained / devices,
                ..idle
            },
            (false, false) => Self { gradients_down, sums_up: gradients, ..idle },
        }
    }

    /// Bytes of hidden states and their gradients that a device in the middle of the parts moves each way.
    pub fn crossings(&self, micro_batches: f64, parts: usize) -> u64 {
        let borders = parts.saturating_sub(1).min(2) as f64;
        (self.crossing as f64 * micro_batches * borders) as u64
    }

    /// Of the host's memory, for all of its devices.
    pub(super) fn host_bytes(&self, sharing: &Sharing) -> u64 {
        // Weights and two moments, and the gradients that they are updated with.
        let offloaded = if sharing.offload { 16 * self.trained } else { 0 };
        let sums = if sharing.is_alone() { 0 } else { 4 * self.trained * (1 + sharing.devices as u64) };
        offloaded + sums + self.resting
    }

    /// How long a step takes whose part for each device are `flops` in so many micro-batches.
    pub fn step_time(&self, flops: f64, micro_batches: f64, cluster: Cluster, rates: &Rates) -> StepTime {
        // The last part waits until the first micro-batch has come to it, and the first until the last one is back.
        let filling = (cluster.parts.max(1) - 1) as f64;
        let compute = flops / rates.flops * (1.0 + filling / micro_batches.max(1.0));
        let seconds = |bytes: f64, rate: f64| bytes / rate;
        let rounds = if cluster.passing { micro_batches.max(1.0) } else { 1.0 };
        let down = self.gradients_down as f64;
        // Links work side by side with each other and with the host, which works for all of its devices.
        let added = seconds(down, rates.adding) * (cluster.devices as f64 / cluster.hosts as f64);
        // A slice of the sum to every other host, and the added slices back.
        let between = 2.0 * (down / rounds) * (1.0 - 1.0 / cluster.hosts as f64) / rates.network;
        let gradients = seconds(down, rates.down).max(added).max(between) + seconds(self.sums_up as f64, rates.up);
        let one = compute / micro_batches.max(1.0);
        // Gradients that pass leave from every backward, and hide behind the next forward too.
        let hiding = if cluster.passing { compute - (1.0 - BACKWARD) * one } else { BACKWARD * one };
        // Other micro-batches hide what crosses over, but for the first on its way and the last on its.
        let over = self.crossing as f64;
        let crossing = 2.0 * filling * (seconds(over, rates.down) + seconds(over, rates.up));
        let waiting =
            crossing + (gradients - hiding).max(0.0) + (seconds(self.layers_up as f64, rates.up) - compute).max(0.0);
        let others = if cluster.hosts > 1 { seconds(self.weights_up as f64, rates.network) } else { 0.0 };
        let weights =
            seconds(self.weights_down as f64, rates.down) + seconds(self.weights_up as f64, rates.up) + others;
        StepTime { compute, waiting, weights }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATES: Rates = Rates { flops: 10.0, down: 2.0, up: 2.0, adding: 1000.0, network: 1.0 };
    const TWO: Cluster = Cluster { devices: 2, hosts: 1, passing: false, parts: 1 };

    #[test]
    fn gradients_hide_behind_the_backward() {
        let traffic = Traffic { gradients_down: 4, sums_up: 4, ..Traffic::default() };
        // 9 s of computation in three micro-batches: the last backward takes 2 s, the gradients 4.
        let time = traffic.step_time(90.0, 3.0, TWO, &RATES);
        assert!((time.compute - 9.0).abs() < 1e-9 && (time.waiting - 2.0).abs() < 1e-9, "{time:?}");
        let passing = traffic.step_time(90.0, 3.0, Cluster { passing: true, ..TWO }, &RATES);
        assert_eq!((passing.waiting, passing.seconds()), (0.0, 9.0));
    }

    #[test]
    fn parts_wait_for_the_first_micro_batch_and_the_last() {
        let traffic = Traffic { crossing: 4, ..Traffic::default() };
        // 9 s of computation on each of two devices: of three micro-batches there are four turns. One crossing is 4 s.
        let time = traffic.step_time(90.0, 3.0, Cluster { parts: 2, ..TWO }, &RATES);
        assert!((time.compute - 12.0).abs() < 1e-9 && (time.waiting - 8.0).abs() < 1e-9, "{time:?}");
        assert_eq!((traffic.crossings(3.0, 1), traffic.crossings(3.0, 2), traffic.crossings(3.0, 5)), (0, 12, 24));
    }

    #[test]
    fn a_network_bounds_what_several_hosts_add_up() {
        let traffic = Traffic { gradients_down: 4, ..Traffic::default() };
        // Half of the sum leaves and comes back: 4 s, of which the backward hides 2.
        let time = traffic.step_time(30.0, 1.0, Cluster { hosts: 2, ..TWO }, &RATES);
        assert!((time.waiting - 2.0).abs() < 1e-9, "{time:?}");
    }

    #[test]
    fn nothing_hides_weights_and_a_slow_host_bounds_links() {
        let traffic = Traffic { gradients_down: 4, weights_down: 2, weights_up: 6, ..Traffic::default() };
        let slow = Rates { adding: 0.5, ..RATES };
        let time = traffic.step_time(30.0, 1.0, TWO, &slow);
        assert!((time.waiting - 14.0).abs() < 1e-9 && (time.weights - 4.0).abs() < 1e-9, "{time:?}");
    }
}
