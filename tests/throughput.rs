//! Figures of the paths that memory bounds: uploads, casts, the products of decoding, and the optimizer's updates. Run by hand, on an idle
//! machine: `cargo test --release --test throughput -- --ignored --nocapture --test-threads 1`

mod common;

use std::{
    fs,
    hint::black_box,
    io::{Read, Write},
    time::Instant,
};

use wgpu_llava::{
    gpu::{AdapterOptions, Gpu},
    ops::{
        Random,
        adamw::{self, Draw, Step, Weights},
        adamw_8bit::{self, Moments},
        cast::{self, cast},
        dropout, elementwise,
        matmul::{Epilogue, Layout, product, product_into},
    },
    tensor::{Dtype, Tensor},
};

/// The best of several seconds, each of at least one call.
fn seconds(mut call: impl FnMut()) -> f64 {
    call();
    (0..2).map(|_| timed(&mut call)).fold(f64::INFINITY, f64::min)
}

fn timed(call: &mut impl FnMut()) -> f64 {
    let begun = Instant::now();
    call();
    begun.elapsed().as_secs_f64()
}

/// The best seconds of each call, all of them in turns, so that what else the machine does meets them alike.
fn in_turns<const N: usize>(gpu: &Gpu, calls: [&dyn Fn(); N]) -> [f64; N] {
    let mut best = [f64::INFINITY; N];
    for _ in 0..12 {
        for (best, call) in best.iter_mut().zip(calls) {
            *best = best.min(timed(&mut || {
                call();
                gpu.sync().expect("the device works");
            }));
        }
    }
    best
}

fn report(what: &str, bytes: usize, seconds: f64) {
    println!("{what:<58} {:>7.2} GB/s {:>10.3} ms", bytes as f64 / seconds / 1e9, seconds * 1e3);
}

fn open() -> Gpu {
    let gpu = common::open_gpu();
    println!("{} ({})", gpu.facts().name, gpu.facts().driver);
    gpu
}

#[test]
#[ignore = "a measurement"]
fn uploads() {
    let gpu = open();
    let count = 64 << 20;
    let bytes: Vec<u8> = (0..4 * count).map(|at: usize| (at >> 9) as u8 & 0x3f).collect();
    let mut copy = vec![0u8; bytes.len()];
    report("memcpy in the host", bytes.len(), seconds(|| black_box(&mut copy).copy_from_slice(black_box(&bytes))));
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&bytes).unwrap();
    let read = || fs::File::open(file.path()).unwrap().read_exact(&mut copy).unwrap();
    report("read of a warm file", bytes.len(), seconds(read));
    // SAFETY: nothing else has the file.
    let mapped = unsafe { memmap2::Mmap::map(&fs::File::open(file.path()).unwrap()).unwrap() };

    let tensor = Tensor::empty(&gpu, &[count]);
    let other = Tensor::empty(&gpu, &[count]);
    let device_copy = || {
        tensor.copy_from(&other);
        gpu.sync().unwrap();
    };
    report("copy on the device", bytes.len(), seconds(device_copy));
    drop((tensor, other));
    for (from, to, elements) in [
        (Dtype::F32, Dtype::F32, count),
        (Dtype::Bf16, Dtype::Bf16, 2 * count),
        (Dtype::Bf16, Dtype::F32, 2 * count),
        (Dtype::F16, Dtype::F32, 2 * count),
        (Dtype::F32, Dtype::Bf16, count),
    ] {
        for (source, data) in [("memory", &bytes[..]), ("a mapped warm file", &mapped[..])] {
            let upload = || {
                let mut upload = cast::Upload::new(&gpu, from, to, &[elements]);
                data.chunks(8 << 20).for_each(|piece| upload.push(piece));
                drop(upload.finish());
                gpu.sync().unwrap();
            };
            report(&format!("upload of {from:?}, kept as {to:?}, from {source}"), bytes.len(), seconds(upload));
        }
    }
    for (from, to) in [(Dtype::Bf16, Dtype::F32), (Dtype::F16, Dtype::F32), (Dtype::F32, Dtype::Bf16)] {
        let x = Tensor::empty_of(&gpu, from, &[count / 4]);
        let call = || {
            drop(cast(&x, to));
            gpu.sync().unwrap();
        };
        let moved = count / 4 * (from.bytes() + to.bytes());
        report(&format!("cast of {from:?} to {to:?}, bytes read and written"), moved, seconds(call));
    }
}

