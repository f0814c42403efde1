//! How long the device takes: by its own clock where it has one, else by the host's.
//!
//! The device's clock is asked at the bounds of compute passes, which every backend can. A reading that cannot be (zero,
//! or longer than the host waited) is no reading: then the host's clock counts, over batches long enough for it.

use std::time::Instant;

use super::{Gpu, waiting};
use crate::error::Result;

/// Passes whose bounds are kept. More of them, and the host's clock counts.
const PASSES: u32 = 512;
/// How much longer than the host waited the device may say it took.
const SLACK: f64 = 2e-6;

/// Whose clock measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    Device,
    Host,
}

impl Clock {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Host => "host",
        }
    }
}

/// Seconds from the start of the first to the end of the last pass, and from the first recording until all was done.
#[derive(Clone, Copy, Debug)]
pub struct Elapsed {
    /// None: the device has no clock, or a reading was no good.
    pub device: Option<f64>,
    pub host: f64,
}

impl Elapsed {
    fn by(self, clock: Clock) -> Option<f64> {
        if clock == Clock::Device { self.device } else { Some(self.host) }
    }
}

/// Where the device writes down when passes begin and end.
pub(super) struct Marks {
    queries: wgpu::QuerySet,
    passes: u32,
    /// Nanoseconds.
    period: f32,
}

impl Marks {
    pub fn new(device: &wgpu::Device, queue: &wgpu::Queue) -> Option<Self> {
        device.features().contains(wgpu::Features::TIMESTAMP_QUERY).then(|| Self {
            queries: device.create_query_set(&wgpu::QuerySetDescriptor {
                label: None,
                ty: wgpu::QueryType::Timestamp,
                count: 2 * PASSES,
            }),
            passes: 0,
            period: queue.get_timestamp_period(),
        })
    }

    /// For the next pass; none where there are too many.
    pub fn of_a_pass(&mut self) -> Option<wgpu::ComputePassTimestampWrites<'_>> {
        let first = 2 * self.passes;
        self.passes += 1;
        (self.passes <= PASSES).then_some(wgpu::ComputePassTimestampWrites {
            query_set: &self.queries,
            beginning_of_pass_write_index: Some(first),
            end_of_pass_write_index: Some(first + 1),
        })
    }

    /// Whether no further pass can be marked.
    pub fn is_full(&self) -> bool {
        self.passes >= PASSES
    }

    /// Seconds from the first to the last mark; none where these cannot be times.
    fn read(&mut self, device: &wgpu::Device, queue: &wgpu::Queue, lost: &dyn Fn() -> bool) -> Option<f64> {
        let times = self.take(device, queue, lost)?;
        Some(times.last()? - times.first()?).filter(|&seconds| seconds > 0.0)
    }

    /// Seconds, since any moment, of each mark, two for each pass since the last call, all of which have to be submitted;
    /// none where these cannot be times.
    pub fn take(&mut self, device: &wgpu::Device, queue: &wgpu::Queue, lost: &dyn Fn() -> bool) -> Option<Vec<f64>> {
        let marks = 2 * std::mem::take(&mut self.passes);
        if marks == 0 || marks > 2 * PASSES {
            return None;
        }
        let buffer = |usage| {
            let size = u64::from(marks) * u64::from(wgpu::QUERY_SIZE);
            device.create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false })
        };
        let resolved = buffer(wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC);
        let staging = buffer(wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST);
        let mut encoder = device.create_command_encoder(&Default::default());
        encoder.resolve_query_set(&self.queries, 0..marks, &resolved, 0);
        encoder.copy_buffer_to_buffer(&resolved, 0, &staging, 0, staging.size());
        queue.submit([encoder.finish()]);
        staging.slice(..).map_async(wgpu::MapMode::Read, |_| ());
        waiting::until_done(device, None, lost).ok()?;
        let range = staging.slice(..).get_mapped_range().ok()?;
        let ticks: Vec<u64> = range
            .chunks_exact(8)
            .map(|word| word.iter().rev().fold(0, |time, &byte| time << 8 | u64::from(byte)))
            .collect();
        let first = *ticks.first()?;
        let whole = first > 0 && ticks.is_sorted();
        whole.then(|| ticks.iter().map(|&time| (time - first) as f64 * f64::from(self.period) / 1e9).collect())
    }
}

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Runs before those that count; fewer where they take long.
    pub warm_up: usize,
    pub runs: usize,
    /// After so many seconds, no further run; of three at least.
    pub seconds: f64,
    /// Seconds of a stretch of work right before the runs that count, of which a GPU has as many as make it faster: its
    /// clock falls while it has nothing to do, and takes up to a second to come back. Host processors are not loaded so.
    pub load: f64,
}

/// Seconds of each run, in rising order.
#[derive(Clone, Debug)]
pub struct Samples {
    pub seconds: Vec<f64>,
    pub clock: Clock,
    /// Repetitions of the work in each run, over which its time is a mean.
    pub repeats: usize,
}

