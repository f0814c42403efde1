//! LLaVA: pictures through the tower and the projector, spliced among word embeddings, through the decoder.
//! A plain LLaMA is the same without the first two.

use super::{
    batch::PackedBatch,
    clip::ClipVision,
    config::ModelConfig,
    llama::Llama,
    loading::{Loader, Loading},
    names,
    placement::Placement,
    projector::Projector,
    streaming::Arriving,
};
use crate::{
    autograd::{Checkpoints, Tape, Var, functions},
    error::{Error, Result},
    formats::{HostTensor, model_folder::ModelFolder},
    gpu::Gpu,
    nn::{Forward, Parameters},
    ops::patch_embed,
    tensor::Tensor,
};

pub struct Llava {
    pub config: ModelConfig,
    pub parameters: Parameters,
    pub language: Llama,
    pub vision: Option<ClipVision>,
    pub projector: Option<Projector>,
    placement: Placement,
}

/// What a batch's pictures are given as.
pub enum Pictures<'a> {
    /// Selected features of the tower, computed before: [pictures * N, Dv].
    Features(Tensor),
    /// Processed pixels [C, S, S] of each picture.
    Pixels(&'a [&'a [f32]]),
}

impl Llava {
    /// Reads a complete model to the device, as its checkpoint has it.
    pub fn load(gpu: &Gpu, folder: &ModelFolder) -> Result<Self> {
        let complete = &mut |name: &str, _: &[usize]| Err(Error::data(format!("{} lacks {name}", folder.name())));
        let progress = &mut |_, _| ();
        let mut loading = Loading::of_frozen(None, progress);
        Self::load_with(gpu, folder, folder.config().clone(), false, complete, &mut loading)
    }

    /// Reads a model's tensors to where they belong, under `config`, which may differ from the folder's in its projector.
    /// Where the folder has no projector, or `replace` says so, its tensors come from `projector` by canonical name
    /// and shape.
    pub fn load_with(
        placement: impl Into<Placement>,
        folder: &ModelFolder,
        config: ModelConfig,
        replace: bool,
        projector: &mut dyn FnMut(&str, &[usize]) -> Result<HostTensor>,
        loading: &mut Loading<'_>,
    ) -> Result<Self> {
        let (placement, mut parameters) = (placement.into(), Parameters::default());
        let shapes = config.llava().map(names::projector_tensors).unwrap_or_default();
        let wanted = names::expected_tensors(&config).into_iter().map(|(name, _)| name);
        let wanted = wanted.filter(|name| !(replace && name.starts_with(names::PROJECTOR)));
        let mut arriving = loading.resting.map(Arriving::new);
        let mut loader = Loader::new(&placement, folder, wanted, loading)?;
        let mut load = |name: &str| {
            let tensor = match shapes.iter().find(|(known, _)| known == name) {
                Some((_, shape)) if replace || !folder.has(name) => loader.fresh(name, &projector(name, shape)?),
                _ => match &mut arriving {
                    Some(arriving) => arriving.take(name, loader.trains(name), || loader.stored(name))?,
                    None => loader.stored(name)?,
                },
            };
            Ok(parameters.insert(name, tensor))
        };
        let mut language = Llama::new(config.text(), &mut load)?;
        let (mut vision, mut part) = (None, None);
        if let Some(llava) = config.llava() {
            let select = llava.vision_feature_select_strategy;
            vision = Some(ClipVision::new(&llava.vision_config, llava.vision_layers_used(), select, &mut load)?);
            part = Some(Projector::new(llava, &mut load)?);
        }
        language.set_streaming(arriving.map(Arriving::finish));
        Ok(Self { parameters, language, vision, projector: part, placement, config })
    }

    /// What the layers of decoder and tower keep for their backward from now on.
    pub fn set_checkpoints(&mut self, checkpoints: Checkpoints) {
        self.language.set_checkpoints(checkpoints);
        if let Some(vision) = &mut self.vision {
            vision.set_checkpoints(checkpoints);
        }
    }

    /// A parameter's values, wherever they are; none where there is no such parameter.
    ///
    /// # Errors
    /// Whatever has failed on the device so far.
    pub fn values(&self, name: &str) -> Result<Option<Vec<f32>>> {
        let Some(id) = self.parameters.find(name) else { return Ok(None) };
        let value = &self.parameters.get(id).value;
        match self.language.streaming().and_then(|streaming| streaming.trained(name)) {
            Some(at_rest) => Ok(Some(value.dtype().widen(&at_rest.read(0..value.len())))),
            None => value.to_vec().map(Some),
        }
    }

