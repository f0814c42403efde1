//! One stage: micro-batches through the model, gradients into arenas, AdamW, metrics, checkpoints.

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use super::{
    checkpoint::{self, TrainerState},
    config::{ImageAspectRatio, LossNorm, Method, Optim, Precision, StageConfig},
    events::{Event, Observer, StageHeader, StepMetrics},
    loss_scale::{LossScaler, LossScaling},
    metrics::{self, MetricsWriter},
    optimizer::{AdamW, Keep, Optimizer, Update, Updates},
    pictures::PictureStore,
    plot,
    run_folder::{self, FinishedStage},
    schedule::Schedule,
    start::{Origin, Prepared, Start},
    trainable,
};
use crate::{
    autograd::Tape,
    data::{
        dataset::Dataset,
        image::ImageSource,
        sample::Sample,
        sampler::{Duration, Order, Plan},
        template::Template,
    },
    error::{Error, Result},
    formats::{HostTensor, hf_write, safetensors::Dtype},
    gpu::Gpu,
    hub::id_or_path,
    models::{adapter, batch::PackedBatch, llava::Llava, names},
    nn::Forward,
    ops::{elementwise, reduce},
    tensor::Tensor,
};

/// A stage's result, for the report.
#[derive(Clone, Debug)]
pub struct StageOutcome {
    /// `DIR/<stage>/model` or `DIR/<stage>/adapter`.
    pub output: PathBuf,
    pub records: usize,
    pub steps: u64,
    pub seconds: f64,
    pub trainable_parameters: u64,
    pub total_parameters: u64,
}

impl StageOutcome {
    /// What the stage in `dir` wrote down when it was finished.
    pub fn of(dir: &Path, finished: &FinishedStage) -> Self {
        let FinishedStage { records, steps, seconds, trainable_parameters, total_parameters, .. } = *finished;
        Self { output: dir.join(&finished.output), records, steps, seconds, trainable_parameters, total_parameters }
    }
}

/// A stage, ready to step.
pub struct Trainer<'a> {
    stage: &'a StageConfig,
    start: Start,
    dataset: Dataset,
    plan: Plan,
    schedule: Schedule,
    optimizer: Optimizer,
    pictures: PictureStore,
    /// Square sum of the gradients, then one loss sum for each micro-batch.
    sums: Tensor,
    state: TrainerState,
}

/// What one optimizer step measured.
struct Measured {
    loss: f64,
    grad_norm: f64,
    target_tokens: u64,
    positions: usize,
    /// Where losses are scaled.
    loss_scale: Option<f64>,
}

impl<'a> Trainer<'a> {
    /// Loads model and data, moves what trains into the optimizer, and goes to `resume`'s step where it is given.
    pub fn new(
        stage: &'a StageConfig,
        before: Option<&Origin>,
        resume: Option<&Path>,
        gpu: &Gpu,
        observer: &mut dyn Observer,
    ) -> Result<Self> {
        // All that can be wrong with files is told before weights go to the device.
        let prepared = Prepared::open(stage, before)?;
        let dataset = prepared.dataset(stage, observer)?;
        let processor = prepared.processor(stage)?;
        let plan = plan(stage, &dataset)?;
        let total_steps = plan.total_steps();
        let mut start = prepared.load(stage, gpu, observer)?;

        let trainables = trainable::select(stage, &start.model)?;
        let settings = AdamW {
            beta1: stage.adam_beta1,
            beta2: stage.adam_beta2,
            epsilon: stage.adam_epsilon,
            max_grad_norm: stage.max_grad_norm,
            moments_8bit: stage.optim == Optim::AdamW8bit,
            keep: kept(stage),
            seed: stage.seed,
        };
        let optimizer = Optimizer::new(&mut start.model.parameters, trainables, settings);
        let loss_scaler = LossScaling::of(stage).map(|scaling| LossScaler::new(&scaling));
        let mut state = TrainerState {
            step: 0,
            updates: Updates::default(),
            total_steps,
            records: dataset.len(),
            seconds: 0.0,
            loss_scaler,
        };
        if let Some(folder) = resume {
            state = checkpoint::load(folder, &optimizer, dataset.len(), total_steps)?;
        }
        let used = used_images(&dataset, &plan, 0, stage.unfreeze_mm_vision_tower)?;
        let left = used_images(&dataset, &plan, state.step, stage.unfreeze_mm_vision_tower)?;
        let frozen = !stage.unfreeze_mm_vision_tower;
        let pictures = PictureStore::new(&start.model, processor, &used, &left, frozen, observer)?;
        let schedule = Schedule::new(stage.lr_scheduler_type, total_steps, stage.warmup_steps, stage.warmup_ratio);
        let sums = elementwise::zeros(gpu, &[1 + stage.gradient_accumulation_steps]);
        Ok(Self { stage, start, dataset, plan, schedule, optimizer, pictures, sums, state })
    }

