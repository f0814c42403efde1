//! SwiGLU (LLaMA), exact GELU (projector) and quick-GELU (CLIP).
//!
//! | op | formula | PyTorch |
//! |---|---|---|
//! | swiglu | silu(gate) * up, silu(x) = x / (1 + exp(-x)) | `F.silu(gate) * up` |
//! | gelu | x (1 + erf(x / sqrt 2)) / 2 | `F.gelu(x)` |
//! | quick_gelu | x sigmoid(1.702 x) | transformers' `QuickGELUActivation` |

use super::{
    Case, Comparison, Cost, Op, Random, Shapes, THREADS, case::floats, elementwise::bindable_elements, groups_for,
};
use crate::{error::Result, gpu::Gpu, tensor::Tensor};

fn launch(name: &str, tensors: &[&Tensor]) {
    let gpu = tensors[0].gpu();
    for (first, count) in bindable_elements(gpu, tensors[0].len()) {
        let bindings: Vec<_> = tensors.iter().map(|tensor| tensor.range(first, count)).collect();
        let quads = count.div_ceil(4);
        gpu.dispatch(name, &bindings, &[quads as u32], groups_for(quads, 2 * THREADS));
    }
}

/// gate, up [T, F] to silu(gate) * up.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Tensor {
    let y = Tensor::empty(gate.gpu(), gate.shape());
    launch("activation.swiglu_forward", &[gate, up, &y]);
    y
}

/// The gradients of gate and up. Where nobody else holds these, their own memory takes the results.
pub fn swiglu_backward(gate: Tensor, up: Tensor, dy: &Tensor) -> (Tensor, Tensor) {
    if !gate.is_shared() && !up.is_shared() {
        launch("activation.swiglu_backward.in_place", &[&gate, &up, dy]);
        return (gate, up);
    }
    let (dgate, dup) = (Tensor::empty(gate.gpu(), gate.shape()), Tensor::empty(gate.gpu(), gate.shape()));
    launch("activation.swiglu_backward", &[&gate, &up, dy, &dgate, &dup]);
    (dgate, dup)
}

/// The activations of one argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    Gelu,
    QuickGelu,
}

impl Activation {
    pub fn forward(self, x: &Tensor) -> Tensor {
        let y = Tensor::empty(x.gpu(), x.shape());
        let name = if self == Self::Gelu { "activation.gelu_forward" } else { "activation.quick_gelu_forward" };
        launch(name, &[x, &y]);
        y
    }

    pub fn backward(self, x: &Tensor, dy: &Tensor) -> Tensor {
        let dx = Tensor::empty(x.gpu(), x.shape());
        let name = if self == Self::Gelu { "activation.gelu_backward" } else { "activation.quick_gelu_backward" };
        launch(name, &[x, dy, &dx]);
        dx
    }

    /// Value and derivative on the host.
    pub fn reference(self, x: f64) -> (f64, f64) {
        match self {
            Self::Gelu => {
                let cdf = 0.5 * erfc(-x / std::f64::consts::SQRT_2);
                let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
                (x * cdf, cdf + x * density)
            }
            Self::QuickGelu => {
                let s = 1.0 / (1.0 + (-1.702 * x).exp());
                (x * s, s + 1.702 * x * s * (1.0 - s))
            }
        }
    }
}

/// The complementary error function in f64: the series near zero, the continued fraction (Lentz) beyond.
fn erfc(x: f64) -> f64 {
    if x < 0.0 {
        return 2.0 - erfc(-x);
    }
    let square = x * x;
    if x < 2.5 {
        let (mut term, mut sum, mut n) = (x, x, 0.0);
        while term.abs() > 1e-18 * sum.abs() {
            n += 1.0;
            term *= -square / n;
            sum += term / (2.0 * n + 1.0);
        }
        return 1.0 - 2.0 / std::f64::consts::PI.sqrt() * sum;
    }
    let fraction = (1..=60).rev().fold(0.0, |tail, k| 0.5 * f64::from(k) / (x + tail));
    (-square).exp() / std::f64::consts::PI.sqrt() / (x + fraction)
}

/// Values that reach the tails.
fn inputs(gpu: &Gpu, n: usize) -> [(Vec<f32>, Tensor); 3] {
    let mut random = Random::new(n as u64);
    [6.0, 6.0, 1.0].map(|reach| {
        let values: Vec<f32> = random.values(n * (n + 1)).iter().map(|x| x * reach).collect();
        let tensor = Tensor::from_f32(gpu, &values, &[n, n + 1]);
        (values, tensor)
    })
}

