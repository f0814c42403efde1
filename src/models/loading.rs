//! Weights from a model folder to the device, in pieces: the host never holds a whole tensor.

use super::names;
use crate::{
    error::Result,
    formats::{HostTensor, model_folder::ModelFolder, safetensors, stored::StoredTensor},
    gpu::Gpu,
    ops::cast,
    tensor::{Dtype, Tensor},
};

/// Bytes of a file that are on their way at a time.
const PIECE: usize = 16 << 20;

/// How weights are kept on the device, and who hears how far they are.
pub struct Loading<'a> {
    /// Of matrices; none: as the checkpoint has each. Vectors (norms, biases) are always f32.
    pub precision: Option<Dtype>,
    /// Canonical names of what will train: f32.
    pub trains: &'a dyn Fn(&str) -> bool,
    /// Bytes of the checkpoint that are on the device, and all of them.
    pub progress: &'a mut dyn FnMut(u64, u64),
}

impl Loading<'_> {
    /// What a tensor of this name and shape, stored as `stored`, is on the device.
    fn dtype(&self, name: &str, shape: &[usize], stored: Dtype) -> Dtype {
        // Only what products and look-ups read may be packed.
        if shape.len() < 2 || name == names::POSITION_EMBEDDING || (self.trains)(name) {
            return Dtype::F32;
        }
        self.precision.unwrap_or(stored)
    }
}

/// The device's name of a dtype of files; blocks of a few bits are handed out as f32.
fn of_file(dtype: safetensors::Dtype) -> Dtype {
    match dtype {
        safetensors::Dtype::F16 => Dtype::F16,
        safetensors::Dtype::BF16 => Dtype::Bf16,
        _ => Dtype::F32,
    }
}

/// Brings tensors to one device, one after the other.
pub(super) struct Loader<'a, 'b> {
    gpu: &'a Gpu,
    folder: &'a ModelFolder,
    loading: &'a mut Loading<'b>,
    done: u64,
    total: u64,
}

impl<'a, 'b> Loader<'a, 'b> {
    /// For the tensors of these names, as far as the folder has them.
    pub fn new(
        gpu: &'a Gpu,
        folder: &'a ModelFolder,
        names: impl Iterator<Item = String>,
        loading: &'a mut Loading<'b>,
    ) -> Result<Self> {
        let mut total = 0;
        for name in names.filter(|name| folder.has(name)) {
            total += bytes(&folder.stored(&name)?);
        }
        Ok(Self { gpu, folder, loading, done: 0, total })
    }

    /// A tensor of the folder.
    pub fn stored(&mut self, name: &str) -> Result<Tensor> {
        let stored = self.folder.stored(name)?;
        let (from, shape) = (of_file(stored.dtype()), matrix(&stored.shape));
        let to = self.loading.dtype(name, &shape, from);
        if self.gpu.only_counts() {
            return Ok(Tensor::empty_of(self.gpu, to, &shape));
        }
        let mut upload = cast::Upload::new(self.gpu, from, to, &shape);
        for rows in stored.row_chunks(PIECE) {
            upload.push(&stored.bytes(rows)?);
        }
        self.done += bytes(&stored);
        (self.loading.progress)(self.done, self.total);
        Ok(upload.finish())
    }

    /// A tensor of the host, which is new and f32.
    pub fn fresh(&self, tensor: &HostTensor) -> Tensor {
        Tensor::from_f32(self.gpu, &tensor.data, &matrix(&tensor.shape))
    }
}

fn bytes(stored: &StoredTensor) -> u64 {
    (stored.len() * stored.dtype().bitsize() / 8) as u64
}

/// A convolution's weight [D, C, p, p] as the matrix [D, C * p * p] that its product is; other shapes as they are.
fn matrix(shape: &[usize]) -> Vec<usize> {
    if shape.len() > 2 { vec![shape[0], shape[1..].iter().product()] } else { shape.to_vec() }
}
