//! `wgpu-llava chat`: a conversation in the terminal, or through a pipe.
//!
//! stdout holds the answers alone. What goes wrong with one message or command is told, and the conversation goes on.

mod command;
mod input;
mod save;

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::Instant,
};

use super::{
    Rehearsal,
    answer::{Answer, picture_files},
    args::{ChatArgs, GlobalArgs},
    interrupt, open_model, report,
    ui::{Ui, shown},
};
use crate::{
    data::{Encoder, IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX, ImageSource, Template, Turn, Version, version::CHAT},
    error::{Error, ErrorKind, Result},
    generate::{Options, Session, generate, session::Pixels},
    models::{
        llava::Pictures,
        open::{Opened, open_version},
    },
};
use command::Command;
use input::{Entry, Input};

pub fn run(args: &ChatArgs, global: &GlobalArgs) -> Result<()> {
    // What can be wrong with the request is told before a model is loaded.
    if let Some(version) = &args.version {
        Version::check(version)?;
        if Template::named(version).is_ok_and(Template::is_plain) {
            return Err(Error::usage(format!("--version {version} has no place for a conversation"))
                .hint("leave it out, or name the template that the model was tuned with, such as v1"));
        }
    }
    picture_files(&args.image)?;
    let mut ui = Ui::new(global.quiet, global.verbose);
    let rehearsal = Rehearsal { tune: args.tune.tune, run: &rehearse };
    let opened = open_model(&args.model, global, rehearsal, &mut ui)?;
    let mut chat = Chat::new(args, &opened)?;
    for path in &args.image {
        chat.show(path)?;
    }
    let mut input = Input::open()?;
    // Through a pipe Ctrl-C ends the program, as it does with others.
    if input.is_terminal() {
        interrupt::install_for_answers()?;
    }
    chat.header(&mut ui);
    loop {
        let entry = input.entry()?;
        interrupt::begin_answer();
        let done = match entry {
            Entry::End => break,
            Entry::Message(text) => chat.say(&text, global.verbose, &mut ui),
            Entry::Command(line) => match Command::parse(&line) {
                Ok(Command::Quit) => break,
                Ok(command) => chat.obey(command, &mut ui),
                Err(error) => Err(error),
            },
        };
        interrupt::end_answer();
        match done {
            Err(error) if error.kind == ErrorKind::Device => return Err(error),
            Err(error) => report::print_error(&error),
            Ok(()) => {}
        }
    }
    Ok(())
}

/// Positions of messages that stand for all: a few words, a question, a text.
const MESSAGES: [usize; 3] = [32, 128, 512];

/// Answers to such messages, with a picture where the model sees.
fn rehearse(opened: &Opened) -> Result<()> {
    let config = &opened.model.config;
    let side = config.llava().filter(|_| opened.model.projector.is_some()).map(|llava| llava.vision_config.image_size);
    let picture = side.map(|side| vec![0.0; 3 * side * side]);
    let views: Vec<&[f32]> = picture.iter().map(Vec::as_slice).collect();
    let room = config.text().positions().saturating_sub(views.len() * opened.model.image_tokens());
    for length in MESSAGES.into_iter().filter(|length| length + 2 <= room) {
        let mut prompt = vec![0; length];
        prompt.splice(..0, views.iter().map(|_| IMAGE_TOKEN_INDEX));
        let options = Options::greedy(2, Vec::new());
        generate(&opened.model, &[prompt], Pictures::Pixels(&views), &options, &mut |_, _| ControlFlow::Continue(()))?;
    }
    Ok(())
}

/// A picture that was asked for.
struct Picture {
    path: PathBuf,
    pixels: Pixels,
}

struct Chat<'a> {
    opened: &'a Opened,
    encoder: Encoder,
    options: Options,
    /// Of `--seed`: each answer draws from a stream of its own.
    seed: u64,
    session: Session<'a>,
    /// By turns, an answer last; and the pictures in them, in order.
    turns: Vec<Turn>,
    pictures: Vec<Picture>,
    /// Pictures for the next message.
    pending: Vec<Picture>,
}

impl<'a> Chat<'a> {
    fn new(args: &ChatArgs, opened: &'a Opened) -> Result<Self> {
        let version = match &args.version {
            Some(version) => version.as_str(),
            None => default_version(opened)?,
        };
        let encoder = opened.encoder(version, args.system.clone())?;
        let options = args.sampling.options(opened.stop_ids(&encoder.version)?);
        Ok(Self {
            opened,
            encoder,
            options,
            seed: args.sampling.seed,
            session: Session::new(&opened.model),
            turns: Vec::new(),
            pictures: Vec::new(),
            pending: Vec::new(),
        })
    }

    fn header(&self, ui: &mut Ui) {
        let sees = if self.opened.model.projector.is_some() { "text and pictures" } else { "text alone" };
        let name = shown(Path::new(self.opened.folder.name()));
        ui.line(&format!("{name}: template {}, {sees}", self.encoder.version.name()));
        ui.line("  /help tells the commands, /quit or Ctrl-D ends");
    }

    /// Reads a picture for the next message.
    fn show(&mut self, path: &Path) -> Result<()> {
        let path = std::path::absolute(path).map_err(|source| Error::reading(path, source))?;
        if self.opened.model.vision.is_some() && self.opened.model.projector.is_none() {
            let name = self.opened.folder.name();
            return Err(Error::usage(format!("{name} cannot see: it has no projector for pictures"))
                .hint("train one, or name a complete LLaVA"));
        }
        // Hints about data sets have no place here.
        let pixels = self.opened.pixels(&[ImageSource::File(path.clone())]);
        let pixels =
            pixels.map_err(
                |error| if error.kind == ErrorKind::Data { Error { hints: Vec::new(), ..error } } else { error },
            )?;
        self.pending.extend(pixels.into_iter().map(|pixels| Picture { path: path.clone(), pixels: pixels.into() }));
        Ok(())
    }

