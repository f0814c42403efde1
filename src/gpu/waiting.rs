//! Waiting for the device, and a device that is lost: by its driver, its cable, its power. From then on nothing waits for
//! it any more, and whoever asks is told.

use std::{
    sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError},
    time::Duration,
};

use crate::panics::caught;

/// How long one wait lasts before it is asked whether the device still lives.
const PATIENCE: Duration = Duration::from_secs(1);

/// What is told where nothing more is known.
pub(super) const LOST: &str = "it does not answer any more";

/// Lets wgpu tell what is done. It panics where it learns that the device is lost; here that is an error.
fn poll(device: &wgpu::Device, how: wgpu::PollType) -> Result<Polled, String> {
    match caught(|| device.poll(how)) {
        Ok(Ok(_)) => Ok(Polled::Done),
        Ok(Err(wgpu::PollError::Timeout)) => Ok(Polled::NotYet),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(LOST.to_owned()),
    }
}

#[derive(PartialEq, Eq)]
enum Polled {
    Done,
    NotYet,
}

/// Lets wgpu free what finished work held; never waits.
pub(super) fn look(device: &wgpu::Device) -> Result<(), String> {
    poll(device, wgpu::PollType::Poll).map(drop)
}

/// Waits until the device has done `submission`, or all there is; no longer than it lives.
pub(super) fn until_done(
    device: &wgpu::Device,
    submission: Option<&wgpu::SubmissionIndex>,
    lost: &dyn Fn() -> bool,
) -> Result<(), String> {
    while !lost() {
        let wait = wgpu::PollType::Wait { submission_index: submission.cloned(), timeout: Some(PATIENCE) };
        if poll(device, wait)? == Polled::Done {
            return Ok(());
        }
    }
    Err(LOST.to_owned())
}

/// Waits for an answer that comes once `submission` is done, or all there is; no longer than the device lives.
pub(super) fn answer<T>(
    device: &wgpu::Device,
    submission: Option<&wgpu::SubmissionIndex>,
    answers: &Receiver<T>,
    lost: &dyn Fn() -> bool,
) -> Result<T, String> {
    match answers.try_recv() {
        Ok(answer) => return Ok(answer),
        Err(TryRecvError::Disconnected) => return Err(LOST.to_owned()),
        Err(TryRecvError::Empty) => until_done(device, submission, lost)?,
    }
    // It is there now, or another thread that waits too is about to give it.
    while !lost() {
        match answers.recv_timeout(PATIENCE) {
            Ok(answer) => return Ok(answer),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    Err(LOST.to_owned())
}