#[test]
#[ignore = "a measurement"]
fn decoding() {
    let gpu = open();
    for [n, k] in [[1536, 576], [576, 1536], [49152, 576]] {
        for m in [1, 4, 8, 64] {
            let (_, x) = Random::new(1).tensor(&gpu, &[m, k]);
            for dtype in [Dtype::F32, Dtype::Bf16] {
                let bytes = dtype.narrow(&Random::new(2).values(n * k));
                let w = Tensor::from_bytes(&gpu, dtype, &bytes, &[n, k]);
                let times = (8_000_000 / (n * k)).clamp(1, 50);
                let call = || {
                    (0..times).for_each(|_| drop(product(Layout::Nt, &x, &w)));
                    gpu.sync().unwrap();
                };
                report(&format!("x [{m}, {k}] W [{n}, {k}]^T, {dtype:?}"), bytes.len(), seconds(call) / times as f64);
            }
        }
    }
}

#[test]
#[ignore = "a measurement"]
fn updates() {
    let gpu = open();
    let count = 4 << 20;
    let (_, gradient) = Random::new(1).tensor(&gpu, &[count]);
    let (_, full) = Random::new(2).tensor(&gpu, &[count]);
    let [m, v] = [(); 2].map(|()| elementwise::zeros(&gpu, &[count]));
    let (moments, square_sum) = (Moments::new(&gpu, count), Tensor::from_f32(&gpu, &[1e6], &[1]));
    let constants = Step {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.1,
        max_norm: 1.0,
        gradient_scale: 1.0,
        t: 10,
    };
    let half = cast(&full, Dtype::Bf16);
    let forms = [
        ("f32", Weights::Full(&full), 8),
        ("f32 with a copy in bf16", Weights::Master(&full, &half), 10),
        ("bf16 rounded at random", Weights::Stochastic(&half, Draw { seed: 1, step: 1, first: 0 }), 4),
    ];
    for (what, weights, moved) in forms {
        let call = || {
            adamw::step(weights, &gradient, &m, &v, &square_sum, &constants);
            gpu.sync().unwrap();
        };
        report(&format!("adamw of 4 Mi {what}"), count * (4 + moved + 16), seconds(call));
        let call = || {
            adamw_8bit::step(weights, &gradient, &moments, 0, &square_sum, &constants);
            gpu.sync().unwrap();
        };
        report(&format!("adamw_8bit of 4 Mi {what}"), count * (4 + moved + 4), seconds(call));
    }
}

/// A product with a weight in f16: by the device's matrices, by tiles, and as host processors compute it.
#[test]
#[ignore = "a measurement"]
fn cooperative() {
    let host = open();
    let tiles = AdapterOptions { treat_as_gpu: true, without_cooperative: true, ..Default::default() };
    let ways = [
        ("as chosen here", host),
        ("tiles", Gpu::open(&tiles).unwrap()),
        ("cooperative", Gpu::open(&AdapterOptions { without_cooperative: false, ..tiles }).unwrap()),
    ];
    println!("{:?}", ways[2].1.facts().cooperative);
    for n in [512, 1024] {
        for layout in [Layout::Nt, Layout::Nn] {
            for (what, gpu) in &ways {
                let mut random = Random::new(1);
                let a = random.tensor(gpu, &[n, n]).1;
                let b = Tensor::from_bytes(gpu, Dtype::F16, &Dtype::F16.narrow(&random.values(n * n)), &[n, n]);
                let best = seconds(|| {
                    drop(product(layout, &a, &b));
                    gpu.sync().unwrap();
                });
                println!("{n}^3 {layout:?}, {what}: {:.1} GFLOP/s", 2.0 * (n as f64).powi(3) / best / 1e9);
            }
        }
    }
}

