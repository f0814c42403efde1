//! `wgpu-llava score`: the log-likelihood of each record's supervised tokens.

use std::path::Path;

use serde::Serialize;

use super::{
    Rehearsal,
    args::{GlobalArgs, ScoreArgs},
    open_model, report,
    ui::Ui,
};
use crate::{
    data::{ImageSource, Sample, Version, dataset::check_images, record::read_records},
    error::{Error, Result},
    formats::atomic::write_file,
    models::{batch::PackedBatch, llava::Pictures, open::Opened},
    train::events::{Event, Observer},
};

/// Positions that go through the model at once; a longer record goes alone.
const BATCH_TOKENS: usize = 4096;
/// Records of which the first batch tells what there is to tune.
const REHEARSED: usize = 64;

/// One line of the output.
#[derive(Serialize)]
struct Line<'a> {
    id: &'a str,
    /// How many are supervised.
    tokens: usize,
    /// Mean negative log-likelihood, nats; none when nothing is supervised.
    loss: Option<f64>,
    token_logprobs: Vec<f32>,
}

pub fn run(args: &ScoreArgs, global: &GlobalArgs) -> Result<()> {
    Version::check(&args.version)?;
    if let Some(out) = &args.out {
        report::check_output_file("--out", out)?;
    }
    let folder = args.image_folder.as_deref().or(args.data.parent()).unwrap_or(Path::new(""));
    let records = read_records(&args.data, folder, None)?;
    check_images(&records)?;
    let mut ui = Ui::new(global.quiet, global.verbose);
    let rehearse = |opened: &Opened| {
        let encoder = opened.encoder(&args.version, None)?;
        let few =
            records.iter().take(REHEARSED).map(|record| encoder.encode(record)).collect::<Result<Vec<Sample>>>()?;
        let first = batches(&few, encoder.image_tokens).next().unwrap_or_default();
        score(opened, first, encoder.image_tokens).map(|_| ())
    };
    let rehearsal = Rehearsal { tune: args.tune.tune, run: &rehearse };
    let opened = open_model(&args.model, global, rehearsal, &mut ui)?;
    let encoder = opened.encoder(&args.version, None)?;
    let samples = records.iter().map(|record| encoder.encode(record)).collect::<Result<Vec<Sample>>>()?;
    let cut = samples.iter().filter(|sample| sample.truncated > 0).count();
    if cut > 0 {
        let limit = encoder.max_length.unwrap_or_default();
        ui.line(&format!("records longer than the model's {limit} positions, their tails not scored: {cut}"));
    }
    let mut text = String::new();
    let mut done = 0;
    for batch in batches(&samples, encoder.image_tokens) {
        let lines = score(&opened, batch, encoder.image_tokens)?;
        match &args.out {
            Some(_) => text += &lines,
            None => report::print_data(&lines)?,
        }
        done += batch.len();
        ui.event(Event::Progress { what: "records scored", done, total: samples.len() });
    }
    match &args.out {
        Some(out) => write_file(out, text.as_bytes()),
        None => Ok(()),
    }
}

/// Neighbouring records, as many as fit.
fn batches(samples: &[Sample], image_tokens: usize) -> impl Iterator<Item = &[Sample]> {
    let mut rest = samples;
    std::iter::from_fn(move || {
        let mut positions = 0;
        let fitting = rest.iter().take_while(|sample| {
            positions += sample.spliced_length(image_tokens);
            positions <= BATCH_TOKENS
        });
        let count = fitting.count().max(1).min(rest.len());
        let (batch, left) = rest.split_at(count);
        rest = left;
        (!batch.is_empty()).then_some(batch)
    })
}

/// The lines of a batch.
fn score(opened: &Opened, samples: &[Sample], image_tokens: usize) -> Result<String> {
    let images: Vec<ImageSource> = samples.iter().flat_map(|sample| sample.images.iter().cloned()).collect();
    let pixels = opened.pixels(&images)?;
    let views: Vec<&[f32]> = pixels.iter().map(Vec::as_slice).collect();
    let batch = PackedBatch::new(samples, image_tokens);
    let losses = opened.model.score(&batch, Pictures::Pixels(&views))?;
    let mut rest = losses.as_slice();
    let mut text = String::new();
    for (sample, &tokens) in samples.iter().zip(&batch.targets_per_sequence) {
        let Some((own, left)) = rest.split_at_checked(tokens) else {
            return Err(Error::failed("the device gave fewer losses than there are targets"));
        };
        rest = left;
        if own.iter().any(|loss| !loss.is_finite()) {
            return Err(Error::failed(format!("record {:?}: a log-likelihood is not a number", sample.id))
                .hint("the weights hold infinities or NaN, or overflow on this record"));
        }
        let sum: f64 = own.iter().map(|&loss| f64::from(loss)).sum();
        let line = Line {
            id: &sample.id,
            tokens,
            loss: (tokens > 0).then(|| sum / tokens as f64),
            // `0.0 -` keeps a loss of zero from becoming -0.
            token_logprobs: own.iter().map(|loss| 0.0 - loss).collect(),
        };
        let json = serde_json::to_string(&line);
        text += &json.map_err(|error| Error::failed("cannot write a score as JSON").caused_by(error))?;
        text.push('\n');
    }
    Ok(text)
}
