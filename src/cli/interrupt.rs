//! Ctrl-C: the first one finishes the step and saves, the second one stops at once.

use crate::error::{Error, Result};
use std::{
    io::Write,
    sync::atomic::{AtomicBool, Ordering},
};

/// The exit code of a run that was interrupted.
pub const EXIT_CODE: i32 = 130;

static STOP: AtomicBool = AtomicBool::new(false);
static INSTALLED: AtomicBool = AtomicBool::new(false);

/// Catches Ctrl-C (and SIGTERM, SIGHUP) from now on; the flag becomes true at the first one. Calling it again gives
/// the same flag.
///
/// # Errors
/// [`ErrorKind::Failed`](crate::error::ErrorKind::Failed): the system does not let signals be caught.
pub fn install() -> Result<&'static AtomicBool> {
    if !INSTALLED.swap(true, Ordering::SeqCst) {
        ctrlc::set_handler(|| {
            if STOP.swap(true, Ordering::SeqCst) {
                std::process::exit(EXIT_CODE);
            }
            // Not eprintln!: it panics when the terminal is gone, which is one reason for a signal.
            let text = "\nFinishing this step, then saving. Once more to stop at once, without saving.";
            let _ = writeln!(std::io::stderr(), "{text}");
        })
        .map_err(|error| Error::failed("cannot catch Ctrl-C").caused_by(error))?;
    }
    Ok(&STOP)
}
