//! The ways of one product: which there are, which one the rule takes, which one was measured to be the best.

use super::{Call, Epilogue, Layout, Region, host, length, reference_at, typed};
use crate::{
    gpu::{Gpu, Question, bucket},
    ops::{
        cooperative, has_workgroups,
        tuning::{Family, Trial, exact, exact_value, operand_sets, positions},
        uniform_rows,
    },
    tensor::{Dtype, Rounding, Tensor},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ops) enum Way {
    /// Host processors: a row of W in each lane.
    Lanes,
    /// Host processors whose subgroups are known: rows of A handed from lane to lane, by one of three blocks of C.
    Subgroup(usize),
    /// Host processors: A staged, by one of three blocks of C.
    Staged(usize),
    /// GPUs: W read once for a few rows of A.
    Rows,
    /// GPUs: tiles of 32, of 64 or of 128.
    Tiles(usize),
    /// GPUs, operands rounded to f16: tiles of 64 or of 128.
    Cooperative { large: bool },
}

/// Every way, by the name that it has in files.
const WAYS: [(&str, Way); 13] = [
    ("lanes", Way::Lanes),
    ("subgroup_wide", Way::Subgroup(0)),
    ("subgroup_narrow", Way::Subgroup(1)),
    ("subgroup_few", Way::Subgroup(2)),
    ("staged_wide", Way::Staged(0)),
    ("staged_narrow", Way::Staged(1)),
    ("staged_few", Way::Staged(2)),
    ("rows", Way::Rows),
    ("tiles_32", Way::Tiles(32)),
    ("tiles_64", Way::Tiles(64)),
    ("tiles_128", Way::Tiles(128)),
    ("cooperative_64", Way::Cooperative { large: false }),
    ("cooperative_128", Way::Cooperative { large: true }),
];

/// Products by the names of their questions: layout, B's type, and whether operands may be rounded to f16.
const QUESTIONS: [(&str, Layout, Dtype, bool); 10] = [
    ("matmul.nt", Layout::Nt, Dtype::F32, false),
    ("matmul.nn", Layout::Nn, Dtype::F32, false),
    ("matmul.tn", Layout::Tn, Dtype::F32, false),
    ("matmul.nt_bf16", Layout::Nt, Dtype::Bf16, true),
    ("matmul.nn_bf16", Layout::Nn, Dtype::Bf16, true),
    ("matmul.nt_f16", Layout::Nt, Dtype::F16, true),
    ("matmul.nn_f16", Layout::Nn, Dtype::F16, true),
    ("matmul.nt_in_f16", Layout::Nt, Dtype::F32, true),
    ("matmul.nn_in_f16", Layout::Nn, Dtype::F32, true),
    ("matmul.tn_in_f16", Layout::Tn, Dtype::F32, true),
];

/// Up to this many rows of A, W is read once by `matmul.rows`.
pub(super) const ROWS_KERNEL_MOST: usize = 4;

impl Way {
    pub fn name(self) -> &'static str {
        WAYS.iter().find(|(_, way)| *way == self).map_or("", |(name, _)| name)
    }

    fn named(name: &str) -> Option<Self> {
        WAYS.iter().find(|(known, _)| *known == name).map(|(_, way)| *way)
    }
}

/// Bytes of workgroup memory of tiles of 128, and threads.
const LARGE_BYTES: u32 = 32 << 10;
const LARGE_THREADS: u32 = 256;

fn has_large_tiles(gpu: &Gpu) -> bool {
    has_workgroups(gpu, LARGE_BYTES, LARGE_THREADS)
}

/// Whether a product of m x n on GPUs has sides and tiles enough for those of 64.
pub(in crate::ops) fn wants_large_tiles(m: usize, n: usize) -> bool {
    m > 32 && n > 32 && m.div_ceil(64) * n.div_ceil(64) >= 32
}

/// The same for those of 128.
fn wants_largest_tiles(m: usize, n: usize) -> bool {
    m > 64 && n > 64 && cooperative::wants_large(m, n)
}

/// Elements of a row of B in what `matmul.rows` loads at once: 16 bytes.
pub(super) fn vector_of(b: Dtype) -> usize {
    16 / b.bytes()
}

fn region_sizes(region: Region) -> [usize; 3] {
    [length(region.m), length(region.n), length(region.k)]
}

/// M, N and K, the one of them that a step's positions are in a bucket.
fn sizes_asked(layout: Layout, [m, n, k]: [usize; 3]) -> [usize; 3] {
    if layout == Layout::Tn { [m, n, bucket(k)] } else { [bucket(m), n, k] }
}

