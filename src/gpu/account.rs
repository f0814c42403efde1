//! What device memory is held for, and how much it was at the most.

/// What a buffer is for: whoever allocates says so with [`Gpu::account`](super::Gpu::account).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Account {
    /// Weights that do not train.
    Weights,
    /// What trains: adapters, projector, or all of the model, and 16-bit copies of it.
    Trained,
    Gradients,
    /// Moments.
    Optimizer,
    /// Pictures' features, kept over steps.
    Pictures,
    /// Logits and their gradient.
    Logits,
    /// Whatever lives within a step.
    #[default]
    Activations,
}

impl Account {
    pub const ALL: [Self; 7] = [
        Self::Weights,
        Self::Trained,
        Self::Gradients,
        Self::Optimizer,
        Self::Pictures,
        Self::Logits,
        Self::Activations,
    ];

    pub fn name(self) -> &'static str {
        ["weights", "trained", "gradients", "optimizer", "pictures", "logits", "activations"][self as usize]
    }
}

/// Bytes of each account when most was in use, and what the pool then or later held in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holdings {
    live: [u64; Account::ALL.len()],
    /// Of the live ones and the pool's free ones.
    pub held: u64,
}

impl Holdings {
    pub fn of(&self, account: Account) -> u64 {
        self.live[account as usize]
    }

    /// Free buffers, kept for later.
    pub fn free(&self) -> u64 {
        self.held.saturating_sub(self.live.iter().sum())
    }
}

/// Live bytes by account.
#[derive(Default)]
pub(super) struct Ledger {
    pub current: Account,
    live: [u64; Account::ALL.len()],
    peak: Holdings,
}

impl Ledger {
    /// Notes a buffer for the current account; `held` is what the pool holds with it.
    pub fn take(&mut self, bytes: u64, held: u64) -> Account {
        self.live[self.current as usize] += bytes;
        let in_use = |live: &[u64]| live.iter().sum::<u64>();
        if in_use(&self.live) > in_use(&self.peak.live) {
            self.peak.live = self.live;
        }
        self.peak.held = self.peak.held.max(held);
        self.current
    }

    pub fn give_back(&mut self, account: Account, bytes: u64) {
        self.live[account as usize] -= bytes;
    }

    pub fn peak(&self) -> Holdings {
        self.peak
    }

    /// What is held now becomes the peak to start from.
    pub fn start_again(&mut self, held: u64) {
        self.peak = Holdings { live: self.live, held };
    }
}
