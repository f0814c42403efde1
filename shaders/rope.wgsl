// Rotary positions, halves convention: channel j pairs with channel j + E/2. The backward is the inverse rotation.
#import index

struct Params {
    tokens: u32,
    heads: u32,
    half_size: u32, // E / 2
    sign: f32, // 1 forward, -1 backward
}
#params

#kernel rotate
// IN_PLACE: a thread alone reads and writes its pair of x.
@group(0) @binding(0) var<storage, read_write> x: array<f32>; // [T, H, E]
@group(0) @binding(1) var<storage, read_write> positions: array<u32>; // [T]
@group(0) @binding(2) var<storage, read_write> cos_sin: array<f32>; // [positions, 2, E/2]
#ifndef IN_PLACE
@group(0) @binding(3) var<storage, read_write> y: array<f32>; // [T, H, E]
#endif

@compute @workgroup_size(64)
fn rotate(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let at = linear_thread(group, groups, local);
    if (at >= params.tokens * params.heads * params.half_size) {
        return;
    }
    let j = at % params.half_size;
    let head = at / params.half_size; // token * heads + head
    let angle = positions[head / params.heads] * params.half_size * 2u + j;
    let c = cos_sin[angle];
    let s = cos_sin[angle + params.half_size] * params.sign;
    let low = head * params.half_size * 2u + j;
    let high = low + params.half_size;
    let a = x[low];
    let b = x[high];
    let rotated = vec2<f32>(a * c - b * s, b * c + a * s);
#ifdef IN_PLACE
    x[low] = rotated.x;
    x[high] = rotated.y;
#else
    y[low] = rotated.x;
    y[high] = rotated.y;
#endif
}
