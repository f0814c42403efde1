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
// IN_PLACE: a thread alone reads and writes its pairs of x. VEC: four of them, where E / 2 is a multiple of 4.
#import wide
@group(0) @binding(0) var<storage, read_write> x: array<Wide>; // [T, H, E]
@group(0) @binding(1) var<storage, read_write> positions: array<u32>; // [T]
@group(0) @binding(2) var<storage, read_write> cos_sin: array<Wide>; // [positions, 2, E/2]
#ifndef IN_PLACE
@group(0) @binding(3) var<storage, read_write> y: array<Wide>; // [T, H, E]
#endif

@compute @workgroup_size(64)
fn rotate(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let at = linear_thread(group, groups, local);
    let half_size = params.half_size / WIDTH;
    if (at >= params.tokens * params.heads * half_size) {
        return;
    }
    let head = at / half_size; // token * heads + head
    let j = at - head * half_size;
    let low = head * half_size * 2u + j;
    let high = low + half_size;
    let a = x[low];
    let b = x[high];
    let angle = positions[head / params.heads] * half_size * 2u + j;
    let c = cos_sin[angle];
    let s = cos_sin[angle + half_size] * params.sign;
#ifdef IN_PLACE
    x[low] = a * c - b * s;
    x[high] = b * c + a * s;
#else
    y[low] = a * c - b * s;
    y[high] = b * c + a * s;
#endif
}
