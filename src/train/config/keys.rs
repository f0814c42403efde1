//! Every config key: its kind, its default and its meaning. The one list that reading, errors and writing walk.

use super::types::{
    GradientCheckpointing, ImageAspectRatio, LossNorm, LrSchedulerType, Method, Optim, Precision, ProjectorType,
    SelectFeature,
};
use crate::quant::QuantType;
use toml::Value;

#[derive(Clone, Copy, Debug)]
pub enum Kind {
    Text,
    /// A folder, a Hub id or an `embedded:` name.
    Source,
    Path,
    /// A file, an `embedded:` name, or a list of `{path, image_folder, weight, limit}`.
    Data,
    Choice(&'static [&'static str]),
    Flag,
    /// A whole number in `least..=most`.
    Integer {
        least: i64,
        most: i64,
    },
    Number(Range),
    /// A list of names, a pattern, or `all-linear`.
    Modules,
    /// Indices or names of adapters, or a list of them.
    Devices,
    /// A list of names out of these.
    Choices(&'static [&'static str]),
}

/// Finite numbers that a key takes.
#[derive(Clone, Copy, Debug)]
pub enum Range {
    /// At least 0.
    NotNegative,
    /// Above 0.
    Positive,
    /// 0 to 1, both allowed.
    Ratio,
    /// 0 to 1, 1 not allowed.
    BelowOne,
}

impl Range {
    pub fn holds(self, number: f64) -> bool {
        number.is_finite()
            && match self {
                Self::NotNegative => number >= 0.0,
                Self::Positive => number > 0.0,
                Self::Ratio => (0.0..=1.0).contains(&number),
                Self::BelowOne => (0.0..1.0).contains(&number),
            }
    }

