//! Which of an op's ways is the fastest on a device, for the sizes of a run: measured, each checked before it may win, kept
//! on disk (`table.rs`). What there is to measure is told by a device that only counted (`Launches::questions`), the
//! ways by `ops::tuning`.
//!
//! Must never know: the terminal, and where a user's files are.

pub mod table;

pub use table::{Found, Table};

use crate::{
    error::Result,
    gpu::{Clock, Effort, Gpu, Launches, Question},
    ops::{
        elementwise, roof,
        tuning::{self, Trial},
    },
};

/// How ways are measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// Timed runs of each way.
    pub runs: usize,
    /// The part of the rule's time that a way must save to take its place: less is noise, here or in a week.
    pub least_gain: f64,
    /// Falsify what this way computes (tests use it).
    pub spoiled: Option<&'static str>,
}

impl Default for Options {
    fn default() -> Self {
        Self { runs: 5, least_gain: 0.05, spoiled: None }
    }
}

/// The answer to one question.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    pub question: Question,
    /// The way of the op's own rule.
    pub rule: &'static str,
    pub winner: &'static str,
    /// Of the winner, and of the rule's way.
    pub seconds: f64,
    pub rule_seconds: f64,
    /// How many ways there were.
    pub ways: usize,
    /// Ways whose results were wrong.
    pub wrong: Vec<&'static str>,
}

impl Outcome {
    /// How many times as fast as the rule's way.
    pub fn gain(&self) -> f64 {
        if self.seconds > 0.0 { self.rule_seconds / self.seconds } else { 1.0 }
    }
}

/// A way as slow as so many times the best is not measured further.
const HOPELESS: f64 = 2.0;
/// Runs before those that count.
const WARM_UP: usize = 3;
/// As in [`Effort`]: the ways before have kept the device awake.
const LOAD: f64 = 0.02;
/// Turns in which a winner and the rule's way are measured again.
const TURNS: usize = 3;
/// The part of the device's memory that operands and results may take.
const ROOM: u64 = 2;

