//! Weights that stay in 16 bits: every pattern through the casts, tensors that arrive in pieces, and the functions of
//! the tape on packed weights beside the same functions on the widened ones.

use std::sync::OnceLock;

use half::{bf16, f16};
use wgpu_llava::{
    autograd::{
        Tape, Weight,
        functions::{self, DoraWeights, DropoutKey, LoraWeights},
    },
    gpu::{AdapterOptions, Gpu},
    ops::{
        Random,
        cast::{self, cast},
        elementwise,
        matmul::{Layout, product},
        nf4,
    },
    quant::QuantType,
    tensor::{Dtype, Rounding, Tensor},
};

const PACKED: [Dtype; 2] = [Dtype::Bf16, Dtype::F16];

/// With kernels of which none rounds what it reads, as those of cooperative matrices do.
fn gpu() -> &'static Gpu {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    GPU.get_or_init(|| {
        Gpu::open(&AdapterOptions { without_cooperative: true, ..Default::default() }).expect("tools/test installs one")
    })
}

/// With the kernels of GPUs, of which none rounds what it reads.
fn as_gpu() -> Gpu {
    Gpu::open(&AdapterOptions { treat_as_gpu: true, without_cooperative: true, ..Default::default() })
        .expect("the same adapter")
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect()
}

fn halves(bytes: &[u8]) -> Vec<u16> {
    bytes.chunks_exact(2).map(|half| u16::from_le_bytes([half[0], half[1]])).collect()
}

#[test]
fn every_16_bit_pattern_widens_to_its_value() {
    let patterns: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for dtype in PACKED {
        let x = Tensor::from_bytes(gpu(), dtype, &patterns, &[1 << 16]);
        assert_eq!(x.to_bytes().unwrap(), patterns, "{dtype:?} comes back as it went");
        let wide = words(&cast(&x, Dtype::F32).to_bytes().unwrap());
        let to_other =
            halves(&cast(&x, if dtype == Dtype::F16 { Dtype::Bf16 } else { Dtype::F16 }).to_bytes().unwrap());
        for bits in 0..=u16::MAX {
            let got = wide[usize::from(bits)];
            let (want, other) = match dtype {
                Dtype::F16 => {
                    let x = f16::from_bits(bits).to_f32();
                    (x, bf16::from_f32(x).to_bits())
                }
                _ => {
                    let x = f32::from_bits(u32::from(bits) << 16);
                    (x, f16::from_f32(x).to_bits())
                }
            };
            if want.is_nan() {
                assert!(f32::from_bits(got).is_nan(), "{dtype:?} {bits:04x} is {got:08x}");
                assert_eq!(
                    to_other[usize::from(bits)] & 0x7fff & !0x3ff,
                    other & 0x7fff & !0x3ff,
                    "{dtype:?} {bits:04x}"
                );
            } else {
                assert_eq!(got, want.to_bits(), "{dtype:?} {bits:04x}");
                assert_eq!(to_other[usize::from(bits)], other, "{dtype:?} {bits:04x} in the other type");
            }
        }
    }
}

/// Kernels of products widen what they load in ways of their own; bfloat16 is cut out of f32 in all of them.
#[test]
fn every_finite_f16_is_itself_in_products() {
    let finite = |bits: u16| if f16::from_bits(bits).is_finite() { bits } else { 0 };
    let bytes: Vec<u8> = (0..=u16::MAX).flat_map(|bits| finite(bits).to_le_bytes()).collect();
    let want: Vec<f32> = (0..=u16::MAX).map(|bits| f16::from_bits(finite(bits)).to_f32()).collect();
    let identity: Vec<f32> = (0..64).map(|at| f32::from(u8::from(at % 9 == 0))).collect();
    for gpu in [gpu(), &as_gpu()] {
        // Rows of 8 columns, or as many columns in 8 rows; one row of the left side, a few, and all.
        for (layout, rows) in [(Layout::Nt, 1), (Layout::Nt, 4), (Layout::Nt, 8), (Layout::Nn, 8)] {
            let (n, shape) = (8192, if layout == Layout::Nt { [8192, 8] } else { [8, 8192] });
            let weight = Tensor::from_bytes(gpu, Dtype::F16, &bytes, &shape);
            let y =
                product(layout, &Tensor::from_f32(gpu, &identity[..8 * rows], &[rows, 8]), &weight).to_vec().unwrap();
            let at = |at: usize| if layout == Layout::Nt { want[at % n * 8 + at / n] } else { want[at] };
            let wrong = (0..rows * n).find(|&place| y[place] != at(place));
            assert_eq!(wrong.map(|place| (place, y[place], at(place))), None, "{layout:?}, {rows} rows");
        }
    }
}

