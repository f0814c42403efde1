//! Weights in four bits ([`crate::quant`]): from floats while they arrive, and back. bitsandbytes: `quantize_4bit`,
//! `dequantize_4bit`.
//!
//! A device quantises what streams in, block by block, to the bits of the host's code; on host processors that code
//! itself runs. Factors in eight bits are made on the host, a value for 64 of the tensor's.

use super::{
    Case, Comparison, Cost, Op, Random, Shapes, THREADS, case::floats, cooperative, elementwise, groups_for,
    testing::wide,
};
use crate::{
    error::Result,
    gpu::Gpu,
    quant::{self, BLOCK, Factors, NESTED_BLOCK, QuantType, Quantizer},
    tensor::{self, Dtype, Scales, Tensor},
};

/// A kernel's name by the table of its codes.
pub(super) fn of(kind: QuantType, [nf4, fp4]: [&'static str; 2]) -> &'static str {
    match kind {
        QuantType::Nf4 => nf4,
        QuantType::Fp4 => fp4,
    }
}

/// The table of a quantised tensor's codes.
pub(super) fn kind_of(x: &Tensor) -> QuantType {
    match x.dtype() {
        Dtype::Quantized(kind) => kind,
        other => panic!("{x:?} is of {other:?}, not quantised"),
    }
}

/// The factors [blocks] of a quantised tensor as f32: its own, or made from those in eight bits.
pub fn factors(x: &Tensor) -> Tensor {
    let gpu = x.gpu();
    match x.scales() {
        Some(Scales::Plain(absmax)) => absmax.clone(),
        Some(Scales::Nested { codes, absmax, map, offset }) => {
            let blocks = x.len().div_ceil(BLOCK);
            let y = Tensor::empty(gpu, &[blocks]);
            // Codes begin with a word, four to each, wherever a binding may begin.
            let step = (gpu.max_binding() as usize / 4 / 256).max(1) * 256;
            for first in (0..blocks).step_by(step) {
                let count = step.min(blocks - first);
                let (absmax, before) = absmax
                    .range_from(first / NESTED_BLOCK, (first + count).div_ceil(NESTED_BLOCK) - first / NESTED_BLOCK);
                let x_offset = before * NESTED_BLOCK + first % NESTED_BLOCK;
                let params = [count as u32, x_offset as u32, 0, 0, offset.to_bits(), 0];
                let bindings =
                    [codes.range(first / 4, count.div_ceil(4)), absmax, map.binding(), y.range(first, count)];
                gpu.dispatch("nf4.factors", &bindings, &params, groups_for(count.div_ceil(4), THREADS));
            }
            y
        }
        None => panic!("{x:?} is not quantised"),
    }
}

/// Elements that begin both a binding of codes and one of factors.
pub(super) const ALIGNED: usize = tensor::ALIGNMENT * BLOCK;

/// Writes `count` elements of a quantised x, from `x_start` on, to the f32 tensor y from `y_start` on; or to one in f16,
/// rounded, where all of these are multiples of 8. `factors` are [`factors`] of x.
pub fn dequantize_into(x: &Tensor, factors: &Tensor, x_start: usize, y: &Tensor, y_start: usize, count: usize) {
    assert!(x_start + count <= x.len() && y_start + count <= y.len(), "{count} elements of {x:?} into {y:?}");
    let (gpu, kind, words) = (x.gpu(), kind_of(x), x.words());
    let step = (gpu.max_binding() as usize / 4 / ALIGNED).saturating_sub(1).max(1) * ALIGNED;
    for first in (0..count).step_by(step) {
        let count = step.min(count - first);
        let start = x_start + first;
        let before = start % ALIGNED;
        let codes = words.range((start - before) / 8, (before + count).div_ceil(8));
        let blocks = factors.range((start - before) / BLOCK, (before + count).div_ceil(BLOCK));
        let in_f16 = y.dtype() == Dtype::F16;
        let (to, y_offset) =
            if in_f16 { y.packed_range(y_start + first, count) } else { y.range_from(y_start + first, count) };
        // Whole vectors: the padding behind a tensor takes what an odd end has too much, but a neighbour must not.
        let ends = count.is_multiple_of(8);
        let even = before.is_multiple_of(8) && y_offset.is_multiple_of(4) && ends;
        assert!(even && y_offset.is_multiple_of(8) || !in_f16, "{count} elements of {x:?} into {y:?}");
        let by_words = groups_for((before % 8 + count).div_ceil(8), THREADS);
        let by_halves = groups_for(count / 4, 4 * THREADS);
        let (kernel, groups) = match even {
            true if in_f16 => (["nf4.decode.nf4_to_f16", "nf4.decode.fp4_to_f16"], by_halves),
            true if !gpu.is_cpu() => (["nf4.decode.nf4", "nf4.decode.fp4"], by_halves),
            true => (["nf4.dequantize.nf4_vec", "nf4.dequantize.fp4_vec"], by_words),
            false => (["nf4.dequantize.nf4", "nf4.dequantize.fp4"], by_words),
        };
        let params = [count as u32, before as u32, y_offset as u32, before as u32, 0, 0];
        gpu.dispatch(of(kind, kernel), &[codes, blocks, to], &params, groups);
    }
}

/// All of a quantised tensor as f32.
pub fn dequantize(x: &Tensor) -> Tensor {
    let y = Tensor::empty(x.gpu(), x.shape());
    dequantize_into(x, &factors(x), 0, &y, 0, x.len());
    y
}

/// Quantises the first `blocks` blocks of x (f32, or 16-bit) into `codes` and `absmax`, from block `to` on.
fn quantize_blocks(kind: QuantType, x: &Tensor, blocks: usize, codes: &Tensor, absmax: &Tensor, to: usize) {
    let gpu = x.gpu();
    let kernel = match x.dtype() {
        Dtype::F32 => of(kind, ["nf4.quantize.nf4", "nf4.quantize.fp4"]),
        Dtype::Bf16 => of(kind, ["nf4.quantize.nf4_bf16", "nf4.quantize.fp4_bf16"]),
        Dtype::F16 => of(kind, ["nf4.quantize.nf4_f16", "nf4.quantize.fp4_f16"]),
        other => panic!("{x:?} of {other:?} cannot be quantised"),
    };
    let step = (gpu.max_binding() as usize / 4 / BLOCK / tensor::ALIGNMENT).max(1) * tensor::ALIGNMENT;
    for first in (0..blocks).step_by(step) {
        let count = step.min(blocks - first);
        let (start, elements) = (first * BLOCK, count * BLOCK);
        let (from, x_offset) =
            if x.dtype().is_packed() { x.packed_range(start, elements) } else { (x.range(start, elements), 0) };
        let (words, factors) = (codes.range((to + first) * 8, count * 8), absmax.range(to + first, count));
        let params = [count as u32, x_offset as u32, 0, 0, 0, 0];
        gpu.dispatch(kernel, &[from, words, factors], &params, groups_for(count, THREADS));
    }
}

/// Elements that a device quantises at once: what it holds beside the tensor. A multiple of [`ALIGNED`].
const CHUNK: usize = 8 << 20;
/// Bytes that the host quantises at once.
const HOST_CHUNK: usize = 1 << 20;

/// A tensor that arrives as floats and is kept in four bits.
pub struct Upload {
    gpu: Gpu,
    from: Dtype,
    kind: QuantType,
    /// Factors in eight bits.
    double: bool,
    shape: Vec<usize>,
    missing: usize,
    /// Whole blocks, where the device quantises.
    device: Option<Device>,
    host: Host,
}

/// Blocks that the device quantises.
struct Device {
    codes: Tensor,
    absmax: Tensor,
    blocks: usize,
    done: usize,
    arriving: tensor::Upload,
}

/// What the host quantises: all, or the last block, which is not whole.
struct Host {
    quantizer: Quantizer,
    codes: Option<tensor::Upload>,
    /// Of an element that has arrived in part.
    partial: Vec<u8>,
    packed: Vec<u8>,
}

impl Upload {
    /// For elements of type `from` (f32, or 16-bit).
    pub fn new(gpu: &Gpu, from: Dtype, kind: QuantType, double: bool, shape: &[usize]) -> Self {
        let elements: usize = shape.iter().product();
        let on_device = if gpu.is_cpu() { 0 } else { elements / BLOCK };
        let rest = elements - on_device * BLOCK;
        let words = elements.div_ceil(8);
        let device = (on_device > 0).then(|| Device {
            codes: Tensor::empty_of(gpu, Dtype::U32, &[words]),
            absmax: Tensor::empty(gpu, &[elements.div_ceil(BLOCK)]),
            blocks: on_device,
            done: 0,
            arriving: Tensor::upload(gpu, from, &[(on_device * BLOCK).min(CHUNK)]),
        });
        let codes = device.is_none().then(|| Tensor::upload(gpu, Dtype::U32, &[words]));
        let host = Host { quantizer: Quantizer::new(kind, rest), codes, partial: Vec::new(), packed: Vec::new() };
        let missing = elements * from.bytes();
        Self { gpu: gpu.clone(), from, kind, double, shape: shape.to_vec(), missing, device, host }
    }

    /// Bytes (of the type that arrives) that are still to come.
    pub fn missing(&self) -> usize {
        self.missing
    }

    /// As [`tensor::Upload::push`].
    pub fn push(&mut self, mut bytes: &[u8]) {
        assert!(bytes.len() <= self.missing, "{} bytes where {} are missing", bytes.len(), self.missing);
        self.missing -= bytes.len();
        if let Some(device) = &mut self.device {
            bytes = device.push(self.kind, self.from, bytes);
        }
        self.host.push(self.from, bytes);
    }

    /// The tensor, all of whose bytes have been pushed.
    ///
    /// # Errors
    /// Whatever has failed on the device so far.
    pub fn finish(self) -> Result<Tensor> {
        assert_eq!(self.missing, 0, "bytes that are still missing");
        let Host { quantizer, codes, packed, .. } = self.host;
        let rest = quantizer.finish();
        if let Some(mut upload) = codes {
            upload.push(&[0; 3][..upload.missing()]);
            let scales = Scales::new(&self.gpu, &Factors::new(rest, self.double));
            return Ok(Tensor::quantized(self.kind, &self.shape, upload.finish(), scales));
        }
        let Some(Device { codes, absmax, blocks, .. }) = self.device else {
            unreachable!("what the host does not take, the device does")
        };
        if !rest.is_empty() {
            let mut words = packed;
            words.resize(words.len().next_multiple_of(4), 0);
            let count = words.len() / 4;
            let words = Tensor::from_bytes(&self.gpu, Dtype::U32, &words, &[count, 1]);
            codes.reshape(&[codes.len(), 1]).copy_rows(blocks * 8, &words, 0, count);
            absmax.reshape(&[absmax.len(), 1]).copy_rows(blocks, &Tensor::from_f32(&self.gpu, &rest, &[1, 1]), 0, 1);
        }
        let scales = match self.double {
            true => Scales::new(&self.gpu, &Factors::new(absmax.to_vec()?, true)),
            false => Scales::Plain(absmax),
        };
        Ok(Tensor::quantized(self.kind, &self.shape, codes, scales))
    }
}

impl Device {
    /// Takes what belongs to whole blocks, and gives the rest back.
    fn push<'a>(&mut self, kind: QuantType, from: Dtype, mut bytes: &'a [u8]) -> &'a [u8] {
        while self.done < self.blocks && !bytes.is_empty() {
            let (now, rest) = bytes.split_at(bytes.len().min(self.arriving.missing()));
            self.arriving.push(now);
            bytes = rest;
            if self.arriving.missing() == 0 {
                let blocks = self.arriving.len() / BLOCK;
                let left = (self.blocks - self.done - blocks) * BLOCK;
                let next = Tensor::upload(self.codes.gpu(), from, &[left.min(CHUNK)]);
                let chunk = std::mem::replace(&mut self.arriving, next).finish();
                quantize_blocks(kind, &chunk, blocks, &self.codes, &self.absmax, self.done);
                self.done += blocks;
            }
        }
        bytes
    }
}

