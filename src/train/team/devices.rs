//! What a run trains on, and where a host's devices stand among those of all.

use super::SlowLink;
use crate::{
    error::{Error, ErrorKind, Result},
    gpu::Gpu,
    hosts::Hosts,
    train::agreement::told_by_all,
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

    /// What one of them may use: its share of an adapter that is named more than once, and of the host's memory, where
    /// that is theirs.
    pub fn memory_of(&self, gpu: &Gpu) -> Option<u64> {
        let facts = gpu.facts();
        let shares = |other: &&Gpu| gpu.is_cpu() && other.is_cpu() || facts.index == other.facts().index;
        Some(gpu.available_memory()? / self.gpus.iter().filter(shares).count().max(1) as u64)
    }

    /// Says which of several devices an error is of, where it is a device's.
    pub fn named(&self, error: Error) -> Error {
        let of_a_device = matches!(error.kind, ErrorKind::Device | ErrorKind::Memory) && self.gpus.len() > 1;
        match self.gpus.iter().position(|gpu| gpu.check().is_err()).filter(|_| of_a_device) {
            Some(at) => {
                let message = format!("device {} of {}: {}", at + 1, self.gpus.len(), error.message);
                Error { message, ..error }
            }
            None => error,
        }
    }
}

/// Where a host's devices stand among all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The number of this host's first.
    pub first: usize,
    /// Of all hosts.
    pub total: usize,
}

impl Standing {
    /// Of a host with so many devices; every host has to ask.
    ///
    /// # Errors
    /// A host that does not answer.
    pub fn of(devices: usize, hosts: &mut dyn Hosts) -> Result<Self> {
        let counts = told_by_all(&devices, hosts)?;
        Ok(Self { first: counts[..hosts.rank()].iter().sum(), total: counts.iter().sum() })
    }
}
