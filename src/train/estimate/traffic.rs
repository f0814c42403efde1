//! What moves between devices and host in a step, and how long a step takes with it.

use crate::train::{config::StageConfig, optimizer::Bucket, stepper::Stepper, team::ROUNDS_AHEAD};

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
    /// Weights that hosts get from each other, those that rest too.
    between_hosts: u64,
    /// What goes from one part of the layers to the next for a micro-batch, and as much comes back.
    pub crossing: u64,
    /// Numbers that train, all of them.
    trained: u64,
    /// At rest on the host.
    resting: u64,
    offload: bool,
    alone: bool,
    /// Whether gradients leave after every micro-batch.
    passing: bool,
}

/// How fast a machine is.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// Floating-point operations of one device, a second.
    pub flops: f64,
    /// Bytes a second from one device to the host, and to the device.
    pub down: f64,
    pub up: f64,
    /// Bytes of gradients that a host adds up in a second, of all its devices together.
    pub adding: f64,
    /// Numbers that a host updates in a second.
    pub updating: f64,
    /// Bytes a second from a host to others, each way.
    pub network: f64,
    /// Whether the devices are the host's processor: then nothing hides behind anything.
    pub on_host: bool,
}

impl Rates {
    /// What a host of this memory bandwidth (bytes a second) adds up and updates: to add, two numbers are read and one
    /// is written; to update, four are read and three written.
    pub fn of_host(bandwidth: f64) -> (f64, f64) {
        (bandwidth / 3.0, bandwidth / 28.0)
    }
}

/// Where a step is computed.
#[derive(Clone, Copy, Debug)]
pub struct Cluster {
    /// Of all hosts.
    pub devices: usize,
    pub hosts: usize,
    /// Of the layers, each on a device; else 1.
    pub parts: usize,
}

