//! A tensor whose content waits on the host.

use super::{Dtype, Tensor};
use crate::gpu::{Download, Gpu};

/// The content of a tensor on the host, or on its way there.
pub struct Offloaded {
    gpu: Gpu,
    dtype: Dtype,
    shape: Vec<usize>,
    download: Download,
}

impl Offloaded {
    pub(super) fn new(tensor: &Tensor) -> Self {
        let size = tensor.dtype.padded_bytes(tensor.len());
        let download = tensor.gpu.download(&tensor.buffer, tensor.byte_offset(0), size);
        Self { gpu: tensor.gpu.clone(), dtype: tensor.dtype, shape: tensor.shape.clone(), download }
    }

    /// The tensor again, in other memory of the device.
    pub fn restore(self) -> Tensor {
        let tensor = Tensor::empty_of(&self.gpu, self.dtype, &self.shape);
        self.gpu.write(&tensor.buffer, 0, &self.gpu.downloaded(self.download));
        tensor
    }
}
