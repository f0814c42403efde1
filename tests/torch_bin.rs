//! PyTorch checkpoints: those of torch.save read back value for value, and hostile ones refused without harm.
//!
//! Fixtures: tools/golden_torch_bin.py.

use std::path::{Path, PathBuf};

use serde_json::Value;
use wgpu_llava::{
    error::{Error, ErrorKind},
    formats::{safetensors::Dtype, torch_bin::TorchFile},
};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/torch_bin")
}

fn refusal(result: Result<TorchFile, Error>) -> String {
    let error = result.err().expect("a file that must be refused was read");
    assert_eq!(error.kind, ErrorKind::Data, "{error}");
    format!("{} | {}", error.message, error.hints.join(" "))
}

fn dtype(name: &str) -> Dtype {
    match name {
        "float32" => Dtype::F32,
        "float16" => Dtype::F16,
        "bfloat16" => Dtype::BF16,
        "int64" => Dtype::I64,
        "bool" => Dtype::BOOL,
        other => panic!("{other}"),
    }
}

/// The values of any dtype, row-major.
fn values(file: &TorchFile, name: &str) -> Vec<f64> {
    let tensor = file.get(name).unwrap();
    let bytes = tensor.row_major();
    match tensor.dtype {
        Dtype::I64 => bytes.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b) as f64).collect(),
        Dtype::BOOL => bytes.iter().map(|&b| f64::from(b)).collect(),
        _ => tensor.to_f32().unwrap().data.into_iter().map(f64::from).collect(),
    }
}

