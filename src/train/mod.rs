//! Training: configs, stages, the optimizer, checkpoints, and what a run leaves behind.
//!
//! Must never know: the terminal. What happens is told to an [`events::Observer`].
//!
//! Read first: `run.rs` (stages in order), then `trainer.rs` (one stage), `step.rs` and `stepper.rs` (one step, on one
//! device), `team` (on several), `trainable.rs` (what trains), `optimizer.rs`, `checkpoint.rs`.

mod agreement;
pub mod check;
pub mod checkpoint;
pub mod config;
mod division;
pub mod estimate;
pub mod events;
pub mod loss_scale;
pub mod measure;
pub mod metrics;
pub mod optimizer;
pub mod pictures;
mod pipeline;
pub mod plot;
pub mod report;
pub mod run;
pub mod run_folder;
pub mod schedule;
pub mod start;
pub mod step;
pub mod stepper;
pub mod team;
pub mod trainable;
pub mod trainer;
