//! Ctrl-C. In training the first one finishes the step and saves, the second one stops at once. In a conversation it
//! stops the answer.

use crate::error::{Error, Result};
use std::{
    io::Write,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

/// The exit code of a run that was interrupted.
pub const EXIT_CODE: i32 = 130;

static STOP: AtomicBool = AtomicBool::new(false);
static INSTALLED: AtomicBool = AtomicBool::new(false);

/// Catches Ctrl-C (and SIGTERM, SIGHUP) from now on; the flag becomes true at the first one. Calling it again gives
/// the same flag. One of several ranks is `alone` no longer and says nothing then: a launcher asks the same way when
/// another rank is lost, and with that one no step can be finished.
///
/// # Errors
/// [`ErrorKind::Failed`](crate::error::ErrorKind::Failed): the system does not let signals be caught.
pub fn install(alone: bool) -> Result<&'static AtomicBool> {
    if !INSTALLED.swap(true, Ordering::SeqCst) {
        ctrlc::set_handler(move || {
            if STOP.swap(true, Ordering::SeqCst) {
                std::process::exit(EXIT_CODE);
            }
            if alone {
                // Not eprintln!: it panics when the terminal is gone, which is one reason for a signal.
                let text = "\nFinishing this step, then saving. Once more to stop at once, without saving.";
                let _ = writeln!(std::io::stderr(), "{text}");
            }
        })
        .map_err(|error| Error::failed("cannot catch Ctrl-C").caused_by(error))?;
    }
    Ok(&STOP)
}

/// Presses that an answer takes before the program is ended: it may hang in a long prompt.
const PATIENCE: usize = 3;

static ANSWERING: AtomicBool = AtomicBool::new(false);
static PRESSED: AtomicUsize = AtomicUsize::new(0);

/// From now on Ctrl-C stops the answer under way; between answers it ends the program, and during one at the third
/// press.
///
/// # Errors
/// [`ErrorKind::Failed`](crate::error::ErrorKind::Failed): the system does not let signals be caught.
pub fn install_for_answers() -> Result<()> {
    ctrlc::set_handler(|| {
        let pressed = PRESSED.fetch_add(1, Ordering::SeqCst) + 1;
        if !ANSWERING.load(Ordering::SeqCst) || pressed >= PATIENCE {
            std::process::exit(EXIT_CODE);
        }
    })
    .map_err(|error| Error::failed("cannot catch Ctrl-C").caused_by(error))
}

pub fn begin_answer() {
    PRESSED.store(0, Ordering::SeqCst);
    ANSWERING.store(true, Ordering::SeqCst);
}

pub fn end_answer() {
    ANSWERING.store(false, Ordering::SeqCst);
}

/// Whether Ctrl-C was pressed since the answer began.
pub fn answer_is_stopped() -> bool {
    PRESSED.load(Ordering::SeqCst) > 0
}