impl Host {
    fn push(&mut self, from: Dtype, mut bytes: &[u8]) {
        if !self.partial.is_empty() {
            let (now, rest) = bytes.split_at(bytes.len().min(from.bytes() - self.partial.len()));
            self.partial.extend_from_slice(now);
            bytes = rest;
            if self.partial.len() < from.bytes() {
                return;
            }
            let whole = std::mem::take(&mut self.partial);
            self.quantize(&from.widen(&whole));
        }
        let (whole, rest) = bytes.split_at(bytes.len() / from.bytes() * from.bytes());
        for chunk in whole.chunks(HOST_CHUNK) {
            self.quantize(&from.widen(chunk));
        }
        self.partial.extend_from_slice(rest);
    }

    fn quantize(&mut self, values: &[f32]) {
        self.quantizer.push(values, &mut self.packed);
        if let Some(codes) = &mut self.codes {
            codes.push(&self.packed);
            self.packed.clear();
        }
    }
}

/// An f32 tensor of the host in four bits.
///
/// # Errors
/// As [`Upload::finish`].
pub fn quantized(gpu: &Gpu, kind: QuantType, double: bool, values: &[f32], shape: &[usize]) -> Result<Tensor> {
    let mut upload = Upload::new(gpu, Dtype::F32, kind, double, shape);
    upload.push(bytemuck::cast_slice(values));
    upload.finish()
}

