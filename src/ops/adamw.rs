//! One update of AdamW with decoupled weight decay and clipping by the global norm:
//! g' = g * min(1, max_norm / (|g| + 1e-6)); p = p (1 - lr wd); m = b1 m + (1 - b1) g'; v = b2 v + (1 - b2) g'^2;
//! p = p - lr (m / (1 - b1^t)) / (sqrt(v) / sqrt(1 - b2^t) + eps).
//! PyTorch: `torch.nn.utils.clip_grad_norm_`, then `torch.optim.AdamW.step`.
//!
//! [`Weights`] says what of a parameter there is on the device: f32, f32 and a copy in 16 bits, or bfloat16 alone.

use super::{
    Case, Comparison, Cost, Op, Random, Shapes, THREADS,
    case::{floats, random},
    elementwise::{self, bindable_elements},
    groups_for,
};
use crate::{
    error::Result,
    gpu::{Binding, Gpu},
    tensor::{Dtype, Tensor},
};
use rayon::prelude::*;

/// The constants of one update, the same for all parameters of a group.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    /// Per unit of learning rate.
    pub weight_decay: f64,
    /// The largest norm that all gradients together may have; 0 for no limit.
    pub max_norm: f64,
    /// What gradients are multiplied with before anything else: 1 over the loss's scale.
    pub gradient_scale: f64,
    /// Updates with this one included: 1 at the first.
    pub t: u64,
}

