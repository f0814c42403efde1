//! A step of a model whose layers lie on several devices: micro-batches follow each other through its parts, each in a
//! thread, so that one part computes one of them while the next computes another.
//!
//! What a part does is done in an order that is known before ("one forward, one backward": Narayanan et al. 2021): so
//! gradients are added up in the order of the micro-batches, which gives the bytes of one thread, and what is held is
//! known too. Of n parts the first holds the values of at most n micro-batches, the last those of one.

use std::{
    cell::Cell,
    rc::Rc,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Instant,
};

use super::{config::StageConfig, pictures::PictureStore, step::Step, stepper::Stepper, team::DeviceTimes};
use crate::{
    autograd::Tape,
    error::{Error, Result},
    gpu::Gpu,
    models::batch::PackedBatch,
    nn::Forward,
    ops::reduce,
};

/// Whose turn it is in each part. Each micro-batch comes to each of them twice.
struct Schedule {
    parts: usize,
    micro_batches: usize,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// Of each part.
    parts: Vec<Part>,
    /// Somebody has failed: nobody waits any more, and what is computed is of no use.
    broken: bool,
}

#[derive(Clone, Debug, Default)]
struct Part {
    /// Turns that are over, and the seconds that they took.
    over: usize,
    seconds: f64,
    /// What has come from the other parts, or gone to them.
    bytes: u64,
}

/// A micro-batch on its way: forward through the parts, then back.
struct Pass {
    schedule: Arc<Schedule>,
    micro_batch: usize,
    /// Turns that it has had.
    had: Cell<usize>,
    /// When the one that it has began.
    begun: Cell<Instant>,
}

impl Schedule {
    fn new(parts: usize, micro_batches: usize) -> Self {
        let state = Mutex::new(State { parts: vec![Part::default(); parts], broken: false });
        Self { parts, micro_batches, state, changed: Condvar::new() }
    }

    /// The part that a micro-batch comes to, and the number of its turn there, when it has `had` so many.
    fn turn(&self, micro_batch: usize, had: usize) -> (usize, usize) {
        let part = had.min(2 * self.parts - 1 - had);
        // So many go forward in this part before the first one comes back.
        let ahead = (self.parts - part).min(self.micro_batches);
        let number = match had < self.parts {
            true if micro_batch < ahead => micro_batch,
            true => 2 * micro_batch - ahead + 1,
            false => (ahead + micro_batch).min(self.micro_batches) + micro_batch,
        };
        (part, number)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, (part, number): (usize, usize)) {
        let waits = |state: &mut State| state.parts[part].over < number && !state.broken;
        drop(self.changed.wait_while(self.state(), waits).unwrap_or_else(PoisonError::into_inner));
    }

    /// A turn is over that began then.
    fn end(&self, (part, number): (usize, usize), begun: Instant) {
        let part = &mut self.state().parts[part];
        part.over = number + 1;
        part.seconds += begun.elapsed().as_secs_f64();
        self.changed.notify_all();
    }

    /// So many bytes have passed from a part to its neighbour.
    fn passed(&self, parts: [usize; 2], bytes: u64) {
        let state = &mut self.state();
        parts.into_iter().for_each(|part| state.parts[part].bytes += bytes);
    }

    fn is_broken(&self) -> bool {
        self.state().broken
    }

    fn break_off(&self) {
        self.state().broken = true;
        self.changed.notify_all();
    }
}

impl Pass {
    /// Waits for the micro-batch's first turn.
    fn begin(schedule: &Arc<Schedule>, micro_batch: usize) -> Rc<Self> {
        schedule.wait(schedule.turn(micro_batch, 0));
        Rc::new(Self { schedule: schedule.clone(), micro_batch, had: Cell::new(0), begun: Cell::new(Instant::now()) })
    }

    fn is_over(&self) -> bool {
        self.had.get() == 2 * self.schedule.parts
    }

    /// Ends this turn, and waits for the next one, if there is any.
    fn go_on(&self) {
        let had = self.had.get();
        self.schedule.end(self.schedule.turn(self.micro_batch, had), self.begun.get());
        self.had.set(had + 1);
        if !self.is_over() {
            self.schedule.wait(self.schedule.turn(self.micro_batch, had + 1));
            self.begun.set(Instant::now());
        }
    }

    /// The same, on the way to another part with so many bytes.
    fn cross(&self, bytes: u64) {
        let had = self.had.get();
        let parts = [had, had + 1].map(|had| self.schedule.turn(self.micro_batch, had).0);
        self.schedule.passed(parts, bytes);
        self.go_on();
    }

    /// Lets all turns pass that are left.
    fn finish(&self) {
        while !self.is_over() {
            self.go_on();
        }
    }
}

impl Drop for Pass {
    /// Whatever ends a micro-batch early, a panic too, the others must not wait for it.
    fn drop(&mut self) {
        if !self.is_over() {
            self.schedule.break_off();
        }
    }
}

/// Whether several micro-batches may be under way at once. Not where the head's gradients are added up beside those of
/// the embeddings that it is: these come at other times, and their order would be anybody's.
pub fn suits(stepper: &Stepper) -> bool {
    let model = stepper.model();
    model.gpus().len() > 1 && !model.head_gpu().is(model.gpu())
}

