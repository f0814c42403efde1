//! The micro-batches that an estimate runs: those of the stage's own first steps, and its largest ones.

use std::collections::HashSet;

use super::super::{config::StageConfig, start::Prepared, team::Shares, trainer};
use crate::{
    data::{ImageSource, Sample, dataset::Dataset, sampler::Plan},
    error::Result,
    models::{
        batch::PackedBatch,
        config::{LlavaConfig, ModelConfig},
    },
    train::events::Silent,
};

/// Steps that are run as they come: enough for the pool of buffers to have met what it will meet.
const FIRST_STEPS: u64 = 48;
/// Steps that are looked at for the largest ones.
const LOOKED_AT: u64 = 4096;
/// Positions of a sequence where neither data nor config says.
const POSITIONS: usize = 2048;

/// A micro-batch's size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    pub sequences: usize,
    /// Positions, text and pictures.
    pub tokens: usize,
    /// Supervised ones.
    pub targets: usize,
    pub pictures: usize,
    /// Whether it is the data's; else it is made up: sequences of `model_max_length`, or 2048, with a picture each where
    /// the model sees.
    pub from_data: bool,
}

impl Batch {
    fn of(batch: &PackedBatch, from_data: bool) -> Self {
        Self {
            sequences: batch.lengths.len(),
            tokens: batch.tokens(),
            targets: batch.targets.len(),
            pictures: batch.images,
            from_data,
        }
    }
}

/// Steps to run on one device.
pub struct Steps {
    /// Of each the device's own micro-batches.
    pub steps: Vec<Vec<PackedBatch>>,
    /// The one with most positions.
    pub largest: Batch,
    /// Different pictures that the stage shows, where their features may be kept.
    pub pictures: usize,
}

impl Steps {
    /// Those of the stage's data on so many devices where model and data are here, else one made up.
    ///
    /// # Errors
    /// What is wrong with the data.
    pub fn of(stage: &StageConfig, prepared: &Prepared, model_found: bool, devices: usize) -> Result<Self> {
        if !(model_found && stage.data_path.iter().all(|entry| entry.path.is_here())) {
            return Ok(Self::made_up(stage, prepared.config()));
        }
        let dataset = prepared.dataset(stage, &mut Silent)?;
        let ranks = stage.ranks(devices);
        let plan = trainer::plan(stage, &dataset, ranks)?;
        let shown = trainer::used_images(&dataset, &plan, 0, stage.unfreeze_mm_vision_tower)?;
        Self::of_data(prepared.config(), &dataset, &plan, &shown, ranks)
    }

    /// The plan's first steps, and those with most positions and most supervised ones, as one of so many `ranks` meets them:
    /// the one with most positions, or with most supervised ones. `shown` are the pictures of all steps, whose features may
    /// be kept.
    pub fn of_data(
        config: &ModelConfig,
        dataset: &Dataset,
        plan: &Plan,
        shown: &[ImageSource],
        ranks: usize,
    ) -> Result<Self> {
        let image_tokens = config.llava().map_or(0, LlavaConfig::image_seq_length);
        let step = |number: u64| -> Result<Vec<PackedBatch>> {
            plan.step(number)
                .iter()
                .map(|indices| {
                    let samples =
                        indices.iter().map(|&index| dataset.sample(index)).collect::<Result<Vec<Sample>>>()?;
                    Ok(PackedBatch::new(&samples, image_tokens))
                })
                .collect()
        };
        let sizes: [fn(&PackedBatch) -> usize; 2] = [PackedBatch::tokens, |batch| batch.targets.len()];
        let (mut steps, mut most) = (Vec::new(), [(0, 0); 2]);
        for number in 0..plan.total_steps().min(LOOKED_AT) {
            let batches = step(number)?;
            for (size, most) in sizes.iter().zip(&mut most) {
                *most = (*most).max((batches.iter().map(size).max().unwrap_or(0), number));
            }
            if number < FIRST_STEPS {
                steps.push(batches);
            }
        }
        let shares = Shares::new(vec![String::new(); ranks]);
        let own = |batches: Vec<PackedBatch>, rank| -> Vec<_> {
            let dealt = shares.deal(batches.len());
            dealt.into_iter().zip(batches).filter(|(of, _)| *of == rank).map(|(_, batch)| batch).collect()
        };
        let mut largest = Vec::new();
        for (size, (most, number)) in sizes.iter().zip(most) {
            let batches = step(number)?;
            let at = batches.iter().position(|batch| size(batch) == most);
            let rank = at.map_or(0, |at| shares.deal(batches.len())[at]);
            largest.push((rank, own(batches, rank)));
        }
        let rank = largest[0].0;
        let steps = steps.into_iter().map(|batches| own(batches, rank));
        let steps: Vec<_> =
            steps.chain(largest.into_iter().map(|(_, own)| own)).filter(|own| !own.is_empty()).collect();
        let largest = steps.iter().flatten().max_by_key(|batch| batch.tokens());
        let largest = largest.map(|batch| Batch::of(batch, true)).unwrap_or_default();
        let pictures: HashSet<&ImageSource> = shown.iter().collect();
        Ok(Self { steps, largest, pictures: pictures.len() })
    }

    fn made_up(stage: &StageConfig, config: &ModelConfig) -> Self {
        let length = stage.model_max_length.unwrap_or(POSITIONS).min(config.text().positions());
        Self::of_length(stage.per_device_train_batch_size, length, config)
    }

    /// A step of one micro-batch: `sequences` of `length` positions, each with a picture first where the model sees,
    /// and all text supervised.
    pub fn of_length(sequences: usize, length: usize, config: &ModelConfig) -> Self {
        let image_tokens = config.llava().map_or(0, LlavaConfig::image_seq_length);
        let pictures = usize::from(image_tokens > 0 && image_tokens < length);
        let words = length - pictures * image_tokens;
        let mut batch = PackedBatch::default();
        for _ in 0..sequences {
            let mut tokens = vec![crate::data::IMAGE_TOKEN_INDEX; pictures];
            tokens.extend((0..words as i32).map(|word| word % config.text().vocab_size.max(1) as i32));
            let mut labels = tokens.clone();
            labels[..pictures].fill(crate::data::IGNORE_INDEX);
            batch.push(&tokens, &labels, image_tokens);
        }
        // Real data shows every picture anew: far more than can be kept.
        Self { largest: Batch::of(&batch, false), steps: vec![vec![batch]; 2], pictures: usize::MAX }
    }
}
