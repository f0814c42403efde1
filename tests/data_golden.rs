//! src/data against Pillow, transformers and tokenizers: fixtures of `tools/golden_data.py`, and the figures of CLIP's
//! pre-processing that are published for constant and synthetic pictures.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use image::{Rgb, RgbImage};
use serde_json::{Value, json};
use wgpu_llava::data::{
    Dataset, Duration, Encoder, IGNORE_INDEX, IMAGE_TOKEN_INDEX, ImageProcessor, ImageSource, Order, Plan, Record,
    Source, Template, Tokenizer, Turn, Version,
    image::decode,
    record::{parse_records, read_records},
    resize::{Filter, resize},
};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data")
}

fn cases(name: &str) -> Vec<Value> {
    let bytes = std::fs::read(folder().join(name)).unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

fn fnv(bytes: impl IntoIterator<Item = u8>) -> String {
    let step = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    format!("{:016x}", bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, step))
}

fn pair(value: &Value) -> (u32, u32) {
    (value[0].as_u64().unwrap() as u32, value[1].as_u64().unwrap() as u32)
}

fn ids(value: &Value) -> Vec<i32> {
    value.as_array().unwrap().iter().map(|id| id.as_i64().unwrap() as i32).collect()
}

fn hex(value: &Value) -> Vec<u8> {
    let digits = value.as_str().unwrap();
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
}

fn synthetic(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| Rgb([x as u8, y as u8, (x + y) as u8]))
}

/// The fixture script's picture of hard edges and noise.
fn noisy(width: u32, height: u32) -> RgbImage {
    let mut state = 12345_u32;
    let bytes = (0..width * height * 3).map(|_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        if state & 0x40_0000 != 0 { (state >> 24) as u8 } else { 255 * (state >> 31) as u8 }
    });
    RgbImage::from_raw(width, height, bytes.collect()).unwrap()
}

#[test]
fn resizing_equals_pillow() {
    for case in cases("resize.json") {
        let (width, height) = pair(&case["source"]);
        let picture = if case["picture"] == "noisy" { noisy(width, height) } else { synthetic(width, height) };
        let (width, height) = pair(&case["target"]);
        let filter = Filter::from_number(case["resample"].as_u64().unwrap()).unwrap();
        assert_eq!(fnv(resize(&picture, width, height, filter).into_raw()), case["hash"], "{case}");
    }
}

#[test]
fn pixel_values_equal_the_slow_processor() {
    for case in cases("processor.json") {
        let (width, height) = pair(&case["size"]);
        let processor = ImageProcessor::from_config(&case["config"], "test", 224).unwrap();
        let processor = processor.with_pad(case["pad"].as_bool().unwrap());
        let values = processor.process(&synthetic(width, height)).unwrap();
        assert_eq!(json!([3, values.height, values.width]), case["shape"]);
        let plane = (values.height * values.width) as usize;
        for (place, expected) in case["at"].as_array().unwrap().iter().zip(case["values"].as_array().unwrap()) {
            let (y, x) = pair(place);
            for channel in 0..3 {
                let value = values.data[channel * plane + (y * values.width + x) as usize];
                assert_eq!(value, expected[channel].as_f64().unwrap() as f32, "{case} at {place}");
            }
        }
        assert_eq!(fnv(values.data.iter().flat_map(|value| value.to_le_bytes())), case["hash"], "{case}");
        let again = ImageProcessor::from_config(&processor.to_config(), "test", 224).unwrap();
        assert_eq!(again.with_pad(processor.pad_to_square), processor);
    }
}

fn close(value: f64, expected: f64) {
    assert!((value - expected).abs() < 1e-6, "{value} for {expected}");
}

