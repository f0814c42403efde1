//! Whether the devices of a run have room for a stage, before anything is loaded.

use std::collections::{HashMap, hash_map::Entry};

use super::{Estimate, Room, Steps, advise, simulate, simulate_on};
use crate::{
    error::{Error, ErrorKind, Result},
    gpu::{AdapterFacts, Gpu, Launches},
    train::{config::StageConfig, start::Prepared, team::Devices},
};

/// Refuses a stage that one of this host's devices has no room for, of so many on all of so many hosts. Begins to
/// compile the kernels of one that has.
///
/// # Errors
/// `Memory`, with the first changes that would make it fit.
pub fn check(
    stage: &StageConfig,
    prepared: &Prepared,
    steps: &Steps,
    devices: &Devices,
    (total, hosts): (usize, usize),
) -> Result<()> {
    if stage.layer_split {
        let launches = check_parts(stage, prepared, steps, devices)?;
        devices.gpus.iter().zip(launches).for_each(|(gpu, launches)| gpu.compile_ahead(launches));
        return Ok(());
    }
    // The same adapter needs the same again.
    let mut known: HashMap<usize, Launches> = HashMap::new();
    for gpu in &devices.gpus {
        let (Some(memory), facts) = (devices.memory_of(gpu), gpu.facts()) else { continue };
        let launches = match known.entry(facts.index) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => {
                let estimate = simulate(stage, prepared, true, steps, facts, total)?;
                let needed = estimate.bytes();
                if needed > memory {
                    return Err(refusal(stage, prepared, needed, facts, Room { memory, devices: total, hosts })?);
                }
                place.insert(estimate.launches)
            }
        };
        gpu.compile_ahead(launches.clone());
    }
    Ok(())
}

/// As [`check`], of a layer split over these devices; the kernels of each.
fn check_parts(stage: &StageConfig, prepared: &Prepared, steps: &Steps, devices: &Devices) -> Result<Vec<Launches>> {
    let facts: Vec<&AdapterFacts> = devices.gpus.iter().map(Gpu::facts).collect();
    let Estimate { parts, staging, .. } = simulate_on(stage, prepared, true, steps, &facts, facts.len())?;
    for (at, (gpu, part)) in devices.gpus.iter().zip(&parts).enumerate() {
        let needed = part.peak.held + staging;
        if let Some(memory) = devices.memory_of(gpu).filter(|&memory| needed > memory) {
            let room = Room { memory, devices: parts.len(), hosts: 1 };
            let error = refusal(stage, prepared, needed, gpu.facts(), room)?;
            let message = format!("{} (device {} of {})", error.message, at + 1, parts.len());
            return Err(Error { message, ..error });
        }
    }
    Ok(parts.into_iter().map(|part| part.launches).collect())
}

/// Says that a stage needs too much, and what would make it fit.
fn refusal(stage: &StageConfig, prepared: &Prepared, needed: u64, facts: &AdapterFacts, room: Room) -> Result<Error> {
    let gigabytes = |bytes: u64| format!("{:.2} GB", bytes as f64 / 1e9);
    let message = format!(
        "{}: {} on {} needs {}, and {} has {} free",
        stage.title(),
        stage.method,
        prepared.folder.name(),
        gigabytes(needed),
        facts.name,
        gigabytes(room.memory)
    );
    let mut error = Error::new(ErrorKind::Memory, message);
    // What a stage starts from that another leaves is not opened a second time.
    if stage.model_name_or_path.is_some() {
        for (index, advice) in advise(std::slice::from_ref(stage), needed, facts, room)?.iter().enumerate() {
            let and = if index == 0 { "" } else { "and " };
            error = error.hint(format!("{and}{}: {}", advice.change, gigabytes(advice.bytes)));
        }
    }
    Ok(error.hint("`wgpu-llava estimate` tells what the memory is for; --force starts it all the same"))
}
