//! `wgpu-llava shaders`: every kernel variant as plain WGSL, with a list.

use serde_json::json;

use super::{
    args::{GlobalArgs, ShadersArgs},
    ui::Ui,
};
use crate::{
    error::{Error, Result},
    formats::atomic::write_file,
    gpu::{expand_shader, shader_variants},
};

/// What a device may have; a variant whose text depends on it is written for both.
const MODES: [(&str, &[&str]); 4] = [
    ("", &[]),
    (".immediates", &["IMMEDIATES"]),
    (".subgroups", &["SUBGROUPS"]),
    (".immediates.subgroups", &["IMMEDIATES", "SUBGROUPS"]),
];

/// Writes `NAME.wgsl` as devices without optional features get it, `NAME.immediates.wgsl` and so on as far as they
/// differ, and `index.json`.
pub fn run(args: &ShadersArgs, global: &GlobalArgs) -> Result<()> {
    let out = &args.out;
    std::fs::create_dir_all(out).map_err(|source| Error::writing(out, source))?;
    let variants = shader_variants();
    let mut index = Vec::new();
    for variant in &variants {
        let mut written: Vec<(String, String)> = Vec::new();
        for (suffix, modes) in MODES {
            let text = expand_shader(variant, modes);
            if written.iter().all(|(_, known)| *known != text) {
                written.push((format!("{}{suffix}.wgsl", variant.name), text));
            }
        }
        for (file, text) in &written {
            write_file(&out.join(file), text.as_bytes())?;
        }
        let files: Vec<&str> = written.iter().map(|(file, _)| file.as_str()).collect();
        index.push(json!({
            "name": variant.name,
            "family": variant.family,
            "kernel": variant.kernel,
            "constants": variant.defines,
            "files": files,
        }));
    }
    let index = format!("{:#}\n", json!(index));
    write_file(&out.join("index.json"), index.as_bytes())?;
    Ui::new(global.quiet, false).line(&format!("wrote {} variants to {}", variants.len(), out.display()));
    Ok(())
}