impl Samples {
    /// The time that a part of the runs does not exceed, between two runs in proportion; 0 without any.
    pub fn quantile(&self, part: f64) -> f64 {
        let at = part.clamp(0.0, 1.0) * self.seconds.len().saturating_sub(1) as f64;
        let (below, above) = (at.floor() as usize, at.ceil() as usize);
        match (self.seconds.get(below), self.seconds.get(above)) {
            (Some(below), Some(above)) => below + (above - below) * at.fract(),
            _ => 0.0,
        }
    }

    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    pub fn best(&self) -> f64 {
        self.quantile(0.0)
    }
}

/// The shortest run: what each clock can tell, and long beside the gap to the next one.
const LEAST_DEVICE: f64 = 1e-3;
const LEAST_HOST: f64 = 1e-2;
/// Of the load before: what is recorded at once, the most stretches, and what the next one must save of a run's time for
/// another to follow.
const A_LOAD: f64 = 5e-3;
const MOST_STRETCHES: usize = 10;
const FASTER: f64 = 0.98;
const MOST_REPEATS: usize = 4096;
const FEWEST_RUNS: usize = 3;

/// How often work that takes `once` seconds fits into `seconds`, rounded up.
fn repeats(seconds: f64, once: f64) -> usize {
    ((seconds / once.max(1e-9)).ceil() as usize).clamp(1, MOST_REPEATS)
}

impl Gpu {
    /// Times what `work` records, from an idle device until it is done.
    ///
    /// # Errors
    /// Whatever has failed on the device so far.
    pub fn time(&self, work: &mut dyn FnMut()) -> Result<Elapsed> {
        self.sync()?;
        self.swap_marks(Marks::new);
        let begun = Instant::now();
        work();
        let done = self.sync();
        let host = begun.elapsed().as_secs_f64();
        let mut device = None;
        if let Some(mut marks) = self.swap_marks(|_, _| None) {
            device = self.with_device(|raw, queue| marks.read(raw, queue, &|| self.is_lost()));
        }
        done?;
        Ok(Elapsed { device: device.filter(|&seconds| seconds <= host + SLACK), host })
    }

    /// Times `work` run after run, by the clock that is asked for; by the host's where the device's is no good.
    ///
    /// # Errors
    /// Whatever has failed on the device so far.
    pub fn samples(&self, clock: Clock, effort: Effort, work: &mut dyn FnMut()) -> Result<Samples> {
        if clock == Clock::Device
            && let Some(samples) = self.samples_by(Clock::Device, effort, work)?
        {
            return Ok(samples);
        }
        let samples = self.samples_by(Clock::Host, effort, work)?;
        Ok(samples.unwrap_or(Samples { seconds: Vec::new(), clock: Clock::Host, repeats: 1 }))
    }

    fn samples_by(&self, clock: Clock, effort: Effort, work: &mut dyn FnMut()) -> Result<Option<Samples>> {
        let begun = Instant::now();
        let mut shortest = f64::INFINITY;
        for _ in 0..effort.warm_up.max(1) {
            let Some(seconds) = self.time(work)?.by(clock) else { return Ok(None) };
            shortest = shortest.min(seconds);
            if begun.elapsed().as_secs_f64() > effort.seconds / 4.0 {
                break;
            }
        }
        let mut before = f64::INFINITY;
        let stretches = if self.is_cpu() { 0 } else { MOST_STRETCHES };
        for _ in 0..stretches {
            let (mut fastest, begun) = (f64::INFINITY, Instant::now());
            while begun.elapsed().as_secs_f64() < effort.load {
                let repeats = repeats(A_LOAD, shortest);
                let Some(seconds) = self.time(&mut || (0..repeats).for_each(|_| work()))?.by(clock) else {
                    return Ok(None);
                };
                fastest = fastest.min(seconds / repeats as f64);
                shortest = shortest.min(fastest);
            }
            if fastest > FASTER * before {
                break;
            }
            before = fastest;
        }
        let least = if clock == Clock::Device { LEAST_DEVICE } else { LEAST_HOST };
        let repeats = repeats(least, shortest);
        let (mut seconds, begun) = (Vec::new(), Instant::now());
        while seconds.len() < effort.runs.max(FEWEST_RUNS)
            && (seconds.len() < FEWEST_RUNS || begun.elapsed().as_secs_f64() < effort.seconds)
        {
            let elapsed = self.time(&mut || (0..repeats).for_each(|_| work()))?;
            let Some(elapsed) = elapsed.by(clock) else { return Ok(None) };
            seconds.push(elapsed / repeats as f64);
        }
        seconds.sort_by(f64::total_cmp);
        Ok(Some(Samples { seconds, clock, repeats }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_between_runs() {
        let samples = Samples { seconds: vec![1.0, 2.0, 4.0], clock: Clock::Host, repeats: 1 };
        assert_eq!([0.0, 0.25, 0.5, 0.9, 1.0].map(|part| samples.quantile(part)), [1.0, 1.5, 2.0, 3.6, 4.0]);
        let none = Samples { seconds: Vec::new(), ..samples };
        assert_eq!(none.median(), 0.0);
    }
}
