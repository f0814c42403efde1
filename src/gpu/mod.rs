//! The device: adapters, buffers, kernels and the stream of work. The only folder that names `wgpu`.
//!
//! Must never know: tensors, shapes, models. A [`Gpu`] is a cheap handle; work is recorded in order and runs in order,
//! so a buffer that is dropped may be handed out again at once. A failure on the device sticks and is told
//! at the next [`Gpu::read`] or [`Gpu::sync`].
//!
//! Read first: `context.rs` (recording), then `kernel.rs` (pipelines), `ahead.rs` (the same, early), `staging.rs` (large writes),
//! `in_place.rs` (writes without it), `pace.rs` (how much at a time), `waiting.rs` (and lost devices), `download.rs` (what goes to the host and comes back),
//! `timing.rs` (how long it takes), `choices.rs` (which kernels won), `wgsl.rs` (the preprocessor).

mod account;
mod adapter;
mod ahead;
mod buffer;
mod capture;
mod choices;
mod context;
mod download;
mod in_place;
mod kernel;
mod pace;
mod profile;
mod staging;
mod timing;
mod waiting;
pub mod wgsl;

pub use account::{Account, Holdings};
pub use adapter::{AdapterFacts, AdapterLimits, AdapterOptions, Cooperative, find_adapter, list_adapters};
pub use ahead::Launches;
pub use buffer::{Buffer, UNIT};
pub use choices::{Choices, Question, bucket};
pub use context::{Accounting, Binding, Gpu, UNIFORM_BYTES};
pub use download::Download;
pub use in_place::Arriving;
pub use kernel::{expand_shader, shader_variants};
pub use profile::KernelTime;
pub use staging::STAGING_BYTES;
pub use timing::{Clock, Effort, Elapsed, Samples};