fn check_swiglu(gpu: &Gpu, n: usize) -> Result<Vec<Comparison>> {
    let [(gate, tgate), (up, tup), (dy, tdy)] = inputs(gpu, n);
    let y = swiglu(&tgate, &tup);
    let (dgate, dup) = swiglu_backward(tgate.clone(), tup.clone(), &tdy);
    let (in_place_dgate, in_place_dup) = swiglu_backward(tgate, tup, &tdy);
    let exact = |x: &Tensor| x.to_vec().map(|x| super::testing::wide(&x));
    let mut want = [const { Vec::new() }; 3];
    for ((g, u), d) in gate.iter().zip(&up).zip(&dy) {
        let (g, u, d) = (f64::from(*g), f64::from(*u), f64::from(*d));
        let s = 1.0 / (1.0 + (-g).exp());
        want[0].push(g * s * u);
        want[1].push(d * u * s * (1.0 + g * (1.0 - s)));
        want[2].push(d * g * s);
    }
    let [want_y, want_dgate, want_dup] = want;
    Ok(vec![
        Comparison::new("dgate in place", in_place_dgate.to_vec()?, exact(&dgate)?, 0.0),
        Comparison::new("dup in place", in_place_dup.to_vec()?, exact(&dup)?, 0.0),
        Comparison::new("y", y.to_vec()?, want_y, 1e-6),
        Comparison::new("dgate", dgate.to_vec()?, want_dgate, 2e-6),
        Comparison::new("dup", dup.to_vec()?, want_dup, 1e-6),
    ])
}

fn check_activation(activation: Activation, gpu: &Gpu, n: usize) -> Result<Vec<Comparison>> {
    let [(x, tx), _, (dy, tdy)] = inputs(gpu, n);
    let y = activation.forward(&tx);
    let dx = activation.backward(&tx, &tdy);
    let want: Vec<_> = x.iter().map(|&x| activation.reference(f64::from(x))).collect();
    let want_dx = want.iter().zip(&dy).map(|((_, slope), dy)| slope * f64::from(*dy)).collect();
    Ok(vec![
        // Devices need give an exponential of x within 3 + 2 |x| units in the last place, a quotient within 2.5: that makes
        // 7e-7 of a distribution function's half, and a slope whose terms cancel may be a third of these.
        Comparison::new("y", y.to_vec()?, want.iter().map(|(y, _)| *y).collect(), 1e-6),
        Comparison::new("dx", dx.to_vec()?, want_dx, 3e-6),
    ])
}

fn cost(n: usize) -> Cost {
    let elements = (n * (n + 1)) as u64;
    Cost { flops: 8 * elements, bytes: 8 * elements }
}

fn swiglu_cases(shapes: &Shapes) -> Vec<Case> {
    let size = [shapes.tokens, shapes.intermediate];
    let case = |pass, flops, bytes| {
        Case::of(pass, format!("{}x{}", size[0], size[1]), Cost::each(size[0] * size[1], flops, bytes))
    };
    vec![
        case("forward", 8, 12).run(move |gpu| {
            let (gate, up) = (floats(gpu, &size), floats(gpu, &size));
            move || swiglu(&gate, &up)
        }),
        case("backward", 14, 20).run(move |gpu| {
            let (gate, up, dy) = (floats(gpu, &size), floats(gpu, &size), floats(gpu, &size));
            move || swiglu_backward(gate.clone(), up.clone(), &dy)
        }),
    ]
}

fn cases(activation: Activation, size: [usize; 2]) -> Vec<Case> {
    let case = |pass, flops, bytes| {
        Case::of(pass, format!("{}x{}", size[0], size[1]), Cost::each(size[0] * size[1], flops, bytes))
    };
    vec![
        case("forward", 8, 8).run(move |gpu| {
            let x = floats(gpu, &size);
            move || activation.forward(&x)
        }),
        case("backward", 16, 12).run(move |gpu| {
            let (x, dy) = (floats(gpu, &size), floats(gpu, &size));
            move || activation.backward(&x, &dy)
        }),
    ]
}

pub const SWIGLU: Op = Op { name: "activation.swiglu", check: check_swiglu, cost, cases: swiglu_cases };
pub const GELU: Op = Op {
    name: "activation.gelu",
    check: |gpu, n| check_activation(Activation::Gelu, gpu, n),
    cost,
    // The projector.
    cases: |shapes| cases(Activation::Gelu, [shapes.patches, shapes.hidden]),
};
pub const QUICK_GELU: Op = Op {
    name: "activation.quick_gelu",
    check: |gpu, n| check_activation(Activation::QuickGelu, gpu, n),
    cost,
    // The tower.
    cases: |shapes| cases(Activation::QuickGelu, [shapes.patches + 1, 4 * shapes.vision_hidden]),
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reference_matches_published_values() {
        let points = [-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0];
        let gelu = [-0.0040497, -0.1586553, -0.1542688, 0.0, 0.3457312, 0.8413447, 2.9959503];
        let quick = [-0.0180713, -0.1542042, -0.1496116, 0.0, 0.3503884, 0.8457958, 2.9819288];
        for i in 0..7 {
            assert!((Activation::Gelu.reference(points[i]).0 - gelu[i]).abs() < 1e-7);
            assert!((Activation::QuickGelu.reference(points[i]).0 - quick[i]).abs() < 2e-7);
        }
        assert!((erfc(2.4999999) - erfc(2.5)).abs() < 1e-9);
    }
}
