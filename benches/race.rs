//! The product of two square matrices raced against kernels from elsewhere, all in turns in one process:
//! `cargo bench --bench race -- [--size 1024] [--rounds 15] [--out FILE.json] RIVAL.wgsl ...`
//!
//! A rival computes C = A B in f32, row-major, n x n, from bindings 0 to 2 of group 0. Its text has NNN where n belongs,
//! and a comment with its workgroups, as `dispatch (n/128, n/8, 1)`.

use std::{fs, process::exit, time::Instant};

use serde_json::{Value, json};
use wgpu_llava::{
    gpu::{AdapterOptions, Gpu},
    ops::{
        Random,
        matmul::{self, Layout},
    },
    tensor::Tensor,
};

/// One racer: does the product once and waits for it.
struct Racer {
    name: String,
    run: Box<dyn FnMut()>,
    /// Of the first run.
    result: Vec<f32>,
    /// Seconds of the first run, with the compilation.
    first: f64,
    seconds: Vec<f64>,
}

impl Racer {
    fn new(name: &str, run: impl FnMut() + 'static, result: impl Fn() -> Vec<f32>) -> Self {
        let mut racer = Self { name: name.into(), run: Box::new(run), result: vec![], first: 0.0, seconds: vec![] };
        racer.first = racer.timed();
        racer.result = result();
        racer
    }

    fn timed(&mut self) -> f64 {
        let started = Instant::now();
        (self.run)();
        started.elapsed().as_secs_f64()
    }
}

fn fail(message: String) -> ! {
    eprintln!("race: {message}");
    exit(2)
}

/// This project's product, as models call it.
fn ours(n: usize, a: &[f32], b: &[f32]) -> Racer {
    let gpu = Gpu::open(&AdapterOptions::default()).unwrap_or_else(|error| fail(error.to_string()));
    let tensor = |values| Tensor::from_f32(&gpu, values, &[n, n]);
    let (a, b, c) = (tensor(a), tensor(b), tensor(&vec![0.0; n * n]));
    let result = c.clone();
    let run = move || {
        matmul::product_into(Layout::Nn, &a, &b, &c, matmul::Epilogue::default());
        gpu.sync().expect("the device works");
    };
    Racer::new("wgpu-llava", run, move || result.to_vec().expect("the device works"))
}

struct Rivals {
    device: wgpu::Device,
    queue: wgpu::Queue,
    device_name: String,
    n: usize,
    operands: [wgpu::Buffer; 3],
    read: wgpu::Buffer,
}

impl Rivals {
    fn open(n: usize, a: &[f32], b: &[f32]) -> Self {
        let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
        descriptor.flags = wgpu::InstanceFlags::empty();
        let instance = wgpu::Instance::new(descriptor);
        let adapter = pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))
            .unwrap_or_else(|error| fail(error.to_string()));
        let device_name = format!("{} ({})", adapter.get_info().name, adapter.get_info().driver_info);
        println!("{device_name}");
        let wanted = wgpu::DeviceDescriptor { required_limits: adapter.limits(), ..Default::default() };
        let (device, queue) =
            pollster::block_on(adapter.request_device(&wanted)).unwrap_or_else(|error| fail(error.to_string()));
        let (size, usage) = ((n * n * 4) as u64, wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC);
        let buffer = |usage| {
            device.create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false })
        };
        let operands = [a, b, &vec![0.0; n * n]].map(|values| {
            let buffer = buffer(usage | wgpu::BufferUsages::COPY_DST);
            queue.write_buffer(&buffer, 0, bytemuck::cast_slice(values));
            buffer
        });
        let read = buffer(wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST);
        Self { device, queue, device_name, n, operands, read }
    }

    fn racer(&self, path: &str) -> Racer {
        let text = fs::read_to_string(path).unwrap_or_else(|error| fail(format!("{path}: {error}")));
        let groups = groups(&text, self.n)
            .unwrap_or_else(|| fail(format!("{path}: no comment with `dispatch (n/128, n/8, 1)` or alike")));
        let text = text.replace("NNN", &self.n.to_string());
        let descriptor = wgpu::ShaderModuleDescriptor { label: None, source: wgpu::ShaderSource::Wgsl(text.into()) };
        let started = Instant::now();
        // SAFETY: rivals are what the caller chose to run; like our own kernels they get no bounds checks.
        let module =
            unsafe { self.device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) };
        let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: None,
            layout: None,
            module: &module,
            entry_point: None,
            compilation_options: wgpu::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: None,
        });
        let entries: Vec<_> = (0..)
            .zip(&self.operands)
            .map(|(binding, buffer)| wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() })
            .collect();
        let group = self.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &pipeline.get_bind_group_layout(0),
            entries: &entries,
        });
        let (device, queue) = (self.device.clone(), self.queue.clone());
        let run = move || {
            let mut encoder = device.create_command_encoder(&Default::default());
            let mut pass = encoder.begin_compute_pass(&Default::default());
            pass.set_pipeline(&pipeline);
            pass.set_bind_group(0, &group, &[]);
            pass.dispatch_workgroups(groups[0], groups[1], groups[2]);
            drop(pass);
            queue.submit([encoder.finish()]);
            device.poll(wgpu::PollType::wait_indefinitely()).expect("the device works");
        };
        let (device, queue, c, read) =
            (self.device.clone(), self.queue.clone(), self.operands[2].clone(), self.read.clone());
        let result = move || {
            let mut encoder = device.create_command_encoder(&Default::default());
            encoder.copy_buffer_to_buffer(&c, 0, &read, 0, read.size());
            queue.submit([encoder.finish()]);
            read.slice(..).map_async(wgpu::MapMode::Read, |_| ());
            device.poll(wgpu::PollType::wait_indefinitely()).expect("the device works");
            let values = bytemuck::pod_collect_to_vec(&read.slice(..).get_mapped_range().expect("mapped"));
            read.unmap();
            values
        };
        let mut racer = Racer::new(path, run, result);
        racer.first = started.elapsed().as_secs_f64();
        racer
    }
}

