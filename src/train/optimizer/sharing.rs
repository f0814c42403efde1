//! Which device makes which update (ZeRO, Rajbhandari et al. 2020): all of them all updates, each its own part, or the host.

use std::ops::Range;

use crate::ops::adamw_8bit::BLOCK;

/// One device's part in a team.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sharing {
    /// 0: every device updates all; 1: each updates its part, for which alone it has moments and masters; 2: it has
    /// gradients for no more than that either, but for those on their way; 3: nor has it weights of layers, but for those
    /// whose turn it is.
    pub zero_stage: u8,
    /// The host updates all, and has the moments and masters.
    pub offload: bool,
    pub device: usize,
    /// Of all hosts.
    pub devices: usize,
    /// Whether it is its host's first.
    pub first_of_host: bool,
    /// Gradients leave together that are at least so many.
    pub bucket_elements: usize,
}

impl Sharing {
    /// One device for itself.
    pub const ALONE: Self =
        Self { zero_stage: 0, offload: false, device: 0, devices: 1, first_of_host: true, bucket_elements: 1 };

    /// Whether nothing is exchanged.
    pub fn is_alone(&self) -> bool {
        self.devices == 1 && !self.offload
    }

    /// Whether gradients leave after every micro-batch, and take turns in the same memory.
    pub fn gradients_pass(&self) -> bool {
        self.zero_stage >= 2 && !self.is_alone()
    }

    /// Whether weights come back from whoever updates them.
    pub fn weights_return(&self) -> bool {
        (self.zero_stage >= 1 && self.devices > 1) || self.offload
    }

    /// The gradients of `end` that this device makes the updates of.
    pub fn owned(&self, end: usize) -> Range<usize> {
        self.owned_by(self.device, end)
    }

    /// As [`Sharing::owned`], of another device.
    pub fn owned_by(&self, device: usize, end: usize) -> Range<usize> {
        if self.offload {
            return 0..0;
        }
        if self.zero_stage == 0 {
            return 0..end;
        }
        // Blocks of eight-bit moments stay whole.
        let cut = |part: usize| if part == self.devices { end } else { end / BLOCK * part / self.devices * BLOCK };
        cut(device)..cut(device + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_all_and_keep_blocks_whole() {
        for (end, devices) in [(64, 3), (256, 2), (1000 * 256 + 64, 7), (0, 4)] {
            let of = |device| Sharing { zero_stage: 1, device, devices, ..Sharing::ALONE };
            let mut next = 0;
            for device in 0..devices {
                let owned = of(device).owned(end);
                assert_eq!(owned.start, next);
                assert!(owned.end.is_multiple_of(BLOCK) || device + 1 == devices);
                assert!(owned.len() <= end / devices + 2 * BLOCK);
                next = owned.end;
            }
            assert_eq!(next, end);
        }
        assert_eq!(Sharing { devices: 2, ..Sharing::ALONE }.owned(500), 0..500);
        assert_eq!(Sharing { offload: true, ..Sharing::ALONE }.owned(500), 0..0);
    }
}
