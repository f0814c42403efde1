//! Weights wherever they lie: safetensors, PyTorch's `.bin`, GGUF or nowhere, behind one face.

use std::path::Path;

use super::{
    bitsandbytes,
    gguf::{self, GgufFile},
    random::RandomWeights,
    safetensors::{self, Checkpoint, Dtype},
    stored::StoredTensor,
    torch_bin::{self, TorchFile},
};
use crate::error::{Error, Result};

/// The tensors of a checkpoint. Those of a GGUF file have the names and the order of rows of Hugging Face.
pub enum Weights {
    Safetensors(Checkpoint),
    Torch(TorchFile),
    Gguf(Box<GgufFile>),
    /// The vision tower and the projector of a GGUF pair, by canonical name.
    Mmproj(Box<GgufFile>),
    Random(RandomWeights),
}

/// What a folder's weights are in; safetensors first.
const FOLDER_FILES: [&str; 4] =
    [safetensors::SINGLE_FILE, safetensors::INDEX_FILE, torch_bin::SINGLE_FILE, torch_bin::INDEX_FILE];

impl Weights {
    /// Whether a folder holds safetensors or `.bin` files.
    pub fn is_in(folder: &Path) -> bool {
        FOLDER_FILES.iter().any(|name| folder.join(name).exists())
    }

    /// A folder with weights in it, or a file, whose kind is seen from its first bytes.
    ///
    /// # Errors
    /// `Data`: nothing that is read is there, or it is broken.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            return match first_bytes(path)? {
                head if head.starts_with(&gguf::MAGIC) => Ok(Self::Gguf(Box::new(GgufFile::open(path)?))),
                head if head.starts_with(b"PK") => Ok(Self::Torch(TorchFile::open(path)?)),
                _ if path
                    .extension()
                    .is_some_and(|ending| ["bin", "pt", "pth"].iter().any(|other| ending == *other)) =>
                {
                    Ok(Self::Torch(TorchFile::open(path)?))
                }
                _ => Ok(Self::Safetensors(Checkpoint::open(path)?)),
            };
        }
        let has = |names: &[&str]| names.iter().any(|name| path.join(name).exists());
        if has(&FOLDER_FILES[..2]) {
            return Ok(Self::Safetensors(Checkpoint::open(path)?));
        }
        if has(&FOLDER_FILES[2..]) {
            return Ok(Self::Torch(TorchFile::open(path)?));
        }
        Err(Error::data(format!("{} holds no weights: none of {}", path.display(), FOLDER_FILES.join(", ")))
            .hint("name the folder that holds the model's weights, or the weights file itself"))
    }

    /// Names as in the files; those of a GGUF file as Hugging Face has them.
    ///
    /// # Errors
    /// `Data`: a GGUF file holds a tensor that no LLaMA has.
    pub fn names(&self) -> Result<Vec<String>> {
        Ok(match self {
            Self::Safetensors(checkpoint) => bitsandbytes::names(checkpoint),
            Self::Torch(file) => file.names().map(str::to_owned).collect(),
            Self::Gguf(file) => gguf::llama::tensor_names(file)?,
            Self::Mmproj(file) => gguf::mmproj_read::tensor_names(file)?,
            Self::Random(weights) => weights.names().map(str::to_owned).collect(),
        })
    }

    /// A tensor by one of [`Weights::names`].
    ///
    /// # Errors
    /// `Data`: there is none of that name, with the nearest; or it does not fit the heads that a GGUF file names.
    pub fn require(&self, name: &str) -> Result<StoredTensor<'_>> {
        Ok(match self {
            Self::Safetensors(checkpoint) => match bitsandbytes::packed(checkpoint, name)? {
                Some(packed) => packed.into(),
                None => checkpoint.require(name)?.into(),
            },
            Self::Torch(file) => file.require(name)?.into(),
            Self::Gguf(file) => gguf::llama::tensor(file, name)?.into(),
            Self::Mmproj(file) => gguf::mmproj_read::tensor(file, name)?.into(),
            Self::Random(weights) => {
                weights.get(name).ok_or_else(|| Error::data(format!("the random weights have no tensor {name}")))?
            }
        })
    }

    /// The dtype in which most bytes of weights are kept; F32 where they are quantised, or there are none.
    pub fn dtype(&self) -> Result<Dtype> {
        let mut bytes_in = [(Dtype::F32, 0), (Dtype::BF16, 0), (Dtype::F16, 0)];
        for name in self.names()? {
            let tensor = self.require(&name)?;
            let dtype = tensor.dtype();
            if let Some((_, bytes)) = bytes_in.iter_mut().find(|(known, _)| *known == dtype) {
                *bytes += tensor.len() * dtype.bitsize() / 8;
            }
        }
        Ok(bytes_in.into_iter().rev().max_by_key(|(_, bytes)| *bytes).map_or(Dtype::F32, |(dtype, _)| dtype))
    }
}

fn first_bytes(path: &Path) -> Result<Vec<u8>> {
    use std::io::Read;
    let failed = |source| Error::reading(path, source);
    let mut head = Vec::new();
    std::fs::File::open(path).map_err(failed)?.take(8).read_to_end(&mut head).map_err(failed)?;
    Ok(head)
}
