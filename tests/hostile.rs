//! Files made to do harm: cut off at every length, with single bytes changed, and with sizes that lie. Every reader
//! answers with its result or an error, and makes nothing in memory that the file is not large enough for.
//!
//! fuzz/ goes on from here with bytes of its own.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use wgpu_llava::{
    data::{Tokenizer, image::decode, sentencepiece::SentencePieceModel},
    error::ErrorKind,
    formats::{
        gguf::GgufFile,
        safetensors::Checkpoint,
        safetensors_writer::{TensorData, TensorHead, write_safetensors},
        torch_bin::TorchFile,
        weights::Weights,
    },
};

#[path = "hostile/readers.rs"]
mod readers;

const MIB: isize = 1 << 20;

/// Counts what each thread has allocated, and the most it ever had.
struct Counting;

thread_local! {
    static NOW: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    let now = NOW.with(|now| {
        now.set(now.get() + bytes);
        now.get()
    });
    PEAK.with(|peak| peak.set(peak.get().max(now)));
}

// SAFETY: every call is handed to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize - layout.size() as isize);
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The time that this thread has run, where the system tells it; a busy machine does not count.
fn time(since: Instant) -> Duration {
    let told = fs::read_to_string("/proc/thread-self/schedstat").ok();
    let nanoseconds = told.and_then(|told| told.split_whitespace().next()?.parse().ok());
    nanoseconds.map_or_else(|| since.elapsed(), Duration::from_nanos)
}

/// Runs `work`; more than `limit` bytes at once, or more than ten seconds, fail the test.
fn bounded<T>(what: &str, limit: isize, work: impl FnOnce() -> T) -> T {
    let (before, clock) = (NOW.get(), Instant::now());
    let start = time(clock);
    PEAK.set(before);
    let result = work();
    let (taken, time) = (PEAK.get() - before, time(clock).saturating_sub(start));
    assert!(taken <= limit, "{what}: {} MiB", taken / MIB);
    assert!(time < Duration::from_secs(10), "{what}: {time:?}");
    result
}

fn golden(name: &str) -> PathBuf {
    let folders = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    let found = folders.map(|folder| folder.join("tests/golden")).find(|folder| folder.is_dir());
    found.expect("tests/golden").join(name)
}

