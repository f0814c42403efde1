// AdamW with moments of eight bits, as bitsandbytes keeps them: blocks of 256 elements, each with its largest size of
// either moment, and for every element the index of the nearest value of a map in units of that. The decay comes after
// the update. A workgroup owns a block, a thread four elements of it.
#import adamw
#import reduce

// In `map`: 256 values for the first moment, 256 for the second, then for each the 257 bounds between which a value
// is nearest: index k from bounds[k] to bounds[k + 1].
const BOUNDS: u32 = 512u;

#kernel step
@group(0) @binding(0) var<storage, read_write> gradient: array<vec4<f32>>; // [N]
@group(0) @binding(1) var<storage, read_write> first_moment: array<u32>; // [N] indices, four to a word
@group(0) @binding(2) var<storage, read_write> second_moment: array<u32>; // [N] indices, four to a word
@group(0) @binding(3) var<storage, read_write> absmax: array<vec2<f32>>; // [blocks], of both moments
@group(0) @binding(4) var<storage, read_write> map: array<f32>; // [512 + 514]
@group(0) @binding(5) var<storage, read_write> square_sum: array<f32>; // [1]
#ifdef STOCHASTIC
@group(0) @binding(6) var<storage, read_write> parameter: array<vec2<u32>>; // [N] packed
#else
@group(0) @binding(6) var<storage, read_write> parameter: array<vec4<f32>>; // [N]
#endif
#ifdef COPY
@group(0) @binding(7) var<storage, read_write> copy: array<vec2<u32>>; // [N] packed
#endif

fn decoded(word: u32, first: u32) -> vec4<f32> {
    return vec4<f32>(
        map[first + (word & 0xffu)],
        map[first + ((word >> 8u) & 0xffu)],
        map[first + ((word >> 16u) & 0xffu)],
        map[first + (word >> 24u)],
    );
}

// The map has seven decades, from 1e-7 to 1: `levels` << decade values to each, in the middles of as many equal parts
// of it, negative ones below `zero`. Between decades the nearest value may be the neighbour of the one whose part it
// is. Halfway between two values the even index wins.
fn nearest(x: vec4<f32>, levels: u32, zero: i32, bounds: u32) -> vec4<i32> {
    let size = abs(x);
    var decade = vec4<u32>(0u);
    var scaled = size * 1.0e6;
#unroll e in 0..6
    {
        let above = size > vec4<f32>(1.0e-#{6 - e});
        decade += select(vec4<u32>(0u), vec4<u32>(1u), above);
        scaled = select(scaled, scaled * 0.1, above);
    }
#end
    let parts = vec4<u32>(levels) << decade;
    let place = clamp((scaled - 0.1) * vec4<f32>(parts) / 0.9, vec4<f32>(0.0), vec4<f32>(parts - 1u));
    let rank = vec4<i32>(parts - (levels - 1u)) + vec4<i32>(place);
    var index = zero + select(rank, -rank, x < vec4<f32>(0.0));
    let at = vec4<u32>(index) + bounds;
    let lower = vec4<f32>(map[at.x], map[at.y], map[at.z], map[at.w]);
    let upper = vec4<f32>(map[at.x + 1u], map[at.y + 1u], map[at.z + 1u], map[at.w + 1u]);
    let odd = (index & vec4<i32>(1)) == vec4<i32>(1);
    index += select(vec4<i32>(0), vec4<i32>(1), (x > upper) | ((x == upper) & odd));
    index -= select(vec4<i32>(0), vec4<i32>(1), (x < lower) | ((x == lower) & odd));
    return index;
}

fn packed(index: vec4<i32>) -> u32 {
    let byte = vec4<u32>(index);
    return byte.x | (byte.y << 8u) | (byte.z << 16u) | (byte.w << 24u);
}

fn largest(x: vec4<f32>) -> f32 {
    return max(max(x.x, x.y), max(x.z, x.w));
}

// In units of the block's largest; a block of zeros has none.
fn units(x: vec4<f32>, most: f32) -> vec4<f32> {
    return select(vec4<f32>(0.0), x / most, most > 0.0);
}

@compute @workgroup_size(64)
fn step(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let block = linear_group(group, groups);
    if (block >= params.count) {
        return;
    }
    let i = block * 64u + lane.index;
    let squares = square_sum[0];
    let g = gradient[i] * gradient_factor(squares);
    let present = absmax[params.absmax_first + block];
    let m = params.beta1 * (decoded(first_moment[i], 0u) * present.x) + (1.0 - params.beta1) * g;
    let v = params.beta2 * (decoded(second_moment[i], 256u) * present.y) + (1.0 - params.beta2) * g * g;
    let largest_m = workgroup_max(lane, largest(abs(m)));
    let largest_v = workgroup_max(lane, largest(v));
    if (!is_finite(squares)) {
        return;
    }
    if (lane.index == 0u) {
        absmax[params.absmax_first + block] = vec2<f32>(largest_m, largest_v);
    }
    var index = nearest(units(m, largest_m), 1u, 127, BOUNDS);
    // No moment turns from negative to zero.
    index -= select(vec4<i32>(0), vec4<i32>(1), (m < vec4<f32>(0.0)) & (index == vec4<i32>(127)));
    first_moment[i] = packed(index);
    second_moment[i] = packed(nearest(units(v, largest_v), 2u, 0, BOUNDS + 257u));

    let rate = params.learning_rate * params.correction2 / params.correction1;
    let change = rate * (m / (sqrt(v) + params.correction2 * params.epsilon));
#ifdef STOCHASTIC
    parameter[params.copy_first + i] =
        narrow_four((widen_four(parameter[params.copy_first + i]) - change) * params.decay, i);
#else
    let p = (parameter[i] - change) * params.decay;
    parameter[i] = p;
#endif
#ifdef COPY
    copy[params.copy_first + i] = narrow_four(p);
#endif
}
