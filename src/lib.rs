//! Train and run LLaVA multimodal language models on any GPU: hand-written WGSL on wgpu, an autograd tape, no Python.
//!
//! The layers, each knowing only those before it:
//! `gpu` → `tensor` → `ops` → `autograd` → `nn` → `formats`, `data`, `hub`, `hosts` → `models` → `train`, `generate`, `eval` → `bench`, `tune` → `cli`.
//! `error`, `panics`, `rng` and `quant` (weights in four bits, as bytes) are below all of them. ARCHITECTURE.md says what lives where and why.

pub mod autograd;
pub mod bench;
pub mod cli;
pub mod data;
pub mod embedded;
pub mod error;
pub mod eval;
pub mod formats;
pub mod generate;
pub mod gpu;
pub mod hosts;
pub mod hub;
pub mod models;
pub mod nn;
pub mod ops;
pub mod panics;
pub mod quant;
pub mod rng;
pub mod tensor;
pub mod train;
pub mod tune;
