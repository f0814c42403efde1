//! The layers of the library that read files, compiled without the ones that know a device: building wgpu with a
//! sanitizer takes half an hour, and no reader needs it.
//!
//! The modules have the paths that they have in the library, so that `crate::` means the same in both.

#[path = "../../src/data/mod.rs"]
pub mod data;
#[path = "../../src/error.rs"]
pub mod error;
#[path = "../../src/formats/mod.rs"]
pub mod formats;
pub mod models;
pub mod ops;
#[path = "../../src/quant/mod.rs"]
pub mod quant;
#[path = "../../src/rng.rs"]
pub mod rng;
