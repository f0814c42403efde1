// DoRA: an adapted linear's output columns, or its weight's rows, brought to a trained length.
// factor[n] = magnitude[n] / norm[n], 0 where the norm is. VEC: for whole vec4s of columns.
#import index
#import wide

struct Params {
    rows: u32,
    cols: u32,
}
#params

#kernel row_norms
// norm[row] = the length of a row of w. One row a workgroup.
#import reduce
@group(0) @binding(0) var<storage, read_write> w: array<Wide>; // [N, K]
@group(0) @binding(1) var<storage, read_write> norm: array<f32>; // [N]

@compute @workgroup_size(REDUCE_THREADS)
fn row_norms(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let row = linear_group(group, groups);
    if (row >= params.rows) {
        return;
    }
    let width = params.cols / WIDTH;
    let base = row * width;
    var squares = Wide();
    for (var i = lane.index; i < width; i += REDUCE_THREADS) {
        let value = w[base + i];
        squares = fma(value, value, squares);
    }
    let sum = workgroup_sum(lane, sum_of(squares));
    if (lane.index == 0u) {
        norm[row] = sqrt(sum);
    }
}

#kernel scale
// y = factor * x by columns, or with ROWS by rows; with BIAS + bias by columns. y may be x.
#ifdef ROWS
alias Factor = f32;
#else
alias Factor = Wide;
#endif
@group(0) @binding(0) var<storage, read_write> x: array<Wide>; // [T, N]
@group(0) @binding(1) var<storage, read_write> magnitude: array<Factor>; // [N], with ROWS [T]
@group(0) @binding(2) var<storage, read_write> norm: array<Factor>; // as magnitude
@group(0) @binding(3) var<storage, read_write> y: array<Wide>; // [T, N]
#ifdef BIAS
@group(0) @binding(4) var<storage, read_write> bias: array<Wide>; // [N]
#endif

@compute @workgroup_size(64)
fn scale(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = linear_group(group, groups) * 128u + local;
    let width = params.cols / WIDTH;
#unroll e in 0..2
#ifdef ROWS
    let n#{e} = (i + #{e * 64}u) / width;
#else
    let n#{e} = (i + #{e * 64}u) % width;
#endif
    let x#{e} = x[i + #{e * 64}u];
    let norm#{e} = norm[n#{e}];
    let factor#{e} = select(Factor(), magnitude[n#{e}] / norm#{e}, norm#{e} > Factor());
#end
#unroll e in 0..2
    if (i + #{e * 64}u < params.rows * width) {
#ifdef BIAS
        y[i + #{e * 64}u] = fma(factor#{e}, x#{e}, bias[n#{e}]);
#else
        y[i + #{e * 64}u] = factor#{e} * x#{e};
#endif
    }
#end
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

#kernel backward_magnitude_wide
// The same for whole vec4s of columns.
#import column_sums
@group(0) @binding(0) var<storage, read_write> x: array<vec4<f32>>; // [T, N]
@group(0) @binding(1) var<storage, read_write> dy: array<vec4<f32>>; // [T, N]
@group(0) @binding(2) var<storage, read_write> norm: array<vec4<f32>>; // [N]
@group(0) @binding(3) var<storage, read_write> dmagnitude: array<vec4<f32>>; // [N]

@compute @workgroup_size(256)
fn backward_magnitude_wide(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let quads = params.cols / 4u;
    let col = group.x * COLUMN_QUADS + local % COLUMN_QUADS;
    var sum = vec4<f32>();
    if (col < quads) {
        for (var row = local / COLUMN_QUADS; row < params.rows; row += 4u * ROW_LANES) {
#unroll e in 0..4
            let at#{e} = min(row + #{e}u * ROW_LANES, params.rows - 1u) * quads + col;
            let term#{e} = dy[at#{e}] * x[at#{e}];
#end
#unroll e in 0..4
            sum += select(vec4<f32>(), term#{e}, row + #{e}u * ROW_LANES < params.rows);
#end
        }
    }
    let total = column_sum(local, sum);
    if (local < COLUMN_QUADS && col < quads) {
        let length = norm[col];
        dmagnitude[col] += select(vec4<f32>(), total / length, length > vec4<f32>());
    }
}
