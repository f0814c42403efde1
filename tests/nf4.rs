//! Weights in four bits against bitsandbytes, bit for bit (tools/golden_nf4.py).

mod common;

use common::{golden, hash_values, numbers, read_json};
use serde_json::Value;
use wgpu_llava::{
    formats::safetensors::Checkpoint,
    quant::{self, Nested, QuantType},
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
