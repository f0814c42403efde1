//! easy-VQA: 9,673 questions about 1,000 pictures, asked in the template `v1` unless told otherwise, answered greedily in a word or two.
//! An answer is right when it equals the expected one, but for case and white space around it.
//!
//! Two baselines stand beside the accuracy. The most frequent answer: what the training set answers most often to the
//! same sentence. The blank picture: the same model shown, instead of every picture, one of a single colour, the mean
//! background of the training pictures; what it gets right, it knows without seeing.

use std::{collections::BTreeMap, ops::ControlFlow, sync::Arc, time::Instant};

use super::{Answer, Outcome};
use crate::{
    autograd::Tape,
    data::{Encoder, ImageSource, Turn},
    embedded::{self, Question, Split},
    error::{Error, Result},
    generate::{self, Options},
    models::{
        llava::Pictures,
        open::{Opened, pixels},
    },
    nn::Forward,
    rng::Rng,
    tensor::Tensor,
    train::{
        events::{Event, Observer},
        report::{ResultRow, SampleAnswer, png},
    },
};

pub const TASK: &str = "easy-vqa";
const MOST_FREQUENT: &str = "most frequent answer to the sentence";
const BLANK: &str = "this model, picture blanked";
/// Questions answered at once, and pictures that go through the tower at once.
const QUESTIONS: usize = 64;
const PICTURES: usize = 64;
/// Answers shown in a report.
const SAMPLES: usize = 12;

/// Asks the test questions in the template of a name; of `limit`, the first ones of an order that never changes.
///
/// # Errors
/// `Usage`: the model cannot see.
pub fn evaluate(opened: &Opened, version: &str, limit: Option<usize>, observer: &mut dyn Observer) -> Result<Outcome> {
    let started = Instant::now();
    let Some(processor) = opened.processor.as_ref().filter(|_| opened.model.projector.is_some()) else {
        return Err(Error::usage(format!("{} cannot see: it has no projector for pictures", opened.folder.name()))
            .hint("train one first: `wgpu-llava train` makes one from embedded:tiny, and says where"));
    };
    let data = embedded::easy_vqa()?;
    let order = match limit {
        Some(limit) if limit < data.test.questions.len() => {
            let mut order = Rng::named(0, TASK).permutation(data.test.questions.len());
            order.truncate(limit);
            order
        }
        _ => (0..data.test.questions.len()).collect(),
    };
    let asked: Vec<&Question> = order.iter().map(|&index| &data.test.questions[index]).collect();

    // Every picture once through the tower.
    let mut places = BTreeMap::new();
    for question in &asked {
        let next = places.len();
        places.entry(question.image).or_insert(next);
    }
    let mut pictures = vec![blank(&data.train)?; places.len() + 1];
    for (&image, &place) in &places {
        pictures[place] = data.test.images[image].clone();
    }
    let blank_place = places.len();
    let mut features = Vec::new();
    for chunk in pictures.chunks(PICTURES) {
        let pixels = pixels(processor, chunk)?;
        features.push(tower(opened, &pixels)?);
        let done = (features.len() * PICTURES).min(pictures.len());
        observer.event(Event::Progress { what: "pictures through the tower", done, total: pictures.len() });
    }
    drop(pictures);

    let encoder = opened.encoder(version, None)?;
    let mut asker = Asker { opened, features, options: options(opened, &encoder, &data.answers)?, encoder };

    // With the picture blanked the answer depends on the sentence alone.
    let mut sentences: BTreeMap<&str, String> = asked.iter().map(|question| (&*question.text, String::new())).collect();
    let blank: Vec<(&str, usize)> = sentences.keys().map(|text| (*text, blank_place)).collect();
    for (answer, sentence) in asker.ask(&blank, &mut |_| ())?.into_iter().zip(sentences.values_mut()) {
        *sentence = answer;
    }
    let questions: Vec<(&str, usize)> =
        asked.iter().map(|question| (&*question.text, places[&question.image])).collect();
    let total = questions.len();
    let what = "test questions";
    let answered = asker.ask(&questions, &mut |done| observer.event(Event::Progress { what, done, total }))?;

    let frequent = most_frequent(&data.train);
    let mut answers = Vec::new();
    for ((&question_id, question), answer) in order.iter().zip(&asked).zip(answered) {
        let usual = frequent(&question.text);
        answers.push(Answer {
            question_id,
            image: data.test.images[question.image].name(),
            question: question.text.to_string(),
            expected: question.answer.to_string(),
            correct: answer == *question.answer,
            answer,
            baselines: vec![usual.to_string(), sentences[&*question.text].clone()],
        });
    }
    let share = |baseline: usize| {
        let right = answers.iter().filter(|answer| answer.baselines[baseline] == answer.expected).count();
        right as f64 / answers.len().max(1) as f64
    };
    let row = ResultRow {
        task: TASK.into(),
        correct: answers.iter().filter(|answer| answer.correct).count(),
        total,
        baselines: vec![(MOST_FREQUENT.into(), share(0)), (BLANK.into(), share(1))],
    };
    let samples = samples(&asked, &answers, &data.test)?;
    let seconds = started.elapsed().as_secs_f64();
    Ok(Outcome { row, available: data.test.questions.len(), answers, samples, seconds })
}

