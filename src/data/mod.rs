//! Data: records, prompt templates, tokenisation, picture pre-processing, and the order in which records are taken.
//!
//! Knows nothing of tensors on a device, of models or of the trainer: files in, [`Sample`]s and pixel values out.

mod chat_python;
pub mod chat_template;
pub mod dataset;
pub mod gguf_tokenizer;
pub mod gguf_vocabulary;
pub mod image;
pub mod record;
pub mod resize;
pub mod sample;
pub mod sampler;
pub mod sentencepiece;
mod sentencepiece_proto;
pub mod template;
pub mod tokenizer;
pub mod version;

pub use dataset::{Dataset, Source, Statistics};
pub use image::{ImageProcessor, ImageSource, PixelValues};
pub use record::{Content, Record, Role, Turn};
pub use sample::{Encoder, Sample};
pub use sampler::{Duration, Order, Plan};
pub use template::{Labels, Part, Template};
pub use tokenizer::Tokenizer;
pub use version::Version;

/// A picture goes here (before splicing); never an id of a vocabulary.
pub const IMAGE_TOKEN_INDEX: i32 = -200;
/// The label of a position that has no part in the loss.
pub const IGNORE_INDEX: i32 = -100;
/// What stands for a picture in the text of a record.
pub const IMAGE_PLACEHOLDER: &str = "<image>";
