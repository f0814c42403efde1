//! What people see of a run: a header a stage, a progress bar on a terminal, lines where stderr is none.

use crate::train::{
    events::{Event, Observer, StageHeader, StepMetrics},
    report::{duration, grouped},
};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use owo_colors::OwoColorize;
use std::{
    io::{IsTerminal, Write},
    path::Path,
    time::{Duration, Instant},
};

/// Without a terminal, a line at least this often, and otherwise twenty a stage.
const QUIET_SPELL: Duration = Duration::from_secs(30);
const LINES_PER_STAGE: u64 = 20;

/// A path as a person in the current folder would write it.
pub fn shown(path: &Path) -> String {
    let here = std::env::current_dir().ok().and_then(|here| path.strip_prefix(here).ok().map(Path::to_path_buf));
    here.unwrap_or_else(|| path.to_path_buf()).display().to_string()
}

enum Output {
    Nothing,
    /// One line after another.
    Lines(Box<dyn Write + Send>),
    /// A bar below the lines; none while nothing is under way.
    Bar(Option<ProgressBar>),
}

/// An [`Observer`] that writes to stderr.
pub struct Ui {
    output: Output,
    verbose: bool,
    stage: Option<Stage>,
    /// What [`Event::Progress`] is about, and the part last told.
    progress: Option<(String, usize)>,
    bytes: Option<Transfer>,
}

/// Bytes on their way.
struct Transfer {
    started: Instant,
    told: Instant,
    /// What was there at the start, of an earlier run.
    first: u64,
    /// Without a bar: the file last named.
    file: String,
}

/// The stage under way.
struct Stage {
    started: Instant,
    first_step: u64,
    told: Instant,
    told_step: u64,
    /// Of the steps since the last line: sum of losses, and how many.
    losses: (f64, u64),
    /// Exponential mean, for the bar.
    smooth: f64,
}

impl Ui {
    /// A bar where stderr is a terminal, lines where it is none, nothing with `quiet`.
    pub fn new(quiet: bool, verbose: bool) -> Self {
        let output = match (quiet, std::io::stderr().is_terminal()) {
            (true, _) => Output::Nothing,
            (false, true) => Output::Bar(None),
            (false, false) => Output::Lines(Box::new(anstream::stderr())),
        };
        Self { output, verbose, stage: None, progress: None, bytes: None }
    }

    /// Lines into `writer`.
    pub fn lines(writer: impl Write + Send + 'static, verbose: bool) -> Self {
        Self { output: Output::Lines(Box::new(writer)), verbose, stage: None, progress: None, bytes: None }
    }

    pub fn is_quiet(&self) -> bool {
        matches!(self.output, Output::Nothing)
    }

    /// One line, above the bar where there is one. That nobody can read it any more is no reason to stop training.
    pub fn line(&mut self, text: &str) {
        match &mut self.output {
            Output::Nothing => {}
            Output::Lines(writer) => {
                let _ = writeln!(writer, "{text}");
            }
            Output::Bar(Some(bar)) => bar.suspend(|| {
                let _ = writeln!(anstream::stderr(), "{text}");
            }),
            Output::Bar(None) => {
                let _ = writeln!(anstream::stderr(), "{text}");
            }
        }
    }

    /// `done` of `total` bytes are there; `file` is under way. A bar, or a line for each file and now and then.
    pub fn bytes(&mut self, file: &str, done: u64, total: u64) {
        let now = Instant::now();
        if self.bytes.is_none() {
            self.new_bar(total, done);
            if let Output::Bar(Some(bar)) = &self.output {
                let template =
                    "  {bar:24.cyan/dim} {bytes} of {total_bytes}  {binary_bytes_per_sec}  {eta} left  {msg}";
                let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
                bar.set_style(style.progress_chars("━━─"));
                bar.reset_eta();
            }
        }
        let transfer =
            self.bytes.get_or_insert_with(|| Transfer { started: now, told: now, first: done, file: String::new() });
        if let Output::Bar(Some(bar)) = &self.output {
            bar.set_position(done);
            if transfer.file != file {
                transfer.file = file.to_owned();
                bar.set_message(transfer.file.clone());
            }
        } else if transfer.file != file || transfer.told.elapsed() >= QUIET_SPELL {
            let seconds = now.duration_since(transfer.started).as_secs_f64();
            let speed = done.saturating_sub(transfer.first) as f64 / seconds.max(1e-3);
            let speed = if seconds < 1.0 { String::new() } else { format!(", {}/s", HumanBytes(speed as u64)) };
            (transfer.told, transfer.file) = (now, file.to_owned());
            self.line(&format!("  fetching {file}: {} of {}{speed}", HumanBytes(done), HumanBytes(total)));
        }
        if done >= total {
            self.end_bytes();
        }
    }

