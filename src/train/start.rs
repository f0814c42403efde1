//! What a stage starts from: the model on the device, its tokenizer, pictures' processor and data.

use std::{collections::BTreeSet, path::PathBuf, sync::Arc};

use super::{
    config::{
        DataEntry, DataSource, ImageAspectRatio, Method, Precision, ProjectorType as WantedProjector, SelectFeature,
        Source, StageConfig,
    },
    events::{Event, Observer},
    trainable,
};
use crate::{
    data::{
        dataset::{self, Dataset, counted},
        image::ImageProcessor,
        sample::Encoder,
    },
    embedded,
    error::{Error, Result},
    formats::{
        HostTensor,
        model_folder::{ModelFolder, Tower},
        peft::Adapter,
        weights::Weights,
    },
    gpu::{Account, Gpu},
    models::{
        adapter,
        config::{FeatureSelect, LlavaConfig, ModelConfig, ProjectorType},
        dora,
        llava::Llava,
        loading::Loading,
        names, open,
        placement::Placement,
        streaming::Resting,
    },
};

/// A projector alone, as the original authors' stage 1 leaves it.
const ORIGINAL_PROJECTOR: &str = "mm_projector.bin";

/// What the stage before produced.
#[derive(Clone, Debug)]
pub struct Origin {
    pub model: Source,
    pub adapter: Option<PathBuf>,
}

/// All of a start that needs no device: files opened and checked, weights not read yet.
pub struct Prepared {
    pub folder: Arc<ModelFolder>,
    /// The folder's, with the stage's wishes.
    config: ModelConfig,
    /// Of `pretrain_mm_mlp_adapter`.
    pub(super) projector: Option<Weights>,
    /// The stage's own, or what the stage before left.
    pub(super) adapter: Option<Adapter>,
}

/// A model ready to be trained.
pub struct Start {
    pub model: Llava,
    pub folder: Arc<ModelFolder>,
    /// Rank, alpha and so on of the adapter that trains, under method `lora`.
    pub adapter: Option<Adapter>,
    /// Canonical names of tensors that are not as the folder has them, before anything has trained.
    pub changed: BTreeSet<String>,
}

/// Opens the folder of a model, or an embedded one.
pub fn open_folder(source: &Source) -> Result<ModelFolder> {
    match source {
        Source::Embedded(name) => embedded::model(name),
        Source::Local(path) => ModelFolder::open_base(path),
        Source::Hub(name) => Err(open::no_folder(name)),
    }
}

/// The model of a stage, for pictures of the size that the stage wants: with `vision_tower`, which makes a LLaVA out of
/// a LLaMA, or tells where the tower of a model in the original authors' layout is. A LLaVA gets a token for pictures
/// where it has none, so that what is written is one for transformers.
///
/// A new projector has the type of the `given` one, where nobody says.
fn open_seeing(model: &Source, stage: &StageConfig, given: Option<&Weights>) -> Result<ModelFolder> {
    let Some(tower) = &stage.vision_tower else {
        return open::sized(open_folder(model)?.with_image_token(stage.seed)?, stage.image_size);
    };
    let Source::Local(tower) = tower else {
        return Err(Error::usage(format!("vision_tower: there is no folder {tower}"))
            .hint("name the folder of a CLIP vision model"));
    };
    let folder = match model {
        Source::Local(path) => ModelFolder::open_with_tower(path, Some(tower))?,
        other => open_folder(other)?,
    };
    let folder = match (folder.config(), folder.is_original()) {
        (ModelConfig::Llava(_), true) => folder.with_image_token(stage.seed)?,
        _ => {
            let projector = match (stage.mm_projector_type, given) {
                (Some(wanted), _) => projector_type(wanted),
                (None, Some(given)) => type_of(given)?,
                (None, None) => ProjectorType::Linear,
            };
            folder.joined(Tower::open(tower)?, projector, stage.seed)?
        }
    };
    open::sized(folder, stage.image_size)
}