fn bytes(name: &str) -> Vec<u8> {
    fs::read(golden(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn hex(value: &Value) -> Vec<u8> {
    let digits = value.as_str().unwrap();
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
}

/// The pictures of tests/golden/data/decode.json by name.
fn pictures() -> Vec<(String, Vec<u8>)> {
    let cases: Vec<Value> = serde_json::from_slice(&bytes("data/decode.json")).unwrap();
    cases.iter().map(|case| (case["name"].as_str().unwrap().to_owned(), hex(&case["file"]))).collect()
}

/// Cuts off and changes a valid file everywhere in its first `header` bytes, and here and there behind them.
fn damage(name: &str, valid: &[u8], header: usize, limit: isize, read: impl Fn(&[u8]) -> bool) {
    assert!(read(valid), "{name} is valid");
    let places = || (0..valid.len().min(header)).chain((header..valid.len()).step_by(1 + valid.len() / 64));
    for length in places() {
        bounded(&format!("{name} cut off at {length}"), limit, || read(&valid[..length]));
    }
    for at in places() {
        for change in [0xff, 0x80, 0x01] {
            let mut changed = valid.to_vec();
            changed[at] ^= change;
            bounded(&format!("{name}, byte {at} ^ {change:#x}"), limit, || read(&changed));
        }
    }
}

#[test]
fn damaged_weights() {
    let adapter = bytes("formats/adapter_llama/adapter_model.safetensors");
    damage("safetensors", &adapter, 900, 4 * MIB, readers::safetensors);
    damage("rounded.gguf", &bytes("gguf/rounded.gguf"), 600, 8 * MIB, readers::gguf);
    damage("tiny_llama.gguf", &bytes("gguf/tiny_llama.gguf"), 300, 16 * MIB, readers::gguf);
    // A stride of 0 has a tensor of 64 MiB that two bytes change to.
    damage("views.bin", &bytes("torch_bin/views.bin"), 1200, 300 * MIB, readers::torch_bin);
    damage("trainer.pt", &bytes("torch_bin/trainer.pt"), 700, 8 * MIB, readers::torch_bin);
}

#[test]
fn damaged_pictures() {
    for (name, picture) in pictures() {
        // A size that is changed asks a decoder of the image crate for that much, up to MAX_PIXELS.
        damage(&name, &picture, 300, 2000 * MIB, readers::picture);
    }
}

#[test]
fn damaged_tokenizers() {
    damage("tokenizer.model", &bytes("built_tokenizers/llama/tokenizer.model"), 200, 32 * MIB, readers::sentencepiece);
    let config = br#"{"bos_token": "<s>", "add_bos_token": true}"#;
    for name in ["byte_level", "llama_first", "llama_prepend"] {
        let json = bytes(&format!("data/tokenizers/{name}/tokenizer.json"));
        damage(name, &json, 200, 32 * MIB, |json| readers::tokenizer_json(json, config));
    }
    let cases: Value = serde_json::from_slice(&bytes("chat/templates.json")).unwrap();
    for case in cases["templates"].as_array().unwrap() {
        let source = case["template"].as_str().unwrap();
        // Some refuse a system text; whether one is read is not the question here.
        damage("a chat template", source.as_bytes(), 0, 64 * MIB, |source| {
            std::str::from_utf8(source).is_ok_and(|source| {
                readers::chat_template(source);
                true
            })
        });
    }
}

#[test]
fn damaged_json() {
    for name in ["formats/llava_v5/config.json", "formats/llama_sharded/config.json"] {
        damage(name, &bytes(name), 1500, MIB, readers::configs);
    }
    for name in ["formats/adapter_llama/adapter_config.json", "layouts/clip_tower/preprocessor_config.json"] {
        let read = |json: &[u8]| {
            readers::configs(json);
            true
        };
        damage(name, &bytes(name), 1200, 4 * MIB, read);
    }
    let records = bytes("parity/gqa_tied_linear_pad/data.json");
    damage("data.json", &records, 700, MIB, readers::records);
    damage("data.jsonl", &bytes("parity/mha_untied_linear/data.jsonl"), 700, MIB, readers::records);
}

#[test]
fn nothing_is_deep_enough_to_overflow_the_stack() {
    let deep = |open: &str| open.repeat(200_000);
    let inside = format!("{{\"conversations\":{}", deep("["));
    for text in [deep("["), deep("{\"a\":"), inside, format!("[{}", deep("{\"a\":"))] {
        bounded("deep JSON", 64 * MIB, || {
            readers::configs(text.as_bytes());
            readers::records(text.as_bytes());
            readers::tokenizer_json(text.as_bytes(), text.as_bytes());
        });
    }
    let closed = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    for depth in [120, 126, 127, 128] {
        let record = |value: String| format!("{{\"conversations\": {value}, \"image\": {value}}}");
        readers::records(record(closed(depth)).as_bytes());
        readers::configs(format!("{{\"model_type\": \"llama\", \"a\": {}}}", closed(depth)).as_bytes());
        readers::tokenizer_json(format!("{{\"model\": {}}}", closed(depth)).as_bytes(), b"{}");
    }
    let bang = format!("{{% if {} %}}{{% endif %}}", deep("not "));
    let nested = deep("{% if true %}");
    for source in [format!("{{{{ {} }}}}", deep("(")), format!("{{{{ {} }}}}", deep("-")), bang, nested] {
        bounded("a deep template", 256 * MIB, || assert!(!readers::chat_template(&source)));
    }
    for source in [format!("{{{{ {} true }}}}", "not ".repeat(60_000)), format!("{{{{ 1{} }}}}", "-1".repeat(100_000))]
    {
        bounded("a long expression", 256 * MIB, || readers::chat_template(&source));
    }
    // Arrays of metadata within arrays: type 9, one element, of type 9, ...
    let mut gguf = gguf_head(0, 1);
    gguf.extend(gguf_text("a"));
    gguf.extend(9u32.to_le_bytes());
    for _ in 0..200_000 {
        gguf.extend([&9u32.to_le_bytes()[..], &1u64.to_le_bytes()[..]].concat());
    }
    bounded("deep metadata", 16 * MIB, || refused_gguf(gguf, "deep"));
    let mut pickle = b"\x80\x02".to_vec();
    pickle.extend(b"]".repeat(200_000));
    pickle.extend(b"a".repeat(199_999));
    pickle.push(b'.');
    bounded("deep lists", 256 * MIB, || assert!(!readers::torch_bin(&torch(&pickle, 8))));
    // A dict that holds itself.
    bounded("a dict in itself", 16 * MIB, || assert!(!readers::torch_bin(&torch(b"\x80\x02}q\0U\x01ah\0s.", 8))));
}

#[test]
fn chat_templates_cannot_run_or_grow_for_ever() {
    let sources = [
        "{{ 'a' * 100000000 }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(64) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x|tojson }}",
        "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% macro m(x) %}{{ m([x, x]) }}{% endmacro %}{{ m(1) }}",
        "{% set n = namespace(x=1) %}{% for i in range(99999) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x }}",
        "{{ 'a' | indent(1000000000, true) }}",
        "{{ messages | tojson(indent=1000000000) }}",
        "{{ 'a'.replace('', 'aaaaaaaaaa' * 1000000) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ [0] * 100000000 }}",
        "{{ 10 ** 1000000000 }}",
        "{{ 'a'.center(1000000000) }}",
        "{{ strftime_now('%Y' * 10000000) }}",
    ];
    for source in sources {
        bounded(source, 512 * MIB, || readers::chat_template(source));
    }
}

/// One weight as bitsandbytes stores it, alone in a file.
#[test]
fn damaged_weights_in_four_bits() {
    const WEIGHT: &str = "language_model.model.layers.0.self_attn.k_proj.weight";
    let model = bytes("parity/qlora/model-nf4/model.safetensors");
    let whole = Checkpoint::from_bytes("model", model).unwrap();
    let names = || whole.names().filter(|name| name.starts_with(WEIGHT));
    let head = |name: &str| {
        let tensor = whole.require(name).unwrap();
        TensorHead { name: name.into(), dtype: tensor.dtype, shape: tensor.shape.to_vec() }
    };
    assert_eq!(names().count(), 6);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weight.safetensors");
    write_safetensors(&path, names().map(head).collect(), &mut |head| {
        Ok(TensorData::Raw(whole.require(&head.name)?.bytes.into()))
    })
    .unwrap();
    let file = std::fs::read(&path).unwrap();
    assert!(Weights::open(&path).unwrap().require(WEIGHT).unwrap().packed().is_some());
    damage("a weight in four bits", &file, file.len(), 4 * MIB, readers::safetensors);
}

#[test]
fn safetensors_of_impossible_sizes() {
    let file = |shape: &str, end: usize| {
        let header = format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{end}]}}}}"#);
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; end]].concat()
    };
    let most = usize::MAX;
    assert!(readers::safetensors(&file("[0,3]", 0)) && readers::safetensors(&file("[]", 4)));
    for shape in [format!("[0,{most},{most}]"), format!("[{most},{most},0]"), format!("[{most},2]")] {
        let error = Checkpoint::from_bytes("x", file(&shape, 0)).err().expect("a shape that no file has");
        assert!(error.message.contains("x: a: shape"), "{error}");
    }
    let mut claims = (100_000_000u64).to_le_bytes().to_vec();
    claims.extend(b"{}");
    bounded("a header of 100 MB", MIB, || assert!(!readers::safetensors(&claims)));
}

