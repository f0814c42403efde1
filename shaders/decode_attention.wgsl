// Attention of few queries over many keys, as decoding wants it on a GPU: where a workgroup for each query and head would
// leave most of the device idle, the keys are cut into parts of 128, counted from the first one that a query sees, and a
// workgroup takes one part for ROWS query heads that share its keys. A second kernel joins the parts in order. Where a
// part ends follows from the query's range alone, so a query's result does not depend on what else is in the batch.
//
// Heads are whole vec4s, E up to 4 * QUADS. With one part the first kernel's results are the last ones.

struct Params {
    queries: u32, // T
    heads: u32, // H
    kv_heads: u32, // K
    head_size: u32, // E
    scale: f32,
    parts: u32, // P
}
#params

// Finite: a fast-math compiler may assume that no infinity occurs.
const MASKED: f32 = -3.0e38;

#kernel parts
// Scores by 8 lanes a key, 16 keys at once, whose sums go through workgroup memory; then the part's maximum and weights;
// then a lane is a vec4 of channels and takes every GROUPSth key.
@group(0) @binding(0) var<storage, read_write> q: array<vec4<f32>>; // [T, H, E]
@group(0) @binding(1) var<storage, read_write> k: array<vec4<f32>>; // [S, K, E]
@group(0) @binding(2) var<storage, read_write> v: array<vec4<f32>>; // [S, K, E]
@group(0) @binding(3) var<storage, read_write> ranges: array<vec2<u32>>; // [T]
@group(0) @binding(4) var<storage, read_write> out: array<vec4<f32>>; // [T, H, P, E], each part's weights summing to 1
@group(0) @binding(5) var<storage, read_write> stats: array<vec2<f32>>; // [T, H, P]: maximum and sum, or as attention's

const PART: u32 = 128u;
// Keys of a pass: each lane adds up one score of it.
const KEYS: u32 = #{128 / ROWS}u;
const GROUPS: u32 = #{128 / QUADS}u;

var<workgroup> queries: array<vec4<f32>, #{ROWS * QUADS}>; // [ROWS, E]
var<workgroup> dots: array<f32, 1152>; // [ROWS, KEYS, 8 lanes and padding]
var<workgroup> maxima: array<f32, 128>; // [ROWS, KEYS]
var<workgroup> tops: array<f32, 16>; // each of 8 maxima
var<workgroup> weights: array<f32, #{ROWS * 128}>; // [ROWS, PART]
var<workgroup> sums: array<vec4<f32>, 128>; // [GROUPS, E]
var<workgroup> weight_sums: array<f32, #{128 / QUADS}>; // [GROUPS]
var<workgroup> span: vec2<u32>;