pub(super) fn projector_type(wanted: WantedProjector) -> ProjectorType {
    match wanted {
        WantedProjector::Linear => ProjectorType::Linear,
        WantedProjector::Mlp2xGelu => ProjectorType::Mlp2xGelu,
    }
}

impl Prepared {
    /// Opens what the stage trains: its own model, or what the stage before left.
    ///
    /// # Errors
    /// `Data` or `Usage`: a file that is missing or wrong, a wish that the model cannot fulfil.
    pub fn open(stage: &StageConfig, before: Option<&Origin>) -> Result<Self> {
        let origin = match (&stage.model_name_or_path, before) {
            (Some(model), _) => Origin { model: model.clone(), adapter: None },
            (None, Some(before)) => before.clone(),
            (None, None) => return Err(Error::usage("model_name_or_path is required in the first stage")),
        };
        let projector = stage.pretrain_mm_mlp_adapter.as_ref().map(open_projector).transpose()?;
        let folder = open_seeing(&origin.model, stage, projector.as_ref())?;
        let config = folder.config().clone();
        let keeps = folder.has_projector() && projector.is_none();
        Self::with(stage, folder, config, projector, keeps, origin.adapter)
    }

    /// What a stage would find that goes on from where another one ends, as far as that can be told before it has run.
    ///
    /// # Errors
    /// As [`Prepared::open`].
    pub fn after(stage: &StageConfig, before: Self) -> Result<Self> {
        let projector = stage.pretrain_mm_mlp_adapter.as_ref().map(open_projector).transpose()?;
        let used = || Error::failed("the model of the stage before is still in use");
        let folder = open::sized(Arc::into_inner(before.folder).ok_or_else(used)?, stage.image_size)?;
        let mut config = before.config;
        if let (ModelConfig::Llava(config), Some(llava)) = (&mut config, folder.config().llava()) {
            config.vision_config = llava.vision_config.clone();
        }
        let keeps = projector.is_none();
        Self::with(stage, folder, config, projector, keeps, None)
    }

    /// `keeps`: the model brings the projector that will be used; `adapter` is what the stage before left.
    fn with(
        stage: &StageConfig,
        folder: ModelFolder,
        mut config: ModelConfig,
        projector: Option<Weights>,
        keeps: bool,
        adapter: Option<PathBuf>,
    ) -> Result<Self> {
        if let ModelConfig::Llava(llava) = &mut config {
            adjust(llava, stage, keeps)?;
            if let Some(given) = &projector {
                check_projector_type(llava.projector, given)?;
            }
        }
        if stage.quantization.is_some_and(|wanted| wanted.lm_head) && config.text().tie_word_embeddings {
            return Err(Error::usage("quantize_lm_head: the model's head is its embeddings, which stay as they are")
                .hint("leave quantize_lm_head out"));
        }
        if stage.method.trains_adapter() {
            trainable::check_targets(stage, &config)?;
        }
        if stage.method.trains_adapter() {
            check_adapter_suffices(stage, &folder, &config)?;
        }
        let named_adapter = match &stage.adapter_name_or_path {
            Some(Source::Local(path)) => Some(path.clone()),
            Some(other) => return Err(Error::usage(format!("adapter_name_or_path: there is no folder {other}"))),
            None => adapter,
        };
        let mut adapter = named_adapter.map(|path| Adapter::read(&path, &config)).transpose()?;
        if let Some(what) =
            adapter.as_ref().filter(|_| stage.method.trains_adapter()).and_then(|a| a.beyond_training(&config))
        {
            return Err(Error::usage(format!(
                "the adapter to start from has {what}, which is not built yet for training"
            ))
            .hint("merge it into its model first, and train a new adapter on that"));
        }
        if let Some(adapter) = adapter.as_mut().filter(|_| stage.method.trains_adapter()) {
            trainable::settle(stage, adapter, &config)?;
        }
        Ok(Self { folder: Arc::new(folder), config, projector, adapter })
    }

