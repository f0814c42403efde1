//! What was measured on a device, kept on disk: one JSON file for each adapter and driver. It holds for the driver's and
//! the program's version that it was made with.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::Outcome;
use crate::{
    error::{Error, Result},
    formats::atomic::write_file,
    gpu::{AdapterFacts, Question},
    ops::tuning,
};

/// One line of a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Entry {
    op: String,
    sizes: [usize; 3],
    /// The winner, and the way that the program's rule takes.
    way: String,
    rule: String,
    seconds: f64,
    rule_seconds: f64,
}

/// A device's results.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Table {
    pub adapter: String,
    pub backend: String,
    /// With its version.
    pub driver: String,
    /// Of the program.
    pub version: String,
    /// A day.
    pub date: String,
    results: Vec<Entry>,
}

/// What there is for a device.
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    Nothing,
    Table(Table),
    /// Of another driver or program: what differs.
    Outdated(String),
    /// No such file: why.
    Broken(String),
}

/// The version that a table holds for: kernels change with every commit.
fn version() -> String {
    let version = env!("CARGO_PKG_VERSION");
    option_env!("WGPU_LLAVA_COMMIT").map_or_else(|| version.to_owned(), |commit| format!("{version} {commit}"))
}

/// A device's name as a part of file names: letters and digits of adapter, backend and driver, without their versions.
fn slug(facts: &AdapterFacts) -> String {
    let driver = facts.driver.split_whitespace().next().unwrap_or_default();
    let text = format!("{} {} {driver}", facts.name, facts.backend).to_lowercase();
    let words = text.split(|letter: char| !letter.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join("-").chars().take(120).collect()
}

/// Where a device's table is.
pub fn path(folder: &Path, facts: &AdapterFacts) -> PathBuf {
    folder.join(slug(facts)).with_extension("json")
}

/// Where it is noted that a device's owner has been told of tuning.
pub fn told(folder: &Path, facts: &AdapterFacts) -> PathBuf {
    folder.join(slug(facts)).with_extension("told")
}

/// Reads a device's table.
pub fn read(folder: &Path, facts: &AdapterFacts) -> Found {
    let bytes = match fs::read(path(folder, facts)) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Found::Nothing,
        Err(error) => return Found::Broken(error.to_string()),
    };
    let table: Table = match serde_json::from_slice(&bytes) {
        Ok(table) => table,
        Err(error) => return Found::Broken(error.to_string()),
    };
    let now = Table::new(facts, &table.date);
    let pairs = [
        ("adapter", &table.adapter, &now.adapter),
        ("backend", &table.backend, &now.backend),
        ("driver", &table.driver, &now.driver),
        ("wgpu-llava", &table.version, &now.version),
    ];
    match pairs.iter().find(|(_, then, now)| then != now) {
        Some((what, then, now)) => Found::Outdated(format!("{what} was {then}, and is {now}")),
        None => Found::Table(table),
    }
}

impl Table {
    /// An empty one, made today.
    pub fn new(facts: &AdapterFacts, date: &str) -> Self {
        Self {
            adapter: facts.name.clone(),
            backend: facts.backend.clone(),
            driver: facts.driver.clone(),
            version: version(),
            date: date.to_owned(),
            results: Vec::new(),
        }
    }

    pub fn len(&self) -> usize {
        self.results.len()
    }

    pub fn is_empty(&self) -> bool {
        self.results.is_empty()
    }

    /// Adds what was measured, in the place of what was known of the same questions.
    pub fn add(&mut self, outcomes: &[Outcome]) {
        let old = std::mem::take(&mut self.results).into_iter();
        let new = outcomes.iter().map(|outcome| Entry {
            op: outcome.question.op.to_owned(),
            sizes: outcome.question.sizes,
            way: outcome.winner.to_owned(),
            rule: outcome.rule.to_owned(),
            seconds: outcome.seconds,
            rule_seconds: outcome.rule_seconds,
        });
        let by_question: BTreeMap<_, _> =
            old.chain(new).map(|entry| ((entry.op.clone(), entry.sizes), entry)).collect();
        self.results = by_question.into_values().collect();
    }

