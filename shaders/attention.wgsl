// Attention over packed sequences: query t sees the keys ranges[t].x <= j < ranges[t].y, which says causal, full,
// packed or cached alike; key j is seen by the queries of its own range. Query head h uses key/value head h * K / H.
//
// A workgroup owns ROWS queries (or keys) of one head and walks the other side in blocks of THREADS: first a lane is
// one key (or query) of the block and takes the dot products, then a lane is a channel (PARTS of them) and takes the
// weighted sums. Nothing of size T x T is stored, no two workgroups write the same place.

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

#kernel forward
@group(0) @binding(0) var<storage, read_write> q: array<f32>; // [T, H, E]
@group(0) @binding(1) var<storage, read_write> k: array<f32>; // [S, K, E]
@group(0) @binding(2) var<storage, read_write> v: array<f32>; // [S, K, E]
@group(0) @binding(3) var<storage, read_write> ranges: array<vec2<u32>>; // [T]
@group(0) @binding(4) var<storage, read_write> out: array<f32>; // [T, H, E]
@group(0) @binding(5) var<storage, read_write> stats: array<vec2<f32>>; // [T, H] of log-sum-exp and delta

var<workgroup> weights: array<f32, #{ROWS * THREADS}>; // [THREADS, ROWS]
var<workgroup> shrink: array<f32, #{ROWS}>; // by how much earlier blocks shrink

