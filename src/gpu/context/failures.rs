//! What has gone wrong on a device: it sticks, and is told at the next readback. Nothing waits for a device that is lost.

use std::sync::{
    Arc, Mutex, MutexGuard, OnceLock, PoisonError,
    atomic::{AtomicU64, Ordering},
};

use super::{Device, Gpu};
use crate::{
    error::{Error, ErrorKind, Result},
    gpu::waiting,
};

#[derive(Default)]
pub(super) struct Failures {
    /// The first failure.
    first: Arc<Mutex<Option<String>>>,
    /// Why the device is lost, where it is.
    lost: Arc<OnceLock<String>>,
    /// Dispatches until [`Gpu::lose`]; 0: it never comes.
    until_loss: AtomicU64,
    /// Held where memory is used that goes with the device.
    alive: Mutex<()>,
}

impl Failures {
    /// Notes whatever wgpu tells of the device.
    pub fn listen(&self, device: &wgpu::Device) {
        let (first, lost) = (self.first.clone(), self.lost.clone());
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error.to_string());
        }));
        device.set_device_lost_callback(move |_, message| drop(lost.set(message)));
    }
}

impl Gpu {
    /// Submits what is recorded and waits until the device has done it.
    ///
    /// # Errors
    /// As [`Gpu::read`].
    pub fn sync(&self) -> Result<()> {
        self.flush();
        self.wait()
    }

    /// What has failed on the device so far, as far as it is known without waiting.
    ///
    /// # Errors
    /// As [`Gpu::read`].
    pub fn check(&self) -> Result<()> {
        let lost = self.inner.failures.lost.get().cloned();
        lost.or_else(|| self.failure().clone()).map_or(Ok(()), |text| Err(self.device_error(text)))
    }

    pub(super) fn wait(&self) -> Result<()> {
        let wait = |device: &Device| waiting::until_done(&device.device, None, &|| self.is_lost());
        let waited = self.inner.device.as_ref().map_or(Ok(()), wait);
        self.check()?;
        waited.map_err(|error| self.device_error(error))
    }

    pub(in crate::gpu) fn is_lost(&self) -> bool {
        self.inner.failures.lost.get().is_some()
    }

    pub(super) fn has_failed(&self) -> bool {
        self.is_lost() || self.failure().is_some()
    }

    /// Does something with memory that the device has, where it still lives.
    pub(in crate::gpu) fn while_alive(&self, work: impl FnOnce()) {
        let _alive = self.inner.failures.alive.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.is_lost() {
            work();
        }
    }

    /// Takes the device away, as if its driver had: for tests. What is on it is gone, nothing is answered any more, and
    /// whoever asks is told.
    pub fn lose(&self) {
        let Some(Device { device, .. }) = &self.inner.device else { return };
        let _alive = self.inner.failures.alive.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = self.inner.failures.lost.set("it was taken away".to_owned());
        device.destroy();
        // Memory goes once the device is idle.
        let _ = waiting::until_done(device, None, &|| false);
    }

    /// [`Gpu::lose`] instead of the dispatch that follows so many others: for tests.
    pub fn lose_after(&self, dispatches: u64) {
        self.inner.failures.until_loss.store(dispatches + 1, Ordering::Relaxed);
    }

    /// Dispatches that are left of [`Gpu::lose_after`]'s.
    pub fn until_loss(&self) -> u64 {
        self.inner.failures.until_loss.load(Ordering::Relaxed).saturating_sub(1)
    }

    pub(super) fn count_down(&self) {
        let until = &self.inner.failures.until_loss;
        if until.load(Ordering::Relaxed) > 0 && until.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.lose();
        }
    }

    pub(super) fn device_error(&self, text: String) -> Error {
        let name = &self.inner.facts.name;
        // What else fails on a lost device is of no interest.
        let text = self.inner.failures.lost.get().cloned().unwrap_or(text);
        if text.to_lowercase().contains("memory") || text.contains("limit") {
            Error::new(ErrorKind::Memory, format!("{name} has not enough memory")).caused_by(text)
        } else if self.is_lost() || text == waiting::LOST {
            Error::device(format!("{name} was lost")).caused_by(text)
        } else {
            Error::device(format!("{name} failed")).caused_by(text)
        }
    }

    pub(super) fn failure(&self) -> MutexGuard<'_, Option<String>> {
        self.inner.failures.first.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
