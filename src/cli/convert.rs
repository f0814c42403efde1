//! `wgpu-llava convert`: a model from any layout that is read to any that is written.

use std::{env, path::Path};

use super::{
    args::{ConvertArgs, GlobalArgs, Layout, WrittenDtype},
    hub, report,
    ui::Ui,
};
use crate::{
    data::Template,
    embedded,
    error::{Error, Result},
    formats::{
        gguf::export::FileType,
        gguf_write::write_gguf_model,
        hf_write::{Changes, Writing, write_model},
        llava_write::write_llava_model,
        model_folder::ModelFolder,
        safetensors::Dtype,
    },
    hub::Wanted,
    models::open::no_folder,
    train::config::Source,
};

/// Draws the embeddings of tokens that are added; the same conversion gives the same bytes.
pub(super) const SEED: u64 = 0;

pub fn run(args: &ConvertArgs, global: &GlobalArgs) -> Result<()> {
    let mut ui = Ui::new(global.quiet, global.verbose);
    report::check_new_folder("--out", &args.out)?;
    let dtype = match args.dtype {
        None => None,
        Some(WrittenDtype::Float32) => Some(Dtype::F32),
        Some(WrittenDtype::Float16) => Some(Dtype::F16),
        Some(WrittenDtype::Bfloat16) => Some(Dtype::BF16),
        Some(WrittenDtype::Nf4 | WrittenDtype::Fp4) if args.to == Layout::Hf => None,
        Some(WrittenDtype::Nf4 | WrittenDtype::Fp4) => {
            return Err(Error::usage(
                "--dtype nf4 and fp4 are for --to hf: bitsandbytes' layout is one of transformers",
            )
            .hint("leave --to out, or choose another dtype"));
        }
        Some(WrittenDtype::Q8_0) if args.to == Layout::Gguf => None,
        Some(WrittenDtype::Q8_0) => {
            return Err(
                Error::usage("--dtype q8_0 is a type of GGUF files").hint("add --to gguf, or choose another dtype")
            );
        }
    };
    let template = args.version.as_deref().map(|version| chat_template(version, args.to)).transpose()?;
    let folder = open(&args.from, args.vision_tower.as_deref(), &mut ui)?.with_projector()?;
    match args.to {
        Layout::Hf => {
            let folder = folder.with_image_token(SEED)?;
            // Nothing in an original checkpoint says how it is asked; most are asked as Vicuna is.
            let template = match (template, folder.is_original()) {
                (None, true) => Some(chat_template("v1", Layout::Hf)?),
                (template, _) => template,
            };
            write_model(
                &args.out,
                &folder,
                folder.config(),
                Changes::none(),
                &Writing { dtype, template, pad: false, quantize: args.dtype.and_then(WrittenDtype::quant_type) },
            )?;
        }
        Layout::Gguf => {
            let name = model_name(&args.from);
            let mut progress = |line: &str| ui.line(line);
            let report = write_gguf_model(&args.out, &folder, &name, args.dtype.map(file_type), &mut progress)?;
            for note in report.notes {
                ui.line(&format!("  note: {note}"));
            }
        }
        Layout::Llava => write_llava_model(&args.out, &folder, dtype)?,
    }
    ui.line(&format!("wrote {}", args.out.display()));
    Ok(())
}

/// The template of a name, to be written beside a model for transformers.
fn chat_template(version: &str, to: Layout) -> Result<&'static Template> {
    if to != Layout::Hf {
        return Err(Error::usage(
            "--version is for --to hf: other layouts have no place for a template of another name",
        )
        .hint("leave --version out"));
    }
    let template = Template::named(version)?;
    if template.jinja(false).is_none() {
        return Err(Error::usage(format!("--version: `{version}` cannot be written as a chat template"))
            .hint("v1, llava_llama_2, mistral_instruct and mpt can"));
    }
    Ok(template)
}

/// Of a GGUF file; f32 for what none has, which `run` has refused.
fn file_type(dtype: WrittenDtype) -> FileType {
    match dtype {
        WrittenDtype::Float32 | WrittenDtype::Nf4 | WrittenDtype::Fp4 => FileType::F32,
        WrittenDtype::Float16 => FileType::F16,
        WrittenDtype::Bfloat16 => FileType::Bf16,
        WrittenDtype::Q8_0 => FileType::Q8_0,
    }
}

/// What a model is called in the names of files: the last part of where it comes from, without the ending and the type
/// of a GGUF file.
fn model_name(from: &str) -> String {
    let leaf = from.trim_end_matches(['/', '\\']).rsplit(['/', '\\', ':']).next().unwrap_or_default();
    let Some(stem) = leaf.strip_suffix(".gguf") else {
        return if leaf.trim_matches('.').is_empty() { "model".to_owned() } else { leaf.to_owned() };
    };
    let is_type = |part: &str| {
        let part = part.to_ascii_uppercase();
        ["F16", "F32", "BF16"].contains(&part.as_str())
            || (part.starts_with('Q') || part.starts_with("IQ")) && part.contains('_')
    };
    match stem.rsplit_once(['-', '.']) {
        Some((name, part)) if is_type(part) && !name.is_empty() => name.to_owned(),
        _ => stem.to_owned(),
    }
}

/// A model of any layout, for its files alone.
pub(super) fn open(from: &str, tower: Option<&Path>, ui: &mut Ui) -> Result<ModelFolder> {
    let working_dir =
        env::current_dir().map_err(|error| Error::failed("the current folder is gone").caused_by(error))?;
    let tower = tower.map(|path| hub::local_path(path, Wanted::Tower, ui)).transpose()?;
    match hub::local(Source::parse(from, &working_dir), Wanted::Model, ui)? {
        Source::Embedded(name) => embedded::model(&name),
        Source::Local(path) => ModelFolder::open_with_tower(&path, tower.as_deref()),
        Source::Hub(name) => Err(no_folder(&name)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_called_by_where_it_comes_from() {
        for (from, name) in [
            ("models/llava-1.5-7b/", "llava-1.5-7b"),
            ("embedded:tiny", "tiny"),
            ("a/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
            ("vicuna-7b-F16.gguf", "vicuna-7b"),
            ("vicuna-7b.gguf", "vicuna-7b"),
            ("..", "model"),
        ] {
            assert_eq!(model_name(from), name);
        }
    }
}
