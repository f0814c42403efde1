//! CLIP, the projector, LLaMA, and LLaVA made of the three. Written as for one device; adapters and what trains are
//! the trainer's choice.
//!
//! `config.rs`, `rotary.rs` and `names.rs` know checkpoints, not devices (`formats` builds on them); a forward pass is read in
//! `llava.rs`, then `clip.rs`, `projector.rs`, `llama.rs`.

pub mod adapter;
pub mod batch;
pub mod clip;
pub mod config;
pub(crate) mod config_fields;
mod config_json;
pub mod dora;
pub mod llama;
pub mod llava;
pub mod loading;
pub mod memory;
pub mod names;
pub mod open;
pub mod placement;
pub mod projector;
pub mod released;
pub mod rotary;
pub mod streaming;
