// AdamW with decoupled decay, in the order of torch.optim.AdamW; the clip factor comes from the gradients' square
// sum on the device. Where that sum is not finite nothing changes.
#import adamw

#kernel step
@group(0) @binding(0) var<storage, read_write> gradient: array<vec4<f32>>; // [N]
@group(0) @binding(1) var<storage, read_write> first_moment: array<vec4<f32>>; // [N]
@group(0) @binding(2) var<storage, read_write> second_moment: array<vec4<f32>>; // [N]
@group(0) @binding(3) var<storage, read_write> square_sum: array<f32>; // [1]
#ifdef STOCHASTIC
@group(0) @binding(4) var<storage, read_write> parameter: array<vec2<u32>>; // [N] packed
#else
@group(0) @binding(4) var<storage, read_write> parameter: array<vec4<f32>>; // [N]
#endif
#ifdef COPY
@group(0) @binding(5) var<storage, read_write> copy: array<vec2<u32>>; // [N] packed
#endif

@compute @workgroup_size(64)
fn step(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = linear_thread(group, groups, local);
    // All under way before the first is waited for.
    let squares = square_sum[0];
    let raw = gradient[i];
    let before_m = first_moment[i];
    let before_v = second_moment[i];
#ifdef STOCHASTIC
    let before = widen_four(parameter[params.copy_first + i]);
#else
    let before = parameter[i];
#endif
    if (i >= params.count || !is_finite(squares)) {
        return;
    }
    let g = raw * gradient_factor(squares);
    let m = params.beta1 * before_m + (1.0 - params.beta1) * g;
    let v = params.beta2 * before_v + (1.0 - params.beta2) * g * g;
    first_moment[i] = m;
    second_moment[i] = v;
    let denominator = sqrt(v) / params.correction2 + params.epsilon;
    let change = params.learning_rate / params.correction1 * (m / denominator);
#ifdef STOCHASTIC
    parameter[params.copy_first + i] = narrow_four(before * params.decay - change, i);
#else
    let p = before * params.decay - change;
    parameter[i] = p;
#endif
#ifdef COPY
    copy[params.copy_first + i] = narrow_four(p);
#endif
}
