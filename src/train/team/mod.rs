//! Several devices that train one model: each computes some of a step's micro-batches, gradients are added up in the
//! host's memory, and the update is made by every device, by each for its part (ZeRO), or by the host (`offload`).
//!
//! A step's micro-batches are those of all devices, so that one device with four of them and four with one each make the
//! same step. Where there is but one device it goes its own way, and nothing is exchanged.

mod devices;
mod exchange;
mod link;
mod member;
mod shares;

use std::{path::Path, sync::Arc, thread};

pub use devices::{Devices, Standing};
pub use exchange::adding_rate;
pub use link::SlowLink;
pub use member::{DeviceTimes, ROUNDS_AHEAD};
pub use shares::Shares;

use exchange::{Broken, Exchange, Got};
pub(super) use exchange::{frame, unframe};
use link::way;
use member::{Done, Link, Member, Stopped, Task};

use super::{
    agreement::told_by_all,
    checkpoint::{self, TrainerState},
    config::{Method, StageConfig},
    events::{Event, Observer},
    loss_scale::LossScaler,
    optimizer::{HostOptimizer, Optimizer, Remembers, Sharing, Updates},
    pictures::PictureStore,
    step::{Measured, Step},
    stepper::{Stepper, kept, settings},
};
use crate::{
    error::{Error, Result},
    gpu::Gpu,
    hosts::Hosts,
    models::{config::ModelConfig, llava::Llava, streaming::Resting},
};

/// A host's devices of a stage, at least one.
pub struct Team {
    members: Vec<Member>,
    standing: Standing,
    /// Where the host makes the updates.
    host: Option<HostOptimizer>,
    shares: Shares,
    /// None once somebody has failed: then whoever still waits for something is told.
    exchange: Option<Exchange>,
}

impl Team {
    /// `steppers` hold the same model, each on its own device.
    ///
    /// # Errors
    /// A host that does not answer.
    pub fn new(
        stage: &StageConfig,
        mut steppers: Vec<Stepper>,
        standing: Standing,
        slow: Option<SlowLink>,
        hosts: &mut dyn Hosts,
    ) -> Result<Self> {
        let facts = |stepper: &Stepper| {
            let facts = stepper.model().gpu().facts();
            format!("{} {}", facts.name, facts.driver)
        };
        let kinds: Vec<String> = steppers.iter().map(facts).collect();
        let shares = Shares::new(told_by_all(&kinds, hosts)?.concat());
        let offload = steppers[0].optimizer.sharing().offload;
        let host = offload.then(|| HostOptimizer::new(&mut steppers[0].optimizer, settings(stage)));
        let weights_return = steppers[0].optimizer.sharing().weights_return();
        let owners = if weights_return && !offload { standing.total } else { 1 };
        let (to, arriving) = way(slow);
        let (mut members, mut leaving) = (Vec::new(), Vec::new());
        for (device, stepper) in steppers.into_iter().enumerate() {
            let (send, from) = way(slow);
            leaving.push(send);
            let link = Link::new(device, to.beside(), from);
            members.push(Member { stepper, pictures: PictureStore::default(), link });
        }
        let exchange = Exchange::new(arriving, leaving, standing.first, owners);
        Ok(Self { members, standing, host, shares, exchange: Some(exchange) })
    }

    /// Where layers rest that take turns on the devices, of so many on all hosts: those that train too, unless there is
    /// nobody to share them with.
    pub fn resting(stage: &StageConfig, devices: usize) -> Option<Resting> {
        let shared = devices > 1 || stage.offload;
        match (stage.zero_stage, stage.method) {
            (3, Method::Full) => shared.then(|| Resting::of_trained(kept(stage).copies())),
            (3, _) => Some(Resting::default()),
            _ => None,
        }
    }