    pub fn header(&self) -> StageHeader {
        StageHeader {
            name: self.stage.title().to_string(),
            method: self.stage.method.to_string(),
            model: self.start.folder.name().to_string(),
            records: self.dataset.len(),
            total_steps: self.state.total_steps,
            first_step: self.state.step,
            batch: self.stage.global_batch(),
            trainable_parameters: self.optimizer.elements() as u64,
            total_parameters: self.start.model.parameters.elements() as u64,
            output_dir: self.stage.output_dir.clone(),
        }
    }

    /// Trains to the end, or until `stop` is set: then the step is finished, a checkpoint saved and `Interrupted`
    /// returned.
    pub fn run(mut self, stop: &AtomicBool, observer: &mut dyn Observer) -> Result<StageOutcome> {
        let dir = &self.stage.output_dir;
        let mut writer = if self.state.step == 0 {
            MetricsWriter::create(dir)?
        } else {
            MetricsWriter::resume(dir, self.state.step)?
        };
        let total = self.state.total_steps;
        while self.state.step < total {
            let begun = Instant::now();
            let measured = self.step(observer)?;
            let seconds = begun.elapsed().as_secs_f64();
            self.state.seconds += seconds;
            self.state.step += 1;
            let step = self.state.step;
            let metrics = StepMetrics {
                step,
                epoch: self.plan.epoch_at(step),
                loss: measured.loss,
                grad_norm: measured.grad_norm,
                learning_rate: self.schedule.rate(self.stage.learning_rate, step - 1),
                target_tokens: measured.target_tokens,
                tokens_per_second: measured.positions as f64 / seconds,
                step_seconds: seconds,
                device_bytes: self.start.model.gpu().device_bytes(),
                loss_scale: measured.loss_scale,
                skipped_steps: self.state.loss_scaler.map(|scaler| scaler.skipped_steps),
            };
            if step.is_multiple_of(self.stage.logging_steps) || step == total {
                writer.write(&metrics)?;
            }
            observer.event(Event::Step(&metrics, total));
            let stopping = stop.load(Ordering::Relaxed) && step < total;
            let due = self.stage.save_steps > 0 && step.is_multiple_of(self.stage.save_steps) && step < total;
            if due || stopping {
                let saved = self.save()?;
                observer.event(Event::Saved(&saved));
            }
            if stopping {
                return Err(Error::interrupted(format!("stopped after step {step} of {total}; a checkpoint is saved")));
            }
        }
        self.finish(observer)
    }