#[test]
fn published_figures_of_clip_preprocessing() {
    let processor = ImageProcessor::clip(336);
    let constants = [
        ([0, 0, 0], [-1.7922626, -1.7520971, -1.4802198]),
        ([255, 255, 255], [1.9303361, 2.0748837, 2.1458970]),
        (processor.fill_colour(), [-0.0112545, -0.0111960, -0.0013329]),
    ];
    for (colour, expected) in constants {
        let values = processor.process(&RgbImage::from_pixel(50, 70, Rgb(colour))).unwrap();
        for (plane, expected) in values.data.chunks(336 * 336).zip(expected) {
            assert!(plane.iter().all(|&value| (f64::from(value) - expected).abs() < 1e-6));
        }
    }
    let plain = processor.process(&synthetic(640, 480)).unwrap();
    let at = |channel: usize, y: usize, x: usize| f64::from(plain.data[(channel * 336 + y) * 336 + x]);
    let mean = |data: &[f32]| data.iter().map(|&value| f64::from(value)).sum::<f64>() / data.len() as f64;
    let planes: Vec<f64> = plain.data.chunks(336 * 336).map(mean).collect();
    [0.1302112, 0.0482098, 0.3260410].iter().zip(&planes).for_each(|(&expected, &value)| close(value, expected));
    let corner = [-0.6243884, -1.7520971, -0.3426145];
    corner.iter().enumerate().for_each(|(channel, &expected)| close(at(channel, 0, 0), expected));
    let middle = [-0.8579632, 1.8497672, -0.7976566];
    middle.iter().enumerate().for_each(|(channel, &expected)| close(at(channel, 168, 168), expected));

    let padded = processor.with_pad(true).process(&synthetic(640, 480)).unwrap();
    let planes: Vec<f64> = padded.data.chunks(336 * 336).map(mean).collect();
    [-0.0910573, 0.0343186, 0.2565050].iter().zip(&planes).for_each(|(&expected, &value)| close(value, expected));
    close(f64::from(padded.data[0]), -0.0112545);
}

#[test]
fn every_kind_of_picture_is_read_as_pillow_reads_it() {
    for case in cases("decode.json") {
        let name = case["name"].as_str().unwrap();
        // The name says nothing: content is what counts.
        let picture = decode(&hex(&case["file"]), &format!("{name}.txt")).unwrap();
        assert_eq!(picture.dimensions(), pair(&case["size"]), "{name}");
        let tolerance = case["tolerance"].as_u64().unwrap() as u8;
        let expected = hex(&case["rgb"]);
        let worst = picture.as_raw().iter().zip(&expected).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!(worst <= tolerance, "{name}: differs by {worst}");
    }
}

#[test]
fn bad_pictures_are_data_errors_that_name_the_file() {
    let whole = |name: &str| hex(&cases("decode.json").into_iter().find(|case| case["name"] == name).unwrap()["file"]);
    let fails = |bytes: &[u8], what: &str| {
        let error = decode(bytes, "some.jpg").unwrap_err();
        assert_eq!(error.kind, wgpu_llava::error::ErrorKind::Data);
        assert!(error.message.contains("some.jpg") && error.message.contains(what), "{error}");
        assert!(!error.hints.is_empty());
    };
    for name in ["rgb.png", "rgb.jpg", "cmyk.jpg", "palette.gif", "lossless.webp", "rgb.bmp"] {
        let bytes = whole(name);
        for length in [bytes.len() / 2, bytes.len() / 4, 20] {
            fails(&bytes[..length.min(bytes.len() - 2)], "some.jpg");
        }
    }
    fails(b"", "not a picture");
    fails(b"<html>404</html>", "not a picture");
    let mut huge = whole("rgb.png");
    huge[16..24].copy_from_slice(&[0, 1, 0, 0, 0, 1, 0, 0]);
    // The header's checksum would stop it as well, were the size not looked at.
    assert!(decode(&huge, "some.jpg").is_err());
    let mut bitmap = whole("rgb.bmp");
    bitmap[18..26].copy_from_slice(&[0x20, 0x4E, 0, 0, 0x20, 0x4E, 0, 0]);
    fails(&bitmap, "too large: 20000x20000");
    let missing = ImageSource::File("/nowhere/a.png".into()).load().unwrap_err();
    assert_eq!(missing.message, "cannot read /nowhere/a.png");
}

fn tokenizer(name: &str) -> Arc<Tokenizer> {
    Arc::new(Tokenizer::from_folder(&folder().join("tokenizers").join(name)).unwrap())
}

fn encoder(name: &str, template: &str) -> Encoder {
    let version = Version::Named(Template::named(template).unwrap());
    Encoder { tokenizer: tokenizer(name), version, system: None, image_tokens: 16, max_length: None }
}

fn record(value: &Value) -> Record {
    parse_records(value.to_string().as_bytes(), "test", Path::new(""), None).unwrap().remove(0)
}