    /// What part of the optimizer each of so many of this host's devices has.
    pub fn sharing(stage: &StageConfig, config: &ModelConfig, standing: Standing, devices: usize) -> Vec<Sharing> {
        let hidden_size = config.text().hidden_size;
        let of = |device| Sharing {
            zero_stage: stage.zero_stage,
            offload: stage.offload,
            device: standing.first + device,
            devices: standing.total,
            first_of_host: device == 0,
            // DeepSpeed's `auto` for reduce_bucket_size.
            bucket_elements: hidden_size * hidden_size,
        };
        (0..devices).map(of).collect()
    }

    /// Reads a checkpoint into all members. `fresh` is what the run would begin with.
    ///
    /// # Errors
    /// As [`checkpoint::load`]; whatever fails on a device.
    pub fn restore(&mut self, folder: &Path, fresh: &TrainerState, hosts: &mut dyn Hosts) -> Result<TrainerState> {
        let devices = self.members.iter_mut().map(|member| &mut member.stepper.optimizer as &mut dyn Remembers);
        let mut holders: Vec<&mut dyn Remembers> = match &mut self.host {
            Some(host) => vec![host],
            None => devices.collect(),
        };
        let state = checkpoint::load(folder, &mut holders, fresh, hosts)?;
        if let Some(shares) = state.shares.clone().filter(|shares| shares.are_for_those_of(&self.shares)) {
            self.shares = shares;
        }
        self.spread_weights(hosts)?;
        // A device alone does so only behind each step.
        self.members.iter_mut().for_each(|member| member.stepper.settle());
        Ok(state)
    }

    /// Brings the weights of each owner to all devices.
    fn spread_weights(&self, hosts: &mut dyn Hosts) -> Result<()> {
        let optimizers = || self.members.iter().map(|member| &member.stepper.optimizer);
        if let Some(host) = &self.host {
            let bytes = host.weights().collect::<Vec<_>>().concat();
            for optimizer in optimizers() {
                optimizer.write_weights(None, 0, &bytes);
            }
            host.rest();
            return Ok(());
        }
        optimizers().try_for_each(Optimizer::rest)?;
        self.share_rested(hosts)?;
        let mut mine = Vec::new();
        for owner in optimizers().filter(|optimizer| optimizer.sharing().weights_return()) {
            mine.push((owner.sharing().device as u64, owner.owned_weights()?.concat()));
        }
        for framed in hosts.gather(&frame(&mine))? {
            for (device, bytes) in unframe(&framed) {
                for other in optimizers().filter(|optimizer| optimizer.sharing().device as u64 != device) {
                    other.write_weights(Some(device as usize), 0, bytes);
                }
            }
        }
        Ok(())
    }

    /// Brings what devices of each host have updated of layers that take turns to where they rest on all others.
    fn share_rested(&self, hosts: &mut dyn Hosts) -> Result<()> {
        let first = &self.members[0].stepper.optimizer;
        if hosts.count() == 1 || self.host.is_some() {
            return Ok(());
        }
        for shard in first.resting_shards() {
            let devices = self.members.iter().map(|member| member.stepper.optimizer.sharing().device);
            let mine: Vec<_> = devices.map(|device| (device as u64, first.read_rested(shard, device))).collect();
            for (rank, framed) in hosts.gather(&frame(&mine))?.iter().enumerate() {
                for (device, bytes) in unframe(framed).into_iter().filter(|_| rank != hosts.rank()) {
                    first.write_rested(shard, device as usize, bytes);
                }
            }
        }
        Ok(())
    }

    /// Waits for weights that are still on their way between devices. Whoever looks at models or optimizers between two
    /// steps asks for this first.
    ///
    /// # Errors
    /// A device that ended a step before its time.
    pub fn complete(&mut self) -> Result<()> {
        let exchange = self.exchange.as_mut().ok_or(Broken::DeviceGone);
        exchange.and_then(|exchange| exchange.pass_weights(|_, _| ())).map_err(Broken::into_error)?;
        for Member { stepper, link, .. } in &mut self.members {
            link.complete(&stepper.optimizer).map_err(|_| Broken::DeviceGone.into_error())?;
        }
        Ok(())
    }

