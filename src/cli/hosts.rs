//! Whether a launcher has started this process as one of several, and what it left of the machine to it.

use std::{env, fs};

use super::ui::Ui;
use crate::{
    error::Result,
    hosts::{self, Hosts, Launch},
};

/// Where launchers say how many processes they have started, the innermost first: mpirun may itself run under srun.
/// SLURM_NTASKS is not among them: a batch script has it too, and what that starts is one process.
const COUNTS: [&str; 4] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"];

/// Set by launchers that give no number of processes, to each of them.
const RANK: &str = "PMIX_RANK";

/// Joins the other ranks if a launcher has started several; alone otherwise.
///
/// # Errors
/// As [`hosts::join`].
pub fn open(ui: &mut Ui) -> Result<Box<dyn Hosts>> {
    let hosts = hosts::join(launched(|name| env::var(name).ok()))?;
    if hosts.count() > 1 {
        ui.line(&format!("rank {} of {} on {}", hosts.rank(), hosts.count(), hosts.name()));
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        if let Some(note) = bound(&read("/proc/self/status"), &read("/sys/devices/system/cpu/online")) {
            ui.line(&note);
        }
    }
    Ok(hosts)
}

/// What the environment says; None for one process.
fn launched(variable: impl Fn(&str) -> Option<String>) -> Option<Launch> {
    let number = |name| variable(name)?.trim().parse::<usize>().ok();
    for name in COUNTS {
        if let Some(ranks) = number(name) {
            return (ranks > 1).then(|| Launch { ranks: Some(ranks), variable: name.into() });
        }
    }
    number(RANK).map(|_| Launch { ranks: None, variable: RANK.into() })
}

/// A warning where this process may use half of the cores or fewer: mpirun binds two ranks to one core each, wherever
/// they are. Both texts are Linux's; elsewhere they are empty.
fn bound(status: &str, online: &str) -> Option<String> {
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let (allowed, online) = (cores(allowed)?, cores(online)?);
    (2 * allowed <= online).then(|| {
        format!(
            "  this rank may use {allowed} of {online} cores: with mpirun add --bind-to none, with srun --cpus-per-task"
        )
    })
}

/// How many numbers are in a list as `0-3,8`.
fn cores(list: &str) -> Option<usize> {
    let count = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(last.parse::<usize>().ok()?.checked_sub(first.parse().ok()?)?.saturating_add(1))
    };
    list.trim().split(',').map(count).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Option<(Option<usize>, String)> {
        let find = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string());
        launched(find).map(|launch| (launch.ranks, launch.variable))
    }

    #[test]
    fn launchers_are_known_by_what_they_set() {
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[("OMPI_COMM_WORLD_SIZE", "4"), ("PMIX_RANK", "0")]), Some((Some(4), COUNTS[0].into())));
        assert_eq!(of(&[("PMI_SIZE", "2"), ("PMI_RANK", "1")]), Some((Some(2), "PMI_SIZE".into())));
        assert_eq!(of(&[("SLURM_STEP_NUM_TASKS", "8"), ("SLURM_PROCID", "3")]), Some((Some(8), COUNTS[3].into())));
        assert_eq!(of(&[("PMIX_RANK", "3")]), Some((None, "PMIX_RANK".into())));
        // A batch script's own environment.
        assert_eq!(of(&[("SLURM_NTASKS", "8"), ("SLURM_PROCID", "0")]), None);
        // The launcher nearest to the process decides.
        assert_eq!(of(&[("OMPI_COMM_WORLD_SIZE", "1"), ("SLURM_STEP_NUM_TASKS", "8")]), None);
        assert_eq!(of(&[("PMI_SIZE", "many")]), None);
    }

    #[test]
    fn few_cores_are_told() {
        let status =
            |list: &str| format!("Name:\tx\nCpus_allowed:\tff\nCpus_allowed_list:\t{list}\nMems_allowed:\t1\n");
        let note = bound(&status("3"), "0-15\n").unwrap();
        assert!(note.contains("1 of 16 cores") && note.contains("--bind-to none"), "{note}");
        assert!(bound(&status("0-3,8-11"), "0-15\n").unwrap().contains("8 of 16"));
        assert_eq!(bound(&status("0-8"), "0-15\n"), None);
        assert_eq!(bound(&status("0"), "0\n"), None);
        assert_eq!(bound("", ""), None);
        assert_eq!(bound(&status("5-3"), "0-15"), None);
    }
}