#[test]
fn f32_rounds_to_nearest_and_ties_to_even() {
    // Every 16-bit value of both types, its neighbours in f32, the middles to the next one and their neighbours;
    // the ends of every range; and random bits.
    let mut values: Vec<f32> = Vec::new();
    for bits in 0..=u16::MAX {
        for base in [u32::from(bits) << 16, f16::from_bits(bits).to_f32().to_bits()] {
            for step in [0, 0x800, 0x1000, 0x8000] {
                let middle = base.wrapping_add(step);
                values.extend([middle.wrapping_sub(1), middle, middle.wrapping_add(1)].map(f32::from_bits));
            }
        }
    }
    // Middles between subnormals of f16 are f32s of every exponent.
    for bits in 0..0x400u16 {
        let middle = (f32::from(bits) + 0.5) * 2f32.powi(-24);
        let near = [middle.to_bits() - 1, middle.to_bits(), middle.to_bits() + 1].map(f32::from_bits);
        values.extend(near.iter().flat_map(|&x| [x, -x]));
    }
    values.extend([f32::MIN_POSITIVE, f32::from_bits(1), f32::MAX, f32::MIN, 65504.0, 65519.996, 65520.0, -65536.0]);
    values.extend([f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN, f32::from_bits(0x7f80_0001), -0.0]);
    values.extend(Random::new(1).indices(1 << 18, usize::MAX).iter().map(|&bits| f32::from_bits(bits)));
    values.push(1.0); // an odd count
    assert!(!values.len().is_multiple_of(2));
    let x = Tensor::from_f32(gpu(), &values, &[values.len()]);
    for dtype in PACKED {
        let got = halves(&cast(&x, dtype).to_bytes().unwrap());
        assert_eq!(got.len(), values.len());
        for (x, got) in values.iter().zip(got) {
            let want = if dtype == Dtype::F16 { f16::from_f32(*x).to_bits() } else { bf16::from_f32(*x).to_bits() };
            assert_eq!(got, want, "{dtype:?} of {x:e} = {:08x}", x.to_bits());
        }
    }
}

/// Pushes bytes in pieces of awkward sizes, with large ones among them.
fn push_in_pieces(bytes: &[u8], mut push: impl FnMut(&[u8])) {
    let sizes = [1usize, 3, 4, 4097, (1 << 20) + 1, 7, (1 << 20) - 1, (20 << 20) + 2, 2];
    let (mut rest, mut turn) = (bytes, 0);
    while !rest.is_empty() {
        let (now, later) = rest.split_at(sizes[turn % sizes.len()].min(rest.len()));
        push(now);
        (rest, turn) = (later, turn + 1);
    }
}

#[test]
fn a_tensor_arrives_in_pieces_of_any_size() {
    for (dtype, shape) in [(Dtype::Bf16, [1003, 1001]), (Dtype::F32, [4001, 5003]), (Dtype::F16, [1, 1])] {
        let count = shape[0] * shape[1] * dtype.bytes();
        let bytes: Vec<u8> = (0..count).map(|at| (at ^ (at >> 8) ^ (at >> 16)) as u8).collect();
        let mut upload = Tensor::upload(gpu(), dtype, &shape);
        push_in_pieces(&bytes, |piece| upload.push(piece));
        assert_eq!(upload.missing(), 0);
        assert!(upload.finish().to_bytes().unwrap() == bytes, "{dtype:?} {shape:?}");
    }
}