    /// A model whose folder is open already.
    ///
    /// # Errors
    /// As [`Prepared::open`].
    pub fn of(stage: &StageConfig, folder: ModelFolder) -> Result<Self> {
        let (config, keeps) = (folder.config().clone(), folder.has_projector());
        Self::with(stage, folder, config, None, keeps, None)
    }

    /// The model's config with the stage's wishes.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Refuses layers that cannot be spread over so many devices.
    ///
    /// # Errors
    /// `Usage`: one device, or more of them than layers.
    pub fn check_split(&self, stage: &StageConfig, devices: usize) -> Result<()> {
        let layers = self.config.text().num_hidden_layers;
        let (title, name) = (stage.title(), self.folder.name());
        match devices {
            _ if !stage.layer_split => Ok(()),
            0 | 1 => Err(Error::usage(format!("{title}: layer_split = true is for several devices, and there is one"))
                .hint("name them: devices = [0, 1]")
                .hint("leave layer_split out: one device has all layers")),
            _ if devices > layers => Err(Error::usage(format!(
                "{title}: layer_split = true on {devices} devices, and {name} has {layers} layers"
            ))
            .hint(format!("name at most {layers} devices"))),
            _ => Ok(()),
        }
    }

    /// How pictures are brought to the tower; none for a plain LLaMA.
    ///
    /// # Errors
    /// As [`open::processor`].
    pub fn processor(&self, stage: &StageConfig) -> Result<Option<ImageProcessor>> {
        open::processor(&self.folder, stage.image_aspect_ratio == ImageAspectRatio::Pad)
    }

    /// The stage's records, tokenised, their picture files looked for; what was cut or masked is told as notes.
    pub fn dataset(&self, stage: &StageConfig, observer: &mut dyn Observer) -> Result<Dataset> {
        let tokenizer = open::tokenizer(&self.folder)?;
        let positions = self.config.text().positions();
        let own = tokenizer.model_max_length.map_or(positions, |length| length.min(positions));
        let max_length = stage.model_max_length.unwrap_or(own);
        let encoder = Encoder {
            version: open::open_version(&stage.version, &self.folder, &tokenizer)?,
            tokenizer: Arc::new(tokenizer),
            system: None,
            image_tokens: self.config.llava().map_or(0, LlavaConfig::image_seq_length),
            max_length: Some(max_length),
        };
        let mut dataset = open_dataset(stage, encoder)?;
        let statistics = dataset.prepare(|_, _| ())?;
        for note in statistics.notes(Some(max_length)) {
            observer.event(Event::Note(&note));
        }
        statistics.check()?;
        if self.config.llava().is_none() && statistics.images > 0 {
            let message =
                format!("{} cannot see, and {} have pictures", self.folder.name(), counted(statistics.with_images));
            return Err(Error::usage(message).hint("name a LLaVA in model_name_or_path, or data without pictures"));
        }
        if stage.method == Method::Projector && statistics.images == 0 {
            return Err(Error::data("no record has a picture: there is nothing to train a projector with")
                .hint("method `projector` learns from pictures alone: look at data_path, or choose lora or full"));
        }
        dataset.check_images()?;
        Ok(dataset)
    }

