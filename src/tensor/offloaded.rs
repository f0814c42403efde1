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
    /// Of f32 tensors of one device, at least one.
    pub fn of(tensors: &[Tensor]) -> Self {
        assert!(tensors.iter().all(|tensor| tensor.dtype == Dtype::F32), "f32: {tensors:?}");
        let part = |tensor: &'_ Tensor| (tensor.byte_offset(0), (tensor.len() * 4) as u64);
        let parts: Vec<_> = tensors.iter().map(|tensor| (&*tensor.buffer, part(tensor))).collect();
        let gpu = tensors[0].gpu.clone();
        let download = gpu.download(&parts);
        Self { gpu, download }
    }

    /// Waits for them.
    ///
    /// # Errors
    /// Whatever has failed on the device so far.
    pub fn wait(self) -> Result<Vec<f32>> {
        let bytes = self.gpu.downloaded(self.download);
        self.gpu.check()?;
        Ok(bytemuck::pod_collect_to_vec(&bytes))
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
        let tensor = Tensor::empty_of(&self.gpu, self.dtype, &self.shape);
        self.gpu.write(&tensor.buffer, 0, &self.gpu.downloaded(self.download));
        tensor
    }
}
