//! A session's answers are those of `generate` on the whole prompt, token for token, whatever it had read before.

mod common;

use std::{ops::ControlFlow, sync::Arc};

use common::{golden, open_gpu};
use wgpu_llava::{
    data::{Encoder, ImageSource, Turn},
    error::ErrorKind,
    generate::{Options, Session, generate, session::Pixels},
    gpu::Gpu,
    models::{
        llava::Pictures,
        open::{Opened, Place, open},
    },
};

struct Talk<'a> {
    opened: &'a Opened,
    encoder: Encoder,
    session: Session<'a>,
    turns: Vec<Turn>,
    pictures: Vec<Pixels>,
    options: Options,
}

fn opened(gpu: &Gpu, name: &str) -> Opened {
    open(std::slice::from_ref(gpu), Place::Folder(&golden("parity").join(name).join("model"), None), None).unwrap()
}

impl<'a> Talk<'a> {
    fn new(opened: &'a Opened) -> Self {
        let encoder = opened.encoder("v1", Some("Be brief.".into())).unwrap();
        let options = Options::greedy(12, opened.stop_ids(&encoder.version).unwrap());
        let session = Session::new(&opened.model);
        Self { opened, encoder, session, turns: Vec::new(), pictures: Vec::new(), options }
    }

    fn picture(&self, number: usize) -> Pixels {
        let size = self.opened.model.config.llava().unwrap().vision_config.image_size as u32;
        let shade = |at: usize| ((at * (7 + 5 * number) + at / 9) % 256) as u8;
        let rgb: Arc<[u8]> = (0..(size * size * 3) as usize).map(shade).collect();
        let source = ImageSource::Memory { name: "a picture".into(), width: size, height: size, rgb };
        self.opened.pixels(&[source]).unwrap().remove(0).into()
    }

    /// Asks, compares the answer with that of `generate`, and returns how many positions were kept, and how many read.
    #[track_caller]
    fn ask(&mut self, text: &str, shown: &[Pixels]) -> (usize, usize) {
        self.turns.push(Turn::human(text, shown.len()));
        self.pictures.extend_from_slice(shown);
        let prompt = self.encoder.prompt(&self.turns).unwrap();
        let mut heard = Vec::new();
        let mut on_token = |token| {
            heard.push(token);
            ControlFlow::Continue(())
        };
        let own = self.session.answer(&prompt, &self.pictures, &self.options, &mut on_token).unwrap();
        let views: Vec<&[f32]> = self.pictures.iter().map(|pixels| &**pixels).collect();
        let mut unheard = |_, _| ControlFlow::Continue(());
        let whole = [prompt];
        let fresh = generate(&self.opened.model, &whole, Pictures::Pixels(&views), &self.options, &mut unheard);
        assert_eq!(own, fresh.unwrap()[0], "{text:?}");
        assert_eq!(heard, own.token_ids);
        let ids: Vec<i32> = own.token_ids.iter().map(|&id| id as i32).collect();
        self.turns.push(Turn::assistant(self.opened.tokenizer.decode(&ids).unwrap().trim()));
        (self.session.kept(), own.prompt_tokens)
    }

    fn clear(&mut self) {
        self.turns.clear();
        self.pictures.clear();
    }
}

fn check(name: &str, keeps: bool) {
    let gpu = open_gpu();
    let opened = opened(&gpu, name);
    let mut talk = Talk::new(&opened);
    let picture_tokens = opened.model.image_tokens();
    let (one, two) = (talk.picture(1), talk.picture(2));
    let (kept, first) = talk.ask("What is in the picture?", std::slice::from_ref(&one));
    assert_eq!(kept, 0);
    assert!(first > picture_tokens);
    let (kept, second) = talk.ask("And what else is there?", &[]);
    // At least what was asked first stays; answers may be written otherwise than they were generated.
    assert!(!keeps || (kept >= first && kept < second), "{kept} of {second}");
    let (kept, third) = talk.ask("Is this one the same?", std::slice::from_ref(&two));
    assert!(!keeps || (kept >= second && kept < third), "{kept} of {third}");

    // The same words about another picture: what comes before it stays, the picture is read.
    talk.clear();
    let (kept, _) = talk.ask("What is in the picture?", std::slice::from_ref(&two));
    assert!(kept > 0 && kept + picture_tokens <= first, "{kept} of {first}");
    // The very same prompt again: its last token is read once more.
    talk.clear();
    let (kept, all) = talk.ask("What is in the picture?", std::slice::from_ref(&two));
    assert_eq!(kept, all - 1);
    talk.clear();
    talk.encoder.system = Some("Say it at length, and then say it again.".into());
    talk.options = Options { repetition_penalty: 1.3, max_new_tokens: 20, ..talk.options };
    talk.ask("No picture at all?", &[]);
    talk.ask("Why?", &[]);
}

#[test]
fn full_attention_in_groups() {
    check("gqa_tied_linear_pad", true);
    check("mqa_untied_mlp_full_features", true);
}

#[test]
fn a_sliding_window() {
    check("mistral_window", true);
}

#[test]
fn rotations_that_follow_the_length_are_done_again() {
    // Beyond 96 positions every key is rotated for the whole length.
    let gpu = open_gpu();
    let opened = opened(&gpu, "qwen2_dynamic");
    let mut talk = Talk::new(&opened);
    let mut lengths = Vec::new();
    for question in ["What is it?", "And why is that so?", "How do you know that?", "Tell me more."] {
        lengths.push(talk.ask(question, &[]));
    }
    assert!(lengths[1].0 > 0, "{lengths:?}");
    let picture = talk.picture(1);
    while lengths.last().is_some_and(|&(_, all)| all <= 120) {
        lengths.push(talk.ask("And in this picture, what is there to be seen?", std::slice::from_ref(&picture)));
    }
    assert_eq!(lengths.last().map(|&(kept, _)| kept), Some(0), "{lengths:?}");
    talk.clear();
    assert_eq!(talk.ask("What is it?", &[]).0, 0);
    assert!(talk.ask("And why is that so?", &[]).0 > 0);
}

#[test]
fn a_refused_prompt_and_a_broken_off_answer_leave_the_session_usable() {
    let gpu = open_gpu();
    let opened = opened(&gpu, "mha_untied_mlp");
    let mut talk = Talk::new(&opened);
    talk.ask("What is it?", &[]);
    let limit = opened.model.config.text().positions();
    let stop = &mut |_| ControlFlow::Break(());
    let long = vec![5; limit + 1];
    let error = talk.session.answer(&long, &[], &talk.options, stop).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Usage);
    assert!(error.message.contains(&limit.to_string()), "{error}");
    let picture = talk.picture(1);
    assert_eq!(
        talk.session.answer(&[1, 5], &[picture], &talk.options, stop).map(|answer| answer.token_ids.len()).ok(),
        Some(1)
    );
    assert!(talk.session.answer(&[1, -200, 5], &[], &talk.options, stop).is_err());
    assert_eq!(talk.session.answer(&[1, 5, 6], &[], &talk.options, stop).unwrap().token_ids.len(), 1);
    talk.ask("And why?", &[]);
    // A prompt that fills all positions has no room for an answer.
    let full = talk.session.answer(&long[..limit], &[], &talk.options, stop).unwrap();
    assert!(full.token_ids.is_empty());
    talk.ask("Still there?", &[]);
}
