// Attention as in flash_attention.wgsl, by cooperative matrices: operands rounded to f16, sums and softmax in f32, in a fixed
// order. Heads are padded with zeros to E, a multiple of the matrices' SIDE.
//
// A workgroup owns ROWS rows and walks others in blocks of KEYS, which it stages in workgroup memory. A subgroup computes a
// unit: UNIT_ROWS rows by an ACROSSth of the columns. Any number of lanes works: subgroups without a unit only help to stage
// and to weigh, and where there are fewer subgroups than units (by whole rows of units), all is done again for the rest.
// Elements of a matrix cannot be told apart in registers, so scores go through workgroup memory as f32, and come back as
// weights in f16.
//
// W: numbers in an element of what matrices are loaded from: 4, which are stored at once; 1 for Metal, which loads from
// scalars only. Rows are padded against bank conflicts, and begin at multiples of 16 bytes.
enable f16;
#ifdef SIDE
enable wgpu_cooperative_matrix;
#endif

const PARTS: u32 = 256u; // of `cooperative.largest`

// Whole vec4s, as all workgroup memory here: what matrices are loaded from has to lie at multiples of 16 bytes, though an
// array of vec4<f16> by itself may lie at 8.
var<workgroup> marks: array<atomic<u32>, 4>;
const MOST: u32 = 0u; // of `largest`
const FIRST_SEEN: u32 = 1u;
const END_SEEN: u32 = 2u;
const RAISED: u32 = 3u; // blocks up to the last in which some row's largest was replaced

// The power of two that brings the largest of a gradient to 2^4 and beyond, short of 2^5, and the one that undoes it: what
// comes of a row of it and a row of values stays within f16 then. Something infinite shall stay so.
fn scale_of(largest: u32) -> vec2<f32> {
    let exponent = largest >> 23u;
    let kept = max(exponent, 5u);
    let scales = bitcast<vec2<f32>>(vec2<u32>(258u - kept, kept - 4u) << vec2<u32>(23u));
    return select(scales, vec2<f32>(1.0), exponent == 255u);
}

#kernel pack
// y = x in f16, its heads padded to `width`, zeros behind the last row. SCALED: multiplied by the gradient's power of two.
// VEC: heads are whole vec4s.
struct Params {
    rows: u32, // N * H
    room: u32, // rows of y in vec4s
    head_size: u32, // E
    width: u32, // in vec4s
    offset: u32, // of y, in vec4s
}
#params

#ifdef VEC
@group(0) @binding(0) var<storage, read_write> x: array<vec4<f32>>; // [N, H, E]
#else
@group(0) @binding(0) var<storage, read_write> x: array<f32>; // [N, H, E]
#endif
@group(0) @binding(1) var<storage, read_write> y: array<vec4<f16>>; // [room, H, width], from `offset` on
#ifdef SCALED
@group(0) @binding(2) var<storage, read_write> largest: array<u32>; // [PARTS], bits of |x|
#endif