    /// One optimizer step.
    fn step(&mut self, observer: &mut dyn Observer) -> Result<Measured> {
        let micro_batches = self.plan.step(self.state.step);
        let samples: Vec<Vec<Sample>> = micro_batches
            .iter()
            .map(|indices| indices.iter().map(|&index| self.dataset.sample(index)).collect())
            .collect::<Result<_>>()?;
        let image_tokens = self.start.model.image_tokens();
        let batches: Vec<PackedBatch> = samples.iter().map(|samples| PackedBatch::new(samples, image_tokens)).collect();
        let target_tokens: usize = batches.iter().map(|batch| batch.targets.len()).sum();

        elementwise::fill(&self.sums, 0.0);
        self.optimizer.zero_gradients();
        let loss_scale = self.state.loss_scaler.map(|scaler| f64::from(scaler.scale));
        for (index, (samples, batch)) in samples.iter().zip(&batches).enumerate() {
            let scale = loss_scale.unwrap_or(1.0);
            let scale = scale
                * match self.stage.loss_norm {
                    LossNorm::GlobalTokens => 1.0 / target_tokens.max(1) as f64,
                    LossNorm::MicroMean => 1.0 / (batch.targets.len().max(1) * batches.len()) as f64,
                };
            self.micro_batch(samples, batch, scale as f32, index)?;
        }
        self.optimizer.add_square_sum(&self.sums, 0);
        let pictures = batches.iter().any(|batch| batch.images > 0);
        let before = self.state.updates;
        self.state.updates.language += 1;
        self.state.updates.pictures += u64::from(pictures);
        let update = Update {
            factor: self.schedule.factor(self.state.step),
            updates: self.state.updates,
            pictures,
            loss_scale: loss_scale.unwrap_or(1.0),
            step: self.state.step,
        };
        self.optimizer.step(&update, &self.sums);
        let t = self.state.step + 1;

        let sums = self.sums.to_vec()?;
        let grad_norm = f64::from(sums[0]).sqrt() / update.loss_scale;
        let losses =
            sums[1..=batches.len()].iter().zip(&batches).map(|(&sum, batch)| (f64::from(sum), batch.targets.len()));
        let loss = match self.stage.loss_norm {
            LossNorm::GlobalTokens => losses.map(|(sum, _)| sum).sum::<f64>() / target_tokens.max(1) as f64,
            LossNorm::MicroMean => {
                losses.map(|(sum, count)| sum / count.max(1) as f64).sum::<f64>() / batches.len() as f64
            }
        };
        if let (Some(scaling), Some(scaler)) = (LossScaling::of(self.stage), &mut self.state.loss_scaler)
            && loss.is_finite()
        {
            if grad_norm.is_finite() {
                scaler.good(&scaling);
            } else {
                self.state.updates = before;
                let more = scaler.overflow(&scaling);
                overflowed(t, update.loss_scale, more.then_some(f64::from(scaler.scale)), observer)?;
            }
        } else if !loss.is_finite() || !grad_norm.is_finite() {
            let ids: Vec<&str> = samples.iter().flatten().take(4).map(|sample| sample.id.as_str()).collect();
            let error = Error::failed(format!("the loss became {loss} (gradient norm {grad_norm}) in step {t}"));
            let error = match self.stage.precision {
                Some(Precision::Float16) => error.hint("weights may have outgrown float16: try bfloat16"),
                _ => error,
            };
            return Err(error
                .hint(format!("lower learning_rate (now {:e}) or raise warmup_ratio", self.stage.learning_rate))
                .hint(format!("the step's first records: {}", ids.join(", ")))
                .hint("start again in another --output-dir: --resume would come to the same step"));
        }
        let positions = batches.iter().map(PackedBatch::tokens).sum();
        Ok(Measured { loss, grad_norm, target_tokens: target_tokens as u64, positions, loss_scale })
    }

