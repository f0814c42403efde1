// loss[row] = logsumexp(logits[row]) - logits[row, target]; with GRADIENT the logits become
// (softmax - onehot) * scale in place. One row a workgroup.
#import index
#import reduce

struct Params {
    rows: u32,
    vocab_size: u32,
    scale: f32,
}
#params

@group(0) @binding(0) var<storage, read_write> logits: array<f32>; // [N, V]
@group(0) @binding(1) var<storage, read_write> targets: array<u32>; // [N]
@group(0) @binding(2) var<storage, read_write> losses: array<f32>; // [N]

fn row_loss(row: u32, lane: Lane) {
    let base = row * params.vocab_size;
    // Finite, because fast-math compilers may assume that no infinity occurs.
    var largest = -3.0e38;
    for (var i = lane.index; i < params.vocab_size; i += REDUCE_THREADS) {
        largest = max(largest, logits[base + i]);
    }
    largest = workgroup_max(lane, largest);
    var sum = 0.0;
    for (var i = lane.index; i < params.vocab_size; i += REDUCE_THREADS) {
        sum += exp(logits[base + i] - largest);
    }
    sum = workgroup_sum(lane, sum);
    let hit = targets[row];
    if (lane.index == 0u) {
        losses[row] = log(sum) + largest - logits[base + hit];
    }
#ifdef GRADIENT
    storageBarrier();
    for (var i = lane.index; i < params.vocab_size; i += REDUCE_THREADS) {
        let probability = exp(logits[base + i] - largest) / sum;
        logits[base + i] = (probability - select(0.0, 1.0, i == hit)) * params.scale;
    }
#endif
}

#kernel loss
@compute @workgroup_size(64)
fn loss(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let row = linear_group(group, groups);
    if (row < params.rows) {
        row_loss(row, lane);
    }
}

#kernel loss_and_gradient
@compute @workgroup_size(64)
fn loss_and_gradient(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let row = linear_group(group, groups);
    if (row < params.rows) {
        row_loss(row, lane);
    }
}