@compute @workgroup_size(#{THREADS})
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let head = group.y;
    let kv_head = head * params.kv_heads / params.heads;
    let last = params.queries - 1u;
#unroll r in 0..ROWS
    let t#{r} = min(group.x * #{ROWS}u + #{r}u, last);
    let range#{r} = ranges[t#{r}];
    let q#{r} = (t#{r} * params.heads + head) * params.head_size;
#unroll p in 0..PARTS
    var acc#{r}_#{p} = 0.0;
#end
#end
    var first = range0.x;
    var end = range0.y;
#unroll r in 1..ROWS
    first = min(first, range#{r}.x);
    end = max(end, range#{r}.y);
#end
    // The running maximum and sum of row `lane`, kept by the first ROWS lanes.
    var largest = MASKED;
    var sum = 0.0;
    for (var block = first; block < end; block += #{THREADS}u) {
        let key = block + lane;
        if (key < end) {
            let key_at = (key * params.kv_heads + kv_head) * params.head_size;
#unroll r in 0..ROWS
            var dot#{r} = 0.0;
#end
            for (var e = 0u; e < params.head_size; e++) {
                let x = k[key_at + e];
#unroll r in 0..ROWS
                dot#{r} = fma(q[q#{r} + e], x, dot#{r});
#end
            }
#unroll r in 0..ROWS
            weights[lane * #{ROWS}u + #{r}u] = select(MASKED, dot#{r} * params.scale, key >= range#{r}.x && key < range#{r}.y);
#end
        }
        workgroupBarrier();
        let count = min(end - block, #{THREADS}u);
        if (lane < #{ROWS}u) {
            var block_largest = largest;
            for (var j = 0u; j < count; j++) {
                block_largest = max(block_largest, weights[j * #{ROWS}u + lane]);
            }
            let factor = exp(largest - block_largest);
            sum *= factor;
            for (var j = 0u; j < count; j++) {
                let score = weights[j * #{ROWS}u + lane];
                let weight = select(exp(score - block_largest), 0.0, score <= MASKED);
                weights[j * #{ROWS}u + lane] = weight;
                sum += weight;
            }
            shrink[lane] = factor;
            largest = block_largest;
        }
        workgroupBarrier();
#unroll p in 0..PARTS
        if (lane + #{p * THREADS}u < params.head_size) {
#unroll r in 0..ROWS
            acc#{r}_#{p} *= shrink[#{r}];
#end
            var at = (block * params.kv_heads + kv_head) * params.head_size + lane + #{p * THREADS}u;
            for (var j = 0u; j < count; j++) {
                let x = v[at];
                at += params.kv_heads * params.head_size;
#unroll r in 0..ROWS
                acc#{r}_#{p} = fma(weights[j * #{ROWS}u + #{r}u], x, acc#{r}_#{p});
#end
            }
        }
#end
        workgroupBarrier();
    }
    if (lane < #{ROWS}u) {
        // A query that sees nothing gives zeros, and passes no gradient.
        shrink[lane] = select(1.0 / sum, 0.0, sum == 0.0);
        let t = group.x * #{ROWS}u + lane;
        if (t < params.queries) {
            stats[t * params.heads + head] = vec2<f32>(select(largest + log(sum), 3.0e38, sum == 0.0), 0.0);
        }
    }
    workgroupBarrier();
#unroll r in 0..ROWS
    if (group.x * #{ROWS}u + #{r}u < params.queries) {
#unroll p in 0..PARTS
        if (lane + #{p * THREADS}u < params.head_size) {
            out[q#{r} + lane + #{p * THREADS}u] = acc#{r}_#{p} * shrink[#{r}];
        }
#end
    }
#end
}

#kernel backward_delta
// delta[t, h] = sum over e of dout * out
@group(0) @binding(0) var<storage, read_write> out: array<f32>; // [T, H, E]
@group(0) @binding(1) var<storage, read_write> dout: array<f32>; // [T, H, E]
@group(0) @binding(2) var<storage, read_write> stats: array<vec2<f32>>; // [T, H]

@compute @workgroup_size(#{THREADS})
fn backward_delta(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = (group.x + group.y * groups.x) * #{THREADS}u + lane;
    if (row >= params.queries * params.heads) {
        return;
    }
    var sum = 0.0;
    for (var e = 0u; e < params.head_size; e++) {
        let at = row * params.head_size + e;
        sum = fma(out[at], dout[at], sum);
    }
    stats[row].y = sum;
}

#kernel backward_query
// dq = sum over keys of ds * k, with p = exp(q.k * scale - lse) and ds = p * (dout.v - delta) * scale
@group(0) @binding(0) var<storage, read_write> q: array<f32>; // [T, H, E]
@group(0) @binding(1) var<storage, read_write> k: array<f32>; // [S, K, E]
@group(0) @binding(2) var<storage, read_write> v: array<f32>; // [S, K, E]
@group(0) @binding(3) var<storage, read_write> ranges: array<vec2<u32>>; // [T]
@group(0) @binding(4) var<storage, read_write> stats: array<vec2<f32>>; // [T, H]
@group(0) @binding(5) var<storage, read_write> dout: array<f32>; // [T, H, E]
@group(0) @binding(6) var<storage, read_write> dq: array<f32>; // [T, H, E]

var<workgroup> weights: array<f32, #{ROWS * THREADS}>; // ds, [THREADS, ROWS]

@compute @workgroup_size(#{THREADS})
fn backward_query(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let head = group.y;
    let kv_head = head * params.kv_heads / params.heads;
    let last = params.queries - 1u;
#unroll r in 0..ROWS
    let t#{r} = min(group.x * #{ROWS}u + #{r}u, last);
    let range#{r} = ranges[t#{r}];
    let q#{r} = (t#{r} * params.heads + head) * params.head_size;
    let stats#{r} = stats[t#{r} * params.heads + head];
#unroll p in 0..PARTS
    var acc#{r}_#{p} = 0.0;
#end
#end
    var first = range0.x;
    var end = range0.y;
#unroll r in 1..ROWS
    first = min(first, range#{r}.x);
    end = max(end, range#{r}.y);
#end
    for (var block = first; block < end; block += #{THREADS}u) {
        let key = block + lane;
        if (key < end) {
            let key_at = (key * params.kv_heads + kv_head) * params.head_size;
#unroll r in 0..ROWS
            var dot#{r} = 0.0;
            var dp#{r} = 0.0;
#end
            for (var e = 0u; e < params.head_size; e++) {
                let x = k[key_at + e];
                let y = v[key_at + e];
#unroll r in 0..ROWS
                dot#{r} = fma(q[q#{r} + e], x, dot#{r});
                dp#{r} = fma(dout[q#{r} + e], y, dp#{r});
#end
            }
#unroll r in 0..ROWS
            {
                let ds = exp(dot#{r} * params.scale - stats#{r}.x) * (dp#{r} - stats#{r}.y) * params.scale;
                weights[lane * #{ROWS}u + #{r}u] = select(0.0, ds, key >= range#{r}.x && key < range#{r}.y);
            }
#end
        }
        workgroupBarrier();
        let count = min(end - block, #{THREADS}u);
#unroll p in 0..PARTS
        if (lane + #{p * THREADS}u < params.head_size) {
            var at = (block * params.kv_heads + kv_head) * params.head_size + lane + #{p * THREADS}u;
            for (var j = 0u; j < count; j++) {
                let x = k[at];
                at += params.kv_heads * params.head_size;
#unroll r in 0..ROWS
                acc#{r}_#{p} = fma(weights[j * #{ROWS}u + #{r}u], x, acc#{r}_#{p});
#end
            }
        }
#end
        workgroupBarrier();
    }
#unroll r in 0..ROWS
    if (group.x * #{ROWS}u + #{r}u < params.queries) {
#unroll p in 0..PARTS
        if (lane + #{p * THREADS}u < params.head_size) {
            dq[q#{r} + lane + #{p * THREADS}u] = acc#{r}_#{p};
        }
#end
    }
#end
}

#kernel backward_key_value
// dv = sum over queries of p * dout, dk = sum of ds * q, over all query heads of this key/value head.
@group(0) @binding(0) var<storage, read_write> q: array<f32>; // [T, H, E]
@group(0) @binding(1) var<storage, read_write> k: array<f32>; // [S, K, E]
@group(0) @binding(2) var<storage, read_write> v: array<f32>; // [S, K, E]
@group(0) @binding(3) var<storage, read_write> ranges: array<vec2<u32>>; // [S]: which queries see a key
@group(0) @binding(4) var<storage, read_write> stats: array<vec2<f32>>; // [T, H]
@group(0) @binding(5) var<storage, read_write> dout: array<f32>; // [T, H, E]
@group(0) @binding(6) var<storage, read_write> dk: array<f32>; // [S, K, E]
@group(0) @binding(7) var<storage, read_write> dv: array<f32>; // [S, K, E]

var<workgroup> weights_p: array<f32, #{ROWS * THREADS}>; // [THREADS, ROWS]
var<workgroup> weights_ds: array<f32, #{ROWS * THREADS}>; // [THREADS, ROWS]

@compute @workgroup_size(#{THREADS})
fn backward_key_value(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let kv_head = group.y;
    let group_size = params.heads / params.kv_heads;
    let last = params.keys - 1u;
#unroll r in 0..ROWS
    let s#{r} = min(group.x * #{ROWS}u + #{r}u, last);
    let range#{r} = ranges[s#{r}];
    let k#{r} = (s#{r} * params.kv_heads + kv_head) * params.head_size;
#unroll p in 0..PARTS
    var dk#{r}_#{p} = 0.0;
    var dv#{r}_#{p} = 0.0;
#end
#end
    var first = range0.x;
    var end = range0.y;
#unroll r in 1..ROWS
    first = min(first, range#{r}.x);
    end = max(end, range#{r}.y);
#end
    for (var head = kv_head * group_size; head < (kv_head + 1u) * group_size; head++) {
        for (var block = first; block < end; block += #{THREADS}u) {
            let query = block + lane;
            if (query < end) {
                let row = query * params.heads + head;
                let query_at = row * params.head_size;
#unroll r in 0..ROWS
                var dot#{r} = 0.0;
                var dp#{r} = 0.0;
#end
                for (var e = 0u; e < params.head_size; e++) {
                    let x = q[query_at + e];
                    let y = dout[query_at + e];
#unroll r in 0..ROWS
                    dot#{r} = fma(k[k#{r} + e], x, dot#{r});
                    dp#{r} = fma(v[k#{r} + e], y, dp#{r});
#end
                }
                let row_stats = stats[row];
#unroll r in 0..ROWS
                {
                    let seen = query >= range#{r}.x && query < range#{r}.y;
                    let p = select(0.0, exp(dot#{r} * params.scale - row_stats.x), seen);
                    weights_p[lane * #{ROWS}u + #{r}u] = p;
                    weights_ds[lane * #{ROWS}u + #{r}u] = p * (dp#{r} - row_stats.y) * params.scale;
                }
#end
            }
            workgroupBarrier();
            let count = min(end - block, #{THREADS}u);
#unroll p in 0..PARTS
            if (lane + #{p * THREADS}u < params.head_size) {
                var at = (block * params.heads + head) * params.head_size + lane + #{p * THREADS}u;
                for (var j = 0u; j < count; j++) {
                    let x = q[at];
                    let y = dout[at];
                    at += params.heads * params.head_size;
#unroll r in 0..ROWS
                    dk#{r}_#{p} = fma(weights_ds[j * #{ROWS}u + #{r}u], x, dk#{r}_#{p});
                    dv#{r}_#{p} = fma(weights_p[j * #{ROWS}u + #{r}u], y, dv#{r}_#{p});
#end
                }
            }
#end
            workgroupBarrier();
        }
    }
#unroll r in 0..ROWS
    if (group.x * #{ROWS}u + #{r}u < params.keys) {
#unroll p in 0..PARTS
        if (lane + #{p * THREADS}u < params.head_size) {
            dk[k#{r} + lane + #{p * THREADS}u] = dk#{r}_#{p};
            dv[k#{r} + lane + #{p * THREADS}u] = dv#{r}_#{p};
        }
#end
    }
#end
}