/// Forward and backward of all micro-batches of a step, and what each part did of them.
///
/// # Errors
/// A picture that cannot be read; whatever fails on a device.
pub fn run(
    stepper: &Stepper,
    stage: &StageConfig,
    step: &Step<'_>,
    loss_scale: Option<f64>,
    pictures: &PictureStore,
) -> Result<Vec<DeviceTimes>> {
    let begun = Instant::now();
    let (parts, count) = (stepper.model().gpus().len(), step.batches.len());
    let schedule = Arc::new(Schedule::new(parts, count));
    let threads = parts.min(count);
    let schedule = &schedule;
    let work = |first: usize| {
        for index in (first..count).step_by(threads) {
            let pass = Pass::begin(schedule, index);
            if schedule.is_broken() {
                return Ok(());
            }
            let done = micro_batch(stepper, stage, step, loss_scale, pictures, &pass);
            // Those that this thread will not come to are not waited for.
            done.inspect_err(|_| schedule.break_off())?;
        }
        Ok(())
    };
    let results: Vec<Result<()>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|first| scope.spawn(move || work(first))).collect();
        let panicked = |_| Err(Error::failed("a thread of the training failed"));
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect()
    });
    results.into_iter().collect::<Result<()>>()?;
    let seconds = begun.elapsed().as_secs_f64();
    let positions: usize = step.batches.iter().map(PackedBatch::tokens).sum();
    let times = |part: &Part| DeviceTimes {
        tokens_per_second: DeviceTimes::rate(positions, part.seconds),
        waiting_seconds: seconds - part.seconds,
        bytes_moved: part.bytes,
    };
    Ok(schedule.state().parts.iter().map(times).collect())
}

/// As [`Stepper::micro_batch`], with a turn in each part.
fn micro_batch(
    stepper: &Stepper,
    stage: &StageConfig,
    step: &Step<'_>,
    loss_scale: Option<f64>,
    pictures: &PictureStore,
    pass: &Rc<Pass>,
) -> Result<()> {
    let (index, model) = (pass.micro_batch, stepper.model());
    let (scale, dropout) = stepper.scale_and_dropout(stage, step, index, loss_scale);
    {
        let pictures = pictures.load(&step.images[index])?;
        let views = pictures.views();
        let mut tape = Tape::recording();
        let turns = pass.clone();
        tape.at_crossings(Rc::new(move |bytes| turns.cross(bytes)));
        let mut forward =
            Forward { tape: &mut tape, parameters: &model.parameters, dropout: Some(dropout), before: None };
        if let Some(losses) = model.losses(&mut forward, &step.batches[index], pictures.as_pictures(&views), scale)? {
            reduce::add_sum(&losses.value, stepper.sums(), 1 + index);
            pass.go_on();
            tape.backward(losses.node(), losses.value);
        }
    }
    // What was held is given back within the last turn.
    pass.finish();
    model.gpus().iter().try_for_each(Gpu::check)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The turns of each part as (micro-batch, whether it comes back).
    fn turns(parts: usize, micro_batches: usize) -> Vec<Vec<(usize, bool)>> {
        let schedule = Schedule::new(parts, micro_batches);
        let mut turns = vec![vec![None; 2 * micro_batches]; parts];
        for micro_batch in 0..micro_batches {
            for had in 0..2 * parts {
                let (part, number) = schedule.turn(micro_batch, had);
                assert!(turns[part][number].replace((micro_batch, had >= parts)).is_none(), "two of one number");
            }
        }
        turns.into_iter().map(|part| part.into_iter().map(|turn| turn.unwrap()).collect()).collect()
    }

    #[test]
    fn each_part_goes_forward_and_back_in_order_and_holds_no_more_than_it_may() {
        assert_eq!(turns(2, 3)[0].iter().map(|turn| turn.0).collect::<Vec<_>>(), [0, 1, 0, 2, 1, 2]);
        for parts in 2..6 {
            for micro_batches in 1..12 {
                for (part, turns) in turns(parts, micro_batches).into_iter().enumerate() {
                    let (mut forward, mut back) = (0, 0);
                    for (micro_batch, comes_back) in turns {
                        let next = if comes_back { &mut back } else { &mut forward };
                        assert_eq!(micro_batch, *next, "out of order");
                        *next += 1;
                        assert!(back <= forward && forward - back <= parts - part);
                    }
                }
            }
        }
    }

    /// Threads that only take turns come to an end, whatever the numbers; and where one of them fails, too.
    #[test]
    fn nobody_waits_for_ever() {
        for (parts, micro_batches) in [(2, 1), (2, 7), (3, 2), (4, 9), (5, 5)] {
            for fails in [None, Some(0), Some(micro_batches / 2)] {
                let schedule = Arc::new(Schedule::new(parts, micro_batches));
                let threads = parts.min(micro_batches);
                let work = |first: usize| {
                    for index in (first..micro_batches).step_by(threads) {
                        let pass = Pass::begin(&schedule, index);
                        for _ in 0..parts {
                            pass.go_on();
                        }
                        if fails == Some(index) {
                            return;
                        }
                        pass.finish();
                    }
                };
                thread::scope(|scope| (0..threads).for_each(|first| drop(scope.spawn(move || work(first)))));
                let state = schedule.state();
                assert_eq!(state.broken, fails.is_some());
                assert!(fails.is_some() || state.parts.iter().all(|part| part.over == 2 * micro_batches));
            }
        }
    }
}
