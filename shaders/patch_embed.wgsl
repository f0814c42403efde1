// CLIP's input: the class token before each picture's patches, and learned positions added to all.
// (The patch convolution itself is a product: its stride is its size.)
#import index

struct Params {
    images: u32,
    patches: u32,
    cols: u32,
}
#params

#kernel assemble
@group(0) @binding(0) var<storage, read_write> patches: array<f32>; // [B, P, D]
@group(0) @binding(1) var<storage, read_write> class_embedding: array<f32>; // [D]
@group(0) @binding(2) var<storage, read_write> position: array<f32>; // [P + 1, D]
@group(0) @binding(3) var<storage, read_write> y: array<f32>; // [B, P + 1, D]

@compute @workgroup_size(64)
fn assemble(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = linear_thread(group, groups, local);
    let tokens = params.patches + 1u;
    if (i >= params.images * tokens * params.cols) {
        return;
    }
    let col = i % params.cols;
    let token = (i / params.cols) % tokens;
    let image = i / (params.cols * tokens);
    var value = class_embedding[col];
    if (token > 0u) {
        value = patches[(image * params.patches + token - 1u) * params.cols + col];
    }
    y[i] = value + position[token * params.cols + col];
}

#kernel backward_position
// dposition[t] += sum over images of dy[:, t]; dclass is the same sum for t = 0.
@group(0) @binding(0) var<storage, read_write> dy: array<f32>; // [B, P + 1, D]
@group(0) @binding(1) var<storage, read_write> dposition: array<f32>; // [P + 1, D]
@group(0) @binding(2) var<storage, read_write> dclass: array<f32>; // [D]

@compute @workgroup_size(64)
fn backward_position(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = linear_thread(group, groups, local);
    let width = (params.patches + 1u) * params.cols;
    if (i >= width) {
        return;
    }
    var sum = 0.0;
    for (var image = 0u; image < params.images; image++) {
        sum += dy[image * width + i];
    }
    dposition[i] += sum;
    if (i < params.cols) {
        dclass[i] += sum;
    }
}
