// Attention as in attention.wgsl, for GPUs: blocks of 32 queries and 32 keys, whose scores and weighted sums are tiled
// products through workgroup memory, less than 14 KiB of it. E up to 32 * COLS; what lies beyond E is zero. A workgroup
// owns its outputs, so nothing is added by two, and nothing of size T x T leaves it.

struct Params {
    queries: u32, // T
    keys: u32, // S
    heads: u32, // H
    kv_heads: u32, // K
    head_size: u32, // E
    scale: f32,
}
#params

// Finite: a fast-math compiler may assume that no infinity occurs.
const MASKED: f32 = -3.0e38;

var<workgroup> span: vec2<u32>;

#kernel forward
// A workgroup owns 32 queries of one head, an 8 x 8 grid of threads 4 queries each, and walks the keys in blocks of 32:
// scores by a tiled product (a thread 4 x 4 of them), a running maximum and sum in registers, then the weighted values
// by another (a thread 4 queries by COLS vec4s of channels).
@group(0) @binding(0) var<storage, read_write> q: array<f32>; // [T, H, E]
@group(0) @binding(1) var<storage, read_write> k: array<f32>; // [S, K, E]
@group(0) @binding(2) var<storage, read_write> v: array<f32>; // [S, K, E]
@group(0) @binding(3) var<storage, read_write> ranges: array<vec2<u32>>; // [T]
@group(0) @binding(4) var<storage, read_write> out: array<f32>; // [T, H, E]
@group(0) @binding(5) var<storage, read_write> stats: array<vec2<f32>>; // [T, H] of log-sum-exp and delta

var<workgroup> stage: array<vec4<f32>, 256>; // q and k as [16 channels, 32 rows] each; v as [CHUNK, E]
var<workgroup> weights: array<vec4<f32>, 288>; // [32 keys, 32 queries and padding]
var<workgroup> maxima: array<f32, 256>; // [32 queries, 8 threads]
var<workgroup> sums: array<f32, 256>; // [32 queries, 8 threads]

fn summed_at(at: u32) -> f32 {
    return v[at];
}

@compute @workgroup_size(64)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
#import flash_queries
#unroll r in 0..4
    let range#{r} = ranges[min(query + #{r}u, last)];
    var largest#{r} = MASKED;
    var sum#{r} = 0.0;
#unroll c in 0..COLS
    var acc#{r}_#{c} = vec4<f32>(0.0);
