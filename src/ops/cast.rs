//! y = x in another float type, rounded to nearest, ties to even, where it is narrower. PyTorch: `x.to(dtype)`.
//!
//! Every value of a 16-bit type widens exactly; NaN stays NaN, and what is too large for f16 becomes infinite.
//! [`Upload`] converts while a tensor arrives.

use super::{
    Case, Comparison, Cost, Op, Random, Shapes, THREADS, case::random, elementwise::bindable_elements, groups_for, nf4,
    testing::wide,
};
use crate::{
    error::Result,
    gpu::{Binding, Gpu},
    tensor::{self, Dtype, Tensor},
};

/// x in another type; a handle of x itself where it has that type.
pub fn cast(x: &Tensor, to: Dtype) -> Tensor {
    if x.dtype() == to {
        return x.clone();
    }
    let y = Tensor::empty_of(x.gpu(), to, x.shape());
    cast_into(x, 0, &y, 0, x.len());
    y
}

/// Writes `count` elements of x, from `x_start` on, to y from `y_start` on, in y's type, which is another one. Where
/// y is packed, `y_start` is even, and an odd `count` ends where y does.
pub fn cast_into(x: &Tensor, x_start: usize, y: &Tensor, y_start: usize, count: usize) {
    assert!(x_start + count <= x.len() && y_start + count <= y.len(), "{count} elements of {x:?} into {y:?}");
    if x.dtype().is_quantized() && y.dtype() == Dtype::F32 {
        return nf4::dequantize_into(x, &nf4::factors(x), x_start, y, y_start, count);
    }
    let (kernel, wide) = match (x.dtype(), y.dtype()) {
        (Dtype::Bf16, Dtype::F32) => ("cast.to_f32.bf16", Some("cast.to_f32_wide.bf16")),
        (Dtype::F16, Dtype::F32) => ("cast.to_f32.f16", Some("cast.to_f32_wide.f16")),
        (Dtype::F32, Dtype::Bf16) => ("cast.to_half.bf16", Some("cast.to_half_wide.bf16")),
        (Dtype::F32, Dtype::F16) => ("cast.to_half.f16", Some("cast.to_half_wide.f16")),
        (Dtype::Bf16, Dtype::F16) => ("cast.to_half.bf16_f16", None),
        (Dtype::F16, Dtype::Bf16) => ("cast.to_half.f16_bf16", None),
        (from, to) => panic!("no cast from {from:?} to {to:?}"),
    };
    let packed = y.dtype().is_packed();
    assert!(!packed || count.is_multiple_of(2) || y_start + count == y.len(), "{count} elements into words of {y:?}");
    for (first, count) in bindable_elements(x.gpu(), count) {
        let (from, x_offset) = bind(x, x_start + first, count);
        let (to, y_offset) = bind(y, y_start + first, count);
        assert!(!packed || y_offset.is_multiple_of(2), "elements into {y:?} from the middle of a word on");
        let even = [x_offset, y_offset, count].iter().all(|n| n.is_multiple_of(4));
        let (kernel, groups) = match wide.filter(|_| even) {
            Some(wide) => (wide, groups_for(count / 4, 4 * THREADS)),
            // `to_f32` has a thread for each word of x, `to_half` for each of y.
            None if packed => (kernel, groups_for(count.div_ceil(2), THREADS)),
            None => (kernel, groups_for((x_offset % 2 + count).div_ceil(2), THREADS)),
        };
        x.gpu().dispatch(kernel, &[from, to], &[count as u32, x_offset as u32, y_offset as u32], groups);
    }
}

/// Elements in a binding, and how many elements later than it they begin.
fn bind(tensor: &Tensor, start: usize, count: usize) -> (Binding<'_>, usize) {
    if tensor.dtype().is_packed() { tensor.packed_range(start, count) } else { tensor.range_from(start, count) }
}

/// Elements that a device converts at once: what a conversion holds there beside the tensor.
const CHUNK: usize = 8 << 20;
/// Bytes that the host converts at once.
const HOST_CHUNK: usize = 1 << 20;

/// A tensor that arrives as one type and is kept as another.
pub struct Upload {
    from: Dtype,
    missing: usize,
    to: Target,
}

enum Target {
    /// Converted by the host, or not at all; with the bytes of an element that has arrived in part.
    Host(tensor::Upload, Vec<u8>),
    /// Converted by the device, chunk by chunk: the tensor, how many elements of it are there, and the next chunk.
    Device(Tensor, usize, tensor::Upload),
}

impl Upload {
    /// For elements of type `from` that are to be kept as `to`.
    pub fn new(gpu: &Gpu, from: Dtype, to: Dtype, shape: &[usize]) -> Self {
        let elements: usize = shape.iter().product();
        // Where kernels run on the host's processor, its own code is faster than they are.
        let target = if from == to || gpu.is_cpu() {
            Target::Host(Tensor::upload(gpu, to, shape), Vec::new())
        } else {
            Target::Device(Tensor::empty_of(gpu, to, shape), 0, Tensor::upload(gpu, from, &[CHUNK.min(elements)]))
        };
        Self { from, missing: elements * from.bytes(), to: target }
    }