#[test]
fn a_tensor_is_converted_while_it_arrives() {
    // More than one chunk of 8 Mi elements, and an odd number of them. The host's processor converts by itself.
    let shape = [4099, 4097];
    let values = Random::new(3).values(shape[0] * shape[1]);
    for gpu in [gpu(), &as_gpu()] {
        for (from, to) in [(Dtype::F32, Dtype::Bf16), (Dtype::Bf16, Dtype::F32), (Dtype::F16, Dtype::Bf16)] {
            let bytes = from.narrow(&values);
            let mut upload = cast::Upload::new(gpu, from, to, &shape);
            assert_eq!(upload.missing(), bytes.len());
            push_in_pieces(&bytes, |piece| upload.push(piece));
            assert_eq!(upload.missing(), 0);
            let y = upload.finish();
            assert_eq!((y.dtype(), y.shape()), (to, &shape[..]));
            assert!(y.to_bytes().unwrap() == to.narrow(&from.widen(&bytes)), "{from:?} to {to:?}");
        }
    }
    let upload = cast::Upload::new(gpu(), Dtype::Bf16, Dtype::Bf16, &[3]);
    assert_eq!(upload.missing(), 6);
}

#[test]
fn ops_without_packed_kernels_refuse_packed_tensors() {
    let x = Tensor::from_bytes(gpu(), Dtype::Bf16, &[0; 12], &[2, 3]);
    let refused: [(&str, &dyn Fn()); 4] = [
        ("add", &|| drop(elementwise::add(&x, &x))),
        ("copy", &|| Tensor::empty(gpu(), &[2, 3]).copy_from(&x)),
        ("write", &|| x.write(&[0.0; 6])),
        ("an odd row", &|| x.copy_rows(0, &x, 1, 1)),
    ];
    for (name, call) in refused {
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)).is_err(), "{name} takes a packed tensor");
    }
}

#[derive(Clone, Copy, Debug)]
enum Adapter {
    None,
    Lora(usize),
    Dora(usize),
}

/// Output, dx, and the gradients of the adapter's tensors, of a linear layer over a frozen weight.
fn linear(gpu: &Gpu, weight: &Tensor, tokens: usize, adapter: Adapter) -> Vec<Vec<f32>> {
    let (n, k) = (weight.rows(), weight.cols());
    let mut random = Random::new(7);
    let mut tape = Tape::recording();
    let x = tape.leaf(random.tensor(gpu, &[tokens, k]).1);
    let bias = Weight::frozen(random.tensor(gpu, &[n]).1);
    let frozen = Weight::frozen(weight.clone());
    let mut trains =
        |shape: &[usize]| Weight { value: random.tensor(gpu, shape).1, grad: Some(elementwise::zeros(gpu, shape)) };
    let rank = match adapter {
        Adapter::None => None,
        Adapter::Lora(rank) | Adapter::Dora(rank) => Some(rank),
    };
    let lora = rank.map(|rank| LoraWeights {
        a: trains(&[rank, k]),
        b: trains(&[n, rank]),
        scale: 0.5,
        dropout: Some(DropoutKey { probability: 0.25, seed: 3, stream: 1, step: 2 }),
    });
    let dora = DoraWeights { magnitude: trains(&[n]), norm: Tensor::from_f32(gpu, &vec![1.5; n], &[n]) };
    let y = match (&lora, adapter) {
        (None, _) => functions::linear(&mut tape, &x, &frozen, Some(&bias)),
        (Some(lora), Adapter::Dora(_)) => functions::linear_dora(&mut tape, &x, &frozen, Some(&bias), lora, &dora),
        (Some(lora), _) => functions::linear_lora(&mut tape, &x, &frozen, Some(&bias), lora),
    };
    let dy = Random::new(8).tensor(gpu, &[tokens, n]).1;
    let gradients = tape.backward(&y, dy);
    let mut out = vec![y.value.to_vec().unwrap(), gradients.of(&x).unwrap().to_vec().unwrap()];
    for weight in lora.iter().flat_map(|lora| [&lora.a, &lora.b, &dora.magnitude]) {
        out.push(weight.grad.as_ref().unwrap().to_vec().unwrap());
    }
    out
}

fn assert_close(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    let largest = want.iter().fold(1e-3f32, |largest, x| largest.max(x.abs()));
    let worst = got.iter().zip(want).map(|(a, b)| (a - b).abs() / largest).fold(0.0, f32::max);
    assert!(got.len() == want.len() && worst <= tolerance, "{what}: {worst:e}, {tolerance:e} allowed");
}

