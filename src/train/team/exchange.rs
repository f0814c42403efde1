//! Gradients meet in the host's memory: each parcel is added up in the order of the devices once all have sent it. The
//! order is fixed, so that the same devices give the same bytes. Weights pass through from who has updated them.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use rayon::prelude::*;

use super::link::{Receiver, Sender};
use crate::{error::Error, hosts::Hosts, train::optimizer::Parcel};

/// Elements that one core adds up at once; also what a square sum's order follows from.
const CHUNK: usize = 1 << 16;

/// How long weights are waited for until it is asked again whether more will come.
const PATIENCE: Duration = Duration::from_millis(1);

/// What a device sends.
pub enum Sent {
    /// A parcel's gradients; none from a device that had nothing to compute.
    Part { device: usize, round: usize, parcel: usize, values: Vec<f32> },
    /// A piece of the weights that it has updated; pieces come in their order.
    Weights { device: usize, piece: usize, bytes: Vec<u8> },
    /// It ends before its time.
    Gone,
}

/// What a device gets.
#[derive(Clone)]
pub enum Got {
    /// The sum of a parcel, in its bucket's order of spans.
    Sum { parcel: usize, values: Arc<Vec<f32>> },
    /// All gradients of a round have been added up, and another one is to come.
    RoundAdded,
    /// The square sum of all gradients, once there are no more.
    SquareSum(f64),
    /// What another device has updated, or the host: whole pieces, from a first one on.
    Weights { owner: Option<usize>, first: usize, bytes: Arc<Vec<u8>> },
}

/// Why nobody gets anything more.
#[derive(Debug)]
pub enum Broken {
    /// A device ended before its time.
    DeviceGone,
    Hosts(Error),
}

impl Broken {
    pub fn into_error(self) -> Error {
        match self {
            Self::DeviceGone => Error::failed("a device ended a step before its time"),
            Self::Hosts(error) => error,
        }
    }
}

/// A device and its gradients of a parcel.
type Part = (usize, Vec<f32>);

/// The place where a host's devices meet.
pub struct Exchange {
    arriving: Receiver<Sent>,
    leaving: Vec<Sender<Got>>,
    /// The number of the first of these devices, among those of all hosts.
    first: usize,
    /// Of how many devices each takes an equal part of every sum.
    owners: usize,
    /// What has come before its turn.
    parts: HashMap<(usize, usize), Vec<Part>>,
    /// Bytes of weights that devices have sent, or will, and that have not been passed on.
    missing: u64,
}

impl Exchange {
    /// `leaving` has a way to each device, in their order, the first of which is number `first` of all; of sums each
    /// takes all, or its part of so many `owners`.
    pub fn new(arriving: Receiver<Sent>, leaving: Vec<Sender<Got>>, first: usize, owners: usize) -> Self {
        Self { arriving, leaving, first, owners, parts: HashMap::new(), missing: 0 }
    }

    /// Adds up what leaves the devices in so many rounds: round by round, and in each in the order of the devices. A
    /// sum is `finished`, those of other hosts in it, in the order of the parcels. Gives the square sum of all. Weights
    /// of the step before are passed on as they come.
    pub fn sums(
        &mut self,
        parcels: &[Parcel],
        rounds: usize,
        hosts: &mut dyn Hosts,
        mut finished: impl FnMut(&mut Self, usize, Vec<f32>),
    ) -> Result<f64, Broken> {
        let mut sums: Vec<Vec<f32>> = vec![Vec::new(); parcels.len()];
        let mut square_sum = 0.0;
        for round in 0..rounds {
            for (index, parcel) in parcels.iter().enumerate() {
                let parts = self.wait_for(round, index)?;
                sums[index] = add_up(std::mem::take(&mut sums[index]), parts);
                if round + 1 == rounds {
                    let mut sum = std::mem::take(&mut sums[index]);
                    sum.resize(parcel.range.len(), 0.0);
                    hosts.add_up(&mut sum).map_err(Broken::Hosts)?;
                    square_sum += square(&sum);
                    finished(self, index, sum);
                }
            }
            if round + 1 < rounds {
                self.tell(&Got::RoundAdded);
            }
        }
        Ok(square_sum)
    }