/// What an update changes: parameters of N elements, all of one kind.
#[derive(Clone, Copy, Debug)]
pub enum Weights<'a> {
    /// f32 [N].
    Full(&'a Tensor),
    /// f32 [N], and its copy in 16 bits [N], rounded to nearest, ties to even: what the model reads.
    Master(&'a Tensor, &'a Tensor),
    /// bfloat16 [N] and nothing beside it, rounded up or down at random so that the mean is the exact value.
    Stochastic(&'a Tensor, Draw),
}

/// Which random words a rounding draws: the same draw always gives the same words.
#[derive(Clone, Copy, Debug)]
pub struct Draw {
    pub seed: u32,
    pub step: u32,
    /// The place of the tensor's first element among all that are rounded, a multiple of 4.
    pub first: usize,
}

impl Weights<'_> {
    pub fn len(&self) -> usize {
        self.tensor().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn tensor(&self) -> &Tensor {
        match self {
            Self::Full(tensor) | Self::Master(tensor, _) | Self::Stochastic(tensor, _) => tensor,
        }
    }

    /// The variant of the kernel `name` for them.
    pub(super) fn kernel(&self, name: &'static str) -> String {
        match self {
            Self::Full(_) => name.to_owned(),
            Self::Master(_, copy) => match copy.dtype() {
                Dtype::Bf16 => format!("{name}.bf16"),
                Dtype::F16 => format!("{name}.f16"),
                other => panic!("a copy in {other:?} of weights in f32"),
            },
            Self::Stochastic(weights, _) => {
                assert_eq!(weights.dtype(), Dtype::Bf16, "rounded at random");
                format!("{name}.stochastic")
            }
        }
    }

    /// The last bindings of either kernel for `count` elements from `first` on, and how many elements earlier the
    /// packed one begins.
    pub(super) fn bindings(&self, first: usize, count: usize) -> (Vec<Binding<'_>>, usize) {
        match self {
            Self::Full(tensor) => (vec![tensor.range(first, count)], 0),
            Self::Master(master, copy) => {
                let (copy, before) = copy.packed_range(first, count);
                (vec![master.range(first, count), copy], before)
            }
            Self::Stochastic(tensor, _) => {
                let (tensor, before) = tensor.packed_range(first, count);
                (vec![tensor], before)
            }
        }
    }
}

/// Updates parameters and their moments, all of one size, in place. `square_sum` [1] is the sum of the squares of all
/// gradients of the model, as [`super::reduce::add_square_sum`] makes it: read on the device, so that nothing waits
/// for it. Where it is infinite or not a number, nothing changes.
pub fn step(
    weights: Weights<'_>,
    gradient: &Tensor,
    first_moment: &Tensor,
    second_moment: &Tensor,
    square_sum: &Tensor,
    step: &Step,
) {
    let (gpu, tensors) = (gradient.gpu(), [gradient, first_moment, second_moment]);
    assert!(tensors.iter().all(|tensor| tensor.len() == weights.len()), "{weights:?} and {tensors:?} in one update");
    let kernel = weights.kernel("adamw.step");
    for (first, count) in bindable_elements(gpu, weights.len()) {
        let quads = count.div_ceil(4);
        let (last, before) = weights.bindings(first, count);
        let mut bindings = tensors.map(|tensor| tensor.range(first, count)).to_vec();
        bindings.push(square_sum.binding());
        bindings.extend(last);
        let params = step.params(quads, &weights, first, before, 0);
        gpu.dispatch(&kernel, &bindings, &params, groups_for(quads, THREADS));
    }
}

impl Step {
    /// What is taken where an update is only timed.
    pub fn usual() -> Self {
        Self {
            learning_rate: 1e-5,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            max_norm: 1.0,
            gradient_scale: 1.0,
            t: 1000,
        }
    }

    /// `Params` of the kernels: `count` vec4s or blocks, from element `first` of the weights on, whose packed binding
    /// begins `before` elements earlier, as that of the absmax does `absmax_before` blocks.
    pub(super) fn params(
        &self,
        count: usize,
        weights: &Weights<'_>,
        first: usize,
        before: usize,
        absmax_before: usize,
    ) -> [u32; 15] {
        let c = self.constants().map(f32::to_bits);
        let (seed, step, place) = match weights {
            Weights::Stochastic(_, draw) => {
                let place = (draw.first + first) / 4;
                // The words' own number has 32 bits.
                (draw.seed ^ ((place as u64 >> 32) as u32) << 20, draw.step, place)
            }
            _ => (0, 0, 0),
        };
        let [count, before, absmax_before, place] = [count, before / 4, absmax_before, place].map(|n| n as u32);
        [count, c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], before, absmax_before, seed, step, place]
    }

    /// `Params` of the kernels after their count.
    pub(super) fn constants(&self) -> [f32; 9] {
        let (beta1, beta2) = (self.beta1 as f32, self.beta2 as f32);
        // The corrections are those of the rounded betas that the moments are made with: 1 - 0.999 in f32 is off by
        // 1e-5 of itself, and so the first steps would be too.
        let correction = |beta: f32| 1.0 - (self.t as f64 * f64::from(beta).ln()).exp();
        [
            self.learning_rate as f32,
            beta1,
            beta2,
            self.epsilon as f32,
            (1.0 - self.learning_rate * self.weight_decay) as f32,
            correction(beta1) as f32,
            correction(beta2).sqrt() as f32,
            self.max_norm as f32,
            self.gradient_scale as f32,
        ]
    }

    /// What gradients are multiplied with whose squares have this sum.
    pub(super) fn gradient_factor(&self, square_sum: f64) -> f64 {
        let norm = square_sum.sqrt() * self.gradient_scale;
        let clip = if self.max_norm > 0.0 { (self.max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
        self.gradient_scale * clip
    }
}

/// Elements that one core updates at once.
const HOST_CHUNK: usize = 1 << 14;

/// [`step`] on the host, of f32 parameters, in the order of the kernel's operations and on all cores: within a rounding
/// or two of what a device gives, whose compiler may fuse or approximate.
pub fn step_on_host(
    parameter: &mut [f32],
    gradient: &[f32],
    first_moment: &mut [f32],
    second_moment: &mut [f32],
    square_sum: f32,
    step: &Step,
) {
    if !square_sum.is_finite() {
        return;
    }
    let [learning_rate, beta1, beta2, epsilon, decay, correction1, correction2, max_norm, scale] = step.constants();
    let clip = if max_norm > 0.0 { (max_norm / (square_sum.sqrt() * scale + 1e-6)).min(1.0) } else { 1.0 };
    let (factor, rate) = (scale * clip, learning_rate / correction1);
    let chunks = parameter.par_chunks_mut(HOST_CHUNK).zip(gradient.par_chunks(HOST_CHUNK));
    let moments = first_moment.par_chunks_mut(HOST_CHUNK).zip(second_moment.par_chunks_mut(HOST_CHUNK));
    chunks.zip(moments).for_each(|((parameter, gradient), (first, second))| {
        for (((p, g), m), v) in parameter.iter_mut().zip(gradient).zip(first).zip(second) {
            let g = g * factor;
            *m = beta1 * *m + (1.0 - beta1) * g;
            *v = beta2 * *v + (1.0 - beta2) * g * g;
            *p = *p * decay - rate * (*m / (v.sqrt() / correction2 + epsilon));
        }
    });
}

/// The state of a parameter on the host.
#[derive(Clone, Debug)]
pub struct Reference {
    pub parameter: Vec<f64>,
    pub first_moment: Vec<f64>,
    pub second_moment: Vec<f64>,
}

impl Reference {
    /// Moments are zero.
    pub fn new(parameter: Vec<f64>) -> Self {
        let zeros = vec![0.0; parameter.len()];
        Self { parameter, first_moment: zeros.clone(), second_moment: zeros }
    }

    /// The update on the host.
    pub fn step(&mut self, gradient: &[f64], square_sum: f64, step: &Step) {
        if !square_sum.is_finite() {
            return;
        }
        let factor = step.gradient_factor(square_sum);
        let correction1 = 1.0 - step.beta1.powf(step.t as f64);
        let correction2 = 1.0 - step.beta2.powf(step.t as f64);
        for (i, g) in gradient.iter().map(|g| g * factor).enumerate() {
            let (m, v) = (&mut self.first_moment[i], &mut self.second_moment[i]);
            *m = step.beta1 * *m + (1.0 - step.beta1) * g;
            *v = step.beta2 * *v + (1.0 - step.beta2) * g * g;
            let change = (*m / correction1) / ((*v / correction2).sqrt() + step.epsilon);
            let p = &mut self.parameter[i];
            *p = *p * (1.0 - step.learning_rate * step.weight_decay) - step.learning_rate * change;
        }
    }
}

fn check(gpu: &Gpu, n: usize) -> Result<Vec<Comparison>> {
    let mut out = Vec::new();
    for (what, max_norm) in [("parameter, no clipping", 0.0), ("parameter, clipped", 0.1)] {
        let mut random = Random::new(n as u64);
        let shape = [n, n + 3];
        let (p, tp) = random.tensor(gpu, &shape);
        let (m, v) = (super::elementwise::zeros(gpu, &shape), super::elementwise::zeros(gpu, &shape));
        let mut host = Reference::new(super::testing::wide(&p));
        let (mut hp, mut hm, mut hv) = (p.clone(), vec![0.0; p.len()], vec![0.0; p.len()]);
        let constants = Step {
            learning_rate: 0.01,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.1,
            max_norm,
            gradient_scale: 1.0,
            t: 0,
        };
        for t in 1..=3 {
            let (narrow, tg) = random.tensor(gpu, &shape);
            let g = super::testing::wide(&narrow);
            let constants = Step { t, ..constants };
            let square_sum = g.iter().map(|g| g * g).sum::<f64>();
            let tsum = Tensor::from_f32(gpu, &[square_sum as f32], &[1]);
            step(Weights::Full(&tp), &tg, &m, &v, &tsum, &constants);
            host.step(&g, square_sum, &constants);
            step_on_host(&mut hp, &narrow, &mut hm, &mut hv, square_sum as f32, &constants);
        }
        let before = [tp.to_vec()?, m.to_vec()?, v.to_vec()?];
        for bad in [f32::INFINITY, f32::NAN] {
            let (_, tg) = random.tensor(gpu, &shape);
            let square_sum = Tensor::from_f32(gpu, &[bad], &[1]);
            step(Weights::Full(&tp), &tg, &m, &v, &square_sum, &Step { t: 4, ..constants });
        }
        let after = [tp.to_vec()?, m.to_vec()?, v.to_vec()?].concat();
        let unchanged = super::testing::wide(&before.concat());
        let [p, m, v] = before;
        // Both have rounded each operation; neither more than once more than the other.
        for (what, host, device) in
            [("host's parameter", &hp, &p), ("host's moment", &hm, &m), ("host's second", &hv, &v)]
        {
            out.push(Comparison::new(what, host.clone(), super::testing::wide(device), 5e-7));
        }
        out.extend([
            Comparison::new(what, p, host.parameter, 1e-6),
            Comparison::new("first moment", m, host.first_moment, 1e-6),
            // 1 - beta2 in f32.
            Comparison::new("second moment", v, host.second_moment, 2e-5),
            Comparison::new("after a gradient that is not finite", after, unchanged, 1e-9),
        ]);
        let count = shape[0] * shape[1];
        let (g, tg) = random.tensor(gpu, &[count]);
        let square_sum = Tensor::from_f32(gpu, &[g.iter().map(|g| g * g).sum()], &[1]);
        out.extend(check_narrow(gpu, count, |weights| {
            let [m, v] = [(); 2].map(|()| super::elementwise::zeros(gpu, &[count]));
            step(weights, &tg, &m, &v, &square_sum, &Step { t: 1, ..constants });
        })?);
    }
    Ok(out)
}

/// Weights in 16 bits against those in f32: `update` makes one update of `n` weights, the same at every call.
pub(super) fn check_narrow(gpu: &Gpu, n: usize, update: impl Fn(Weights<'_>)) -> Result<Vec<Comparison>> {
    let mut out = Vec::new();
    let values = Random::new(n as u64 + 1).values(n);
    let in_f32 = |values: &[f32]| -> Result<Vec<f32>> {
        let weights = Tensor::from_f32(gpu, values, &[n]);
        update(Weights::Full(&weights));
        weights.to_vec()
    };
    let exact = in_f32(&values)?;
    for dtype in [Dtype::Bf16, Dtype::F16] {
        let (master, copy) = (Tensor::from_f32(gpu, &values, &[n]), Tensor::empty_of(gpu, dtype, &[n]));
        update(Weights::Master(&master, &copy));
        let rounded = dtype.widen(&dtype.narrow(&exact));
        out.push(Comparison::new("master", master.to_vec()?, super::testing::wide(&exact), 0.0));
        out.push(Comparison::new("its copy", copy.to_vec()?, super::testing::wide(&rounded), 0.0));
    }
    let narrow = Dtype::Bf16.narrow(&values);
    let exact = in_f32(&Dtype::Bf16.widen(&narrow))?;
    let rounded = |step: u32, first: usize| -> Result<Vec<f32>> {
        let weights = Tensor::from_bytes(gpu, Dtype::Bf16, &narrow, &[n]);
        update(Weights::Stochastic(&weights, Draw { seed: 3, step, first }));
        weights.to_vec()
    };
    let got = rounded(1, 0)?;
    // In units of what lies between the two neighbours: never 1 away, and 0 in the mean.
    let away: Vec<f64> = got
        .iter()
        .zip(&exact)
        .map(|(&got, &exact)| {
            let low = exact.to_bits() & 0xffff_0000;
            let unit = f32::from_bits(low + 0x1_0000) - f32::from_bits(low);
            f64::from(got - exact) / f64::from(unit)
        })
        .collect();
    let far = away.iter().filter(|away| away.abs() >= 1.0).count() as f32;
    // Uniform fractions make the distances' deviation the root of 1/6.
    let deviations = away.iter().sum::<f64>() / (n as f64 / 6.0).sqrt();
    let flag = |wrong: bool| vec![f32::from(u8::from(wrong))];
    let again = rounded(1, 0)? != got;
    let (other_step, other_place) = (rounded(2, 0)? == got, rounded(1, 4 * n)? == got);
    out.extend([
        Comparison::new("weights that are no neighbour", vec![far], vec![0.0], 0.0),
        Comparison::new("weights rounded to one side", flag(deviations.abs() > 6.0), vec![0.0], 0.0),
        Comparison::new("the same draw, other weights", flag(again), vec![0.0], 0.0),
        Comparison::new("another step, the same weights", flag(other_step && n > 100), vec![0.0], 0.0),
        Comparison::new("another place, the same weights", flag(other_place && n > 100), vec![0.0], 0.0),
    ]);
    Ok(out)
}

fn cases(shapes: &Shapes) -> Vec<Case> {
    let size = [shapes.hidden, shapes.hidden];
    let case =
        |pass, bytes| Case::of(pass, format!("{}x{}", size[0], size[1]), Cost::each(size[0] * size[1], 14, bytes));
    vec![
        case("f32", 28).run(move |gpu| {
            let [p, g, m, v] = [(); 4].map(|()| floats(gpu, &size));
            elementwise::fill(&v, 1.0);
            let square_sum = Tensor::from_f32(gpu, &[1.0], &[1]);
            move || step(Weights::Full(&p), &g, &m, &v, &square_sum, &Step::usual())
        }),
        case("f32 and a copy in bf16", 30).run(move |gpu| {
            let [p, g, m, v] = [(); 4].map(|()| floats(gpu, &size));
            elementwise::fill(&v, 1.0);
            let (copy, square_sum) = (random(gpu, Dtype::Bf16, &size), Tensor::from_f32(gpu, &[1.0], &[1]));
            move || step(Weights::Master(&p, &copy), &g, &m, &v, &square_sum, &Step::usual())
        }),
    ]
}

pub const OP: Op = Op {
    name: "adamw",
    check,
    cases,
    cost: |n| {
        let elements = (n * (n + 3)) as u64;
        Cost { flops: 16 * elements, bytes: 28 * elements }
    },
};

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Step = Step {
        learning_rate: 0.01,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.1,
        max_norm: 0.0,
        gradient_scale: 1.0,
        t: 1,
    };

    /// Values of `torch.optim.AdamW` over three steps; it ran in f32, whose numbers near 2 lie 1.2e-7 apart.
    #[test]
    fn the_reference_is_torch() {
        let gradients = [[0.1, -0.2, 0.3], [0.05, 0.4, -0.1], [1.0, 0.0, 0.2]];
        let want = [
            [0.989_000_02, -1.988_000_04, 0.489_500_02],
            [0.978_689_25, -1.989_673_14, 0.485_008_33],
            [0.970_562_04, -1.990_513_56, 0.478_492_47],
        ];
        let mut host = Reference::new(vec![1.0, -2.0, 0.5]);
        for (t, (gradient, want)) in gradients.iter().zip(want).enumerate() {
            host.step(gradient, 1.0, &Step { t: t as u64 + 1, ..STEP });
            for (got, want) in host.parameter.iter().zip(want) {
                assert!((got - want).abs() < 3e-7, "step {}: {got} for {want}", t + 1);
            }
        }
    }

    #[test]
    fn clipping_bounds_the_gradient_that_enters_the_moments() {
        let mut host = Reference::new(vec![0.0; 2]);
        host.step(&[3.0, 4.0], 25.0, &Step { max_norm: 1.0, ..STEP });
        assert!((host.first_moment[0] - 0.06).abs() < 1e-7 && (host.first_moment[1] - 0.08).abs() < 1e-7);
        let mut below = Reference::new(vec![0.0; 2]);
        below.step(&[0.3, 0.4], 0.25, &Step { max_norm: 1.0, ..STEP });
        assert!((below.first_moment[0] - 0.03).abs() < 1e-12);
    }

    #[test]
    fn corrections_hold_for_long_runs() {
        let constants = Step { t: 10_000_000, ..STEP }.constants();
        assert_eq!(constants[5..7], [1.0, 1.0]);
        let first = STEP.constants();
        assert!((first[5] - 0.1).abs() < 1e-7 && (f64::from(first[6]).powi(2) - 0.001).abs() < 1e-7);
    }
}