#[test]
fn checkpoints_of_torch_are_read_exactly() {
    let expected: Value = serde_json::from_slice(&std::fs::read(golden().join("expected.json")).unwrap()).unwrap();
    let mut tensors_read = 0;
    for (name, tensors) in expected["files"].as_object().unwrap() {
        let tensors = tensors.as_object().unwrap();
        if tensors.is_empty() {
            continue;
        }
        let file = TorchFile::open(&golden().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut names: Vec<&str> = tensors.keys().map(String::as_str).collect();
        names.sort_unstable();
        assert_eq!(file.names().collect::<Vec<_>>(), names, "{name}");
        for (key, expected) in tensors {
            let tensor = file.require(key).unwrap();
            let numbers = |key: &str| -> Vec<usize> { serde_json::from_value(expected[key].clone()).unwrap() };
            assert_eq!(tensor.dtype, dtype(expected["dtype"].as_str().unwrap()), "{name} {key}");
            assert_eq!(tensor.shape, numbers("shape"), "{name} {key}");
            assert_eq!(tensor.strides, numbers("strides"), "{name} {key}");
            assert_eq!(tensor.is_contiguous(), expected["contiguous"], "{name} {key}");
            let expected: Vec<f64> = serde_json::from_value(expected["values"].clone()).unwrap();
            let found = values(&file, key);
            let bits = |values: &[f64]| -> Vec<u32> { values.iter().map(|&value| (value as f32).to_bits()).collect() };
            assert_eq!(bits(&found), bits(&expected), "{name} {key}: {found:?}");
            tensors_read += 1;
        }
    }
    assert!(tensors_read > 35, "{tensors_read}");
}

#[test]
fn contiguous_tensors_lie_in_the_file_and_ties_share_their_bytes() {
    let file = TorchFile::open(&golden().join("views.bin")).unwrap();
    let tensor = |name| file.get(name).unwrap();
    assert!(matches!(tensor("plain").row_major(), std::borrow::Cow::Borrowed(_)));
    assert!(matches!(tensor("transposed").row_major(), std::borrow::Cow::Owned(_)));
    assert_eq!(tensor("tied.first").bytes.as_ptr(), tensor("tied.second").bytes.as_ptr());
    assert_eq!(tensor("row").bytes.as_ptr() as usize - tensor("transposed").bytes.as_ptr() as usize, 36 * 4);
    assert_eq!(tensor("expanded").bytes.len(), 8);
    assert!(tensor("ids").to_f32().unwrap_err().message.contains("ids is of dtype I64"));
    let float8 = TorchFile::open(&golden().join("float8.bin")).unwrap();
    assert_eq!(float8.get("eighth").unwrap().dtype, Dtype::F8_E4M3);
}

#[test]
fn shards_are_found_through_their_index() {
    let folder = golden().join("sharded");
    let file = TorchFile::open(&folder).unwrap();
    assert_eq!(file.names().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(file.get("c").unwrap().shape, [12]);
    assert!(file.require("d").unwrap_err().hints[0].contains("the nearest name is"));

    let copy = tempfile::tempdir().unwrap();
    let index = copy.path().join("pytorch_model.bin.index.json");
    let cases = [
        (r#"{"weight_map":{"a":"../x.bin"}}"#, "not the name of a file in this folder"),
        (r#"{"weight_map":{"a":"gone.bin"}}"#, "the download may be incomplete"),
        (r#"{"weight_map":{"z":"one.bin"}}"#, "says that z is in one.bin, but it is not"),
        ("[]", "not an index of shards"),
    ];
    std::fs::copy(folder.join("pytorch_model-00001-of-00002.bin"), copy.path().join("one.bin")).unwrap();
    for (text, expected) in cases {
        std::fs::write(&index, text).unwrap();
        let message = refusal(TorchFile::open(copy.path()));
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn what_is_no_state_dict_is_refused_by_name() {
    let cases = [
        ("hostile.bin", ".system`, which no state dict needs: refused, and nothing of it was run"),
        ("whole_module.bin", "`torch.nn.modules.container.Sequential`"),
        ("sparse.bin", "`torch._utils._rebuild_sparse_tensor`"),
        ("legacy.bin", "the format of PyTorch before 1.6"),
    ];
    for (name, expected) in cases {
        let message = refusal(TorchFile::open(&golden().join(name)));
        assert!(message.contains(expected) && message.contains(name), "{message}");
    }
    let named = |bytes: &[u8]| refusal(TorchFile::from_bytes("x.bin", bytes.to_vec()));
    assert!(named(b"version https://git-lfs.github.com/spec/v1\n").contains("Git LFS pointer"));
    assert!(named(b"\x40\0\0\0\0\0\0\0{\"a\":1}").contains("safetensors"));
    assert!(named(b"").contains("not a checkpoint"));
}

/// A zip archive of stored entries, with zip64 fields if asked.
fn archive(entries: &[(&str, &[u8])], zip64: bool) -> Vec<u8> {
    let (mut bytes, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in entries {
        let (at, size) = (bytes.len() as u64, data.len() as u64);
        let [short_size, short_at] = [size, at].map(|value| if zip64 { u32::MAX } else { value as u32 }.to_le_bytes());
        bytes.extend(b"PK\x03\x04\x14\0\0\0\0\0\0\0\0\0\0\0\0\0");
        bytes.extend([short_size, short_size].concat());
        bytes.extend((name.len() as u32).to_le_bytes());
        bytes.extend(name.as_bytes());
        bytes.extend(*data);
        directory.extend(b"PK\x01\x02\x14\0\x14\0\0\0\0\0\0\0\0\0\0\0\0\0");
        directory.extend([short_size, short_size].concat());
        directory.extend((name.len() as u16).to_le_bytes());
        directory.extend(if zip64 { 28u16 } else { 0 }.to_le_bytes());
        directory.extend([0; 10]);
        directory.extend(short_at);
        directory.extend(name.as_bytes());
        if zip64 {
            directory.extend([1, 0, 24, 0]);
            directory.extend([size, size, at].iter().flat_map(|value| value.to_le_bytes()));
        }
    }
    let (start, size, count) = (bytes.len() as u64, directory.len() as u64, entries.len() as u64);
    bytes.extend(directory);
    if zip64 {
        let end = bytes.len() as u64;
        bytes.extend(b"PK\x06\x06");
        bytes.extend(44u64.to_le_bytes());
        bytes.extend([0; 12]);
        bytes.extend([count, count, size, start].iter().flat_map(|value| value.to_le_bytes()));
        bytes.extend(b"PK\x06\x07\0\0\0\0");
        bytes.extend(end.to_le_bytes());
        bytes.extend(1u32.to_le_bytes());
    }
    let [size, start] = [size, start].map(|value| if zip64 { u32::MAX } else { value as u32 }.to_le_bytes());
    bytes.extend(b"PK\x05\x06\0\0\0\0");
    bytes.extend([(count as u16).to_le_bytes(), (count as u16).to_le_bytes()].concat());
    bytes.extend([size, start].concat());
    bytes.extend([0, 0]);
    bytes
}

/// `{"w": <tensor of 4 f32>}` with this offset, size and stride, each as pickled bytes.
fn state_dict(offset: &[u8], size: &[u8], stride: &[u8]) -> Vec<u8> {
    let mut pickle =
        b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n".to_vec();
    pickle.extend(b"X\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ");
    pickle.extend([offset, size, stride].concat());
    pickle.extend(b"\x89}tRs.");
    pickle
}

fn opened(pickle: &[u8], data: &[u8], zip64: bool) -> Result<TorchFile, Error> {
    TorchFile::from_bytes("x.bin", archive(&[("m/data.pkl", pickle), ("m/data/0", data)], zip64))
}

const DATA: [u8; 16] = [0, 0, 128, 63, 0, 0, 0, 64, 0, 0, 64, 64, 0, 0, 128, 64];

#[test]
fn archives_with_zip64_fields_are_read() {
    for zip64 in [false, true] {
        let file = opened(&state_dict(b"K\x01", b"K\x03\x85", b"K\x01\x85"), &DATA, zip64).unwrap();
        assert_eq!(file.get("w").unwrap().to_f32().unwrap().data, [2.0, 3.0, 4.0]);
        let whole = archive(&[("m/data.pkl", &state_dict(b"K\0", b")", b")")), ("m/data/0", &DATA)], zip64);
        assert_eq!(TorchFile::from_bytes("x", whole.clone()).unwrap().get("w").unwrap().to_f32().unwrap().data, [1.0]);
        for length in 0..whole.len() {
            assert!(TorchFile::from_bytes("x", whole[..length].to_vec()).is_err(), "{length}");
        }
        // Any one byte changed gives a tensor or an error, never a panic.
        for (index, change) in (0..whole.len()).flat_map(|index| [1u8, 0x7f, 0x80, 0xff].map(|change| (index, change)))
        {
            let mut bytes = whole.clone();
            bytes[index] ^= change;
            if let Ok(file) = TorchFile::from_bytes("x", bytes) {
                file.names().for_each(|name| _ = file.get(name).map(|tensor| tensor.to_f32()));
            }
        }
    }
}

#[test]
fn tensors_must_lie_in_their_storage() {
    let huge = b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f".as_slice();
    let two_huge = [huge, huge, b"\x86"].concat();
    let far = b"J\xff\xff\xff\x7f\x85".as_slice();
    type Case<'a> = (&'a [u8], &'a [u8], &'a [u8], &'a str);
    let cases: [Case<'_>; 10] = [
        (b"K\x02", b"K\x03\x85", b"K\x01\x85", "w: shape [3], strides [1] and offset 2 reach outside"),
        (b"K\0", b"K\x02\x85", b"K\x04\x85", "reach outside its storage of 16 bytes"),
        (huge, b"K\x01\x85", b"K\x01\x85", "reach outside"),
        (b"K\x05", b"K\0\x85", b"K\x01\x85", "reach outside"),
        (b"K\0", &two_huge, b"K\0K\0\x86", "reach outside"),
        (b"K\0", far, b"K\0\x85", "repeats 4 bytes too many times"),
        (b"K\0", far, b"K\x01\x85", "reach outside"),
        (b"K\0", b"J\xff\xff\xff\xff\x85", b"K\x01\x85", "not a natural number"),
        (b"J\xff\xff\xff\xff", b"K\x01\x85", b"K\x01\x85", "negative offset"),
        (b"K\0", b"K\x01\x85", b")", "shape and strides do not fit"),
    ];
    for (offset, size, stride, expected) in cases {
        let message = refusal(opened(&state_dict(offset, size, stride), &DATA, false));
        assert!(message.contains(expected), "{expected}: {message}");
    }
    let plain = state_dict(b"K\0", b"K\x04\x85", b"K\x01\x85");
    assert!(refusal(opened(&plain, &DATA[..15], false)).contains("its storage claims 4 elements, and has 15 bytes"));
    let gone = TorchFile::from_bytes("x", archive(&[("m/data.pkl", &plain)], false));
    assert!(refusal(gone).contains("its storage `0` is not in the file"));
    let big_endian = archive(&[("m/data.pkl", &plain), ("m/data/0", &DATA), ("m/byteorder", b"big")], false);
    assert!(refusal(TorchFile::from_bytes("x", big_endian)).contains("byte order"));
}

#[test]
fn hostile_pickles_are_refused() {
    let refused = |pickle: &[u8], expected: &str| {
        let message = refusal(opened(pickle, &DATA, false));
        assert!(message.contains(expected), "{expected}: {message}");
    };
    refused(b"\x80\x02cos\nsystem\n(X\x02\0\0\0lstR.", "`os.system`, which no state dict needs");
    refused(b"\x80\x02c__builtin__\neval\n.", "`__builtin__.eval`");
    refused(b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93.", "`builtins.getattr`");
    refused(b"\x80\x02ctorch.storage\n_load_from_bytes\n.", "`torch.storage._load_from_bytes`");
    refused(b"\x80\x02i", "operation 0x69 is not one that a state dict needs");
    refused(b"\x80\x02K\x01K\x01\x85R.", "calls what is no function");
    refused(b"\x80\x02.", "takes from an empty stack");
    refused(b"\x80\x02(.", "takes from an empty stack");
    refused(b"\x80\x02}(0", "takes from an empty stack");
    refused(b"\x80\x02h\x07.", "nothing was kept under 7");
    refused(b"\x80\x02X\xff\xff\xff\xffa", "ends too early");
    refused(b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\xffa", "ends too early");
    refused(b"\x80\x02X\x01\0\0\0\xff.", "not UTF-8");
    refused(b"\x80\x07.", "protocol 7");
    refused(b"\x80\x02}(K\x01u.", "a key has no value");
    refused(b"\x80\x02K\x01.", "holds no tensors");
    refused(b"", "ends too early");
    // A dict that holds itself.
    refused(b"\x80\x02}q\0X\x01\0\0\0ah\0s.", "more than 16 deep");
    // Each dict holds the next one twice: 2^40 ways down.
    let mut doubling = b"\x80\x02}q\0".to_vec();
    for level in 0..40u8 {
        doubling.extend([b'}', b'q', level + 1, b'X', 1, 0, 0, 0, b'a', b'h', level, b's']);
        doubling.extend([b'X', 1, 0, 0, 0, b'b', b'h', level, b's']);
    }
    doubling.push(b'.');
    refused(&doubling, "more than 16 deep");
    // Many objects and a high stack from few bytes.
    refused(&[b"\x80\x02".as_slice(), &vec![b'}'; 3 << 20], b"."].concat(), "too");
    refused(&[b"\x80\x02N".as_slice(), &vec![b'2'; 3 << 20], b"."].concat(), "grows too high");
    refused(&[b"\x80\x02".as_slice(), &vec![b'('; 3 << 20], b"."].concat(), "grows too high");
}

#[test]
fn hostile_archives_are_refused() {
    let pickle = state_dict(b"K\0", b"K\x04\x85", b"K\x01\x85");
    let whole = archive(&[("m/data.pkl", &pickle), ("m/data/0", &DATA)], false);
    let directory = whole.windows(4).position(|bytes| bytes == b"PK\x01\x02").unwrap();
    let changed = |at: usize, bytes: &[u8]| {
        let mut copy = whole.clone();
        copy[at..at + bytes.len()].copy_from_slice(bytes);
        refusal(TorchFile::from_bytes("x.bin", copy))
    };
    assert!(changed(directory + 10, &[8]).contains("m/data.pkl is compressed"));
    assert!(changed(directory + 8, &[1]).contains("m/data.pkl is encrypted"));
    assert!(changed(directory + 24, &[0xff; 4]).contains("compressed"));
    assert!(changed(directory + 42, &[0xff, 0xff, 0xff, 0x7f]).contains("m/data.pkl is not within the file"));
    assert!(changed(whole.len() - 12, &[0xff; 2]).contains("is cut short"));
    assert!(changed(whole.len() - 6, &[0xff, 0xff, 0xff, 0x7f]).contains("directory is not within the file"));
    let twice = archive(&[("m/data.pkl", &pickle), ("m/data.pkl", &pickle)], false);
    assert!(refusal(TorchFile::from_bytes("x", twice)).contains("m/data.pkl is there twice"));
    let other = archive(&[("readme.txt", b"hello")], false);
    assert!(refusal(TorchFile::from_bytes("x", other)).contains("no data.pkl"));
}
