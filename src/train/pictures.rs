//! Pictures for the trainer: decoded and processed on the host's cores; the features of a frozen tower computed once
//! and kept on the device where they fit.

use std::collections::{HashMap, HashSet};

use super::events::{Event, Observer};
use crate::{
    autograd::Tape,
    data::image::{ImageProcessor, ImageSource},
    error::Result,
    gpu::Account,
    models::{
        config::LlavaConfig,
        llava::{Llava, Pictures},
        open,
    },
    ops::embedding,
    tensor::Tensor,
};

/// Features kept on the device, at most.
const MOST_FEATURE_BYTES: usize = 512 << 20;
/// Rows through the tower at once, as far as it takes whole pictures: 64 small ones, seven of 336 pixels.
const ROWS_AT_ONCE: usize = 4096;
const PICTURES_AT_ONCE: usize = 64;

#[derive(Default)]
pub struct PictureStore {
    processor: Option<ImageProcessor>,
    kept: Option<Kept>,
    /// Elements of a picture, where pictures are made up.
    made_up: Option<usize>,
}

/// Features of every picture: [pictures * N, Dv].
struct Kept {
    features: Tensor,
    places: HashMap<ImageSource, usize>,
    per_picture: usize,
}

/// The pictures of one micro-batch, still on their way.
pub enum Loaded {
    Features(Tensor),
    Pixels(Vec<Vec<f32>>),
}

impl Loaded {
    /// As the model takes them; `views` borrows the pixels.
    pub fn as_pictures<'a>(&self, views: &'a [&'a [f32]]) -> Pictures<'a> {
        match self {
            Self::Features(features) => Pictures::Features(features.clone()),
            Self::Pixels(_) => Pictures::Pixels(views),
        }
    }

    pub fn views(&self) -> Vec<&[f32]> {
        match self {
            Self::Features(_) => Vec::new(),
            Self::Pixels(pixels) => pixels.iter().map(Vec::as_slice).collect(),
        }
    }
}

impl PictureStore {
    /// One store for each of `models`, which are the same on different devices. With `frozen`, computes the features of
    /// `images` once, if they fit: those of the whole stage, of which `left` are still to come. A run that goes on puts
    /// the same pictures through the tower together as one that never stopped, because kernels, and with them the last
    /// bits, follow from how many there are; for the same reason devices take turns with what goes together.
    ///
    /// # Errors
    /// A picture that cannot be read; whatever fails on a device.
    pub fn of_all(
        models: &[&Llava],
        processor: Option<&ImageProcessor>,
        images: &[ImageSource],
        left: &[ImageSource],
        frozen: bool,
        observer: &mut dyn Observer,
    ) -> Result<Vec<Self>> {
        let empty = || Self { processor: processor.cloned(), kept: None, made_up: None };
        let mut stores: Vec<Self> = models.iter().map(|_| empty()).collect();
        let Some(llava) = models[0].config.llava().filter(|_| frozen && !images.is_empty()) else { return Ok(stores) };
        let mut seen = HashSet::new();
        let unique: Vec<ImageSource> = images.iter().filter(|image| seen.insert(*image)).cloned().collect();
        let left: HashSet<&ImageSource> = left.iter().collect();
        let (per_picture, width) = (llava.image_seq_length(), llava.vision_config.hidden_size);
        let rooms: Option<Vec<Tensor>> = models.iter().map(|model| room(model, llava, unique.len())).collect();
        let Some(rooms) = rooms else {
            observer.event(Event::Note(&format!(
                "features of {} pictures would take more than {} MiB: the tower runs again for every step",
                unique.len(),
                MOST_FEATURE_BYTES >> 20
            )));
            return Ok(stores);
        };
        let at_once = at_once(llava);
        let chunks: Vec<(usize, &[ImageSource])> = unique
            .chunks(at_once)
            .enumerate()
            .filter(|(_, chunk)| chunk.iter().any(|image| left.contains(image)))
            .collect();
        let total = chunks.iter().map(|(_, chunk)| chunk.len()).sum();
        let mut places = HashMap::new();
        for turn in chunks.chunks(models.len()) {
            let mut computed = Vec::new();
            for ((_, chunk), model) in turn.iter().zip(models) {
                let pixels = stores[0].pixels(chunk)?;
                let views: Vec<&[f32]> = pixels.iter().map(Vec::as_slice).collect();
                let mut tape = Tape::silent();
                computed.push(model.features(&mut model.inference(&mut tape), &views)?.value);
            }
            for (computed, &(number, chunk)) in computed.iter().zip(turn) {
                let first = number * at_once * per_picture;
                share(computed, first, &rooms)?;
                places.extend(chunk.iter().cloned().zip(number * at_once..));
            }
            observer.event(Event::Progress { what: "picture features", done: places.len(), total });
        }
        for model in models {
            model.gpu().sync()?;
            // What the tower needed on the way.
            model.gpu().trim();
        }
        if places.is_empty() {
            return Ok(stores);
        }
        observer.event(Event::Note(&format!(
            "computed once: the frozen tower's features of {} pictures ({per_picture} x {width} each)",
            places.len()
        )));
        for (store, features) in stores.iter_mut().zip(rooms) {
            store.kept = Some(Kept { features, places: places.clone(), per_picture });
        }
        Ok(stores)
    }