    /// Brings the weights to the device, or under `layer_split` to several; what is new (projector, adapter) gets its
    /// first values. The decoder's layers go to rest in `resting`, where it is given.
    ///
    /// # Errors
    /// An adapter that does not fit; whatever fails on the device.
    pub fn load(
        &self,
        stage: &StageConfig,
        gpus: &[Gpu],
        resting: Option<&Resting>,
        observer: &mut dyn Observer,
    ) -> Result<Start> {
        let _weights: Vec<_> = gpus.iter().map(|gpu| gpu.account(Account::Weights)).collect();
        let Self { folder, config, projector: given, adapter: read } = self;
        let placement = Placement::split(gpus, config.text().num_hidden_layers);
        let named = config.clone();
        let mut projector = |name: &str, shape: &[usize]| match given {
            Some(checkpoint) => projector_tensor(checkpoint, name, shape),
            None => Ok(trainable::fresh_projector(stage.seed, &named, name, shape)),
        };
        let precision = stage.precision.map(Precision::dtype);
        let mut loading = Loading {
            precision,
            quantization: stage.quantization,
            trains: &|name| trainable::trains(stage, name).is_some(),
            // Without masters the weights are 16 bits from the start, unless an adapter is still to be folded in.
            trains_in_f32: !stage.stochastic_rounding || read.is_some(),
            resting,
            progress: &mut |done, total| observer.event(Event::loaded(done, total)),
        };
        let mut model =
            Llava::load_with(placement, folder, config.clone(), given.is_some(), &mut projector, &mut loading)?;
        let mut changed = BTreeSet::new();
        if let Some(llava) = model.config.llava().filter(|_| given.is_some() || !folder.has_projector()) {
            changed.extend(names::projector_tensors(llava).into_iter().map(|(name, _)| name));
        }
        let fresh = read.is_none();
        let adapter = match (stage.method.trains_adapter(), read) {
            (true, Some(read)) => Some(read.clone()),
            (true, None) => Some(trainable::fresh_adapter(stage, &model.config)?),
            (_, Some(read)) => {
                let parts = ["weight", "bias"];
                changed.extend(read.modules.keys().flat_map(|module| parts.map(|part| format!("{module}.{part}"))));
                changed.extend(read.saved.keys().cloned());
                changed.extend(read.unties_head.then(|| names::LM_HEAD.to_owned()));
                adapter::attach(&mut model, read, 0.0)?;
                adapter::fold(&mut model)?;
                None
            }
            (_, None) => None,
        };
        if let Some(adapter) = &adapter {
            let _trained: Vec<_> = gpus.iter().map(|gpu| gpu.account(Account::Trained)).collect();
            adapter::attach(&mut model, adapter, adapter.lora_dropout)?;
            if stage.use_dora && fresh {
                dora::start(&mut model);
            }
        }
        if trainable::trains(stage, names::EMBED_TOKENS).is_none() {
            model.copy_head();
        }
        Ok(Start { model, folder: folder.clone(), adapter, changed })
    }
}

/// Refuses what an adapter could not tell whoever loads it: it holds tensors, and no config of the model under it.
fn check_adapter_suffices(stage: &StageConfig, folder: &ModelFolder, config: &ModelConfig) -> Result<()> {
    let refuse = |key: &str| {
        Err(Error::usage(format!(
            "{key} with method lora: the adapter alone would not say so, and the base is another"
        ))
        .hint("train the projector with it first (method = \"projector\" writes a whole model), then the adapter"))
    };
    if stage.vision_tower.is_some() && !folder.is_original() {
        return refuse("vision_tower");
    }
    let (Some(base), Some(wanted)) = (folder.config().llava(), config.llava()) else { return Ok(()) };
    if (base.vision_feature_layer, base.vision_feature_select_strategy)
        != (wanted.vision_feature_layer, wanted.vision_feature_select_strategy)
    {
        return refuse("mm_vision_select_layer or mm_vision_select_feature");
    }
    match stage.image_size {
        Some(_) if folder.is_resized() => refuse("image_size"),
        _ => Ok(()),
    }
}

/// What `data_path` names: files and embedded records.
fn open_dataset(stage: &StageConfig, encoder: Encoder) -> Result<Dataset> {
    let source = |entry: &DataEntry| {
        let (path, records) = match &entry.path {
            DataSource::File(path) => (path.clone(), None),
            DataSource::Embedded(name) => (PathBuf::from(name), Some(embedded::records(name)?)),
        };
        let (image_folder, weight, limit) = (entry.image_folder.clone(), entry.weight, entry.limit);
        Ok(dataset::Source { path, image_folder, weight, limit, records })
    };
    Dataset::open(stage.data_path.iter().map(source).collect::<Result<Vec<_>>>()?, encoder, stage.seed)
}

