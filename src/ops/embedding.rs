//! Rows by index: y[i] = table[ids[i]], its overwriting inverse, and the gradient of the table.
//! PyTorch: `torch.nn.functional.embedding`, and `index_add_` in a fixed order for its backward.
//!
//! A table that is only read may be packed in 16 bits; what is read of it is f32.
//!
//! An id outside the table leaves its row alone; [`LEAVE`] is such an id for every table.

use super::{
    Case, Comparison, Cost, Op, Random, Shapes, THREADS, bindable_rows, by_columns,
    case::{floats, random},
    elementwise, groups_for,
    testing::wide,
};
use crate::{
    error::Result,
    gpu::Gpu,
    tensor::{Dtype, Tensor},
};

/// The id that means: nothing is read or written for this row.
pub const LEAVE: u32 = u32::MAX;

/// Rows of table [V, D] by ids (u32 [N]): [N, D]. Rows whose id is outside the table have unspecified content; where
/// there are such ids, fill a tensor and use [`gather_into`].
pub fn gather(table: &Tensor, ids: &Tensor) -> Tensor {
    let y = Tensor::empty(table.gpu(), &[ids.len(), table.cols()]);
    gather_into(table, ids, &y);
    y
}

/// y[i] = table[ids[i]] for ids inside the table; other rows of y [N, D] stay as they are.
pub fn gather_into(table: &Tensor, ids: &Tensor, y: &Tensor) {
    let kernels = match table.dtype() {
        Dtype::Bf16 => ["embedding.gather.bf16", "embedding.gather.vec_bf16"],
        Dtype::F16 => ["embedding.gather.f16", "embedding.gather.vec_f16"],
        _ => ["embedding.gather", "embedding.gather.vec"],
    };
    move_rows(kernels, 2, table, ids, y);
}

/// table[ids[i]] = y[i] for ids inside the table [V, D]. No such id may occur twice.
pub fn scatter(y: &Tensor, ids: &Tensor, table: &Tensor) {
    assert!(!table.dtype().is_packed(), "rows of f32 into {table:?}");
    move_rows(["embedding.scatter", "embedding.scatter.vec"], 1, table, ids, y);
}

/// Each part of y's rows against each part of the table's; every id lies in one part of the table. A thread takes `each`
/// places.
fn move_rows(kernels: [&str; 2], each: usize, table: &Tensor, ids: &Tensor, y: &Tensor) {
    let (gpu, d) = (table.gpu(), table.cols());
    let (kernel, width) = by_columns(kernels, d);
    assert!(y.cols() == d && y.rows() == ids.len(), "{kernel}: {y:?} and {ids:?} with table {table:?}");
    for (first, count) in bindable_rows(gpu, ids.len(), d) {
        for (from, rows) in bindable_rows(gpu, table.rows(), d) {
            let (part, before) = if table.dtype().is_packed() {
                table.packed_range(from * d, rows * d)
            } else {
                (table.range(from * d, rows * d), 0)
            };
            let bindings = [part, ids.range(first, count), y.range(first * d, count * d)];
            let params = [count as u32, d as u32, from as u32, rows as u32, before as u32];
            gpu.dispatch(kernel, &bindings, &params, groups_for(count * d / width, each * THREADS));
        }
    }
}

/// Where each id occurs in a list, as compressed rows: the occurrences of `unique[u]` are
/// `order[starts[u]..starts[u + 1]]`. With it a sum per id needs no atomics, and has one order.
pub struct Csr {
    /// u32 [count], ascending.
    pub unique: Tensor,
    /// u32 [count + 1].
    pub starts: Tensor,
    /// u32: positions in the list, ascending within an id.
    pub order: Tensor,
    /// How many different ids there are.
    pub count: usize,
}

