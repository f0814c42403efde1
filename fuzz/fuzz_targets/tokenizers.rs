//! What makes tokens of a text. The bytes are a sentencepiece model, and what is JSON is a tokenizer.json, any other
//! text a chat template.

#![no_main]

use std::sync::Once;

#[path = "../../tests/hostile/readers.rs"]
mod readers;

static QUIET: Once = Once::new();

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    // A panic of the tokenizers crate is turned into an error. One of the library still aborts: libfuzzer-sys catches
    // what leaves this closure.
    QUIET.call_once(|| std::panic::set_hook(Box::new(|panic| eprintln!("{panic}"))));
    readers::sentencepiece(data);
    match std::str::from_utf8(data) {
        Ok(_) if serde_json::from_slice::<serde::de::IgnoredAny>(data).is_ok() => {
            readers::tokenizer_json(data, br#"{"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true}"#);
        }
        Ok(source) => {
            readers::chat_template(source);
        }
        Err(_) => {}
    }
});
