// What needs no neighbours: add, scale, fill; four elements a thread (tensors end in padding).
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
    let i = linear_thread(group, groups, local);
    if (i < params.count) {
        y[i] = a[i] + b[i];
    }
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
    let i = linear_thread(group, groups, local);
    if (i < params.count) {
        y[i] += a[i];
    }
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

#kernel fill
@group(0) @binding(0) var<storage, read_write> y: array<vec4<f32>>; // [N]

@compute @workgroup_size(64)
fn fill(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = linear_thread(group, groups, local);
    if (i < params.count) {
        y[i] = vec4<f32>(params.value);
    }
}

#kernel scale
@group(0) @binding(0) var<storage, read_write> y: array<vec4<f32>>; // [N]

@compute @workgroup_size(64)
fn scale(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = linear_thread(group, groups, local);
    if (i < params.count) {
        y[i] *= params.value;
    }
}