    /// Those who have what a checkpoint must hold; on all hosts together each part once.
    pub fn holders(&self) -> Vec<&dyn Remembers> {
        if let Some(host) = &self.host {
            return if self.standing.first == 0 { vec![host] } else { Vec::new() };
        }
        let devices = self.members.iter().map(|member| &member.stepper.optimizer);
        let divided = |optimizer: &&Optimizer| optimizer.sharing().weights_return() || optimizer.sharing().device == 0;
        devices.filter(divided).map(|optimizer| optimizer as &dyn Remembers).collect()
    }

    /// Gives every device its pictures, one store each.
    pub fn set_pictures(&mut self, stores: Vec<PictureStore>) {
        for (member, store) in self.members.iter_mut().zip(stores) {
            member.pictures = store;
        }
    }

    pub fn models(&self) -> Vec<&Llava> {
        self.members.iter().map(|member| member.stepper.model()).collect()
    }

    /// What each device computes, where there are several.
    pub fn shares(&self) -> Option<Shares> {
        (self.standing.total > 1).then(|| self.shares.clone())
    }

    /// The device that speaks for all: every one has the same model.
    pub fn first(&self) -> &Stepper {
        &self.members[0].stepper
    }

    pub fn gpus(&self) -> impl Iterator<Item = &Gpu> {
        self.members.iter().flat_map(|member| member.stepper.model().gpus())
    }

    /// One step; as [`Stepper::step`].
    ///
    /// # Errors
    /// As there.
    pub fn step(
        &mut self,
        stage: &StageConfig,
        step: &Step<'_>,
        updates: &mut Updates,
        loss_scaler: Option<&mut LossScaler>,
        hosts: &mut dyn Hosts,
        observer: &mut dyn Observer,
    ) -> Result<Measured> {
        if let [Member { stepper, pictures, .. }] = &mut self.members[..]
            && stepper.optimizer.sharing().is_alone()
        {
            return stepper.step(stage, step, pictures, updates, loss_scaler);
        }
        let loss_scale = loss_scaler.as_ref().map(|scaler| f64::from(scaler.scale));
        let before = *updates;
        let update = step.update(updates, loss_scale);
        let dealt = self.shares.deal(step.batches.len());
        let task = Task { stage, step, update: &update, loss_scale, rounds: self.rounds(&dealt) };
        let results = self.compute(&task, &dealt, hosts);
        let (mine, square_sum) = self.agreed(results)?;
        self.share_rested(hosts)?;
        let results = everywhere(mine, hosts)?;
        let sums: Vec<f32> = dealt.iter().enumerate().map(|(index, &device)| results[device].losses[index]).collect();
        let mut measured = step.conclude(stage, (&sums, square_sum), (updates, before), loss_scaler);
        let tokens = |device: usize| {
            let own = dealt.iter().zip(step.batches).filter(|(of, _)| **of == device);
            own.map(|(_, batch)| batch.tokens()).sum::<usize>() as f64
        };
        let rates: Vec<_> = results
            .iter()
            .enumerate()
            .map(|(device, result)| (result.times.tokens_per_second, tokens(device)))
            .collect();
        if let Some(speeds) = self.shares.note(&rates) {
            let text: Vec<String> = speeds.iter().map(f64::to_string).collect();
            observer.event(Event::Note(&format!("the devices' shares are {} from now on", text.join(" : "))));
        }
        measured.devices = results.into_iter().map(|result| result.times).collect();
        Ok(measured)
    }

    /// How often gradients leave a device in a step.
    fn rounds(&self, dealt: &[usize]) -> usize {
        if !self.first().optimizer.sharing().gradients_pass() {
            return 1;
        }
        let most = (0..self.standing.total).map(|device| dealt.iter().filter(|of| **of == device).count()).max();
        most.unwrap_or(0).max(1)
    }

