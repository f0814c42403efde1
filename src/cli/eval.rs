//! `wgpu-llava eval`: a benchmark, its table or JSON.

use std::path::Path;

use super::{
    args::{EvalArgs, GlobalArgs},
    hub, open_answering, report, tuning,
    ui::Ui,
};
use crate::{
    error::{Error, Result},
    eval::{self, Request},
    gpu::Gpu,
    hub::Wanted,
    train::events::Silent,
};

/// Questions that tell what there is to tune: a batch.
const REHEARSED: usize = 64;

pub fn run(args: &EvalArgs, global: &GlobalArgs) -> Result<()> {
    let request = Request {
        task: &args.task,
        version: &args.version,
        model: args.model.as_deref().unwrap_or("embedded:tiny"),
        adapter: args.adapter.as_deref(),
        limit: args.limit,
        out: args.out.as_deref(),
        data: args.data.as_deref(),
    };
    request.check()?;
    if let Some(out) = args.out.as_ref().filter(|out| out.exists() && !out.is_dir()) {
        return Err(Error::usage(format!("--out: {} is a file, not a folder", out.display())));
    }
    let mut ui = Ui::new(global.quiet, global.verbose);
    let model = hub::local_path(Path::new(request.model), Wanted::Model, &mut ui)?.display().to_string();
    let adapter = request.adapter.map(|path| hub::local_path(path, Wanted::Adapter, &mut ui)).transpose()?;
    let request = Request { model: &model, adapter: adapter.as_deref(), ..request };
    let gpus = open_answering(global, &mut ui)?;
    let gpu = &gpus[0];
    tuning::prepare(&gpus, args.tune.tune, &mut ui, || {
        let counting = Gpu::counting(gpu.facts().clone());
        let few = Request { limit: Some(args.limit.unwrap_or(REHEARSED).min(REHEARSED)), out: None, ..request };
        eval::run(std::slice::from_ref(&counting), &few, &mut Silent)?;
        Ok(counting.launches())
    })?;
    let outcome = eval::run(&gpus, &request, &mut ui)?;
    if args.json {
        return report::print_data(&format!("{}\n", outcome.json()));
    }
    report::print_data(&format!("{}\n", outcome.table()))
}
