// Sums and maxima over a workgroup of 64 threads, or as many as THREADS says, in a fixed order; with subgroups where the device has them.
// Every thread must call them, and gets the result.

struct Lane {
    @builtin(local_invocation_index) index: u32,
#ifdef SUBGROUPS
    @builtin(num_subgroups) subgroups: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) in_subgroup: u32,
#endif
}

#ifdef THREADS
const REDUCE_THREADS: u32 = #{THREADS}u;
#else
const REDUCE_THREADS: u32 = 64u;
#endif
var<workgroup> reduce_scratch: array<f32, REDUCE_THREADS>;

#ifdef SUBGROUPS
fn workgroup_sum(lane: Lane, value: f32) -> f32 {
    let part = subgroupAdd(value);
    if (lane.in_subgroup == 0u) {
        reduce_scratch[lane.subgroup] = part;
    }
    workgroupBarrier();
    var total = 0.0;
    for (var i = 0u; i < lane.subgroups; i++) {
        total += reduce_scratch[i];
    }
    workgroupBarrier();
    return total;
}

fn workgroup_max(lane: Lane, value: f32) -> f32 {
    let part = subgroupMax(value);
    if (lane.in_subgroup == 0u) {
        reduce_scratch[lane.subgroup] = part;
    }
    workgroupBarrier();
    var total = reduce_scratch[0];
    for (var i = 1u; i < lane.subgroups; i++) {
        total = max(total, reduce_scratch[i]);
    }
    workgroupBarrier();
    return total;
}
#else
fn workgroup_sum(lane: Lane, value: f32) -> f32 {
    reduce_scratch[lane.index] = value;
    workgroupBarrier();
    for (var width = REDUCE_THREADS / 2u; width > 0u; width /= 2u) {
        if (lane.index < width) {
            reduce_scratch[lane.index] += reduce_scratch[lane.index + width];
        }
        workgroupBarrier();
    }
    let total = reduce_scratch[0];
    workgroupBarrier();
    return total;
}

fn workgroup_max(lane: Lane, value: f32) -> f32 {
    reduce_scratch[lane.index] = value;
    workgroupBarrier();
    for (var width = REDUCE_THREADS / 2u; width > 0u; width /= 2u) {
        if (lane.index < width) {
            reduce_scratch[lane.index] = max(reduce_scratch[lane.index], reduce_scratch[lane.index + width]);
        }
        workgroupBarrier();
    }
    let total = reduce_scratch[0];
    workgroupBarrier();
    return total;
}
#endif
