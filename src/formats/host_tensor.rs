//! A tensor in host memory: what the file formats hand out and take in.

/// Row-major f32 values with their shape. A scalar has the empty shape and one value.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
}

impl HostTensor {
    /// Panics if the shape does not hold exactly `data.len()` values: a mistake of the caller, never of a file.
    pub fn new(shape: impl Into<Vec<usize>>, data: Vec<f32>) -> Self {
        let shape = shape.into();
        assert_eq!(shape.iter().product::<usize>(), data.len(), "shape {shape:?} does not hold {} values", data.len());
        Self { shape, data }
    }

    pub fn filled(shape: impl Into<Vec<usize>>, value: f32) -> Self {
        let shape = shape.into();
        let data = vec![value; shape.iter().product()];
        Self { shape, data }
    }

    pub fn zeros(shape: impl Into<Vec<usize>>) -> Self {
        Self::filled(shape, 0.0)
    }

    /// The identity matrix, `[size, size]`.
    pub fn identity(size: usize) -> Self {
        let mut matrix = Self::zeros([size, size]);
        matrix.data.iter_mut().step_by(size + 1).for_each(|value| *value = 1.0);
        matrix
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.data.len()
    }

    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// Whether this is exactly the identity matrix.
    pub fn is_identity(&self) -> bool {
        let &[rows, columns] = self.shape.as_slice() else { return false };
        let one_at = |(index, &value): (usize, &f32)| value == if index % (columns + 1) == 0 { 1.0 } else { 0.0 };
        rows == columns && self.data.iter().enumerate().all(one_at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_is_recognised_and_nothing_else() {
        let mut matrix = HostTensor::identity(3);
        assert_eq!(matrix.data, [1., 0., 0., 0., 1., 0., 0., 0., 1.]);
        assert!(matrix.is_identity());
        matrix.data[1] = 1e-30;
        assert!(!matrix.is_identity());
        assert!(!HostTensor::zeros([2, 3]).is_identity());
        assert!(!HostTensor::filled([1], 1.0).is_identity());
    }
}
