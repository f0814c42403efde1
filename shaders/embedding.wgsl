// Rows by index: gather, its overwriting inverse, and the deterministic scatter-add of an embedding's gradient.
// VEC: where D is a multiple of 4.
#import index
#import wide

struct Params {
    count: u32, // rows of the index list
    cols: u32,
    first: u32, // the first table row that is bound
    rows: u32, // how many table rows are bound
    offset: u32, // elements before them in the binding (of packed tables)
}
#params

#kernel gather
// y[i] = table[ids[i]]; rows whose id lies outside the bound part stay as they are. Two Wides a thread.
#ifdef PACKED
#import packed
#ifdef VEC
@group(0) @binding(0) var<storage, read_write> table: array<vec2<u32>>; // [V, D] packed, a part

fn load(at: u32) -> Wide {
    let words = table[params.offset / 4u + at];
    return vec4<f32>(widen(words.x), widen(words.y));
}
#else
@group(0) @binding(0) var<storage, read_write> table: array<u32>; // [V, D] packed, a part

fn load(at: u32) -> Wide {
    return widen_one(table[(params.offset + at) / 2u], params.offset + at);
}
#endif
#else
@group(0) @binding(0) var<storage, read_write> table: array<Wide>; // [V, D], a part

fn load(at: u32) -> Wide {
    return table[at];
}
#endif
@group(0) @binding(1) var<storage, read_write> ids: array<u32>; // [N]
@group(0) @binding(2) var<storage, read_write> y: array<Wide>; // [N, D]

@compute @workgroup_size(64)
fn gather(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = linear_group(group, groups) * 128u + local;
    let width = params.cols / WIDTH;
#unroll e in 0..2
    let row#{e} = (i + #{e * 64}u) / width;
    let id#{e} = ids[row#{e}] - params.first; // wraps for a lower id, and so fails the test
    let value#{e} = load(min(id#{e}, params.rows - 1u) * width + (i + #{e * 64}u - row#{e} * width));
#end
#unroll e in 0..2
    if (i + #{e * 64}u < params.count * width && id#{e} < params.rows) {
        y[i + #{e * 64}u] = value#{e};
    }
#end
}

#kernel scatter
// table[ids[i]] = y[i]; no id occurs twice.
@group(0) @binding(0) var<storage, read_write> table: array<Wide>; // [V, D], a part
@group(0) @binding(1) var<storage, read_write> ids: array<u32>; // [N]
@group(0) @binding(2) var<storage, read_write> y: array<Wide>; // [N, D]

@compute @workgroup_size(64)
fn scatter(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = linear_thread(group, groups, local);
    let width = params.cols / WIDTH;
    if (i >= params.count * width) {
        return;
    }
    let id = ids[i / width] - params.first;
    if (id < params.rows) {
        table[id * width + i % width] = y[i];
    }
}

#kernel scatter_add
// dtable[unique[u]] += sum of dy[order[starts[u] .. starts[u + 1]]], in list order: no two threads share a row.
@group(0) @binding(0) var<storage, read_write> dtable: array<Wide>; // [V, D], a part
@group(0) @binding(1) var<storage, read_write> unique: array<u32>; // [U]
@group(0) @binding(2) var<storage, read_write> starts: array<u32>; // [U + 1]
@group(0) @binding(3) var<storage, read_write> order: array<u32>; // [N]
@group(0) @binding(4) var<storage, read_write> dy: array<Wide>; // [N, D]

@compute @workgroup_size(64)
fn scatter_add(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = linear_thread(group, groups, local);
    let width = params.cols / WIDTH;
    if (i >= params.count * width) {
        return;
    }
    let u = i / width;
    let col = i % width;
    let id = unique[u] - params.first;
    if (id >= params.rows) {
        return;
    }
    let before = dtable[id * width + col];
    var sum = Wide();
    for (var at = starts[u]; at < starts[u + 1u]; at++) {
        sum += dy[order[at] * width + col];
    }
    dtable[id * width + col] = before + sum;
}