    pub fn describe(self) -> &'static str {
        match self {
            Self::NotNegative => "a number of at least 0",
            Self::Positive => "a number above 0",
            Self::Ratio => "a number from 0 to 1",
            Self::BelowOne => "a number of at least 0 and below 1",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Of the whole run; not in a `[[stage]]`.
    Run,
    /// Of a stage; at the top of the file it is the default of every stage.
    Stage,
    /// What a stage starts from; at the top of the file it is for the first stage, because each later one starts from
    /// what the stage before it produced.
    Start,
}

#[derive(Debug)]
pub struct Key {
    pub name: &'static str,
    pub kind: Kind,
    pub scope: Scope,
    /// As TOML; none where the key has no default or one that other values decide.
    pub default: Option<&'static str>,
    pub meaning: &'static str,
}

const fn run(name: &'static str, kind: Kind, meaning: &'static str) -> Key {
    Key { name, kind, scope: Scope::Run, default: None, meaning }
}
const fn start(name: &'static str, kind: Kind, meaning: &'static str) -> Key {
    Key { name, kind, scope: Scope::Start, default: None, meaning }
}
const fn unset(name: &'static str, kind: Kind, meaning: &'static str) -> Key {
    Key { name, kind, scope: Scope::Stage, default: None, meaning }
}
const fn stage(name: &'static str, kind: Kind, default: &'static str, meaning: &'static str) -> Key {
    Key { name, kind, scope: Scope::Stage, default: Some(default), meaning }
}
const fn at_least(least: i64) -> Kind {
    Kind::Integer { least, most: i64::MAX }
}
const fn within(least: i64, most: i64) -> Kind {
    Kind::Integer { least, most }
}

/// What `eval_after` may name.
pub const EVAL_TASKS: &[&str] = &["easy-vqa"];

#[rustfmt::skip] // a table
pub static KEYS: &[Key] = &[
    start("model_name_or_path", Kind::Source, "LLaMA or LLaVA folder, Hub id, or `embedded:tiny`"),
    start("vision_tower", Kind::Source, "CLIP folder, to make a LLaVA out of a LLaMA"),
    start("mm_projector_type", Kind::Choice(ProjectorType::NAMES), "as the model has; `linear` for a new one"),
    start("pretrain_mm_mlp_adapter", Kind::Source, "start from this projector"),
    start("adapter_name_or_path", Kind::Source, "start from this adapter"),
    unset("mm_vision_select_layer", within(-1000, 1000), "as the model has, or -2"),
    unset("mm_vision_select_feature", Kind::Choice(SelectFeature::NAMES), "as the model has, or `patch`"),
    unset("data_path", Kind::Data, "a JSON or JSON Lines file, an `embedded:` name, or a list to mix"),
    unset("image_folder", Kind::Path, "where pictures are; the data file's folder"),
    stage("version", Kind::Text, "\"v1\"", "conversation template"),
    stage("image_aspect_ratio", Kind::Choice(ImageAspectRatio::NAMES), "\"square\"", "how a picture becomes square"),
    unset("image_size", within(1, 1 << 14), "pixels a side; the tower's"),
    unset("model_max_length", at_least(2), "the model's; longer records lose their tail"),
    stage("shuffle", Kind::Flag, "true", "false: records in file order"),
    stage("seed", at_least(0), "0", "of the order, of new weights and of dropout"),
    stage("group_by_modality_length", Kind::Flag, "false", "batches of one modality and like lengths"),
    stage("method", Kind::Choice(Method::NAMES), "\"lora\"", "what is trained"),
    stage("freeze_mm_mlp_adapter", Kind::Flag, "false", "true: the projector is not trained beside the language model"),
    stage("unfreeze_mm_vision_tower", Kind::Flag, "false", "true: the vision tower is trained too"),
    unset("mm_projector_lr", Kind::Number(Range::NotNegative), "the projector's rate; `learning_rate`"),
    unset("mm_vision_tower_lr", Kind::Number(Range::NotNegative), "the tower's rate; `learning_rate`"),
    stage("r", within(1, 65_536), "64", "rank of the adapters"),
    unset("lora_alpha", Kind::Number(Range::Positive), "the adapters are scaled by alpha / r; 2r"),
    stage("lora_dropout", Kind::Number(Range::BelowOne), "0.0", "dropout on the adapters' input"),
    stage("target_modules", Kind::Modules, "\"all-linear\"", "every linear of every decoder layer"),
    stage("use_rslora", Kind::Flag, "false", "scale by alpha over the root of r"),
    stage("use_dora", Kind::Flag, "false", "weight-decomposed adapters"),
    stage("bits", within(4, 8), "4", "of the decoder's linears under `qlora`"),
    stage("quant_type", Kind::Choice(QuantType::NAMES), "\"nf4\"", "what four bits stand for under `qlora`"),
    stage("double_quant", Kind::Flag, "true", "under `qlora`, the factors of the codes in eight bits too"),
    stage("quantize_lm_head", Kind::Flag, "false", "under `qlora`, the head in four bits too, as LLaVA's scripts had it"),
    stage("num_train_epochs", Kind::Number(Range::Positive), "1.0", "passes over the data"),
    unset("max_steps", at_least(1), "optimizer steps; wins over num_train_epochs"),
    stage("per_device_train_batch_size", within(1, 1 << 24), "1", "records of a micro-batch"),
    stage("gradient_accumulation_steps", within(1, 1 << 24), "1", "micro-batches of a step"),
    unset("learning_rate", Kind::Number(Range::NotNegative), "1e-4; 2e-5 for `full`"),
    stage("lr_scheduler_type", Kind::Choice(LrSchedulerType::NAMES), "\"cosine\"", "schedule of the rate"),
    stage("warmup_ratio", Kind::Number(Range::Ratio), "0.03", "part of the steps that warm up"),
    unset("warmup_steps", at_least(0), "wins over warmup_ratio"),
    stage("weight_decay", Kind::Number(Range::NotNegative), "0.0", "decoupled; none for biases and norms"),
    stage("adam_beta1", Kind::Number(Range::BelowOne), "0.9", "decay of the mean of the gradients"),
    stage("adam_beta2", Kind::Number(Range::BelowOne), "0.999", "decay of the mean of their squares"),
    stage("adam_epsilon", Kind::Number(Range::Positive), "1e-8", "added to the root of the latter"),
    stage("max_grad_norm", Kind::Number(Range::NotNegative), "1.0", "0: no clipping"),
    stage("optim", Kind::Choice(Optim::NAMES), "\"adamw\"", "`adamw_8bit`: moments in 8 bits, as bitsandbytes"),
    stage("loss_norm", Kind::Choice(LossNorm::NAMES), "\"global_tokens\"", "what the loss is divided by"),
    unset("precision", Kind::Choice(Precision::NAMES), "how weights are kept; as the checkpoint has"),
    stage("stochastic_rounding", Kind::Flag, "false", "`full` in bfloat16 without float32 masters"),
    stage("loss_scale", Kind::Number(Range::NotNegative), "0.0", "factor of the loss under float16; 0: found by trial"),
    stage("initial_scale_power", within(0, 100), "16", "the factor begins at 2 to this power"),
    stage("loss_scale_window", at_least(1), "1000", "steps without overflow that double the factor"),
    stage("hysteresis", within(1, 1 << 24), "2", "overflows before the factor is halved"),
    stage("min_loss_scale", Kind::Number(Range::Positive), "1.0", "the factor never falls below this"),
    stage("gradient_checkpointing", Kind::Choice(GradientCheckpointing::NAMES), "\"none\"", "recompute in backward"),
    stage("logging_steps", at_least(1), "1", "steps between lines of metrics.jsonl"),
    stage("save_steps", at_least(1), "500", "steps between checkpoints"),
    stage("save_total_limit", within(1, 1 << 24), "2", "checkpoints kept"),
    run("devices", Kind::Devices, "indices or names of adapters; the best one"),
    stage("zero_stage", within(0, 3), "0", "sharding over several devices"),
    stage("offload", Kind::Flag, "false", "optimizer state in host memory"),
    stage("layer_split", Kind::Flag, "false", "the decoder's layers in parts, one on each device"),
    run("output_dir", Kind::Path, "the run folder"),
    run("eval_after", Kind::Choices(EVAL_TASKS), "evaluations after the last stage"),
    run("eval_limit", at_least(1), "questions of each evaluation"),
];

pub fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

/// What to use instead of a value that is known but not built yet; none for all that is built.
pub fn not_built(key: &Key, value: &Value) -> Option<&'static str> {
    let instead = match key.name {
        "bits" if value.as_integer() != Some(4) => "use 4",
        _ => return None,
    };
    Some(instead)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn keys_are_unique_and_nothing_that_is_a_default_is_unbuilt() {
        let names: HashSet<&str> = KEYS.iter().map(|key| key.name).collect();
        assert_eq!(names.len(), KEYS.len());
        for key in KEYS {
            if let Some(default) = key.default {
                let table: toml::Table = format!("v = {default}").parse().unwrap();
                assert!(not_built(key, &table["v"]).is_none(), "{}", key.name);
            }
        }
    }
}
