//! Weights from a model folder to the device, in pieces: the host never holds a whole tensor.

use super::{names, placement::Placement, streaming::Resting};
use crate::{
    error::Result,
    formats::{HostTensor, model_folder::ModelFolder, safetensors, stored::StoredTensor},
    gpu::Gpu,
    ops::{cast, nf4},
    quant::QuantType,
    tensor::{Dtype, Rounding, Tensor},
};

/// Bytes of a file that are on their way at a time.
const PIECE: usize = 16 << 20;

/// How weights are kept on the device, and who hears how far they are.
pub struct Loading<'a> {
    /// Of matrices; none: as the checkpoint has each. Vectors (norms, biases) are always f32.
    pub precision: Option<Dtype>,
    /// The decoder's linears become codes of four bits; none: what is stored so stays so, and nothing else becomes it.
    pub quantization: Option<Quantization>,
    /// Canonical names of what will train.
    pub trains: &'a dyn Fn(&str) -> bool,
    /// Matrices that train are f32, masters or weights; else as all others.
    pub trains_in_f32: bool,
    /// Where the layers of the decoder rest that take turns on the device.
    pub resting: Option<&'a Resting>,
    /// Bytes of the checkpoint that are on the device, and all of them.
    pub progress: &'a mut dyn FnMut(u64, u64),
}

/// Weights that are quantised as they come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantization {
    pub kind: QuantType,
    /// Factors in eight bits.
    pub double: bool,
    /// The head too.
    pub lm_head: bool,
}

impl Quantization {
    /// Whether the tensor of a canonical name is to be quantised.
    pub fn takes(self, name: &str) -> bool {
        match name.strip_prefix(names::DECODER_LAYERS) {
            // Norms are vectors, and no linear of a layer.
            Some(within) => within.ends_with("_proj.weight"),
            None => self.lm_head && name == names::LM_HEAD,
        }
    }
}

impl<'a> Loading<'a> {
    /// Of a model none of which trains, with matrices in `precision` and nothing quantised that is not stored so.
    pub fn of_frozen(precision: Option<Dtype>, progress: &'a mut dyn FnMut(u64, u64)) -> Self {
        Self { precision, quantization: None, trains: &|_| false, trains_in_f32: true, resting: None, progress }
    }

    /// How a matrix is quantised, if it is.
    fn quantization(&self, name: &str, shape: &[usize]) -> Option<Quantization> {
        self.quantization.filter(|wanted| wanted.takes(name) && shape.len() == 2 && !(self.trains)(name))
    }

    /// Whether what is stored in four bits stays so: where products alone read it.
    fn keeps_packed(&self, name: &str, shape: &[usize]) -> bool {
        let looked_up = [names::EMBED_TOKENS, names::POSITION_EMBEDDING].contains(&name);
        shape.len() == 2 && !looked_up && !(self.trains)(name)
    }

    /// What a tensor of this name and shape, stored as `stored`, is on the device.
    fn dtype(&self, name: &str, shape: &[usize], stored: Dtype) -> Dtype {
        // Only what products and look-ups read may be packed.
        let wide = self.trains_in_f32 && (self.trains)(name);
        if shape.len() < 2 || name == names::POSITION_EMBEDDING || wide {
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

/// Brings tensors to their devices, one after the other.
pub(super) struct Loader<'a, 'b> {
    placement: &'a Placement,
    folder: &'a ModelFolder,
    loading: &'a mut Loading<'b>,
    done: u64,
    total: u64,
}

impl<'a, 'b> Loader<'a, 'b> {
    /// For the tensors of these names, as far as the folder has them.
    pub fn new(
        placement: &'a Placement,
        folder: &'a ModelFolder,
        names: impl Iterator<Item = String>,
        loading: &'a mut Loading<'b>,
    ) -> Result<Self> {
        let mut total = 0;
        for name in names.filter(|name| folder.has(name)) {
            total += bytes(&folder.stored(&name)?);
        }
        Ok(Self { placement, folder, loading, done: 0, total })
    }

    /// Whether a tensor of this name trains.
    pub fn trains(&self, name: &str) -> bool {
        (self.loading.trains)(name)
    }

    /// A tensor of the folder.
    pub fn stored(&mut self, name: &str) -> Result<Tensor> {
        let stored = self.folder.stored(name)?;
        let (from, shape) = (of_file(stored.dtype()), matrix(&stored.shape));
        let gpu = self.placement.gpu_of(name);
        if gpu.only_counts() {
            return Ok(self.counted(gpu, name, &shape, &stored));
        }
        let tensor = if let Some(packed) = stored.packed().filter(|_| self.loading.keeps_packed(name, &shape)) {
            self.for_precision(Tensor::from_codes(gpu, packed.kind, &shape, packed.codes, &packed.factors()), from)
        } else if let Some(Quantization { kind, double, .. }) = self.loading.quantization(name, &shape) {
            let mut upload = nf4::Upload::new(gpu, from, kind, double, &shape);
            for rows in stored.row_chunks(PIECE) {
                upload.push(&stored.bytes(rows)?);
            }
            self.for_precision(upload.finish()?, from)
        } else {
            let to = self.loading.dtype(name, &shape, from);
            let mut upload = cast::Upload::new(gpu, from, to, &shape);
            for rows in stored.row_chunks(PIECE) {
                upload.push(&stored.bytes(rows)?);
            }
            upload.finish()
        };
        self.done += bytes(&stored);
        (self.loading.progress)(self.done, self.total);
        Ok(tensor)
    }

    /// A weight in four bits, whose products round as those of one in the type that it would be kept in otherwise.
    fn for_precision(&self, weight: Tensor, stored: Dtype) -> Tensor {
        weight.with_rounding(Rounding::of(self.loading.precision.unwrap_or(stored)))
    }

    /// A tensor of the memory that the stored one would take, on a device that only counts.
    fn counted(&self, gpu: &Gpu, name: &str, shape: &[usize], stored: &StoredTensor) -> Tensor {
        let from = of_file(stored.dtype());
        if let Some(packed) = stored.packed().filter(|_| self.loading.keeps_packed(name, shape)) {
            return self.for_precision(Tensor::empty_quantized(gpu, packed.kind, packed.is_nested(), shape), from);
        }
        match self.loading.quantization(name, shape) {
            Some(Quantization { kind, double, .. }) => {
                self.for_precision(Tensor::empty_quantized(gpu, kind, double, shape), from)
            }
            None => Tensor::empty_of(gpu, self.loading.dtype(name, shape, from), shape),
        }
    }

    /// A tensor of the host, which is new and f32.
    pub fn fresh(&self, name: &str, tensor: &HostTensor) -> Tensor {
        Tensor::from_f32(self.placement.gpu_of(name), &tensor.data, &matrix(&tensor.shape))
    }
}

fn bytes(stored: &StoredTensor) -> u64 {
    if let Some(packed) = stored.packed() {
        return packed.codes.len() as u64;
    }
    (stored.len() * stored.dtype().bitsize() / 8) as u64
}

/// A convolution's weight [D, C, p, p] as the matrix [D, C * p * p] that its product is; other shapes as they are.
fn matrix(shape: &[usize]) -> Vec<usize> {
    if shape.len() > 2 { vec![shape[0], shape[1..].iter().product()] } else { shape.to_vec() }
}