@compute @workgroup_size(256)
fn pack(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    var scale = 1.0;
#ifdef SCALED
    if (local == 0u) {
        atomicStore(&marks[MOST], 0u);
    }
    workgroupBarrier();
    atomicMax(&marks[MOST], largest[local]);
    workgroupBarrier();
    scale = scale_of(atomicLoad(&marks[MOST])).x;
#endif
    let first = (group.x + group.y * groups.x) * #{COUNT * 256}u + local;
#unroll i in 0..COUNT
    {
        let at = first + #{i * 256}u;
        let row = at / params.width;
        let e = at % params.width * 4u;
        var value = vec4<f32>();
        if (row < params.rows && e < params.head_size) {
            let x_at = row * params.head_size + e;
#ifdef VEC
            value = x[x_at / 4u];
#else
            value.x = x[x_at];
#unroll c in 1..4
            if (e + #{c}u < params.head_size) {
                value[#{c}] = x[x_at + #{c}u];
            }
#end
#endif
        }
        if (at < params.room) {
            y[params.offset + at] = vec4<f16>(value * scale);
        }
    }
#end
}

#kernel delta
// delta[t, h] = sum over e of dout * out, of dout as it was packed: what a query has of a key that it sees alone is the same
// in both, so that it passes no gradient.
struct Params {
    rows: u32, // T * H
    head_size: u32, // E
    width: u32, // in vec4s
    offset: u32, // of dout, in vec4s
}
#params

@group(0) @binding(0) var<storage, read_write> out: array<f32>; // [T, H, E]
@group(0) @binding(1) var<storage, read_write> dout: array<vec4<f16>>; // [room, H, width], from `offset` on
@group(0) @binding(2) var<storage, read_write> stats: array<vec2<f32>>; // [T, H]

var<workgroup> sums: array<f32, 256>; // [32 rows, 8 threads]

@compute @workgroup_size(256)
fn delta(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let row = (group.x + group.y * groups.x) * 32u + local / 8u;
    var sum = 0.0;
    if (row < params.rows) {
        for (var quad = local % 8u; quad * 4u < params.head_size; quad += 8u) {
            let d = vec4<f32>(dout[params.offset + row * params.width + quad]);
#unroll c in 0..4
            if (quad * 4u + #{c}u < params.head_size) {
                sum = fma(out[row * params.head_size + quad * 4u + #{c}u], d[#{c}], sum);
            }
#end
        }
    }
    sums[local] = sum;
    workgroupBarrier();
    if (local % 8u == 0u && row < params.rows) {
        for (var i = 1u; i < 8u; i++) {
            sum += sums[local + i];
        }
        stats[row].y = sum;
    }
}

#kernel forward
#import cooperative_attention
@group(0) @binding(0) var<storage, read_write> own: array<Half>; // q, [queries_room, H, E]
@group(0) @binding(1) var<storage, read_write> walked: array<vec4<f16>>; // k and v, [2, keys_room, K, E]
@group(0) @binding(2) var<storage, read_write> ranges: array<vec2<u32>>; // [T]
@group(0) @binding(3) var<storage, read_write> out: array<f32>; // [T, H, head_size]
@group(0) @binding(4) var<storage, read_write> stats: array<vec2<f32>>; // [T, H] of log-sum-exp and delta

// Finite: a fast-math compiler may assume that no infinity occurs.
const MASKED: f32 = -3.0e38;
// Weights are powers of two of scores less the largest so far. That one stays until another is greater by more than this,
// so that sums, which go through workgroup memory for it, are seldom scaled. 2^8 is far from the end of f16.
const SLACK: f32 = 8.0;

var<workgroup> inverse: array<f32, #{ROWS}>; // of the sums of weights

fn give0(row: u32, at: u32, value: f32, factor: f32) {
    out[at] = value * inverse[row];
}

@compute @workgroup_size(#{THREADS})
fn forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
    @builtin(subgroup_size) lanes: u32,
    @builtin(subgroup_invocation_id) in_subgroup: u32,
) {
    let lane = subgroup * lanes + in_subgroup;
    let kv_head = group.y * params.kv_heads / params.heads;
    // Later queries come first: in a causal sequence they see the most.
    let own_row = (groups.x - 1u - group.x) * ROWS;
    let own_rows = params.queries;
    let own_heads = params.heads;
    let own_stride = own_heads * #{E / W}u;
    let own_at = own_row * own_stride + group.y * #{E / W}u;
    let own_second = 0u;
    let walked_stride = params.kv_heads * #{E / 4}u;
    let walked_last = params.keys - 1u;
    let keys_at = kv_head * #{E / 4}u + lane % #{E / 4}u;
    let values_at = keys_at + params.keys_room * walked_stride;
#import cooperative_attention_start
    let factor = params.scale * LOG2_E;
    let turns = (max(end, first) - first + KEYS - 1u) / KEYS;
    for (var done = 0u; done < UNITS; done += subgroups) {
#import cooperative_attention_unit
        var largest = MASKED;
        var sum = 0.0;
        var shrink = 1.0;
        if (lane == 0u) {
            atomicStore(&marks[RAISED], 0u);
        }
#unroll s in 0..KEYS*E/4/THREADS
        var x#{s} = walked[keys_at + min(first + staged_row + #{s * THREADS * 4 / E}u, walked_last) * walked_stride];
#end
        // Nobody is at the tiles for the units before any more.
        workgroupBarrier();
#unroll s in 0..KEYS*E/4/THREADS
        put0(staged_to + #{s * THREADS * 4 / E}u * TILE_STRIDE, x#{s});
        x#{s} = walked[keys_at + min(first + staged_row + #{KEYS + s * THREADS * 4 / E}u, walked_last) * walked_stride];
        var y#{s} = walked[values_at + min(first + staged_row + #{s * THREADS * 4 / E}u, walked_last) * walked_stride];
#end
        workgroupBarrier();
        // A turn sums the values of the block before, by its weights, and makes the scores of its own: one stretch of
        // products between two barriers.
        for (var turn = 0u; turn <= turns; turn++) {
            for (var again = atomicLoad(&marks[RAISED]); again == turn && turn > 0u; again = 0u) {
#unroll p in 0..E/KEYS
                for (var mine = unit; mine < UNITS; mine += UNITS) {
#unroll i in 0..UNIT_ROWS/SIDE
#unroll j in 0..KEYS/ACROSS/SIDE
                    coopStoreT(sum0_#{i}_#{p * (KEYS / ACROSS / SIDE) + j}, &scores0[scores_at + #{(i * SIDE * (KEYS + PAD) + j * SIDE) / W}u], SCORES_STRIDE);
#end
#end
                }
                workgroupBarrier();
#unroll i in 0..KEYS*ROWS/THREADS/4
                put_score0(row_at + #{i * (THREADS / ROWS) * 4 / W}u, score0(row_at + #{i * (THREADS / ROWS) * 4 / W}u) * shrink);
#end
                workgroupBarrier();
                for (var mine = unit; mine < UNITS; mine += UNITS) {
#unroll i in 0..UNIT_ROWS/SIDE
#unroll j in 0..KEYS/ACROSS/SIDE
                    sum0_#{i}_#{p * (KEYS / ACROSS / SIDE) + j} = coopLoadT<Sum>(&scores0[scores_at + #{(i * SIDE * (KEYS + PAD) + j * SIDE) / W}u], SCORES_STRIDE);
#end
#end
                }
#end
            }
            for (var mine = unit; mine < UNITS && turn > 0u; mine += UNITS) {
#import cooperative_attention_sums
            }
            for (var mine = unit; mine < UNITS && turn < turns; mine += UNITS) {
#import cooperative_attention_scores
            }
            if (turn == turns) {
                break;
            }
            workgroupBarrier();
            // Values of this block, keys of the next; and what comes after them is on its way.
            let block = first + turn * KEYS;
#unroll s in 0..KEYS*E/4/THREADS
            put0(staged_to + #{s * THREADS * 4 / E}u * TILE_STRIDE, x#{s});
            put1(staged_to + #{s * THREADS * 4 / E}u * TILE_STRIDE, y#{s});
            x#{s} = walked[keys_at + min(block + staged_row + #{2 * KEYS + s * THREADS * 4 / E}u, walked_last) * walked_stride];
            y#{s} = walked[values_at + min(block + staged_row + #{KEYS + s * THREADS * 4 / E}u, walked_last) * walked_stride];
#end
            var most_here = MASKED;
#unroll i in 0..KEYS*ROWS/THREADS/4
            let seen#{i} = sees(range, block + #{i * (THREADS / ROWS) * 4}u + part * 4u);
            let s#{i} = select(vec4<f32>(MASKED), score0(row_at + #{i * (THREADS / ROWS) * 4 / W}u) * factor, seen#{i});
            most_here = max(most_here, max(max(s#{i}.x, s#{i}.y), max(s#{i}.z, s#{i}.w)));
#end
#if 1 < THREADS / ROWS
            most_here = max(most_here, subgroupShuffleXor(most_here, 1u));
#endif
#if 2 < THREADS / ROWS
            most_here = max(most_here, subgroupShuffleXor(most_here, 2u));
#endif
            shrink = 1.0;
            if (most_here > largest + SLACK) {
                if (largest > MASKED) {
                    shrink = exp2(largest - most_here);
                    atomicMax(&marks[RAISED], turn + 1u);
                }
                largest = most_here;
                sum *= shrink;
            }
#unroll i in 0..KEYS*ROWS/THREADS/4
            let p#{i} = select(vec4<f32>(), exp2(s#{i} - largest), seen#{i});
            sum += p#{i}.x + p#{i}.y + p#{i}.z + p#{i}.w;
            weigh0(weights_at + #{i * (THREADS / ROWS) * 4 / W}u, vec4<f16>(p#{i}));
#end
            workgroupBarrier();
        }
#if 1 < THREADS / ROWS
        sum += subgroupShuffleXor(sum, 1u);
#endif
#if 2 < THREADS / ROWS
        sum += subgroupShuffleXor(sum, 2u);
#endif
        // A query that sees nothing gives zeros, and passes no gradient.
        if (part == 0u) {
            inverse[row] = select(1.0 / sum, 0.0, sum == 0.0);
            if (row / #{UNIT_ROWS}u * ACROSS - done < subgroups && own_row + row < own_rows) {
                let lse = select((largest + log2(sum)) / LOG2_E, 3.0e38, sum == 0.0);
                stats[(own_row + row) * params.heads + group.y] = vec2<f32>(lse, 0.0);
            }
        }
        let factor0 = 1.0;
#import cooperative_attention_write
    }
}

#kernel backward
// The gradients of what a workgroup owns. Queries: dq = sum over keys of ds * k, with p = exp(q.k * scale - lse) and ds = p *
// (dout.v - delta) * scale. OF_KEYS: the same seen from the keys, over the queries of all heads that share them: dk = sum of
// ds * q, dv = sum of p * dout.
#import cooperative_attention
#ifdef OF_KEYS
@group(0) @binding(0) var<storage, read_write> own: array<Half>; // k and v, [2, keys_room, K, E]
@group(0) @binding(1) var<storage, read_write> walked: array<vec4<f16>>; // q and scaled dout, [2, queries_room, H, E]
@group(0) @binding(2) var<storage, read_write> ranges: array<vec2<u32>>; // [S]: which queries see a key
#else
@group(0) @binding(0) var<storage, read_write> own: array<Half>; // q and scaled dout, [2, queries_room, H, E]
@group(0) @binding(1) var<storage, read_write> walked: array<vec4<f16>>; // k and v, [2, keys_room, K, E]
@group(0) @binding(2) var<storage, read_write> ranges: array<vec2<u32>>; // [T]
#endif
@group(0) @binding(3) var<storage, read_write> stats: array<vec2<f32>>; // [T, H], delta as dout is scaled
@group(0) @binding(4) var<storage, read_write> parts: array<u32>; // [PARTS], bits of |dout|
@group(0) @binding(5) var<storage, read_write> gradient0: array<f32>; // dq or dk
#ifdef OF_KEYS
@group(0) @binding(6) var<storage, read_write> gradient1: array<f32>; // dv
var<workgroup> column_lse: array<vec4<f32>, #{KEYS / 4}>;
var<workgroup> column_delta: array<vec4<f32>, #{KEYS / 4}>;
#endif

#unroll n in 0..OUTPUTS
fn give#{n}(row: u32, at: u32, value: f32, factor: f32) {
    gradient#{n}[at] = value * factor;
}
#end

// Log-sum-exp to base two, and delta. That of queries that see nothing stays finite.
fn stats_at(at: u32) -> vec2<f32> {
    let found = stats[at];
    return vec2<f32>(min(found.x, 2.0e38) * LOG2_E, found.y);
}

@compute @workgroup_size(#{THREADS})
fn backward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
    @builtin(subgroup_size) lanes: u32,
    @builtin(subgroup_invocation_id) in_subgroup: u32,
) {
    let lane = subgroup * lanes + in_subgroup;
#ifdef OF_KEYS
    // Earlier keys come first: in a causal sequence most queries see them.
    let own_row = group.x * ROWS;
    let own_rows = params.keys;
    let own_heads = params.kv_heads;
    let own_room = params.keys_room;
    let walked_heads = params.heads;
    let walked_room = params.queries_room;
    let walked_last = params.queries - 1u;
    let sharing = params.heads / params.kv_heads;
    let walked_head = group.y * sharing;
#else
    let own_row = (groups.x - 1u - group.x) * ROWS;
    let own_rows = params.queries;
    let own_heads = params.heads;
    let own_room = params.queries_room;
    let walked_heads = params.kv_heads;
    let walked_room = params.keys_room;
    let walked_last = params.keys - 1u;
    let sharing = 1u;
    let walked_head = group.y * params.kv_heads / params.heads;
#endif
    let own_stride = own_heads * #{E / W}u;
    let own_at = own_row * own_stride + group.y * #{E / W}u;
    let own_second = own_room * own_stride;
    let walked_stride = walked_heads * #{E / 4}u;
    let walked_second = walked_room * walked_stride;
    if (lane == 0u) {
        atomicStore(&marks[MOST], 0u);
    }
#import cooperative_attention_start
    for (var at = lane; at < PARTS; at += #{THREADS}u) {
        atomicMax(&marks[MOST], parts[at]);
    }
    workgroupBarrier();
    let unscale = scale_of(atomicLoad(&marks[MOST])).y;
    let factor = params.scale * LOG2_E;
    let blocks = max((max(end, first) - first + KEYS - 1u) / KEYS, 1u);
    let turns = select(blocks * sharing, 0u, end <= first);
#ifndef OF_KEYS
    let row_stats = stats_at(min(own_row + row, own_rows - 1u) * params.heads + group.y);
#endif
    for (var done = 0u; done < UNITS; done += subgroups) {
#import cooperative_attention_unit
        let walked_at = walked_head * #{E / 4}u + lane % #{E / 4}u;
#unroll s in 0..KEYS*E/4/THREADS
        let at#{s} = walked_at + min(first + staged_row + #{s * THREADS * 4 / E}u, walked_last) * walked_stride;
        var x#{s} = walked[at#{s}];
        var y#{s} = walked[walked_second + at#{s}];
#end
#ifdef OF_KEYS
        var column = stats_at(min(first + lane % KEYS, walked_last) * walked_heads + walked_head);
#endif
        for (var turn = 0u; turn < turns; turn++) {
            let block = first + turn % blocks * KEYS;
            // Nobody is at the tiles any more. What is walked next is on its way while this is multiplied.
            workgroupBarrier();
            let next = min(turn + 1u, turns - 1u);
            let next_head = walked_head + next / blocks;
            let next_block = first + next % blocks * KEYS;
            let next_walked_at = next_head * #{E / 4}u + lane % #{E / 4}u;
#unroll s in 0..KEYS*E/4/THREADS
            put0(staged_to + #{s * THREADS * 4 / E}u * TILE_STRIDE, x#{s});
            put1(staged_to + #{s * THREADS * 4 / E}u * TILE_STRIDE, y#{s});
            let next_at#{s} = next_walked_at + min(next_block + staged_row + #{s * THREADS * 4 / E}u, walked_last) * walked_stride;
            x#{s} = walked[next_at#{s}];
            y#{s} = walked[walked_second + next_at#{s}];
#end
#ifdef OF_KEYS
            if (lane < KEYS) {
                column_lse[lane / 4u][lane % 4u] = column.x;
                column_delta[lane / 4u][lane % 4u] = column.y;
            }
            column = stats_at(min(next_block + lane % KEYS, walked_last) * walked_heads + next_head);
#endif
            workgroupBarrier();
            for (var mine = unit; mine < UNITS; mine += UNITS) {
#import cooperative_attention_scores
            }
            workgroupBarrier();
#unroll i in 0..KEYS*ROWS/THREADS/4
            {
#ifdef OF_KEYS
                let lse = column_lse[#{i * (THREADS / ROWS)}u + part];
                let delta = column_delta[#{i * (THREADS / ROWS)}u + part];
#else
                let lse = row_stats.x;
                let delta = row_stats.y;
#endif
                let s = score0(row_at + #{i * (THREADS / ROWS) * 4 / W}u) * factor;
                let seen = sees(range, block + #{i * (THREADS / ROWS) * 4}u + part * 4u);
                let p = select(vec4<f32>(), exp2(s - lse), seen);
                let ds = p * (score1(row_at + #{i * (THREADS / ROWS) * 4 / W}u) - delta);
                weigh0(weights_at + #{i * (THREADS / ROWS) * 4 / W}u, vec4<f16>(ds));
#ifdef OF_KEYS
                weigh1(weights_at + #{i * (THREADS / ROWS) * 4 / W}u, vec4<f16>(p));
#endif
            }
#end
            workgroupBarrier();
            for (var mine = unit; mine < UNITS; mine += UNITS) {
#import cooperative_attention_sums
            }
        }
        let factor0 = params.scale * unscale;
        let factor1 = unscale;
#import cooperative_attention_write
    }
}