#[test]
fn linear_layers_on_packed_weights_are_those_on_widened_ones() {
    let as_gpu = as_gpu();
    for (device, tokens) in [(gpu(), 70), (gpu(), 5), (gpu(), 3), (&as_gpu, 70), (&as_gpu, 3)] {
        for dtype in PACKED {
            for [n, k] in [[67, 129], [130, 64]] {
                let bytes = dtype.narrow(&Random::new(n as u64).values(n * k));
                let packed = Tensor::from_bytes(device, dtype, &bytes, &[n, k]);
                let wide = cast(&packed, Dtype::F32);
                for adapter in [Adapter::None, Adapter::Lora(5), Adapter::Dora(5)] {
                    let [got, want] = [&packed, &wide].map(|weight| linear(device, weight, tokens, adapter));
                    let names = ["y", "dx", "dA", "dB", "dmagnitude"];
                    for (what, (got, want)) in names.iter().zip(got.iter().zip(&want)) {
                        let what = format!("{what} of {tokens} tokens, {dtype:?} [{n}, {k}], {adapter:?}");
                        // GPUs' tiles sum in the same order; elsewhere lanes share K otherwise.
                        assert_close(&what, got, want, if tokens > 4 && !device.is_cpu() { 0.0 } else { 1e-6 });
                    }
                }
            }
        }
    }
}

#[test]
fn layers_of_a_run_in_16_bits_round_what_they_multiply_where_matrices_cooperate() {
    let device = Gpu::open(&AdapterOptions { treat_as_gpu: true, ..Default::default() }).unwrap();
    if device.cooperative_side().is_none() {
        eprintln!("skipped: this device has no cooperative matrices");
        return;
    }
    let [n, k] = [132, 64];
    let values = Random::new(3).values(n * k);
    let wide = |weight: &Tensor| Tensor::from_f32(&device, &weight.to_vec().unwrap(), &[n, k]);
    let codes = nf4::quantized(&device, QuantType::Nf4, true, &values, &[n, k]).unwrap();
    let weights = PACKED.into_iter().flat_map(|dtype| {
        let packed = Tensor::from_bytes(&device, dtype, &dtype.narrow(&values), &[n, k]);
        [(wide(&packed), packed), (wide(&codes), codes.clone().with_rounding(Rounding::of(dtype)))]
    });
    for (wide, weight) in weights {
        for (adapter, outputs) in [(Adapter::None, 2), (Adapter::Lora(16), 4), (Adapter::Dora(32), 5)] {
            let [got, want] = [&weight, &wide].map(|weight| linear(&device, weight, 70, adapter));
            for (what, (got, want)) in
                ["y", "dx", "dA", "dB", "dmagnitude"][..outputs].iter().zip(got.iter().zip(&want))
            {
                assert_close(&format!("{what} of {weight:?}, {adapter:?}"), got, want, 2e-3);
                assert!(got != want, "{what} of {weight:?}, {adapter:?}: nothing is rounded");
            }
        }
    }
}

/// Output, loss and the gradient that reaches the embedding's rows, of a head [V, D] tied to the embedding.
fn tied_head(table: &Tensor, ids: &[u32]) -> [Vec<f32>; 3] {
    let mut tape = Tape::recording();
    let weight = Weight::frozen(table.clone());
    let words = functions::embedding(&mut tape, &weight, ids);
    let embedded = words.value.to_vec().unwrap();
    let x = tape.leaf(words.value);
    let targets: Vec<u32> = ids.iter().rev().map(|&id| id.min(table.rows() as u32 - 1)).collect();
    let losses = functions::head_loss(&mut tape, &x, &weight, &targets, 0.25);
    let kept = losses.value.to_vec().unwrap();
    let seed = Tensor::from_f32(gpu(), &vec![1.0; ids.len()], losses.value.shape());
    let gradients = tape.backward(&losses, seed);
    [embedded, kept, gradients.of(&x).unwrap().to_vec().unwrap()]
}

