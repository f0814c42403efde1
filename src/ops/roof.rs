//! What a device can reach at most, measured: kernels that do one thing as fast as it goes (`shaders/roof.wgsl`), and the
//! ways between device and host. What benches call a share is a share of these.
//!
//! The best run counts, of the best of several kernels where it depends on a device's registers which does best.

use std::time::Instant;

use super::{
    elementwise, groups_for,
    matmul::{Layout, product},
};
use crate::{
    error::Result,
    gpu::{Clock, Effort, Gpu},
    tensor::Tensor,
};

/// What a roof counts in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    FlopsPerSecond,
    BytesPerSecond,
    Seconds,
}

impl Unit {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::FlopsPerSecond => "flop/s",
            Self::BytesPerSecond => "byte/s",
            Self::Seconds => "s",
        }
    }
}

/// A measured limit.
#[derive(Clone, Debug)]
pub struct Roof {
    /// For machines: one of [`ROOFS`].
    pub key: &'static str,
    /// For people.
    pub title: &'static str,
    pub unit: Unit,
    pub value: f64,
    /// What reached it.
    pub by: &'static str,
}

/// How one of [`ROOFS`] is measured: the value in `unit`, and what reached it; none where the device lacks it.
type Measure = fn(&Gpu, Clock) -> Result<Option<(f64, &'static str)>>;

/// Every roof: key, title, unit, how it is measured.
pub const ROOFS: &[(&str, &str, Unit, Measure)] = &[
    (FMA, "multiply-add, f32", Unit::FlopsPerSecond, |gpu, clock| fma(gpu, clock, F32)),
    ("fma_f16", "multiply-add, f16", Unit::FlopsPerSecond, |gpu, clock| {
        if gpu.facts().features.iter().any(|feature| feature == "f16") { fma(gpu, clock, F16) } else { Ok(None) }
    }),
    (COOPERATIVE, "cooperative matrix, f16", Unit::FlopsPerSecond, cooperative),
    (COPY, "copy (read and written)", Unit::BytesPerSecond, copy),
    ("read", "read", Unit::BytesPerSecond, read),
    ("workgroup_read", "read of workgroup memory", Unit::BytesPerSecond, workgroup_read),
    ("dispatch", "a dispatch in a chain", Unit::Seconds, dispatch),
    ("latency", "submission until it is done", Unit::Seconds, latency),
    ("to_device", "host to device", Unit::BytesPerSecond, to_device),
    ("to_host", "device to host", Unit::BytesPerSecond, to_host),
];

/// The keys that products and everything else are measured against.
pub const FMA: &str = "fma_f32";
pub const COPY: &str = "copy";
/// Of products by cooperative matrices; absent where the device has none.
pub const COOPERATIVE: &str = "cooperative";

/// All roofs of a device.
#[derive(Clone, Debug)]
pub struct Roofs {
    pub list: Vec<Roof>,
    /// Whose clock can be believed here.
    pub clock: Clock,
}

impl Roofs {
    /// Measures those of [`ROOFS`] that the device has and `wanted` names; all of them where it names none.
    ///
    /// # Errors
    /// Whatever fails on the device.
    pub fn measure(gpu: &Gpu, wanted: &[&str]) -> Result<Self> {
        let clock = clock(gpu)?;
        let mut list = Vec::new();
        for &(key, title, unit, measure) in ROOFS {
            let wanted = wanted.is_empty() || wanted.contains(&key);
            if let Some((value, by)) = if wanted { measure(gpu, clock)? } else { None } {
                list.push(Roof { key, title, unit, value, by });
            }
        }
        gpu.trim();
        Ok(Self { list, clock })
    }

    /// A roof's value.
    pub fn get(&self, key: &str) -> Option<f64> {
        self.list.iter().find(|roof| roof.key == key).map(|roof| roof.value)
    }

    /// The roof that limits so much work, and the seconds that it would take at that roof; `arithmetic` is that of its
    /// operations.
    pub fn limit(&self, arithmetic: &'static str, flops: u64, bytes: u64) -> (&'static str, f64) {
        let at = |amount: u64, key| self.get(key).map_or(0.0, |rate| amount as f64 / rate);
        let (computing, moving) = (at(flops, arithmetic), at(bytes, COPY));
        if computing > moving { (arithmetic, computing) } else { (COPY, moving) }
    }
}

const EFFORT: Effort = Effort { warm_up: 2, runs: 8, seconds: 0.5, load: 0.15 };
/// A run of the kernels with a loop.
const ENOUGH: f64 = 0.02;
/// Long enough to compare clocks.
const LONG: f64 = 0.05;

/// Threads that fill the device.
fn threads(gpu: &Gpu) -> usize {
    if gpu.is_cpu() { 1 << 13 } else { 1 << 19 }
}

/// Bytes that no cache holds.
pub fn beyond_caches(gpu: &Gpu) -> u64 {
    if gpu.is_cpu() { 64 << 20 } else { 256 << 20 }
}

/// A tensor that caches do not hold, as far as one binding reaches.
fn large(gpu: &Gpu) -> Tensor {
    let elements = (beyond_caches(gpu).min(gpu.max_binding()) / 4) as usize / 64 * 64;
    let tensor = Tensor::empty(gpu, &[elements]);
    elementwise::fill(&tensor, 0.5);
    tensor
}

/// Whose clock can be believed: the device's, unless it has none, or tells much less of a long run than the host waits.
pub fn clock(gpu: &Gpu) -> Result<Clock> {
    let out = Tensor::empty(gpu, &[threads(gpu)]);
    let mut rounds = 64;
    chain(gpu, F32[0].0, &out, rounds);
    loop {
        let elapsed = gpu.time(&mut || chain(gpu, F32[0].0, &out, rounds))?;
        if elapsed.host < LONG && rounds < 1 << 24 {
            rounds *= 2;
            continue;
        }
        let believed = elapsed.device.is_some_and(|device| device > elapsed.host / 2.0);
        return Ok(if believed { Clock::Device } else { Clock::Host });
    }
}

/// Kernels of chains: name, multiply-adds a thread and round (CHAINS * DEPTH * width in shaders/variants).
type Chains = &'static [(&'static str, usize)];
const F32: Chains = &[
    ("roof.multiply_add.scalar_4", 4 * 16),
    ("roof.multiply_add.scalar_8", 8 * 16),
    ("roof.multiply_add.scalar_12", 12 * 16),
    ("roof.multiply_add.vector_2", 2 * 16 * 4),
    ("roof.multiply_add.vector_4", 4 * 16 * 4),
    ("roof.multiply_add.vector_8", 8 * 16 * 4),
];
const F16: Chains = &[
    ("roof.multiply_add.half_scalar_8", 8 * 16),
    ("roof.multiply_add.half_vector_2", 2 * 16 * 4),
    ("roof.multiply_add.half_vector_4", 4 * 16 * 4),
];

