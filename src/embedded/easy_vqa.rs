//! The easy-VQA data set (Victor Zhou, MIT licence: assets/easy_vqa.LICENSE), packed by tools/base/pack_easy_vqa.py.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use super::{PREFIX, unknown};
use crate::{
    data::{
        ImageSource,
        image::decode,
        record::{Content, Record, Repairs, Turn},
    },
    error::{Error, Result},
};

static PACKED: &[u8] = include_bytes!("../../assets/easy_vqa.bin");
const FILE: &str = "easy_vqa.bin";
const MAGIC: &[u8] = b"EASYVQA1";
/// Pictures in a row of a sheet, and their side in pixels.
const COLUMNS: usize = 16;
const SIDE: usize = 64;

const DATA_SETS: [&str; 2] = ["easy-vqa-captions", "easy-vqa-questions"];
const COLOURS: [&str; 8] = ["black", "blue", "brown", "gray", "green", "red", "teal", "yellow"];
const SHAPES: [&str; 3] = ["circle", "rectangle", "triangle"];

pub struct EasyVqa {
    pub train: Split,
    pub test: Split,
    /// The 13 answers, as the data set orders them.
    pub answers: Vec<String>,
}

/// Pictures of 64x64 and the questions about them.
pub struct Split {
    pub images: Vec<ImageSource>,
    /// In the data set's order.
    pub questions: Vec<Question>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Index of its picture.
    pub image: usize,
    pub text: Arc<str>,
    pub answer: Arc<str>,
}

/// Unpacks the data set: 4,000 + 1,000 pictures, 38,575 + 9,673 questions.
pub fn easy_vqa() -> Result<EasyVqa> {
    let mut reader = Reader { left: PACKED };
    if reader.take(MAGIC.len())? != MAGIC {
        return Err(damaged());
    }
    let (answers, sentences) = (reader.strings()?, reader.strings()?);
    let train = reader.split("train", &sentences, &answers)?;
    let test = reader.split("test", &sentences, &answers)?;
    let answers = answers.iter().map(|answer| answer.to_string()).collect();
    Ok(EasyVqa { train, test, answers })
}

fn damaged() -> Error {
    Error::data(format!("the embedded {FILE} is damaged")).hint("build the program again, from a whole copy")
}

struct Reader {
    left: &'static [u8],
}

impl Reader {
    fn take(&mut self, count: usize) -> Result<&'static [u8]> {
        let (taken, left) = self.left.split_at_checked(count).ok_or_else(damaged)?;
        self.left = left;
        Ok(taken)
    }

    fn u32(&mut self) -> Result<usize> {
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize)
    }

    fn strings(&mut self) -> Result<Vec<Arc<str>>> {
        let count = self.u32()?;
        let string = |_| {
            let length = usize::from(self.take(1)?[0]);
            std::str::from_utf8(self.take(length)?).map(Arc::from).map_err(|_| damaged())
        };
        (0..count).map(string).collect()
    }

    fn split(&mut self, name: &str, sentences: &[Arc<str>], answers: &[Arc<str>]) -> Result<Split> {
        let (pictures, questions, length) = (self.u32()?, self.u32()?, self.u32()?);
        let sheet = decode(self.take(length)?, FILE)?;
        let (width, height) = (sheet.width() as usize, sheet.height() as usize);
        if width != COLUMNS * SIDE || height < pictures.div_ceil(COLUMNS) * SIDE {
            return Err(damaged());
        }
        let picture = |index: usize| {
            let (left, top) = (index % COLUMNS * SIDE, index / COLUMNS * SIDE);
            let row = |y: usize| &sheet.as_raw()[((top + y) * width + left) * 3..][..SIDE * 3];
            let rgb: Vec<u8> = (0..SIDE).flat_map(|y| row(y).iter().copied()).collect();
            let name = format!("easy-vqa/{name}/{index}.png");
            ImageSource::Memory { name, width: SIDE as u32, height: SIDE as u32, rgb: rgb.into() }
        };
        let question = |entry: &[u8]| {
            let image = usize::from(u16::from_le_bytes([entry[0], entry[1]]));
            let (text, answer) = (sentences.get(usize::from(entry[2])), answers.get(usize::from(entry[3])));
            match (text, answer) {
                (Some(text), Some(answer)) if image < pictures => {
                    Ok(Question { image, text: text.clone(), answer: answer.clone() })
                }
                _ => Err(damaged()),
            }
        };
        let questions = self.take(questions * 4)?.chunks_exact(4).map(question).collect::<Result<_>>()?;
        Ok(Split { images: (0..pictures).map(picture).collect(), questions })
    }
}

