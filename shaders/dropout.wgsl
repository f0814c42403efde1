// y = x * keep / (1 - p), or what x has beyond that, keep drawn from a counter: the backward is the same kernel on the
// gradient. Two vec4s a thread (tensors end in padding), read before the draw.
#import index
#import philox

struct Params {
    count: u32, // of vec4s
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
@group(0) @binding(0) var<storage, read_write> x: array<vec4<f32>>; // [N]
@group(0) @binding(1) var<storage, read_write> y: array<vec4<f32>>; // [N]

@compute @workgroup_size(64)
fn apply(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = linear_group(group, groups) * 128u + local;
#unroll e in 0..2
    let x#{e} = x[i + #{e * 64}u];
#ifdef ADD
    let y#{e} = y[i + #{e * 64}u];
#endif
#end
#unroll e in 0..2
    if (i + #{e * 64}u < params.count) {
        let counter = vec4<u32>(params.first + i + #{e * 64}u, params.step, params.stream, 0u);
        let words = philox(counter, vec2<u32>(params.seed, 0u));
        let keep = words >= vec4<u32>(params.threshold);
        let value = x#{e} * select(vec4<f32>(params.dropped), vec4<f32>(params.kept), keep);
#ifdef ADD
        y[i + #{e * 64}u] = y#{e} + value;
#else
        y[i + #{e * 64}u] = value;
#endif
    }
#end
}
