//! Whether all hosts are about to train the same thing.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Hosts, listed};
use crate::error::{Error, ErrorKind, Result};

/// Ranks that a message names before it only counts them.
const NAMED: usize = 8;

const VERSION: &str = "version of this program";

/// Something that must be the same on every host: a name for messages, and a digest of what it stands for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alike {
    name: String,
    digest: u64,
    /// Whether a difference is wrong use, not bad data.
    usage: bool,
}

impl Alike {
    /// What comes from the command line and the config.
    pub fn setting(name: impl Into<String>, digest: u64) -> Self {
        Self { name: name.into(), digest, usage: true }
    }

    /// What comes from files: records, weights.
    pub fn file(name: impl Into<String>, digest: u64) -> Self {
        Self { name: name.into(), digest, usage: false }
    }
}

/// 64 bits of a content, the same in every build of this program. Finds accidents, not forgeries.
#[derive(Clone, Copy, Debug, Default)]
pub struct Digest(u64);

impl Digest {
    pub fn of(bytes: &[u8]) -> u64 {
        let mut digest = Self::default();
        digest.add(bytes);
        digest.value()
    }

    /// The same bytes in other pieces are another content.
    pub fn add(&mut self, bytes: &[u8]) {
        self.mix(bytes.len() as u64);
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            self.mix(u64::from_le_bytes(*word));
        }
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        self.mix(u64::from_le_bytes(last));
    }

    pub fn value(self) -> u64 {
        self.0
    }

    /// One-to-one for each word and each state, so that a single difference is never lost.
    fn mix(&mut self, word: u64) {
        let mixed = (self.0 ^ word).wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = mixed ^ (mixed >> 29);
    }
}

/// What one rank says of itself.
#[derive(Serialize, Deserialize)]
struct Statement {
    host: String,
    things: Vec<Alike>,
}

/// Whether all ranks have the same of each thing, and run the same version of this program. Collective; every rank gets
/// the same answer.
///
/// # Errors
/// [`ErrorKind::Usage`] where settings differ, [`ErrorKind::Data`] where only files do; the message says which things,
/// and on which ranks.
pub fn same_on_all(hosts: &mut dyn Hosts, things: &[Alike]) -> Result<()> {
    let version = Alike::setting(VERSION, Digest::of(env!("CARGO_PKG_VERSION").as_bytes()));
    let things = [&[version], things].concat();
    let mine = Statement { host: hosts.name().to_owned(), things };
    let failed = |error| Error::failed("cannot tell the other hosts what this one has").caused_by(error);
    let gathered = hosts.gather(&serde_json::to_vec(&mine).map_err(failed)?)?;
    // Another version may say it in other words.
    let strange = |_| Statement { host: "?".into(), things: Vec::new() };
    compare(&gathered.iter().map(|said| serde_json::from_slice(said).unwrap_or_else(strange)).collect::<Vec<_>>())
}

fn compare(ranks: &[Statement]) -> Result<()> {
    let mut names: Vec<&str> = Vec::new();
    let mut usage = false;
    for thing in ranks.iter().flat_map(|rank| &rank.things) {
        if !names.contains(&thing.name.as_str()) {
            names.push(&thing.name);
        }
    }
    let mut differences = Vec::new();
    let mut differing = Vec::new();
    for name in names {
        let find = |rank: &Statement| rank.things.iter().find(|thing| thing.name == name).cloned();
        let values: Vec<Option<Alike>> = ranks.iter().map(find).collect();
        if let Some((odd, others)) = split(&values) {
            let verb = if odd.len() == 1 { "differs" } else { "differ" };
            differences.push(format!("{name} ({} {verb} from {})", told(&odd, ranks), told(&others, ranks)));
            usage |= values.iter().flatten().any(|thing| thing.usage);
            differing.push(name);
        }
    }
    if differences.is_empty() {
        return Ok(());
    }
    let kind = if usage { ErrorKind::Usage } else { ErrorKind::Data };
    let error = Error::new(kind, format!("the hosts do not have the same {}", listed(&differences)));
    Err(if differing.contains(&VERSION) {
        error.hint("install the same version on every host")
    } else {
        error.hint(
            "start every rank with the same arguments, and give every host the same files: in one shared folder, or \
             as equal copies",
        )
    })
}