/// The records of an embedded data set, made of the training split; `embedded:` may stand before its name.
///
/// `easy-vqa-questions`: every question, one turn each. `easy-vqa-captions`: `a COLOUR SHAPE` for each picture whose
/// colour and shape follow from its training answers.
///
/// # Errors
/// `Usage`: there is none of that name.
pub fn records(name: &str) -> Result<Vec<Record>> {
    match name.strip_prefix(PREFIX).unwrap_or(name) {
        "easy-vqa-captions" => Ok(captions(&easy_vqa()?.train)),
        "easy-vqa-questions" => Ok(questions(&easy_vqa()?.train)),
        _ => Err(unknown("data set", name, &DATA_SETS)),
    }
}

fn record(id: String, image: &ImageSource, question: &str, answer: &str) -> Record {
    let turns = vec![Turn::human(question, 1), Turn::assistant(answer)];
    let images = vec![image.clone()];
    Record { id, system: None, content: Content::Conversation(turns), images, repairs: Repairs::default() }
}

fn questions(split: &Split) -> Vec<Record> {
    let of = |(number, question): (usize, &Question)| {
        let id = format!("easy-vqa-{}", number + 1);
        record(id, &split.images[question.image], &question.text, &question.answer)
    };
    split.questions.iter().enumerate().map(of).collect()
}

fn captions(split: &Split) -> Vec<Record> {
    let mut known: BTreeMap<usize, [Option<&str>; 2]> = BTreeMap::new();
    for question in &split.questions {
        let [colour, shape] = known.entry(question.image).or_default();
        for word in true_words(question) {
            *colour = COLOURS.into_iter().find(|colour| *colour == word).or(*colour);
            *shape = SHAPES.into_iter().find(|shape| *shape == word).or(*shape);
        }
    }
    let caption = |(image, known): (usize, [Option<&str>; 2])| {
        let [Some(colour), Some(shape)] = known else { return None };
        let source = &split.images[image];
        let id = Path::new(&source.name()).with_extension("").display().to_string();
        Some(record(id, source, "Describe the image.", &format!("a {colour} {shape}")))
    };
    known.into_iter().filter_map(caption).collect()
}

/// The words of a question that its answer makes true of the picture, and the answer itself.
fn true_words(question: &Question) -> Vec<&str> {
    let words = || question.text.split(|c: char| !c.is_ascii_alphabetic());
    let negated = words().any(|word| word == "no" || word == "not");
    match &*question.answer {
        "yes" | "no" if (&*question.answer == "no") != negated => Vec::new(),
        "yes" | "no" => words().collect(),
        answer => words().chain([answer]).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_set_is_whole() {
        let data = easy_vqa().unwrap();
        assert_eq!((data.train.images.len(), data.train.questions.len()), (4000, 38_575));
        assert_eq!((data.test.images.len(), data.test.questions.len()), (1000, 9673));
        assert_eq!(data.answers.len(), 13);
        assert!(data.test.images.iter().all(|image| image.load().unwrap().dimensions() == (64, 64)));
    }

    #[test]
    fn captions_follow_from_answers() {
        let question = |text: &str, answer: &str| Question { image: 0, text: text.into(), answer: answer.into() };
        let words = |text, answer| true_words(&question(text, answer)).join(" ");
        assert!(words("is there a red shape?", "yes").contains("red"));
        assert!(words("is no red shape present?", "no").contains("red"));
        assert!(
            words("what color is the circle?", "teal").contains("circle")
                && !words("is a circle present?", "no").contains("circle")
        );
        assert!(!words("is there not a circle?", "yes").contains("circle"));

        let captions = records("easy-vqa-captions").unwrap();
        assert!((3000..=4000).contains(&captions.len()), "{}", captions.len());
        assert_eq!(records("embedded:easy-vqa-questions").unwrap().len(), 38_575);
        assert!(records("embedded:easy-vqa").is_err());
    }
}
