// What a device can reach at most: kernels that do one thing as fast as it goes. src/ops/roof.rs counts what they do.
#ifdef HALF
enable f16;
#endif
#ifdef SIDE
enable f16;
enable wgpu_cooperative_matrix;
#endif
#import index

struct Params {
    count: u32, // rounds; vec4s in copy and read_all
    stride: u32, // threads in read_all
    factor: f32,
    term: f32,
}
#params

#kernel multiply_add
// CHAINS independent chains of fused multiply-adds a thread, DEPTH long a round, of vectors or (SCALAR) of numbers.
@group(0) @binding(0) var<storage, read_write> out: array<f32>; // [threads]

#ifdef HALF
#ifdef SCALAR
alias Number = f16;
#else
alias Number = vec4<f16>;
#endif
alias Part = f16;
#else
#ifdef SCALAR
alias Number = f32;
#else
alias Number = vec4<f32>;
#endif
alias Part = f32;
#endif

@compute @workgroup_size(64)
fn multiply_add(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let thread = linear_thread(group, groups, local);
    let a = Number(Part(params.factor));
    let b = Number(Part(params.term));
    let start = Part(f32(local) * 0.01);
#unroll c in 0..CHAINS
    var x#{c} = Number(start + Part(#{c}));
#end
    for (var round = 0u; round < params.count; round++) {
#unroll d in 0..DEPTH
#unroll c in 0..CHAINS
        x#{c} = fma(x#{c}, a, b);
#end
#end
    }
    var sum = x0;
#unroll c in 1..CHAINS
    sum += x#{c};
#end
#ifdef SCALAR
    out[thread] = f32(sum);
#else
    out[thread] = f32(sum.x + sum.y + sum.z + sum.w);
#endif
}

#kernel matrix_multiply_add
// CHAINS accumulators a subgroup, each of DEPTH products of the same two matrices a round, all in registers.
@group(0) @binding(0) var<storage, read_write> out: array<f32>; // [threads]
@group(0) @binding(1) var<storage, read_write> count: array<f32>; // [1]: subgroups of a workgroup

const CELLS: u32 = #{SIDE * SIDE}u;
var<workgroup> operands: array<f16, #{SIDE * SIDE}>;
var<workgroup> results: array<f32, #{128 / SIDE * SIDE * SIDE}>; // a matrix of each subgroup of SIDE lanes or more

alias Sum = coop_mat#{SIDE}x#{SIDE}<f32, C>;

@compute @workgroup_size(128)
fn matrix_multiply_add(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
) {
    // Values that differ, or a driver might see through it.
    for (var at = local; at < CELLS; at += 128u) {
        operands[at] = f16(params.factor * f32(at % 5u) / #{SIDE * 4}.0);
    }
    for (var at = local; at < #{128 / SIDE}u * CELLS; at += 128u) {
        results[at] = params.term * f32(at % 7u);
    }
    workgroupBarrier();
    let slot = min(subgroup, #{128 / SIDE - 1}u) * CELLS;
    let a = coopLoadT<coop_mat#{SIDE}x#{SIDE}<f16, A>>(&operands[0], #{SIDE}u);
    let b = coopLoad<coop_mat#{SIDE}x#{SIDE}<f16, B>>(&operands[0], #{SIDE}u);
#unroll c in 0..CHAINS
    var c#{c} = coopLoadT<Sum>(&results[#{c % (128 / SIDE)}u * CELLS], #{SIDE}u);
#end
    for (var round = 0u; round < params.count; round++) {
#unroll d in 0..DEPTH
#unroll c in 0..CHAINS
        c#{c} = coopMultiplyAdd(a, b, c#{c});
#end
#end
    }
    var sum = 0.0;
#unroll c in 0..CHAINS
    workgroupBarrier();
    coopStoreT(c#{c}, &results[slot], #{SIDE}u);
    workgroupBarrier();
    sum += results[local];
#end
    out[linear_group(group, groups) * 128u + local] = sum;
    if (linear_group(group, groups) == 0u && local == 0u) {
        count[0] = f32(subgroups);
    }
}

#kernel copy
// EACH vec4s a thread, all of them read before one is written, neighbours' beside each other.
@group(0) @binding(0) var<storage, read_write> x: array<vec4<f32>>; // [count]
@group(0) @binding(1) var<storage, read_write> y: array<vec4<f32>>; // [count]

@compute @workgroup_size(64)
fn copy(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = linear_group(group, groups) * #{EACH * 64}u + local;
#unroll e in 0..EACH
    let value#{e} = x[i + #{e * 64}u];
#end
#unroll e in 0..EACH
    if (i + #{e * 64}u < params.count) {
        y[i + #{e * 64}u] = value#{e};
    }
#end
}

#kernel read_all
// A thread sums every stride-th vec4 from its own on.
@group(0) @binding(0) var<storage, read_write> x: array<vec4<f32>>; // [count]
@group(0) @binding(1) var<storage, read_write> out: array<f32>; // [stride]

@compute @workgroup_size(64)
fn read_all(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let thread = linear_thread(group, groups, local);
    var sum = vec4<f32>();
    for (var i = thread; i < params.count; i += params.stride) {
        sum += x[i];
    }
    out[thread] = sum.x + sum.y + sum.z + sum.w;
}

#kernel workgroup_read
// DEPTH vec4s of workgroup memory a round and thread, neighbours by neighbours.
@group(0) @binding(0) var<storage, read_write> out: array<f32>; // [threads]

var<workgroup> cells: array<vec4<f32>, 512>;

@compute @workgroup_size(64)
fn workgroup_read(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
#unroll c in 0..8
    cells[local + #{c*64}u] = vec4<f32>(f32(local) * params.factor);
#end
    workgroupBarrier();
    var sum0 = vec4<f32>();
    var sum1 = vec4<f32>();
    for (var round = 0u; round < params.count; round++) {
        let first = local + round;
#unroll d in 0..DEPTH/2
        sum0 += cells[(first + #{d*128}u) & 511u];
        sum1 += cells[(first + #{d*128+64}u) & 511u];
#end
    }
    let sum = sum0 + sum1;
    out[linear_thread(group, groups, local)] = sum.x + sum.y + sum.z + sum.w;
}

#kernel nothing
@group(0) @binding(0) var<storage, read_write> out: array<f32>; // [1]

@compute @workgroup_size(64)
fn nothing(@builtin(local_invocation_index) local: u32) {
    if (local == params.count) {
        out[0] = 1.0;
    }
}
