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
        hf_write::{Changes, write_model},
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
        Some(WrittenDtype::Q8_0) if args.to == Layout::Gguf => None,
        Some(WrittenDtype::Q8_0) => {
            return Err(
                Error::usage("--dtype q8_0 is a type of GGUF files").hint("add --to gguf, or choose another dtype")
            );
        }
    };
    let folder = open(&args.from, args.vision_tower.as_deref(), &mut ui)?;
    match args.to {
        Layout::Hf => {
            let folder = folder.with_image_token(SEED)?;
            // Nothing in an original checkpoint says how it is asked; most are asked as Vicuna is.
            let template = match (&args.version, folder.is_original()) {
                (Some(version), _) => Template::named(version)?.jinja(),
                (None, true) => Template::named("v1")?.jinja(),
                (None, false) => None,
            };
            write_model(&args.out, &folder, folder.config(), Changes::none(), dtype, template)?;
        }
        Layout::Llava | Layout::Gguf => {
            let name = if args.to == Layout::Gguf { "gguf" } else { "llava" };
            return Err(Error::usage(format!("--to {name} is known, but not built yet")).hint("use --to hf"));
        }
    }
    ui.line(&format!("wrote {}", args.out.display()));
    Ok(())
}

/// A model of any layout, for its files alone.
pub(super) fn open(from: &str, tower: Option<&Path>, ui: &mut Ui) -> Result<ModelFolder> {
    let working_dir =
        env::current_dir().map_err(|error| Error::failed("the current folder is gone").caused_by(error))?;
    match hub::local(Source::parse(from, &working_dir), Wanted::Model, ui)? {
        Source::Embedded(name) => embedded::model(&name),
        Source::Local(path) => ModelFolder::open_with_tower(&path, tower),
        Source::Hub(name) => Err(no_folder(&name)),
    }
}