/// The tower's features [pictures * N, Dv].
fn tower(opened: &Opened, pixels: &[Vec<f32>]) -> Result<Tensor> {
    let mut tape = Tape::silent();
    let mut forward = Forward { tape: &mut tape, parameters: &opened.model.parameters, dropout: None, before: None };
    let views: Vec<&[f32]> = pixels.iter().map(Vec::as_slice).collect();
    Ok(opened.model.features(&mut forward, &views)?.value)
}

/// Room for the longest of the known answers and the end mark.
fn options(opened: &Opened, encoder: &Encoder, answers: &[String]) -> Result<Options> {
    let mut longest = 0;
    for answer in answers {
        longest = longest.max(encoder.tokenizer.encode(&format!(" {answer}"), false)?.len());
    }
    Ok(Options::greedy(longest + 2, opened.stop_ids(&encoder.version)?))
}

/// A picture all of one colour, the mean of the training pictures' top left pixels.
fn blank(train: &Split) -> Result<ImageSource> {
    let mut sum = [0u64; 3];
    let (mut width, mut height) = (1, 1);
    for image in &train.images {
        if let ImageSource::Memory { width: w, height: h, rgb, .. } = image {
            (width, height) = (*w, *h);
            sum.iter_mut().zip(rgb.iter()).for_each(|(sum, &value)| *sum += u64::from(value));
        }
    }
    let count = train.images.len().max(1) as u64;
    let colour = sum.map(|sum| ((sum + count / 2) / count) as u8);
    let rgb: Arc<[u8]> = colour.repeat((width * height) as usize).into();
    Ok(ImageSource::Memory { name: "easy-vqa/blank".into(), width, height, rgb })
}

/// The training set's most frequent answer to a sentence, and to an unknown sentence the most frequent of all. Of
/// equals it is the one given first in the training set; two sentences of the data set have such equals, and the other
/// choice would be right 6 times less in all test questions.
fn most_frequent(train: &Split) -> impl Fn(&str) -> Arc<str> {
    // Answers in the order in which they are first given, with their counts.
    type Counts = Vec<(Arc<str>, usize)>;
    fn count(counts: &mut Counts, answer: &Arc<str>) {
        match counts.iter_mut().find(|(known, _)| known == answer) {
            Some((_, count)) => *count += 1,
            None => counts.push((answer.clone(), 1)),
        }
    }
    let mut by_sentence: BTreeMap<Arc<str>, Counts> = BTreeMap::new();
    let mut overall = Counts::new();
    for question in &train.questions {
        count(by_sentence.entry(question.text.clone()).or_default(), &question.answer);
        count(&mut overall, &question.answer);
    }
    move |sentence| {
        let counts = by_sentence.get(sentence).unwrap_or(&overall);
        // Of equal ones `max_by_key` takes the last, which in reverse is the first.
        let most = counts.iter().rev().max_by_key(|(_, count)| *count);
        most.map_or_else(|| "".into(), |(answer, _)| answer.clone())
    }
}

