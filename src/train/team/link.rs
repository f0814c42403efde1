//! The way between a device and the place where all meet: a channel, whose items take the time that their bytes take
//! where a test makes the link slow.

use std::{
    sync::mpsc::{self, RecvError, RecvTimeoutError, SendError, TryRecvError},
    thread,
    time::{Duration, Instant},
};

/// A link between each device and its host that is slower than the machine's: for tests of what hides behind the
/// backward. Both ways at once, as links are.
#[derive(Clone, Copy, Debug)]
pub struct SlowLink {
    /// Each way.
    pub bytes_per_second: f64,
}

/// How long one wait lasts.
const PATIENCE: Duration = Duration::from_secs(1);

/// The end that sends.
pub struct Sender<T> {
    to: mpsc::Sender<(Instant, T)>,
    slow: Option<SlowLink>,
    is_free: Instant,
}

/// The end that receives, of one sender or several.
pub struct Receiver<T> {
    from: mpsc::Receiver<(Instant, T)>,
    /// What is still on its way: that of one sender may overtake another's.
    early: Vec<(Instant, T)>,
}

/// One way.
pub fn way<T>(slow: Option<SlowLink>) -> (Sender<T>, Receiver<T>) {
    let (to, from) = mpsc::channel();
    (Sender { to, slow, is_free: Instant::now() }, Receiver { from, early: Vec::new() })
}

impl<T> Sender<T> {
    /// Another device's way to the same end.
    pub fn beside(&self) -> Self {
        Self { to: self.to.clone(), slow: self.slow, is_free: Instant::now() }
    }

    /// Sends something of so many bytes, and does not wait for it.
    ///
    /// # Errors
    /// Nobody receives any more.
    pub fn send(&mut self, item: T, bytes: usize) -> Result<(), SendError<T>> {
        let mut arrives = Instant::now();
        if let Some(SlowLink { bytes_per_second }) = self.slow {
            self.is_free = self.is_free.max(arrives) + Duration::from_secs_f64(bytes as f64 / bytes_per_second);
            arrives = self.is_free;
        }
        self.to.send((arrives, item)).map_err(|SendError((_, item))| SendError(item))
    }
}

impl<T> Receiver<T> {
    /// Waits for the next.
    ///
    /// # Errors
    /// Nobody sends any more.
    pub fn recv(&mut self) -> Result<T, RecvError> {
        loop {
            if let Some(item) = self.recv_within(PATIENCE)? {
                return Ok(item);
            }
        }
    }

    /// The next, if it comes within this time.
    ///
    /// # Errors
    /// Nobody sends any more.
    pub fn recv_within(&mut self, patience: Duration) -> Result<Option<T>, RecvError> {
        let end = Instant::now() + patience;
        loop {
            match self.try_recv() {
                Ok(item) => return Ok(Some(item)),
                Err(TryRecvError::Disconnected) => return Err(RecvError),
                Err(TryRecvError::Empty) => {}
            }
            let now = Instant::now();
            if now >= end {
                return Ok(None);
            }
            let next = self.early.iter().map(|(arrives, _)| *arrives).min().map_or(end, |arrives| arrives.min(end));
            let patience = next.saturating_duration_since(now);
            match self.from.recv_timeout(patience) {
                Ok(sent) => self.early.push(sent),
                Err(RecvTimeoutError::Timeout) => {}
                // What is on its way still comes.
                Err(RecvTimeoutError::Disconnected) => thread::sleep(patience),
            }
        }
    }

    /// The next where it is there already.
    ///
    /// # Errors
    /// It is not; or nobody sends any more.
    pub fn try_recv(&mut self) -> Result<T, TryRecvError> {
        let ended = loop {
            match self.from.try_recv() {
                Ok(sent) => self.early.push(sent),
                Err(ended) => break ended,
            }
        };
        let first = self.early.iter().enumerate().min_by_key(|(_, (arrives, _))| *arrives);
        match first.map(|(place, (arrives, _))| (place, *arrives)) {
            Some((place, arrives)) if arrives <= Instant::now() => Ok(self.early.remove(place).1),
            Some(_) => Err(TryRecvError::Empty),
            None => Err(ended),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_take_their_time_one_after_the_other() {
        let (mut to, mut from) = way(Some(SlowLink { bytes_per_second: 1000.0 }));
        let begun = Instant::now();
        to.send('a', 200).unwrap();
        to.send('b', 200).unwrap();
        // Another device has a link of its own.
        to.beside().send('c', 100).unwrap();
        assert_eq!(from.try_recv(), Err(TryRecvError::Empty));
        assert_eq!(from.recv_within(Duration::from_millis(1)), Ok(None));
        assert_eq!(from.recv(), Ok('c'));
        assert_eq!(from.recv(), Ok('a'));
        assert!(begun.elapsed() >= Duration::from_millis(200));
        assert_eq!(from.recv(), Ok('b'));
        assert!(begun.elapsed() >= Duration::from_millis(400));
        drop(to);
        assert_eq!(from.recv(), Err(RecvError));
    }

    #[test]
    fn a_machine_s_own_link_is_not_slowed() {
        let (mut to, mut from) = way(None);
        to.send(1, usize::MAX).unwrap();
        assert_eq!(from.try_recv(), Ok(1));
        drop(from);
        assert_eq!(to.send(2, 0), Err(SendError(2)));
    }
}
