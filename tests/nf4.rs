//! Weights in four bits against bitsandbytes, bit for bit (tools/golden_nf4.py).

mod common;

use std::{path::Path, time::Instant};

use common::{golden, hash_values, numbers, read_json, run};
use serde_json::Value;
use wgpu_llava::{
    error::ErrorKind,
    formats::{
        model_folder::ModelFolder,
        safetensors::Checkpoint,
        safetensors_writer::{TensorData, TensorHead, write_safetensors},
    },
    gpu::{AdapterOptions, Gpu},
    models::names::canonical,
    ops::{matmul::Layout, nf4, nf4_matmul::Way},
    quant::{self, Nested, QuantType},
    tensor::Tensor,
};

struct Golden {
    packed: Checkpoint,
    expected: Value,
}

impl Golden {
    fn open() -> Self {
        let folder = golden("nf4");
        let packed = Checkpoint::open(&folder.join("packed.safetensors")).unwrap();
        Self { packed, expected: read_json(&folder.join("expected.json")) }
    }

    fn bytes(&self, name: &str) -> &[u8] {
        self.packed.require(name).unwrap().bytes
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        self.packed.require(name).unwrap().to_f32().unwrap().data
    }

    /// Key, kind and values of each case.
    fn cases(&self) -> Vec<(String, QuantType, Vec<f32>)> {
        let cases = self.expected["cases"].as_array().unwrap();
        let case = |case: &Value| {
            let (kind, name) = (case["kind"].as_str().unwrap(), case["name"].as_str().unwrap());
            let key = format!("{kind}.{name}");
            let elements = numbers(&case["shape"]).iter().product::<f64>() as usize;
            let values = match case["hash"].as_array() {
                Some(_) => {
                    let [number, scale, offset] = numbers(&case["hash"])[..] else { panic!("three numbers") };
                    hash_values(number as u32, elements, scale, offset)
                }
                None => self.floats(&format!("{key}.input")),
            };
            assert_eq!(values.len(), elements);
            (key, QuantType::parse(kind).unwrap(), values)
        };
        cases.iter().map(case).collect()
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Whether values are equal, where they are numbers: factors whose mean is infinite give none.
fn same(got: &[f32], want: &[f32]) -> bool {
    got.len() == want.len() && got.iter().zip(want).all(|(got, want)| got == want || got.is_nan() && want.is_nan())
}

#[test]
fn codes_and_factors_are_those_of_bitsandbytes() {
    let golden = Golden::open();
    let cases = golden.cases();
    assert!(cases.len() >= 30, "{}", cases.len());
    for (key, kind, values) in cases {
        let (codes, absmax) = quant::quantize(kind, &values);
        assert_eq!(codes, golden.bytes(&format!("{key}.codes")), "{key}: codes");
        assert_eq!(bits(&absmax), bits(&golden.floats(&format!("{key}.absmax"))), "{key}: absmax");
    }
}

#[test]
fn factors_of_factors_are_those_of_bitsandbytes() {
    let golden = Golden::open();
    assert_eq!(bits(quant::dynamic_map()), bits(&golden.floats("nf4.nested_map")));
    for (key, _, _) in golden.cases() {
        let nested = Nested::new(&golden.floats(&format!("{key}.absmax")));
        if !nested.offset.is_finite() {
            assert!(key.ends_with(".large"), "{key}");
            continue;
        }
        assert_eq!(bits(&[nested.offset]), bits(&golden.floats(&format!("{key}.offset"))), "{key}: offset");
        let absmax = golden.floats(&format!("{key}.nested_absmax"));
        assert_eq!(bits(&nested.absmax), bits(&absmax), "{key}: absmax of the factors");
        // The library looks its codes up on a grid, and is one off the nearest now and then.
        let codes = golden.bytes(&format!("{key}.nested"));
        // Where all factors of a block are the mean, every code means the same, and the library's is another.
        let compared = codes.iter().zip(&nested.codes).enumerate().filter(|(at, _)| absmax[at / 256] > 0.0);
        let differences: Vec<u8> = compared.map(|(_, (a, b))| a.abs_diff(*b)).filter(|&by| by > 0).collect();
        assert!(differences.iter().all(|&by| by == 1), "{key}: {differences:?}");
        assert!(differences.len() * 50 <= codes.len(), "{key}: {} of {}", differences.len(), codes.len());
        let stored = Nested { codes: codes.to_vec(), ..nested };
        assert_eq!(bits(&stored.factors()), bits(&golden.floats(&format!("{key}.factors"))), "{key}: factors");
    }
}

#[test]
fn stored_bytes_mean_what_they_mean_to_bitsandbytes() {
    let golden = Golden::open();
    let mut compared = 0;
    for (key, kind, values) in golden.cases() {
        for (end, factors) in [("plain", "absmax"), ("double", "factors")] {
            let Some(want) = golden.packed.get(&format!("{key}.{end}")) else { continue };
            let want = want.to_f32().unwrap().data;
            let mut got = vec![f32::NAN; values.len()];
            let factors = golden.floats(&format!("{key}.{factors}"));
            quant::dequantize(kind, golden.bytes(&format!("{key}.codes")), &factors, 0, &mut got);
            assert!(same(&got, &want), "{key}: {:?}", got.iter().zip(&want).find(|(a, b)| a != b));
            let (first, count) = (values.len() / 3, values.len() / 2);
            let mut part = vec![f32::NAN; count];
            quant::dequantize(kind, golden.bytes(&format!("{key}.codes")), &factors, first, &mut part);
            assert!(same(&part, &want[first..first + count]), "{key}: a part");
            compared += got.len();
        }
    }
    assert!(compared > 10_000, "{compared}");
}

#[test]
fn means_are_those_of_torch_in_one_thread() {
    let golden = Golden::open();
    let means = &golden.expected["means"];
    let [number, scale, offset] = numbers(&means["hash"])[..] else { panic!("three numbers") };
    for row in means["bits"].as_array().unwrap() {
        let [count, bits] = numbers(row)[..] else { panic!("two numbers") };
        let factors = hash_values(number as u32, count as usize, scale, offset);
        assert_eq!(Nested::new(&factors).offset.to_bits(), bits as u32, "{count}");
    }
}

/// Bits of what a device made, as f32 or words.
fn words(tensor: &Tensor) -> Vec<u32> {
    tensor.to_bytes().unwrap().as_chunks().0.iter().map(|&word| u32::from_le_bytes(word)).collect()
}

#[test]
fn a_gpu_quantises_to_the_same_bits() {
    let golden = Golden::open();
    let gpu = Gpu::open(&AdapterOptions { treat_as_gpu: true, ..Default::default() }).unwrap();
    for (key, kind, values) in golden.cases() {
        let x = nf4::quantized(&gpu, kind, false, &values, &[values.len()]).unwrap();
        let codes = x.to_bytes().unwrap();
        let want = golden.bytes(&format!("{key}.codes"));
        let wrong = codes.iter().zip(want).position(|(got, want)| got != want);
        assert!(wrong.is_none() && codes.len() == want.len(), "{key}: byte {wrong:?} of the codes");
        let absmax = golden.floats(&format!("{key}.absmax"));
        assert_eq!(words(&nf4::factors(&x)), bits(&absmax), "{key}: absmax");
        // Infinite and denormal values are not promised by a device.
        if values.iter().all(|x| *x == 0.0 || (1e-30..1e30).contains(&x.abs())) {
            let mut want = vec![0.0; values.len()];
            quant::dequantize(kind, &codes, &absmax, 0, &mut want);
            assert_eq!(nf4::dequantize(&x).to_vec().unwrap(), want, "{key}");
        }
    }
}

fn case(name: &str) -> std::path::PathBuf {
    golden("parity/qlora").join(name)
}

#[test]
fn converted_models_are_those_that_bitsandbytes_writes() {
    for (kind, double) in [("nf4", true), ("fp4", false)] {
        let out = tempfile::tempdir().unwrap();
        let folder = out.path().join("packed");
        let from = case("model");
        run([
            Path::new("convert"),
            Path::new("--from"),
            &from,
            Path::new("--out"),
            &folder,
            Path::new("--dtype"),
            Path::new(kind),
        ]);
        let (ours, theirs) =
            (Checkpoint::open(&folder).unwrap(), Checkpoint::open(&case(&format!("model-{kind}"))).unwrap());
        let mut packed = 0;
        // Towers are called otherwise by transformers 5.
        let own =
            |name: &str| ours.names().find(|own| canonical(own) == canonical(name)).unwrap_or_else(|| panic!("{name}"));
        for name in theirs.names() {
            let want = theirs.require(name).unwrap();
            if double || !name.ends_with(".absmax") {
                let got = ours.require(own(name)).unwrap();
                assert_eq!(got.dtype, want.dtype, "{name}");
                match name {
                    _ if name.contains("quant_state") => {
                        let json = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap();
                        let (mut got, want) = (json(got.bytes), json(want.bytes));
                        if !double {
                            // Written with double quantisation, whatever is read.
                            ["nested_blocksize", "nested_dtype", "nested_offset"]
                                .iter()
                                .for_each(|key| drop(got.as_object_mut().unwrap().shift_remove(*key)));
                        }
                        assert_eq!(got, want, "{name}");
                        packed += 1;
                    }
                    _ if name.ends_with(".absmax") => {
                        let off = got.bytes.iter().zip(want.bytes).filter(|(a, b)| a != b).count();
                        assert!(off * 50 <= want.bytes.len(), "{name}: {off}");
                    }
                    _ => assert!(got.bytes == want.bytes && got.shape == want.shape, "{name}"),
                }
            }
        }
        assert_eq!(packed, 14);
        if double {
            assert_eq!(ours.names().count(), theirs.names().count());
        }
        let config = read_json(&folder.join("config.json"));
        assert_eq!(config["quantization_config"]["bnb_4bit_quant_type"], *kind);
        // What is packed is read as it is: the program scores the same through either folder's bytes.
        let scored = |model: &Path| common::scores(model, "qlora");
        let (ours, dense) = (scored(&folder), folder.with_file_name("dense"));
        run([Path::new("convert"), Path::new("--from"), &folder, Path::new("--out"), &dense]);
        assert!(read_json(&dense.join("config.json")).get("quantization_config").is_none());
        for (a, b) in ours.iter().zip(scored(&dense)) {
            let (a, b) = (a["loss"].as_f64().unwrap(), b["loss"].as_f64().unwrap());
            assert!((a - b).abs() <= 2e-6 * b, "{a} and {b}");
        }
    }
}

#[test]
fn what_lies_about_its_size_is_refused_by_name() {
    let whole = Checkpoint::open(&case("model-nf4")).unwrap();
    let weight = whole.names().find(|name| name.ends_with("q_proj.weight")).unwrap().to_owned();
    let state = format!("{weight}.quant_state.bitsandbytes__nf4");
    let text = String::from_utf8(whole.require(&state).unwrap().bytes.to_vec()).unwrap();
    let refusal = |name: &str, change: &dyn Fn(&mut Vec<u8>, &mut TensorHead)| {
        let dir = tempfile::tempdir().unwrap();
        common::copy_folder(&case("model-nf4"), dir.path());
        let mut parts = Vec::new();
        for tensor in whole.names() {
            let found = whole.require(tensor).unwrap();
            let mut head = TensorHead { name: tensor.into(), dtype: found.dtype, shape: found.shape.to_vec() };
            let mut bytes = found.bytes.to_vec();
            if tensor == name {
                change(&mut bytes, &mut head);
            }
            parts.push((head, bytes));
        }
        let heads = parts.iter().map(|(head, _)| head.clone()).collect();
        write_safetensors(&dir.path().join("model.safetensors"), heads, &mut |head| {
            let (_, bytes) = parts.iter().find(|(other, _)| other.name == head.name).unwrap();
            Ok(TensorData::Raw(bytes.as_slice().into()))
        })
        .unwrap();
        let error = ModelFolder::open(dir.path()).err().expect("a broken weight was accepted");
        assert_eq!(error.kind, ErrorKind::Data, "{error}");
        format!("{} {}", error.message, error.hints.join(" "))
    };
    let rewrite = |from: &'static str, to: &'static str| {
        let text = text.replace(from, to);
        move |bytes: &mut Vec<u8>, head: &mut TensorHead| {
            assert_ne!(bytes.as_slice(), text.as_bytes());
            *bytes = text.as_bytes().to_vec();
            head.shape = vec![bytes.len()];
        }
    };
    let cut = |bytes: &mut Vec<u8>, head: &mut TensorHead| {
        bytes.pop();
        head.shape = vec![bytes.len()];
    };
    let message = refusal(&state, &rewrite("\"blocksize\": 64", "\"blocksize\": 128"));
    assert!(message.contains("blocks are of 128") && message.contains(&weight), "{message}");
    assert!(refusal(&state, &rewrite("\"shape\": [96, 96]", "\"shape\": [96, 97]")).contains("bytes of codes"));
    let huge = "\"shape\": [4294967296, 4294967296, 16]";
    assert!(refusal(&state, &rewrite("\"shape\": [96, 96]", huge)).contains("there is no shape"));
    assert!(refusal(&state, &rewrite("nf4", "nf5")).contains("`nf5`"));
    assert!(refusal(&state, &rewrite("{", "[")).contains("not the JSON of a state"));
    assert!(refusal(&weight, &cut).contains("bytes of codes"));
    assert!(refusal(&format!("{weight}.absmax"), &cut).contains("absmax"));
    let rename = |_: &mut Vec<u8>, head: &mut TensorHead| head.name += "x";
    assert!(refusal(&format!("{weight}.nested_absmax"), &rename).contains("nested_absmax"));
}

/// By hand: `cargo test --release --test nf4 -- --ignored --nocapture`. Milliseconds of a product by each way, the
/// figures behind the thresholds in src/ops/nf4_matmul.rs.
#[test]
#[ignore = "measures"]
fn ways_of_a_product() {
    let gpu = common::open_gpu();
    for (n, k) in [(576, 1536), (1536, 576), (4096, 4096)] {
        let values = hash_values(1, n * k, 1.0, 0.0);
        let w = nf4::quantized(&gpu, QuantType::Nf4, true, &values, &[n, k]).unwrap();
        for m in [1, 4, 8, 16, 32, 64, 128, 256] {
            let a = Tensor::from_f32(&gpu, &hash_values(2, m * k, 1.0, 0.0), &[m, k]);
            let dy = Tensor::from_f32(&gpu, &hash_values(2, m * n, 1.0, 0.0), &[m, n]);
            let mut line = format!("{m:4} x {n} x {k}:");
            for (layout, a) in [(Layout::Nt, &a), (Layout::Nn, &dy)] {
                for way in [Way::Fused, Way::Scratch] {
                    let run = || {
                        let begun = Instant::now();
                        let c = way.product(layout, a, &w);
                        gpu.sync().unwrap();
                        drop(c);
                        begun.elapsed().as_secs_f64() * 1e3
                    };
                    run();
                    let best = (0..3).map(|_| run()).fold(f64::INFINITY, f64::min);
                    line += &format!("  {layout:?} {way:?} {best:.1} ms");
                }
            }
            println!("{line}");
        }
    }
}
