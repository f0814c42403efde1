//! `wgpu-llava estimate`: what a run will need, by kind, before anything is loaded, and whether it fits.

use std::{env, fmt::Write, time::SystemTime};

use serde_json::{Value, json};

use super::{
    args::{EstimateArgs, GlobalArgs, TrainArgs},
    backend, config as resolve, report,
};
use crate::{
    error::{Error, Result},
    gpu::{Account, AdapterFacts, AdapterOptions, Gpu, Holdings},
    ops::roof,
    train::{
        config::{RunConfig, StageConfig},
        estimate::{Advice, Cluster, Estimate, Rates, Room, StepTime, advise, estimate},
        optimizer::updating_rate,
        report::{duration, grouped},
        team::adding_rate,
    },
};

pub fn run(args: &EstimateArgs, global: &GlobalArgs) -> Result<()> {
    let working_dir =
        env::current_dir().map_err(|error| Error::failed("the current folder is gone").caused_by(error))?;
    let run = TrainArgs { run: args.run.clone(), ..TrainArgs::default() };
    let config = resolve::run_config(&run, global, &working_dir, SystemTime::now())?;
    let gpu = open_quietly(&config, global)?;
    let facts = gpu.as_ref().map_or_else(AdapterFacts::of_a_usual_gpu, |gpu| gpu.facts().clone());
    let devices = args.devices.map_or(config.devices.len().max(1), usize::from);
    // As in a run: devices that are a host's processor share its memory, and those that are one adapter share that.
    let named = || config.devices.iter().filter(|device| Some(*device) == config.devices.first()).count();
    let sharing = match (gpu.as_ref().is_some_and(Gpu::is_cpu), args.devices) {
        (true, _) => devices / usize::from(args.hosts),
        (false, None) => named(),
        (false, Some(_)) => 1,
    };
    let available = gpu.as_ref().and_then(Gpu::available_memory).map(|memory| memory / sharing.max(1) as u64);
    let memory = args.memory.or(available);
    if args.hosts > 1 && config.stages.iter().any(|stage| stage.layer_split) {
        return Err(
            Error::usage("layer_split = true is for the devices of one host").hint("leave --hosts out, or layer_split")
        );
    }
    let estimates = estimate(&config.stages, &facts, devices)?;
    if !devices.is_multiple_of(args.hosts.into()) {
        return Err(Error::usage(format!(
            "{} cannot be shared out to --hosts {}",
            plural(devices, "device"),
            args.hosts
        ))
        .hint("--devices counts those of all hosts, each of which has equally many"));
    }
    let rates = rates(args, gpu.as_ref(), devices)?;
    let mut rows = Vec::new();
    for (index, estimate) in estimates.iter().enumerate() {
        let stages = &config.stages[..=index];
        let advice = match memory {
            Some(memory) if estimate.bytes() > memory => {
                let room = Room { memory, devices, hosts: args.hosts.into() };
                advise(stages, estimate.bytes(), &facts, room)?
            }
            _ => Vec::new(),
        };
        rows.push(Row { stage: &config.stages[index], estimate, advice });
    }
    let device = gpu.as_ref().map(|gpu| gpu.facts().name.as_str());
    let context = Context { device, memory, rates, hosts: args.hosts.into() };
    if args.json {
        let stages: Vec<Value> = rows.iter().map(|row| row.json(&context)).collect();
        let data = json!({"device": device, "memory": memory, "devices": devices, "hosts": args.hosts,
            "flops_per_second": rates.map(|rates| rates.flops), "stages": stages});
        return report::print_data(&format!("{data}\n"));
    }
    report::print_data(&rows.iter().map(|row| row.text(&context)).collect::<String>())
}

/// How fast the machine is that is asked about: as said, else as this one was measured.
fn rates(args: &EstimateArgs, gpu: Option<&Gpu>, devices: usize) -> Result<Option<Rates>> {
    let flops = match (args.tflops, gpu) {
        (Some(tflops), _) => tflops * 1e12,
        // Devices that are the processor itself share it.
        (None, Some(gpu)) => roof::products(gpu)? / if gpu.is_cpu() { devices as f64 } else { 1.0 },
        (None, None) => return Ok(None),
    };
    let (down, up) = match (args.link, gpu) {
        (Some(link), _) => (link * 1e9, link * 1e9),
        (None, Some(gpu)) => roof::links(gpu)?,
        (None, None) => return Ok(None),
    };
    let (adding, updating) = match args.host_bandwidth {
        Some(bandwidth) => Rates::of_host(bandwidth * 1e9),
        None => (adding_rate(), updating_rate()),
    };
    let on_host = args.link.is_none() && gpu.is_some_and(Gpu::is_cpu);
    Ok(Some(Rates { flops, down, up, adding, updating, network: args.network * 1e9, on_host }))
}