fn chain(gpu: &Gpu, kernel: &str, out: &Tensor, rounds: u32) {
    let params = [rounds, 0, 0.5f32.to_bits(), 0.5f32.to_bits()];
    gpu.dispatch(kernel, &[out.binding()], &params, groups_for(out.len(), 64));
}

/// The best seconds a round of what `run` does in so many rounds, which are raised until they take long enough.
fn a_round(gpu: &Gpu, clock: Clock, run: &mut dyn FnMut(u32)) -> Result<f64> {
    let mut rounds = 16;
    run(rounds);
    loop {
        let elapsed = gpu.time(&mut || run(rounds))?;
        if elapsed.device.filter(|_| clock == Clock::Device).unwrap_or(elapsed.host) > ENOUGH || rounds >= 1 << 24 {
            break;
        }
        rounds *= 2;
    }
    Ok(gpu.samples(clock, EFFORT, &mut || run(rounds))?.best() / f64::from(rounds))
}

fn fma(gpu: &Gpu, clock: Clock, kernels: Chains) -> Result<Option<(f64, &'static str)>> {
    let out = Tensor::empty(gpu, &[threads(gpu)]);
    let mut best = None;
    for &(kernel, multiply_adds) in kernels {
        let seconds = a_round(gpu, clock, &mut |rounds| chain(gpu, kernel, &out, rounds))?;
        let rate = (2 * multiply_adds * out.len()) as f64 / seconds;
        if best.is_none_or(|(most, _)| rate > most) {
            best = Some((rate, kernel));
        }
    }
    Ok(best)
}

