//! Tensors whose content is on its way to the host, or waits there.

use super::{Dtype, Tensor};
use crate::{
    error::Result,
    gpu::{Download, Gpu},
};

/// The contents of tensors, one behind the other, on their way to the host.
pub struct Downloading {
    gpu: Gpu,
    download: Download,
}

impl Downloading {
    /// Of tensors of one device, whole words each.
    pub fn of(gpu: &Gpu, tensors: &[Tensor]) -> Self {
        let part = |tensor: &'_ Tensor| (tensor.byte_offset(0), tensor.dtype.padded_bytes(tensor.len()));
        let parts: Vec<_> = tensors.iter().map(|tensor| (&*tensor.buffer, part(tensor))).collect();
        Self { gpu: gpu.clone(), download: gpu.download(&parts) }
    }

    /// Whether [`Downloading::bytes`] has nothing to wait for.
    pub fn has_arrived(&self) -> bool {
        self.gpu.has_arrived(&self.download)
    }

    /// Waits for their bytes.
    ///
    /// # Errors
    /// Whatever has failed on the device so far.
    pub fn bytes(self) -> Result<Vec<u8>> {
        let bytes = self.gpu.downloaded(self.download);
        self.gpu.check()?;
        Ok(bytes)
    }
}

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
        let download = tensor.gpu.download(&[(&*tensor.buffer, (tensor.byte_offset(0), size))]);
        Self { gpu: tensor.gpu.clone(), dtype: tensor.dtype, shape: tensor.shape.clone(), download }
    }

    /// The tensor again, in other memory of the device.
    pub fn restore(self) -> Tensor {
        let gpu = self.gpu.clone();
        self.restore_on(&gpu)
    }

    /// The tensor in the memory of any device.
    pub fn restore_on(self, gpu: &Gpu) -> Tensor {
        let tensor = Tensor::empty_of(gpu, self.dtype, &self.shape);
        gpu.write(&tensor.buffer, 0, &self.gpu.downloaded(self.download));
        tensor
    }
}
