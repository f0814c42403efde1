// Sums over long arrays in two levels: a workgroup sums a fixed stride of elements to one partial value,
// then one workgroup adds the partial values to an accumulator.
#import index
#import reduce

struct Params {
    count: u32,
    partials: u32, // a multiple of 4
    slot: u32,
    square: u32,
}
#params

#kernel square_sum
// partial[g] = sum over its elements of x^2 (or of x), four vec4s of each thread under way.
@group(0) @binding(0) var<storage, read_write> x: array<vec4<f32>>; // [N]
@group(0) @binding(1) var<storage, read_write> partial: array<f32>; // [partials]

fn term(value: vec4<f32>) -> vec4<f32> {
    return select(value, value * value, params.square != 0u);
}

@compute @workgroup_size(64)
fn square_sum(@builtin(workgroup_id) group: vec3<u32>, lane: Lane) {
    let quads = params.count / 4u;
    var sum = vec4<f32>();
    for (var i = group.x * 256u + lane.index; i < quads; i += params.partials * 256u) {
#unroll e in 0..4
        let x#{e} = term(x[i + #{e * 64}u]);
#end
#unroll e in 0..4
        sum += select(vec4<f32>(), x#{e}, i + #{e * 64}u < quads);
#end
    }
    // What is no whole vec4: behind it lies no element.
    let last = vec4<u32>(4u * quads) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(params.count);
    if (group.x == 0u && lane.index == 0u && last.x) {
        sum += select(vec4<f32>(), term(x[quads]), last);
    }
    let total = workgroup_sum(lane, (sum.x + sum.y) + (sum.z + sum.w));
    if (lane.index == 0u) {
        partial[group.x] = total;
    }
}

#kernel finish
// out[slot] += sum of partial
@group(0) @binding(0) var<storage, read_write> partial: array<vec4<f32>>; // [partials]
@group(0) @binding(1) var<storage, read_write> out: array<f32>;

@compute @workgroup_size(64)
fn finish(lane: Lane) {
    var sum = vec4<f32>();
    for (var i = lane.index; i < params.partials / 4u; i += 64u) {
        sum += partial[i];
    }
    let total = workgroup_sum(lane, (sum.x + sum.y) + (sum.z + sum.w));
    if (lane.index == 0u) {
        out[params.slot] += total;
    }
}
