// y = x in another float type. PACKED: x is 16-bit, two to a word, with F16 IEEE's, else bfloat16. TO_F16: y is f16.
// Bits go in and out as u32: no float register can round, flush or quiet what is only moved.
#import index

struct Params {
    count: u32,
    x_offset: u32, // in elements
    y_offset: u32, // in elements; even where y is packed
}
#params

#kernel to_f32
// One word of x a thread.
#import packed
@group(0) @binding(0) var<storage, read_write> x: array<u32>; // [N] packed, from x_offset on
@group(0) @binding(1) var<storage, read_write> y: array<u32>; // [N], bits of f32

@compute @workgroup_size(64)
fn to_f32(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = linear_thread(group, groups, local);
    let at = 2u * i - (params.x_offset & 1u); // wraps where the first word's first half is not wanted
    if (at >= params.count && at + 1u >= params.count) {
        return;
    }
    let word = x[params.x_offset / 2u + i];
#ifdef F16
    let pair = bitcast<vec2<u32>>(widen(word));
#else
    let pair = vec2<u32>(word << 16u, word & 0xffff0000u);
#endif
    if (at < params.count) {
        y[params.y_offset + at] = pair.x;
    }
    if (at + 1u < params.count) {
        y[params.y_offset + at + 1u] = pair.y;
    }
}

#kernel to_f32_wide
// Four elements at a time, four times a thread; count and offsets are multiples of 4.
#import packed
@group(0) @binding(0) var<storage, read_write> x: array<vec2<u32>>; // [N] packed
@group(0) @binding(1) var<storage, read_write> y: array<vec4<u32>>; // [N], bits of f32

fn wide(words: vec2<u32>) -> vec4<u32> {
#ifdef F16
    return bitcast<vec4<u32>>(vec4<f32>(widen(words.x), widen(words.y)));
#else
    return vec4<u32>(words.x << 16u, words.x & 0xffff0000u, words.y << 16u, words.y & 0xffff0000u);
#endif
}

@compute @workgroup_size(64)
fn to_f32_wide(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = first_of_four(group, groups, local);
#unroll e in 0..4
    let words#{e} = x[params.x_offset / 4u + i + #{e * 64}u];
#end
#unroll e in 0..4
    if (i + #{e * 64}u < params.count / 4u) {
        y[params.y_offset / 4u + i + #{e * 64}u] = wide(words#{e});
    }
#end
}

#kernel to_half_wide
// From f32, four elements at a time, four times a thread; count and offsets are multiples of 4.
#import narrow
@group(0) @binding(0) var<storage, read_write> x: array<vec4<u32>>; // [N], bits of f32
@group(0) @binding(1) var<storage, read_write> y: array<vec2<u32>>; // [N] packed

@compute @workgroup_size(64)
fn to_half_wide(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = first_of_four(group, groups, local);
#unroll e in 0..4
    let x#{e} = x[params.x_offset / 4u + i + #{e * 64}u];
#end
#unroll e in 0..4
    if (i + #{e * 64}u < params.count / 4u) {
        let half = vec4<u32>(narrow(x#{e}.x), narrow(x#{e}.y), narrow(x#{e}.z), narrow(x#{e}.w));
        y[params.y_offset / 4u + i + #{e * 64}u] = vec2<u32>(half.x | (half.y << 16u), half.z | (half.w << 16u));
    }
#end
}

#kernel to_half
#import narrow
// To nearest, ties to even. One word of y a thread; an odd last one is filled up with zero.
@group(0) @binding(0) var<storage, read_write> x: array<u32>; // [N], bits of f32, or packed
@group(0) @binding(1) var<storage, read_write> y: array<u32>; // [N] packed

#ifdef PACKED
#import packed
fn load(at: u32) -> u32 {
    return bitcast<u32>(widen_one(x[at / 2u], at));
}
#else
fn load(at: u32) -> u32 {
    return x[at];
}
#endif

@compute @workgroup_size(64)
fn to_half(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = linear_thread(group, groups, local);
    let at = 2u * i;
    if (at >= params.count) {
        return;
    }
    var word = narrow(load(params.x_offset + at));
    if (at + 1u < params.count) {
        word |= narrow(load(params.x_offset + at + 1u)) << 16u;
    }
    y[params.y_offset / 2u + i] = word;
}