fn gguf_head(tensors: u64, pairs: u64) -> Vec<u8> {
    [&b"GGUF"[..], &3u32.to_le_bytes(), &tensors.to_le_bytes(), &pairs.to_le_bytes()].concat()
}

fn gguf_text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

/// What is said of a tensor; `shape` in ggml's order.
fn gguf_tensor(name: &str, shape: &[u64], ggml_type: u32, offset: u64) -> Vec<u8> {
    let shape_bytes: Vec<u8> = shape.iter().flat_map(|size| size.to_le_bytes()).collect();
    let count = (shape.len() as u32).to_le_bytes();
    [&gguf_text(name)[..], &count, &shape_bytes, &ggml_type.to_le_bytes(), &offset.to_le_bytes()].concat()
}

fn refused_gguf(bytes: Vec<u8>, expected: &str) {
    let error = GgufFile::from_bytes("x", bytes).err().expect("a file that must be refused was read");
    assert_eq!(error.kind, ErrorKind::Data);
    assert!(error.message.contains(expected), "{expected}: {error}");
}

#[test]
fn gguf_of_impossible_sizes() {
    let zeros = vec![0; 4096];
    let huge = [1 << 32, u64::MAX / 8, u64::MAX];
    for size in huge {
        bounded("counts", MIB, || {
            refused_gguf([gguf_head(size, 0), zeros.clone()].concat(), "claims");
            refused_gguf([gguf_head(0, size), zeros.clone()].concat(), "claims");
            // A key's length, a string's, and an array's of each type.
            refused_gguf([&gguf_head(0, 1)[..], &size.to_le_bytes(), &zeros].concat(), "wants");
            let key = [gguf_head(0, 1), gguf_text("a")].concat();
            refused_gguf([&key[..], &8u32.to_le_bytes(), &size.to_le_bytes(), &zeros].concat(), "wants");
            for of in 0..13u32 {
                let array = [&9u32.to_le_bytes()[..], &of.to_le_bytes(), &size.to_le_bytes()].concat();
                refused_gguf([&key[..], &array, &zeros].concat(), "x: a ");
            }
            let shapes: [&[u64]; 5] = [&[size], &[32, size], &[size, size], &[size, size, size, size], &[32, 0, size]];
            for shape in shapes {
                for ggml_type in [0, 1, 2, 8, 12, 30] {
                    let tensor = gguf_tensor("t", shape, ggml_type, 0);
                    refused_gguf([gguf_head(1, 0), tensor, zeros.clone()].concat(), "x: tensor t");
                }
            }
            refused_gguf([gguf_head(1, 0), gguf_tensor("t", &[32], 0, size & !31), zeros.clone()].concat(), "t");
        });
    }
    let two = [gguf_tensor("a", &[32], 0, 0), gguf_tensor("b", &[8], 0, 64)].concat();
    refused_gguf([gguf_head(2, 0), two, zeros.clone()].concat(), "lie on the same bytes");
    for alignment in [0, 3, 1 << 31] {
        let pair = [gguf_text("general.alignment"), 4u32.to_le_bytes().to_vec(), u32::to_le_bytes(alignment).to_vec()];
        let file = [gguf_head(1, 1), pair.concat(), gguf_tensor("t", &[8], 0, 0), zeros.clone()].concat();
        refused_gguf(file, if alignment == 1 << 31 { "not within" } else { "general.alignment" });
    }
}

