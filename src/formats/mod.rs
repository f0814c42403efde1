//! Files that models and adapters are kept in.

pub mod atomic;
pub mod gguf;
pub mod hf_write;
pub mod host_tensor;
mod mapped;
pub mod model_folder;
pub mod peft;
pub mod processor_files;
pub mod safetensors;
pub mod safetensors_writer;
mod shards;
pub mod torch_bin;

pub use host_tensor::HostTensor;
