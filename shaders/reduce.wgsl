// Sums over long arrays in two levels: a workgroup sums a fixed stride of elements to one partial value,
// then one workgroup adds the partial values to an accumulator.
#import index
#import reduce

struct Params {
    count: u32,
    partials: u32,
    slot: u32,
    square: u32,
}
#params

#kernel square_sum
// partial[g] = sum over its elements of x^2 (or of x)
@group(0) @binding(0) var<storage, read_write> x: array<f32>; // [N]
@group(0) @binding(1) var<storage, read_write> partial: array<f32>; // [partials]

@compute @workgroup_size(64)
fn square_sum(@builtin(workgroup_id) group: vec3<u32>, lane: Lane) {
    var sum = 0.0;
    for (var i = group.x * REDUCE_THREADS + lane.index; i < params.count; i += params.partials * REDUCE_THREADS) {
        let value = x[i];
        sum += select(value, value * value, params.square != 0u);
    }
    let total = workgroup_sum(lane, sum);
    if (lane.index == 0u) {
        partial[group.x] = total;
    }
}

#kernel finish
// out[slot] += sum of partial
@group(0) @binding(0) var<storage, read_write> partial: array<f32>; // [partials]
@group(0) @binding(1) var<storage, read_write> out: array<f32>;

@compute @workgroup_size(64)
fn finish(lane: Lane) {
    var sum = 0.0;
    for (var i = lane.index; i < params.partials; i += REDUCE_THREADS) {
        sum += partial[i];
    }
    let total = workgroup_sum(lane, sum);
    if (lane.index == 0u) {
        out[params.slot] += total;
    }
}
