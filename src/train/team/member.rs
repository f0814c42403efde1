//! One device's part of a step, in a thread of its own: its micro-batches, gradients that leave while the backward still
//! runs, sums that come back, the update.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, mpsc::RecvError},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::{
    exchange::{Got, Sent},
    link::{Receiver, Sender},
};
use crate::{
    error::{Error, Result},
    models::dora,
    tensor::Downloading,
    train::{
        config::StageConfig,
        optimizer::{Bucket, Optimizer, Parcel, Update},
        pictures::PictureStore,
        step::Step,
        stepper::{Pass, Stepper},
    },
};

/// Rounds whose gradients may wait for those of slower devices: they lie in the host's memory.
pub const ROUNDS_AHEAD: usize = 2;

/// Buckets on their way that a device is not waited for.
const UNDERWAY: usize = 2;

/// The milestone that all weights come before.
const ALL: Option<usize> = Some(usize::MAX);

/// A device of a team, with all that it holds.
pub struct Member {
    pub stepper: Stepper,
    pub pictures: PictureStore,
    pub link: Link,
}

/// A device's part of a step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DeviceTimes {
    /// Text and pictures, per second of its own work.
    pub tokens_per_second: f64,
    /// Seconds between its own last gradient and the last sum, and those in which a forward waited for weights or for slower
    /// devices; of a part of the layers, those in which it had no turn.
    pub waiting_seconds: f64,
    /// To the host and back: gradients, sums, weights and layers that come in for their turn; where layers are split, what
    /// passes between their parts.
    pub bytes_moved: u64,
}

impl DeviceTimes {
    /// Of positions in seconds of its own work; none where the clock did not move on.
    pub fn rate(positions: usize, seconds: f64) -> f64 {
        if seconds > 0.0 { positions as f64 / seconds } else { 0.0 }
    }
}

/// What a device has done in a step.
pub struct Done {
    /// The loss sums of the step's micro-batches, zero where another device has computed one.
    pub losses: Vec<f32>,
    pub times: DeviceTimes,
}

/// What a step has in common for all members.
pub struct Task<'a> {
    pub stage: &'a StageConfig,
    pub step: &'a Step<'a>,
    pub update: &'a Update,
    /// Where losses are scaled.
    pub loss_scale: Option<f64>,
    /// How often gradients leave.
    pub rounds: usize,
}

/// Why a member has stopped.
pub enum Stopped {
    Failed(Error),
    /// Another one has.
    ByOthers,
}

impl From<Error> for Stopped {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// The way to the others and back, of a run.
pub struct Link {
    device: usize,
    to: Sender<Sent>,
    from: Receiver<Got>,
    /// Pieces of weights that others have updated and that have not come yet: how many for each milestone of a forward.
    missing: BTreeMap<Option<usize>, usize>,
}

impl Link {
    /// `device` counts those of this host.
    pub fn new(device: usize, to: Sender<Sent>, from: Receiver<Got>) -> Self {
        Self { device, to, from, missing: BTreeMap::new() }
    }

    /// Sends weights that are updated here. Where nobody hears, somebody has failed: that is told when nothing comes back.
    fn send_weights(&mut self, piece: usize, bytes: Vec<u8>) {
        let count = bytes.len();
        let _ = self.to.send(Sent::Weights { device: self.device, piece, bytes }, count);
    }

    /// The weights of all others are on their way from now on. Gives the bytes of all that return.
    fn expect_weights(&mut self, optimizer: &Optimizer) -> u64 {
        let sharing = optimizer.sharing();
        if !sharing.weights_return() {
            return 0;
        }
        if sharing.offload {
            self.expect(optimizer, None);
        } else {
            let others = (0..sharing.devices).filter(|&owner| owner != sharing.device);
            others.for_each(|owner| self.expect(optimizer, Some(owner)));
        }
        optimizer.weight_bytes(None)
    }

