//! Files that models and adapters are kept in.

pub mod atomic;
pub mod bitsandbytes;
pub mod gguf;
pub mod gguf_write;
pub mod hf_write;
pub mod host_tensor;
pub mod llava_write;
mod mapped;
pub mod model_folder;
pub mod peft;
pub mod processor_files;
pub mod random;
pub mod safetensors;
pub mod safetensors_writer;
mod shards;
pub mod stored;
pub mod torch_bin;
pub mod weights;

pub use host_tensor::HostTensor;