impl Csr {
    /// Sorts the positions of `ids` by id; positions of [`LEAVE`] are left out.
    pub fn new(gpu: &Gpu, ids: &[u32]) -> Self {
        let (unique, starts, order) = compressed(ids);
        let upload = |words: &[u32]| Tensor::from_u32(gpu, words, &[words.len()]);
        Self { unique: upload(&unique), starts: upload(&starts), order: upload(&order), count: unique.len() }
    }
}

/// Unique ids, starts, order.
fn compressed(ids: &[u32]) -> (Vec<u32>, Vec<u32>, Vec<u32>) {
    let mut order: Vec<u32> = (0..ids.len() as u32).filter(|&at| ids[at as usize] != LEAVE).collect();
    order.sort_by_key(|&at| ids[at as usize]);
    let (mut unique, mut starts) = (Vec::new(), Vec::new());
    for (place, &at) in order.iter().enumerate() {
        let id = ids[at as usize];
        if unique.last() != Some(&id) {
            unique.push(id);
            starts.push(place as u32);
        }
    }
    starts.push(order.len() as u32);
    (unique, starts, order)
}

/// dtable[ids[i]] += dy[i], for the ids that `csr` was made of; dtable is [V, D].
/// dy [N, D] must fit into one binding, because any of its rows may go to any part of the table.
pub fn scatter_add(dy: &Tensor, csr: &Csr, dtable: &Tensor) {
    let (gpu, d) = (dy.gpu(), dy.cols());
    assert_eq!(d, dtable.cols(), "rows of {dy:?} into {dtable:?}");
    let (kernel, width) = by_columns(["embedding.scatter_add", "embedding.scatter_add.vec"], d);
    for (from, rows) in bindable_rows(gpu, dtable.rows(), d) {
        let bindings = [
            dtable.range(from * d, rows * d),
            csr.unique.binding(),
            csr.starts.binding(),
            csr.order.binding(),
            dy.binding(),
        ];
        let params = [csr.count as u32, d as u32, from as u32, rows as u32, 0];
        gpu.dispatch(kernel, &bindings, &params, groups_for(csr.count * d / width, THREADS));
    }
}

/// `y` [N, D] after a gather from `table` [V, D], on the host.
pub fn reference(table: &[f64], ids: &[u32], y: &[f64], d: usize) -> Vec<f64> {
    let mut out = y.to_vec();
    for (row, &id) in out.chunks_mut(d).zip(ids) {
        if let Some(from) = table.chunks(d).nth(id as usize) {
            row.copy_from_slice(from);
        }
    }
    out
}

/// `table` [V, D] after rows of `y` [N, D] were written (`add`: added) to it, on the host.
pub fn reference_scatter(y: &[f64], ids: &[u32], table: &[f64], d: usize, add: bool) -> Vec<f64> {
    let mut out = table.to_vec();
    for (row, &id) in y.chunks(d).zip(ids) {
        if let Some(to) = out.chunks_mut(d).nth(id as usize) {
            to.iter_mut().zip(row).for_each(|(to, y)| *to = if add { *to + y } else { *y });
        }
    }
    out
}