/// Values among which are blocks of zeros, of one large value, of very small ones, and the bounds of codes.
pub(super) fn awkward(random: &mut Random, count: usize) -> Vec<f32> {
    let mut values = random.values(count);
    for (number, block) in values.chunks_mut(BLOCK).enumerate() {
        match number % 7 {
            1 => block.fill(0.0),
            2 => block[block.len() / 2] = 40.0,
            3 => block.iter_mut().for_each(|x| *x *= 1e-3),
            5 => block.iter_mut().for_each(|x| *x = (*x * 16.0).round() / 16.0),
            _ => {}
        }
    }
    values
}

fn check(kind: QuantType, gpu: &Gpu, n: usize) -> Result<Vec<Comparison>> {
    let (mut out, mut in_f16) = (Vec::new(), Vec::new());
    let mut exact = |what: &'static str, got: Vec<f32>, want: Vec<f64>| {
        // Bits: a difference in the least one counts.
        out.push(Comparison::new(what, got, want, 0.0));
    };
    for (shape, double) in [([n + 2, n], false), ([n, n + 2], true), ([8, 64 * n.min(40)], true)] {
        let mut random = Random::new((shape[0] * 3 + shape[1]) as u64);
        let values = awkward(&mut random, shape[0] * shape[1]);
        let (codes, absmax) = quant::quantize(kind, &values);
        let factors_host = Factors::new(absmax, double);
        let x = quantized(gpu, kind, double, &values, &shape)?;
        let floats = |bytes: &[u8]| bytes.iter().map(|&byte| f32::from(byte)).collect::<Vec<f32>>();
        exact("codes", floats(&x.to_bytes()?), wide(&floats(&codes)));
        exact("factors", factors(&x).to_vec()?, wide(&factors_host.values()));
        let mut want = vec![0.0; values.len()];
        quant::dequantize(kind, &codes, &factors_host.values(), 0, &mut want);
        exact("dequantised", dequantize(&x).to_vec()?, wide(&want));
        exact("read back", x.to_vec()?, wide(&want));
        if cooperative::serves(gpu) && values.len().is_multiple_of(8) {
            let y = Tensor::empty_of(gpu, Dtype::F16, &[values.len()]);
            dequantize_into(&x, &factors(&x), 0, &y, 0, values.len());
            // Devices need not round to the nearest.
            in_f16.push(Comparison::new("in f16", y.to_vec()?, wide(&want), 1e-3));
        }
        // A part that begins and ends anywhere, to a place further on.
        let (start, count) = (values.len() / 3, values.len() / 2);
        let y = Tensor::from_f32(gpu, &vec![7.0; values.len() + 3], &[values.len() + 3]);
        dequantize_into(&x, &factors(&x), start, &y, 3, count);
        let mut part = vec![7.0; values.len() + 3];
        part[3..3 + count].copy_from_slice(&want[start..start + count]);
        exact("a part", y.to_vec()?, wide(&part));
        // What was stored goes to the device as it is.
        let stored = Tensor::from_codes(gpu, kind, &shape, &codes, &factors_host);
        exact("stored", dequantize(&stored).to_vec()?, wide(&want));
        // From 16 bits, in pieces that cut elements.
        for half in [Dtype::Bf16, Dtype::F16] {
            let bytes = half.narrow(&values);
            let (codes, _) = quant::quantize(kind, &half.widen(&bytes));
            let mut upload = Upload::new(gpu, half, kind, double, &shape);
            bytes.chunks(4097).for_each(|piece| upload.push(piece));
            exact("codes from 16 bits", floats(&upload.finish()?.to_bytes()?), wide(&floats(&codes)));
        }
    }
    out.extend(in_f16);
    Ok(out)
}