    /// What a device takes of it; what the program does not know is left out.
    pub fn choices(&self) -> HashMap<Question, &'static str> {
        let choice = |entry: &Entry| {
            let (op, way) = tuning::names(&entry.op, &entry.way)?;
            Some((Question { op, sizes: entry.sizes }, way))
        };
        self.results.iter().filter_map(choice).collect()
    }

    /// Writes it for a device, whole or not at all.
    ///
    /// # Errors
    /// `Failed`: the folder cannot be made or written to.
    pub fn write(&self, folder: &Path, facts: &AdapterFacts) -> Result<()> {
        let path = path(folder, facts);
        fs::create_dir_all(folder).map_err(|source| Error::writing(&path, source))?;
        let text = serde_json::to_string_pretty(self)
            .map_err(|error| Error::failed("cannot write the tuner's results as JSON").caused_by(error))?;
        write_file(&path, format!("{text}\n").as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(op: &'static str, sizes: [usize; 3], winner: &'static str) -> Outcome {
        let question = Question { op, sizes };
        let (seconds, rule_seconds) = (0.5, 1.0);
        Outcome { question, rule: "tiles_64", winner, seconds, rule_seconds, ways: 2, wrong: Vec::new() }
    }

    fn filled(facts: &AdapterFacts) -> Table {
        let mut table = Table::new(facts, "2026-01-02");
        table.add(&[outcome("matmul.nt", [8, 96, 64], "tiles_32"), outcome("matmul.tn", [8, 96, 64], "tiles_64")]);
        table
    }

    #[test]
    fn a_table_comes_back_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, facts) = (dir.path().join("a/b"), AdapterFacts::of_a_usual_gpu());
        assert_eq!(read(&folder, &facts), Found::Nothing);
        let mut table = filled(&facts);
        table.write(&folder, &facts).unwrap();
        assert_eq!(read(&folder, &facts), Found::Table(table.clone()));
        let question = Question { op: "matmul.nt", sizes: [8, 96, 64] };
        assert_eq!(table.choices()[&question], "tiles_32");
        // Measured again, and another.
        table.add(&[outcome("matmul.nt", [8, 96, 64], "rows"), outcome("nf4_matmul.nn", [1, 2, 8], "scratch")]);
        assert_eq!((table.len(), table.choices()[&question]), (3, "rows"));
    }

    #[test]
    fn a_table_of_another_driver_or_program_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let old = AdapterFacts { driver: "driver 1.2".to_owned(), ..AdapterFacts::of_a_usual_gpu() };
        filled(&old).write(dir.path(), &old).unwrap();
        let new = AdapterFacts { driver: "driver 1.3".to_owned(), ..old.clone() };
        let Found::Outdated(what) = read(dir.path(), &new) else { panic!("another driver's table is taken") };
        assert_eq!(what, "driver was driver 1.2, and is driver 1.3");
        // Another driver's file, not another version's of it.
        let other = AdapterFacts { driver: "other 1.2".to_owned(), ..old.clone() };
        assert_eq!(read(dir.path(), &other), Found::Nothing);
        let table = Table { version: "0.0.0".to_owned(), ..filled(&old) };
        table.write(dir.path(), &old).unwrap();
        assert!(matches!(read(dir.path(), &old), Found::Outdated(what) if what.starts_with("wgpu-llava was 0.0.0")));
    }

    #[test]
    fn a_broken_file_is_told_and_what_is_unknown_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let facts = AdapterFacts::of_a_usual_gpu();
        let whole = serde_json::to_string(&filled(&facts)).unwrap();
        for text in
            ["", "{", "[]", "{\"adapter\": 3}", &whole[..whole.len() - 9], &whole.replace("[8,96,64]", "[-8,96]")]
        {
            fs::write(path(dir.path(), &facts), text).unwrap();
            assert!(matches!(read(dir.path(), &facts), Found::Broken(_)), "{text}");
        }
        fs::write(path(dir.path(), &facts), whole.replace("tiles_32", "cubes").replace("matmul.tn", "matmul.xy"))
            .unwrap();
        let Found::Table(table) = read(dir.path(), &facts) else { panic!("a table") };
        assert!(table.choices().is_empty() && table.len() == 2);
        // A folder in the file's place.
        fs::remove_file(path(dir.path(), &facts)).unwrap();
        fs::create_dir(path(dir.path(), &facts)).unwrap();
        assert!(matches!(read(dir.path(), &facts), Found::Broken(_)));
    }

    #[test]
    fn names_of_devices_become_names_of_files() {
        let facts = AdapterFacts {
            name: "AMD Radeon RX 7900 XTX (RADV NAVI31) /../x".to_owned(),
            driver: "radv Mesa 26.1.6".to_owned(),
            ..AdapterFacts::of_a_usual_gpu()
        };
        assert_eq!(slug(&facts), "amd-radeon-rx-7900-xtx-radv-navi31-x-vulkan-radv");
    }
}