    /// No more bytes come, for now.
    pub fn end_bytes(&mut self) {
        if self.bytes.take().is_some() {
            self.end_bar();
        }
    }

    fn stage_start(&mut self, header: &StageHeader) {
        let now = Instant::now();
        let first_step = header.first_step;
        self.stage =
            Some(Stage { started: now, first_step, told: now, told_step: 0, losses: (0.0, 0), smooth: f64::NAN });
        let title = format!("stage {}", header.name);
        self.line(&format!("\n{} · {} on {}", title.bold(), header.method, header.model));
        self.line(&format!(
            "  trains {} of {} parameters",
            grouped(header.trainable_parameters),
            grouped(header.total_parameters)
        ));
        self.line(&format!(
            "  {} records, {} steps of {}",
            grouped(header.records as u64),
            grouped(header.total_steps),
            grouped(header.batch as u64)
        ));
        if first_step > 0 {
            self.line(&format!("  goes on after step {}", grouped(first_step)));
        }
        self.line(&format!("  writes to {}", shown(&header.output_dir)));
        self.end_bar();
        self.new_bar(header.total_steps, first_step);
    }

    fn new_bar(&mut self, length: u64, position: u64) {
        if let Output::Bar(bar) = &mut self.output {
            let style = ProgressStyle::with_template("  {bar:24.cyan/dim} {pos}/{len}  {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            *bar = Some(ProgressBar::new(length).with_position(position).with_style(style.progress_chars("━━─")));
        }
    }

    fn end_bar(&mut self) {
        if let Output::Bar(bar) = &mut self.output
            && let Some(bar) = bar.take()
        {
            bar.finish_and_clear();
        }
    }

    fn step(&mut self, metrics: &StepMetrics, total: u64) {
        if matches!(self.output, Output::Bar(None)) {
            self.new_bar(total, metrics.step);
        }
        let Some(stage) = &mut self.stage else { return };
        stage.losses = (stage.losses.0 + metrics.loss, stage.losses.1 + 1);
        stage.smooth = if stage.smooth.is_finite() { 0.9 * stage.smooth + 0.1 * metrics.loss } else { metrics.loss };
        let done = metrics.step.saturating_sub(stage.first_step).max(1);
        let left = total.saturating_sub(metrics.step);
        let eta = duration(stage.started.elapsed().as_secs_f64() / done as f64 * left as f64);
        let speed = format!("{} tokens/s", grouped(metrics.tokens_per_second.max(0.0) as u64));
        if let Output::Bar(Some(bar)) = &self.output {
            bar.set_position(metrics.step);
            bar.set_message(format!("loss {:.4}  {speed}  {eta} left", stage.smooth));
            return;
        }
        let due = metrics.step == stage.first_step + 1
            || left == 0
            || self.verbose
            || metrics.step - stage.told_step.min(metrics.step) >= (total / LINES_PER_STAGE).max(1)
            || stage.told.elapsed() >= QUIET_SPELL;
        if due {
            let loss = stage.losses.0 / stage.losses.1 as f64;
            (stage.told, stage.told_step, stage.losses) = (Instant::now(), metrics.step, (0.0, 0));
            let width = total.to_string().len();
            self.line(&format!(
                "  step {:>width$}/{total}  loss {loss:.4}  grad {:.3}  lr {:.2e}  {speed}  {eta} left",
                metrics.step, metrics.grad_norm, metrics.learning_rate
            ));
        }
    }

    fn progress(&mut self, what: &str, done: usize, total: usize) {
        let new = self.progress.as_ref().is_none_or(|(known, _)| known != what);
        if new {
            self.progress = Some((what.to_string(), 0));
            // In the place of a stage's own bar, which comes back with the next step.
            self.end_bar();
            self.new_bar(total as u64, 0);
        }
        if let Output::Bar(Some(bar)) = &self.output {
            bar.set_position(done as u64);
            bar.set_message(what.to_string());
        } else if let Some((_, told)) = &mut self.progress
            && done * 4 / total.max(1) > *told
        {
            *told = done * 4 / total.max(1);
            self.line(&format!("  {what}: {} of {}", grouped(done as u64), grouped(total as u64)));
        }
        if done >= total {
            self.progress = None;
            self.end_bar();
        }
    }
}

impl Observer for Ui {
    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::Note(text) => self.line(&format!("  {text}")),
            Event::Progress { what, done, total } => self.progress(what, done, total),
            Event::StageStart(header) => self.stage_start(header),
            Event::Step(metrics, total) => self.step(metrics, total),
            Event::Saved(path) => self.line(&format!("  saved {}", shown(path))),
            Event::StageEnd { name, output, seconds } => {
                self.end_bar();
                let smooth = self.stage.take().map(|stage| stage.smooth).filter(|loss| loss.is_finite());
                let loss = smooth.map_or_else(String::new, |loss| format!(", loss {loss:.4}"));
                let done = format!("{name} done");
                self.line(&format!("  {} in {}{loss}: {}", done.green(), duration(seconds), shown(output)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::metrics::example;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn run(verbose: bool, first_step: u64) -> Vec<String> {
        let written = Shared::default();
        let mut ui = Ui::lines(written.clone(), verbose);
        let header = StageHeader {
            name: "pretrain".into(),
            method: "projector".into(),
            model: "embedded:tiny".into(),
            records: 4000,
            total_steps: 100,
            first_step,
            batch: 32,
            trainable_parameters: 24_832,
            total_parameters: 2_345_678,
            output_dir: "runs/x/pretrain".into(),
        };
        for done in 0..=8 {
            ui.event(Event::Progress { what: "features of the tower", done, total: 8 });
        }
        ui.event(Event::StageStart(&header));
        for step in first_step + 1..=100 {
            ui.event(Event::Step(&example(step, step as f64), 100));
        }
        ui.event(Event::Note("3 records were cut"));
        ui.event(Event::StageEnd { name: "pretrain", output: "runs/x/pretrain/model".as_ref(), seconds: 73.0 });
        let bytes = written.0.lock().unwrap().clone();
        let text = anstream::adapter::strip_str(std::str::from_utf8(&bytes).unwrap()).to_string();
        text.lines().map(str::to_string).collect()
    }

    #[test]
    fn without_a_terminal_there_are_about_twenty_lines_a_stage() {
        let lines = run(false, 0);
        let steps: Vec<&String> = lines.iter().filter(|line| line.contains(" step ")).collect();
        assert!((18..=24).contains(&steps.len()), "{steps:?}");
        // A line has the mean of the steps since the line before.
        assert!(steps[1].contains("step   6/100  loss 4.0000"), "{}", steps[1]);
        assert!(steps[0].contains("grad 1.500  lr 1.00e-4  1,000 tokens/s"), "{}", steps[0]);
        assert!(steps.last().is_some_and(|line| line.contains("100/100") && line.contains("0 s left")));
        assert_eq!(run(true, 0).iter().filter(|line| line.contains(" step ")).count(), 100);
    }

    #[test]
    fn the_header_and_the_end_say_what_and_where() {
        let text = run(false, 40).join("\n");
        for part in [
            "features of the tower: 8 of 8",
            "stage pretrain · projector on embedded:tiny",
            "trains 24,832 of 2,345,678 parameters",
            "4,000 records, 100 steps of 32",
            "goes on after step 40",
            "3 records were cut",
            "pretrain done in 1 min 13 s, loss 91.0",
            ": runs/x/pretrain/model",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn bytes_are_told_once_a_file() {
        let written = Shared::default();
        let mut ui = Ui::lines(written.clone(), false);
        for done in [0, 1 << 20, 2 << 20] {
            ui.bytes("a.json", done, 5 << 30);
        }
        ui.bytes("model.safetensors", 3 << 30, 5 << 30);
        ui.bytes("model.safetensors", 5 << 30, 5 << 30);
        assert!(ui.bytes.is_none());
        let bytes = written.0.lock().unwrap().clone();
        let expected = "  fetching a.json: 0 B of 5.00 GiB\n  fetching model.safetensors: 3.00 GiB of 5.00 GiB\n";
        assert_eq!(String::from_utf8(bytes).unwrap(), expected);
    }

    #[test]
    fn quiet_says_nothing_and_steps_without_a_stage_do_no_harm() {
        let mut ui = Ui::new(true, false);
        ui.event(Event::Step(&example(1, 1.0), 2));
        ui.event(Event::Progress { what: "x", done: 0, total: 0 });
        ui.line("nothing");
    }
}
