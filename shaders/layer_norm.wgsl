// y = (x - mean) * rstd * w + b with the biased variance, one row a workgroup. VEC: where D is a multiple of 4.
#import index
#import reduce
#import wide

struct Params {
    rows: u32,
    cols: u32,
    eps: f32,
}
#params

#kernel forward
@group(0) @binding(0) var<storage, read_write> x: array<Wide>; // [T, D]
@group(0) @binding(1) var<storage, read_write> weight: array<Wide>; // [D]
@group(0) @binding(2) var<storage, read_write> bias: array<Wide>; // [D]
@group(0) @binding(3) var<storage, read_write> y: array<Wide>; // [T, D]
@group(0) @binding(4) var<storage, read_write> stats: array<vec2<f32>>; // [T] of mean and rstd

@compute @workgroup_size(REDUCE_THREADS)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let row = linear_group(group, groups);
    if (row >= params.rows) {
        return;
    }
    let width = params.cols / WIDTH;
    let base = row * width;
    var sum = Wide();
    for (var i = lane.index; i < width; i += REDUCE_THREADS) {
        sum += x[base + i];
    }
    let mean = workgroup_sum(lane, sum_of(sum)) / f32(params.cols);
    var squares = Wide();
    for (var i = lane.index; i < width; i += REDUCE_THREADS) {
        let value = x[base + i] - mean;
        squares = fma(value, value, squares);
    }
    let rstd = 1.0 / sqrt(workgroup_sum(lane, sum_of(squares)) / f32(params.cols) + params.eps);
    for (var i = lane.index; i < width; i += REDUCE_THREADS) {
        y[base + i] = fma((x[base + i] - mean) * rstd, weight[i], bias[i]);
    }
    if (lane.index == 0u) {
        stats[row] = vec2<f32>(mean, rstd);
    }
}

#kernel backward_x
// With n = (x - mean) * rstd and g = dy * w: dx = rstd * (g - mean(g) - n * mean(g * n)).
@group(0) @binding(0) var<storage, read_write> x: array<Wide>; // [T, D]
@group(0) @binding(1) var<storage, read_write> weight: array<Wide>; // [D]
@group(0) @binding(2) var<storage, read_write> stats: array<vec2<f32>>; // [T]
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
    let mean = stats[row].x;
    let rstd = stats[row].y;
    var sum = Wide();
    var dots = Wide();
    for (var i = lane.index; i < width; i += REDUCE_THREADS) {
        let g = dy[base + i] * weight[i];
        sum += g;
        dots = fma(g, (x[base + i] - mean) * rstd, dots);
    }
    let mean_g = workgroup_sum(lane, sum_of(sum)) / f32(params.cols);
    let mean_gn = workgroup_sum(lane, sum_of(dots)) / f32(params.cols);
    for (var i = lane.index; i < width; i += REDUCE_THREADS) {
        let n = (x[base + i] - mean) * rstd;
        dx[base + i] = rstd * (dy[base + i] * weight[i] - mean_g - n * mean_gn);
    }
}

#kernel backward_weight
// dw += sum of dy * n, db += sum of dy over the rows: a thread owns a column and adds its rows in order.
@group(0) @binding(0) var<storage, read_write> x: array<f32>; // [T, D]
@group(0) @binding(1) var<storage, read_write> stats: array<vec2<f32>>; // [T]
@group(0) @binding(2) var<storage, read_write> dy: array<f32>; // [T, D]
@group(0) @binding(3) var<storage, read_write> dweight: array<f32>; // [D]
@group(0) @binding(4) var<storage, read_write> dbias: array<f32>; // [D]

@compute @workgroup_size(64)
fn backward_weight(@builtin(global_invocation_id) id: vec3<u32>) {
    let col = id.x;
    if (col >= params.cols) {
        return;
    }
    var sum_weight = 0.0;
    var sum_bias = 0.0;
    for (var row = 0u; row < params.rows; row++) {
        let at = row * params.cols + col;
        let stat = stats[row];
        sum_weight = fma(dy[at], (x[at] - stat.x) * stat.y, sum_weight);
        sum_bias += dy[at];
    }
    dweight[col] += sum_weight;
    dbias[col] += sum_bias;
}

#kernel backward_weight_wide
// The same for whole vec4s of columns.
#import column_sums
@group(0) @binding(0) var<storage, read_write> x: array<vec4<f32>>; // [T, D]
@group(0) @binding(1) var<storage, read_write> stats: array<vec2<f32>>; // [T]
@group(0) @binding(2) var<storage, read_write> dy: array<vec4<f32>>; // [T, D]
@group(0) @binding(3) var<storage, read_write> dweight: array<vec4<f32>>; // [D]
@group(0) @binding(4) var<storage, read_write> dbias: array<vec4<f32>>; // [D]

@compute @workgroup_size(256)
fn backward_weight_wide(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let quads = params.cols / 4u;
    let col = group.x * COLUMN_QUADS + local % COLUMN_QUADS;
    var sum_weight = vec4<f32>();
    var sum_bias = vec4<f32>();
    if (col < quads) {
        for (var row = local / COLUMN_QUADS; row < params.rows; row += 4u * ROW_LANES) {
#unroll e in 0..4
            let row#{e} = min(row + #{e}u * ROW_LANES, params.rows - 1u);
            let dy#{e} = select(vec4<f32>(), dy[row#{e} * quads + col], row + #{e}u * ROW_LANES < params.rows);
            let n#{e} = (x[row#{e} * quads + col] - stats[row#{e}].x) * stats[row#{e}].y;
#end
#unroll e in 0..4
            sum_weight = fma(dy#{e}, n#{e}, sum_weight);
            sum_bias += dy#{e};
#end
        }
    }
    let total_weight = column_sum(local, sum_weight);
    let total_bias = column_sum(local, sum_bias);
    if (local < COLUMN_QUADS && col < quads) {
        dweight[col] += total_weight;
        dbias[col] += total_bias;
    }
}