/// Kernels of chains of products of matrices, which an accumulator each takes: name, and operations a subgroup and round
/// (CHAINS * DEPTH * 2 SIDE^3 in shaders/variants).
const MATRICES: &[(u32, &str, usize)] = &[
    (8, "roof.matrix_multiply_add.8_4", 4 * 8 * 2 * 512),
    (8, "roof.matrix_multiply_add.8_8", 8 * 8 * 2 * 512),
    (16, "roof.matrix_multiply_add.16_2", 2 * 8 * 2 * 4096),
    (16, "roof.matrix_multiply_add.16_4", 4 * 8 * 2 * 4096),
    (16, "roof.matrix_multiply_add.16_8", 8 * 8 * 2 * 4096),
];

fn cooperative(gpu: &Gpu, clock: Clock) -> Result<Option<(f64, &'static str)>> {
    let Some(side) = gpu.cooperative_side() else { return Ok(None) };
    let (out, subgroups) = (Tensor::empty(gpu, &[threads(gpu)]), Tensor::empty(gpu, &[1]));
    let groups = groups_for(out.len(), 128);
    let mut best = None;
    for &(_, kernel, operations) in MATRICES.iter().filter(|&&(of, ..)| of == side) {
        let seconds = a_round(gpu, clock, &mut |rounds| {
            let params = [rounds, 0, 0.5f32.to_bits(), 0.25f32.to_bits()];
            gpu.dispatch(kernel, &[out.binding(), subgroups.binding()], &params, groups);
        })?;
        // Only the device knows how many lanes its subgroups have.
        let each = subgroups.to_vec()?.first().copied().unwrap_or_default() as usize;
        let rate = (operations * each * (out.len() / 128)) as f64 / seconds;
        if best.is_none_or(|(most, _)| rate > most) {
            best = Some((rate, kernel));
        }
    }
    Ok(best)
}

/// Kernels that copy, and the vec4s of a thread.
const COPIES: &[(&str, usize)] = &[("roof.copy.one", 1), ("roof.copy.four", 4), ("roof.copy.eight", 8)];

fn copy(gpu: &Gpu, clock: Clock) -> Result<Option<(f64, &'static str)>> {
    let (x, y) = (large(gpu), large(gpu));
    let (bytes, quads) = ((2 * 4 * x.len()) as f64, x.len() / 4);
    // No pass, so no clock of the device.
    let by_command = gpu.samples(Clock::Host, EFFORT, &mut || y.copy_from(&x))?;
    let mut best = (bytes / by_command.best(), "the backend's copy");
    for &(kernel, each) in COPIES {
        let by_kernel = gpu.samples(clock, EFFORT, &mut || {
            let groups = groups_for(quads, 64 * each);
            gpu.dispatch(kernel, &[x.binding(), y.binding()], &[quads as u32, 0, 0, 0], groups);
        })?;
        let rate = bytes / by_kernel.best();
        if rate > best.0 {
            best = (rate, kernel);
        }
    }
    Ok(Some(best))
}

fn read(gpu: &Gpu, clock: Clock) -> Result<Option<(f64, &'static str)>> {
    let (x, out) = (large(gpu), Tensor::empty(gpu, &[threads(gpu)]));
    let params = [(x.len() / 4) as u32, out.len() as u32, 0, 0];
    let samples = gpu.samples(clock, EFFORT, &mut || {
        gpu.dispatch("roof.read_all", &[x.binding(), out.binding()], &params, groups_for(out.len(), 64));
    })?;
    Ok(Some(((4 * x.len()) as f64 / samples.best(), "roof.read_all")))
}

