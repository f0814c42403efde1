//! One stage of a run, typed.

use super::{
    get,
    layers::Origin,
    sort,
    types::{
        DataEntry, DataSource, EMBEDDED, GradientCheckpointing, ImageAspectRatio, LossNorm, LrSchedulerType, Method,
        Optim, Precision, ProjectorType, SelectFeature, Source, TargetModules,
    },
};
use crate::{
    autograd::Checkpoints,
    error::{Error, Result},
    models::loading::Quantization,
    quant::QuantType,
    tensor::Dtype,
};
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// A value as resolved, and where it was given.
#[derive(Clone, Debug)]
pub struct Setting {
    pub key: &'static str,
    pub value: Value,
    pub origin: Origin,
}

/// Two settings are the same when they say the same, wherever they were given.
impl PartialEq for Setting {
    fn eq(&self, other: &Self) -> bool {
        (self.key, &self.value) == (other.key, &other.value)
    }
}

/// A stage as resolved; fields are named as the keys.
#[derive(Clone, Debug, PartialEq)]
pub struct StageConfig {
    /// Empty for a config without `[[stage]]`.
    pub name: String,
    /// `DIR/<name>`, or DIR.
    pub output_dir: PathBuf,
    /// None: starts from what the stage before it produced. Never none in the first stage.
    pub model_name_or_path: Option<Source>,
    pub vision_tower: Option<Source>,
    /// None: as the model has.
    pub mm_projector_type: Option<ProjectorType>,
    pub pretrain_mm_mlp_adapter: Option<Source>,
    pub adapter_name_or_path: Option<Source>,
    /// None: as the model has.
    pub mm_vision_select_layer: Option<i64>,
    pub mm_vision_select_feature: Option<SelectFeature>,
    /// At least one.
    pub data_path: Vec<DataEntry>,
    /// Template name; which exist is for the data layer to say.
    pub version: String,
    pub image_aspect_ratio: ImageAspectRatio,
    /// None: what the model's preprocessor_config.json makes.
    pub image_size: Option<usize>,
    /// None: the model's.
    pub model_max_length: Option<usize>,
    pub shuffle: bool,
    pub seed: u64,
    pub group_by_modality_length: bool,
    pub method: Method,
    pub freeze_mm_mlp_adapter: bool,
    pub unfreeze_mm_vision_tower: bool,
    /// `learning_rate` where it is not given.
    pub mm_projector_lr: f64,
    /// `learning_rate` where it is not given.
    pub mm_vision_tower_lr: f64,
    pub r: usize,
    /// 2r where it is not given.
    pub lora_alpha: f64,
    pub lora_dropout: f64,
    pub target_modules: TargetModules,
    pub use_rslora: bool,
    pub use_dora: bool,
    /// Of the base's weights; none but under `qlora`.
    pub quantization: Option<Quantization>,
    pub num_train_epochs: f64,
    pub max_steps: Option<u64>,
    pub per_device_train_batch_size: usize,
    pub gradient_accumulation_steps: usize,
    /// 1e-4, or 2e-5 for `full`, where it is not given.
    pub learning_rate: f64,
    pub lr_scheduler_type: LrSchedulerType,
    pub warmup_ratio: f64,
    pub warmup_steps: Option<u64>,
    pub weight_decay: f64,
    pub adam_beta1: f64,
    pub adam_beta2: f64,
    pub adam_epsilon: f64,
    /// 0: no clipping.
    pub max_grad_norm: f64,
    pub optim: Optim,
    pub loss_norm: LossNorm,
    /// None: as the checkpoint has, and what trains in float32.
    pub precision: Option<Precision>,
    pub stochastic_rounding: bool,
    /// 0: found by trial.
    pub loss_scale: f64,
    pub initial_scale_power: i32,
    pub loss_scale_window: u64,
    pub hysteresis: u32,
    pub min_loss_scale: f64,
    pub gradient_checkpointing: GradientCheckpointing,
    /// 0 to 3.
    pub zero_stage: u8,
    pub offload: bool,
    /// The devices have a part of the decoder's layers each, and are one to the micro-batches.
    pub layer_split: bool,
    pub logging_steps: u64,
    pub save_steps: u64,
    pub save_total_limit: usize,
    /// All of the above as TOML values, with their origins; keys without a value are left out.
    pub values: Vec<Setting>,
}

/// What an adapter to start from decides where the config does not say it.
const ADAPTERS_OWN: [&str; 6] = ["r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora"];

