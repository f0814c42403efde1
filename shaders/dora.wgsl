// DoRA: an adapted linear's output columns, or its weight's rows, brought to a trained length.
// factor[n] = magnitude[n] / norm[n], 0 where the norm is.
#import index
#import reduce

struct Params {
    rows: u32,
    cols: u32,
}
#params

#kernel row_norms
// norm[row] = the length of a row of w. One row a workgroup.
@group(0) @binding(0) var<storage, read_write> w: array<f32>; // [N, K]
@group(0) @binding(1) var<storage, read_write> norm: array<f32>; // [N]

@compute @workgroup_size(64)
fn row_norms(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let row = linear_group(group, groups);
    if (row >= params.rows) {
        return;
    }
    let base = row * params.cols;
    var squares = 0.0;
    for (var i = lane.index; i < params.cols; i += REDUCE_THREADS) {
        let value = w[base + i];
        squares = fma(value, value, squares);
    }
    let sum = workgroup_sum(lane, squares);
    if (lane.index == 0u) {
        norm[row] = sqrt(sum);
    }
}

#kernel scale
// y = factor * x by columns, or with ROWS by rows; with BIAS + bias by columns. y may be x.
@group(0) @binding(0) var<storage, read_write> x: array<f32>; // [T, N]
@group(0) @binding(1) var<storage, read_write> magnitude: array<f32>; // [N], with ROWS [T]
@group(0) @binding(2) var<storage, read_write> norm: array<f32>; // as magnitude
@group(0) @binding(3) var<storage, read_write> y: array<f32>; // [T, N]
#ifdef BIAS
@group(0) @binding(4) var<storage, read_write> bias: array<f32>; // [N]
#endif

@compute @workgroup_size(64)
fn scale(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = linear_thread(group, groups, local);
    if (i >= params.rows * params.cols) {
        return;
    }
#ifdef ROWS
    let n = i / params.cols;
#else
    let n = i % params.cols;
#endif
    let length = norm[n];
    let factor = select(0.0, magnitude[n] / length, length > 0.0);
#ifdef BIAS
    y[i] = fma(factor, x[i], bias[n]);
#else
    y[i] = factor * x[i];
#endif
}

#kernel backward_magnitude
// dmagnitude[n] += sum over rows of dy * x / norm[n], the norm being a constant. A thread owns a column.
@group(0) @binding(0) var<storage, read_write> x: array<f32>; // [T, N]
@group(0) @binding(1) var<storage, read_write> dy: array<f32>; // [T, N]
@group(0) @binding(2) var<storage, read_write> norm: array<f32>; // [N]
@group(0) @binding(3) var<storage, read_write> dmagnitude: array<f32>; // [N]

@compute @workgroup_size(64)
fn backward_magnitude(@builtin(global_invocation_id) id: vec3<u32>) {
    let n = id.x;
    if (n >= params.cols) {
        return;
    }
    var sum = 0.0;
    for (var row = 0u; row < params.rows; row++) {
        let i = row * params.cols + n;
        sum = fma(dy[i], x[i], sum);
    }
    let length = norm[n];
    dmagnitude[n] += select(0.0, sum / length, length > 0.0);
}
