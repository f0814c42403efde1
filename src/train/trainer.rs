//! One stage: records into steps, metrics, checkpoints, and what is written at the end.

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use super::{
    agreement::{alike, told_by_all},
    checkpoint::{self, TrainerState},
    config::{ImageAspectRatio, Method, Precision, StageConfig},
    division::Division,
    estimate,
    events::{Event, Observer, StageHeader, StepMetrics},
    loss_scale::{LossScaler, LossScaling},
    metrics::{self, MetricsWriter},
    optimizer::Updates,
    pictures::PictureStore,
    plot,
    run_folder::{self, FinishedStage},
    schedule::Schedule,
    start::{Origin, Prepared},
    step::{Measured, Step},
    stepper::Stepper,
    team::{Devices, Standing, Team},
};
use crate::{
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
    hosts::{Hosts, same_on_all},
    hub::id_or_path,
    models::{adapter, batch::PackedBatch, names, streaming::Resting},
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
    dataset: Dataset,
    plan: Plan,
    schedule: Schedule,
    team: Team,
    state: TrainerState,
}

impl<'a> Trainer<'a> {
    /// Loads model and data, moves what trains into the optimizer, and goes to `resume`'s step where it is given. What
    /// does not fit into the memory of a device is refused before it is loaded.
    pub fn new(
        stage: &'a StageConfig,
        before: Option<&Origin>,
        resume: Option<&Path>,
        devices: &Devices,
        hosts: &mut dyn Hosts,
        observer: &mut dyn Observer,
    ) -> Result<Self> {
        // All that can be wrong with files is told before weights go to the device.
        let prepared = Prepared::open(stage, before)?;
        if stage.layer_split && hosts.count() > 1 {
            return Err(Error::usage("layer_split = true is for the devices of one host, and the run has several")
                .hint("start it on one host, without mpirun")
                .hint("leave layer_split out: zero_stage and offload work on several hosts"));
        }
        prepared.check_split(stage, devices.gpus.len())?;
        let dataset = prepared.dataset(stage, observer)?;
        let processor = prepared.processor(stage)?;
        let standing = Standing::of(stage.ranks(devices.gpus.len()), hosts)?;
        if hosts.count() > 1 {
            same_on_all(hosts, &alike(stage, &prepared, &dataset, resume)?)?;
        }
        let before = resume.map(checkpoint::read).transpose()?;
        // Parts of the layers are on one host.
        let devices_of_all = if stage.layer_split { devices.gpus.len() } else { standing.total };
        let division = Division::of(stage, devices_of_all, resume.zip(before.as_ref()))?;
        let plan = plan_of(stage, &dataset, division.micro_batches)?;
        let total_steps = plan.total_steps();
        let used = used_images(&dataset, &plan, 0, stage.unfreeze_mm_vision_tower)?;
        if devices.checked {
            let steps = estimate::Steps::of_data(prepared.config(), &dataset, &plan, &used, standing.total)?;
            estimate::check(stage, &prepared, &steps, devices, (standing.total, hosts.count()))?;
        }
        let micro_batches = division.micro_batches;
        let resting = Team::resting(stage, standing.total);
        let ranks: Vec<&[Gpu]> = devices.gpus.chunks(devices.gpus.len() / stage.ranks(devices.gpus.len())).collect();
        let sharing = Team::sharing(stage, prepared.config(), standing, ranks.len());
        let mut steppers = Vec::new();
        for (gpus, sharing) in ranks.into_iter().zip(sharing) {
            steppers.push(Stepper::new(
                stage,
                prepared.load(stage, gpus, resting.as_ref(), observer)?,
                micro_batches,
                sharing,
            )?);
        }
        let mut team = Team::new(stage, steppers, standing, devices.slow, hosts)?;
        resting.iter().for_each(Resting::forget_masters);
        let loss_scaler = LossScaling::of(stage).map(|scaling| LossScaler::new(&scaling));
        let mut state = TrainerState {
            step: 0,
            updates: Updates::default(),
            total_steps,
            records: dataset.len(),
            seconds: 0.0,
            loss_scaler,
            micro_batches,
            devices: Some(division.devices),
            shares: None,
        };
        if let Some(folder) = resume {
            let restored = team.restore(folder, &state, hosts)?;
            state = TrainerState { micro_batches, devices: state.devices, ..restored };
        }
        let dealt = team.shares().map(|shares| shares.deal(micro_batches)).unwrap_or_default();
        if let Some(note) = division.note(&dealt, standing.total) {
            observer.event(Event::Note(&note));
        }
        let left = match state.step {
            0 => used.clone(),
            step => used_images(&dataset, &plan, step, stage.unfreeze_mm_vision_tower)?,
        };
        let frozen = !stage.unfreeze_mm_vision_tower;
        let pictures = PictureStore::of_all(&team.models(), processor.as_ref(), &used, &left, frozen, observer)?;
        team.set_pictures(pictures);
        let schedule = Schedule::new(stage.lr_scheduler_type, total_steps, stage.warmup_steps, stage.warmup_ratio);
        Ok(Self { stage, dataset, plan, schedule, team, state })
    }