    /// As [`PictureStore::of_all`] for `count` different pictures that are in no file, all of them black.
    ///
    /// # Errors
    /// Whatever fails on the device.
    pub fn made_up(model: &Llava, count: usize, frozen: bool) -> Result<Self> {
        let mut store = Self { processor: None, kept: None, made_up: None };
        let Some(llava) = model.config.llava() else { return Ok(store) };
        let vision = &llava.vision_config;
        let elements = vision.num_channels * vision.image_size * vision.image_size;
        store.made_up = Some(elements);
        let Some(features) = (frozen && count > 0).then(|| room(model, llava, count)).flatten() else {
            return Ok(store);
        };
        let pixels = vec![0.0; elements];
        let views = vec![pixels.as_slice(); at_once(llava).min(count)];
        let mut tape = Tape::silent();
        let computed = model.features(&mut model.inference(&mut tape), &views)?;
        features.copy_rows(0, &computed.value, 0, computed.value.rows());
        model.gpu().sync()?;
        model.gpu().trim();
        store.kept = Some(Kept { features, places: HashMap::new(), per_picture: llava.image_seq_length() });
        Ok(store)
    }

    /// Decodes and processes pictures, each to [C, S, S], in parallel.
    fn pixels(&self, images: &[ImageSource]) -> Result<Vec<Vec<f32>>> {
        self.processor.as_ref().map_or(Ok(Vec::new()), |processor| open::pixels(processor, images))
    }

    /// The pictures of a micro-batch, in order.
    pub fn load(&self, images: &[ImageSource]) -> Result<Loaded> {
        if let (Some(elements), None) = (self.made_up, &self.kept) {
            return Ok(Loaded::Pixels(vec![vec![0.0; elements]; images.len()]));
        }
        let place = |kept: &Kept, image| kept.places.get(image).copied().or(self.made_up.map(|_| 0));
        let places: Option<Vec<usize>> =
            self.kept.as_ref().and_then(|kept| images.iter().map(|image| place(kept, image)).collect());
        let (Some(kept), Some(places)) = (&self.kept, places) else { return Ok(Loaded::Pixels(self.pixels(images)?)) };
        let n = kept.per_picture;
        let rows: Vec<u32> = places.iter().flat_map(|place| (place * n) as u32..((place + 1) * n) as u32).collect();
        let rows = Tensor::from_u32(kept.features.gpu(), &rows, &[rows.len()]);
        Ok(Loaded::Features(embedding::gather(&kept.features, &rows)))
    }
}

/// Memory for the features of `count` pictures; none when it would be too much.
fn room(model: &Llava, llava: &LlavaConfig, count: usize) -> Option<Tensor> {
    let (rows, width) = (count.saturating_mul(llava.image_seq_length()), llava.vision_config.hidden_size);
    let fits = rows.saturating_mul(width * 4) <= MOST_FEATURE_BYTES;
    let _pictures = model.gpu().account(Account::Pictures);
    fits.then(|| Tensor::empty(model.gpu(), &[rows, width]))
}

/// Puts computed rows into every device's room, at row `first`: those of another device by way of the host.
fn share(computed: &Tensor, first: usize, rooms: &[Tensor]) -> Result<()> {
    let mut on_host = None;
    for room in rooms {
        if room.gpu().is(computed.gpu()) {
            room.copy_rows(first, computed, 0, computed.rows());
            continue;
        }
        let values = match &on_host {
            Some(values) => values,
            None => on_host.insert(computed.to_vec()?),
        };
        let arrived = Tensor::from_f32(room.gpu(), values, computed.shape());
        room.copy_rows(first, &arrived, 0, computed.rows());
    }
    Ok(())
}

/// Pictures that go through the tower together.
fn at_once(llava: &LlavaConfig) -> usize {
    (ROWS_AT_ONCE / (llava.vision_config.num_patches() + 1)).clamp(1, PICTURES_AT_ONCE)
}