    fn expect(&mut self, optimizer: &Optimizer, owner: Option<usize>) {
        for piece in optimizer.pieces(owner) {
            *self.missing.entry(piece.milestone).or_default() += 1;
        }
    }

    /// Whether weights that a forward reads before it comes to the milestone behind this one are still on their way.
    fn lacks(&self, milestone: Option<usize>) -> bool {
        self.missing.range(..=milestone).next().is_some()
    }

    /// Puts weights into their place. What is recorded from now on reads them.
    fn take_weights(&mut self, optimizer: &Optimizer, owner: Option<usize>, first: usize, bytes: &[u8]) {
        for piece in optimizer.write_weights(owner, first, bytes) {
            if let Some(count) = self.missing.get_mut(&piece.milestone) {
                *count -= 1;
            }
        }
        self.missing.retain(|_, count| *count > 0);
    }

    /// Waits between two steps for all weights that are still on their way.
    ///
    /// # Errors
    /// Nobody sends any more.
    pub fn complete(&mut self, optimizer: &Optimizer) -> Result<(), RecvError> {
        while self.lacks(ALL) {
            if let Got::Weights { owner, first, bytes } = self.from.recv()? {
                self.take_weights(optimizer, owner, first, &bytes);
            }
        }
        Ok(())
    }
}

impl Member {
    /// Computes the micro-batches `mine`, and makes the step's update or its part of it. Weights that others update may
    /// come back in the next step's forward.
    pub fn run(&mut self, task: &Task<'_>, mine: &[usize]) -> Result<Done, Stopped> {
        let begun = Instant::now();
        let Self { stepper, pictures, link } = self;
        let mut moving = Moving::new(&stepper.optimizer, link);
        let passing = stepper.optimizer.sharing().gradients_pass();
        if dora::is_in(stepper.model()) {
            // Their norms follow from all weights.
            moving.need(&stepper.optimizer, ALL);
        }
        stepper.settle();
        stepper.begin();
        for round in 0..task.rounds {
            // Gradients that do not pass leave once, after the last micro-batch.
            let these =
                if passing { mine.get(round..).map_or(&[][..], |left| &left[..left.len().min(1)]) } else { mine };
            moving.begin(&stepper.optimizer, round, these.is_empty());
            for (place, &index) in these.iter().enumerate() {
                let last = place + 1 == these.len();
                moving.need(&stepper.optimizer, None);
                let passes = &mut |optimizer: &Optimizer, pass| match pass {
                    Pass::Forward(milestone) => moving.need(optimizer, Some(milestone)),
                    Pass::Backward(milestone) if last => moving.passed(optimizer, Some(milestone)),
                    Pass::Backward(_) => {}
                };
                stepper.micro_batch(task.stage, task.step, index, task.loss_scale, pictures, passes)?;
                stepper.model().gpu().check()?;
                moving.check()?;
            }
            moving.passed(&stepper.optimizer, None);
        }
        moving.send_all();
        let losses = stepper.losses()?;
        let own = (begun.elapsed() - moving.waited).as_secs_f64();
        let square_sum = moving.square_sum(&stepper.optimizer)?;
        let waiting_seconds = begun.elapsed().as_secs_f64() - own;
        stepper.update(task.update, square_sum, &mut |piece, bytes| moving.link.send_weights(piece, bytes))?;
        moving.rest(&stepper.optimizer)?;
        let positions: usize = mine.iter().map(|&index| task.step.batches[index].tokens()).sum();
        let brought = stepper.model().language.streaming().map_or(0, |streaming| streaming.take_moved());
        let bytes_moved = moving.done() + brought;
        let times = DeviceTimes { tokens_per_second: DeviceTimes::rate(positions, own), waiting_seconds, bytes_moved };
        Ok(Done { losses, times })
    }
}

/// What moves between this device and the others in a step.
struct Moving<'a> {
    buckets: Arc<[Bucket]>,
    parcels: Arc<[Parcel]>,
    link: &'a mut Link,
    round: usize,
    /// How many rounds are added up.
    added: usize,
    /// Nothing is computed here in this round.
    empty: bool,
    /// The first bucket that has not left yet in this round.
    next: usize,
    /// Round and bucket of what is on its way to the host.
    underway: VecDeque<(usize, usize, Downloading)>,
    square_sum: Option<f64>,
    failure: Option<Stopped>,
    /// For weights, and for other devices' rounds.
    waited: Duration,
    /// All bytes that have moved.
    bytes: u64,
    finished: bool,
}

