//! One device's part of a step, in a thread of its own: its micro-batches, gradients that leave while the backward still
//! runs, sums that come back, the update.

use std::{
    collections::VecDeque,
    sync::mpsc::{Receiver, Sender},
    time::Instant,
};

use serde::{Deserialize, Serialize};

use super::{
    buckets::Bucket,
    exchange::{Got, Sent},
};
use crate::{
    error::{Error, Result},
    tensor::Downloading,
    train::{
        config::StageConfig,
        optimizer::{Optimizer, Update},
        pictures::PictureStore,
        step::Step,
        stepper::Stepper,
    },
};

/// Buckets on their way that a device is not waited for.
const UNDERWAY: usize = 2;

/// A device of a team, with all that it holds.
pub struct Member {
    pub stepper: Stepper,
    pub pictures: PictureStore,
}

/// A device's part of a step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DeviceTimes {
    /// Text and pictures, per second of its own work.
    pub tokens_per_second: f64,
    /// Seconds between its own last gradient and the last sum.
    pub waiting_seconds: f64,
    /// To the host and back.
    pub bytes_moved: u64,
}

/// What a step has in common for all members.
pub struct Task<'a> {
    pub stage: &'a StageConfig,
    pub step: &'a Step<'a>,
    pub update: &'a Update,
    /// Where losses are scaled.
    pub loss_scale: Option<f64>,
    pub buckets: &'a [Bucket],
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

/// The way to the others and back.
pub struct Link {
    pub device: usize,
    pub to: Sender<Sent>,
    pub from: Receiver<Got>,
}

impl Member {
    /// Computes the micro-batches `mine` and makes the step's update. Gives the loss sums, zero where another device
    /// has computed one.
    pub fn run(&mut self, task: &Task<'_>, mine: &[usize], link: Link) -> Result<(Vec<f32>, DeviceTimes), Stopped> {
        let begun = Instant::now();
        let mut moving = Moving::new(task.buckets, link, mine.is_empty());
        let Self { stepper, pictures } = self;
        stepper.begin();
        for (place, &index) in mine.iter().enumerate() {
            let last = place + 1 == mine.len();
            stepper.micro_batch(
                task.stage,
                task.step,
                index,
                task.loss_scale,
                pictures,
                &mut |optimizer, milestone| {
                    if last {
                        moving.passed(optimizer, Some(milestone));
                    }
                },
            )?;
            stepper.model().gpu().check()?;
        }
        moving.passed(&stepper.optimizer, None);
        moving.send_all();
        let losses = stepper.losses()?;
        let own = begun.elapsed().as_secs_f64();
        let square_sum = moving.receive_all(&stepper.optimizer)?;
        let waiting_seconds = begun.elapsed().as_secs_f64() - own;
        stepper.update(task.update, square_sum);
        let positions: usize = mine.iter().map(|&index| task.step.batches[index].tokens()).sum();
        let times = DeviceTimes {
            tokens_per_second: positions as f64 / own,
            waiting_seconds,
            bytes_moved: moving.done().bytes,
        };
        Ok((losses, times))
    }
}

/// Buckets on their way between this device and the others.
struct Moving<'a> {
    buckets: &'a [Bucket],
    link: Link,
    /// Nothing was computed here.
    empty: bool,
    /// The first bucket that has not left yet.
    next: usize,
    underway: VecDeque<(usize, Downloading)>,
    /// Sums that came back.
    back: usize,
    square_sum: Option<f64>,
    failure: Option<Stopped>,
    bytes: u64,
    finished: bool,
}

impl<'a> Moving<'a> {
    fn new(buckets: &'a [Bucket], link: Link, empty: bool) -> Self {
        Self {
            buckets,
            link,
            empty,
            next: 0,
            underway: VecDeque::new(),
            back: 0,
            square_sum: None,
            failure: None,
            bytes: 0,
            finished: false,
        }
    }

    /// The backward has come back to `milestone`, or to its end: what is whole leaves, what has come back is put in
    /// its place.
    fn passed(&mut self, optimizer: &Optimizer, milestone: Option<usize>) {
        while let Some(bucket) = self.buckets.get(self.next).filter(|bucket| bucket.is_whole(milestone)) {
            if self.empty {
                let _ = self.link.to.send(Sent::Part { device: self.link.device, bucket: self.next, values: vec![] });
            } else {
                self.underway.push_back((self.next, optimizer.download(&bucket.spans)));
            }
            self.next += 1;
        }
        while self.underway.len() > UNDERWAY {
            self.send_oldest();
        }
        while let Ok(got) = self.link.from.try_recv() {
            self.receive(optimizer, got);
        }
    }

    fn send_oldest(&mut self) {
        let Some((bucket, downloading)) = self.underway.pop_front() else { return };
        match downloading.wait() {
            Ok(values) => {
                self.bytes += values.len() as u64 * 4;
                // Where nobody hears, somebody has failed: that is told when nothing comes back.
                let _ = self.link.to.send(Sent::Part { device: self.link.device, bucket, values });
            }
            Err(error) => {
                self.failure.get_or_insert(Stopped::Failed(error));
            }
        }
    }

    fn send_all(&mut self) {
        while !self.underway.is_empty() {
            self.send_oldest();
        }
    }

    fn receive(&mut self, optimizer: &Optimizer, got: Got) {
        match got {
            Got::Sum { bucket, values } => {
                optimizer.write_gradients(&self.buckets[bucket].spans, &values);
                self.bytes += values.len() as u64 * 4;
                self.back += 1;
            }
            Got::SquareSum(sum) => self.square_sum = Some(sum),
        }
    }

    /// Waits until all sums are back, and gives their square sum.
    fn receive_all(&mut self, optimizer: &Optimizer) -> Result<f64, Stopped> {
        loop {
            if let Some(failure) = self.failure.take() {
                return Err(failure);
            }
            if let Some(square_sum) = self.square_sum {
                return Ok(square_sum);
            }
            let Ok(got) = self.link.from.recv() else { return Err(Stopped::ByOthers) };
            self.receive(optimizer, got);
        }
    }

    fn done(mut self) -> Moved {
        self.finished = true;
        Moved { bytes: self.bytes }
    }
}

struct Moved {
    bytes: u64,
}

impl Drop for Moving<'_> {
    /// Whatever ends a member early, a panic too, the others must not wait for it.
    fn drop(&mut self) {
        if !self.finished {
            let _ = self.link.to.send(Sent::Gone);
        }
    }
}