struct Asker<'a> {
    opened: &'a Opened,
    encoder: Encoder,
    /// [PICTURES * N, Dv] each, the last one shorter.
    features: Vec<Tensor>,
    options: Options,
}

impl Asker<'_> {
    /// The answers to sentences about the pictures at given places, trimmed and in lower case.
    fn ask(&mut self, questions: &[(&str, usize)], progress: &mut dyn FnMut(usize)) -> Result<Vec<String>> {
        let model = &self.opened.model;
        let rows = model.image_tokens();
        let mut answers = Vec::new();
        for chunk in questions.chunks(QUESTIONS) {
            let width = self.features[0].cols();
            let features = Tensor::empty(model.gpu(), &[chunk.len() * rows, width]);
            let mut prompts = Vec::new();
            for (index, &(sentence, place)) in chunk.iter().enumerate() {
                prompts.push(self.encoder.prompt(&[Turn::human(sentence, 1)])?);
                features.copy_rows(index * rows, &self.features[place / PICTURES], place % PICTURES * rows, rows);
            }
            let mut unheard = |_, _| ControlFlow::Continue(());
            let pictures = Pictures::Features(features);
            for generated in generate::generate(model, &prompts, pictures, &self.options, &mut unheard)? {
                let ids: Vec<i32> = generated.token_ids.iter().map(|&id| id as i32).collect();
                answers.push(self.encoder.tokenizer.decode(&ids)?.trim().to_lowercase());
            }
            progress(answers.len());
        }
        Ok(answers)
    }
}

/// Answers for a report: some that are right, and up to a third that are wrong, each about another picture.
fn samples(asked: &[&Question], answers: &[Answer], test: &Split) -> Result<Vec<SampleAnswer>> {
    let mut seen = std::collections::BTreeSet::new();
    let mut chosen = Vec::new();
    for (correct, most) in [(false, SAMPLES / 3), (true, SAMPLES)] {
        for (question, answer) in asked.iter().zip(answers).filter(|(_, answer)| answer.correct == correct) {
            let room = chosen.len() < most;
            if room && seen.insert(question.image) {
                chosen.push((*question, answer));
            }
        }
    }
    // Right ones first.
    chosen.sort_by_key(|(_, answer)| !answer.correct);
    let sample = |(question, answer): (&Question, &Answer)| {
        let picture = test.images[question.image].load()?;
        Ok(SampleAnswer {
            image_png: png(picture.width(), picture.height(), picture.as_raw())?,
            question: answer.question.clone(),
            expected: answer.expected.clone(),
            answer: answer.answer.clone(),
        })
    };
    chosen.into_iter().map(sample).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_frequent_answer_is_right_two_times_in_three() {
        let data = embedded::easy_vqa().unwrap();
        let frequent = most_frequent(&data.train);
        let right = data.test.questions.iter().filter(|question| frequent(&question.text) == question.answer).count();
        // 67.0 %; every sentence of the test set is in the training set.
        assert_eq!((right, data.test.questions.len()), (6481, 9673));
        assert!(!frequent("never asked").is_empty());
    }

    #[test]
    fn the_blank_picture_is_of_one_light_colour() {
        let picture = blank(&embedded::easy_vqa().unwrap().train).unwrap().load().unwrap();
        assert_eq!(picture.dimensions(), (64, 64));
        assert!(picture.pixels().all(|pixel| pixel == picture.get_pixel(0, 0) && pixel.0.iter().all(|&x| x > 200)));
    }
}