/// The workgroups that a comment names, each dimension `n/DIVISOR` or a number.
fn groups(text: &str, n: usize) -> Option<[u32; 3]> {
    let (_, rest) = text.split_once("dispatch (")?;
    let (list, _) = rest.split_once(')')?;
    let dimension = |term: &str| match term.trim().split_once('/') {
        Some(("n", divisor)) => divisor.parse().ok().map(|divisor: usize| n.div_ceil(divisor) as u32),
        Some(_) => None,
        None => term.trim().parse().ok(),
    };
    let mut dimensions = list.split(',').map(dimension);
    Some([dimensions.next()??, dimensions.next()??, dimensions.next()??])
}

struct Arguments {
    n: usize,
    rounds: usize,
    out: Option<String>,
    rivals: Vec<String>,
}

impl Arguments {
    fn read() -> Self {
        let mut read = Self { n: 1024, rounds: 15, out: None, rivals: vec![] };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let mut value = || words.next().unwrap_or_else(|| fail(format!("{word} takes a value")));
            let number = |value: String| {
                let number = value.parse().ok().filter(|&number: &usize| number > 0);
                number.unwrap_or_else(|| fail(format!("{value} is no positive number")))
            };
            match word.as_str() {
                "--size" => read.n = number(value()),
                "--rounds" => read.rounds = number(value()),
                "--out" => read.out = Some(value()),
                // What cargo adds.
                "--bench" => {}
                _ => read.rivals.push(word),
            }
        }
        read
    }
}

fn main() {
    let Arguments { n, rounds, out, rivals } = Arguments::read();
    let mut random = Random::new(1);
    let (a, b) = (random.values(n * n), random.values(n * n));
    let others = Rivals::open(n, &a, &b);
    let mut racers: Vec<_> = rivals.iter().map(|path| others.racer(path)).collect();
    racers.push(ours(n, &a, &b));
    let ours = racers.len() - 1;
    for racer in &racers[..ours] {
        let worst = racers[ours].result.iter().zip(&racer.result).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
        if worst > 1e-3 {
            fail(format!("{} computes something else: off by {worst}", racer.name));
        }
    }
    for _ in 0..rounds {
        for racer in &mut racers {
            let seconds = racer.timed();
            racer.seconds.push(seconds);
        }
    }
    let speed = |seconds: f64| 2.0 * (n as f64).powi(3) / seconds / 1e9;
    println!("{:<48} {:>8} {:>8} {:>8}  GFLOP/s, {n} x {n}", "", "first s", "median", "best");
    let mut rows = vec![];
    for racer in &mut racers {
        racer.seconds.sort_by(f64::total_cmp);
        let (median, best) = (speed(racer.seconds[rounds / 2]), speed(racer.seconds[0]));
        println!("{:<48} {:>8.2} {median:>8.1} {best:>8.1}", racer.name, racer.first);
        let name = racer.name.rsplit('/').next();
        rows.push(json!({"name": name, "first_seconds": racer.first, "median_gflops": median, "best_gflops": best}));
    }
    let median = |row: &Value| row["median_gflops"].as_f64().unwrap_or(0.0);
    let fastest_rival = rows[..ours].iter().map(median).fold(0.0, f64::max);
    let ratio = (fastest_rival > 0.0).then(|| median(&rows[ours]) / fastest_rival);
    if let Some(ratio) = ratio {
        println!("{ratio:.2} times the fastest rival, by medians");
    }
    if let Some(path) = out {
        let words: Vec<_> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
        // Where files lie is the machine's own affair.
        let words: Vec<_> = words.iter().filter_map(|word| word.rsplit('/').next()).collect();
        let command = format!("cargo bench --bench race -- {}", words.join(" "));
        let data = json!({"command": command, "commit": option_env!("WGPU_LLAVA_COMMIT"), "device": others.device_name, "size": n, "rounds": rounds, "racers": rows, "ratio": ratio});
        fs::write(&path, format!("{data:#}\n")).unwrap_or_else(|error| fail(format!("{path}: {error}")));
    }
}