    fn wait_for(&mut self, round: usize, parcel: usize) -> Result<Vec<Part>, Broken> {
        loop {
            if self.parts.get(&(round, parcel)).is_some_and(|parts| parts.len() == self.leaving.len()) {
                return Ok(self.parts.remove(&(round, parcel)).unwrap_or_default());
            }
            match self.arriving.recv() {
                Ok(Sent::Part { device, round, parcel, values }) => {
                    self.parts.entry((round, parcel)).or_default().push((device, values));
                }
                Ok(Sent::Weights { device, piece, bytes }) => drop(self.pass_on(device, piece, bytes)),
                _ => return Err(Broken::DeviceGone),
            }
        }
    }

    /// Every device has updated its weights, `bytes` together, and sends them.
    pub fn expect_weights(&mut self, bytes: u64) {
        self.missing += bytes;
    }

    /// Passes all weights on that are still to come; `passed` gets each piece, and the device of this host that has it
    /// updated.
    pub fn pass_weights(&mut self, mut passed: impl FnMut(usize, &[u8])) -> Result<(), Broken> {
        while self.missing > 0 {
            let Ok(Sent::Weights { device, piece, bytes }) = self.arriving.recv() else {
                return Err(Broken::DeviceGone);
            };
            passed(device, &self.pass_on(device, piece, bytes));
        }
        Ok(())
    }

    /// Passes weights on as they come until those who send them are `done` with a step. What comes later the next one
    /// passes on.
    pub fn pass_weights_until(&mut self, done: impl Fn() -> bool) -> Result<(), Broken> {
        while self.missing > 0 && !done() {
            match self.arriving.recv_within(PATIENCE) {
                Ok(Some(Sent::Weights { device, piece, bytes })) => drop(self.pass_on(device, piece, bytes)),
                Ok(None) => {}
                _ => return Err(Broken::DeviceGone),
            }
        }
        Ok(())
    }

    /// As [`Exchange::pass_weights`], to the devices of other hosts too, whose weights come here.
    pub fn share_weights(&mut self, hosts: &mut dyn Hosts) -> Result<(), Broken> {
        let mut mine: Vec<(u64, Vec<u8>)> =
            (0..self.leaving.len()).map(|device| ((self.first + device) as u64, Vec::new())).collect();
        self.pass_weights(|device, bytes| mine[device].1.extend_from_slice(bytes))?;
        let gathered = hosts.gather(&frame(&mine)).map_err(Broken::Hosts)?;
        let others = gathered.iter().enumerate().filter(|(rank, _)| *rank != hosts.rank());
        for (owner, bytes) in others.flat_map(|(_, framed)| unframe(framed)) {
            self.tell(&Got::Weights { owner: Some(owner as usize), first: 0, bytes: Arc::new(bytes.to_vec()) });
        }
        Ok(())
    }

    /// Passes a piece of a device's weights on to all others.
    fn pass_on(&mut self, device: usize, piece: usize, bytes: Vec<u8>) -> Arc<Vec<u8>> {
        self.missing = self.missing.saturating_sub(bytes.len() as u64);
        let bytes = Arc::new(bytes);
        let got = Got::Weights { owner: Some(self.first + device), first: piece, bytes: bytes.clone() };
        let others = self.leaving.iter_mut().enumerate().filter(|(other, _)| *other != device);
        // One that is gone says so itself.
        others.for_each(|(_, to)| drop(to.send(got.clone(), bytes.len())));
        bytes
    }

    /// Sends the same to all devices.
    pub fn tell(&mut self, got: &Got) {
        let bytes = match got {
            Got::Sum { values, .. } => values.len() * 4 / self.owners,
            Got::RoundAdded | Got::SquareSum(_) => 0,
            Got::Weights { bytes, .. } => bytes.len(),
        };
        self.leaving.iter_mut().for_each(|to| drop(to.send(got.clone(), bytes)));
    }
}

/// Numbered bytes, one behind the other.
pub fn frame<B: AsRef<[u8]>>(parts: &[(u64, B)]) -> Vec<u8> {
    let mut framed = Vec::new();
    for (number, bytes) in parts {
        let bytes = bytes.as_ref();
        framed.extend(number.to_le_bytes());
        framed.extend((bytes.len() as u64).to_le_bytes());
        framed.extend_from_slice(bytes);
    }
    framed
}