#[test]
fn ids_and_labels_equal_the_reference() {
    for case in cases("prompts.json") {
        let text = |key: &str| case[key].as_str().map(str::to_owned);
        let mut encoder = encoder(&text("tokenizer").unwrap(), &text("template").unwrap());
        encoder.system = text("system");
        let sample = encoder.encode(&record(&case["record"])).unwrap();
        assert_eq!(sample.tokens, ids(&case["ids"]), "{case}");
        assert_eq!(sample.labels, ids(&case["labels"]), "{case}");
        let answers: Vec<i32> = sample.labels.iter().copied().filter(|&label| label != IGNORE_INDEX).collect();
        assert_eq!(encoder.tokenizer.decode(&answers).unwrap(), case["answers"], "{case}");
    }
}

#[test]
fn a_prompt_is_the_beginning_of_its_training_text() {
    for (name, template) in
        [("llama_prepend", "v1"), ("llama_first", "v1"), ("byte_level", "mpt"), ("llama_prepend", "llava_llama_2")]
    {
        let encoder = encoder(name, template);
        let turns = [Turn::human("What is in the picture?", 1), Turn::assistant("A bus."), Turn::human("How many?", 0)];
        let prompt = encoder.prompt(&turns).unwrap();
        let talk = json!({"image": "a.png", "conversations": [
            {"from": "human", "value": "<image>\nWhat is in the picture?"}, {"from": "gpt", "value": "A bus."},
            {"from": "human", "value": "How many?"}, {"from": "gpt", "value": "One."}]});
        let sample = encoder.encode(&record(&talk)).unwrap();
        assert_eq!(sample.tokens[..prompt.len()], prompt);
        assert!(sample.labels[prompt.len()..].iter().all(|&label| label != IGNORE_INDEX));
    }
}

