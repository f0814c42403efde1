// y = x * rstd * w with rstd = 1 / sqrt(mean(x^2) + eps), one row a workgroup. VEC: where D is a multiple of 4.
#import index
#import reduce
#import wide

struct Params {
    rows: u32,
    cols: u32,
    eps: f32,
    // The lane kernels' window: its first row, and where it begins in the uniforms, in vec4s.
    first: u32,
    x_before: u32,
    dy_before: u32,
    weight_before: u32,
}
#params

#kernel forward
@group(0) @binding(0) var<storage, read_write> x: array<Wide>; // [T, D]
@group(0) @binding(1) var<storage, read_write> weight: array<Wide>; // [D]
@group(0) @binding(2) var<storage, read_write> y: array<Wide>; // [T, D]
@group(0) @binding(3) var<storage, read_write> rstd: array<f32>; // [T]

@compute @workgroup_size(REDUCE_THREADS)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let row = linear_group(group, groups);
    if (row >= params.rows) {
        return;
    }
    let width = params.cols / WIDTH;
    let base = row * width;
    var squares = Wide();
    for (var i = lane.index; i < width; i += REDUCE_THREADS) {
        let value = x[base + i];
        squares = fma(value, value, squares);
    }
    let mean = workgroup_sum(lane, sum_of(squares)) / f32(params.cols);
    let scale = 1.0 / sqrt(mean + params.eps);
    for (var i = lane.index; i < width; i += REDUCE_THREADS) {
        y[base + i] = x[base + i] * scale * weight[i];
    }
    if (lane.index == 0u) {
        rstd[row] = scale;
    }
}

#kernel backward_x
// dx = rstd * (dy*w - x * rstd^2 * mean(x * dy*w)).
@group(0) @binding(0) var<storage, read_write> x: array<Wide>; // [T, D]
@group(0) @binding(1) var<storage, read_write> weight: array<Wide>; // [D]
@group(0) @binding(2) var<storage, read_write> rstd: array<f32>; // [T]
@group(0) @binding(3) var<storage, read_write> dy: array<Wide>; // [T, D]
@group(0) @binding(4) var<storage, read_write> dx: array<Wide>; // [T, D]

@compute @workgroup_size(REDUCE_THREADS)
fn backward_x(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let row = linear_group(group, groups);
    if (row >= params.rows) {
        return;
    }
    let width = params.cols / WIDTH;
    let base = row * width;
    var dots = Wide();
    for (var i = lane.index; i < width; i += REDUCE_THREADS) {
        dots = fma(x[base + i], dy[base + i] * weight[i], dots);
    }
    let mean = workgroup_sum(lane, sum_of(dots)) / f32(params.cols);
    let scale = rstd[row];
    let pull = scale * scale * mean;
    for (var i = lane.index; i < width; i += REDUCE_THREADS) {
        dx[base + i] = scale * (dy[base + i] * weight[i] - x[base + i] * pull);
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

#kernel backward_weight_wide
// The same for whole vec4s of columns.
#import column_sums
@group(0) @binding(0) var<storage, read_write> x: array<vec4<f32>>; // [T, D]
@group(0) @binding(1) var<storage, read_write> rstd: array<f32>; // [T]
@group(0) @binding(2) var<storage, read_write> dy: array<vec4<f32>>; // [T, D]
@group(0) @binding(3) var<storage, read_write> dweight: array<vec4<f32>>; // [D]

@compute @workgroup_size(256)
fn backward_weight_wide(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let quads = params.cols / 4u;
    let col = group.x * COLUMN_QUADS + local % COLUMN_QUADS;
    var sum = vec4<f32>();
    if (col < quads) {
        for (var row = local / COLUMN_QUADS; row < params.rows; row += 4u * ROW_LANES) {
#unroll e in 0..4
            let row#{e} = min(row + #{e}u * ROW_LANES, params.rows - 1u);
            let term#{e} = dy[row#{e} * quads + col] * (x[row#{e} * quads + col] * rstd[row#{e}]);
#end
#unroll e in 0..4
            sum += select(vec4<f32>(), term#{e}, row + #{e}u * ROW_LANES < params.rows);
#end
        }
    }
    let total = column_sum(local, sum);
    if (local < COLUMN_QUADS && col < quads) {
        dweight[col] += total;
    }
}

#kernel lane_forward
// For devices that run on the host's processor: a lane is a row, read from uniforms; nothing is shared.
@group(0) @binding(0) var<uniform> x: array<vec4<f32>, 4096>; // rows of [T, D]
@group(0) @binding(1) var<uniform> weight: array<vec4<f32>, 4096>; // [D]
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>; // [T, D]
@group(0) @binding(3) var<storage, read_write> rstd: array<f32>; // [T]

@compute @workgroup_size(8)
fn lane_forward(@builtin(global_invocation_id) id: vec3<u32>) {
    let row = min(id.x, params.rows - 1u);
    let quads = params.cols / 4u;
    let base = params.x_before + row * quads;
    var squares = vec4<f32>(0.0);
    for (var i = 0u; i < quads; i++) {
        let value = x[base + i];
        squares = fma(value, value, squares);
    }
    let mean = (squares.x + squares.y + squares.z + squares.w) / f32(params.cols);
    let scale = 1.0 / sqrt(mean + params.eps);
    let out = (params.first + row) * quads;
    for (var i = 0u; i < quads; i++) {
        y[out + i] = x[base + i] * scale * weight[params.weight_before + i];
    }
    rstd[params.first + row] = scale;
}

#kernel lane_backward_x
@group(0) @binding(0) var<uniform> x: array<vec4<f32>, 4096>; // rows of [T, D]
@group(0) @binding(1) var<uniform> weight: array<vec4<f32>, 4096>; // [D]
@group(0) @binding(2) var<storage, read_write> rstd: array<f32>; // [T]
@group(0) @binding(3) var<uniform> dy: array<vec4<f32>, 4096>; // rows of [T, D]
@group(0) @binding(4) var<storage, read_write> dx: array<vec4<f32>>; // [T, D]

@compute @workgroup_size(8)
fn lane_backward_x(@builtin(global_invocation_id) id: vec3<u32>) {
    let row = min(id.x, params.rows - 1u);
    let quads = params.cols / 4u;
    let x_base = params.x_before + row * quads;
    let dy_base = params.dy_before + row * quads;
    var dots = vec4<f32>(0.0);
    for (var i = 0u; i < quads; i++) {
        dots = fma(x[x_base + i], dy[dy_base + i] * weight[params.weight_before + i], dots);
    }
    let mean = (dots.x + dots.y + dots.z + dots.w) / f32(params.cols);
    let scale = rstd[params.first + row];
    let pull = scale * scale * mean;
    let out = (params.first + row) * quads;
    for (var i = 0u; i < quads; i++) {
        dx[out + i] = scale * (dy[dy_base + i] * weight[params.weight_before + i] - x[x_base + i] * pull);
    }
}
