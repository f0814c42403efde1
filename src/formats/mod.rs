//! Files that models and adapters are kept in.

pub mod atomic;
pub mod gguf;
pub mod hf_folder;
pub mod hf_write;
pub mod host_tensor;
pub mod peft;
mod peft_config;
pub mod processor_files;
pub mod safetensors;
pub mod safetensors_writer;
pub mod torch_bin;

pub use host_tensor::HostTensor;
