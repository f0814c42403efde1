//! What several hosts agree on before they train, and while they do.

use super::{config::StageConfig, start::Prepared};
use crate::{
    data::dataset::Dataset,
    error::Result,
    hosts::{Alike, Digest, Hosts},
    models::names,
};

/// Whether it is so on any host.
pub(super) fn any(here: bool, hosts: &mut dyn Hosts) -> Result<bool> {
    Ok(hosts.gather(&[u8::from(here)])?.iter().flatten().any(|&there| there != 0))
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