    pub fn header(&self) -> StageHeader {
        StageHeader {
            name: self.stage.title().to_string(),
            method: self.stage.method_line(),
            model: self.team.first().start.folder.name().to_string(),
            records: self.dataset.len(),
            total_steps: self.state.total_steps,
            first_step: self.state.step,
            batch: self.plan.batch(),
            trainable_parameters: self.team.first().optimizer.elements() as u64,
            total_parameters: self.team.first().start.model.parameters.elements() as u64,
            output_dir: self.stage.output_dir.clone(),
        }
    }

    /// Trains to the end, or until `stop` is set on any host: then the step is finished, a checkpoint saved and
    /// `Interrupted` returned. The first host writes.
    pub fn run(
        mut self,
        stop: &AtomicBool,
        hosts: &mut dyn Hosts,
        observer: &mut dyn Observer,
    ) -> Result<StageOutcome> {
        let dir = &self.stage.output_dir;
        let mut writer = match (hosts.rank(), self.state.step) {
            (0, 0) => Some(MetricsWriter::create(dir)?),
            (0, step) => Some(MetricsWriter::resume(dir, step)?),
            _ => None,
        };
        let total = self.state.total_steps;
        while self.state.step < total {
            let begun = Instant::now();
            let measured = self.step(hosts, observer)?;
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
                device_bytes: self.team.gpus().map(|gpu| gpu.peak().held).max().unwrap_or(0),
                loss_scale: measured.loss_scale,
                skipped_steps: self.state.loss_scaler.map(|scaler| scaler.skipped_steps),
                devices: measured.devices,
            };
            if let Some(writer) = &mut writer
                && (step.is_multiple_of(self.stage.logging_steps) || step == total)
            {
                writer.write(&metrics)?;
            }
            observer.event(Event::Step(&metrics, total));
            // Whoever is stopped stops all; save_steps may differ, and the first host's counts.
            let due = self.stage.save_steps > 0 && step.is_multiple_of(self.stage.save_steps);
            let told = told_by_all(&(stop.load(Ordering::Relaxed), due), hosts)?;
            let stopping = told.iter().any(|(stop, _)| *stop) && step < total;
            if (told[0].1 || stopping) && step < total {
                let saved = self.save(hosts)?;
                observer.event(Event::Saved(&saved));
            }
            if stopping {
                return Err(Error::interrupted(format!("stopped after step {step} of {total}; a checkpoint is saved")));
            }
        }
        self.finish(hosts, observer)
    }

    /// One optimizer step.
    fn step(&mut self, hosts: &mut dyn Hosts, observer: &mut dyn Observer) -> Result<Measured> {
        let samples: Vec<Vec<Sample>> = (self.plan.step(self.state.step).iter())
            .map(|indices| indices.iter().map(|&index| self.dataset.sample(index)).collect())
            .collect::<Result<_>>()?;
        let image_tokens = self.team.first().model().image_tokens();
        let batches: Vec<PackedBatch> = samples.iter().map(|samples| PackedBatch::new(samples, image_tokens)).collect();
        let images: Vec<Vec<ImageSource>> = (samples.iter())
            .map(|samples| samples.iter().flat_map(|sample| sample.images.iter().cloned()).collect())
            .collect();
        let (number, factor) = (self.state.step, self.schedule.factor(self.state.step));
        let step = Step { number, batches: &batches, images: &images, factor };
        let TrainerState { updates, loss_scaler, .. } = &mut self.state;
        let measured = self.team.step(self.stage, &step, updates, loss_scaler.as_mut(), hosts, observer)?;
        let (&Measured { loss, grad_norm, .. }, t) = (&measured, number + 1);
        if let (Some(overflow), Some(scale)) = (measured.overflow, measured.loss_scale) {
            overflowed(t, scale, overflow.next, observer)?;
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
        Ok(measured)
    }

    fn save(&mut self, hosts: &mut dyn Hosts) -> Result<PathBuf> {
        self.team.complete()?;
        let limit = self.stage.save_total_limit;
        let state = TrainerState { shares: self.team.shares(), ..self.state.clone() };
        checkpoint::save(&self.stage.output_dir, &state, &self.team.holders(), limit, hosts, |folder| {
            if self.stage.method.trains_adapter() { self.write_adapter(&folder.join("adapter")) } else { Ok(()) }
        })
    }

    fn write_adapter(&self, folder: &Path) -> Result<()> {
        let Some(settings) = &self.team.first().start.adapter else { return Ok(()) };
        let model = &self.team.first().start.model;
        let with_projector = model.projector.is_some() && !self.stage.freeze_mm_mlp_adapter;
        let with_projector = with_projector || !settings.saved.is_empty();
        let base = id_or_path(self.team.first().start.folder.name());
        let mut adapter = adapter::export(model, settings, with_projector)?;
        if self.stage.unfreeze_mm_vision_tower {
            adapter::save_tower(model, &self.team.first().start.folder, &mut adapter)?;
        }
        for (name, module) in &adapter.modules {
            let parts = [Some(&module.lora_a), Some(&module.lora_b), module.magnitude.as_ref()];
            parts.into_iter().flatten().try_for_each(|tensor| check_finite(name, &tensor.data))?;
        }
        adapter.saved.iter().try_for_each(|(name, tensor)| check_finite(name, &tensor.data))?;
        adapter.write(folder, &model.config, &base)
    }

    fn write_model(&self, folder: &Path) -> Result<()> {
        let model = &self.team.first().start.model;
        let shapes: std::collections::HashMap<String, Vec<usize>> =
            names::expected_tensors(&model.config).into_iter().collect();
        let source = &self.team.first().start.folder;
        let parameter = |name: &str| model.parameters.find(name).map(|id| model.parameters.get(id));
        // What has not changed is in the source, whatever dtype it has there.
        let is_changed = |name: &str| {
            parameter(name)
                .is_some_and(|parameter| parameter.grad.is_some() || self.team.first().start.changed.contains(name))
        };
        let fetch = |name: &str| {
            let missing = || Error::failed(format!("{name} is not in the model"));
            let (values, shape) = (model.values(name)?.ok_or_else(missing)?, shapes.get(name).ok_or_else(missing)?);
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
            quantize: None,
        };
        hf_write::write_model(folder, source, &model.config, changes, &writing)
    }

    /// Writes the stage's output and marks it finished.
    fn finish(mut self, hosts: &mut dyn Hosts, observer: &mut dyn Observer) -> Result<StageOutcome> {
        self.team.complete()?;
        let dir = &self.stage.output_dir;
        let what = if self.stage.method.trains_adapter() { "adapter" } else { "model" };
        let output = dir.join(what);
        let finished = FinishedStage {
            steps: self.state.total_steps,
            seconds: self.state.seconds,
            output: what.to_string(),
            records: self.dataset.len(),
            trainable_parameters: self.team.first().optimizer.elements() as u64,
            total_parameters: self.team.first().start.model.parameters.elements() as u64,
        };
        if hosts.rank() == 0 {
            match self.stage.method {
                Method::Lora | Method::Qlora => self.write_adapter(&output)?,
                Method::Projector | Method::Full => self.write_model(&output)?,
            }
            let written = metrics::read(&dir.join(metrics::FILE_NAME))?;
            plot::write_loss_svg(&dir.join("loss.svg"), self.stage.title(), &written)?;
            run_folder::mark_finished(dir, &finished)?;
        }
        // The others may read what is written from here on.
        hosts.barrier()?;
        observer.event(Event::StageEnd { name: self.stage.title(), output: &output, seconds: self.state.seconds });
        Ok(StageOutcome::of(dir, &finished))
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

/// Which records each step of the stage takes on so many devices, where it begins on them.
pub fn plan(stage: &StageConfig, dataset: &Dataset, devices: usize) -> Result<Plan> {
    plan_of(stage, dataset, stage.gradient_accumulation_steps.saturating_mul(devices))
}

/// Which records each step of so many micro-batches takes.
fn plan_of(stage: &StageConfig, dataset: &Dataset, micro_batches: usize) -> Result<Plan> {
    let duration = match stage.max_steps {
        Some(steps) => Duration::Steps(steps),
        None => Duration::Epochs(stage.num_train_epochs),
    };
    let order = match (stage.shuffle, stage.group_by_modality_length) {
        (_, true) => Order::Grouped(dataset.modality_lengths()?.into()),
        (true, false) => Order::Shuffled,
        (false, false) => Order::File,
    };
    Plan::new(dataset.len(), stage.per_device_train_batch_size, micro_batches, duration, order, stage.seed)
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
pub(super) fn used_images(dataset: &Dataset, plan: &Plan, first: u64, tower_trains: bool) -> Result<Vec<ImageSource>> {
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