/// Rows too long for a uniform go to the kernels of GPUs, in parts that can be bound: Qwen2-7B's down_proj on a
/// processor.
#[test]
fn rows_longer_than_a_uniform_are_cut_where_they_cannot_be_bound() {
    let gpu = Gpu::open(&AdapterOptions { max_binding: Some(8 << 20), ..Default::default() }).expect("an adapter");
    let [k, n] = [33_000, 150];
    let mut random = Random::new(5);
    let (weight, wide) = random.tensor(&gpu, &[n, k]);
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let weight_on_device = cast(&wide, dtype);
        let rounded = weight_on_device.to_vec().unwrap();
        assert!(dtype != Dtype::F32 || rounded == weight);
        for tokens in [1, 3] {
            let (x, tx) = random.tensor(&gpu, &[tokens, k]);
            let mut tape = Tape::silent();
            let tx = tape.constant(tx);
            let y = functions::linear(&mut tape, &tx, &Weight::frozen(weight_on_device.clone()), None);
            for (at, got) in y.value.to_vec().unwrap().into_iter().enumerate() {
                let (row, column) = (&x[at / n * k..][..k], &rounded[at % n * k..][..k]);
                let want: f64 = row.iter().zip(column).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                // 33,000 roundings of a sum that reaches hundreds, in a row where nothing is cut.
                assert!((f64::from(got) - want).abs() < 3e-3, "{dtype:?}, {tokens} tokens, {at}: {got} for {want}");
            }
        }
    }
}

#[test]
fn a_packed_head_tied_to_the_embedding_gives_the_same_losses() {
    let (vocab_size, d) = (301, 33);
    for dtype in PACKED {
        let bytes = dtype.narrow(&Random::new(5).values(vocab_size * d));
        let packed = Tensor::from_bytes(gpu(), dtype, &bytes, &[vocab_size, d]);
        // u32::MAX leaves a row of zeros; more rows than one chunk of logits holds.
        let mut ids = Random::new(6).indices(300, vocab_size);
        ids[17] = u32::MAX;
        let (got, want) = (tied_head(&packed, &ids), tied_head(&cast(&packed, Dtype::F32), &ids));
        for (what, (got, want)) in ["embedding", "losses", "dx"].iter().zip(got.iter().zip(&want)) {
            assert_close(&format!("{what} with {dtype:?}"), got, want, 1e-6);
        }
    }
}

/// Activations are rounded to f16 there, and gradients lose no more than that, however small they are; nor do activations
/// beside a weight in bf16, however large.
#[test]
fn layers_of_weights_in_16_bits_run_on_cooperative_matrices() {
    let cooperative =
        Gpu::open(&AdapterOptions { treat_as_gpu: true, ..Default::default() }).expect("the same adapter");
    if cooperative.cooperative_side().is_none() {
        println!("skipped: this device has no cooperative matrices of f16");
        return;
    }
    for (dtype, size, [tokens, n, k]) in [(Dtype::F16, 1.0, [70, 67, 129]), (Dtype::Bf16, 1e8, [70, 68, 132])] {
        let run = |gpu: &Gpu| {
            let mut random = Random::new(9);
            let mut tape = Tape::recording();
            let x: Vec<f32> = random.values(tokens * k).iter().map(|x| x * size).collect();
            let x = tape.leaf(Tensor::from_f32(gpu, &x, &[tokens, k]));
            let value = Tensor::from_bytes(gpu, dtype, &dtype.narrow(&random.values(n * k)), &[n, k]);
            let weight = Weight { value, grad: Some(elementwise::zeros(gpu, &[n, k])) };
            let y = functions::linear(&mut tape, &x, &weight, None);
            let dy: Vec<f32> = random.values(tokens * n).iter().map(|x| x * 1e-10).collect();
            let gradients = tape.backward(&y, Tensor::from_f32(gpu, &dy, &[tokens, n]));
            let [dx, dw] = [gradients.of(&x), weight.grad.as_ref()].map(Option::unwrap);
            [(&y.value, size), (dx, 1e-10), (dw, 1e-10 * size)]
                .map(|(x, size)| x.to_vec().unwrap().iter().map(|x| x / size).collect::<Vec<f32>>())
        };
        let (got, want) = (run(&cooperative), run(&as_gpu()));
        for (what, (got, want)) in ["y", "dx", "dW"].iter().zip(got.iter().zip(&want)) {
            assert_close(&format!("{what}, {dtype:?}"), got, want, 1e-3);
            assert!(got != want, "{what}, {dtype:?}, is not rounded: it ran elsewhere");
        }
    }
}
