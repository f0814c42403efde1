//! `wgpu-llava generate`: one answer.

use std::{ops::ControlFlow, time::Instant};

use serde_json::json;

use super::{
    Rehearsal,
    answer::{Answer, picture_files, stdout_is_terminal},
    args::{GenerateArgs, GlobalArgs},
    open_model, report,
    ui::Ui,
};
use crate::{
    data::{Encoder, IMAGE_PLACEHOLDER, ImageSource, Turn, Version},
    error::{Error, Result},
    generate::{Generated, Options, beam_search, generate},
    models::{llava::Pictures, open::Opened},
};

pub fn run(args: &GenerateArgs, global: &GlobalArgs) -> Result<()> {
    if args.num_beams > 1 && args.sampling.temperature > 0.0 {
        return Err(Error::usage("--num-beams searches, --temperature samples: they do not go together")
            .hint("leave one of them out"));
    }
    if args.stop.iter().any(String::is_empty) {
        return Err(Error::usage("--stop: an empty text would end every answer at once"));
    }
    // What can be wrong with the request is told before a model is loaded.
    Version::check(&args.version)?;
    let sources = picture_files(&args.image)?;
    if args.prompt.contains(IMAGE_PLACEHOLDER) {
        return Err(Error::usage(format!("--prompt holds `{IMAGE_PLACEHOLDER}`"))
            .hint("leave it out and give the picture with --image: it goes before the prompt by itself"));
    }
    let mut ui = Ui::new(global.quiet, global.verbose);
    let rehearse = |opened: &Opened| {
        let (_, prompt, pixels) = read(opened, args, &sources)?;
        answer(opened, args, prompt, &pixels, &Options::greedy(2, Vec::new()), &mut |_, _| ControlFlow::Continue(()))
            .map(|_| ())
    };
    let rehearsal = Rehearsal { tune: args.tune.tune, run: &rehearse };
    let opened = open_model(&args.model, global, rehearsal, &mut ui)?;
    let (encoder, prompt, pixels) = read(&opened, args, &sources)?;
    let options = args.sampling.options(opened.stop_ids(&encoder.version)?);
    let text = Answer::new(&opened.tokenizer, &encoder.version, &options.stop_ids, &args.stop);
    let mut text = text.streaming(!args.json && stdout_is_terminal());
    let mut failure = None;
    let mut first = None;
    let mut on_token = |_, token| {
        first.get_or_insert_with(Instant::now);
        text.push(token).unwrap_or_else(|error| {
            failure = Some(error);
            ControlFlow::Break(())
        })
    };
    let started = Instant::now();
    let generated = answer(&opened, args, prompt, &pixels, &options, &mut on_token)?;
    if let Some(error) = failure {
        return Err(error);
    }
    let whole = text.text()?;
    let Some(generated) = generated.first() else { return Ok(()) };
    // Decoding alone: the first token's time is that of the prompt, the pictures and the kernels' compilation.
    let (new, since) = match (generated.token_ids.len(), first) {
        (count @ 2.., Some(first)) if args.num_beams == 1 => (count - 1, first),
        (count, _) => (count, started),
    };
    let speed = new as f64 / since.elapsed().as_secs_f64().max(1e-9);
    if args.json {
        let json = json!({
            "text": whole,
            "token_ids": generated.token_ids,
            "prompt_tokens": generated.prompt_tokens,
            "tokens_per_second": speed,
        });
        return report::print_data(&format!("{json}\n"));
    }
    report::print_data(&format!("{}\n", text.rest()?))?;
    if global.verbose {
        let (new, before) = (generated.token_ids.len(), generated.prompt_tokens);
        ui.line(&format!("{new} tokens after {before}, {speed:.1} tokens/s"));
    }
    Ok(())
}

/// The prompt's ids, what tokenised it, and the pictures' pixels.
fn read(opened: &Opened, args: &GenerateArgs, sources: &[ImageSource]) -> Result<(Encoder, Vec<i32>, Vec<Vec<f32>>)> {
    let encoder = opened.encoder(&args.version, args.system.clone())?;
    let pixels = opened.pixels(sources)?;
    let prompt = encoder.prompt(&[Turn::human(&args.prompt, sources.len())])?;
    Ok((encoder, prompt, pixels))
}

/// One answer, searched for or chosen token by token.
fn answer(
    opened: &Opened,
    args: &GenerateArgs,
    prompt: Vec<i32>,
    pixels: &[Vec<f32>],
    options: &Options,
    on_token: &mut dyn FnMut(usize, u32) -> ControlFlow<()>,
) -> Result<Vec<Generated>> {
    let views: Vec<&[f32]> = pixels.iter().map(Vec::as_slice).collect();
    let pictures = Pictures::Pixels(&views);
    if args.num_beams <= 1 {
        return generate(&opened.model, &[prompt], pictures, options, on_token);
    }
    let found = beam_search(&opened.model, &prompt, pictures, options, args.num_beams, args.length_penalty)?;
    found.token_ids.iter().take_while(|&&token| on_token(0, token).is_continue()).count();
    Ok(vec![found])
}