/// Answers what ops asked; `progress` hears of each question that is done, and how many there are. Questions whose operands
/// do not fit the device are left out, and so are those that a device can answer in one way alone.
///
/// # Errors
/// Whatever fails on the device.
pub fn tune(
    gpu: &Gpu,
    launches: &Launches,
    options: &Options,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Outcome>> {
    let clock = roof::clock(gpu)?;
    let questions: Vec<_> = launches.questions().collect();
    let mut outcomes = Vec::new();
    for (done, &(question, sizes)) in questions.iter().enumerate() {
        progress(done, questions.len());
        // Two operands and a result, whichever of the sizes they have.
        let [m, n, k] = sizes.map(|size| size as u64);
        let bytes = 4 * (m * n + n * k + m * k);
        if gpu.available_memory().is_some_and(|free| bytes > free / ROOM) {
            continue;
        }
        if let Some(trial) = tuning::trial(gpu, &question, sizes)?.filter(|trial| trial.ways.len() > 1) {
            outcomes.push(answer(gpu, clock, question, &trial, options)?);
        }
        gpu.trim();
    }
    progress(questions.len(), questions.len());
    Ok(outcomes)
}

/// A way's best run, in seconds: what else a machine does makes runs longer, never shorter.
fn measured(gpu: &Gpu, clock: Clock, trial: &Trial, way: &'static str, runs: usize) -> Result<f64> {
    let mut turn = 0;
    let effort = Effort { warm_up: WARM_UP, runs, seconds: f64::INFINITY, load: LOAD };
    let samples = gpu.samples(clock, effort, &mut || {
        turn += 1;
        (trial.run)(way, turn);
    })?;
    Ok(samples.best())
}

/// The better of two runs, or one that is far too slow.
fn glimpsed(gpu: &Gpu, clock: Clock, trial: &Trial, way: &'static str, hopeless: f64) -> Result<f64> {
    let mut least = f64::INFINITY;
    for turn in 1..3 {
        let elapsed = gpu.time(&mut || drop((trial.run)(way, turn)))?;
        let device = elapsed.device.filter(|_| clock == Clock::Device);
        least = least.min(device.unwrap_or(elapsed.host));
        if least > 2.0 * hopeless {
            break;
        }
    }
    Ok(least)
}

/// What a way makes of the first set, over what stood there.
fn result(trial: &Trial, way: &'static str, options: &Options) -> Result<Vec<f32>> {
    trial.out.iter().for_each(|out| elementwise::fill(out, 1e30));
    let mut values = (trial.run)(way, 0).to_vec()?;
    if options.spoiled == Some(way) {
        values.iter_mut().for_each(|value| *value += 1.0);
    }
    Ok(values)
}

/// Whether values are those that the host knows, and all of them another way's that were so.
fn agree(trial: &Trial, values: &[f32], others: Option<&[f32]>) -> bool {
    let close = |pairs: &mut dyn Iterator<Item = (f64, f64)>, tolerance: f64| {
        let (mut largest, mut apart) = (1e-3f64, 0f64);
        for (got, want) in pairs {
            // No comparison of a NaN is true.
            if !got.is_finite() {
                return false;
            }
            largest = largest.max(want.abs());
            apart = apart.max((got - want).abs());
        }
        apart <= tolerance * largest
    };
    let got = |at: usize| values.get(at).map_or(f64::NAN, |&value| f64::from(value));
    let known = close(&mut trial.want.iter().map(|&(at, want)| (got(at), want)), trial.tolerance);
    let mut pairs = others.unwrap_or_default().iter().enumerate().map(|(at, &want)| (got(at), f64::from(want)));
    known && close(&mut pairs, 2.0 * trial.tolerance) && values.iter().all(|value| value.is_finite())
}

fn answer(gpu: &Gpu, clock: Clock, question: Question, trial: &Trial, options: &Options) -> Result<Outcome> {
    let (rule, mut right, mut wrong, mut times) = (trial.ways[0], None::<Vec<f32>>, Vec::new(), Vec::new());
    let mut best = (rule, f64::INFINITY);
    for &way in &trial.ways {
        let values = result(trial, way, options)?;
        if !agree(trial, &values, right.as_deref()) {
            wrong.push(way);
            continue;
        }
        right.get_or_insert(values);
        let hopeless = HOPELESS * best.1;
        if glimpsed(gpu, clock, trial, way, hopeless)? > hopeless {
            continue;
        }
        let seconds = measured(gpu, clock, trial, way, options.runs)?;
        times.push((way, seconds));
        if seconds < best.1 {
            best = (way, seconds);
        }
    }
    let of_rule = times.iter().find(|(way, _)| *way == rule).map(|&(_, seconds)| seconds);
    let (winner, seconds, rule_seconds) = match of_rule {
        // Nothing that the rule takes is right: whatever is right is better.
        None if best.1.is_finite() => (best.0, best.1, best.1),
        None => (rule, 0.0, 0.0),
        Some(of_rule) => contest(gpu, clock, trial, options, (rule, of_rule), best)?,
    };
    Ok(Outcome { question, rule, winner, seconds, rule_seconds, ways: trial.ways.len(), wrong })
}

/// The better of the rule's way and the best one, which has to show its gain after every turn. With both their times.
fn contest(
    gpu: &Gpu,
    clock: Clock,
    trial: &Trial,
    options: &Options,
    rule: (&'static str, f64),
    best: (&'static str, f64),
) -> Result<(&'static str, f64, f64)> {
    let gains = |of_rule: f64, of_best: f64| of_best < (1.0 - options.least_gain) * of_rule;
    let (mut of_rule, mut of_best) = (rule.1, best.1);
    for _ in 0..TURNS {
        if rule.0 == best.0 || !gains(of_rule, of_best) {
            return Ok((rule.0, of_rule, of_rule));
        }
        of_rule = of_rule.min(measured(gpu, clock, trial, rule.0, options.runs)?);
        of_best = of_best.min(measured(gpu, clock, trial, best.0, options.runs)?);
    }
    Ok(if gains(of_rule, of_best) { (best.0, of_best, of_rule) } else { (rule.0, of_rule, of_rule) })
}
