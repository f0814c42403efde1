//! What benches run of an op: the shapes of a model, and cases made of them.

use std::sync::LazyLock;

use super::{Cost, Random, roof};
use crate::{
    gpu::Gpu,
    tensor::{Dtype, Tensor},
};

/// The sizes of a model that ops meet.
#[derive(Clone, Copy, Debug)]
pub struct Shapes {
    pub model: &'static str,
    /// T: positions of a pass, one sequence.
    pub tokens: usize,
    /// D
    pub hidden: usize,
    /// F
    pub intermediate: usize,
    /// H
    pub heads: usize,
    /// E
    pub head_size: usize,
    /// V
    pub vocab: usize,
    /// Positions that have a target.
    pub targets: usize,
    /// R
    pub rank: usize,
    /// Of the vision tower: hidden size, patches of a picture.
    pub vision_hidden: usize,
    pub patches: usize,
}

impl Shapes {
    /// LLaMA 7B with CLIP ViT-L/14 at 336 pixels. A host processor gets fewer positions, so that it ends soon.
    pub fn of_7b(gpu: &Gpu) -> Self {
        let (tokens, targets, patches) = if gpu.is_cpu() { (64, 16, 64) } else { (2048, 512, 576) };
        Self {
            model: "7b",
            tokens,
            hidden: 4096,
            intermediate: 11_008,
            heads: 32,
            head_size: 128,
            vocab: 32_000,
            targets,
            rank: 128,
            vision_hidden: 1024,
            patches,
        }
    }

    /// The embedded model.
    pub fn of_tiny() -> Self {
        Self {
            model: "tiny",
            tokens: 512,
            hidden: 128,
            intermediate: 384,
            heads: 4,
            head_size: 32,
            vocab: 896,
            targets: 128,
            rank: 16,
            vision_hidden: 128,
            patches: 16,
        }
    }
}

/// What a run made: held until the run's next turn, so that no other run writes to the same memory.
#[derive(Default)]
pub struct Made(#[expect(dead_code, reason = "held, not read")] Vec<Tensor>);

impl From<()> for Made {
    fn from((): ()) -> Self {
        Self::default()
    }
}

impl From<Tensor> for Made {
    fn from(tensor: Tensor) -> Self {
        Self(vec![tensor])
    }
}

impl From<(Tensor, Tensor)> for Made {
    fn from((a, b): (Tensor, Tensor)) -> Self {
        Self(vec![a, b])
    }
}

impl From<(Tensor, Tensor, Tensor)> for Made {
    fn from((a, b, c): (Tensor, Tensor, Tensor)) -> Self {
        Self(vec![a, b, c])
    }
}

/// Records one run on one set of buffers.
pub type Run = Box<dyn FnMut() -> Made>;

/// A thing to be timed.
pub struct Case {
    /// What of the op: `forward`, a gradient, a use.
    pub pass: &'static str,
    /// Of the operands, for people.
    pub shape: String,
    pub cost: Cost,
    /// The roof of its arithmetic: a key of [`ROOFS`](super::roof::ROOFS).
    pub roof: fn(&Gpu) -> &'static str,
    prepare: Box<dyn Fn(&Gpu) -> Run>,
}

/// A case that lacks what it runs.
pub struct Outline(&'static str, String, Cost, fn(&Gpu) -> &'static str);

impl Case {
    pub fn of(pass: &'static str, shape: String, cost: Cost) -> Outline {
        Outline(pass, shape, cost, |_| roof::FMA)
    }

    /// A new set of buffers, and what runs on it.
    pub fn prepare(&self, gpu: &Gpu) -> Run {
        (self.prepare)(gpu)
    }
}

impl Outline {
    /// Its arithmetic has another roof than f32's.
    pub fn limited_by(self, roof: fn(&Gpu) -> &'static str) -> Self {
        Self(self.0, self.1, self.2, roof)
    }

    /// `prepare` makes one set of buffers, and what runs on it.
    pub fn run<M: Into<Made>, R: FnMut() -> M + 'static>(self, prepare: impl Fn(&Gpu) -> R + 'static) -> Case {
        let Self(pass, shape, cost, roof) = self;
        let prepare = move |gpu: &Gpu| -> Run {
            let mut run = prepare(gpu);
            Box::new(move || run().into())
        };
        Case { pass, shape, cost, roof, prepare: Box::new(prepare) }
    }
}

impl Cost {
    /// Of `elements` elements: operations and bytes of each.
    pub fn each(elements: usize, flops: usize, bytes: usize) -> Self {
        Self { flops: (elements * flops) as u64, bytes: (elements * bytes) as u64 }
    }
}

/// A length of no power of two, so that rows differ.
const BLOCK: usize = (1 << 20) - 3;
static BLOCK_OF_VALUES: LazyLock<Vec<f32>> = LazyLock::new(|| Random::new(7).values(BLOCK));

/// Values in [-1, 1), the same block again and again.
pub fn random(gpu: &Gpu, dtype: Dtype, shape: &[usize]) -> Tensor {
    repeated(gpu, dtype, shape, &BLOCK_OF_VALUES)
}

/// These values, again and again.
pub fn repeated(gpu: &Gpu, dtype: Dtype, shape: &[usize], values: &[f32]) -> Tensor {
    let elements: usize = shape.iter().product();
    let block = dtype.narrow(&values[..elements.min(values.len())]);
    let mut upload = Tensor::upload(gpu, dtype, shape);
    while upload.missing() > 0 {
        upload.push(&block[..block.len().min(upload.missing())]);
    }
    upload.finish()
}

/// [`random`] in f32.
pub fn floats(gpu: &Gpu, shape: &[usize]) -> Tensor {
    random(gpu, Dtype::F32, shape)
}
