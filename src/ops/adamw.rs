//! One update of AdamW with decoupled weight decay and clipping by the global norm:
//! g' = g * min(1, max_norm / (|g| + 1e-6)); p = p (1 - lr wd); m = b1 m + (1 - b1) g'; v = b2 v + (1 - b2) g'^2;
//! p = p - lr (m / (1 - b1^t)) / (sqrt(v) / sqrt(1 - b2^t) + eps).
//! PyTorch: `torch.nn.utils.clip_grad_norm_`, then `torch.optim.AdamW.step`.

use super::{Comparison, Cost, Op, Random, THREADS, elementwise::bindable_elements, groups_for};
use crate::{error::Result, gpu::Gpu, tensor::Tensor};

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
    /// Updates with this one included: 1 at the first.
    pub t: u64,
}

/// Updates a parameter and its moments, all of one size, in place. `square_sum` [1] is the sum of the squares of all
/// gradients of the model, as [`super::reduce::add_square_sum`] makes it: read on the device, so that nothing waits
/// for it. Where it is infinite or not a number, nothing changes.
pub fn step(
    parameter: &Tensor,
    gradient: &Tensor,
    first_moment: &Tensor,
    second_moment: &Tensor,
    square_sum: &Tensor,
    step: &Step,
) {
    let (gpu, tensors) = (parameter.gpu(), [parameter, gradient, first_moment, second_moment]);
    assert!(tensors.iter().all(|tensor| tensor.len() == parameter.len()), "{tensors:?} in one update");
    let constants = step.constants().map(f32::to_bits);
    for (first, count) in bindable_elements(gpu, parameter.len()) {
        let [p, g, m, v] = tensors.map(|tensor| tensor.range(first, count));
        let quads = count.div_ceil(4);
        let mut params = vec![quads as u32];
        params.extend(constants);
        gpu.dispatch("adamw.step", &[p, g, m, v, square_sum.binding()], &params, groups_for(quads, THREADS));
    }
}

impl Step {
    /// `Params` of the kernel after its count.
    fn constants(&self) -> [f32; 8] {
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
        ]
    }
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
        let clip = if step.max_norm > 0.0 { (step.max_norm / (square_sum.sqrt() + 1e-6)).min(1.0) } else { 1.0 };
        let correction1 = 1.0 - step.beta1.powf(step.t as f64);
        let correction2 = 1.0 - step.beta2.powf(step.t as f64);
        for (i, g) in gradient.iter().map(|g| g * clip).enumerate() {
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
        let constants =
            Step { learning_rate: 0.01, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.1, max_norm, t: 0 };
        for t in 1..=3 {
            let (g, tg) = random.tensor(gpu, &shape);
            let g = super::testing::wide(&g);
            let constants = Step { t, ..constants };
            let square_sum = g.iter().map(|g| g * g).sum::<f64>();
            let tsum = Tensor::from_f32(gpu, &[square_sum as f32], &[1]);
            step(&tp, &tg, &m, &v, &tsum, &constants);
            host.step(&g, square_sum, &constants);
        }
        let before = [tp.to_vec()?, m.to_vec()?, v.to_vec()?];
        for bad in [f32::INFINITY, f32::NAN] {
            let (_, tg) = random.tensor(gpu, &shape);
            let square_sum = Tensor::from_f32(gpu, &[bad], &[1]);
            step(&tp, &tg, &m, &v, &square_sum, &Step { t: 4, ..constants });
        }
        let after = [tp.to_vec()?, m.to_vec()?, v.to_vec()?].concat();
        let unchanged = super::testing::wide(&before.concat());
        let [p, m, v] = before;
        out.extend([
            Comparison::new(what, p, host.parameter, 1e-6),
            Comparison::new("first moment", m, host.first_moment, 1e-6),
            // 1 - beta2 in f32.
            Comparison::new("second moment", v, host.second_moment, 2e-5),
            Comparison::new("after a gradient that is not finite", after, unchanged, 1e-9),
        ]);
    }
    Ok(out)
}

pub const OP: Op = Op {
    name: "adamw",
    check,
    cost: |n| {
        let elements = (n * (n + 3)) as u64;
        Cost { flops: 16 * elements, bytes: 28 * elements }
    },
};

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Step =
        Step { learning_rate: 0.01, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.1, max_norm: 0.0, t: 1 };

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