/// Reads one value after another; a value that is missing or of another kind is a fault of the key list, not of the
/// user, and still an error instead of a panic.
struct Reader<'a>(&'a [Setting]);

impl<'a> Reader<'a> {
    fn optional<T>(&self, key: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let wrong = || Error::failed(format!("config key `{key}` has a default of the wrong kind"));
        get(self.0, key).map(|value| read(value).ok_or_else(wrong)).transpose()
    }

    fn required<T>(&self, key: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<T> {
        self.optional(key, read)?.ok_or_else(|| Error::failed(format!("config key `{key}` has no value")))
    }

    fn flag(&self, key: &str) -> Result<bool> {
        self.required(key, Value::as_bool)
    }

    fn number(&self, key: &str) -> Result<f64> {
        self.required(key, Value::as_float)
    }

    fn source(&self, key: &str) -> Result<Option<Source>> {
        self.optional(key, |value| value.as_str().map(Source::from_resolved))
    }
}

fn count<T: TryFrom<i64>>(value: &Value) -> Option<T> {
    value.as_integer().and_then(|number| T::try_from(number).ok())
}

impl StageConfig {
    /// What layers keep for their backward. With a 16-bit precision their inputs have that type.
    pub fn checkpoints(&self) -> Checkpoints {
        let dtype = self.precision.map_or(Dtype::F32, Precision::dtype);
        Checkpoints { mode: self.gradient_checkpointing.mode(), dtype }
    }

