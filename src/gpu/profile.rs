//! What each kernel of a stretch of work takes: by the device's clock, a pass for each dispatch and nothing waited for
//! until as many are recorded as marks are kept of; by the host's where the device has none, each dispatch waited for.

use std::{collections::HashMap, time::Instant};

use super::timing::Marks;

/// A kernel and how often it was launched; the seconds of all, unless none of them could be timed.
pub type KernelTime = (String, u64, Option<f64>);

#[derive(Default)]
struct Row {
    launches: u64,
    timed: u64,
    /// Of those that are timed.
    seconds: f64,
}

#[derive(Default)]
pub(super) struct Profile {
    rows: HashMap<String, Row>,
    /// Where passes are marked, with the kernel of each.
    marks: Option<(Marks, Vec<String>)>,
}

impl Profile {
    /// `marks` where the device's clock shall count.
    pub fn new(marks: Option<Marks>) -> Self {
        Self { marks: marks.map(|marks| (marks, Vec::new())), ..Self::default() }
    }

    /// The marks of the next pass, which is to hold one dispatch of `kernel`; none where the host's clock counts.
    pub fn of_a_pass(&mut self, kernel: &str) -> Option<wgpu::ComputePassTimestampWrites<'_>> {
        let (marks, kernels) = self.marks.as_mut()?;
        kernels.push(kernel.to_string());
        marks.of_a_pass()
    }

    /// Whether a dispatch is to be waited for, for the host's clock counts.
    pub fn waits(&self) -> bool {
        self.marks.is_none()
    }

    /// Whether what is marked is to be read before more is.
    pub fn is_full(&self) -> bool {
        self.marks.as_ref().is_some_and(|(marks, _)| marks.is_full())
    }

    /// A dispatch was waited for, since `begun`.
    pub fn waited(&mut self, kernel: &str, begun: Instant) {
        self.add(kernel.to_string(), Some(begun.elapsed().as_secs_f64()));
    }

    /// Reads what is marked; all of it has to be submitted.
    pub fn read(&mut self, device: &wgpu::Device, queue: &wgpu::Queue, lost: &dyn Fn() -> bool) {
        let Some((marks, kernels)) = &mut self.marks else { return };
        let kernels = std::mem::take(kernels);
        let times = marks.take(device, queue, lost);
        let mut passes = times.iter().flat_map(|times| times.chunks_exact(2));
        for kernel in kernels {
            self.add(kernel, passes.next().map(|bounds| bounds[1] - bounds[0]));
        }
    }

    fn add(&mut self, kernel: String, seconds: Option<f64>) {
        let row = self.rows.entry(kernel).or_default();
        row.launches += 1;
        row.timed += u64::from(seconds.is_some());
        row.seconds += seconds.unwrap_or(0.0);
    }

    pub fn clear(&mut self) {
        self.rows.clear();
    }

    /// Slowest first. Launches that could not be timed count as the others of their kernel.
    pub fn rows(&self) -> Vec<KernelTime> {
        let seconds = |row: &Row| (row.timed > 0).then(|| row.seconds * row.launches as f64 / row.timed as f64);
        let mut rows: Vec<_> = self.rows.iter().map(|(name, row)| (name.clone(), row.launches, seconds(row))).collect();
        rows.sort_by(|a, b| b.2.unwrap_or(0.0).total_cmp(&a.2.unwrap_or(0.0)));
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launches_without_a_time_count_as_the_others() {
        let mut profile = Profile::new(None);
        for (kernel, seconds) in [("b", Some(1.0)), ("a", Some(2.0)), ("a", None), ("a", Some(4.0)), ("c", None)] {
            profile.add(kernel.into(), seconds);
        }
        assert_eq!(profile.rows(), [("a".into(), 3, Some(9.0)), ("b".into(), 1, Some(1.0)), ("c".into(), 1, None)]);
        profile.clear();
        assert!(profile.rows().is_empty());
    }
}