/// A file of torch.save: a pickle, and a storage `0` of zeros.
fn torch(pickle: &[u8], storage: usize) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for (name, contents) in [("m/data.pkl", pickle), ("m/data/0", &vec![0; storage])] {
        let size = (contents.len() as u32).to_le_bytes();
        let sizes = [&[0; 4][..], &size, &size, &(name.len() as u16).to_le_bytes(), &[0; 2]].concat();
        let start = (file.len() as u32).to_le_bytes();
        directory.extend([b"PK\x01\x02", &[0; 12][..], &sizes, &[0; 10], &start, name.as_bytes()].concat());
        file.extend([b"PK\x03\x04", &[0; 10][..], &sizes, name.as_bytes(), contents].concat());
    }
    let (start, size) = ((file.len() as u32).to_le_bytes(), (directory.len() as u32).to_le_bytes());
    file.extend([&directory[..], b"PK\x05\x06\0\0\0\0\x02\0\x02\0", &size, &start, &[0; 2]].concat());
    file
}

/// The pickle of `{"t0": tensor, "t1": ...}`, each of this offset, shape and strides in an f32 storage that claims
/// `claimed` elements.
fn tensors(count: usize, claimed: u64, offset: u64, shape: &[u64], strides: &[u64]) -> Vec<u8> {
    let text = |text: &str| [&[b'U', text.len() as u8][..], text.as_bytes()].concat();
    // A number of eight bytes, signed; of nine where that would make it negative.
    let int = |value: u64| match i64::try_from(value) {
        Ok(_) => [&[0x8a, 8][..], &value.to_le_bytes()].concat(),
        Err(_) => [&[0x8a, 9][..], &value.to_le_bytes(), &[0]].concat(),
    };
    let tuple =
        |values: &[u64]| [vec![b'('], values.iter().flat_map(|&value| int(value)).collect(), vec![b't']].concat();
    let storage = [text("storage"), b"ctorch\nFloatStorage\n".to_vec(), text("0"), text("cpu"), int(claimed)].concat();
    let tensor = [
        &b"ctorch._utils\n_rebuild_tensor_v2\n(("[..],
        &storage,
        b"tQ",
        &int(offset),
        &tuple(shape),
        &tuple(strides),
        b"\x89ccollections\nOrderedDict\n)RtR",
    ];
    let item = |number| [text(&format!("t{number}")), tensor.concat()].concat();
    let items: Vec<u8> = (0..count).flat_map(item).collect();
    [&b"\x80\x02}("[..], &items, b"u."].concat()
}

