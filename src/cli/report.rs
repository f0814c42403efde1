//! How errors reach a person, and which exit code each kind has.

use super::args::Command;
use crate::error::{Error, ErrorKind, Result};
use owo_colors::OwoColorize;
use std::{error::Error as StdError, io::Write, path::Path};

/// 0 done, 1 the work failed, 2 wrong use, 3 data, 4 device or memory, 5 network, 130 interrupted. Never renumbered.
pub fn exit_code(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::Failed => 1,
        ErrorKind::Usage => 2,
        ErrorKind::Data => 3,
        ErrorKind::Device | ErrorKind::Memory => 4,
        ErrorKind::Network => 5,
        ErrorKind::Interrupted => 130,
    }
}

/// A device's failure with what this command can do about it.
pub fn way_out(error: Error, command: &Command) -> Error {
    let trains = matches!(command, Command::Train(_));
    match error.kind {
        _ if !error.hints.is_empty() => error,
        ErrorKind::Memory if trains => error
            .hint("lower per_device_train_batch_size and raise gradient_accumulation_steps by the same factor")
            .hint("shorten model_max_length, or train with method lora"),
        ErrorKind::Memory => error
            .hint("--precision bfloat16 keeps weights in two bytes each")
            .hint("ask for less at a time: shorter texts, fewer beams or pictures"),
        ErrorKind::Device => {
            let other = "try another adapter with --device, see `wgpu-llava devices`";
            if trains {
                error.hint("go on from the last checkpoint with --resume").hint(other)
            } else {
                error.hint(other)
            }
        }
        _ => error,
    }
}

/// Writes the error to stderr; in colour on a terminal only, and never under NO_COLOR.
pub fn print_error(error: &Error) {
    // If not even stderr can be written to there is nobody left to tell.
    let _ = anstream::stderr().write_all(render(error).as_bytes());
}

/// Message, numbered causes, hints, with colour codes.
fn render(error: &Error) -> String {
    let label = match error.kind {
        ErrorKind::Interrupted => "interrupted:".yellow().bold().to_string(),
        _ => "error:".red().bold().to_string(),
    };
    let mut text = format!("{label} {}\n", error.message.trim_end());
    let mut cause = error.source();
    let mut number = 1;
    while let Some(source) = cause {
        // A cause of several lines (a TOML error draws the line it means) stays aligned.
        let message = source.to_string();
        let message = message.trim_end().replace('\n', "\n     ");
        text.push_str(&format!("  {number}: {message}\n"));
        (cause, number) = (source.source(), number + 1);
    }
    for hint in &error.hints {
        text.push_str(&format!("{} {}\n", "hint:".cyan().bold(), hint.trim_end()));
    }
    text
}

/// Refuses a file that could not be written, before the work whose result it is to hold.
///
/// # Errors
/// [`ErrorKind::Usage`]: it is a folder, or its folder is not there.
pub fn check_output_file(option: &str, path: &Path) -> Result<()> {
    if path.is_dir() {
        return Err(Error::usage(format!("{option}: {} is a folder", path.display())).hint("name a file"));
    }
    match path.parent().filter(|parent| !parent.as_os_str().is_empty() && !parent.is_dir()) {
        Some(parent) => Err(Error::usage(format!("{option}: there is no folder {}", parent.display()))
            .hint("make it, or choose another place")),
        None => Ok(()),
    }
}

/// Refuses a place for a new folder where something would be lost: one that holds files, or a file.
///
/// # Errors
/// [`ErrorKind::Usage`].
pub fn check_new_folder(option: &str, path: &Path) -> Result<()> {
    let taken = match path.read_dir() {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => path.exists(),
    };
    if taken {
        return Err(Error::usage(format!("{option}: {} is there already", path.display()))
            .hint("choose a folder that is not there yet, or remove it first"));
    }
    Ok(())
}

/// Writes data that was asked for to stdout. A reader that has gone (`| head`) is no error.
pub fn print_data(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::failed("cannot write to stdout").caused_by(error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_numbered_and_hints_follow() {
        let inner = Error::data("inner").caused_by("cause\nsecond line");
        let error = Error::usage("outer").caused_by(inner).hint("do this").hint("or that");
        let plain = anstream::adapter::strip_str(&render(&error)).to_string();
        assert_eq!(plain, "error: outer\n  1: inner\n  2: cause\n     second line\nhint: do this\nhint: or that\n");
    }

    #[test]
    fn exit_codes_are_the_documented_ones() {
        let kinds = [
            (ErrorKind::Failed, 1),
            (ErrorKind::Usage, 2),
            (ErrorKind::Data, 3),
            (ErrorKind::Device, 4),
            (ErrorKind::Network, 5),
            (ErrorKind::Interrupted, 130),
        ];
        for (kind, code) in kinds {
            assert_eq!(exit_code(kind), code);
        }
    }
}