    /// Bytes of the layers that take turns on the device, all of them; 0 where none do.
    pub fn streamed_bytes(&self) -> u64 {
        self.language.streaming().map_or(0, |streaming| streaming.bytes())
    }

    /// The device that has the model, or its beginning.
    pub fn gpu(&self) -> &Gpu {
        &self.gpus()[0]
    }

    /// The devices that have the decoder's layers, in order.
    pub fn gpus(&self) -> &[Gpu] {
        self.placement.gpus()
    }

    /// The device that has the output head.
    pub fn head_gpu(&self) -> &Gpu {
        self.language.head_gpu(&self.parameters)
    }

    /// Makes a second copy of embeddings that are the head too beside the last layers, where these are on another
    /// device. For embeddings that stay as they are.
    pub fn copy_head(&mut self) {
        let last = &self.gpus()[self.gpus().len() - 1];
        let embeddings = &self.parameters.get(self.language.lm_head()).value;
        if !embeddings.gpu().is(last) {
            let copy = embeddings.offload().restore_on(last);
            self.language.set_head_copy(copy);
        }
    }

    /// Rows that a picture takes in the sequence; 0 for a plain LLaMA.
    pub fn image_tokens(&self) -> usize {
        self.config.llava().map_or(0, |llava| llava.image_seq_length())
    }

    /// A pass that records nothing, for inference.
    pub fn inference<'a>(&'a self, tape: &'a mut Tape) -> Forward<'a> {
        Forward { tape, parameters: &self.parameters, dropout: None, before: None }
    }

    /// The tower's features [pictures * N, Dv] of processed pixels.
    pub fn features(&self, forward: &mut Forward<'_>, pictures: &[&[f32]]) -> Result<Var> {
        let (Some(vision), Some(llava)) = (&self.vision, self.config.llava()) else {
            return Err(Error::usage("this model has no vision tower").hint("leave the pictures out, or use a LLaVA"));
        };
        let clip = &llava.vision_config;
        let mut patches = Vec::new();
        for pixels in pictures {
            patches.extend(patch_embed::patchify(pixels, clip.image_size, clip.patch_size));
        }
        let width = clip.num_channels * clip.patch_size * clip.patch_size;
        let patches = Tensor::from_f32(self.gpu(), &patches, &[patches.len() / width, width]);
        Ok(vision.forward(forward, &patches))
    }

    /// Word embeddings [T, D] of a batch with its pictures in their places.
    pub fn embed(&self, forward: &mut Forward<'_>, batch: &PackedBatch, pictures: Pictures<'_>) -> Result<Var> {
        let words = self.language.embed(forward, &batch.ids);
        if batch.images == 0 {
            return Ok(words);
        }
        let features = match pictures {
            Pictures::Features(features) => forward.tape.constant(features),
            Pictures::Pixels(pixels) => self.features(forward, pixels)?,
        };
        let Some(projector) = &self.projector else {
            return Err(Error::usage("this model has no projector for pictures").hint("use a LLaVA"));
        };
        let projected = projector.forward(forward, &features);
        let rows = Tensor::from_u32(self.gpu(), &batch.image_rows, &[batch.image_rows.len()]);
        Ok(functions::place_rows(forward.tape, &words, &rows, &projected))
    }

    /// The token losses of a batch, in nats, in the order of its targets; their gradient times `scale` is on the
    /// tape. `None` when nothing is supervised.
    pub fn losses(
        &self,
        forward: &mut Forward<'_>,
        batch: &PackedBatch,
        pictures: Pictures<'_>,
        scale: f32,
    ) -> Result<Option<Var>> {
        if batch.targets.is_empty() {
            return Ok(None);
        }
        let embeddings = self.embed(forward, batch, pictures)?;
        let hidden = self.language.forward(forward, embeddings, &|gpu| self.language.packed(gpu, &batch.lengths));
        let rows = Tensor::from_u32(hidden.value.gpu(), &batch.predicting_rows, &[batch.predicting_rows.len()]);
        let picked = functions::pick_rows(forward.tape, &hidden, &rows);
        drop(hidden);
        let head = self.language.head(forward.parameters);
        let picked = functions::to_device(forward.tape, picked, head.value.gpu());
        Ok(Some(functions::head_loss(forward.tape, &picked, &head, &batch.targets, scale)))
    }

    /// The token losses of a batch without gradients, read back.
    pub fn score(&self, batch: &PackedBatch, pictures: Pictures<'_>) -> Result<Vec<f32>> {
        let mut tape = Tape::silent();
        let mut forward = Forward { tape: &mut tape, parameters: &self.parameters, dropout: None, before: None };
        self.losses(&mut forward, batch, pictures, 1.0)?.map_or(Ok(Vec::new()), |losses| losses.value.to_vec())
    }
}
