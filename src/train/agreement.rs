//! What several hosts agree on before they train, and while they do.

use serde::{Serialize, de::DeserializeOwned};

use super::{config::StageConfig, start::Prepared};
use crate::{
    data::dataset::Dataset,
    error::{Error, Result},
    hosts::{Alike, Digest, Hosts},
    models::names,
};

/// What every host tells, in their order. Numbers that are not finite do not survive.
///
/// # Errors
/// A host that does not answer, or in another way.
pub(super) fn told_by_all<T: Serialize + DeserializeOwned>(mine: &T, hosts: &mut dyn Hosts) -> Result<Vec<T>> {
    let told = hosts.gather(&serde_json::to_vec(mine).map_err(strange)?)?;
    told.iter().map(|told| serde_json::from_slice(told).map_err(strange)).collect()
}

/// What the first host finds out, for all.
///
/// # Errors
/// Those of `find`, on the first; a host that does not answer.
pub(super) fn told_by_first<T: Serialize + DeserializeOwned>(
    find: impl FnOnce() -> Result<T>,
    hosts: &mut dyn Hosts,
) -> Result<T> {
    let mut told = Vec::new();
    if hosts.rank() == 0 {
        told = serde_json::to_vec(&find()?).map_err(strange)?;
    }
    hosts.broadcast(0, &mut told)?;
    serde_json::from_slice(&told).map_err(strange)
}

fn strange(error: serde_json::Error) -> Error {
    Error::failed("hosts do not understand each other").caused_by(error)
}

/// Whether it is so on any host.
pub(super) fn any(here: bool, hosts: &mut dyn Hosts) -> Result<bool> {
    Ok(told_by_all(&here, hosts)?.contains(&true))
}

/// What must be the same on all hosts: settings, records, and of the weights the shapes and the ends.
pub(super) fn alike(stage: &StageConfig, prepared: &Prepared, dataset: &Dataset) -> Result<Vec<Alike>> {
    let settings: Vec<String> = (stage.values.iter())
        .filter(|setting| !matches!(setting.key, "output_dir" | "logging_steps" | "save_steps" | "save_total_limit"))
        .map(|setting| format!("{} = {}", setting.key, setting.value))
        .collect();
    let mut records = Digest::default();
    for index in 0..dataset.len() {
        let sample = dataset.sample(index)?;
        records.add(bytemuck::cast_slice(&sample.tokens));
        records.add(bytemuck::cast_slice(&sample.labels));
    }
    let mut weights = Digest::default();
    let tensors = names::expected_tensors(prepared.config());
    for (name, shape) in tensors.into_iter().filter(|(name, _)| prepared.folder.has(name)) {
        let stored = prepared.folder.stored(&name)?;
        weights.add(name.as_bytes());
        weights.add(bytemuck::cast_slice(&shape));
        weights.add(&stored.bytes(0..1)?);
        weights.add(&stored.bytes(stored.rows() - 1..stored.rows())?);
    }
    Ok(vec![
        Alike::setting("config", Digest::of(settings.join("\n").as_bytes())),
        Alike::file("records", records.value()),
        Alike::file("weights", weights.value()),
    ])
}
