//! What to change when a stage does not fit, each change with what is needed then.

use super::{batches::Steps, open_last, simulate};
use crate::{
    error::Result,
    gpu::AdapterFacts,
    models::loading::Quantization,
    quant::QuantType,
    train::config::{GradientCheckpointing, Method, Optim, Precision, StageConfig},
};

/// One change on top of those before it.
#[derive(Clone, Debug)]
pub struct Advice {
    /// As it is written in a config.
    pub change: String,
    /// What the stage needs with it, bytes.
    pub bytes: u64,
    pub fits: bool,
}

/// What there is for a stage.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Of one device, bytes.
    pub memory: u64,
    /// Of all hosts.
    pub devices: usize,
    pub hosts: usize,
}

/// How a change is written, and what it does.
type Change = (String, Box<dyn Fn(&mut StageConfig)>);

/// What can be changed, in the order of how little it costs: what is computed stays the same, then nearly the same,
/// then another method.
fn changes(stage: &StageConfig, Room { devices, hosts, .. }: Room) -> Vec<Change> {
    let mut list: Vec<Change> = Vec::new();
    if matches!(stage.gradient_checkpointing, GradientCheckpointing::None | GradientCheckpointing::Selective) {
        list.push((
            "gradient_checkpointing = \"full\"".into(),
            Box::new(|stage| stage.gradient_checkpointing = GradientCheckpointing::Full),
        ));
    }
    let sequences = stage.per_device_train_batch_size;
    if sequences > 1 {
        let accumulated = stage.gradient_accumulation_steps * sequences;
        list.push((
            format!("per_device_train_batch_size = 1 with gradient_accumulation_steps = {accumulated}"),
            Box::new(move |stage| {
                stage.per_device_train_batch_size = 1;
                stage.gradient_accumulation_steps = accumulated;
            }),
        ));
    }
    if stage.precision == Some(Precision::Float32) {
        list.push(("precision = \"bfloat16\"".into(), Box::new(|stage| stage.precision = Some(Precision::Bfloat16))));
    }
    if stage.optim != Optim::AdamW8bit {
        list.push(("optim = \"adamw_8bit\"".into(), Box::new(|stage| stage.optim = Optim::AdamW8bit)));
    }
    if stage.gradient_checkpointing != GradientCheckpointing::Offload {
        list.push((
            "gradient_checkpointing = \"offload\"".into(),
            Box::new(|stage| stage.gradient_checkpointing = GradientCheckpointing::Offload),
        ));
    }
    if stage.zero_stage < 2 && !stage.layer_split {
        // Of no use to one device: passed over then.
        list.push(("zero_stage = 2".into(), Box::new(|stage| stage.zero_stage = 2)));
    }
    if !stage.offload && !stage.stochastic_rounding && !stage.layer_split {
        list.push((
            "offload = true with optim = \"adamw\"".into(),
            Box::new(|stage| (stage.offload, stage.optim) = (true, Optim::AdamW)),
        ));
    }
    if stage.zero_stage < 3 && !stage.layer_split {
        list.push(("zero_stage = 3".into(), Box::new(|stage| stage.zero_stage = 3)));
    }
    if devices > 1 && hosts == 1 && !stage.layer_split {
        // A step keeps its micro-batches.
        let accumulated = stage.gradient_accumulation_steps;
        list.push((
            format!(
                "layer_split = true, zero_stage = 0, offload = false with gradient_accumulation_steps = {}",
                accumulated * devices
            ),
            Box::new(move |stage| {
                (stage.layer_split, stage.zero_stage, stage.offload) = (true, 0, false);
                stage.gradient_accumulation_steps = accumulated * devices;
            }),
        ));
    }
    if stage.method == Method::Full {
        list.push(("method = \"lora\"".into(), Box::new(|stage| stage.method = Method::Lora)));
    }
    if matches!(stage.method, Method::Full | Method::Lora) {
        list.push((
            "method = \"qlora\"".into(),
            Box::new(|stage| {
                stage.method = Method::Qlora;
                stage.quantization = Some(Quantization { kind: QuantType::Nf4, double: true, lm_head: false });
            }),
        ));
    }
    if stage.method != Method::Projector && stage.r > 8 {
        list.push(("r = 8".into(), Box::new(|stage| stage.r = 8)));
    }
    let length = stage.model_max_length.unwrap_or(2048);
    if length > 512 {
        list.push((
            format!("model_max_length = {}", length / 2),
            Box::new(move |stage| stage.model_max_length = Some(length / 2)),
        ));
    }
    list
}

/// The first changes, one on top of the other, until the last of the stages has room on each device; those that gain
/// less than a hundredth are passed over.
///
/// # Errors
/// As [`super::estimate`].
pub fn advise(stages: &[StageConfig], needed: u64, facts: &AdapterFacts, room: Room) -> Result<Vec<Advice>> {
    let Room { memory, devices, .. } = room;
    let mut stages = stages.to_vec();
    let Some(stage) = stages.last().cloned() else { return Ok(Vec::new()) };
    let (mut advice, mut bytes) = (Vec::new(), needed);
    for (change, apply) in changes(&stage, room) {
        let mut changed = stages.clone();
        let Some(stage) = changed.last_mut() else { break };
        apply(stage);
        let stage = stage.clone();
        let known = open_last(&changed)?;
        if known.prepared.check_split(&stage, devices).is_err() {
            continue;
        }
        let steps = Steps::of(&stage, &known.prepared, known.found, devices)?;
        // Nor can all be done that is asked of a device: a tensor may be too large for one buffer.
        let told = simulate(&stage, &known.prepared, known.found, &steps, facts, devices);
        let Some(needed) = told.ok().map(|told| told.bytes()).filter(|&needed| needed <= bytes - bytes / 100) else {
            continue;
        };
        (stages, bytes) = (changed, needed);
        advice.push(Advice { change, bytes, fits: bytes <= memory });
        if bytes <= memory {
            break;
        }
    }
    Ok(advice)
}
