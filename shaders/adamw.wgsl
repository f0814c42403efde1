// AdamW with decoupled decay, in the order of torch.optim.AdamW; the clip factor comes from the gradients' square
// sum on the device. Where that sum is not finite nothing changes.
#import index

struct Params {
    count: u32, // of vec4s
    learning_rate: f32,
    beta1: f32,
    beta2: f32,
    epsilon: f32,
    decay: f32, // 1 - learning_rate * weight_decay
    correction1: f32, // 1 - beta1^t
    correction2: f32, // sqrt(1 - beta2^t)
    max_norm: f32, // 0: no clipping
}
#params

#kernel step
@group(0) @binding(0) var<storage, read_write> parameter: array<vec4<f32>>; // [N]
@group(0) @binding(1) var<storage, read_write> gradient: array<vec4<f32>>; // [N]
@group(0) @binding(2) var<storage, read_write> first_moment: array<vec4<f32>>; // [N]
@group(0) @binding(3) var<storage, read_write> second_moment: array<vec4<f32>>; // [N]
@group(0) @binding(4) var<storage, read_write> square_sum: array<f32>; // [1]

@compute @workgroup_size(64)
fn step(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = linear_thread(group, groups, local);
    // By its bits: a fast-math compiler may take it that no value is infinite.
    let finite = (bitcast<u32>(square_sum[0]) & 0x7f800000u) != 0x7f800000u;
    if (i >= params.count || !finite) {
        return;
    }
    var clip = 1.0;
    if (params.max_norm > 0.0) {
        clip = min(1.0, params.max_norm / (sqrt(square_sum[0]) + 1.0e-6));
    }
    let g = gradient[i] * clip;
    let m = params.beta1 * first_moment[i] + (1.0 - params.beta1) * g;
    let v = params.beta2 * second_moment[i] + (1.0 - params.beta2) * g * g;
    first_moment[i] = m;
    second_moment[i] = v;
    let denominator = sqrt(v) / params.correction2 + params.epsilon;
    parameter[i] = parameter[i] * params.decay - params.learning_rate / params.correction1 * (m / denominator);
}
