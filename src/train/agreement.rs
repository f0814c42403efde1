//! What several hosts agree on before they train, and while they do.

use std::path::Path;

use rayon::prelude::*;
use serde::{Serialize, de::DeserializeOwned};

use super::{checkpoint, config::StageConfig, start::Prepared};
use crate::{
    data::{dataset::Dataset, image::ImageSource},
    error::{Error, Result},
    formats::{HostTensor, peft::Adapter, weights::Weights},
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

/// What must be the same on all hosts before they train: the config and, of what is read from files, as much as takes no
/// time. Whole are the records, the model's settings, an adapter and a projector that the stage starts from; of the
/// weights it is the shapes and the ends, of a checkpoint the same and where it stands, of pictures their sizes.
///
/// # Errors
/// What is wrong with the files.
pub(super) fn alike(
    stage: &StageConfig,
    prepared: &Prepared,
    dataset: &Dataset,
    resumed: Option<&Path>,
) -> Result<Vec<Alike>> {
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
    let model = format!("{:?} {:?}", prepared.config(), prepared.processor(stage)?);
    let mut weights = Digest::default();
    let tensors = names::expected_tensors(prepared.config());
    for (name, shape) in tensors.into_iter().filter(|(name, _)| prepared.folder.has(name)) {
        let stored = prepared.folder.stored(&name)?;
        weights.add(name.as_bytes());
        weights.add(bytemuck::cast_slice(&shape));
        weights.add(&stored.bytes(0..1)?);
        weights.add(&stored.bytes(stored.rows() - 1..stored.rows())?);
    }
    let mut things = vec![
        Alike::setting("config", Digest::of(settings.join("\n").as_bytes())),
        Alike::file("records", records.value()),
        Alike::file("pictures", of_pictures(&dataset.images())?),
        Alike::file("settings of the model", Digest::of(model.as_bytes())),
        Alike::file("weights", weights.value()),
    ];
    if let Some(projector) = &prepared.projector {
        things.push(Alike::file("projector", of_projector(projector)?));
    }
    things.extend(prepared.adapter.as_ref().map(|adapter| Alike::file("adapter", of_adapter(adapter))));
    if let Some(folder) = resumed {
        things.push(Alike::file("checkpoint", checkpoint::digest(folder)?));
    }
    Ok(things)
}

/// The files' sizes: reading them all would take as long as a part of the training.
fn of_pictures(images: &[ImageSource]) -> Result<u64> {
    let size = |image: &ImageSource| match image {
        ImageSource::File(path) => {
            std::fs::metadata(path).map(|found| found.len()).map_err(|error| Error::reading(path, error))
        }
        // A part of the program.
        ImageSource::Memory { .. } => Ok(0),
    };
    let sizes: Vec<u64> = images.par_iter().map(size).collect::<Result<_>>()?;
    Ok(Digest::of(bytemuck::cast_slice(&sizes)))
}

fn of_projector(weights: &Weights) -> Result<u64> {
    let named = weights.names()?.into_iter().map(|stored| (names::canonical(&stored), stored));
    let mut named: Vec<_> = named.filter(|(name, _)| name.starts_with(names::PROJECTOR)).collect();
    named.sort();
    let mut digest = Digest::default();
    for (name, stored) in named {
        let tensor = weights.require(&stored)?;
        digest.add(name.as_bytes());
        digest.add(bytemuck::cast_slice(&tensor.shape));
        digest.add(&tensor.bytes(0..tensor.rows())?);
    }
    Ok(digest.value())
}

fn of_adapter(adapter: &Adapter) -> u64 {
    let mut digest = Digest::default();
    let Adapter { r, lora_alpha, lora_dropout, use_rslora, modules, saved, unties_head } = adapter;
    digest.add(format!("{:?}", (r, lora_alpha, lora_dropout, use_rslora, unties_head)).as_bytes());
    let mut add = |name: &str, scale: f64, tensors: &[Option<&HostTensor>]| {
        digest.add(name.as_bytes());
        digest.add(&scale.to_le_bytes());
        for tensor in tensors {
            digest.add(tensor.map_or(&[], |tensor| bytemuck::cast_slice(&tensor.shape)));
            digest.add(tensor.map_or(&[], |tensor| bytemuck::cast_slice(&tensor.data)));
        }
    };
    for (name, lora) in modules {
        let tensors = [Some(&lora.lora_a), Some(&lora.lora_b), lora.magnitude.as_ref(), lora.bias.as_ref()];
        add(name, lora.scale, &tensors);
    }
    saved.iter().for_each(|(name, tensor)| add(name, 1.0, &[Some(tensor)]));
    digest.value()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::peft::LoraWeights;

    #[test]
    fn adapters_differ_in_any_value_and_in_what_they_are_for() {
        let tensor = |values: &[f32]| HostTensor::new(vec![1, values.len()], values.to_vec());
        let module = LoraWeights::new(tensor(&[1.0, 2.0, 3.0]), tensor(&[4.0]), 2.0);
        let mut adapter = Adapter::new(1, 2.0, 0.0, false);
        adapter.modules.insert("q_proj".into(), module.clone());
        let digest = of_adapter(&adapter);
        assert_eq!(of_adapter(&adapter.clone()), digest);
        let changes: [&dyn Fn(&mut Adapter); 6] = [
            &|adapter| adapter.lora_alpha = 3.0,
            &|adapter| adapter.modules.get_mut("q_proj").unwrap().lora_a.data[1] = 2.5,
            &|adapter| adapter.modules.get_mut("q_proj").unwrap().scale = 1.0,
            &|adapter| adapter.modules.get_mut("q_proj").unwrap().magnitude = Some(tensor(&[1.0])),
            &|adapter| adapter.modules.get_mut("q_proj").unwrap().bias = Some(tensor(&[1.0])),
            &|adapter| drop(adapter.saved.insert("lm_head.weight".into(), tensor(&[1.0]))),
        ];
        let mut seen = vec![digest];
        for change in changes {
            let mut other = adapter.clone();
            change(&mut other);
            let digest = of_adapter(&other);
            assert!(!seen.contains(&digest), "{other:?}");
            seen.push(digest);
        }
    }
}
