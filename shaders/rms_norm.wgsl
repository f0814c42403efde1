// y = x * rstd * w with rstd = 1 / sqrt(mean(x^2) + eps), one row a workgroup.
#import index
#import reduce

struct Params {
    rows: u32,
    cols: u32,
    eps: f32,
    accumulate: u32,
}
#params

#kernel forward
@group(0) @binding(0) var<storage, read_write> x: array<f32>; // [T, D]
@group(0) @binding(1) var<storage, read_write> weight: array<f32>; // [D]
@group(0) @binding(2) var<storage, read_write> y: array<f32>; // [T, D]
@group(0) @binding(3) var<storage, read_write> rstd: array<f32>; // [T]

@compute @workgroup_size(64)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let row = linear_group(group, groups);
    if (row >= params.rows) {
        return;
    }
    let base = row * params.cols;
    var squares = 0.0;
    for (var i = lane.index; i < params.cols; i += REDUCE_THREADS) {
        let value = x[base + i];
        squares = fma(value, value, squares);
    }
    let mean = workgroup_sum(lane, squares) / f32(params.cols);
    let scale = 1.0 / sqrt(mean + params.eps);
    for (var i = lane.index; i < params.cols; i += REDUCE_THREADS) {
        y[base + i] = x[base + i] * scale * weight[i];
    }
    if (lane.index == 0u) {
        rstd[row] = scale;
    }
}

#kernel backward_x
// dx = rstd * (dy*w - x * rstd^2 * mean(x * dy*w)), added to dx when asked (a residual's gradient is there already).
@group(0) @binding(0) var<storage, read_write> x: array<f32>; // [T, D]
@group(0) @binding(1) var<storage, read_write> weight: array<f32>; // [D]
@group(0) @binding(2) var<storage, read_write> rstd: array<f32>; // [T]
@group(0) @binding(3) var<storage, read_write> dy: array<f32>; // [T, D]
@group(0) @binding(4) var<storage, read_write> dx: array<f32>; // [T, D]

@compute @workgroup_size(64)
fn backward_x(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let row = linear_group(group, groups);
    if (row >= params.rows) {
        return;
    }
    let base = row * params.cols;
    var dots = 0.0;
    for (var i = lane.index; i < params.cols; i += REDUCE_THREADS) {
        dots = fma(x[base + i], dy[base + i] * weight[i], dots);
    }
    let mean = workgroup_sum(lane, dots) / f32(params.cols);
    let scale = rstd[row];
    let pull = scale * scale * mean;
    for (var i = lane.index; i < params.cols; i += REDUCE_THREADS) {
        var value = scale * (dy[base + i] * weight[i] - x[base + i] * pull);
        if (params.accumulate != 0u) {
            value += dx[base + i];
        }
        dx[base + i] = value;
    }
}

#kernel backward_weight
// dw += sum over rows of dy * x * rstd: a thread owns a column and adds its rows in order.
@group(0) @binding(0) var<storage, read_write> x: array<f32>; // [T, D]
@group(0) @binding(1) var<storage, read_write> rstd: array<f32>; // [T]
@group(0) @binding(2) var<storage, read_write> dy: array<f32>; // [T, D]
@group(0) @binding(3) var<storage, read_write> dweight: array<f32>; // [D]

@compute @workgroup_size(64)
fn backward_weight(@builtin(global_invocation_id) id: vec3<u32>) {
    let col = id.x;
    if (col >= params.cols) {
        return;
    }
    var sum = 0.0;
    for (var row = 0u; row < params.rows; row++) {
        let at = row * params.cols + col;
        sum = fma(dy[at], x[at] * rstd[row], sum);
    }
    dweight[col] += sum;
}