fn cost(n: usize) -> Cost {
    let elements = ((n + 2) * n) as u64;
    Cost { flops: elements, bytes: elements * 9 / 2 + elements / 16 }
}

/// A quantised tensor of random codes, factors in eight bits, made on the device.
pub(super) fn random_quantized(gpu: &Gpu, kind: QuantType, shape: &[usize]) -> Tensor {
    let x = Tensor::empty_quantized(gpu, kind, true, shape);
    let bits = |to: &Tensor| to.copy_from(&floats(gpu, &[to.len()]).reinterpreted(Dtype::U32));
    bits(&x.words());
    if let Some(Scales::Nested { codes, absmax, map, .. }) = x.scales() {
        bits(codes);
        [absmax, map].into_iter().for_each(|floats| elementwise::fill(floats, 0.25));
    }
    x
}

fn cases(kind: QuantType, shapes: &Shapes) -> Vec<Case> {
    let size = [shapes.intermediate, shapes.hidden];
    let (elements, shape) = (size[0] * size[1], format!("{}x{}", size[0], size[1]));
    // Half a byte an element, and a factor a block: in eight bits, then in f32.
    let cost =
        |factor: usize| Cost { flops: elements as u64, bytes: (elements * 9 / 2 + elements / BLOCK * factor) as u64 };
    vec![
        Case::of("dequantize", shape.clone(), cost(1)).run(move |gpu| {
            let x = random_quantized(gpu, kind, &size);
            move || dequantize(&x)
        }),
        // Before every product: five bytes a block.
        Case::of("factors", shape.clone(), Cost::each(elements / BLOCK, 2, 5)).run(move |gpu| {
            let x = random_quantized(gpu, kind, &size);
            move || factors(&x)
        }),
        Case::of("quantize", shape, cost(4)).run(move |gpu| {
            let x = floats(gpu, &size);
            let codes = Tensor::empty_of(gpu, Dtype::U32, &[elements / 8]);
            let absmax = Tensor::empty(gpu, &[elements / BLOCK]);
            move || quantize_blocks(kind, &x, elements / BLOCK, &codes, &absmax, 0)
        }),
    ]
}

pub const NF4: Op = Op {
    name: "nf4.nf4",
    check: |gpu, n| check(QuantType::Nf4, gpu, n),
    cost,
    cases: |shapes| cases(QuantType::Nf4, shapes),
};
pub const FP4: Op = Op {
    name: "nf4.fp4",
    check: |gpu, n| check(QuantType::Fp4, gpu, n),
    cost,
    cases: |shapes| cases(QuantType::Fp4, shapes),
};