    /// A step on this host's devices, one thread each; this one adds up. `dealt` has the device of each micro-batch. What
    /// has been updated may still be on its way to other devices behind it.
    fn compute(
        &mut self,
        task: &Task<'_>,
        dealt: &[usize],
        hosts: &mut dyn Hosts,
    ) -> (Vec<Result<Done, Stopped>>, Result<f64, Broken>) {
        let parcels = self.members[0].stepper.optimizer.parcels().clone();
        let weights_return = self.members[0].stepper.optimizer.sharing().weights_return();
        let owned_bytes = |member: &Member| {
            let optimizer = &member.stepper.optimizer;
            optimizer.weight_bytes(Some(optimizer.sharing().device))
        };
        let owned = if weights_return { self.members.iter().map(owned_bytes).sum() } else { 0 };
        let Self { members, host, exchange, standing, .. } = self;
        let (first, kept) = (standing.first, exchange);
        let taken = kept.take();
        thread::scope(|scope| {
            let mut threads = Vec::new();
            for (device, member) in members.iter_mut().enumerate() {
                let mine: Vec<usize> = (0..dealt.len()).filter(|&index| dealt[index] == first + device).collect();
                threads.push(scope.spawn(move || member.run(task, &mine)));
            }
            // In this scope, so that a panic too drops it before the threads are waited for.
            let mut meet = |exchange: &mut Exchange| {
                let square_sum =
                    exchange.sums(&parcels, task.rounds, hosts, |exchange, parcel, sum| match &mut *host {
                        Some(host) => host.take_sum(parcel, &sum),
                        None => exchange.tell(&Got::Sum { parcel, values: Arc::new(sum) }),
                    })?;
                // As the updates read it: what overflows there must be seen here.
                let square_sum = f64::from(square_sum as f32);
                exchange.tell(&Got::SquareSum(square_sum));
                if let Some(host) = host {
                    host.step(task.update, square_sum);
                    host.rest();
                    for (first, bytes) in host.weights().enumerate() {
                        exchange.tell(&Got::Weights { owner: None, first, bytes: Arc::new(bytes) });
                    }
                } else if weights_return {
                    exchange.expect_weights(owned);
                    if hosts.count() > 1 {
                        exchange.share_weights(hosts)?;
                    }
                }
                Ok(square_sum)
            };
            let met = taken.ok_or(Broken::DeviceGone).and_then(|mut exchange| {
                let square_sum = meet(&mut exchange)?;
                exchange.pass_weights_until(|| threads.iter().all(|thread| thread.is_finished()))?;
                *kept = Some(exchange);
                Ok(square_sum)
            });
            let panicked = |_| Err(Stopped::Failed(Error::failed("a thread of the training failed")));
            (threads.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect(), met)
        })
    }

    /// What all members give and their square sum, or what the first one has failed with that was not stopped by
    /// another.
    fn agreed<T>(
        &self,
        (results, square_sum): (Vec<Result<T, Stopped>>, Result<f64, Broken>),
    ) -> Result<(Vec<T>, f64)> {
        let count = self.members.len();
        let (mut given, mut failure) = (Vec::new(), None);
        for result in results {
            match result {
                Ok(one) => given.push(one),
                Err(Stopped::ByOthers) => {}
                Err(Stopped::Failed(error)) => failure = failure.or(Some(error)),
            }
        }
        match (failure, square_sum) {
            (Some(error), _) => Err(error),
            (None, Err(broken)) => Err(broken.into_error()),
            (None, Ok(square_sum)) if given.len() == count => Ok((given, square_sum)),
            (None, Ok(_)) => Err(Broken::DeviceGone.into_error()),
        }
    }
}

/// What the devices of all hosts have done, in their order.
fn everywhere(mine: Vec<Done>, hosts: &mut dyn Hosts) -> Result<Vec<Done>> {
    if hosts.count() == 1 {
        return Ok(mine);
    }
    // Numbers that are not finite survive as bits.
    let bits = |done: &Done| (done.losses.iter().map(|loss| loss.to_bits()).collect::<Vec<_>>(), done.times.clone());
    let told = told_by_all(&mine.iter().map(bits).collect::<Vec<_>>(), hosts)?;
    let done = |(bits, times): (Vec<u32>, _)| Done { losses: bits.into_iter().map(f32::from_bits).collect(), times };
    Ok(told.into_iter().flatten().map(done).collect())
}