#end
#end
    for (var block = first; block < end; block += 32u) {
#unroll r in 0..4
        var s#{r} = vec4<f32>(0.0);
#end
        for (var e = 0u; e < size; e += 16u) {
            let channel = e + lane % 16u;
            let inside = channel < size;
            let at = min(channel, size - 1u);
#unroll i in 0..2
            {
                let quad = lane / 16u + #{i * 4}u;
                let row = group.x * 32u + quad * 4u;
                let key = block + quad * 4u;
                stage[(lane % 16u) * 8u + quad] = select(vec4<f32>(0.0), vec4<f32>(
                    q[(min(row, last) * params.heads + head) * size + at],
                    q[(min(row + 1u, last) * params.heads + head) * size + at],
                    q[(min(row + 2u, last) * params.heads + head) * size + at],
                    q[(min(row + 3u, last) * params.heads + head) * size + at],
                ), inside);
                stage[128u + (lane % 16u) * 8u + quad] = select(vec4<f32>(0.0), vec4<f32>(
                    k[(min(key, params.keys - 1u) * params.kv_heads + kv_head) * size + at],
                    k[(min(key + 1u, params.keys - 1u) * params.kv_heads + kv_head) * size + at],
                    k[(min(key + 2u, params.keys - 1u) * params.kv_heads + kv_head) * size + at],
                    k[(min(key + 3u, params.keys - 1u) * params.kv_heads + kv_head) * size + at],
                ), inside);
            }
#end
            workgroupBarrier();
#unroll i in 0..16
            {
                let a = stage[#{i * 8}u + ty];
                let b = stage[#{128 + i * 8}u + tx];
#unroll r in 0..4
                s#{r} = fma(vec4<f32>(a[#{r}]), b, s#{r});
#end
            }
#end
            workgroupBarrier();
        }
        let keys = vec4<u32>(block + tx * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
#unroll r in 0..4
        s#{r} = select(
            vec4<f32>(MASKED),
            s#{r} * params.scale,
            (keys >= vec4<u32>(range#{r}.x)) & (keys < vec4<u32>(range#{r}.y)),
        );
        maxima[(ty * 4u + #{r}u) * 8u + tx] = max(max(s#{r}.x, s#{r}.y), max(s#{r}.z, s#{r}.w));
#end
        workgroupBarrier();
#unroll r in 0..4
        var new_largest#{r} = largest#{r};
        for (var i = 0u; i < 8u; i++) {
            new_largest#{r} = max(new_largest#{r}, maxima[(ty * 4u + #{r}u) * 8u + i]);
        }
        let shrink#{r} = exp(largest#{r} - new_largest#{r});
        largest#{r} = new_largest#{r};
        let p#{r} = select(exp(s#{r} - new_largest#{r}), vec4<f32>(0.0), s#{r} <= vec4<f32>(MASKED));
        sums[(ty * 4u + #{r}u) * 8u + tx] = p#{r}.x + p#{r}.y + p#{r}.z + p#{r}.w;
#unroll c in 0..COLS
        acc#{r}_#{c} *= shrink#{r};
#end
#end
#unroll c in 0..4
        weights[(tx * 4u + #{c}u) * 9u + ty] = vec4<f32>(p0[#{c}], p1[#{c}], p2[#{c}], p3[#{c}]);
#end
        workgroupBarrier();
#unroll r in 0..4
        sum#{r} *= shrink#{r};
        for (var i = 0u; i < 8u; i++) {
            sum#{r} += sums[(ty * 4u + #{r}u) * 8u + i];
        }
#end
#import flash_weighted_sum
    }
#unroll r in 0..4
    if (query + #{r}u < params.queries) {
        // A query that sees nothing gives zeros, and passes no gradient.
        let scale = select(1.0 / sum#{r}, 0.0, sum#{r} == 0.0);
        let row = (query + #{r}u) * params.heads + head;
        if (tx == 0u) {
            stats[row] = vec2<f32>(select(largest#{r} + log(sum#{r}), 3.0e38, sum#{r} == 0.0), 0.0);
        }
#unroll c in 0..COLS
#unroll i in 0..4
        if (tx * 4u + #{c * 32 + i}u < size) {
            out[row * size + tx * 4u + #{c * 32 + i}u] = acc#{r}_#{c}[#{i}] * scale;
        }
#end
#end
    }
#end
}

#kernel backward_query
// As the forward; dq = sum over keys of ds * k, with p = exp(q.k * scale - lse) and ds = p * (dout.v - delta) * scale.
@group(0) @binding(0) var<storage, read_write> q: array<f32>; // [T, H, E]
@group(0) @binding(1) var<storage, read_write> k: array<f32>; // [S, K, E]
@group(0) @binding(2) var<storage, read_write> v: array<f32>; // [S, K, E]
@group(0) @binding(3) var<storage, read_write> ranges: array<vec2<u32>>; // [T]
@group(0) @binding(4) var<storage, read_write> stats: array<vec2<f32>>; // [T, H]
@group(0) @binding(5) var<storage, read_write> dout: array<f32>; // [T, H, E]
@group(0) @binding(6) var<storage, read_write> dq: array<f32>; // [T, H, E]

var<workgroup> stage: array<vec4<f32>, 256>; // q, dout, k, v as [8 channels, 32 rows] each; k as [CHUNK, E]
var<workgroup> weights: array<vec4<f32>, 288>; // ds, [32 keys, 32 queries and padding]

fn summed_at(at: u32) -> f32 {
    return k[at];
}

@compute @workgroup_size(64)
fn backward_query(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
#import flash_queries
#unroll r in 0..4
    let range#{r} = ranges[min(query + #{r}u, last)];
    let stats#{r} = stats[min(query + #{r}u, last) * params.heads + head];
#unroll c in 0..COLS
    var acc#{r}_#{c} = vec4<f32>(0.0);
#end
#end
    for (var block = first; block < end; block += 32u) {
#unroll r in 0..4
        var s#{r} = vec4<f32>(0.0);
        var dp#{r} = vec4<f32>(0.0);
#end
        for (var e = 0u; e < size; e += 8u) {
            let inside = e + tx < size;
            let at = min(e + tx, size - 1u);
            // The thread's four rows; its channel is tx.
#unroll r in 0..4
            let query_at#{r} = (min(query + #{r}u, last) * params.heads + head) * size + at;
            let key_at#{r} = (min(block + ty * 4u + #{r}u, params.keys - 1u) * params.kv_heads + kv_head) * size + at;
#end
            stage[tx * 8u + ty] =
                select(vec4<f32>(0.0), vec4<f32>(q[query_at0], q[query_at1], q[query_at2], q[query_at3]), inside);
            stage[64u + tx * 8u + ty] = select(
                vec4<f32>(0.0),
                vec4<f32>(dout[query_at0], dout[query_at1], dout[query_at2], dout[query_at3]),
                inside,
            );
            stage[128u + tx * 8u + ty] =
                select(vec4<f32>(0.0), vec4<f32>(k[key_at0], k[key_at1], k[key_at2], k[key_at3]), inside);
            stage[192u + tx * 8u + ty] =
                select(vec4<f32>(0.0), vec4<f32>(v[key_at0], v[key_at1], v[key_at2], v[key_at3]), inside);
            workgroupBarrier();
#unroll i in 0..8
            {
                let a = stage[#{i * 8}u + ty];
                let b = stage[#{128 + i * 8}u + tx];
                let da = stage[#{64 + i * 8}u + ty];
                let db = stage[#{192 + i * 8}u + tx];
#unroll r in 0..4
                s#{r} = fma(vec4<f32>(a[#{r}]), b, s#{r});
                dp#{r} = fma(vec4<f32>(da[#{r}]), db, dp#{r});
#end
            }
#end
            workgroupBarrier();
        }
        let keys = vec4<u32>(block + tx * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
#unroll r in 0..4
        let ds#{r} = select(
            vec4<f32>(0.0),
            exp(s#{r} * params.scale - stats#{r}.x) * (dp#{r} - stats#{r}.y) * params.scale,
            (keys >= vec4<u32>(range#{r}.x)) & (keys < vec4<u32>(range#{r}.y)),
        );
#end
#unroll c in 0..4
        weights[(tx * 4u + #{c}u) * 9u + ty] = vec4<f32>(ds0[#{c}], ds1[#{c}], ds2[#{c}], ds3[#{c}]);
#end
#import flash_weighted_sum
    }
#unroll r in 0..4
    if (query + #{r}u < params.queries) {
        let row = ((query + #{r}u) * params.heads + head) * size;
#unroll c in 0..COLS
#unroll i in 0..4
        if (tx * 4u + #{c * 32 + i}u < size) {
            dq[row + tx * 4u + #{c * 32 + i}u] = acc#{r}_#{c}[#{i}];
        }
#end
#end
    }
#end
}

#kernel backward_key_value
// The same seen from the keys: a workgroup owns 32 keys and walks the queries of all heads that share them.
@group(0) @binding(0) var<storage, read_write> q: array<f32>; // [T, H, E]
@group(0) @binding(1) var<storage, read_write> k: array<f32>; // [S, K, E]
@group(0) @binding(2) var<storage, read_write> v: array<f32>; // [S, K, E]
@group(0) @binding(3) var<storage, read_write> ranges: array<vec2<u32>>; // [S]: which queries see a key
@group(0) @binding(4) var<storage, read_write> stats: array<vec2<f32>>; // [T, H]
@group(0) @binding(5) var<storage, read_write> dout: array<f32>; // [T, H, E]
@group(0) @binding(6) var<storage, read_write> dk: array<f32>; // [S, K, E]
@group(0) @binding(7) var<storage, read_write> dv: array<f32>; // [S, K, E]

var<workgroup> stage: array<vec4<f32>, 256>; // k, v, q, dout as [8 channels, 32 rows] each; dout, then q, as [CHUNK, E]
var<workgroup> weights_p: array<vec4<f32>, 288>; // [32 queries, 32 keys and padding]
var<workgroup> weights_ds: array<vec4<f32>, 288>; // [32 queries, 32 keys and padding]

@compute @workgroup_size(64)
fn backward_key_value(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let kv_head = group.y;
    let group_size = params.heads / params.kv_heads;
    let size = params.head_size;
    let last = params.keys - 1u;
    let last_query = params.queries - 1u;
    let ty = lane / 8u;
    let tx = lane % 8u;
    let key = group.x * 32u + ty * 4u;
    var first = ranges[min(group.x * 32u, last)].x;
    var end = 0u;
    for (var r = 0u; r < 32u; r++) {
        let range = ranges[min(group.x * 32u + r, last)];
        first = min(first, range.x);
        end = max(end, range.y);
    }
#import span
#unroll r in 0..4
    let range#{r} = ranges[min(key + #{r}u, last)];
#unroll c in 0..COLS
    var dk#{r}_#{c} = vec4<f32>(0.0);
    var dv#{r}_#{c} = vec4<f32>(0.0);
#end
#end
    for (var head = kv_head * group_size; head < (kv_head + 1u) * group_size; head++) {
        for (var block = first; block < end; block += 32u) {
#unroll r in 0..4
            var s#{r} = vec4<f32>(0.0);
            var dp#{r} = vec4<f32>(0.0);
#end
            for (var e = 0u; e < size; e += 8u) {
                let inside = e + tx < size;
                let at = min(e + tx, size - 1u);
#unroll r in 0..4
                let key_at#{r} = (min(key + #{r}u, last) * params.kv_heads + kv_head) * size + at;
                let query_at#{r} = (min(block + ty * 4u + #{r}u, last_query) * params.heads + head) * size + at;
#end
                stage[tx * 8u + ty] =
                    select(vec4<f32>(0.0), vec4<f32>(k[key_at0], k[key_at1], k[key_at2], k[key_at3]), inside);
                stage[64u + tx * 8u + ty] =
                    select(vec4<f32>(0.0), vec4<f32>(v[key_at0], v[key_at1], v[key_at2], v[key_at3]), inside);
                stage[128u + tx * 8u + ty] =
                    select(vec4<f32>(0.0), vec4<f32>(q[query_at0], q[query_at1], q[query_at2], q[query_at3]), inside);
                stage[192u + tx * 8u + ty] = select(
                    vec4<f32>(0.0),
                    vec4<f32>(dout[query_at0], dout[query_at1], dout[query_at2], dout[query_at3]),
                    inside,
                );
                workgroupBarrier();
#unroll i in 0..8
                {
                    let a = stage[#{i * 8}u + ty];
                    let b = stage[#{128 + i * 8}u + tx];
                    let da = stage[#{64 + i * 8}u + ty];
                    let db = stage[#{192 + i * 8}u + tx];
#unroll r in 0..4
                    s#{r} = fma(vec4<f32>(a[#{r}]), b, s#{r});
                    dp#{r} = fma(vec4<f32>(da[#{r}]), db, dp#{r});
#end
                }
#end
                workgroupBarrier();
            }
            let queries = vec4<u32>(block + tx * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
#unroll c in 0..4
            let stats#{c} = stats[min(block + tx * 4u + #{c}u, last_query) * params.heads + head];
#end
            let lse = vec4<f32>(stats0.x, stats1.x, stats2.x, stats3.x);
            let delta = vec4<f32>(stats0.y, stats1.y, stats2.y, stats3.y);
#unroll r in 0..4
            let p#{r} = select(
                vec4<f32>(0.0),
                exp(s#{r} * params.scale - lse),
                (queries >= vec4<u32>(range#{r}.x)) & (queries < vec4<u32>(range#{r}.y)),
            );
            let ds#{r} = p#{r} * (dp#{r} - delta) * params.scale;
#end
#unroll c in 0..4
            weights_p[(tx * 4u + #{c}u) * 9u + ty] = vec4<f32>(p0[#{c}], p1[#{c}], p2[#{c}], p3[#{c}]);
            weights_ds[(tx * 4u + #{c}u) * 9u + ty] = vec4<f32>(ds0[#{c}], ds1[#{c}], ds2[#{c}], ds3[#{c}]);
#end
            for (var chunk = 0u; chunk < 32u && block + chunk < end; chunk += #{CHUNK}u) {
#unroll i in 0..4
                {
                    let at = lane + #{i * 64}u;
                    let query = min(block + chunk + at / #{COLS * 8}u, last_query);
                    let e = at % #{COLS * 8}u * 4u;
                    let source = (query * params.heads + head) * size;
                    stage[at] = vec4<f32>(
                        select(0.0, dout[source + min(e, size - 1u)], e < size),
                        select(0.0, dout[source + min(e + 1u, size - 1u)], e + 1u < size),
                        select(0.0, dout[source + min(e + 2u, size - 1u)], e + 2u < size),
                        select(0.0, dout[source + min(e + 3u, size - 1u)], e + 3u < size),
                    );
                }
#end
                workgroupBarrier();
                for (var j = 0u; j < #{CHUNK}u; j++) {
                    let w = weights_p[(chunk + j) * 9u + ty];
#unroll c in 0..COLS
                    {
                        let x = stage[j * #{COLS * 8}u + #{c * 8}u + tx];
#unroll r in 0..4
                        dv#{r}_#{c} = fma(vec4<f32>(w[#{r}]), x, dv#{r}_#{c});
#end
                    }
#end
                }
                workgroupBarrier();
#unroll i in 0..4
                {
                    let at = lane + #{i * 64}u;
                    let query = min(block + chunk + at / #{COLS * 8}u, last_query);
                    let e = at % #{COLS * 8}u * 4u;
                    let source = (query * params.heads + head) * size;
                    stage[at] = vec4<f32>(
                        select(0.0, q[source + min(e, size - 1u)], e < size),
                        select(0.0, q[source + min(e + 1u, size - 1u)], e + 1u < size),
                        select(0.0, q[source + min(e + 2u, size - 1u)], e + 2u < size),
                        select(0.0, q[source + min(e + 3u, size - 1u)], e + 3u < size),
                    );
                }
#end
                workgroupBarrier();
                for (var j = 0u; j < #{CHUNK}u; j++) {
                    let w = weights_ds[(chunk + j) * 9u + ty];
#unroll c in 0..COLS
                    {
                        let x = stage[j * #{COLS * 8}u + #{c * 8}u + tx];
#unroll r in 0..4
                        dk#{r}_#{c} = fma(vec4<f32>(w[#{r}]), x, dk#{r}_#{c});
#end
                    }
#end
                }
                workgroupBarrier();
            }
        }
    }
#unroll r in 0..4
    if (key + #{r}u < params.keys) {
        let row = ((key + #{r}u) * params.kv_heads + kv_head) * size;
#unroll c in 0..COLS
#unroll i in 0..4
        if (tx * 4u + #{c * 32 + i}u < size) {
            dk[row + tx * 4u + #{c * 32 + i}u] = dk#{r}_#{c}[#{i}];
            dv[row + tx * 4u + #{c * 32 + i}u] = dv#{r}_#{c}[#{i}];
        }
#end
#end
    }
#end
}
