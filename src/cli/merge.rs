//! `wgpu-llava merge`: folds an adapter into the weights.

use std::cell::RefCell;

use super::{
    args::{GlobalArgs, MergeArgs},
    convert::{SEED, open},
    hub, report,
    ui::Ui,
};
use crate::{
    error::Result,
    formats::{
        hf_write::{Changes, write_model},
        peft::{Adapter, Merge},
    },
    hub::Wanted,
    models::names,
};

pub fn run(args: &MergeArgs, global: &GlobalArgs) -> Result<()> {
    let mut ui = Ui::new(global.quiet, global.verbose);
    report::check_new_folder("--out", &args.out)?;
    let folder = open(&args.model, None, &mut ui)?.with_image_token(SEED)?;
    let adapter = Adapter::read(&hub::local_path(&args.adapter, Wanted::Adapter, &mut ui)?, folder.config())?;
    let merge = Merge::new(&adapter, folder.config())?;
    let config = merge.config().clone();
    let merge = RefCell::new(merge);
    let fetch = |name: &str| {
        // Tensors that come with the adapter may be in no file of the model: a new projector, a head that was tied.
        let mut tensor = match (folder.has(name), adapter.saved.get(name)) {
            (false, Some(saved)) => saved.clone(),
            (false, None) if name == names::LM_HEAD => folder.tensor(names::EMBED_TOKENS)?,
            _ => folder.tensor(name)?,
        };
        merge.borrow_mut().apply(name, 0, &mut tensor.data)?;
        Ok(tensor)
    };
    let dtype = args.dtype.map(|dtype| dtype.stored());
    let changes = Changes::of(|name| merge.borrow().touches(name), fetch, None);
    write_model(&args.out, &folder, &config, changes, dtype, None)?;
    let report = merge.into_inner().finish()?;
    ui.line(&format!("wrote {}", args.out.display()));
    if let Some((name, change)) = report.largest {
        ui.line(&format!("  {} tensors changed, the largest change is {change:.3e} in {name}", report.tensors));
    }
    Ok(())
}