impl Call<'_> {
    /// Runs a region by the way that was measured to be the best for it, where one was.
    pub(super) fn run_as_chosen(&self, region: Region) {
        let asked = (self.layout, self.b.dtype(), self.rounding.is_some());
        let sizes = region_sizes(region);
        let chosen = QUESTIONS.iter().find(|&&(_, layout, b, rounded)| (layout, b, rounded) == asked).and_then(
            |&(op, layout, ..)| self.c.gpu().chosen(Question { op, sizes: sizes_asked(layout, sizes) }, sizes),
        );
        let call = Self { way: chosen.and_then(Way::named), ..*self };
        if call.epilogue.second.is_none() || matches!(call.way(region), Way::Cooperative { .. }) {
            return call.run(region);
        }
        Self { epilogue: Epilogue { second: None, ..self.epilogue }, ..call }.run(region);
        self.add_second(region);
    }

    /// The way of a region: the call's, if it serves there.
    pub(super) fn way(&self, region: Region) -> Way {
        self.way.filter(|&way| self.serves(way, region)).unwrap_or_else(|| self.by_rule(region))
    }

    fn by_rule(&self, region: Region) -> Way {
        let gpu = self.c.gpu();
        let [m, n, _] = region_sizes(region);
        let nt = self.layout == Layout::Nt;
        if gpu.is_cpu() {
            return if nt && self.wants_lanes(region) {
                Way::Lanes
            } else if host::has_subgroups(gpu) {
                Way::Subgroup(host::fitting(m, n))
            } else {
                Way::Staged(host::fitting(m, n))
            };
        }
        if self.cooperates(region) {
            return Way::Cooperative { large: cooperative::has_large(gpu) && cooperative::wants_large(m, n) };
        }
        if nt && m <= ROWS_KERNEL_MOST {
            return Way::Rows;
        }
        // What does not lie as vectors has tiles of one size.
        Way::Tiles(match self.tiles_are_vectors(region) {
            true if has_large_tiles(gpu) && wants_largest_tiles(m, n) => 128,
            true if !wants_large_tiles(m, n) => 32,
            _ => 64,
        })
    }

    /// Whether rows of A and B that a region reads are whole vectors of `width` elements, from the first on.
    fn reads_vectors(&self, region: Region, width: usize) -> bool {
        let Self { layout, a, b, b_first, .. } = *self;
        let (a_cols, b_cols) = (
            if layout == Layout::Tn { region.m } else { region.k },
            if layout == Layout::Nt { region.k } else { region.n },
        );
        let b_before = b.binding_before((self.operand_rows(region).1.0 - b_first) * b.cols());
        let of_b = [b.cols(), b_before, b_cols.0, length(b_cols)];
        let of_a = [a.cols(), a_cols.0, length(a_cols)];
        of_b.into_iter().chain(of_a).all(|x| x.is_multiple_of(width)) && length(a_cols) > 0 && length(b_cols) > 0
    }

    /// Whether cooperative matrices serve. B in bf16 they read in whole vectors alone.
    fn cooperates(&self, region: Region) -> bool {
        self.rounding.is_some()
            && cooperative::fits(self.c.gpu(), region_sizes(region))
            && (self.b.dtype() != Dtype::Bf16 || self.tiles_are_vectors(region))
    }

    /// The same of what tiles read and write, in vec4s.
    fn tiles_are_vectors(&self, region: Region) -> bool {
        let of_c = [self.c.cols(), region.n.0, length(region.n)];
        self.reads_vectors(region, 4) && of_c.iter().all(|x| x.is_multiple_of(4))
    }

    /// The kernel and its workgroups for a region on bound storage: not of lanes or cooperative matrices, which
    /// launch theirs themselves.
    pub(super) fn kernel(&self, way: Way, region: Region) -> (String, [u32; 3]) {
        let [m, n, _] = region_sizes(region);
        let b = self.b.dtype();
        let operands = match self.layout {
            Layout::Nt => typed(b, ["nt", "nt_bf16", "nt_f16"]),
            Layout::Nn => typed(b, ["nn", "nn_bf16", "nn_f16"]),
            Layout::Tn => "tn",
        };
        let tiles = |side| [n.div_ceil(side) as u32, m.div_ceil(side) as u32, 1];
        match way {
            Way::Subgroup(block) => host::by_subgroup(self.layout, b, [m, n], block),
            Way::Staged(block) => host::staged(self.layout, b, [m, n], block),
            Way::Rows => {
                let vectors = self.reads_vectors(region, vector_of(b));
                let part = match (vectors, m) {
                    (false, _) => "_odd",
                    (true, 1) => "_one",
                    (true, _) => "",
                };
                let unpacked = vectors && b == Dtype::F16 && self.c.gpu().facts().unpacks_f16;
                let operands = if unpacked { "nt_f16_unpacked" } else { operands };
                (format!("matmul.rows.{operands}{part}"), [n.min(32_768) as u32, 1, n.div_ceil(32_768) as u32])
            }
            Way::Tiles(side) if self.tiles_are_vectors(region) => {
                let size = match side {
                    32 => "_small",
                    64 => "",
                    _ => "_large",
                };
                (format!("matmul.tiled.{operands}{size}"), tiles(side))
            }
            _ => (format!("matmul.tiled_odd.{operands}"), tiles(64)),
        }
    }

    /// All of C.
    pub(super) fn whole(&self) -> Region {
        let k = if self.layout == Layout::Tn { self.a.rows() } else { self.a.cols() };
        Region { m: (0, self.c.rows()), n: (0, self.c.cols()), k: (0, k) }
    }

    /// Every way that serves for all of C, the rule's first.
    pub(super) fn ways(&self) -> Vec<Way> {
        let whole = self.whole();
        let by_rule = self.by_rule(whole);
        let others = WAYS.iter().map(|&(_, way)| way).filter(|&way| way != by_rule && self.serves(way, whole));
        [by_rule].into_iter().chain(others).collect()
    }

    /// Whether a region can go this way at all.
    fn serves(&self, way: Way, region: Region) -> bool {
        let gpu = self.c.gpu();
        let sizes = region_sizes(region);
        let on_host = matches!(way, Way::Lanes | Way::Subgroup(_) | Way::Staged(_));
        let can = match way {
            Way::Lanes => {
                let fits = |x: &Tensor| uniform_rows(x.cols(), x.dtype()) > 0;
                self.layout == Layout::Nt && host::lanes_fit(gpu) && fits(self.a) && fits(self.b)
            }
            Way::Subgroup(_) => host::has_subgroups(gpu),
            Way::Rows => self.layout == Layout::Nt && sizes[0] <= ROWS_KERNEL_MOST,
            Way::Cooperative { large } => self.cooperates(region) && (!large || cooperative::has_large(gpu)),
            Way::Tiles(128) => has_large_tiles(gpu) && self.tiles_are_vectors(region),
            Way::Tiles(32) => self.tiles_are_vectors(region),
            Way::Staged(_) | Way::Tiles(_) => true,
        };
        can && on_host == gpu.is_cpu()
    }
}

