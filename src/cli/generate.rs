//! `wgpu-llava generate`: one answer.

use std::{
    io::{IsTerminal, Write},
    ops::ControlFlow,
    time::Instant,
};

use serde_json::json;

use super::{
    args::{GenerateArgs, GlobalArgs},
    open_model, report,
    ui::Ui,
};
use crate::{
    data::{IMAGE_PLACEHOLDER, ImageSource, Tokenizer, Turn},
    error::{Error, Result},
    generate::{Options, beam_search, generate},
    models::llava::Pictures,
};

pub fn run(args: &GenerateArgs, global: &GlobalArgs) -> Result<()> {
    if args.num_beams > 1 && args.temperature > 0.0 {
        return Err(Error::usage("--num-beams searches, --temperature samples: they do not go together")
            .hint("leave one of them out"));
    }
    if args.stop.iter().any(String::is_empty) {
        return Err(Error::usage("--stop: an empty text would end every answer at once"));
    }
    // What can be wrong with the request is told before a model is loaded.
    let template = crate::data::Template::named(&args.version)?;
    let sources: Vec<ImageSource> = args.image.iter().cloned().map(ImageSource::File).collect();
    if let Some(missing) = args.image.iter().find(|path| !path.is_file()) {
        let what = if missing.is_dir() { "is a folder, not a picture" } else { "is not there" };
        return Err(Error::data(format!("--image: {} {what}", missing.display())));
    }
    if args.prompt.contains(IMAGE_PLACEHOLDER) {
        return Err(Error::usage(format!("--prompt holds `{IMAGE_PLACEHOLDER}`"))
            .hint("leave it out and give the picture with --image: it goes before the prompt by itself"));
    }
    let mut ui = Ui::new(global.quiet, global.verbose);
    let opened = open_model(&args.model, global, &mut ui)?;
    let encoder = opened.encoder(&args.version, args.system.clone())?;
    let pixels = opened.pixels(&sources)?;
    let views: Vec<&[f32]> = pixels.iter().map(Vec::as_slice).collect();
    let prompt = encoder.prompt(&[Turn::human(&args.prompt, sources.len())])?;
    let options = Options {
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        top_p: args.top_p,
        top_k: args.top_k,
        repetition_penalty: args.repetition_penalty,
        seed: args.seed,
        stop_ids: opened.stop_ids(template)?,
    };
    // An end mark of several tokens is found in the text.
    let mark = template.stop();
    let mark = opened.tokenizer.token_to_id(mark).is_none().then_some(mark).filter(|mark| !mark.is_empty());
    let stop: Vec<&str> = mark.into_iter().chain(args.stop.iter().map(String::as_str)).collect();

    let mut answer = Answer { tokenizer: &opened.tokenizer, stop, ids: Vec::new(), shown: 0, stream: !args.json };
    let mut failure = None;
    let mut first = None;
    let mut on_token = |_, token| {
        first.get_or_insert_with(Instant::now);
        answer.push(token).unwrap_or_else(|error| {
            failure = Some(error);
            ControlFlow::Break(())
        })
    };
    let started = Instant::now();
    let pictures = Pictures::Pixels(&views);
    let generated = if args.num_beams > 1 {
        let found = beam_search(&opened.model, &prompt, pictures, &options, args.num_beams, args.length_penalty)?;
        found.token_ids.iter().take_while(|&&token| on_token(0, token).is_continue()).count();
        vec![found]
    } else {
        generate(&opened.model, &[prompt], pictures, &options, &mut on_token)?
    };
    if let Some(error) = failure {
        return Err(error);
    }
    let text = answer.text()?;
    let Some(generated) = generated.first() else { return Ok(()) };
    // Decoding alone: the first token's time is that of the prompt, the pictures and the kernels' compilation.
    let (new, since) = match (generated.token_ids.len(), first) {
        (count @ 2.., Some(first)) if args.num_beams == 1 => (count - 1, first),
        (count, _) => (count, started),
    };
    let speed = new as f64 / since.elapsed().as_secs_f64().max(1e-9);
    if args.json {
        let json = json!({
            "text": text,
            "token_ids": generated.token_ids,
            "prompt_tokens": generated.prompt_tokens,
            "tokens_per_second": speed,
        });
        return report::print_data(&format!("{json}\n"));
    }
    report::print_data(&format!("{}\n", &text[answer.shown.min(text.len())..]))?;
    if global.verbose {
        let (new, before) = (generated.token_ids.len(), generated.prompt_tokens);
        ui.line(&format!("{new} tokens after {before}, {speed:.1} tokens/s"));
    }
    Ok(())
}

/// What has been said so far, and how much of it was shown.
struct Answer<'a> {
    tokenizer: &'a Tokenizer,
    /// Any of these ends the answer, and is not part of it.
    stop: Vec<&'a str>,
    ids: Vec<i32>,
    /// Bytes of the text.
    shown: usize,
    /// Whether to show words as they come, on a terminal.
    stream: bool,
}

impl Answer<'_> {
    /// Up to the stop text, white space around it left out.
    fn text(&self) -> Result<String> {
        let text = self.tokenizer.decode(&self.ids)?;
        let end = self.stop.iter().filter_map(|stop| text.find(stop)).min().unwrap_or(text.len());
        Ok(text[..end].trim().to_owned())
    }

    fn push(&mut self, token: u32) -> Result<ControlFlow<()>> {
        self.ids.push(token as i32);
        if !self.stop.is_empty() {
            let text = self.tokenizer.decode(&self.ids)?;
            if self.stop.iter().any(|stop| text.contains(stop)) {
                return Ok(ControlFlow::Break(()));
            }
        }
        if self.stream && std::io::stdout().is_terminal() {
            let mut text = self.text()?;
            // The beginning of a stop text is held back until it is clear that it is none.
            let begun =
                |stop: &&str| (1..stop.len()).rev().find(|&n| stop.is_char_boundary(n) && text.ends_with(&stop[..n]));
            let held = self.stop.iter().filter_map(begun).max().unwrap_or(0);
            text.truncate(text.len() - held);
            // A character may need more tokens than there are yet.
            if !text.ends_with('\u{FFFD}') && text.is_char_boundary(self.shown) && text.len() > self.shown {
                let mut out = std::io::stdout().lock();
                let written = out.write_all(&text.as_bytes()[self.shown..]).and_then(|()| out.flush());
                self.shown = text.len();
                if written.is_err() {
                    return Ok(ControlFlow::Break(()));
                }
            }
        }
        Ok(ControlFlow::Continue(()))
    }
}