/// Applies the stage's wishes to the model's config. `keeps`: the model brings the projector that will be used.
fn adjust(llava: &mut LlavaConfig, stage: &StageConfig, keeps: bool) -> Result<()> {
    if let Some(wanted) = stage.mm_projector_type {
        let wanted = projector_type(wanted);
        if keeps && wanted != llava.projector {
            let message = format!(
                "mm_projector_type is {}, but the model's projector is {}",
                wanted.as_str(),
                llava.projector.as_str()
            );
            return Err(Error::usage(message).hint("leave mm_projector_type out to go on with the model's projector"));
        }
        llava.projector = wanted;
    }
    if let Some(layer) = stage.mm_vision_select_layer {
        let layers = llava.vision_config.num_hidden_layers as i64;
        if !(-layers - 1..=layers).contains(&layer) {
            return Err(Error::usage(format!("mm_vision_select_layer {layer}: the tower has {layers} layers")));
        }
        llava.vision_feature_layer = layer;
    }
    match stage.mm_vision_select_feature {
        Some(SelectFeature::Patch) => llava.vision_feature_select_strategy = FeatureSelect::Default,
        Some(SelectFeature::ClsPatch) => llava.vision_feature_select_strategy = FeatureSelect::Full,
        None => {}
    }
    Ok(())
}

/// A file or a folder with a projector: of any model, or `mm_projector.bin`, which the original authors' stage 1 leaves.
fn open_projector(source: &Source) -> Result<Weights> {
    match source {
        Source::Local(path) if path.join(ORIGINAL_PROJECTOR).is_file() => Weights::open(&path.join(ORIGINAL_PROJECTOR)),
        Source::Local(path) => Weights::open(path),
        other => Err(Error::usage(format!("pretrain_mm_mlp_adapter: there is no file or folder {other}"))),
    }
}

/// The type of a projector by its tensors. A second layer that is an identity, as transformers' folders have behind a
/// single linear, is none.
fn type_of(weights: &Weights) -> Result<ProjectorType> {
    for stored in weights.names()? {
        if names::canonical(&stored) == format!("{}.linear_2.weight", names::PROJECTOR) {
            let identity = weights.require(&stored)?.to_f32()?.is_identity();
            return Ok(if identity { ProjectorType::Linear } else { ProjectorType::Mlp2xGelu });
        }
    }
    Ok(ProjectorType::Linear)
}

fn check_projector_type(wanted: ProjectorType, given: &Weights) -> Result<()> {
    let found = type_of(given)?;
    if found == wanted {
        return Ok(());
    }
    let (found, wanted) = (found.as_str(), wanted.as_str());
    Err(Error::usage(format!("pretrain_mm_mlp_adapter holds a projector of type {found}, and the model's is {wanted}"))
        .hint(format!("set mm_projector_type = \"{found}\", or name another projector")))
}

fn projector_tensor(weights: &Weights, name: &str, shape: &[usize]) -> Result<HostTensor> {
    let stored = weights.names()?.into_iter().find(|stored| names::canonical(stored) == name);
    let stored = stored.ok_or_else(|| {
        Error::data(format!("pretrain_mm_mlp_adapter holds no {name}"))
            .hint("it must have the projector's type: see mm_projector_type")
    })?;
    let tensor = weights.require(&stored)?.to_f32()?;
    if tensor.shape != shape {
        let message = format!("pretrain_mm_mlp_adapter: {name} is {:?}, the model needs {shape:?}", tensor.shape);
        return Err(Error::data(message).hint("it must come from a model with the same tower and the same width"));
    }
    Ok(tensor)
}