    fn obey(&mut self, command: Command, ui: &mut Ui) -> Result<()> {
        match command {
            Command::Image(path) => {
                self.show(&path)?;
                let count = self.pending.len();
                let what = if count == 1 { "1 picture".to_owned() } else { format!("{count} pictures") };
                ui.line(&format!("{what} for the next message"));
            }
            Command::Clear => {
                self.turns.clear();
                self.pictures.clear();
                self.pending.clear();
                ui.line("a new conversation");
            }
            Command::Save(path) => {
                let images: Vec<&Path> = self.pictures.iter().map(|picture| picture.path.as_path()).collect();
                save::save(&path, self.encoder.system.as_deref(), &self.turns, &images)?;
                ui.line(&format!("saved {}", path.display()));
            }
            Command::System(text) => {
                let whose = if text.is_some() { "another system text" } else { "the template's own system text" };
                self.encoder.system = text;
                ui.line(&format!("{whose} from here on"));
            }
            Command::Help => ui.line(&command::help()),
            Command::Quit => {}
        }
        Ok(())
    }

    /// Asks, shows the answer as it comes, and keeps both. What fails leaves the conversation as it was.
    fn say(&mut self, text: &str, verbose: bool, ui: &mut Ui) -> Result<()> {
        if text.contains(IMAGE_PLACEHOLDER) {
            return Err(Error::usage(format!("the message holds `{IMAGE_PLACEHOLDER}`"))
                .hint("leave it out, and show a picture with /image PATH: it goes before the message by itself"));
        }
        let (turns, pictures) = (self.turns.len(), self.pictures.len());
        self.turns.push(Turn::human(text, self.pending.len()));
        self.pictures.append(&mut self.pending);
        let answer = self.answer(verbose, ui);
        if let Ok(Some(answer)) = answer {
            self.turns.push(Turn::assistant(answer));
            return Ok(());
        }
        self.turns.truncate(turns);
        self.pending = self.pictures.split_off(pictures);
        answer.map(|_| ())
    }

    /// The answer to the turns so far; none where it was stopped before its first word.
    fn answer(&mut self, verbose: bool, ui: &mut Ui) -> Result<Option<String>> {
        let prompt = self.encoder.prompt(&self.turns)?;
        let pixels: Vec<Pixels> = self.pictures.iter().map(|picture| picture.pixels.clone()).collect();
        self.options.seed = self.seed.wrapping_add(self.turns.len() as u64 / 2);
        let version = self.encoder.version.clone();
        let stop_ids = self.options.stop_ids.clone();
        let mut answer = Answer::new(&self.opened.tokenizer, &version, &stop_ids, &[]).streaming(true);
        let (mut failure, mut stopped) = (None, false);
        let started = Instant::now();
        let mut on_token = |token| {
            if interrupt::answer_is_stopped() {
                stopped = true;
                return ControlFlow::Break(());
            }
            answer.push(token).unwrap_or_else(|error| {
                failure = Some(error);
                ControlFlow::Break(())
            })
        };
        let generated = self.session.answer(&prompt, &pixels, &self.options, &mut on_token);
        let generated = generated.map_err(|error| match error.kind {
            ErrorKind::Usage => error.hint("/clear begins a new conversation"),
            _ => error,
        })?;
        if let Some(error) = failure {
            return Err(error);
        }
        let (count, before) = (generated.token_ids.len(), generated.prompt_tokens);
        let limit = self.opened.model.config.text().positions();
        if count == 0 {
            let message = format!("the conversation takes all {limit} positions of the model: none is left to answer");
            return Err(Error::usage(message).hint("/clear begins a new conversation"));
        }
        let text = answer.text()?;
        if stopped && text.is_empty() {
            ui.line("\n(stopped before the first word: the message was taken back)");
            return Ok(None);
        }
        report::print_data(&format!("{}\n", answer.rest()?))?;
        let ended = generated.token_ids.last().is_some_and(|last| stop_ids.contains(last));
        if stopped {
            ui.line("(stopped)");
        } else if !ended && before + count >= limit {
            ui.line(&format!("(the model's {limit} positions are used up: /clear begins a new conversation)"));
        } else if !ended && count >= self.options.max_new_tokens {
            ui.line(&format!("(cut after {count} tokens: see --max-new-tokens)"));
        }
        if verbose {
            let speed = count as f64 / started.elapsed().as_secs_f64().max(1e-9);
            let kept = self.session.kept();
            ui.line(&format!("{count} tokens after {before}, {kept} of them kept, {speed:.1} tokens/s"));
        }
        Ok(Some(text))
    }
}

/// A LLaVA is asked as `generate` asks it; a language model in its own template, where it has one.
fn default_version(opened: &Opened) -> Result<&'static str> {
    if opened.folder.config().llava().is_some() {
        return Ok("v1");
    }
    match open_version(CHAT, &opened.folder, &opened.tokenizer) {
        Ok(_) => Ok(CHAT),
        Err(error) if error.kind == ErrorKind::Usage => Ok("v1"),
        Err(error) => Err(error),
    }
}