/// The ranks that have not what most have, and those that do; None where all have the same. Of equally many, those with
/// the lowest rank among them count as most.
fn split(values: &[Option<Alike>]) -> Option<(Vec<usize>, Vec<usize>)> {
    let mut groups: BTreeMap<Option<u64>, Vec<usize>> = BTreeMap::new();
    for (rank, value) in values.iter().enumerate() {
        groups.entry(value.as_ref().map(|thing| thing.digest)).or_default().push(rank);
    }
    if groups.len() < 2 {
        return None;
    }
    let most = groups.into_values().max_by_key(|ranks| (ranks.len(), std::cmp::Reverse(ranks.first().copied())))?;
    Some(((0..values.len()).filter(|rank| !most.contains(rank)).collect(), most))
}

/// `rank 1 (node2)`, `ranks 0 (node1) and 2 (node3)`.
fn told(ranks: &[usize], all: &[Statement]) -> String {
    let mut items: Vec<String> = ranks.iter().take(NAMED).map(|&rank| format!("{rank} ({})", all[rank].host)).collect();
    if ranks.len() > NAMED {
        items.push(format!("{} more", ranks.len() - NAMED));
    }
    format!("{} {}", if ranks.len() == 1 { "rank" } else { "ranks" }, listed(&items))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hosts::{Alone, threads};

    fn rank(host: &str, config: u64, weights: u64) -> Statement {
        Statement { host: host.into(), things: vec![Alike::setting("config", config), Alike::file("weights", weights)] }
    }

    #[test]
    fn a_difference_is_named_with_its_ranks() {
        assert!(compare(&[rank("a", 1, 2), rank("b", 1, 2)]).is_ok());
        let error = compare(&[rank("a", 1, 2), rank("b", 1, 3)]).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Data);
        assert_eq!(error.message, "the hosts do not have the same weights (rank 1 (b) differs from rank 0 (a))");
        assert_eq!(error.hints.len(), 1);
        let error = compare(&[rank("a", 1, 2), rank("b", 3, 3), rank("c", 3, 2)]).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Usage);
        assert_eq!(
            error.message,
            "the hosts do not have the same config (rank 0 (a) differs from ranks 1 (b) and 2 (c)) and weights (rank 1 \
             (b) differs from ranks 0 (a) and 2 (c))"
        );
    }

    #[test]
    fn what_one_rank_does_not_have_at_all_differs() {
        let less = Statement { host: "b".into(), things: vec![Alike::setting("config", 1)] };
        let error = compare(&[rank("a", 1, 0), less]).unwrap_err();
        assert!(error.message.contains("weights (rank 1 (b) differs"), "{}", error.message);
    }

    #[test]
    fn many_ranks_are_counted() {
        let ranks: Vec<Statement> = (0..40).map(|i| rank(&format!("n{i}"), u64::from(i % 2 == 1), 0)).collect();
        let message = compare(&ranks).unwrap_err().message;
        assert!(message.contains("15 (n15) and 12 more differ from ranks 0 (n0), 2 (n2)"), "{message}");
    }

    #[test]
    fn every_rank_gets_the_same_answer() {
        let answers = threads::on(3, |hosts| {
            let weights = if hosts.rank() == 2 { 8 } else { 7 };
            let answer = same_on_all(hosts, &[Alike::setting("config", 1), Alike::file("weights", weights)]);
            hosts.finish().unwrap();
            answer.unwrap_err().message
        });
        assert!(answers[0].contains("weights (rank 2 (thread 2) differs from ranks 0"), "{}", answers[0]);
        assert!(answers.iter().all(|answer| *answer == answers[0]));
        assert!(same_on_all(&mut Alone, &[Alike::file("weights", 3)]).is_ok());
    }

    #[test]
    fn digests_tell_contents_apart() {
        let contents: [&[u8]; 8] = [b"", b"\0", b"\0\0", b"a", b"b", b"12345678", b"123456789", b"12345678\0"];
        for (i, one) in contents.iter().enumerate() {
            for other in &contents[i + 1..] {
                assert_ne!(Digest::of(one), Digest::of(other), "{one:?} {other:?}");
            }
        }
        let (mut ab, mut ba) = (Digest::default(), Digest::default());
        ab.add(b"a");
        ab.add(b"b");
        ba.add(b"b");
        ba.add(b"a");
        assert_ne!(ab.value(), ba.value());
        // Written down: hosts compare what different builds have computed.
        assert_eq!(Digest::of(b"wgpu-llava"), 0x2AF5_536E_B4C9_6ECE);
    }
}