#[test]
fn torch_files_of_impossible_sizes() {
    let read = |pickle: &[u8]| bounded("a torch file", 300 * MIB, || readers::torch_bin(&torch(pickle, 64)));
    assert!(read(&tensors(2, 16, 0, &[2, 8], &[8, 1])));
    assert!(read(&tensors(2, 16, 3, &[3, 2, 2], &[1, 4, 2])));
    assert!(read(&tensors(2, 16, 15, &[5, 1], &[0, u64::MAX >> 1])));
    assert!(read(&tensors(1, 16, 16, &[0, 1 << 40], &[1, 1])));
    let most = u64::MAX >> 1;
    let bad: [(u64, u64, &[u64], &[u64]); 12] = [
        (17, 0, &[2], &[1]),
        (most, 0, &[2], &[1]),
        (u64::MAX, 0, &[2], &[1]),
        (16, 16, &[1], &[1]),
        (16, most, &[1], &[1]),
        (16, 0, &[17], &[1]),
        (16, 0, &[2], &[most]),
        (16, 0, &[most, most, 0], &[0, 0, 0]),
        (16, 0, &[0, most, most], &[0, 0, 0]),
        (16, 0, &[most, most], &[0, 0]),
        (16, 0, &[1 << 25], &[0]),
        (16, 0, &[2, 2], &[1]),
    ];
    for (claimed, offset, shape, strides) in bad {
        assert!(!read(&tensors(1, claimed, offset, shape, strides)), "{claimed} {offset} {shape:?} {strides:?}");
    }
    // Each may repeat its storage so often, all together may not.
    assert!(read(&tensors(1, 16, 0, &[1 << 23], &[0])));
    let many = TorchFile::from_bytes("x", torch(&tensors(3, 16, 0, &[1 << 23], &[0]), 64)).err().expect("refused");
    assert!(many.message.contains("too many times"), "{many}");
}

#[test]
fn one_very_long_piece_takes_no_time() {
    let piece = |text: &str| {
        let field = [vec![0x0a], varint(text.len()), text.as_bytes().to_vec(), b"\x15\0\0\0\0".to_vec()].concat();
        [vec![0x0a], varint(field.len()), field].concat()
    };
    let long = piece(&"ab".repeat(500_000));
    // BPE, and no whitespace removed.
    let settings = b"\x12\x02\x18\x02\x1a\x02\x20\0";
    let model = [&piece("<unk>")[..], &piece("a"), &piece("b"), &long, settings];
    let model = SentencePieceModel::parse("x", &model.concat()).unwrap();
    assert_eq!(model.pieces[3].text.len(), 1_000_000);
    bounded("one long piece", 64 * MIB, || {
        model.tokenizer_json(wgpu_llava::data::sentencepiece::PrefixSpace::Always, &[]).unwrap()
    });
}