impl<'a> Moving<'a> {
    fn new(optimizer: &Optimizer, link: &'a mut Link) -> Self {
        Self {
            buckets: optimizer.buckets().clone(),
            parcels: optimizer.parcels().clone(),
            link,
            round: 0,
            added: 0,
            empty: false,
            next: 0,
            underway: VecDeque::new(),
            square_sum: None,
            failure: None,
            waited: Duration::ZERO,
            bytes: 0,
            finished: false,
        }
    }

    /// Begins a round, once few enough of those before wait to be added up.
    fn begin(&mut self, optimizer: &Optimizer, round: usize, empty: bool) {
        // Nobody can add up what is still held here.
        while self.underway.front().is_some_and(|(of, ..)| of + ROUNDS_AHEAD <= round) {
            self.send_oldest();
        }
        self.wait_while(optimizer, |moving| moving.added + ROUNDS_AHEAD <= round);
        (self.round, self.empty, self.next) = (round, empty, 0);
    }

    /// The forward comes to `milestone`, or to the beginning: waits for the weights that it reads before the next one.
    fn need(&mut self, optimizer: &Optimizer, milestone: Option<usize>) {
        self.wait_while(optimizer, |moving| moving.link.lacks(milestone));
    }

    /// Meanwhile the device does what is recorded.
    fn wait_while(&mut self, optimizer: &Optimizer, lacks: impl Fn(&Self) -> bool) {
        if !lacks(self) {
            return;
        }
        let begun = Instant::now();
        self.receive_all(optimizer);
        if lacks(self) {
            optimizer.gpu().flush();
        }
        while self.failure.is_none() && lacks(self) {
            if let Err(stopped) = self.wait(optimizer) {
                self.failure = Some(stopped);
            }
        }
        self.waited += begun.elapsed();
    }

    /// What went wrong where it could not be told.
    fn check(&mut self) -> Result<(), Stopped> {
        self.failure.take().map_or(Ok(()), Err)
    }

    /// The backward has come back to `milestone`, or to its end: what is whole leaves, what has come back is put in
    /// its place.
    fn passed(&mut self, optimizer: &Optimizer, milestone: Option<usize>) {
        while self.buckets.get(self.next).is_some_and(|bucket| bucket.is_whole(milestone)) {
            let (round, bucket) = (self.round, self.next);
            if self.empty {
                self.send(round, bucket, &[]);
            } else {
                self.underway.push_back((round, bucket, optimizer.download(bucket)));
            }
            self.next += 1;
        }
        let has_arrived = |(_, _, downloading): &(usize, usize, Downloading)| downloading.has_arrived();
        while self.underway.len() > UNDERWAY || self.underway.front().is_some_and(has_arrived) {
            self.send_oldest();
        }
        self.receive_all(optimizer);
    }

    /// Takes what has come, and does not wait.
    fn receive_all(&mut self, optimizer: &Optimizer) {
        while let Ok(got) = self.link.from.try_recv() {
            self.receive(optimizer, got);
        }
    }

    /// Sends the bytes of a bucket's gradients, or that there are none.
    fn send(&mut self, round: usize, bucket: usize, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        for (parcel, Parcel { range, .. }) in self.parcels.iter().enumerate().filter(|(_, of)| of.bucket == bucket) {
            let these = bytes.get(4 * range.start..4 * range.end).unwrap_or_default();
            let values = bytemuck::pod_collect_to_vec(these);
            // As with weights.
            let _ = self.link.to.send(Sent::Part { device: self.link.device, round, parcel, values }, these.len());
        }
    }

