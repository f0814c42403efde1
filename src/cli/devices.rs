//! `wgpu-llava devices`: every adapter that can be seen, and which are taken.

use std::fmt::Write;

use super::{
    args::{DevicesArgs, GlobalArgs},
    backend, report, tuning,
};
use crate::{
    error::{Error, Result},
    gpu::{AdapterFacts, AdapterOptions, Gpu, find_adapter, list_adapters},
};
use serde_json::json;

pub fn run(args: &DevicesArgs, global: &GlobalArgs) -> Result<()> {
    let adapters = list_adapters(backend(global))?;
    if adapters.is_empty() {
        // Opening one says what is missing and where to get it.
        let options = AdapterOptions { backend: backend(global).map(str::to_owned), ..AdapterOptions::default() };
        return Gpu::open(&options).map(|_| ());
    }
    // Those of `--device`, each as often as it is named; else the first.
    let taken = match global.devices() {
        None => vec![0],
        Some(devices) => {
            (devices.iter().map(|device| find_adapter(&device.to_string(), &adapters))).collect::<Result<_>>()?
        }
    };
    let times = |adapter: &AdapterFacts| taken.iter().filter(|&&index| index == adapter.index).count();
    if args.json {
        let line = |adapter: &AdapterFacts| {
            let mut line = serde_json::to_value(adapter)?;
            line["tuned"] = json!(tuning::known(adapter).map(|(date, shapes)| json!({"date": date, "shapes": shapes})));
            line["taken"] = json!(times(adapter));
            Ok(format!("{line}\n"))
        };
        let lines = adapters.iter().map(line).collect::<Result<String, serde_json::Error>>();
        let lines = lines.map_err(|error| Error::failed("cannot write the adapters as JSON").caused_by(error))?;
        return report::print_data(&lines);
    }
    let several = "`train` on several: devices = [0, 1] in the config; an adapter may be named more than once\n";
    let text = |adapter: &AdapterFacts| {
        let taken = match (times(adapter), &global.device) {
            (0, _) => String::new(),
            (_, None) => "  (taken unless --device says otherwise)".into(),
            (1, _) => "  (taken)".into(),
            (times, _) => format!("  (taken {times} times, each with its share of the memory)"),
        };
        describe(adapter, &taken)
    };
    report::print_data(&(adapters.iter().map(text).collect::<String>() + several))
}

fn describe(adapter: &AdapterFacts, taken: &str) -> String {
    let limits = &adapter.limits;
    let mut text = format!("{}: {}{taken}\n", adapter.index, adapter.name);
    let features = if adapter.features.is_empty() { "none of note".into() } else { adapter.features.join(", ") };
    let subgroups = match (limits.subgroup_min_size, limits.subgroup_max_size) {
        (least, most) if least == most => most.to_string(),
        (least, most) => format!("{least} to {most}"),
    };
    let tuned = tuning::known(adapter)
        .map_or("no (see --tune)".into(), |(date, shapes)| format!("on {date}, for {shapes} shapes"));
    let rows = [
        ("type", adapter.kind.clone()),
        ("backend", adapter.backend.clone()),
        ("driver", adapter.driver.clone()),
        ("memory", adapter.memory.map_or("not told".into(), bytes)),
        ("features", features),
        ("largest buffer", bytes(limits.max_buffer_size)),
        ("largest binding", bytes(limits.max_storage_buffer_binding_size)),
        ("workgroup memory", bytes(limits.max_compute_workgroup_storage_size.into())),
        ("workgroup size", limits.max_compute_invocations_per_workgroup.to_string()),
        ("subgroup size", subgroups),
        ("tuned", tuned),
    ];
    for (name, value) in rows {
        // Writing to a string does not fail.
        let _ = writeln!(text, "   {name:16}  {value}");
    }
    text
}

fn bytes(count: u64) -> String {
    match count {
        0..0x400 => format!("{count} bytes"),
        0x400..0x10_0000 => format!("{} KiB", count >> 10),
        0x10_0000..0x4000_0000 => format!("{} MiB", count >> 20),
        _ if count >= 1 << 60 => "no limit".into(),
        _ => format!("{:.1} GiB", count as f64 / f64::from(1u32 << 30)),
    }
}
