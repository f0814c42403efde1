//! `wgpu-llava merge`: folds an adapter into the weights.

use std::cell::{Cell, RefCell};

use super::{
    args::{GlobalArgs, MergeArgs},
    convert::{SEED, open},
    hub, report,
    ui::Ui,
};
use crate::{
    error::Result,
    formats::{
        hf_write::{Changes, Writing, unused_default, write_model},
        peft::{Adapter, Merge, MergeReport},
    },
    hub::Wanted,
    models::names,
};

pub fn run(args: &MergeArgs, global: &GlobalArgs) -> Result<()> {
    let mut ui = Ui::new(global.quiet, global.verbose);
    report::check_new_folder("--out", &args.out)?;
    let folder = open(&args.model, args.vision_tower.as_deref(), &mut ui)?.with_image_token(SEED)?;
    let adapter = Adapter::read(&hub::local_path(&args.adapter, Wanted::Adapter, &mut ui)?, folder.config())?;
    let merge = Merge::new(&adapter, folder.config())?;
    let config = merge.config().clone();
    let (merge, report) = (RefCell::new(Some(merge)), Cell::new(None));
    let unused = names::unused_vision_tensors(&config);
    let fetch = |name: &str| {
        // Tensors that come with the adapter may be in no file of the model: a new projector, a head that was tied.
        let mut tensor = match (folder.has(name), adapter.saved.get(name)) {
            (false, Some(saved)) => saved.clone(),
            (false, None) if name == names::LM_HEAD => folder.tensor(names::EMBED_TOKENS)?,
            (false, None) => match unused.iter().find(|(unused, _)| unused == name) {
                Some((_, shape)) => unused_default(name, shape),
                None => folder.tensor(name)?,
            },
            (true, _) => folder.tensor(name)?,
        };
        if let Some(merge) = merge.borrow_mut().as_mut() {
            merge.apply(name, 0, &mut tensor.data)?;
        }
        Ok(tensor)
    };
    let touches = |name: &str| {
        let untied = name == names::LM_HEAD && !folder.has(name);
        untied || merge.borrow().as_ref().is_some_and(|merge| merge.touches(name))
    };
    let finish = || {
        report.set(merge.take().map(Merge::finish).transpose()?);
        Ok(())
    };
    let dtype = args.dtype.map(|dtype| dtype.stored());
    let changes = Changes::of(touches, fetch, None).checked_by(finish);
    write_model(&args.out, &folder, &config, changes, &Writing { dtype, ..Writing::default() })?;
    ui.line(&format!("wrote {}", args.out.display()));
    if let Some(MergeReport { tensors, largest: Some((name, change)) }) = report.take() {
        ui.line(&format!("  {tensors} tensors changed, the largest change is {change:.3e} in {name}"));
    }
    Ok(())
}
