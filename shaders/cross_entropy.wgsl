// loss[row] = logsumexp(logits[row]) - logits[row, target]; with GRADIENT the logits become
// (softmax - onehot) * scale in place. One row a workgroup. VEC: where the vocabulary is a multiple of 4.
#import index
#import reduce
#import wide

struct Params {
    rows: u32,
    vocab_size: u32,
    scale: f32,
}
#params

@group(0) @binding(0) var<storage, read_write> logits: array<Wide>; // [N, V]
@group(0) @binding(1) var<storage, read_write> targets: array<u32>; // [N]
@group(0) @binding(2) var<storage, read_write> losses: array<f32>; // [N]

// Finite, because fast-math compilers may assume that no infinity occurs.
const LOWEST: f32 = -3.0e38;

fn row_loss(row: u32, lane: Lane) {
    let width = params.vocab_size / WIDTH;
    let base = row * width;
    // In one pass: a thread's sum of exponentials is relative to the largest logit that it has seen, four of a turn.
    var largest = LOWEST;
    var sum = 0.0;
    for (var i = lane.index; i < width; i += 4u * REDUCE_THREADS) {
#unroll e in 0..4
        let x#{e} = logits[base + min(i + #{e}u * REDUCE_THREADS, width - 1u)];
#end
#unroll e in 1..4
        let in#{e} = i + #{e}u * REDUCE_THREADS < width;
#end
        // Beyond the end the last ones again, which change no maximum.
        let next = max(largest, largest_of(max(max(x0, x1), max(x2, x3))));
        var terms = exp(x0 - next);
#unroll e in 1..4
        terms += select(Wide(), exp(x#{e} - next), in#{e});
#end
        sum = fma(sum, exp(largest - next), sum_of(terms));
        largest = next;
    }
    let of_thread = largest;
    largest = workgroup_max(lane, largest);
    sum = workgroup_sum(lane, sum * exp(of_thread - largest));
    let hit = targets[row];
    if (lane.index == 0u) {
#ifdef VEC
        let logit = logits[base + hit / 4u][hit % 4u];
#else
        let logit = logits[base + hit];
#endif
        losses[row] = log(sum) + largest - logit;
    }
#ifdef GRADIENT
    storageBarrier();
    for (var i = lane.index; i < width; i += 4u * REDUCE_THREADS) {
#unroll e in 0..4
        let x#{e} = logits[base + min(i + #{e}u * REDUCE_THREADS, width - 1u)];
#end
#unroll e in 0..4
        if (i + #{e}u * REDUCE_THREADS < width) {
            let at = i + #{e}u * REDUCE_THREADS;
            let onehot = select(Wide(), Wide(1.0), places(at) == Places(hit));
            logits[base + at] = (exp(x#{e} - largest) / sum - onehot) * params.scale;
        }
#end
    }
#endif
}

#kernel loss
@compute @workgroup_size(REDUCE_THREADS)
fn loss(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let row = linear_group(group, groups);
    if (row < params.rows) {
        row_loss(row, lane);
    }
}

#kernel loss_and_gradient
@compute @workgroup_size(REDUCE_THREADS)
fn loss_and_gradient(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let row = linear_group(group, groups);
    if (row < params.rows) {
        row_loss(row, lane);
    }
}