    /// `config` is what errors call the config; `before`: the stage that this one goes on from.
    pub(super) fn new(
        name: &str,
        run_dir: &Path,
        mut values: Vec<Setting>,
        before: Option<&Self>,
        config: &str,
    ) -> Result<Self> {
        fill_dependent_defaults(&mut values);
        let place = if name.is_empty() { config.to_string() } else { format!("{config}, stage `{name}`") };
        let missing = |key: &str, example: &str| {
            Error::usage(format!("{place}: `{key}` is required")).hint(format!("for example: {key} = {example}"))
        };
        let read = Reader(&values);
        let model_name_or_path = read.source("model_name_or_path")?;
        if before.is_none() && model_name_or_path.is_none() {
            return Err(missing("model_name_or_path", "\"embedded:tiny\", or the folder of a LLaVA model"));
        }
        if get(&values, "data_path").is_none() {
            return Err(missing("data_path", "\"train.json\""));
        }
        let output_dir = if name.is_empty() { run_dir.to_path_buf() } else { run_dir.join(name) };
        let choice = |value: &'_ Value| value.as_str().map(str::to_string);
        let mut stage = Self {
            name: name.to_string(),
            output_dir,
            model_name_or_path,
            vision_tower: read.source("vision_tower")?,
            mm_projector_type: read.optional("mm_projector_type", |v| ProjectorType::parse(v.as_str()?))?,
            pretrain_mm_mlp_adapter: read.source("pretrain_mm_mlp_adapter")?,
            adapter_name_or_path: read.source("adapter_name_or_path")?,
            mm_vision_select_layer: read.optional("mm_vision_select_layer", Value::as_integer)?,
            mm_vision_select_feature: read
                .optional("mm_vision_select_feature", |v| SelectFeature::parse(v.as_str()?))?,
            data_path: read.required("data_path", |v| v.as_array()?.iter().map(data_entry).collect())?,
            version: read.required("version", choice)?,
            image_aspect_ratio: read.required("image_aspect_ratio", |v| ImageAspectRatio::parse(v.as_str()?))?,
            image_size: read.optional("image_size", count)?,
            model_max_length: read.optional("model_max_length", count)?,
            shuffle: read.flag("shuffle")?,
            seed: read.required("seed", count)?,
            group_by_modality_length: read.flag("group_by_modality_length")?,
            method: read.required("method", |v| Method::parse(v.as_str()?))?,
            freeze_mm_mlp_adapter: read.flag("freeze_mm_mlp_adapter")?,
            unfreeze_mm_vision_tower: read.flag("unfreeze_mm_vision_tower")?,
            mm_projector_lr: read.number("mm_projector_lr")?,
            mm_vision_tower_lr: read.number("mm_vision_tower_lr")?,
            r: read.required("r", count)?,
            lora_alpha: read.number("lora_alpha")?,
            lora_dropout: read.number("lora_dropout")?,
            target_modules: read.required("target_modules", target_modules)?,
            use_rslora: read.flag("use_rslora")?,
            use_dora: read.flag("use_dora")?,
            quantization: quantization(&read)?,
            num_train_epochs: read.number("num_train_epochs")?,
            max_steps: read.optional("max_steps", count)?,
            per_device_train_batch_size: read.required("per_device_train_batch_size", count)?,
            gradient_accumulation_steps: read.required("gradient_accumulation_steps", count)?,
            learning_rate: read.number("learning_rate")?,
            lr_scheduler_type: read.required("lr_scheduler_type", |v| LrSchedulerType::parse(v.as_str()?))?,
            warmup_ratio: read.number("warmup_ratio")?,
            warmup_steps: read.optional("warmup_steps", count)?,
            weight_decay: read.number("weight_decay")?,
            adam_beta1: read.number("adam_beta1")?,
            adam_beta2: read.number("adam_beta2")?,
            adam_epsilon: read.number("adam_epsilon")?,
            max_grad_norm: read.number("max_grad_norm")?,
            optim: read.required("optim", |v| Optim::parse(v.as_str()?))?,
            loss_norm: read.required("loss_norm", |v| LossNorm::parse(v.as_str()?))?,
            precision: read.optional("precision", |v| Precision::parse(v.as_str()?))?,
            stochastic_rounding: read.flag("stochastic_rounding")?,
            loss_scale: read.number("loss_scale")?,
            initial_scale_power: read.required("initial_scale_power", count)?,
            loss_scale_window: read.required("loss_scale_window", count)?,
            hysteresis: read.required("hysteresis", count)?,
            min_loss_scale: read.number("min_loss_scale")?,
            gradient_checkpointing: read
                .required("gradient_checkpointing", |v| GradientCheckpointing::parse(v.as_str()?))?,
            zero_stage: read.required("zero_stage", count)?,
            offload: read.flag("offload")?,
            layer_split: read.flag("layer_split")?,
            logging_steps: read.required("logging_steps", count)?,
            save_steps: read.required("save_steps", count)?,
            save_total_limit: read.required("save_total_limit", count)?,
            values: Vec::new(),
        };
        // An adapter to go on from says these itself.
        let continues = stage.model_name_or_path.is_none() && before.is_some_and(|stage| stage.method.trains_adapter());
        if stage.method.trains_adapter() && (continues || stage.adapter_name_or_path.is_some()) {
            values.retain(|setting| setting.origin != Origin::Default || !ADAPTERS_OWN.contains(&setting.key));
        }
        stage.values = values;
        let folds = !stage.method.trains_adapter() && (continues || stage.adapter_name_or_path.is_some());
        if stage.zero_stage == 3 && folds {
            return Err(Error::usage(format!(
                "{place}: zero_stage = 3 cannot fold an adapter into layers that take turns"
            ))
            .hint("merge the adapter into its model first (wgpu-llava merge), or use zero_stage = 2"));
        }
        if stage.method == Method::Projector && stage.freeze_mm_mlp_adapter {
            return Err(Error::usage(format!(
                "{place}: method = \"projector\" with freeze_mm_mlp_adapter = true leaves nothing to train"
            ))
            .hint("leave freeze_mm_mlp_adapter out, or choose another method"));
        }
        let half = stage.method == Method::Full && stage.precision == Some(Precision::Bfloat16);
        if stage.stochastic_rounding && !half {
            return Err(Error::usage(format!(
                "{place}: stochastic_rounding = true is for method = \"full\" with precision = \"bfloat16\""
            ))
            .hint("set both, or leave stochastic_rounding out"));
        }
        if stage.offload && stage.optim == Optim::AdamW8bit {
            return Err(Error::usage(format!("{place}: offload = true keeps moments in float32, not in eight bits"))
                .hint("set optim = \"adamw\": under offload moments take no device memory"));
        }
        if stage.offload && stage.stochastic_rounding {
            return Err(Error::usage(format!("{place}: offload = true keeps float32 masters on the host"))
                .hint("leave stochastic_rounding out: under offload masters take no device memory"));
        }
        if stage.layer_split && (stage.zero_stage > 0 || stage.offload) {
            let other = if stage.offload { "offload = true" } else { "zero_stage" };
            return Err(Error::usage(format!(
                "{place}: layer_split = true does not go with {other}: no two devices have the same layers"
            ))
            .hint(format!("leave {other} out, or layer_split")));
        }
        // Both the factor and its reciprocal are f32.
        for (key, factor) in [("loss_scale", stage.loss_scale), ("min_loss_scale", stage.min_loss_scale)] {
            if factor != 0.0 && !(1e-30..=1e30).contains(&factor) {
                return Err(Error::usage(format!("{place}: {key} = {factor:e} must be from 1e-30 to 1e30"))
                    .hint("powers of two between 1 and 65536 are usual; loss_scale = 0 finds one by trial"));
            }
        }
        Ok(stage)
    }

