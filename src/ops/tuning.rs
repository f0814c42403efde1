//! What can be tuned: ops that have several ways to one result, each of them run on operands of a question's sizes, with
//! values of the result that the host knows. Who measures and decides is `tune`.

use std::sync::LazyLock;

use super::{Random, decode_attention, matmul, nf4_matmul, roof::beyond_caches};
use crate::{
    error::Result,
    gpu::{Gpu, Question},
    tensor::{Dtype, Tensor},
};

/// Runs a way, by its name, on one of several sets of operands, by turns.
pub type RunWay = Box<dyn Fn(&str, usize) -> Tensor>;

/// A question made ready to be measured.
pub struct Trial {
    /// The ways that serve; the one of the op's own rule first.
    pub ways: Vec<&'static str>,
    pub run: RunWay,
    /// Where every run leaves its result, if that is one place.
    pub out: Option<Tensor>,
    /// Places of the first set's result, and what is there.
    pub want: Vec<(usize, f64)>,
    /// As in [`Comparison`](super::Comparison).
    pub tolerance: f64,
}

/// Ops that ask alike.
pub(super) struct Family {
    /// The names in their questions.
    pub ops: fn() -> Vec<&'static str>,
    /// The names of their ways.
    pub ways: fn() -> Vec<&'static str>,
    pub trial: fn(&Gpu, &Question, [usize; 3]) -> Result<Trial>,
}

const FAMILIES: [Family; 3] = [matmul::ways::FAMILY, nf4_matmul::FAMILY, decode_attention::FAMILY];

/// What is to be run for a question at these sizes; none where nobody asks such a one.
///
/// # Errors
/// Whatever fails on the device.
pub fn trial(gpu: &Gpu, question: &Question, sizes: [usize; 3]) -> Result<Option<Trial>> {
    let family = FAMILIES.iter().find(|family| (family.ops)().contains(&question.op));
    family.map(|family| (family.trial)(gpu, question, sizes)).transpose()
}

/// An op's and a way's names as the program has them; none where one of the two is unknown.
pub fn names(op: &str, way: &str) -> Option<(&'static str, &'static str)> {
    FAMILIES.iter().find_map(|family| {
        let of = |names: Vec<&'static str>, name: &str| names.into_iter().find(|known| *known == name);
        Some((of((family.ops)(), op)?, of((family.ways)(), way)?))
    })
}

const BLOCK: usize = (1 << 20) - 3;
/// Values in [-1, 1] that bf16 and f16 hold exactly, so that ways which round their operands give the same results; for
/// the left and for the right side.
static EXACT: LazyLock<[Vec<f32>; 2]> = LazyLock::new(|| {
    let values = |seed| Random::new(seed).values(BLOCK).iter().map(|x| (x * 64.0).round() / 64.0).collect();
    [values(11), values(13)]
});

/// A tensor of the values of one side, the same block again and again.
pub(super) fn exact(gpu: &Gpu, dtype: Dtype, shape: &[usize], side: usize) -> Tensor {
    super::case::repeated(gpu, dtype, shape, &EXACT[side])
}

/// What [`exact`] has at a place.
pub(super) fn exact_value(at: usize, side: usize) -> f64 {
    f64::from(EXACT[side][at % BLOCK])
}

const MOST_SETS: usize = 8;

/// As many sets of operands, of so many bytes each, as caches do not hold; not more than the device has room for.
pub(super) fn operand_sets(gpu: &Gpu, bytes: usize, make: impl Fn() -> [Tensor; 2]) -> Vec<[Tensor; 2]> {
    let most = 2 * beyond_caches(gpu);
    let room = gpu.available_memory().map_or(most, |free| most.min(free / 8));
    let count = (room as usize / bytes.max(1)).clamp(1, MOST_SETS);
    (0..count).map(|_| make()).collect()
}

/// Places of a result [m, n] to be looked at: first, last, and between.
pub(super) fn positions(m: usize, n: usize) -> impl Iterator<Item = [usize; 2]> {
    let spread = |count: usize, size: usize| (0..count).map(move |at| at * (size - 1) / (count - 1));
    spread(8, m).flat_map(move |row| spread(32, n).map(move |column| [row, column]))
}