/// What [`frame`] has put together.
pub fn unframe(mut framed: &[u8]) -> Vec<(u64, &[u8])> {
    let mut parts = Vec::new();
    while let Some(([number, count], rest)) = framed.split_at_checked(16).map(|(head, rest)| {
        let (words, _) = head.as_chunks::<8>();
        ([u64::from_le_bytes(words[0]), u64::from_le_bytes(words[1])], rest)
    }) {
        let (bytes, rest) = rest.split_at(rest.len().min(count as usize));
        parts.push((number, bytes));
        framed = rest;
    }
    parts
}

/// Bytes of gradients that this machine adds up in a second.
pub fn adding_rate() -> f64 {
    const ELEMENTS: usize = 1 << 22;
    let (mut sum, part) = (vec![1.0; ELEMENTS], vec![1.0; ELEMENTS]);
    let best = (0..4)
        .map(|_| {
            let begun = Instant::now();
            sum = add_up(std::mem::take(&mut sum), vec![(0, part.clone())]);
            begun.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min);
    (4 * ELEMENTS) as f64 / best
}

/// Adds the parts of devices to what is there, in their order.
fn add_up(mut sum: Vec<f32>, mut parts: Vec<Part>) -> Vec<f32> {
    parts.sort_by_key(|(device, _)| *device);
    for (_, part) in parts {
        if sum.is_empty() {
            sum = part;
        } else if !part.is_empty() {
            assert_eq!(sum.len(), part.len(), "all devices cut what trains alike");
            sum.par_chunks_mut(CHUNK).zip(part.par_chunks(CHUNK)).for_each(|(sum, part)| {
                sum.iter_mut().zip(part).for_each(|(sum, value)| *sum += value);
            });
        }
    }
    sum
}

fn square(values: &[f32]) -> f64 {
    let chunk = |values: &[f32]| values.iter().map(|&value| f64::from(value) * f64::from(value)).sum::<f64>();
    let sums: Vec<f64> = values.par_chunks(CHUNK).map(chunk).collect();
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{hosts::Alone, train::team::link::way};

    fn parcel(count: usize) -> Parcel {
        Parcel { bucket: 0, range: 0..count }
    }

    #[test]
    fn sums_follow_the_order_of_devices_whatever_comes_first() {
        // 1e8 + 1 - 1e8 is 0 in one order and 1 in another.
        let given = [vec![1e8, 1.0], vec![1.0, 2.0], vec![-1e8, 3.0]];
        for order in [[0, 1, 2], [2, 0, 1], [1, 2, 0]] {
            let (mut send, arriving) = way(None);
            for device in order {
                send.send(Sent::Part { device, round: 0, parcel: 1, values: Vec::new() }, 0).unwrap();
                send.send(Sent::Part { device, round: 0, parcel: 0, values: given[device].clone() }, 0).unwrap();
            }
            let (leaving, _got): (Vec<_>, Vec<_>) = (0..3).map(|_| way(None)).unzip();
            let mut sums = Vec::new();
            let mut exchange = Exchange::new(arriving, leaving, 0, 1);
            let total = exchange.sums(&[parcel(2), parcel(1)], 1, &mut Alone, |_, index, sum| sums.push((index, sum)));
            assert_eq!(total.unwrap(), 36.0);
            assert_eq!(sums, [(0, vec![0.0, 6.0]), (1, vec![0.0])]);
        }
    }

    #[test]
    fn rounds_are_added_one_after_the_other() {
        let (mut send, arriving) = way(None);
        // The first device is a round ahead of the second, which has nothing in the last.
        for (device, round, values) in [(0, 0, vec![1e8]), (0, 1, vec![-1e8]), (1, 0, vec![1.0]), (1, 1, Vec::new())] {
            send.send(Sent::Part { device, round, parcel: 0, values }, 0).unwrap();
        }
        let (leaving, mut got): (Vec<_>, Vec<_>) = (0..2).map(|_| way(None)).unzip();
        let mut sums = Vec::new();
        let total =
            Exchange::new(arriving, leaving, 0, 1).sums(&[parcel(1)], 2, &mut Alone, |_, _, sum| sums.push(sum));
        assert_eq!((total.unwrap(), sums), (0.0, vec![vec![0.0]]));
        for got in &mut got {
            assert!(matches!(got.recv(), Ok(Got::RoundAdded)) && got.recv().is_err());
        }
    }

    #[test]
    fn weights_go_to_all_but_their_owner() {
        let (mut send, arriving) = way(None);
        for device in [1, 0] {
            send.send(Sent::Weights { device, piece: 3, bytes: vec![device as u8] }, 0).unwrap();
        }
        let (leaving, got): (Vec<_>, Vec<_>) = (0..2).map(|_| way(None)).unzip();
        let mut exchange = Exchange::new(arriving, leaving, 0, 1);
        exchange.expect_weights(2);
        exchange.pass_weights(|device, bytes| assert_eq!(bytes, [device as u8])).unwrap();
        drop(exchange);
        for (device, mut got) in got.into_iter().enumerate() {
            let Got::Weights { owner, first: 3, bytes } = got.recv().unwrap() else { panic!("weights") };
            assert_eq!((owner, &bytes[..]), (Some(1 - device), &[1 - device as u8][..]));
            assert!(got.recv().is_err());
        }
    }

    #[test]
    fn weights_of_the_step_before_are_passed_on_while_gradients_are_added() {
        let (mut send, arriving) = way(None);
        let (leaving, mut got): (Vec<_>, Vec<_>) = (0..2).map(|_| way(None)).unzip();
        let mut exchange = Exchange::new(arriving, leaving, 2, 1);
        exchange.expect_weights(4);
        send.send(Sent::Weights { device: 1, piece: 0, bytes: vec![5] }, 0).unwrap();
        for device in 0..2 {
            send.send(Sent::Part { device, round: 0, parcel: 0, values: vec![1.0] }, 0).unwrap();
        }
        send.send(Sent::Weights { device: 1, piece: 1, bytes: vec![6] }, 0).unwrap();
        assert_eq!(exchange.sums(&[parcel(1)], 1, &mut Alone, |_, _, _| ()).unwrap(), 4.0);
        assert!(matches!(got[0].try_recv(), Ok(Got::Weights { owner: Some(3), first: 0, .. })));
        assert!(got[0].try_recv().is_err() && got[1].try_recv().is_err());
        // Until all are done with the step, though some of it is still to come.
        exchange.pass_weights_until(|| true).unwrap();
        assert!(got[0].try_recv().is_err());
        let asked = std::cell::Cell::new(0);
        exchange.pass_weights_until(|| asked.replace(asked.get() + 1) == 1).unwrap();
        assert!(matches!(got[0].try_recv(), Ok(Got::Weights { owner: Some(3), first: 1, .. })));
        // Whoever needs them all does not wait for a next step.
        send.send(Sent::Weights { device: 1, piece: 2, bytes: vec![7; 2] }, 0).unwrap();
        exchange.pass_weights(|_, _| ()).unwrap();
        assert!(matches!(got[0].try_recv(), Ok(Got::Weights { owner: Some(3), first: 2, .. })));
        assert!(exchange.pass_weights(|_, _| ()).is_ok() && got[0].try_recv().is_err());
    }

    #[test]
    fn frames_come_apart_again() {
        let parts: [(u64, &[u8]); 3] = [(7, b"abc"), (1, b""), (u64::MAX, b"d")];
        assert_eq!(unframe(&frame(&parts)), parts);
        assert_eq!(unframe(b"short"), []);
    }

    #[test]
    fn a_device_that_is_gone_ends_it_for_all() {
        let (mut send, arriving) = way(None);
        let (leaving, mut got) = way(None);
        send.send(Sent::Part { device: 0, round: 0, parcel: 0, values: vec![1.0] }, 0).unwrap();
        send.send(Sent::Gone, 0).unwrap();
        let mut exchange = Exchange::new(arriving, vec![leaving.beside(), leaving], 0, 1);
        assert!(matches!(exchange.sums(&[parcel(1)], 1, &mut Alone, |_, _, _| ()), Err(Broken::DeviceGone)));
        // In its update too.
        exchange.expect_weights(4);
        send.send(Sent::Gone, 0).unwrap();
        assert!(matches!(exchange.pass_weights_until(|| false), Err(Broken::DeviceGone)));
        drop(exchange);
        assert!(got.recv().is_err());
    }
}
