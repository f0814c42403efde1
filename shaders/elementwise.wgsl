// What needs no neighbours: add, scale, fill; four vec4s a thread (tensors end in padding), all of them read before one is
// written: what lies beyond `count` is read in vain. And the sum of rows.
#import index

struct Params {
    count: u32, // of vec4s; rows in add_rows
    value: f32,
    cols: u32,
}
#params

#kernel add
// y = a + b; y may be a.
@group(0) @binding(0) var<storage, read_write> a: array<vec4<f32>>; // [N]
@group(0) @binding(1) var<storage, read_write> b: array<vec4<f32>>; // [N]
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>; // [N]

@compute @workgroup_size(64)
fn add(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = first_of_four(group, groups, local);
#unroll e in 0..4
    let sum#{e} = a[i + #{e * 64}u] + b[i + #{e * 64}u];
#end
#unroll e in 0..4
    if (i + #{e * 64}u < params.count) {
        y[i + #{e * 64}u] = sum#{e};
    }
#end
}

#kernel add_in_place
@group(0) @binding(0) var<storage, read_write> a: array<vec4<f32>>; // [N]
@group(0) @binding(1) var<storage, read_write> y: array<vec4<f32>>; // [N]

@compute @workgroup_size(64)
fn add_in_place(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = first_of_four(group, groups, local);
#unroll e in 0..4
    let sum#{e} = y[i + #{e * 64}u] + a[i + #{e * 64}u];
#end
#unroll e in 0..4
    if (i + #{e * 64}u < params.count) {
        y[i + #{e * 64}u] = sum#{e};
    }
#end
}

#kernel add_rows
// out[col] += sum over rows of x: a bias's gradient. A thread owns a column and adds its rows in order.
@group(0) @binding(0) var<storage, read_write> x: array<f32>; // [N, D]
@group(0) @binding(1) var<storage, read_write> out: array<f32>; // [D]

@compute @workgroup_size(64)
fn add_rows(@builtin(global_invocation_id) id: vec3<u32>) {
    if (id.x >= params.cols) {
        return;
    }
    var sum = 0.0;
    for (var row = 0u; row < params.count; row++) {
        sum += x[row * params.cols + id.x];
    }
    out[id.x] += sum;
}

#kernel add_rows_wide
// The same for whole vec4s of columns.
#import column_sums
@group(0) @binding(0) var<storage, read_write> x: array<vec4<f32>>; // [N, D]
@group(0) @binding(1) var<storage, read_write> out: array<vec4<f32>>; // [D]

@compute @workgroup_size(256)
fn add_rows_wide(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let quads = params.cols / 4u;
    let col = group.x * COLUMN_QUADS + local % COLUMN_QUADS;
    var sum = vec4<f32>();
    if (col < quads) {
        for (var row = local / COLUMN_QUADS; row < params.count; row += 4u * ROW_LANES) {
#unroll e in 0..4
            let x#{e} = x[min(row + #{e}u * ROW_LANES, params.count - 1u) * quads + col];
#end
#unroll e in 0..4
            sum += select(vec4<f32>(), x#{e}, row + #{e}u * ROW_LANES < params.count);
#end
        }
    }
    let total = column_sum(local, sum);
    if (local < COLUMN_QUADS && col < quads) {
        out[col] += total;
    }
}

#kernel fill
@group(0) @binding(0) var<storage, read_write> y: array<vec4<f32>>; // [N]

@compute @workgroup_size(64)
fn fill(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = first_of_four(group, groups, local);
#unroll e in 0..4
    if (i + #{e * 64}u < params.count) {
        y[i + #{e * 64}u] = vec4<f32>(params.value);
    }
#end
}

#kernel scale
@group(0) @binding(0) var<storage, read_write> y: array<vec4<f32>>; // [N]

@compute @workgroup_size(64)
fn scale(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = first_of_four(group, groups, local);
#unroll e in 0..4
    let y#{e} = y[i + #{e * 64}u] * params.value;
#end
#unroll e in 0..4
    if (i + #{e * 64}u < params.count) {
        y[i + #{e * 64}u] = y#{e};
    }
#end
}
