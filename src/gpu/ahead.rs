//! Kernels compiled before they are asked for: a device that only counts notes what a run launches, and the device that
//! runs it compiles these in threads of its own, while weights are still on their way.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
};

use super::{choices::Question, kernel::Kernels};

/// Threads that compile: drivers gain little from more, and each may hold a compiler's memory.
const MAX_THREADS: usize = 8;

/// Kernels by the order of their first launches, and what was asked about them ([`Gpu::launches`](super::Gpu::launches)).
#[derive(Clone, Debug, Default)]
pub struct Launches {
    names: HashSet<String>,
    /// With which of the bindings are uniforms.
    order: Vec<(String, Vec<bool>)>,
    /// With the largest sizes that each stands for.
    questions: BTreeMap<Question, [usize; 3]>,
}

impl Launches {
    pub(super) fn note(&mut self, name: &str, uniforms: impl Iterator<Item = bool>) {
        if !self.names.contains(name) {
            self.names.insert(name.to_owned());
            self.order.push((name.to_owned(), uniforms.collect()));
        }
    }

    pub(super) fn ask(&mut self, question: Question, sizes: [usize; 3]) {
        let most = self.questions.entry(question).or_insert(sizes);
        *most = (*most).max(sizes);
    }

    /// What ops asked, and the largest sizes that each question stands for.
    pub fn questions(&self) -> impl Iterator<Item = (Question, [usize; 3])> {
        self.questions.iter().map(|(&question, &sizes)| (question, sizes))
    }

    /// Adds what others asked.
    pub fn add_questions(&mut self, others: &Self) {
        others.questions().for_each(|(question, sizes)| self.ask(question, sizes));
    }

    /// The variants' names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.order.iter().map(|(name, _)| name.as_str())
    }
}

/// The threads; dropped, they end with the kernel they are at.
#[derive(Default)]
pub(super) struct Ahead {
    running: Vec<(Arc<AtomicUsize>, JoinHandle<()>)>,
}

impl Ahead {
    pub fn start(&mut self, device: &wgpu::Device, kernels: &Arc<Kernels>, launches: Launches) {
        self.running.retain(|(_, thread)| !thread.is_finished());
        // One is left to the thread that records.
        let threads = thread::available_parallelism().map_or(1, |threads| threads.get() - 1).clamp(1, MAX_THREADS);
        let (list, next): (Arc<[_]>, _) = (launches.order.into(), Arc::new(AtomicUsize::new(0)));
        for _ in 0..threads {
            let (device, kernels, list, taken) = (device.clone(), kernels.clone(), list.clone(), next.clone());
            let run = move || {
                while let Some((name, uniforms)) = list.get(taken.fetch_add(1, Ordering::Relaxed)) {
                    let layout = kernels.layout(&device, uniforms);
                    kernels.pipeline(&device, name, &layout);
                }
            };
            // Without a thread, kernels are compiled at their first launch, as ever.
            let spawned = thread::Builder::new().name("kernels".to_owned()).spawn(run);
            self.running.extend(spawned.ok().map(|thread| (next.clone(), thread)));
        }
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        for (next, _) in &self.running {
            next.store(usize::MAX / 2, Ordering::Relaxed);
        }
        for (_, thread) in self.running.drain(..) {
            // A panic there is told there, and again where the kernel is launched.
            let _ = thread.join();
        }
    }
}
