// Attention over packed sequences: query t sees the keys ranges[t].x <= j < ranges[t].y, which says causal, full,
// packed or cached alike; key j is seen by the queries of its own range. Query head h uses key/value head h * K / H.
//
// Nothing of size T x T is stored, no two workgroups write the same place. GPUs have tiled kernels beside these
// (flash_attention.wgsl, and decode_attention.wgsl for few queries), host processors one query a lane (lane_*). What is
// left, heads wider than 128 or of no vec4s, and a host processor's single queries, goes to the simple ones: a workgroup
// owns ROWS queries (or keys) of one head and walks the other side in blocks of THREADS: first a lane is one key (or
// query) of the block and takes the dot products, then a lane is a channel (PARTS of them) and takes the weighted sums.

struct Params {
    queries: u32, // T
    keys: u32, // S
    heads: u32, // H
    kv_heads: u32, // K
    head_size: u32, // E
    scale: f32,
    // The lane kernels' window of rows, and where it begins in their uniforms, in vec4s (stats: in words).
    first_row: u32,
    rows: u32,
    q_before: u32,
    k_before: u32,
    v_before: u32,
    dout_before: u32,
    stats_before: u32,
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
var<workgroup> span: vec2<u32>;

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
#import span
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
var<workgroup> span: vec2<u32>;

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
#import span
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
var<workgroup> span: vec2<u32>;

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
#import span
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

#kernel lane_forward
// For devices that run on the host's processor: a lane is a query and keeps its vectors in registers, keys and values
// are uniforms read at the same address by all lanes, nothing is shared and nothing waits. E = 4 * quads, at most
// 4 * QUADS; the window of rows bound here holds whole sequences.
@group(0) @binding(0) var<uniform> q: array<vec4<f32>, 4096>; // rows of [T, H, E]
@group(0) @binding(1) var<uniform> k: array<vec4<f32>, 4096>; // rows of [T, K, E]
@group(0) @binding(2) var<uniform> v: array<vec4<f32>, 4096>; // rows of [T, K, E]
@group(0) @binding(3) var<storage, read_write> ranges: array<vec2<u32>>; // [T]
@group(0) @binding(4) var<storage, read_write> out: array<f32>; // [T, H, E]
@group(0) @binding(5) var<storage, read_write> stats: array<vec2<f32>>; // [T, H]

@compute @workgroup_size(#{THREADS})
fn lane_forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let head = group.y;
    let kv_head = head * params.kv_heads / params.heads;
    let quads = params.head_size / 4u;
    let local = group.x * #{THREADS}u + lane;
    let row = min(local, params.rows - 1u);
    let range = ranges[params.first_row + row];
    let q_at = params.q_before + (row * params.heads + head) * quads;
#unroll e in 0..QUADS
    let q#{e} = select(vec4<f32>(0.0), q[q_at + min(#{e}u, quads - 1u)] * params.scale, #{e}u < quads);
    var acc#{e} = vec4<f32>(0.0);
#end
    var largest = MASKED;
    var sum = 0.0;
    // The loop's bounds are the same for all lanes, so that its loads stay uniform.
    let first = ranges[params.first_row + min(group.x * #{THREADS}u, params.rows - 1u)].x - params.first_row;
    let end = ranges[params.first_row + min(group.x * #{THREADS}u + #{THREADS - 1}u, params.rows - 1u)].y - params.first_row;
    for (var key = first; key < end; key++) {
        let k_at = params.k_before + (key * params.kv_heads + kv_head) * quads;
        var dot4 = vec4<f32>(0.0);
#unroll e in 0..QUADS
        dot4 = fma(q#{e}, k[k_at + min(#{e}u, quads - 1u)], dot4);
#end
        let seen = key + params.first_row >= range.x && key + params.first_row < range.y;
        let score = select(MASKED, dot4.x + dot4.y + dot4.z + dot4.w, seen);
        let new_largest = max(largest, score);
        let factor = exp(largest - new_largest);
        let weight = select(0.0, exp(score - new_largest), seen);
        largest = new_largest;
        sum = fma(sum, factor, weight);
        let v_at = params.v_before + (key * params.kv_heads + kv_head) * quads;
#unroll e in 0..QUADS
        acc#{e} = fma(vec4<f32>(weight), v[v_at + min(#{e}u, quads - 1u)], acc#{e} * factor);
#end
    }
    if (local < params.rows) {
        let scale = select(1.0 / sum, 0.0, sum == 0.0);
        let t = params.first_row + row;
        stats[t * params.heads + head] = vec2<f32>(select(largest + log(sum), 3.0e38, sum == 0.0), 0.0);
        let at = (t * params.heads + head) * params.head_size;
#unroll e in 0..QUADS
        if (#{e}u < quads) {
            out[at + #{e * 4}u] = acc#{e}.x * scale;
            out[at + #{e * 4 + 1}u] = acc#{e}.y * scale;
            out[at + #{e * 4 + 2}u] = acc#{e}.z * scale;
            out[at + #{e * 4 + 3}u] = acc#{e}.w * scale;
        }
#end
    }
}

#kernel lane_backward_query
// A lane is a query; see lane_forward. q is bound as k's twin: scaled on the way in.
@group(0) @binding(0) var<uniform> q: array<vec4<f32>, 4096>; // rows of [T, H, E]
@group(0) @binding(1) var<uniform> k: array<vec4<f32>, 4096>; // rows of [T, K, E]
@group(0) @binding(2) var<uniform> v: array<vec4<f32>, 4096>; // rows of [T, K, E]
@group(0) @binding(3) var<storage, read_write> ranges: array<vec2<u32>>; // [T]
@group(0) @binding(4) var<storage, read_write> stats: array<vec2<f32>>; // [T, H]
@group(0) @binding(5) var<uniform> dout: array<vec4<f32>, 4096>; // rows of [T, H, E]
@group(0) @binding(6) var<storage, read_write> dq: array<f32>; // [T, H, E]

@compute @workgroup_size(#{THREADS})
fn lane_backward_query(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let head = group.y;
    let kv_head = head * params.kv_heads / params.heads;
    let quads = params.head_size / 4u;
    let local = group.x * #{THREADS}u + lane;
    let row = min(local, params.rows - 1u);
    let t = params.first_row + row;
    let range = ranges[t];
    let stat = stats[t * params.heads + head];
    let q_at = params.q_before + (row * params.heads + head) * quads;
    let dout_at = params.dout_before + (row * params.heads + head) * quads;
#unroll e in 0..QUADS
    let q#{e} = select(vec4<f32>(0.0), q[q_at + min(#{e}u, quads - 1u)] * params.scale, #{e}u < quads);
    let dout#{e} = select(vec4<f32>(0.0), dout[dout_at + min(#{e}u, quads - 1u)], #{e}u < quads);
    var acc#{e} = vec4<f32>(0.0);
#end
    let first = ranges[params.first_row + min(group.x * #{THREADS}u, params.rows - 1u)].x - params.first_row;
    let end = ranges[params.first_row + min(group.x * #{THREADS}u + #{THREADS - 1}u, params.rows - 1u)].y - params.first_row;
    for (var key = first; key < end; key++) {
        let k_at = params.k_before + (key * params.kv_heads + kv_head) * quads;
        let v_at = params.v_before + (key * params.kv_heads + kv_head) * quads;
        var dot4 = vec4<f32>(0.0);
        var dp4 = vec4<f32>(0.0);
#unroll e in 0..QUADS
        let k#{e} = k[k_at + min(#{e}u, quads - 1u)];
        dot4 = fma(q#{e}, k#{e}, dot4);
        dp4 = fma(dout#{e}, v[v_at + min(#{e}u, quads - 1u)], dp4);
#end
        let seen = key + params.first_row >= range.x && key + params.first_row < range.y;
        let p = select(0.0, exp(dot4.x + dot4.y + dot4.z + dot4.w - stat.x), seen);
        let ds = p * (dp4.x + dp4.y + dp4.z + dp4.w - stat.y) * params.scale;
#unroll e in 0..QUADS
        acc#{e} = fma(vec4<f32>(ds), k#{e}, acc#{e});
#end
    }
    if (local < params.rows) {
        let at = (t * params.heads + head) * params.head_size;
#unroll e in 0..QUADS
        if (#{e}u < quads) {
            dq[at + #{e * 4}u] = acc#{e}.x;
            dq[at + #{e * 4 + 1}u] = acc#{e}.y;
            dq[at + #{e * 4 + 2}u] = acc#{e}.z;
            dq[at + #{e * 4 + 3}u] = acc#{e}.w;
        }
#end
    }
}

#kernel lane_backward_key_value
// A lane is a key; queries and their gradients are uniforms. The ranges are those of the keys.
@group(0) @binding(0) var<uniform> q: array<vec4<f32>, 4096>; // rows of [T, H, E]
@group(0) @binding(1) var<uniform> k: array<vec4<f32>, 4096>; // rows of [T, K, E]
@group(0) @binding(2) var<uniform> v: array<vec4<f32>, 4096>; // rows of [T, K, E]
@group(0) @binding(3) var<storage, read_write> ranges: array<vec2<u32>>; // [T]: which queries see a key
@group(0) @binding(4) var<uniform> stats: array<vec4<f32>, 4096>; // rows of [T, H], two entries a vec4
@group(0) @binding(5) var<uniform> dout: array<vec4<f32>, 4096>; // rows of [T, H, E]
@group(0) @binding(6) var<storage, read_write> dk: array<f32>; // [T, K, E]
@group(0) @binding(7) var<storage, read_write> dv: array<f32>; // [T, K, E]

@compute @workgroup_size(#{THREADS})
fn lane_backward_key_value(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let kv_head = group.y;
    let group_size = params.heads / params.kv_heads;
    let quads = params.head_size / 4u;
    let local = group.x * #{THREADS}u + lane;
    let row = min(local, params.rows - 1u);
    let range = ranges[params.first_row + row];
    let k_at = params.k_before + (row * params.kv_heads + kv_head) * quads;
    let v_at = params.v_before + (row * params.kv_heads + kv_head) * quads;
#unroll e in 0..QUADS
    let k#{e} = select(vec4<f32>(0.0), k[k_at + min(#{e}u, quads - 1u)] * params.scale, #{e}u < quads);
    let v#{e} = select(vec4<f32>(0.0), v[v_at + min(#{e}u, quads - 1u)], #{e}u < quads);
    var dk#{e} = vec4<f32>(0.0);
    var dv#{e} = vec4<f32>(0.0);
#end
    let first = ranges[params.first_row + min(group.x * #{THREADS}u, params.rows - 1u)].x - params.first_row;
    let end = ranges[params.first_row + min(group.x * #{THREADS}u + #{THREADS - 1}u, params.rows - 1u)].y - params.first_row;
    for (var head = kv_head * group_size; head < (kv_head + 1u) * group_size; head++) {
        for (var query = first; query < end; query++) {
            let q_at = params.q_before + (query * params.heads + head) * quads;
            let dout_at = params.dout_before + (query * params.heads + head) * quads;
            let stats_at = params.stats_before + (query * params.heads + head) * 2u;
            let stat = stats[stats_at / 4u];
            let lse = select(stat.x, stat.z, stats_at % 4u == 2u);
            let delta = select(stat.y, stat.w, stats_at % 4u == 2u);
            var dot4 = vec4<f32>(0.0);
            var dp4 = vec4<f32>(0.0);
#unroll e in 0..QUADS
            let q#{e} = q[q_at + min(#{e}u, quads - 1u)];
            let dout#{e} = dout[dout_at + min(#{e}u, quads - 1u)];
            dot4 = fma(k#{e}, q#{e}, dot4);
            dp4 = fma(v#{e}, dout#{e}, dp4);
#end
            let seen = query + params.first_row >= range.x && query + params.first_row < range.y;
            let p = select(0.0, exp(dot4.x + dot4.y + dot4.z + dot4.w - lse), seen);
            let ds = p * (dp4.x + dp4.y + dp4.z + dp4.w - delta) * params.scale;
#unroll e in 0..QUADS
            dk#{e} = fma(vec4<f32>(ds), q#{e}, dk#{e});
            dv#{e} = fma(vec4<f32>(p), dout#{e}, dv#{e});
#end
        }
    }
    if (local < params.rows) {
        let at = ((params.first_row + row) * params.kv_heads + kv_head) * params.head_size;
#unroll e in 0..QUADS
        if (#{e}u < quads) {
            dk[at + #{e * 4}u] = dk#{e}.x;
            dk[at + #{e * 4 + 1}u] = dk#{e}.y;
            dk[at + #{e * 4 + 2}u] = dk#{e}.z;
            dk[at + #{e * 4 + 3}u] = dk#{e}.w;
            dv[at + #{e * 4}u] = dv#{e}.x;
            dv[at + #{e * 4 + 1}u] = dv#{e}.y;
            dv[at + #{e * 4 + 2}u] = dv#{e}.z;
            dv[at + #{e * 4 + 3}u] = dv#{e}.w;
        }
#end
    }
}