    /// Forward and backward of one micro-batch; its loss goes to its slot of `sums`.
    fn micro_batch(&self, samples: &[Sample], batch: &PackedBatch, scale: f32, index: usize) -> Result<()> {
        let images: Vec<ImageSource> = samples.iter().flat_map(|sample| sample.images.iter().cloned()).collect();
        let loaded = self.pictures.load(&images)?;
        let views = loaded.views();
        let mut tape = Tape::recording();
        let pass = self.state.step * self.stage.gradient_accumulation_steps as u64 + index as u64;
        let model: &Llava = &self.start.model;
        let mut forward = Forward {
            tape: &mut tape,
            parameters: &model.parameters,
            dropout: Some((self.stage.seed as u32, pass as u32)),
        };
        if let Some(losses) = model.losses(&mut forward, batch, loaded.as_pictures(&views), scale)? {
            reduce::add_sum(&losses.value, &self.sums, 1 + index);
            tape.backward(&losses, losses.value.clone());
        }
        Ok(())
    }

    fn save(&self) -> Result<PathBuf> {
        let limit = self.stage.save_total_limit;
        checkpoint::save(&self.stage.output_dir, &self.state, &self.optimizer, limit, |folder| {
            if self.stage.method == Method::Lora { self.write_adapter(&folder.join("adapter")) } else { Ok(()) }
        })
    }

    fn write_adapter(&self, folder: &Path) -> Result<()> {
        let Some(settings) = &self.start.adapter else { return Ok(()) };
        let model = &self.start.model;
        let with_projector = model.projector.is_some() && !self.stage.freeze_mm_mlp_adapter;
        let with_projector = with_projector || !settings.saved.is_empty();
        let base = id_or_path(self.start.folder.name());
        let mut adapter = adapter::export(model, settings, with_projector)?;
        if self.stage.unfreeze_mm_vision_tower {
            adapter::save_tower(model, &self.start.folder, &mut adapter)?;
        }
        for (name, module) in &adapter.modules {
            [&module.lora_a, &module.lora_b].into_iter().try_for_each(|tensor| check_finite(name, &tensor.data))?;
        }
        adapter.saved.iter().try_for_each(|(name, tensor)| check_finite(name, &tensor.data))?;
        adapter.write(folder, &model.config, &base)
    }

    fn write_model(&self, folder: &Path) -> Result<()> {
        let model = &self.start.model;
        let shapes: std::collections::HashMap<String, Vec<usize>> =
            names::expected_tensors(&model.config).into_iter().collect();
        let source = &self.start.folder;
        let parameter = |name: &str| model.parameters.find(name).map(|id| model.parameters.get(id));
        // What has not changed is in the source, whatever dtype it has there.
        let is_changed = |name: &str| {
            parameter(name).is_some_and(|parameter| parameter.grad.is_some() || self.start.changed.contains(name))
        };
        let fetch = |name: &str| {
            let missing = || Error::failed(format!("{name} is not in the model"));
            let (value, shape) = (&parameter(name).ok_or_else(missing)?.value, shapes.get(name).ok_or_else(missing)?);
            let values = value.to_vec()?;
            check_finite(name, &values)?;
            Ok(HostTensor::new(shape.clone(), values))
        };
        // As what the model read in training: PyTorch writes a model in the type it has.
        let dtype = match (self.stage.method, self.stage.precision) {
            (Method::Full, Some(Precision::Bfloat16)) => Dtype::BF16,
            (Method::Full, Some(Precision::Float16)) => Dtype::F16,
            _ => Dtype::F32,
        };
        let changes = hf_write::Changes::of(is_changed, fetch, Some(dtype));
        let writing = hf_write::Writing {
            dtype: None,
            template: Template::named(&self.stage.version).ok(),
            pad: self.stage.image_aspect_ratio == ImageAspectRatio::Pad,
        };
        hf_write::write_model(folder, source, &model.config, changes, &writing)
    }

