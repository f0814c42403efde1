//! The program: see `wgpu_llava::cli`.

use std::process::ExitCode;

fn main() -> ExitCode {
    wgpu_llava::cli::main()
}