fn check(gpu: &Gpu, n: usize) -> Result<Vec<Comparison>> {
    let mut random = Random::new(n as u64);
    let (vocab, d, tokens) = (2 * n + 3, n / 2 + 1, n + 2);
    let ((table, ttable), (y, ty)) = (random.tensor(gpu, &[vocab, d]), random.tensor(gpu, &[tokens, d]));
    let (table, y) = (wide(&table), wide(&y));
    let mut ids = random.indices(tokens, vocab);
    ids[0] = LEAVE;
    ids[tokens - 1] = vocab as u32 - 1;
    let tids = Tensor::from_u32(gpu, &ids, &[tokens]);

    let plain = gather(&ttable, &tids);
    gather_into(&ttable, &tids, &ty);
    let gathered = reference(&table, &ids, &y, d);
    let plain = plain.to_vec()?.split_off(d);

    let mut comparisons = Vec::new();
    for (what, dtype) in [("gather from bf16", Dtype::Bf16), ("gather from f16", Dtype::F16)] {
        let narrow = Tensor::from_bytes(gpu, dtype, &dtype.narrow(&ttable.to_vec()?), &[vocab, d]);
        let (mut got, want) = (gather(&narrow, &tids).to_vec()?, reference(&wide(&narrow.to_vec()?), &ids, &y, d));
        comparisons.push(Comparison::new(what, got.split_off(d), want[d..].to_vec(), 0.0));
    }

    let dtable = elementwise::zeros(gpu, &[vocab, d]);
    let csr = Csr::new(gpu, &ids);
    scatter_add(&ty, &csr, &dtable);
    scatter_add(&ty, &csr, &dtable);
    let doubled: Vec<f64> = gathered.iter().map(|y| 2.0 * y).collect();
    let want_dtable = reference_scatter(&doubled, &ids, &vec![0.0; vocab * d], d, true);

    // Ids in falling order, none twice, every third left out.
    let once: Vec<u32> = (0..tokens as u32).map(|i| if i % 3 == 1 { LEAVE } else { vocab as u32 - 1 - i }).collect();
    let got = ty.to_vec()?;
    elementwise::scale(&ty, -1.0);
    scatter(&ty, &Tensor::from_u32(gpu, &once, &[tokens]), &ttable);
    let negative: Vec<f64> = gathered.iter().map(|y| -y).collect();
    comparisons.extend([
        Comparison::new("gather", plain, gathered[d..].to_vec(), 1e-9),
        Comparison::new("gather into", got, gathered.clone(), 1e-9),
        Comparison::new("scatter", ttable.to_vec()?, reference_scatter(&negative, &once, &table, d, false), 1e-9),
        Comparison::new("scatter add", dtable.to_vec()?, want_dtable, 1e-6),
    ]);
    Ok(comparisons)
}

fn cases(shapes: &Shapes) -> Vec<Case> {
    let Shapes { tokens, hidden, vocab, .. } = *shapes;
    let shape = format!("{tokens} of {vocab}x{hidden}");
    let case = |pass, bytes| Case::of(pass, shape.clone(), Cost::each(tokens * hidden, 0, bytes));
    let ids = move || Random::new(1).indices(tokens, vocab);
    let gather_from = move |dtype| {
        move |gpu: &Gpu| {
            let (table, ids) = (random(gpu, dtype, &[vocab, hidden]), Tensor::from_u32(gpu, &ids(), &[tokens]));
            move || gather(&table, &ids)
        }
    };
    vec![
        case("forward", 8).run(gather_from(Dtype::F32)),
        case("forward, bf16", 6).run(gather_from(Dtype::Bf16)),
        case("backward", 12).run(move |gpu| {
            let (dy, csr) = (floats(gpu, &[tokens, hidden]), Csr::new(gpu, &ids()));
            let dtable = elementwise::zeros(gpu, &[vocab, hidden]);
            move || scatter_add(&dy, &csr, &dtable)
        }),
    ]
}

pub const OP: Op = Op {
    name: "embedding",
    check,
    cases,
    cost: |n| {
        let elements = ((n + 2) * (n / 2 + 1)) as u64;
        Cost { flops: 0, bytes: 8 * elements + 4 * (n as u64 + 2) }
    },
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_grouped_by_ascending_id() {
        let (unique, starts, order) = compressed(&[7, 2, LEAVE, 7, 0, 2, 7]);
        assert_eq!(unique, [0, 2, 7]);
        assert_eq!(starts, [0, 1, 3, 6]);
        assert_eq!(order, [4, 1, 5, 0, 3, 6]);
    }

    #[test]
    fn a_list_without_ids_has_no_groups() {
        assert_eq!(compressed(&[]), (vec![], vec![0], vec![]));
        assert_eq!(compressed(&[LEAVE]), (vec![], vec![0], vec![]));
    }
}