    fn send_oldest(&mut self) {
        let Some((round, bucket, downloading)) = self.underway.pop_front() else { return };
        match downloading.bytes() {
            Ok(bytes) => self.send(round, bucket, &bytes),
            Err(error) => drop(self.failure.get_or_insert(error.into())),
        }
    }

    fn send_all(&mut self) {
        while !self.underway.is_empty() {
            self.send_oldest();
        }
    }

    fn receive(&mut self, optimizer: &Optimizer, got: Got) {
        match got {
            Got::Sum { parcel, values } => self.bytes += optimizer.take_sum(parcel, &values) as u64 * 4,
            Got::RoundAdded => self.added += 1,
            Got::SquareSum(sum) => {
                self.square_sum = Some(sum);
                // A faster device may have updated its own before this one comes to its update.
                self.bytes += self.link.expect_weights(optimizer);
            }
            Got::Weights { owner, first, bytes } => self.link.take_weights(optimizer, owner, first, &bytes),
        }
    }

    fn wait(&mut self, optimizer: &Optimizer) -> Result<(), Stopped> {
        self.check()?;
        let Ok(got) = self.link.from.recv() else { return Err(Stopped::ByOthers) };
        self.receive(optimizer, got);
        Ok(())
    }

    /// Waits until all sums are back, and gives their square sum.
    fn square_sum(&mut self, optimizer: &Optimizer) -> Result<f64, Stopped> {
        loop {
            if let Some(square_sum) = self.square_sum {
                return Ok(square_sum);
            }
            self.wait(optimizer)?;
        }
    }

    /// Brings layers that are updated here and take turns to where they rest.
    fn rest(&mut self, optimizer: &Optimizer) -> Result<(), Stopped> {
        self.bytes += optimizer.rested_bytes();
        Ok(optimizer.rest()?)
    }

    /// Bytes moved.
    fn done(mut self) -> u64 {
        self.finished = true;
        self.bytes
    }
}

impl Drop for Moving<'_> {
    /// Whatever ends a member early, a panic too, the others must not wait for it.
    fn drop(&mut self) {
        if !self.finished {
            let _ = self.link.to.send(Sent::Gone, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::{
        optimizer::{Sharing, small_optimizer},
        team::link::way,
    };

    #[test]
    fn a_forward_lacks_what_it_reads_before_the_next_milestone() {
        let (to, _arriving) = way(None);
        let (_leaving, from) = way(None);
        let mut link = Link::new(0, to, from);
        assert!(!link.lacks(ALL));
        link.missing = [(Some(2), 1), (Some(3), 1)].into();
        assert!(!link.lacks(None) && !link.lacks(Some(1)));
        assert!(link.lacks(Some(2)) && link.lacks(ALL));
        link.missing = [(None, 2), (Some(3), 1)].into();
        assert!(link.lacks(None) && link.lacks(Some(0)));
    }

    #[test]
    fn weights_of_a_faster_device_may_come_before_the_own_update() {
        let two = Sharing { zero_stage: 1, devices: 2, bucket_elements: 1024, ..Sharing::ALONE };
        let optimizer = small_optimizer(two);
        let (to, _arriving) = way(None);
        let (mut leaving, from) = way(None);
        let mut link = Link::new(0, to, from);
        let bytes = Arc::new(vec![0; optimizer.weight_bytes(Some(1)) as usize]);
        leaving.send(Got::SquareSum(1.0), 0).unwrap();
        let mut moving = Moving::new(&optimizer, &mut link);
        moving.receive_all(&optimizer);
        assert!(moving.link.lacks(None));
        leaving.send(Got::Weights { owner: Some(1), first: 0, bytes }, 0).unwrap();
        moving.receive_all(&optimizer);
        assert!(!moving.link.lacks(ALL));
        assert_eq!((moving.square_sum, moving.done()), (Some(1.0), optimizer.weight_bytes(None)));
    }
}