    /// Bytes (of the type that arrives) that are still to come.
    pub fn missing(&self) -> usize {
        self.missing
    }

    /// As [`tensor::Upload::push`].
    pub fn push(&mut self, bytes: &[u8]) {
        assert!(bytes.len() <= self.missing, "{} bytes where {} are missing", bytes.len(), self.missing);
        self.missing -= bytes.len();
        match &mut self.to {
            Target::Host(upload, _) if upload.dtype() == self.from => upload.push(bytes),
            Target::Host(upload, partial) => push_converted(upload, partial, self.from, bytes),
            Target::Device(y, done, arriving) => {
                let mut bytes = bytes;
                while !bytes.is_empty() {
                    let (now, rest) = bytes.split_at(bytes.len().min(arriving.missing()));
                    arriving.push(now);
                    bytes = rest;
                    if arriving.missing() == 0 {
                        let left = y.len() - *done - arriving.len();
                        let next = Tensor::upload(y.gpu(), self.from, &[left.min(CHUNK)]);
                        let chunk = std::mem::replace(arriving, next).finish();
                        cast_into(&chunk, 0, y, *done, chunk.len());
                        *done += chunk.len();
                    }
                }
            }
        }
    }

    /// As [`tensor::Upload::finish`].
    pub fn finish(self) -> Tensor {
        assert_eq!(self.missing, 0, "bytes that are still missing");
        match self.to {
            Target::Host(upload, _) => upload.finish(),
            Target::Device(y, ..) => y,
        }
    }
}

/// Converts bytes, the first of which may complete an element.
fn push_converted(upload: &mut tensor::Upload, partial: &mut Vec<u8>, from: Dtype, mut bytes: &[u8]) {
    let to = upload.dtype();
    if !partial.is_empty() {
        let (now, rest) = bytes.split_at(bytes.len().min(from.bytes() - partial.len()));
        partial.extend_from_slice(now);
        bytes = rest;
        if partial.len() < from.bytes() {
            return;
        }
        upload.push(&to.narrow(&from.widen(partial)));
        partial.clear();
    }
    let (whole, rest) = bytes.split_at(bytes.len() / from.bytes() * from.bytes());
    for chunk in whole.chunks(HOST_CHUNK) {
        upload.push(&to.narrow(&from.widen(chunk)));
    }
    partial.extend_from_slice(rest);
}

fn check(gpu: &Gpu, n: usize) -> Result<Vec<Comparison>> {
    let mut random = Random::new(n as u64);
    let (rows, cols) = (n + 2, n);
    // Among them ties of both types, and subnormals of f16.
    let mut values = random.values(rows * cols);
    values.iter_mut().step_by(3).for_each(|x| *x = f32::from_bits(x.to_bits() & 0xffff_8000));
    values.iter_mut().step_by(5).for_each(|x| *x *= 1e-5);
    let x = Tensor::from_f32(gpu, &values, &[rows, cols]);
    let mut out = Vec::new();
    for (narrow, other) in [(Dtype::Bf16, Dtype::F16), (Dtype::F16, Dtype::Bf16)] {
        let rounded = narrow.widen(&narrow.narrow(&values));
        let half = cast(&x, narrow);
        out.push(Comparison::new("narrowed", half.to_vec()?, wide(&rounded), 0.0));
        out.push(Comparison::new("widened again", cast(&half, Dtype::F32).to_vec()?, wide(&rounded), 0.0));
        let twice = other.widen(&other.narrow(&rounded));
        out.push(Comparison::new("narrowed from 16 bits", cast(&half, other).to_vec()?, wide(&twice), 0.0));
        // From an odd element on, to a place further on.
        let y = Tensor::empty(gpu, &[rows + 1, cols]);
        cast_into(&half, 0, &y, 0, rows * cols);
        cast_into(&half, 1, &y, cols, rows * cols - 1);
        let mut want = wide(&rounded[..cols]);
        want.extend(wide(&rounded[1..]));
        let mut got = y.to_vec()?;
        got.truncate(want.len());
        out.push(Comparison::new("widened from the second element on", got, want, 0.0));
    }
    Ok(out)
}

fn cases(shapes: &Shapes) -> Vec<Case> {
    let size = [shapes.hidden, shapes.hidden];
    let case = |pass, from, to| {
        let shape = format!("{}x{}", size[0], size[1]);
        Case::of(pass, shape, Cost::each(size[0] * size[1], 0, 6)).run(move |gpu| {
            let x = random(gpu, from, &size);
            move || cast(&x, to)
        })
    };
    vec![
        case("bf16 to f32", Dtype::Bf16, Dtype::F32),
        case("f32 to bf16", Dtype::F32, Dtype::Bf16),
        case("f16 to f32", Dtype::F16, Dtype::F32),
        case("f32 to f16", Dtype::F32, Dtype::F16),
    ]
}

pub const OP: Op = Op { name: "cast", check, cases, cost: |n| Cost { flops: 0, bytes: 6 * ((n + 2) * n) as u64 } };