@compute @workgroup_size(128)
fn parts(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let query = group.z;
    let quads = params.head_size / 4u;
    // A key/value head's query heads go ROWS by ROWS; what is over in the last slice repeats its last head, unwritten.
    let group_size = params.heads / params.kv_heads;
    let slices = (group_size + #{ROWS - 1}u) / #{ROWS}u;
    let kv_head = group.y / slices;
    let head = kv_head * group_size + group.y % slices * #{ROWS}u;
    let heads_end = (kv_head + 1u) * group_size;
    let range = ranges[query];
    var first = min(range.x + group.x * PART, range.y);
    var end = min(first + PART, range.y);
#import span
    let quad = lane % #{QUADS}u;
    let inside = min(quad, quads - 1u);
    if (first == end) {
#unroll r in 0..ROWS
        if (head + #{r}u < heads_end) {
            let row = (query * params.heads + head + #{r}u) * params.parts + group.x;
            if (lane < quads) {
                out[row * quads + lane] = vec4<f32>(0.0);
            }
            if (lane == 0u) {
                stats[row] = select(vec2<f32>(MASKED, 0.0), vec2<f32>(3.0e38, 0.0), params.parts == 1u);
            }
        }
#end
        return;
    }
    for (var i = lane; i < #{ROWS * QUADS}u; i += 128u) {
        let row = query * params.heads + min(head + i / #{QUADS}u, heads_end - 1u);
        let at = i % #{QUADS}u;
        queries[i] = select(vec4<f32>(0.0), q[row * quads + min(at, quads - 1u)] * params.scale, at < quads);
    }
    workgroupBarrier();

    let owned = lane / KEYS;
#unroll i in 0..ROWS
    var score#{i} = MASKED;
    if (first + #{i * 128 / ROWS}u < end) {
        // In this pass the lane multiplies keys lane / 8, lane / 8 + 16, ...
#unroll j in 0..8 / ROWS
        let key#{j} =
            (min(first + #{i * 128 / ROWS + j * 16}u + lane / 8u, end - 1u) * params.kv_heads + kv_head) * quads;
#unroll r in 0..ROWS
        var dot#{j}_#{r} = 0.0;
#end
#end
#unroll p in 0..QUADS / 8
        {
            let at = #{p * 8}u + lane % 8u;
#unroll j in 0..8 / ROWS
            let x#{j} = k[key#{j} + min(at, quads - 1u)];
#end
#unroll r in 0..ROWS
            let y#{r} = queries[#{r * QUADS}u + at];
#end
#unroll j in 0..8 / ROWS
#unroll r in 0..ROWS
            dot#{j}_#{r} += dot(y#{r}, x#{j});
#end
#end
        }
#end
#unroll j in 0..8 / ROWS
#unroll r in 0..ROWS
        dots[(#{r}u * KEYS + #{j * 16}u + lane / 8u) * 9u + lane % 8u] = dot#{j}_#{r};
#end
#end
        workgroupBarrier();
        var sum = 0.0;
#unroll l in 0..8
        sum += dots[lane * 9u + #{l}u];
#end
        score#{i} = select(MASKED, sum, first + #{i * 128 / ROWS}u + lane % KEYS < end);
        workgroupBarrier();
    }
#end

    var largest = score0;
#unroll i in 1..ROWS
    largest = max(largest, score#{i});
#end
    maxima[lane] = largest;
    workgroupBarrier();
    if (lane < 16u) {
        var top = maxima[lane * 8u];
#unroll l in 1..8
        top = max(top, maxima[lane * 8u + #{l}u]);
#end
        tops[lane] = top;
    }
    workgroupBarrier();
    largest = tops[owned * #{16 / ROWS}u];
#unroll l in 1..16 / ROWS
    largest = max(largest, tops[owned * #{16 / ROWS}u + #{l}u]);
#end
#unroll i in 0..ROWS
    weights[owned * PART + #{i * 128 / ROWS}u + lane % KEYS] =
        select(exp(score#{i} - largest), 0.0, score#{i} <= MASKED);
#end
    workgroupBarrier();

    let own_group = lane / #{QUADS}u;
#unroll r in 0..ROWS
    var acc#{r} = vec4<f32>(0.0);
    var sum#{r} = 0.0;
#end
    for (var i = own_group; i < end - first; i += #{512 / QUADS}u) {
#unroll j in 0..4
        let x#{j} = v[(min(first + i + #{j * 128 / QUADS}u, end - 1u) * params.kv_heads + kv_head) * quads + inside];
#end
#unroll j in 0..4
#unroll r in 0..ROWS
        {
            let weight = weights[#{r}u * PART + i + #{j * 128 / QUADS}u];
            acc#{r} = fma(vec4<f32>(weight), x#{j}, acc#{r});
            sum#{r} += weight;
        }
#end
#end
    }
#unroll r in 0..ROWS
    sums[lane] = acc#{r};
    if (quad == 0u) {
        weight_sums[own_group] = sum#{r};
    }
    workgroupBarrier();
    if (head + #{r}u < heads_end && lane < quads) {
        var total = sums[lane];
        var weight = weight_sums[0];
#unroll g in 1..128 / QUADS
        total += sums[lane + #{g * QUADS}u];
        weight += weight_sums[#{g}];
#end
        let row = (query * params.heads + head + #{r}u) * params.parts + group.x;
        out[row * quads + lane] = total / weight;
        if (lane == 0u) {
            var top = tops[#{r * 16 / ROWS}];
#unroll l in 1..16 / ROWS
            top = max(top, tops[#{r * 16 / ROWS + l}]);
#end
            stats[row] = select(vec2<f32>(top, weight), vec2<f32>(top + log(weight), 0.0), params.parts == 1u);
        }
    }
    workgroupBarrier();
#end
}

#kernel join
// A lane is a vec4 of a query head's channels, and walks its parts.
@group(0) @binding(0) var<storage, read_write> parts: array<vec4<f32>>; // [T, H, P, E]
@group(0) @binding(1) var<storage, read_write> part_stats: array<vec2<f32>>; // [T, H, P]: maximum and sum
@group(0) @binding(2) var<storage, read_write> out: array<vec4<f32>>; // [T, H, E]
@group(0) @binding(3) var<storage, read_write> stats: array<vec2<f32>>; // [T, H] of log-sum-exp and delta

@compute @workgroup_size(64)
fn join(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let quads = params.head_size / 4u;
    let row = group.y * params.heads + group.x;
    if (lane >= quads) {
        return;
    }
    var largest = MASKED;
    var sum = 0.0;
    var acc = vec4<f32>(0.0);
    for (var part = 0u; part < params.parts; part += 4u) {
#unroll i in 0..4
        let at#{i} = row * params.parts + min(part + #{i}u, params.parts - 1u);
        let stats#{i} = select(vec2<f32>(MASKED, 0.0), part_stats[at#{i}], part + #{i}u < params.parts);
        let x#{i} = parts[at#{i} * quads + lane];
#end
        let before = largest;
        largest = max(max(max(stats0.x, stats1.x), max(stats2.x, stats3.x)), before);
        let shrink = exp(before - largest);
        acc *= shrink;
        sum *= shrink;
#unroll i in 0..4
        let weight#{i} = stats#{i}.y * exp(stats#{i}.x - largest);
        acc = fma(vec4<f32>(weight#{i}), x#{i}, acc);
        sum += weight#{i};
#end
    }
    // A query that sees nothing gives zeros, and passes no gradient.
    out[row * quads + lane] = acc * select(1.0 / sum, 0.0, sum == 0.0);
    if (lane == 0u) {
        stats[row] = vec2<f32>(select(largest + log(sum), 3.0e38, sum == 0.0), 0.0);
    }
}