fn varint(mut value: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

#[test]
fn what_is_no_tokenizer_is_bad_data() {
    for json in ["\"\"", "[]", "null", "1"] {
        let error = Tokenizer::from_bytes(json.as_bytes(), None).expect_err("no tokenizer");
        assert!(error.message.contains("does not hold a JSON object"), "{error}");
    }
    let json = json!({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": null, "post_processor": null, "decoder": null,
        // A table of one entry, which points far outside it.
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="},
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
    });
    let error = Tokenizer::from_bytes(json.to_string().as_bytes(), None).expect_err("a broken tokenizer");
    assert_eq!(error.kind, ErrorKind::Data);
    assert!(error.message.contains("tokenizer.json"), "{error}");
}

/// The frame header of a JPEG: where the kind of frame, the height, the width and the components stand.
fn frame(jpeg: &[u8]) -> usize {
    jpeg.windows(2).position(|pair| pair[0] == 0xff && (0xc0..=0xc2).contains(&pair[1])).unwrap() + 5
}

#[test]
fn jpegs_of_more_pixels_than_bytes_are_not_decoded_into_memory() {
    let mut tried = 0;
    for (name, mut picture) in pictures().into_iter().filter(|(_, bytes)| bytes.starts_with(&[0xff, 0xd8])) {
        let at = frame(&picture);
        for (high, wide) in [(13_000u16, 13_000u16), (0xffff, 2730)] {
            picture[at..at + 2].copy_from_slice(&high.to_be_bytes());
            picture[at + 2..at + 4].copy_from_slice(&wide.to_be_bytes());
            let error = bounded(&name, MIB, || decode(&picture, "x").unwrap_err());
            assert!(error.message.contains("are no JPEG of"), "{error}");
            tried += 1;
        }
        picture[at..at + 4].fill(0xff);
        let error = decode(&picture, "x").unwrap_err();
        assert!(error.message.contains("too large"), "{error}");
    }
    assert!(tried > 2);
}

/// A picture whose many scans have nothing in them but runs of empty blocks.
#[test]
fn a_jpeg_of_very_many_scans_ends() {
    let mut jpeg = vec![0xff, 0xd8, 0xff, 0xdb, 0, 67, 0];
    jpeg.extend([1; 64]);
    jpeg.extend([0xff, 0xc2, 0, 11, 8, 0x20, 0, 0x20, 0, 1, 1, 0x11, 0]);
    // One code of one bit for DC: no difference. For AC: the longest run of blocks that end.
    for (class, symbol) in [(0, 0), (0x10, 0xe0)] {
        jpeg.extend([0xff, 0xc4, 0, 20, class, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, symbol]);
    }
    jpeg.extend([0xff, 0xda, 0, 8, 1, 1, 0, 0, 0, 0]);
    // 8192 x 8192 pixels: 1024 x 1024 blocks of one bit.
    jpeg.extend(vec![0; 1024 * 1024 / 8]);
    // 33 runs of up to 32767 blocks: the code, which is 0, and 14 bits for the length. 0 follows a byte of ones.
    let bits: Vec<u8> = (0..33 * 15).map(|bit| u8::from(bit % 15 > 0)).collect();
    let runs = bits.chunks(8).map(|bits| (0..8).fold(0, |byte, at| byte << 1 | bits.get(at).unwrap_or(&1)));
    let runs: Vec<u8> = runs.flat_map(|byte| if byte == 0xff { vec![0xff, 0] } else { vec![byte] }).collect();
    for _ in 0..10_000 {
        jpeg.extend([&[0xff, 0xda, 0, 8, 1, 1, 0, 1, 63, 0][..], &runs].concat());
    }
    jpeg.extend([0xff, 0xd9]);
    bounded("many scans", 1000 * MIB, || decode(&jpeg, "x").map(|_| ()).unwrap_or_default());
}