#[test]
fn special_tokens_come_from_the_config() {
    let llama = tokenizer("llama_prepend");
    assert_eq!((llama.bos_id, llama.eos_id, llama.pad_id, llama.unk_id), (Some(1), Some(2), Some(0), Some(0)));
    assert_eq!((llama.prefix(), llama.model_max_length), (&[1][..], Some(2048)));
    assert_eq!(llama.encode("</s>", true).unwrap(), [1, 2]);
    let bytes = tokenizer("byte_level");
    assert_eq!((bytes.bos_id, bytes.model_max_length), (None, None));
    assert!(bytes.prefix().is_empty());
    // The added token <image> is known, but text never becomes it.
    let image = bytes.image_id.unwrap() as i32;
    assert_eq!(bytes.token_to_id("<image>"), bytes.image_id);
    let literal = bytes.encode("an <image> here", true).unwrap();
    assert!(!literal.contains(&image) && literal.len() > 5);
    assert_eq!(bytes.decode(&literal).unwrap(), "an <image> here");
    assert_eq!(bytes.vocabulary_size(), 420);

    let json = std::fs::read(folder().join("tokenizers/llama_prepend/tokenizer.json")).unwrap();
    let without = Tokenizer::from_bytes(&json, Some(br#"{"bos_token":"<s>","add_bos_token":false}"#)).unwrap();
    assert_eq!(without.encode("", true).unwrap(), [0_i32; 0]);
    let ended = br#"{"eos_token":{"content":"</s>"},"add_eos_token":true,"pad_token":"[PAD]"}"#;
    let ended = Tokenizer::from_bytes(&json, Some(ended)).unwrap();
    assert_eq!(ended.encode("", true).unwrap(), [1, 2]);
    assert_eq!(ended.pad_id, Some(520));
    assert!(Tokenizer::from_bytes(b"{}", None).unwrap_err().message.contains("tokenizer.json"));
    assert!(Tokenizer::from_bytes(b"{", None).unwrap_err().message.contains("not valid JSON"));
}

#[test]
fn text_records_are_learned_from_their_second_token() {
    let text = record(&json!({"id": "t", "text": "A dog. <image>"}));
    for name in ["llama_prepend", "byte_level"] {
        let sample = encoder(name, "v1").encode(&text).unwrap();
        assert_eq!(sample.labels[0], IGNORE_INDEX);
        assert_eq!(sample.labels[1..], sample.tokens[1..]);
        assert_eq!(sample.target_tokens(), sample.tokens.len() - 1);
    }
}

#[test]
fn long_records_lose_their_tail_but_no_part_of_a_picture() {
    let mut encoder = encoder("llama_prepend", "v1");
    encoder.system = Some(String::new());
    let talk = record(&json!({"images": ["a.png", "b.png"], "conversations": [
        {"from": "human", "value": "<image> one"}, {"from": "gpt", "value": "yes"},
        {"from": "human", "value": "<image> two"}, {"from": "gpt", "value": "no"}]}));
    let whole = encoder.encode(&talk).unwrap();
    let length = whole.spliced_length(16);
    assert_eq!((length, whole.truncated), (whole.tokens.len() + 30, 0));
    let second = whole.tokens.iter().rposition(|&token| token == IMAGE_TOKEN_INDEX).unwrap();
    for limit in [length, length - 1, second + 31, second + 30, second + 16, second + 15, 20, 5, 1] {
        encoder.max_length = Some(limit);
        let cut = encoder.encode(&talk).unwrap();
        let left = cut.spliced_length(16);
        assert!(left <= limit && left + cut.truncated == length, "{limit}");
        assert_eq!(cut.tokens, whole.tokens[..cut.tokens.len()]);
        assert_eq!(cut.labels.len(), cut.tokens.len());
        let pictures = cut.tokens.iter().filter(|&&token| token == IMAGE_TOKEN_INDEX).count();
        assert_eq!(cut.images, whole.images[..pictures]);
        if limit == second + 30 {
            // One position short of the picture's end: cut before it.
            assert_eq!(cut.tokens.len(), second);
        }
    }
}

#[test]
fn data_sets_are_mixed_measured_and_planned() {
    let folder = tempfile::tempdir().unwrap();
    let talk = |id: u32, image: &str, answer: &str| {
        json!({"id": id, "image": image, "conversations": [
            {"from": "human", "value": if image.is_empty() { "Hi" } else { "<image>\nWhat?" }}, {"from": "gpt", "value": answer}]})
    };
    let pictures = folder.path().join("pictures.json");
    let first: Vec<Value> = (0..6).map(|id| talk(id, &format!("{}.png", id % 2), "A dog.")).collect();
    std::fs::write(&pictures, json!(first).to_string()).unwrap();
    let texts = folder.path().join("texts.jsonl");
    std::fs::write(&texts, format!("{}\n{}\n", talk(100, "", "Hello"), talk(101, "", &"long ".repeat(50)))).unwrap();

    let sources = [Source { weight: 1.5, ..Source::new(&pictures) }, Source { limit: Some(2), ..Source::new(&texts) }];
    let mut encoder = encoder("llama_prepend", "v1");
    encoder.max_length = Some(120);
    let mut dataset = Dataset::open(sources, encoder, 0).unwrap();
    assert_eq!(dataset.len(), 9 + 2);
    let lazy: Vec<_> = (0..dataset.len()).map(|index| dataset.sample(index).unwrap()).collect();
    let statistics = dataset.prepare(|done, total| assert!(done <= total)).unwrap();
    assert_eq!(lazy, (0..dataset.len()).map(|index| dataset.sample(index).unwrap()).collect::<Vec<_>>());
    assert_eq!((statistics.records, statistics.with_images, statistics.images), (11, 9, 9));
    assert_eq!((statistics.truncated_records, statistics.longest, statistics.fully_masked), (1, 120, 0));
    statistics.check().unwrap();
    assert_eq!(dataset.images().len(), 2);
    assert_eq!(dataset.modality_lengths().unwrap()[..2], [4, 4]);
    assert_eq!(dataset.modality_lengths().unwrap()[9], -2);
    let missing = dataset.check_images().unwrap_err();
    assert!(missing.message.contains("0.png") && missing.message.contains("\"0\""), "{missing}");

    let order = Order::Grouped(dataset.modality_lengths().unwrap().into());
    let plan = Plan::new(dataset.len(), 2, 1, Duration::Epochs(1.0), order, 0).unwrap();
    let taken: usize = (0..plan.total_steps()).map(|step| plan.step(step).concat().len()).sum();
    assert_eq!(taken, 11);

    // Records that are in no file, embedded ones say, mix with files as these do.
    let encoder = dataset.encoder().clone();
    let records = Some(read_records(&pictures, folder.path(), None).unwrap());
    let given = Source { weight: 0.5, limit: Some(4), records, ..Source::new("embedded:pictures") };
    let mixed = Dataset::open([given, Source::new(&texts)], encoder.clone(), 0).unwrap();
    assert_eq!((mixed.len(), mixed.images().len() <= 2), (2 + 2, true));

    let wrong = Source { weight: -1.0, ..Source::new(&texts) };
    assert_eq!(Dataset::open([wrong], encoder, 0).err().unwrap().kind, wgpu_llava::error::ErrorKind::Usage);
    assert!(
        read_records(&folder.path().join("none.json"), folder.path(), None).unwrap_err().message.contains("none.json")
    );
}
