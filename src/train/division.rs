//! How many micro-batches a step has: what the config says on so many devices; of a run that goes on on others, as many as
//! before.

use std::path::Path;

use super::{checkpoint::TrainerState, config::StageConfig};
use crate::error::{Error, Result};

/// Devices that a note tells the micro-batches of one by one.
const TOLD: usize = 8;

/// A step's micro-batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Division {
    /// On all devices together.
    pub micro_batches: usize,
    /// The devices with which the config gives as many.
    pub devices: usize,
    /// Whether the config would give another number on the devices that are here.
    pub kept: bool,
}

impl Division {
    /// On so many devices of all hosts; `resumed` is the checkpoint's folder and what it tells. Devices come and go, but
    /// the same config has to make the same steps.
    ///
    /// # Errors
    /// `Usage`: the config was changed, and makes other steps whatever the devices.
    pub fn of(stage: &StageConfig, devices: usize, resumed: Option<(&Path, &TrainerState)>) -> Result<Self> {
        let on = |devices| stage.gradient_accumulation_steps.saturating_mul(stage.ranks(devices));
        let (micro_batches, same) = (on(devices), Self { micro_batches: on(devices), devices, kept: false });
        let Some((folder, before)) = resumed else { return Ok(same) };
        let begun_on = before.devices.or(before.shares.as_ref().map(super::team::Shares::devices));
        match before.micro_batches {
            // Those written before there were several devices do not say.
            0 => Ok(same),
            as_before if as_before == micro_batches => Ok(same),
            as_before => match begun_on.filter(|&begun_on| on(begun_on) == as_before) {
                Some(devices) => Ok(Self { micro_batches: as_before, devices, kept: true }),
                None => Err(Error::usage(format!(
                    "{} was trained with {as_before} micro-batches a step, and now there are {micro_batches}",
                    folder.display()
                ))
                .hint(
                    "leave gradient_accumulation_steps and layer_split as they were: on other devices \
                     a step keeps its micro-batches",
                )
                .hint(
                    "or choose gradient_accumulation_steps so that, times the devices, it is as before; \
                     under layer_split it counts alone",
                )),
            },
        }
    }

    /// What is to be said of a step that is kept; `dealt` has the device of each micro-batch, of so many that compute some
    /// of their own.
    pub fn note(&self, dealt: &[usize], devices: usize) -> Option<String> {
        let keeps = match self.micro_batches {
            1 => "a step keeps its one micro-batch".to_owned(),
            count => format!("a step keeps its {count} micro-batches"),
        };
        let of = |device: usize| dealt.iter().filter(|of| **of == device).count();
        let counts: Vec<usize> = (0..devices).map(of).collect();
        let told = match &counts[..] {
            [] | [_] => keeps,
            [most @ .., last] if devices <= TOLD => {
                let most: Vec<String> = most.iter().map(usize::to_string).collect();
                format!("{keeps}, of which {devices} devices compute {} and {last}", most.join(", "))
            }
            counts => {
                let (least, most) = (counts.iter().min()?, counts.iter().max()?);
                let each = if least == most { most.to_string() } else { format!("{least} to {most}") };
                format!("{keeps}, of which {devices} devices compute {each} each")
            }
        };
        self.kept.then_some(told)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::team::Shares;

    #[test]
    fn what_is_kept_is_told() {
        let note = |micro_batches, devices| {
            let division = Division { micro_batches, devices: 4, kept: true };
            division.note(&Shares::new(vec!["a".into(); devices]).deal(micro_batches), devices).unwrap()
        };
        assert_eq!(note(4, 3), "a step keeps its 4 micro-batches, of which 3 devices compute 2, 1 and 1");
        assert_eq!(note(4, 1), "a step keeps its 4 micro-batches");
        assert_eq!(note(1, 2), "a step keeps its one micro-batch, of which 2 devices compute 1 and 0");
        assert_eq!(note(40, 16), "a step keeps its 40 micro-batches, of which 16 devices compute 2 to 3 each");
        assert_eq!(note(32, 16), "a step keeps its 32 micro-batches, of which 16 devices compute 2 each");
        let as_configured = Division { micro_batches: 4, devices: 4, kept: false };
        assert_eq!(as_configured.note(&[0, 1, 2, 3], 4), None);
    }
}
