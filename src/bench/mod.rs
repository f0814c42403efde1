//! What a device reaches: every op at the shapes of models, and answers of a model with random weights, beside what the
//! device reaches at most ([`crate::ops::roof`]). Optimizer steps are measured where they are made ([`crate::train`]).

pub mod answers;

use serde_json::{Map, Value, json};

use crate::{
    error::Result,
    gpu::{Effort, Gpu, Samples},
    ops::{
        Case, Cost, OPS, Shapes,
        roof::{self, Roofs, beyond_caches},
    },
};

/// One timed case.
#[derive(Clone, Debug)]
pub struct Row {
    pub op: &'static str,
    pub pass: &'static str,
    pub model: &'static str,
    pub shape: String,
    pub cost: Cost,
    pub samples: Samples,
    /// Sets of buffers that runs went through.
    pub sets: usize,
    /// Whether all of them may lie in caches: bytes a second are then no claim about memory.
    pub cached: bool,
    /// The roof that limits such a case, and which part of it the median reaches.
    pub roof: &'static str,
    pub share: f64,
}

impl Row {
    pub fn flops_per_second(&self) -> f64 {
        self.cost.flops as f64 / self.samples.median()
    }

    pub fn bytes_per_second(&self) -> f64 {
        self.cost.bytes as f64 / self.samples.median()
    }

    pub fn json(&self) -> Value {
        json!({
            "op": self.op, "pass": self.pass, "model": self.model, "shape": self.shape,
            "seconds": self.samples.median(), "p10": self.samples.quantile(0.1), "p90": self.samples.quantile(0.9),
            "runs": self.samples.seconds.len(), "repeats": self.samples.repeats,
            "clock": self.samples.clock.as_str(), "sets": self.sets, "cached": self.cached,
            "flops": self.cost.flops, "bytes": self.cost.bytes,
            "flops_per_second": self.flops_per_second(), "bytes_per_second": self.bytes_per_second(),
            "roof": self.roof, "share": self.share,
        })
    }
}

/// An op's case at the shapes of a model.
pub struct Timed {
    op: &'static str,
    model: &'static str,
    case: Case,
}

impl Timed {
    /// What `--filter` looks into, and people read.
    pub fn name(&self) -> String {
        format!("{} {} {} {}", self.model, self.op, self.case.pass, self.case.shape)
    }
}

/// Every case of every op, at the shapes of 7B and of the embedded model, whose name holds `filter`.
pub fn cases(gpu: &Gpu, filter: Option<&str>) -> Vec<Timed> {
    let mut cases = Vec::new();
    for shapes in [Shapes::of_7b(gpu), Shapes::of_tiny()] {
        for op in OPS.iter().filter(|op| op.missing(gpu.facts()).is_none()) {
            let made = (op.cases)(&shapes).into_iter();
            cases.extend(made.map(|case| Timed { op: op.name, model: shapes.model, case }));
        }
    }
    cases.retain(|case| filter.is_none_or(|filter| case.name().contains(filter)));
    cases
}

const MOST_SETS: u64 = 64;

/// Most bytes that the sets of one case may take.
fn room(gpu: &Gpu) -> u64 {
    let most = if gpu.is_cpu() { 3 << 28 } else { 3 << 30 };
    gpu.available_memory().map_or(most, |bytes| (bytes / 4).min(most))
}

const EFFORT: Effort = Effort { warm_up: 5, runs: 20, seconds: 0.6, load: 0.15 };

/// Times a case; none where its buffers would not fit the device.
///
/// # Errors
/// Whatever fails on the device.
pub fn measure(gpu: &Gpu, roofs: &Roofs, timed: &Timed) -> Result<Option<Row>> {
    let case = &timed.case;
    let room = room(gpu);
    if case.cost.bytes > room {
        return Ok(None);
    }
    gpu.trim();
    let before = gpu.device_bytes();
    let mut sets = vec![case.prepare(gpu)];
    // A set holds what its run made until its next one.
    let mut made = vec![sets[0]()];
    gpu.sync()?;
    let footprint = (gpu.device_bytes() - before).max(1);
    let (roof, least) = roofs.limit((case.roof)(gpu), case.cost.flops, case.cost.bytes);
    if roof == roof::COPY {
        let wanted = (2 * beyond_caches(gpu)).div_ceil(case.cost.bytes.max(1)).clamp(3, MOST_SETS);
        for _ in 1..wanted.min(room / footprint) {
            sets.push(case.prepare(gpu));
            made.push(().into());
        }
    }
    let mut next = 0;
    let samples = gpu.samples(roofs.clock, EFFORT, &mut || {
        next = (next + 1) % sets.len();
        made[next] = sets[next]();
    })?;
    let share = least / samples.median();
    let cached = sets.len() as u64 * case.cost.bytes < beyond_caches(gpu);
    let (op, pass, model, shape) = (timed.op, case.pass, timed.model, case.shape.clone());
    Ok(Some(Row { op, pass, model, shape, cost: case.cost, samples, sets: sets.len(), cached, roof, share }))
}

/// Roofs by their keys.
pub fn roofs_json(roofs: &Roofs) -> Value {
    let roof = |roof: &roof::Roof| {
        let value = json!({
            "what": roof.title, "value": roof.value, "unit": roof.unit.as_str(), "by": roof.by,
        });
        (roof.key.to_owned(), value)
    };
    Value::Object(roofs.list.iter().map(roof).collect::<Map<_, _>>())
}

/// What every result begins with. `date` is a day.
pub fn head(bench: &str, gpu: &Gpu, date: &str) -> Map<String, Value> {
    let facts = gpu.facts();
    let mut head = Map::new();
    let mut put = |key: &str, value: Value| head.insert(key.to_owned(), value);
    put("bench", json!(bench));
    put("version", json!(env!("CARGO_PKG_VERSION")));
    if let Some(commit) = option_env!("WGPU_LLAVA_COMMIT") {
        put("commit", json!(commit));
    }
    put("date", json!(date));
    put(
        "device",
        json!({
            "name": facts.name, "backend": facts.backend, "driver": facts.driver, "type": facts.kind,
            "features": facts.features, "tuned": facts.choices.len(),
        }),
    );
    head
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::AdapterFacts;

    #[test]
    fn every_op_has_a_case_and_no_two_have_one_name() {
        let cases = cases(&Gpu::counting(AdapterFacts::of_a_usual_gpu()), None);
        for op in OPS {
            assert!(cases.iter().any(|case| case.op == op.name), "{} is not timed", op.name);
        }
        let mut names: Vec<_> = cases.iter().map(Timed::name).collect();
        names.sort();
        let all = names.len();
        names.dedup();
        assert_eq!(names.len(), all);
        assert!(cases.iter().all(|case| case.case.cost.bytes > 0));
    }
}