/// What the tuner runs of products.
pub(in crate::ops) const FAMILY: Family = Family {
    ops: || QUESTIONS.iter().map(|(op, ..)| *op).collect(),
    ways: || WAYS.iter().map(|(way, _)| *way).collect(),
    trial: |gpu, question, sizes| Ok(trial(gpu, question, sizes)),
};

fn trial(gpu: &Gpu, question: &Question, [m, n, k]: [usize; 3]) -> Trial {
    let found = QUESTIONS.iter().find(|(op, ..)| *op == question.op);
    let (layout, dtype, rounded) = found.map_or((Layout::Nt, Dtype::F32, false), |&(_, l, b, r)| (l, b, r));
    let a = if layout == Layout::Tn { [k, m] } else { [m, k] };
    let b = if layout == Layout::Nt { [n, k] } else { [k, n] };
    let sets = operand_sets(gpu, 4 * m * k + dtype.bytes() * n * k, || {
        [exact(gpu, Dtype::F32, &a, 0), exact(gpu, dtype, &b, 1)]
    });
    let c = Tensor::empty(gpu, &[m, n]);
    let rounding = rounded.then(|| Rounding::of(dtype).unwrap_or(Rounding::Half));
    let plain = Call { rounding, ..Call::new(layout, &sets[0][0], &sets[0][1], &c, Epilogue::default()) };
    let ways = plain.ways().into_iter().map(Way::name).collect();
    let of_operands: [&dyn Fn(usize) -> f64; 2] = [&|at| exact_value(at, 0), &|at| exact_value(at, 1)];
    let want = positions(m, n)
        .map(|[row, column]| (row * n + column, reference_at(layout, of_operands, [m, n, k], [row, column])))
        .collect();
    let out = Some(c.clone());
    let run = Box::new(move |way: &str, turn: usize| {
        let [a, b] = &sets[turn % sets.len()];
        let call = Call { rounding, way: Way::named(way), ..Call::new(layout, a, b, &c, Epilogue::default()) };
        call.run(call.whole());
        c.clone()
    });
    Trial { ways, run, out, want, tolerance: 2e-6 * (k as f64).sqrt().max(2.0) }
}
