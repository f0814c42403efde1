//! Several devices that train one model: each has all of it and computes some of a step's micro-batches; gradients are
//! added up in the host's memory, and every device makes the same update.
//!
//! A step's micro-batches are those of all devices, so that one device with four of them and four with one each make the
//! same step. Where there is but one device it goes its own way, and nothing is exchanged.

mod buckets;
mod exchange;
mod member;
mod shares;

use std::{
    convert::Infallible,
    sync::mpsc::{Sender, channel},
    thread,
};

pub use exchange::SlowLink;
pub use member::{DeviceTimes, Member};
pub use shares::Shares;

use buckets::{Bucket, buckets};
use member::{Link, Stopped, Task};

use super::{
    config::StageConfig,
    events::{Event, Observer},
    loss_scale::LossScaler,
    optimizer::Updates,
    step::{Measured, Step},
    stepper::Stepper,
};
use crate::{
    error::{Error, Result},
    gpu::Gpu,
};

/// What a run trains on.
pub struct Devices {
    /// At least one; the first one speaks for all.
    pub gpus: Vec<Gpu>,
    /// Whether a stage that does not fit is refused.
    pub checked: bool,
    /// For tests.
    pub slow: Option<SlowLink>,
}

impl Devices {
    /// Alone, unchecked.
    pub fn one(gpu: &Gpu) -> Self {
        Self { gpus: vec![gpu.clone()], checked: false, slow: None }
    }

    /// What one of them may use: of the host's memory, where that is theirs, its share.
    pub fn memory_of(&self, gpu: &Gpu) -> Option<u64> {
        let sharing = self.gpus.iter().filter(|other| gpu.is_cpu() && other.is_cpu()).count();
        Some(gpu.available_memory()? / sharing.max(1) as u64)
    }
}

/// The devices of a stage, at least one.
pub struct Team {
    members: Vec<Member>,
    buckets: Vec<Bucket>,
    shares: Shares,
    slow: Option<SlowLink>,
}

impl Team {
    /// `members` hold the same model, each on its own device. `shares` are those of the run that is gone on with.
    pub fn new(members: Vec<Member>, shares: Option<Shares>, slow: Option<SlowLink>) -> Self {
        let count = members.len();
        let facts = |member: &Member| {
            let facts = member.stepper.model().gpu().facts();
            (facts.name.clone(), facts.driver.clone())
        };
        let alike = members.windows(2).all(|two| facts(&two[0]) == facts(&two[1]));
        let shares = shares.filter(|shares| shares.devices() == count).unwrap_or_else(|| Shares::new(count, alike));
        let buckets = if count > 1 {
            let config = members[0].stepper.model().config.text();
            let (layers, tied) = (config.num_hidden_layers, config.tie_word_embeddings);
            // DeepSpeed's `auto` for reduce_bucket_size, in elements.
            let least = config.hidden_size * config.hidden_size;
            buckets(&members[0].stepper.optimizer, layers, tied, least)
        } else {
            Vec::new()
        };
        Self { members, buckets, shares, slow }
    }

    /// What each device computes, where there are several.
    pub fn shares(&self) -> Option<Shares> {
        (self.members.len() > 1).then(|| self.shares.clone())
    }

    /// The device that speaks for all: what is saved is its own.
    pub fn first(&self) -> &Stepper {
        &self.members[0].stepper
    }

    pub fn gpus(&self) -> impl Iterator<Item = &Gpu> {
        self.members.iter().map(|member| member.stepper.model().gpu())
    }

    /// One step; as [`Stepper::step`].
    ///
    /// # Errors
    /// As there, with the device that failed.
    pub fn step(
        &mut self,
        stage: &StageConfig,
        step: &Step<'_>,
        updates: &mut Updates,
        loss_scaler: Option<&mut LossScaler>,
        observer: &mut dyn Observer,
    ) -> Result<Measured> {
        if let [Member { stepper, pictures }] = &mut self.members[..] {
            return stepper.step(stage, step, pictures, updates, loss_scaler);
        }
        let loss_scale = loss_scaler.as_ref().map(|scaler| f64::from(scaler.scale));
        let before = *updates;
        let update = step.update(updates, loss_scale);
        let task = Task { stage, step, update: &update, loss_scale, buckets: &self.buckets };
        let dealt = self.shares.deal(step.batches.len());
        let (results, square_sum) = compute(&mut self.members, &task, &dealt, self.slow);
        let results = self.agreed(results)?;
        let square_sum = square_sum.ok_or_else(|| Error::failed("a device ended a step before its time"))?;
        let sums: Vec<f32> = dealt.iter().enumerate().map(|(index, &device)| results[device].0[index]).collect();
        let mut measured = step.conclude(stage, (&sums, square_sum), (updates, before), loss_scaler);
        let tokens = |device: usize| {
            let own = dealt.iter().zip(step.batches).filter(|(of, _)| **of == device);
            own.map(|(_, batch)| batch.tokens()).sum::<usize>() as f64
        };
        let rates: Vec<_> =
            results.iter().enumerate().map(|(device, (_, times))| (times.tokens_per_second, tokens(device))).collect();
        if let Some(speeds) = self.shares.note(&rates) {
            let text: Vec<String> = speeds.iter().map(f64::to_string).collect();
            observer.event(Event::Note(&format!("the devices' shares are {} from now on", text.join(" : "))));
        }
        measured.devices = results.into_iter().map(|(_, times)| times).collect();
        Ok(measured)
    }

    /// What all members give, or what the first one has failed with that has not been stopped by another.
    fn agreed<T>(&self, results: Vec<Result<T, Stopped>>) -> Result<Vec<T>> {
        let mut given = Vec::new();
        let mut failure = None;
        for (device, result) in results.into_iter().enumerate() {
            match result {
                Ok(one) => given.push(one),
                Err(Stopped::ByOthers) => {}
                Err(Stopped::Failed(error)) => failure = failure.or(Some((device, error))),
            }
        }
        match failure {
            Some((device, error)) => {
                let count = self.members.len();
                let message = format!("device {} of {count}: {}", device + 1, error.message);
                Err(Error { message, ..error })
            }
            None if given.len() < self.members.len() => Err(Error::failed("a device ended a step before its time")),
            None => Ok(given),
        }
    }
}

type Outcome = Result<(Vec<f32>, DeviceTimes), Stopped>;

/// A step on all devices, one thread each; this one adds up. `dealt` has the device of each micro-batch.
fn compute(
    members: &mut [Member],
    task: &Task<'_>,
    dealt: &[usize],
    slow: Option<SlowLink>,
) -> (Vec<Outcome>, Option<f64>) {
    let (to, arriving) = channel();
    thread::scope(|scope| {
        let (leaving, threads): (Vec<Sender<_>>, Vec<_>) = members
            .iter_mut()
            .enumerate()
            .map(|(device, member)| {
                let (send, from) = channel();
                let link = Link { device, to: to.clone(), from };
                let mine: Vec<usize> = (0..dealt.len()).filter(|&index| dealt[index] == device).collect();
                (send, scope.spawn(move || member.run(task, &mine, link)))
            })
            .unzip();
        drop(to);
        let square_sum = exchange::add_up(task.buckets, &arriving, &leaving, slow, |_| Ok::<_, Infallible>(()));
        let square_sum = square_sum.unwrap_or_else(|never| match never {});
        // Whoever still waits is told.
        drop(leaving);
        let panicked = |_| Err(Stopped::Failed(Error::failed("a thread of the training failed")));
        (threads.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect(), square_sum)
    })
}