    /// Writes the stage's output and marks it finished.
    fn finish(self, observer: &mut dyn Observer) -> Result<StageOutcome> {
        let dir = &self.stage.output_dir;
        let what = if self.stage.method == Method::Lora { "adapter" } else { "model" };
        let output = dir.join(what);
        match self.stage.method {
            Method::Lora => self.write_adapter(&output)?,
            Method::Projector | Method::Full => self.write_model(&output)?,
        }
        let written = metrics::read(&dir.join(metrics::FILE_NAME))?;
        plot::write_loss_svg(&dir.join("loss.svg"), self.stage.title(), &written)?;
        let finished = FinishedStage {
            steps: self.state.total_steps,
            seconds: self.state.seconds,
            output: what.to_string(),
            records: self.dataset.len(),
            trainable_parameters: self.optimizer.elements() as u64,
            total_parameters: self.start.model.parameters.elements() as u64,
        };
        run_folder::mark_finished(dir, &finished)?;
        observer.event(Event::StageEnd { name: self.stage.title(), output: &output, seconds: self.state.seconds });
        Ok(StageOutcome::of(dir, &finished))
    }
}

/// What of the matrices that train is on the device. Adapters, and a projector that trains without the language model,
/// are small: they stay in f32.
fn kept(stage: &StageConfig) -> Keep {
    match stage.precision {
        _ if stage.method != Method::Full => Keep::Full,
        Some(_) if stage.stochastic_rounding => Keep::Stochastic,
        Some(half @ (Precision::Float16 | Precision::Bfloat16)) => Keep::Master(half.dtype()),
        Some(Precision::Float32) | None => Keep::Full,
    }
}

/// Says that step `t` was skipped, whose loss was multiplied with `scale`, and what the `next` one's will be.
///
/// # Errors
/// `Failed` where there is none.
fn overflowed(t: u64, scale: f64, next: Option<f64>, observer: &mut dyn Observer) -> Result<()> {
    let what = format!("step {t}: the gradients of the loss times {scale} overflowed");
    let Some(next) = next else {
        return Err(Error::failed(format!("{what}, and no smaller factor is left to try"))
            .hint("use precision = \"bfloat16\", whose range is that of float32")
            .hint("lower learning_rate, loss_scale or min_loss_scale"));
    };
    observer.event(Event::Note(&format!("{what}; the step is skipped, the next one's factor is {next}")));
    Ok(())
}

/// Which records each step of the stage takes.
pub fn plan(stage: &StageConfig, dataset: &Dataset) -> Result<Plan> {
    let duration = match stage.max_steps {
        Some(steps) => Duration::Steps(steps),
        None => Duration::Epochs(stage.num_train_epochs),
    };
    let order = match (stage.shuffle, stage.group_by_modality_length) {
        (_, true) => Order::Grouped(dataset.modality_lengths()?.into()),
        (true, false) => Order::Shuffled,
        (false, false) => Order::File,
    };
    let (micro_batch, accumulation) = (stage.per_device_train_batch_size, stage.gradient_accumulation_steps);
    Plan::new(dataset.len(), micro_batch, accumulation, duration, order, stage.seed)
}

/// The last step's update has no loss behind it that would show that it went wrong.
fn check_finite(name: &str, values: &[f32]) -> Result<()> {
    if values.iter().all(|value| value.is_finite()) {
        return Ok(());
    }
    Err(Error::failed(format!("{name} holds values that are not finite after the last step, and is not written"))
        .hint("lower learning_rate or raise warmup_ratio, and start again in another --output-dir"))
}

/// The pictures of the records that the steps after `first` will meet; none when the tower trains.
fn used_images(dataset: &Dataset, plan: &Plan, first: u64, tower_trains: bool) -> Result<Vec<ImageSource>> {
    let mut seen = vec![false; dataset.len()];
    let mut images = Vec::new();
    if tower_trains {
        return Ok(images);
    }
    for step in first..plan.total_steps() {
        for index in plan.step(step).into_iter().flatten() {
            if !std::mem::replace(&mut seen[index], true) {
                images.extend(dataset.sample(index)?.images);
            }
        }
        if seen.iter().all(|&seen| seen) {
            break;
        }
    }
    Ok(images)
}
