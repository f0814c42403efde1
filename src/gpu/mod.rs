//! The device: adapters, buffers, kernels and the stream of work. The only folder that names `wgpu`.
//!
//! Must never know: tensors, shapes, models. A [`Gpu`] is a cheap handle; work is recorded in order and runs in order,
//! so a buffer that is dropped may be handed out again at once. A failure on the device sticks and is told
//! at the next [`Gpu::read`] or [`Gpu::sync`].
//!
//! Read first: `context.rs` (recording), then `kernel.rs` (pipelines), `staging.rs` (large writes),
//! `download.rs` (what goes to the host and comes back), `wgsl.rs` (the preprocessor).

mod adapter;
mod buffer;
mod context;
mod download;
mod kernel;
mod staging;
pub mod wgsl;

pub use adapter::{AdapterFacts, AdapterOptions, list_adapters};
pub use buffer::{Buffer, UNIT};
pub use context::{Binding, Gpu, UNIFORM_BYTES};
pub use download::Download;
pub use kernel::{expand_shader, shader_variants};