fn workgroup_read(gpu: &Gpu, clock: Clock) -> Result<Option<(f64, &'static str)>> {
    let (kernel, depth) = ("roof.workgroup_read", 8);
    let out = Tensor::empty(gpu, &[threads(gpu)]);
    let seconds = a_round(gpu, clock, &mut |rounds| {
        gpu.dispatch(kernel, &[out.binding()], &[rounds, 0, 0.5f32.to_bits(), 0], groups_for(out.len(), 64));
    })?;
    Ok(Some(((16 * depth * out.len()) as f64 / seconds, kernel)))
}

/// A dispatch that does nothing.
fn nothing(out: &Tensor) {
    out.gpu().dispatch("roof.nothing", &[out.binding()], &[u32::MAX, 0, 0, 0], [1, 1, 1]);
}

fn dispatch(gpu: &Gpu, _: Clock) -> Result<Option<(f64, &'static str)>> {
    const CHAIN: usize = 1024;
    let out = Tensor::empty(gpu, &[64]);
    let samples = gpu.samples(Clock::Host, EFFORT, &mut || (0..CHAIN).for_each(|_| nothing(&out)))?;
    Ok(Some((samples.best() / CHAIN as f64, "roof.nothing")))
}

fn latency(gpu: &Gpu, _: Clock) -> Result<Option<(f64, &'static str)>> {
    let out = Tensor::empty(gpu, &[64]);
    let mut seconds = Vec::new();
    for _ in 0..64 {
        seconds.push(gpu.time(&mut || nothing(&out))?.host);
    }
    seconds.sort_by(f64::total_cmp);
    Ok(Some((seconds[seconds.len() / 2], "roof.nothing, the median")))
}

/// The best seconds of a few runs.
fn best_of_few(run: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..4 {
        let begun = Instant::now();
        run()?;
        best = best.min(begun.elapsed().as_secs_f64());
    }
    Ok(best)
}

fn to_device(gpu: &Gpu, _: Clock) -> Result<Option<(f64, &'static str)>> {
    let x = large(gpu);
    let bytes = vec![1u8; 4 * x.len()];
    gpu.sync()?;
    let seconds = best_of_few(&mut || {
        x.write_bytes(&bytes);
        gpu.sync()
    })?;
    Ok(Some((bytes.len() as f64 / seconds, "as weights come")))
}

fn to_host(gpu: &Gpu, _: Clock) -> Result<Option<(f64, &'static str)>> {
    let x = large(gpu);
    gpu.sync()?;
    let seconds = best_of_few(&mut || x.to_bytes().map(drop))?;
    Ok(Some(((4 * x.len()) as f64 / seconds, "as results go")))
}

/// Bytes a second to the host, and to the device.
///
/// # Errors
/// Whatever fails on the device.
pub fn links(gpu: &Gpu) -> Result<(f64, f64)> {
    let rate = |found: Option<(f64, &str)>| found.map_or(f64::INFINITY, |(rate, _)| rate);
    let links = (rate(to_host(gpu, Clock::Host)?), rate(to_device(gpu, Clock::Host)?));
    gpu.trim();
    Ok(links)
}

/// Longer than the overhead of a submission, by far.
const LONG_PRODUCT: f64 = 0.1;
const LARGEST: usize = 4096;

/// Floating-point operations a second of a square f32 product, the best of a few runs: what estimates of time go by.
///
/// # Errors
/// Whatever fails on the device.
pub fn products(gpu: &Gpu) -> Result<f64> {
    let mut size = 256;
    loop {
        let shape = [size, size];
        let (a, b) = (Tensor::empty(gpu, &shape), Tensor::empty(gpu, &shape));
        elementwise::fill(&a, 0.5);
        elementwise::fill(&b, 0.5);
        // The first run compiles.
        drop(product(Layout::Nt, &a, &b));
        gpu.sync()?;
        let best = best_of_few(&mut || {
            drop(product(Layout::Nt, &a, &b));
            gpu.sync()
        })?;
        if best > LONG_PRODUCT || size >= LARGEST {
            gpu.trim();
            return Ok(2.0 * (size as f64).powi(3) / best);
        }
        size *= 2;
    }
}
