//! `--tune`, the results that a device opens with, and what a card's owner is told who has none.

use std::{
    env,
    ffi::OsString,
    fs,
    io::IsTerminal,
    path::{Path, PathBuf},
    time::Instant,
};

use super::{
    bench::today,
    ui::{Ui, shown},
};
use crate::{
    error::{Error, Result},
    gpu::{AdapterFacts, Gpu, Launches},
    train::events::{Event, Observer},
    tune::{self, Found, Options, Outcome, Table, table},
};

/// Where results are kept; none where the environment names no home.
fn folder() -> Option<PathBuf> {
    cache(|name| env::var_os(name), env::home_dir(), env::consts::OS)
}

/// The user's cache folder on a system, and this program's in it.
fn cache(get: impl Fn(&str) -> Option<OsString>, home: Option<PathBuf>, system: &str) -> Option<PathBuf> {
    // Relative ones are to be ignored.
    let absolute = |name: &str| get(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let home = home.filter(|home| home.is_absolute());
    let caches = absolute("XDG_CACHE_HOME").or_else(|| match system {
        "windows" => absolute("LOCALAPPDATA").or(home.map(|home| home.join("AppData").join("Local"))),
        "macos" => home.map(|home| home.join("Library").join("Caches")),
        _ => home.map(|home| home.join(".cache")),
    });
    caches.map(|caches| caches.join("wgpu-llava").join("tuned"))
}

/// What a device's results are, and their day; for `devices`.
pub fn known(facts: &AdapterFacts) -> Option<(String, usize)> {
    match table::read(&folder()?, facts) {
        Found::Table(table) => Some((table.date.clone(), table.len())),
        Found::Nothing | Found::Outdated(_) | Found::Broken(_) => None,
    }
}

/// Lets a device take what was measured on it before.
pub fn take_known(gpu: &Gpu, ui: &mut Ui) {
    let Some(folder) = folder() else { return };
    let facts = gpu.facts();
    let path = table::path(&folder, facts);
    match table::read(&folder, facts) {
        Found::Nothing => {}
        Found::Table(table) => {
            ui.line(&format!("  kernels as --tune found them on {}", table.date));
            facts.choices.set(table.choices());
        }
        Found::Outdated(what) => {
            ui.line(&format!("  what --tune found before is dropped: {what}"));
            // Where it cannot be removed it is told again.
            let _ = fs::remove_file(path);
        }
        Found::Broken(why) => {
            ui.line(&format!("  warning: {} is ignored: {why}", shown(&path)));
            ui.line("  --tune writes it anew");
        }
    }
}

/// With `asked`, measures what a run launches on the first of its devices, which `rehearse` finds out, and keeps the results,
/// for those of the others too that are such a one; else tells the owner of a GPU once that it could be done.
///
/// # Errors
/// As `rehearse`; whatever fails on the device; `Failed`: there is no place for the results.
pub fn prepare(gpus: &[Gpu], asked: bool, ui: &mut Ui, rehearse: impl FnOnce() -> Result<Launches>) -> Result<()> {
    let gpu = &gpus[0];
    if asked {
        tune(gpu, ui, rehearse)?;
        gpus[1..].iter().for_each(|other| take_known(other, ui));
        return Ok(());
    }
    let seen = std::io::stderr().is_terminal() && !ui.is_quiet();
    match folder().filter(|_| is_offered(gpu.facts(), seen)) {
        Some(folder) => offer(gpu, &folder, ui, rehearse),
        None => Ok(()),
    }
}

fn tune(gpu: &Gpu, ui: &mut Ui, rehearse: impl FnOnce() -> Result<Launches>) -> Result<()> {
    let folder = folder().ok_or_else(|| {
        Error::failed("--tune has no place for its results: no cache folder is known")
            .hint("set XDG_CACHE_HOME to a folder, or leave --tune out")
    })?;
    // What is measured shall not be lost for want of a place.
    fs::create_dir_all(&folder).map_err(|source| {
        Error::writing(&folder, source)
            .hint("set XDG_CACHE_HOME to a folder that can be written to, or leave --tune out")
    })?;
    let launches = rehearse()?;
    let begun = Instant::now();
    let what = "shapes tuned";
    let outcomes = tune::tune(gpu, &launches, &Options::default(), &mut |done, total| {
        ui.event(Event::Progress { what, done, total });
    })?;
    let facts = gpu.facts();
    let mut table = match table::read(&folder, facts) {
        Found::Table(table) => table,
        Found::Nothing | Found::Outdated(_) | Found::Broken(_) => Table::new(facts, &today()),
    };
    table.date = today();
    table.add(&outcomes);
    table.write(&folder, facts)?;
    facts.choices.set(table.choices());
    let seconds = begun.elapsed().as_secs_f64();
    ui.line(&text(&outcomes));
    ui.line(&format!("  measured in {seconds:.1} s, kept in {}", shown(&table::path(&folder, facts))));
    Ok(())
}

/// What won where, a line each.
fn text(outcomes: &[Outcome]) -> String {
    let mut rows = vec![["shape", "default", "winner", "gain"].map(str::to_owned)];
    for outcome in outcomes {
        let sizes = outcome.question.sizes.map(|size| size.to_string()).join("x");
        let gain = match outcome.winner == outcome.rule {
            true => String::new(),
            false => format!("{:.2}x", outcome.gain()),
        };
        let shape = format!("{} {sizes}", outcome.question.op);
        rows.push([shape, outcome.rule.to_owned(), outcome.winner.to_owned(), gain]);
    }
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths = [width(0), width(1), width(2)];
    let line = |row: &[String; 4]| {
        let [shape, default, winner, gain] = row;
        let [a, b, c] = widths;
        format!("  {shape:a$}  {default:b$}  {winner:c$}  {gain}").trim_end().to_owned()
    };
    let mut lines: Vec<String> = rows.iter().map(line).collect();
    for outcome in outcomes.iter().filter(|outcome| !outcome.wrong.is_empty()) {
        let (op, wrong) = (outcome.question.op, outcome.wrong.join(", "));
        lines.push(format!(
            "  warning: {op}: wrong results by {wrong} on this driver, not used where another way serves"
        ));
    }
    lines.join("\n")
}

/// Of a question, about.
const SECONDS: f64 = 0.5;

/// Tells of `--tune`, unless that was done before, or it cannot be noted that it was.
fn offer(gpu: &Gpu, folder: &Path, ui: &mut Ui, rehearse: impl FnOnce() -> Result<Launches>) -> Result<()> {
    let facts = gpu.facts();
    let told = table::told(folder, facts);
    if told.exists() || table::read(folder, facts) != Found::Nothing || note(&told).is_err() {
        return Ok(());
    }
    let seconds = (SECONDS * rehearse()?.questions().count() as f64).ceil();
    ui.line(&format!(
        "  not tuned for this card: the same command with --tune first measures which kernels are the fastest on it, \
         and keeps that; takes about {seconds:.0} s"
    ));
    Ok(())
}

/// Not to processors, whose kernels were measured already, nor to who reads no terminal.
fn is_offered(facts: &AdapterFacts, seen: bool) -> bool {
    seen && !facts.is_cpu && facts.choices.is_empty()
}

/// Leaves an empty file.
fn note(path: &Path) -> std::io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)?;
    fs::write(path, "")
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        sync::{Arc, Mutex},
    };

    use super::*;
    use crate::{
        gpu::Question,
        ops::matmul::{Layout, product},
        tensor::Tensor,
    };

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_card_without_results_is_told_of_once() {
        let dir = tempfile::tempdir().unwrap();
        let gpu = Gpu::counting(AdapterFacts::of_a_usual_gpu());
        let lines = Lines::default();
        let mut ui = Ui::lines(lines.clone(), false);
        let rehearse = || {
            let counting = Gpu::counting(gpu.facts().clone());
            for n in [3, 70] {
                product(Layout::Nt, &Tensor::empty(&counting, &[9, 8]), &Tensor::empty(&counting, &[n, 8]));
            }
            Ok(counting.launches())
        };
        // Where nothing can be noted nothing is said, lest it be said every time.
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        offer(&gpu, &file, &mut ui, || panic!("not told, and rehearsed")).unwrap();
        offer(&gpu, &dir.path().join("cache"), &mut ui, rehearse).unwrap();
        offer(&gpu, &dir.path().join("cache"), &mut ui, || panic!("told twice")).unwrap();
        let told = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        assert!(told.starts_with("  not tuned for this card") && told.ends_with("takes about 1 s\n"), "{told}");
        assert_eq!(told.lines().count(), 1);
    }

    #[test]
    fn results_lie_in_the_users_cache() {
        let cache = |set: &[(&str, &str)], home: &str, system| {
            let set: Vec<(String, String)> = set.iter().map(|(a, b)| (a.to_string(), b.to_string())).collect();
            let get = move |name: &str| set.iter().find(|(known, _)| known == name).map(|(_, value)| value.into());
            cache(get, Some(home.into()), system)
        };
        let of = |caches: &str| Some(Path::new(caches).join("wgpu-llava").join("tuned"));
        assert_eq!(cache(&[], "/home/x", "linux"), of("/home/x/.cache"));
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/c")], "/home/x", "macos"), of("/c"));
        assert_eq!(cache(&[("XDG_CACHE_HOME", "c")], "/home/x", "macos"), of("/home/x/Library/Caches"));
        assert_eq!(cache(&[("LOCALAPPDATA", "/l")], "/home/x", "windows"), of("/l"));
        assert_eq!(cache(&[], "", "linux"), None);
    }

    #[test]
    fn a_table_tells_what_won() {
        let question = Question { op: "matmul.nt", sizes: [8, 96, 64] };
        let won = Outcome {
            question,
            rule: "tiles_32",
            winner: "rows",
            seconds: 1.0,
            rule_seconds: 1.5,
            ways: 3,
            wrong: vec!["tiles_64"],
        };
        let kept = Outcome { winner: "tiles_32", seconds: 1.5, wrong: Vec::new(), ..won.clone() };
        let text = text(&[won, kept]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "  shape              default   winner    gain");
        assert_eq!(lines[1], "  matmul.nt 8x96x64  tiles_32  rows      1.50x");
        assert_eq!(lines[2], "  matmul.nt 8x96x64  tiles_32  tiles_32");
        assert!(lines[3].contains("wrong results by tiles_64"), "{text}");
    }

    #[test]
    fn only_who_can_read_it_and_has_a_gpu_is_told() {
        let gpu = AdapterFacts::of_a_usual_gpu();
        assert!(is_offered(&gpu, true) && !is_offered(&gpu, false));
        assert!(!is_offered(&AdapterFacts { is_cpu: true, ..gpu.clone() }, true));
        gpu.choices.set([(Question { op: "matmul.nt", sizes: [1, 2, 3] }, "rows")].into());
        assert!(!is_offered(&gpu, true));
    }
}
