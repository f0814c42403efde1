// Rows by index: gather, its overwriting inverse, and the deterministic scatter-add of an embedding's gradient.
#import index

struct Params {
    count: u32, // rows of the index list
    cols: u32,
    first: u32, // the first table row that is bound
    rows: u32, // how many table rows are bound
    offset: u32, // elements before them in the binding (of packed tables)
}
#params

#kernel gather
// y[i] = table[ids[i]]; rows whose id lies outside the bound part stay as they are.
#ifdef PACKED
#import packed
@group(0) @binding(0) var<storage, read_write> table: array<u32>; // [V, D] packed, a part
#else
@group(0) @binding(0) var<storage, read_write> table: array<f32>; // [V, D], a part
#endif
@group(0) @binding(1) var<storage, read_write> ids: array<u32>; // [N]
@group(0) @binding(2) var<storage, read_write> y: array<f32>; // [N, D]

@compute @workgroup_size(64)
fn gather(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = linear_thread(group, groups, local);
    if (i >= params.count * params.cols) {
        return;
    }
    let id = ids[i / params.cols] - params.first; // wraps for a lower id, and so fails the test
    if (id < params.rows) {
        let at = params.offset + id * params.cols + i % params.cols;
#ifdef PACKED
        y[i] = widen_one(table[at / 2u], at);
#else
        y[i] = table[at];
#endif
    }
}

#kernel scatter
// table[ids[i]] = y[i]; no id occurs twice.
@group(0) @binding(0) var<storage, read_write> table: array<f32>; // [V, D], a part
@group(0) @binding(1) var<storage, read_write> ids: array<u32>; // [N]
@group(0) @binding(2) var<storage, read_write> y: array<f32>; // [N, D]

@compute @workgroup_size(64)
fn scatter(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = linear_thread(group, groups, local);
    if (i >= params.count * params.cols) {
        return;
    }
    let id = ids[i / params.cols] - params.first;
    if (id < params.rows) {
        table[id * params.cols + i % params.cols] = y[i];
    }
}

#kernel scatter_add
// dtable[unique[u]] += sum of dy[order[starts[u] .. starts[u + 1]]], in list order: no two threads share a row.
@group(0) @binding(0) var<storage, read_write> dtable: array<f32>; // [V, D], a part
@group(0) @binding(1) var<storage, read_write> unique: array<u32>; // [U]
@group(0) @binding(2) var<storage, read_write> starts: array<u32>; // [U + 1]
@group(0) @binding(3) var<storage, read_write> order: array<u32>; // [N]
@group(0) @binding(4) var<storage, read_write> dy: array<f32>; // [N, D]

@compute @workgroup_size(64)
fn scatter_add(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = linear_thread(group, groups, local);
    if (i >= params.count * params.cols) {
        return;
    }
    let u = i / params.cols;
    let col = i % params.cols;
    let id = unique[u] - params.first;
    if (id >= params.rows) {
        return;
    }
    var sum = 0.0;
    for (var at = starts[u]; at < starts[u + 1u]; at++) {
        sum += dy[order[at] * params.cols + col];
    }
    dtable[id * params.cols + col] += sum;
}