/// What folding an adapter's product into the layer's could gain: Y = X W^T, then Y += U B^T, beside one product whose
/// inner dimension goes on from X and W to U and B; the same for dX. And a dropped gradient added at once.
#[test]
#[ignore = "a measurement"]
fn adapters() {
    let cpu = open();
    let as_gpu = Gpu::open(&AdapterOptions { treat_as_gpu: true, ..Default::default() }).unwrap();
    for (gpu, device) in [(&cpu, "processor"), (&as_gpu, "kernels of GPUs on it")] {
        for [t, n, k, r] in [[512, 512, 512, 64], [512, 512, 512, 8], [256, 1024, 512, 64]] {
            let mut random = Random::new(1);
            let mut draw = |shape: [usize; 2]| random.tensor(gpu, &shape).1;
            let add = Epilogue { accumulate: true, ..Default::default() };
            for layout in [Layout::Nt, Layout::Nn] {
                let (x, u, xu) = (draw([t, k]), draw([t, r]), draw([t, k + r]));
                let [w, b, wb] = [k, r, k + r].map(|k| draw(if layout == Layout::Nt { [n, k] } else { [k, n] }));
                let base = || drop(product(layout, &x, &w));
                let two = || product_into(layout, &u, &b, &product(layout, &x, &w), add);
                let one = || drop(product(layout, &xu, &wb));
                let [base, two, one] = in_turns(gpu, [&base, &two, &one]);
                println!(
                    "{device}, {layout:?}, T {t}, N {n}, K {k}, r {r}: {:.1} ms; with the adapter's product added \
                     {:.3} of it, in one {:.3}",
                    base * 1e3,
                    two / base,
                    one / base
                );
            }
            let key = dropout::Key { probability: 0.1, seed: 0, stream: 0, step: 0 };
            let (x, y) = (draw([t, n]), draw([t, n]));
            let apart = || elementwise::add_to(&y, &dropout::apply(&x, key), &y);
            let at_once = || dropout::add_to(&x, key, &y);
            let [apart, at_once] = in_turns(gpu, [&apart, &at_once]);
            println!(
                "{device}, dropped and added, {t} x {n}: {:.2} ms, at once {:.3} of it",
                apart * 1e3,
                at_once / apart
            );
        }
    }
}

/// What the host needs to record a dispatch: with the bind group of an earlier one, and with one of its own.
#[test]
#[ignore = "a measurement"]
fn recording() {
    /// Fewer than are submitted at once.
    const DISPATCHES: usize = 32;
    let gpu = open();
    let all = elementwise::zeros(&gpu, &[64 * 64]);
    let mut best = [f64::INFINITY; 3];
    for turn in 0..1000 {
        gpu.sync().unwrap();
        // Pairs of slices that have not been bound together before.
        let pairs: Vec<_> = (0..DISPATCHES)
            .map(|at| (turn * DISPATCHES + at) % (64 * 64))
            .filter(|pair| pair / 64 != pair % 64)
            .map(|pair| [pair / 64, pair % 64].map(|part| all.part(64 * part, &[64])))
            .collect();
        let call = |at: usize| elementwise::add_in_place(&pairs[at][0], &pairs[at][1]);
        let first = timed(&mut || (0..pairs.len()).for_each(call)) / pairs.len() as f64;
        gpu.sync().unwrap();
        let again = timed(&mut || (0..pairs.len()).for_each(call)) / pairs.len() as f64;
        gpu.sync().unwrap();
        let submitted = timed(&mut || {
            call(0);
            gpu.sync().unwrap();
        });
        // The first turns make the pairs known.
        if turn < 64 * 64 / DISPATCHES {
            best[0] = best[0].min(first);
        }
        best[1] = best[1].min(again);
        best[2] = best[2].min(submitted);
    }
    let [first, again, submitted] = best.map(|seconds| seconds * 1e6);
    println!(
        "recorded in {again:.2} us, with a bind group of its own {first:.2} us; submitted and awaited {submitted:.0} us"
    );
}