/// The adapter that the run would take; none where there is none, since memory can be told without.
///
/// # Errors
/// An adapter that was asked for and is not there.
fn open_quietly(config: &RunConfig, global: &GlobalArgs) -> Result<Option<Gpu>> {
    let device = global.device.clone().or(config.devices.first().map(ToString::to_string));
    let asked = device.is_some() || global.backend.is_some();
    let options = AdapterOptions { device, backend: backend(global).map(str::to_owned), ..AdapterOptions::default() };
    match Gpu::open(&options) {
        Ok(gpu) => Ok(Some(gpu)),
        Err(error) if asked => Err(error),
        Err(_) => Ok(None),
    }
}

/// The machine that is asked about.
struct Context<'a> {
    device: Option<&'a str>,
    memory: Option<u64>,
    rates: Option<Rates>,
    hosts: usize,
}

struct Row<'a> {
    stage: &'a StageConfig,
    estimate: &'a Estimate,
    advice: Vec<Advice>,
}

impl Row<'_> {
    /// What the memory is for, in the order of the table.
    fn kinds(&self) -> Vec<(&'static str, u64)> {
        self.kinds_of(&self.estimate.peak)
    }

    fn kinds_of(&self, peak: &Holdings) -> Vec<(&'static str, u64)> {
        let mut kinds: Vec<_> = Account::ALL.iter().map(|&account| (account.name(), peak.of(account))).collect();
        kinds.extend([("reserve", peak.free()), ("staging", self.estimate.staging)]);
        kinds
    }

    /// Of a whole step on each device, and its parts.
    fn time(&self, context: &Context<'_>) -> Option<StepTime> {
        let Estimate { traffic, devices, .. } = self.estimate;
        let cluster = Cluster { devices: *devices, hosts: context.hosts, parts: self.estimate.parts.len() };
        let micro_batches = self.stage.gradient_accumulation_steps as f64;
        context.rates.map(|rates| traffic.step_time(self.flops(), micro_batches, cluster, &rates))
    }

    /// Of each host's memory.
    fn host_bytes(&self, context: &Context<'_>) -> u64 {
        self.estimate.traffic.host_bytes(self.estimate.devices / context.hosts)
    }

    /// Of a whole step on each device: the one that was counted may have fewer micro-batches.
    fn flops(&self) -> f64 {
        let micro = self.stage.gradient_accumulation_steps as f64 / self.estimate.micro_batches.max(1) as f64;
        self.estimate.flops as f64 * micro
    }

    fn json(&self, context: &Context<'_>) -> Value {
        let Estimate { title, method, model, model_found, parameters, trainable, batch, traffic, .. } = self.estimate;
        let by_kind = |peak: &Holdings| -> serde_json::Map<String, Value> {
            self.kinds_of(peak).into_iter().map(|(name, bytes)| (name.to_owned(), json!(bytes))).collect()
        };
        let bytes = by_kind(&self.estimate.peak);
        let parts: Vec<Value> = (self.estimate.parts.iter())
            .map(|part| json!({"device_bytes": part.peak.held, "bytes": by_kind(&part.peak)}))
            .collect();
        let advice: Vec<Value> =
            self.advice.iter().map(|a| json!({"change": a.change, "bytes": a.bytes, "fits": a.fits})).collect();
        json!({
            "stage": title, "method": method.as_str(), "model": model, "model_found": model_found,
            "parameters": parameters, "trainable_parameters": trainable,
            "batch": {"sequences": batch.sequences, "tokens": batch.tokens, "targets": batch.targets,
                "pictures": batch.pictures, "from_data": batch.from_data},
            "device_bytes": self.estimate.peak.held, "total_bytes": self.estimate.bytes(), "bytes": bytes,
            "parts": parts, "host_bytes": self.host_bytes(context),
            "flops_per_step": self.flops(), "seconds_per_step": self.time(context).map(|time| time.seconds()),
            "seconds": self.time(context).map(|time| json!({
                "compute": time.compute, "waiting": time.waiting, "weights": time.weights,
            })),
            "traffic": {"gradients_down": traffic.gradients_down, "sums_up": traffic.sums_up,
                "weights_down": traffic.weights_down, "weights_up": traffic.weights_up,
                "layers_up": traffic.layers_up, "crossing": traffic.crossing},
            "fits": context.memory.map(|memory| self.estimate.bytes() <= memory),
            "changes": advice,
        })
    }

    fn text(&self, context: &Context<'_>) -> String {
        let Estimate { title, method, model, model_found, parameters, trainable, batch, .. } = self.estimate;
        let shapes = if *model_found { "" } else { " (not here: the shapes of the released model)" };
        let mut text = format!("{title}: {method} on {model}{shapes}\n");
        let mut row = |name: &str, value: String| {
            // Writing to a string does not fail.
            let _ = writeln!(text, "  {name:<12} {value}");
        };
        row("parameters", format!("{}, of which {} train", grouped(*parameters), grouped(*trainable)));
        let made_up = if batch.from_data { "" } else { ", made up: the data is not here" };
        row(
            "micro-batch",
            format!(
                "{} positions in {}, {} supervised, {}{made_up}",
                grouped(batch.tokens as u64),
                plural(batch.sequences, "sequence"),
                grouped(batch.targets as u64),
                plural(batch.pictures, "picture"),
            ),
        );
        let (ranks, micro_batches) = (self.stage.ranks(self.estimate.devices), self.stage.gradient_accumulation_steps);
        let each = if ranks > 1 { format!(" on each of {ranks} devices") } else { String::new() };
        let records = grouped((self.stage.global_batch() * ranks) as u64);
        row("a step's", format!("{micro_batches} x that{each}: {records} records"));
        for (name, bytes) in self.kinds() {
            row(name, format!("{:>9}", gigabytes(bytes)));
        }
        let total = self.estimate.bytes();
        let fits = match (context.memory, context.device) {
            (Some(memory), device) => format!(
                "{} {} of {}",
                if total <= memory { "fits into the" } else { "does not fit into the" },
                gigabytes(memory),
                device.unwrap_or("that device"),
            ),
            (None, Some(device)) => format!("{device} does not tell its memory: say it with --memory"),
            (None, None) => "no device was found: say its memory with --memory".to_owned(),
        };
        row("total", format!("{:>9}  {fits}", gigabytes(total)));
        let parts = &self.estimate.parts;
        for (at, part) in parts.iter().enumerate().filter(|_| parts.len() > 1) {
            let of = |account| gigabytes(part.peak.of(account));
            let (weights, activations) = (of(Account::Weights), of(Account::Activations));
            let bytes = gigabytes(part.peak.held + self.estimate.staging);
            let text = format!("{bytes:>9}  with its layers' {weights} of weights, and activations of {activations}");
            row(&format!("device {}", at + 1), text);
        }
        let host = self.host_bytes(context);
        if host > 0 {
            let each = if context.hosts > 1 { "each host" } else { "the host" };
            row(&format!("on {each}"), format!("{:>9}  at most, for all of its devices together", gigabytes(host)));
        }
        let time = match self.time(context) {
            Some(time) => format!(
                ", {} at the {:.3} TFLOP/s that products reach{}",
                duration(time.compute),
                context.rates.map_or(0.0, |rates| rates.flops) / 1e12,
                if context.device.is_some() { " here" } else { "" },
            ),
            None => String::new(),
        };
        let each = if self.estimate.devices > 1 { " on each device" } else { "" };
        row("a step", format!("{:.3} TFLOP{each}{time}", self.flops() / 1e12));
        let traffic = &self.estimate.traffic;
        let crossings = traffic.crossings(self.stage.gradient_accumulation_steps as f64, self.estimate.parts.len());
        let down = traffic.gradients_down + traffic.weights_down + crossings;
        let up = traffic.sums_up + traffic.weights_up + traffic.layers_up + crossings;
        if down + up > 0 {
            let time = self.time(context).map_or_else(String::new, |time| {
                let more = time.waiting + time.weights;
                format!(", {} more than the computation", duration(more))
            });
            row("moved", format!("{} down, {} up on each device{time}", gigabytes(down), gigabytes(up)));
        }
        for (index, advice) in self.advice.iter().enumerate() {
            let fits = if advice.fits { ": fits" } else { "" };
            let how = if index == 0 { "change" } else { "and" };
            row(how, format!("{:>9}  with {}{fits}", gigabytes(advice.bytes), advice.change));
        }
        if self.advice.last().is_some_and(|last| !last.fits) {
            row("", "no change of the config makes it fit: a smaller model, or a larger card".to_owned());
        }
        text
    }
}

/// 1e9 bytes, as cards and papers count.
pub(super) fn gigabytes(bytes: u64) -> String {
    let gigabytes = bytes as f64 / 1e9;
    if gigabytes < 0.1 { format!("{:.4} GB", gigabytes) } else { format!("{gigabytes:.2} GB") }
}

fn plural(count: usize, what: &str) -> String {
    format!("{} {what}{}", grouped(count as u64), if count == 1 { "" } else { "s" })
}
