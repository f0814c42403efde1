// y = x * keep / (1 - p), or what x has beyond that, keep drawn from a counter: the backward is the same kernel on the
// gradient.
#import index
#import philox

struct Params {
    count: u32,
    threshold: u32, // an element is kept when its word is at least p * 2^32
    kept: f32, // factor of what is kept: 1 / (1 - p)
    seed: u32,
    stream: u32, // which adapter
    step: u32,
    first: u32, // the quad of the first bound element
    dropped: f32, // factor of what is not: 0
}
#params

#kernel apply
// y = factor * x, with ADD added to y.
@group(0) @binding(0) var<storage, read_write> x: array<f32>; // [N]
@group(0) @binding(1) var<storage, read_write> y: array<f32>; // [N]

@compute @workgroup_size(64)
fn apply(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let quad = linear_thread(group, groups, local);
    if (quad * 4u >= params.count) {
        return;
    }
    let words = philox(vec4<u32>(quad + params.first, params.step, params.stream, 0u), vec2<u32>(params.seed, 0u));
    for (var lane = 0u; lane < 4u; lane++) {
        let i = quad * 4u + lane;
        if (i < params.count) {
            let value = x[i] * select(params.dropped, params.kept, words[lane] >= params.threshold);
#ifdef ADD
            y[i] += value;
#else
            y[i] = value;
#endif
        }
    }
}