    /// Whether a value was given, and is not a default.
    pub fn is_given(&self, key: &str) -> bool {
        self.values.iter().any(|setting| setting.key == key && setting.origin != Origin::Default)
    }

    /// The method, with how its weights are kept where that is its point.
    pub fn method_line(&self) -> String {
        let Some(Quantization { kind, double, lm_head }) = self.quantization else { return self.method.to_string() };
        let double = if double { ", double quantisation" } else { "" };
        let head = if lm_head { ", the head too" } else { "" };
        format!("{} ({}{double}{head})", self.method, kind.as_str())
    }

    /// The name, or `train` for the stage of a config without stages.
    pub fn title(&self) -> &str {
        if self.name.is_empty() { "train" } else { &self.name }
    }

    /// How many of so many devices compute micro-batches of their own.
    pub fn ranks(&self, devices: usize) -> usize {
        if self.layer_split { 1 } else { devices }
    }

    /// Records per optimizer step on one device.
    pub fn global_batch(&self) -> usize {
        self.per_device_train_batch_size.saturating_mul(self.gradient_accumulation_steps)
    }

    /// What the adapters' product is multiplied with: alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023) for rsLoRA.
    pub fn lora_scale(&self) -> f64 {
        let rank = self.r as f64;
        self.lora_alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }
}

fn quantization(read: &Reader<'_>) -> Result<Option<Quantization>> {
    let quantization = Quantization {
        kind: read.required("quant_type", |value| QuantType::parse(value.as_str()?))?,
        double: read.flag("double_quant")?,
        lm_head: read.flag("quantize_lm_head")?,
    };
    let method = read.required("method", |value| Method::parse(value.as_str()?))?;
    Ok((method == Method::Qlora).then_some(quantization))
}

/// The defaults that other values decide, and where the pictures of a data file are.
fn fill_dependent_defaults(values: &mut Vec<Setting>) {
    let full = get(values, "method").and_then(Value::as_str) == Some("full");
    fill(values, "learning_rate", Value::Float(if full { 2e-5 } else { 1e-4 }));
    if let Some(rate) = get(values, "learning_rate").cloned() {
        fill(values, "mm_projector_lr", rate.clone());
        fill(values, "mm_vision_tower_lr", rate);
    }
    let rank = get(values, "r").and_then(Value::as_integer).unwrap_or(64);
    fill(values, "lora_alpha", Value::Float(2.0 * rank as f64));
    // The folder goes into each entry; afterwards the key itself says nothing more.
    let folder = get(values, "image_folder").cloned();
    values.retain(|setting| setting.key != "image_folder");
    for setting in values.iter_mut().filter(|setting| setting.key == "data_path") {
        for entry in setting.value.as_array_mut().into_iter().flatten().filter_map(Value::as_table_mut) {
            let path = entry.get("path").and_then(Value::as_str).unwrap_or_default().to_string();
            if !path.starts_with(EMBEDDED) && !entry.contains_key("image_folder") {
                let beside = Path::new(&path).parent().unwrap_or(Path::new("")).to_string_lossy().into_owned();
                let mut filled = Table::from_iter([("path".to_string(), Value::String(path))]);
                filled.insert("image_folder".into(), folder.clone().unwrap_or(Value::String(beside)));
                filled.extend(std::mem::take(entry));
                *entry = filled;
            }
        }
    }
    sort(values);
}

fn fill(values: &mut Vec<Setting>, key: &'static str, value: Value) {
    if get(values, key).is_none() {
        values.push(Setting { key, value, origin: Origin::Default });
    }
}

fn data_entry(value: &Value) -> Option<DataEntry> {
    let path = value.get("path")?.as_str()?;
    let embedded = path.starts_with(EMBEDDED);
    Some(DataEntry {
        path: if embedded { DataSource::Embedded(path.into()) } else { DataSource::File(path.into()) },
        image_folder: value.get("image_folder").and_then(Value::as_str).map(PathBuf::from),
        weight: value.get("weight").and_then(Value::as_float).unwrap_or(1.0),
        limit: value.get("limit").and_then(count),
    })
}

fn target_modules(value: &Value) -> Option<TargetModules> {
    match value {
        Value::String(text) => TargetModules::parse(text).ok(),
        other => {
            let names: Option<Vec<String>> = other.as_array()?.iter().map(|v| v.as_str().map(str::to_string)).collect();
            names.map(TargetModules::Names)
        }
    }
}
