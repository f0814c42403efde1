//! Loading a model keeps the host's memory small, whatever the model's size: files are mapped, tensors streamed.
//!
//! The real size is a run by hand: `cargo test --release --test loading -- --ignored --nocapture`.

mod common;

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::json;
use wgpu_llava::{
    formats::{
        model_folder::ModelFolder,
        safetensors::Dtype,
        safetensors_writer::{TensorData, TensorHead, write_sharded},
    },
    gpu::Gpu,
    models::{config::ModelConfig, llava::Llava, names},
};

/// Anonymous memory of this process in bytes (`RssAnon`); none where the system does not tell.
fn anonymous() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}

/// Runs `work` and gives the largest difference of anonymous memory and the device's bytes meanwhile.
fn peak<T>(gpu: &Gpu, work: impl FnOnce() -> T) -> (T, u64) {
    let (stop, largest) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let watcher = thread::spawn({
        let (stop, largest, gpu) = (stop.clone(), largest.clone(), gpu.clone());
        move || {
            while !stop.load(Ordering::Relaxed) {
                let beyond = anonymous().unwrap_or(0).saturating_sub(gpu.device_bytes());
                largest.fetch_max(beyond, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(2));
            }
        }
    });
    let done = work();
    stop.store(true, Ordering::Relaxed);
    watcher.join().unwrap();
    (done, largest.load(Ordering::Relaxed))
}

/// A folder of random bf16 weights in shards of at most `shard` bytes. Gives the bytes of its tensors.
fn write_random(folder: &Path, hidden: usize, layers: usize, vocabulary: usize, shard: u64) -> u64 {
    let config = json!({"model_type": "llama", "hidden_size": hidden, "intermediate_size": hidden * 11 / 4,
        "num_hidden_layers": layers, "num_attention_heads": hidden / 64, "vocab_size": vocabulary});
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let config = ModelConfig::parse("config.json", config.to_string().as_bytes()).unwrap();
    let random = ModelFolder::random(&config, Dtype::BF16, 0).unwrap();
    let wanted = names::expected_tensors(&config);
    let heads: Vec<TensorHead> = wanted
        .iter()
        .map(|(name, shape)| TensorHead {
            name: names::on_disk(name, &config),
            dtype: Dtype::BF16,
            shape: shape.clone(),
        })
        .collect();
    let bytes = heads.iter().map(TensorHead::bytes).sum();
    write_sharded(folder, heads, shard, &mut |head| {
        Ok(TensorData::Stored(random.stored(&names::canonical(&head.name))?))
    })
    .unwrap();
    bytes
}

/// Seconds that fresh memory of this size takes to be written once: what a device in the host's memory costs anyway.
fn touch(bytes: u64) -> f64 {
    let started = Instant::now();
    // Zeros come from the system untouched.
    let mut memory = vec![0_u8; bytes as usize];
    memory.fill(1);
    assert_eq!(std::hint::black_box(&memory).last(), Some(&1));
    started.elapsed().as_secs_f64()
}

/// Reads every file of a folder once, in pieces.
fn read_files(folder: &Path) -> f64 {
    use std::io::Read;
    let started = Instant::now();
    let mut piece = vec![0; 16 << 20];
    for entry in fs::read_dir(folder).unwrap() {
        let mut file = fs::File::open(entry.unwrap().path()).unwrap();
        while file.read(&mut piece).unwrap() > 0 {}
    }
    started.elapsed().as_secs_f64()
}

#[test]
fn loading_holds_no_more_than_a_few_pieces_on_the_host() {
    if anonymous().is_none() {
        eprintln!("skipped: this system does not tell what of a process's memory is anonymous");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let bytes = write_random(dir.path(), 1024, 12, 32_000, 100_000_000);
    assert!(bytes > 300_000_000 && dir.path().join("model-00003-of-00005.safetensors").is_file(), "{bytes} bytes");
    let gpu = common::open_gpu();
    let before = anonymous().unwrap_or(0);
    let (model, most) = peak(&gpu, || {
        let folder = ModelFolder::open(dir.path()).unwrap();
        let model = Llava::load(&gpu, &folder).unwrap();
        gpu.sync().unwrap();
        model
    });
    // The weights are on the device as they are in the files: two bytes each, and norms in four.
    assert!(gpu.device_bytes() < bytes + bytes / 8, "{} bytes on the device for {bytes}", gpu.device_bytes());
    let grown = most.saturating_sub(before);
    println!("{bytes} bytes of weights: {grown} bytes of host memory beside the device's");
    assert!(grown < 160_000_000, "{grown} bytes of host memory for {bytes} bytes of weights");
    drop(model);
}

#[test]
#[ignore = "writes 4 GiB and takes some minutes"]
fn four_gibibytes() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = write_random(dir.path(), 2560, 24, 32_000, 1_000_000_000);
    let gpu = common::open_gpu();
    let (touching, _, reading) = (touch(bytes), read_files(dir.path()), read_files(dir.path()));
    let started = Instant::now();
    let (model, most) = peak(&gpu, || {
        let folder = ModelFolder::open(dir.path()).unwrap();
        let model = Llava::load(&gpu, &folder).unwrap();
        gpu.sync().unwrap();
        model
    });
    let loading = started.elapsed().as_secs_f64();
    let (gib, mib) = (bytes as f64 / (1u64 << 30) as f64, most as f64 / (1u64 << 20) as f64);
    println!(
        "{gib:.2} GiB: warm files read in {reading:.2} s, fresh memory written in {touching:.2} s, loaded in {loading:.2} s \
         ({:.2} times the reading), {mib:.0} MiB of host memory beside the device's",
        loading / reading
    );
    drop(model);
    assert!(most < 1 << 30, "{most} bytes");
}