/// The parts of a step, in seconds. What hides behind the computation is in none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepTime {
    pub compute: f64,
    /// Gradients and layers, as far as nothing hides them.
    pub waiting: f64,
    /// The host's updates, and weights that are exchanged after the update, as far as the next forward does not hide them.
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
        // Forward and backward of each micro-batch; what the turns hold at the end of one is there for the next. DoRA
        // reads them all once more for its norms.
        let layers_up = resting * (2 * rounds + u64::from(stage.use_dora));
        let gradients = 4 * optimizer.buckets().iter().map(Bucket::elements).sum::<usize>() as u64;
        let (weights, rested) = (optimizer.weight_bytes(None), optimizer.rested_bytes());
        let width = stepper.model().config.text().hidden_size;
        let crossing = if stepper.model().gpus().len() > 1 { 4 * (tokens * width) as u64 } else { 0 };
        let idle = Self {
            layers_up,
            crossing,
            trained: optimizer.elements() as u64,
            resting,
            offload: sharing.offload,
            alone: sharing.is_alone(),
            passing: sharing.gradients_pass(),
            ..Self::default()
        };
        if sharing.is_alone() {
            return idle;
        }
        let devices = sharing.devices as u64;
        let gradients_down = gradients * if idle.passing { rounds } else { 1 };
        match (sharing.offload, sharing.weights_return()) {
            (true, _) => Self { gradients_down, weights_up: weights, ..idle },
            (false, true) => Self {
                gradients_down,
                sums_up: gradients / devices,
                weights_down: weights / devices + rested,
                weights_up: weights - weights / devices,
                between_hosts: weights + rested * devices,
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

    /// Of each host's memory, at most, for so many devices of its own: how far apart they are decides how many gradients
    /// wait for each other.
    pub fn host_bytes(&self, devices: usize) -> u64 {
        // Weights and two moments, and the gradients that they are updated with.
        let offloaded = if self.offload { 16 * self.trained } else { 0 };
        let gradients = 4 * self.trained;
        let rounds = if self.passing { self.gradients_down / gradients.max(1) } else { 1 };
        let waiting = rounds.clamp(1, ROUNDS_AHEAD as u64) * devices as u64;
        let sums = if self.alone { 0 } else { gradients * (1 + waiting) };
        offloaded + sums + self.resting
    }

    /// How long a step takes whose part for each device are `flops` in so many micro-batches.
    pub fn step_time(&self, flops: f64, micro_batches: f64, cluster: Cluster, rates: &Rates) -> StepTime {
        // The last part waits until the first micro-batch has come to it, and the first until the last one is back; the
        // others compute meanwhile where all are the processor.
        let filling = if rates.on_host { 0.0 } else { (cluster.parts.max(1) - 1) as f64 };
        let compute = flops / rates.flops * (1.0 + filling / micro_batches.max(1.0));
        let seconds = |bytes: u64, rate: f64| bytes as f64 / rate;
        let rounds = if self.passing { micro_batches.max(1.0) } else { 1.0 };
        let of_host = cluster.devices as f64 / cluster.hosts as f64;
        let elsewhere = 1.0 - 1.0 / cluster.hosts as f64;
        let (down, up) = (seconds(self.gradients_down, rates.down), seconds(self.sums_up, rates.up));
        let added = seconds(self.gradients_down, rates.adding) * of_host;
        // A slice of the sum to every other host, and the added slices back.
        let between = 2.0 * seconds(self.gradients_down, rates.network) / rounds * elsewhere;
        let layers = seconds(self.layers_up, rates.up);
        let updated = if self.offload { self.trained as f64 / rates.updating } else { 0.0 };
        let (weights_down, weights_up) = (seconds(self.weights_down, rates.down), seconds(self.weights_up, rates.up));
        let weights_between = seconds(self.between_hosts, rates.network) * elsewhere;
        // There and back, from the device to the host and from there to the next one.
        let over = 2.0 * (seconds(self.crossing, rates.down) + seconds(self.crossing, rates.up));
        if rates.on_host {
            let crossing = over * (cluster.parts.max(1) - 1) as f64 * micro_batches;
            let waiting = of_host * (down + up + layers) + added + between + crossing;
            let weights = of_host * (weights_down + weights_up) + updated + weights_between;
            return StepTime { compute, waiting, weights };
        }
        // Parcel by parcel, all of these at once: links work side by side with each other and with the host.
        let gradients = down.max(up).max(added).max(between);
        let one = compute / micro_batches.max(1.0);
        // Gradients that pass leave from every backward, and hide behind the next forward too.
        let hiding = if self.passing { compute - (1.0 - BACKWARD) * one } else { BACKWARD * one };
        // Other micro-batches hide what crosses over, but for the first on its way and the last on its.
        let waiting = filling * over + (gradients - hiding).max(0.0) + (layers - compute).max(0.0);
        // Weights come back in the next forward, in its order; but hosts exchange theirs before.
        let (before, beside) = match cluster.hosts {
            1 => (0.0, weights_down.max(weights_up)),
            _ => (weights_down.max(weights_between), weights_up),
        };
        let weights = updated + before + (beside - (1.0 - BACKWARD) * one).max(0.0);
        StepTime { compute, waiting, weights }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATES: Rates =
        Rates { flops: 10.0, down: 2.0, up: 2.0, adding: 1000.0, updating: 1000.0, network: 1.0, on_host: false };
    const TWO: Cluster = Cluster { devices: 2, hosts: 1, parts: 1 };

    #[test]
    fn gradients_hide_behind_the_backward() {
        let traffic = Traffic { gradients_down: 8, sums_up: 8, ..Traffic::default() };
        // 9 s of computation in three micro-batches: the last backward takes 2 s, the gradients 4, up and down at once.
        let time = traffic.step_time(90.0, 3.0, TWO, &RATES);
        assert!((time.compute - 9.0).abs() < 1e-9 && (time.waiting - 2.0).abs() < 1e-9, "{time:?}");
        let passing = Traffic { passing: true, ..traffic }.step_time(90.0, 3.0, TWO, &RATES);
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
    fn a_forward_hides_weights_and_a_slow_host_bounds_links() {
        let traffic = Traffic { gradients_down: 4, weights_down: 2, weights_up: 6, ..Traffic::default() };
        let slow = Rates { adding: 0.5, ..RATES };
        let time = traffic.step_time(30.0, 1.0, TWO, &slow);
        // Of 3 s of weights the forward hides one.
        assert!((time.waiting - 14.0).abs() < 1e-9 && (time.weights - 2.0).abs() < 1e-9, "{time:?}");
        let offload = Traffic { offload: true, trained: 10, ..traffic };
        let time = offload.step_time(30.0, 1.0, TWO, &Rates { updating: 5.0, ..RATES });
        assert!((time.weights - 4.0).abs() < 1e-9, "{time:?}");
        // On their way between hosts, half of 8 s, nothing hides them.
        let hosts = Traffic { between_hosts: 8, ..traffic };
        let time = hosts.step_time(30.0, 1.0, Cluster { hosts: 2, ..TWO }, &RATES);
        assert!((time.weights - 6.0).abs() < 1e-9, "{time:?}");
    }

    #[test]
    fn devices_that_are_the_processor_hide_nothing() {
        let traffic = Traffic { gradients_down: 2, sums_up: 2, layers_up: 4, weights_up: 2, ..Traffic::default() };
        let time = traffic.step_time(30.0, 1.0, TWO, &Rates { adding: 1.0, on_host: true, ..RATES });
        // Both devices': 1 s down, 1 up and 2 of layers each, and 4 to add.
        assert!((time.waiting - 12.0).abs() < 1e-9 && (time.weights - 2.0).abs() < 1e-9, "{time:?}");
    }

    #[test]
    fn a_host_holds_gradients_of_its_own_devices() {
        let traffic = Traffic { trained: 10, resting: 3, ..Traffic::default() };
        assert_eq!([1, 4].map(|devices| traffic.host_bytes(devices)), [83, 203]);
        assert_eq!(Traffic { offload: true, ..traffic }.host_bytes(1), 243);
        assert_eq!(Traffic { alone: true, ..traffic }.host_bytes(1), 3);
        // Of gradients that pass, two rounds where there are so many.
        let passing = |rounds: u64| Traffic { passing: true, gradients_down: rounds * 40, ..traffic }.host_bytes(4);
        assert_eq!([1, 2, 5].map(passing), [203, 363, 363]);
    }
}
