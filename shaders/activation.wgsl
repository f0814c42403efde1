// SwiGLU, GELU (exact) and quick-GELU, forward and backward; two vec4s a thread, 64 apart (tensors end
// in padding), read before they are needed: what lies beyond `count` in vain.
#import index

struct Params {
    count: u32, // of vec4s
}
#params

fn sigmoid(x: vec4<f32>) -> vec4<f32> {
    return 1.0 / (1.0 + exp(-x));
}

#ifdef GELU
// The complementary error function of x >= 0 by the continued-fraction-free Chebyshev fit in t = 1 / (1 + x / 2)
// (relative error below 1.2e-7 everywhere, so that GELU's far negative tail stays exact too).
fn erfc_positive(x: vec4<f32>) -> vec4<f32> {
    let t = 1.0 / (0.5 * x + 1.0);
    var p = vec4<f32>(0.17087277);
    p = fma(p, t, vec4<f32>(-0.82215223));
    p = fma(p, t, vec4<f32>(1.48851587));
    p = fma(p, t, vec4<f32>(-1.13520398));
    p = fma(p, t, vec4<f32>(0.27886807));
    p = fma(p, t, vec4<f32>(-0.18628806));
    p = fma(p, t, vec4<f32>(0.09678418));
    p = fma(p, t, vec4<f32>(0.37409196));
    p = fma(p, t, vec4<f32>(1.00002368));
    p = fma(p, t, vec4<f32>(-1.26551223));
    return t * exp(-x * x + p);
}

// The normal distribution function.
fn normal_cdf(x: vec4<f32>) -> vec4<f32> {
    let tail = 0.5 * erfc_positive(abs(x) * 0.70710678);
    return select(1.0 - tail, tail, x < vec4<f32>(0.0));
}
#endif

#kernel swiglu_forward
@group(0) @binding(0) var<storage, read_write> gate: array<vec4<f32>>; // [T, F]
@group(0) @binding(1) var<storage, read_write> up: array<vec4<f32>>; // [T, F]
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>; // [T, F]

@compute @workgroup_size(64)
fn swiglu_forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = linear_group(group, groups) * 128u + local;
#unroll e in 0..2
    let gate#{e} = gate[i + #{e * 64}u];
    let up#{e} = up[i + #{e * 64}u];
#end
#unroll e in 0..2
    if (i + #{e * 64}u < params.count) {
        y[i + #{e * 64}u] = gate#{e} * sigmoid(gate#{e}) * up#{e};
    }
#end
}

#kernel swiglu_backward
// IN_PLACE: dgate and dup take the places of gate and up.
@group(0) @binding(0) var<storage, read_write> gate: array<vec4<f32>>; // [T, F]
@group(0) @binding(1) var<storage, read_write> up: array<vec4<f32>>; // [T, F]
@group(0) @binding(2) var<storage, read_write> dy: array<vec4<f32>>; // [T, F]
#ifndef IN_PLACE
@group(0) @binding(3) var<storage, read_write> dgate: array<vec4<f32>>; // [T, F]
@group(0) @binding(4) var<storage, read_write> dup: array<vec4<f32>>; // [T, F]
#endif

@compute @workgroup_size(64)
fn swiglu_backward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = linear_group(group, groups) * 128u + local;
#unroll e in 0..2
    let gate#{e} = gate[i + #{e * 64}u];
    let up#{e} = up[i + #{e * 64}u];
    let dy#{e} = dy[i + #{e * 64}u];
#end
#unroll e in 0..2
    if (i + #{e * 64}u < params.count) {
        let s = sigmoid(gate#{e});
        let of_gate = dy#{e} * up#{e} * s * (1.0 + gate#{e} * (1.0 - s));
        let of_up = dy#{e} * gate#{e} * s;
#ifdef IN_PLACE
        gate[i + #{e * 64}u] = of_gate;
        up[i + #{e * 64}u] = of_up;
#else
        dgate[i + #{e * 64}u] = of_gate;
        dup[i + #{e * 64}u] = of_up;
#endif
    }
#end
}

#kernel gelu_forward
@group(0) @binding(0) var<storage, read_write> x: array<vec4<f32>>; // [N]
@group(0) @binding(1) var<storage, read_write> y: array<vec4<f32>>; // [N]

@compute @workgroup_size(64)
fn gelu_forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = linear_group(group, groups) * 128u + local;
#unroll e in 0..2
    let x#{e} = x[i + #{e * 64}u];
#end
#unroll e in 0..2
    if (i + #{e * 64}u < params.count) {
        y[i + #{e * 64}u] = x#{e} * normal_cdf(x#{e});
    }
#end
}

#kernel gelu_backward
@group(0) @binding(0) var<storage, read_write> x: array<vec4<f32>>; // [N]
@group(0) @binding(1) var<storage, read_write> dy: array<vec4<f32>>; // [N]
@group(0) @binding(2) var<storage, read_write> dx: array<vec4<f32>>; // [N]

@compute @workgroup_size(64)
fn gelu_backward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = linear_group(group, groups) * 128u + local;
#unroll e in 0..2
    let x#{e} = x[i + #{e * 64}u];
    let dy#{e} = dy[i + #{e * 64}u];
#end
#unroll e in 0..2
    if (i + #{e * 64}u < params.count) {
        let density = 0.39894228 * exp(-0.5 * x#{e} * x#{e});
        dx[i + #{e * 64}u] = dy#{e} * fma(x#{e}, density, normal_cdf(x#{e}));
    }
#end
}

#kernel quick_gelu_forward
@group(0) @binding(0) var<storage, read_write> x: array<vec4<f32>>; // [N]
@group(0) @binding(1) var<storage, read_write> y: array<vec4<f32>>; // [N]

@compute @workgroup_size(64)
fn quick_gelu_forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = linear_group(group, groups) * 128u + local;
#unroll e in 0..2
    let x#{e} = x[i + #{e * 64}u];
#end
#unroll e in 0..2
    if (i + #{e * 64}u < params.count) {
        y[i + #{e * 64}u] = x#{e} * sigmoid(1.702 * x#{e});
    }
#end
}

#kernel quick_gelu_backward
@group(0) @binding(0) var<storage, read_write> x: array<vec4<f32>>; // [N]
@group(0) @binding(1) var<storage, read_write> dy: array<vec4<f32>>; // [N]
@group(0) @binding(2) var<storage, read_write> dx: array<vec4<f32>>; // [N]

@compute @workgroup_size(64)
fn quick_gelu_backward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = linear_group(group, groups) * 128u + local;
#unroll e in 0..2
    let x#{e} = x[i + #{e * 64}u];
    let dy#{e} = dy[i + #{e * 64}u];
#end
#unroll e in 0..2
    if (i + #{e * 64}u < params.count) {
        let s = sigmoid(1.702 * x#{e});
        dx[i + #{e * 64}u] = dy#{e} * s * (1.0 + 1.702 * x#{e} * (1.0 - s));
    }
#end
}
