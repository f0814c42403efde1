//! Whether weights fit a config: one error that lists what is missing, of another shape, or belongs to nothing.

use std::collections::BTreeSet;

use super::ModelFolder;
use crate::{
    error::{Error, Result, nearest},
    formats::weights::Weights,
    models::names::{self, NamedShape},
};

/// How many lines of each kind a report of wrong tensors shows.
const SHOWN: usize = 6;

impl ModelFolder {
    /// Compares every tensor with the config. Nothing is read of a tensor but its shape.
    pub(super) fn check_fit(&self) -> Result<()> {
        let mut needed = names::expected_tensors(&self.config);
        let mut optional = names::unused_vision_tensors(&self.config);
        let identity = self.config.llava().map(names::projector_identity_tensors).unwrap_or_default();
        // On disk a single linear is two in transformers' layout, and one everywhere else.
        if self.has_second_linear() {
            needed.extend(identity)
        } else {
            optional.extend(identity)
        }
        needed.retain(|(tensor, _)| self.has_projector || !tensor.starts_with(names::PROJECTOR));
        self.compare(&needed, &names::unused_vision_tensors(&self.config))
    }

    fn compare(&self, needed: &[NamedShape], optional: &[NamedShape]) -> Result<()> {
        let (mut missing, mut misshapen) = (Vec::new(), Vec::new());
        for (number, (tensor, shape)) in needed.iter().chain(optional).enumerate() {
            match self.has(tensor) {
                true => {
                    let stored = self.stored(tensor)?;
                    if stored.shape != *shape {
                        misshapen.push((tensor, shape, stored));
                    }
                }
                false if number < needed.len() => missing.push((tensor, shape)),
                false => {}
            }
        }
        let known: BTreeSet<&str> = needed.iter().chain(optional).map(|(tensor, _)| tensor.as_str()).collect();
        let extra: Vec<&str> =
            self.tensors.keys().map(String::as_str).filter(|tensor| !known.contains(tensor)).collect();
        if missing.is_empty() && misshapen.is_empty() && extra.is_empty() {
            return Ok(());
        }
        let mut lines = vec![format!("{}: the weights do not fit config.json", self.name)];
        let more = |lines: &mut Vec<String>, count: usize, what: &str| {
            if count > SHOWN {
                lines.push(format!("  … {} more {what}", count - SHOWN));
            }
        };
        for (tensor, shape) in missing.iter().take(SHOWN) {
            let near =
                nearest(tensor, extra.iter().copied()).map(|near| format!("; the nearest unknown one is {near}"));
            lines.push(format!("  missing: {tensor} {shape:?}{}", near.unwrap_or_default()));
        }
        more(&mut lines, missing.len(), "are missing");
        for (tensor, shape, stored) in misshapen.iter().take(SHOWN) {
            let (file, found) = (stored.file, &stored.shape);
            lines.push(format!("  another shape: {tensor} is {found:?} in {file}, config.json asks for {shape:?}"));
        }
        more(&mut lines, misshapen.len(), "are of another shape");
        for tensor in extra.iter().take(SHOWN) {
            let near = nearest(tensor, known.iter().copied()).map(|near| format!("; the nearest known one is {near}"));
            let stored = self.tensors.get(*tensor).map_or(*tensor, |at| at.name.as_str());
            lines.push(format!("  unknown: {stored}{}", near.unwrap_or_default()));
        }
        more(&mut lines, extra.len(), "are unknown");
        Err(Error::data(lines.join("\n")))
    }

    /// A `linear` projector on disk is the first layer followed by an identity; nothing else is one.
    pub(super) fn check_identity(&self) -> Result<()> {
        let Some(llava) = self.config.llava().filter(|_| self.has_second_linear()) else { return Ok(()) };
        for (name, shape) in names::projector_identity_tensors(llava) {
            let tensor = self.tensor(&name)?;
            if !(tensor.is_identity() || shape.len() == 1 && tensor.data.iter().all(|&value| value == 0.0)) {
                let message = format!("{}: projector_hidden_act is `linear`, but {name} is not an identity", self.name);
                return Err(
                    Error::data(message).hint("a linear projector is linear_1 followed by an identity without bias")
                );
            }
        }
        Ok(())
    }

    fn has_second_linear(&self) -> bool {
        let made = self.parts.iter().any(|part| matches!(part, Weights::Random(_)));
        self.has_projector && !self.original && !made
    }
}
