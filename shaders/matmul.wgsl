// C[M, N] = alpha * op(A) op(B) (+ bias[N]) (+ C), f32 accumulation in a fixed order.
//   NN: A [M, K], B [K, N]     NT: A [M, K], B [N, K]     TN: A [K, M], B [K, N]
// Leading dimensions and offsets are in elements, so that a part of a larger matrix can be read and written.
// PACKED: B is a weight in 16 bits, two elements to a word; a row may begin inside a word.

struct Params {
#import product_params
    before: u32, // by_lane: how many elements precede the first row in the first uniform of W
    // rows: rows of W_1 and W_2, and where these begin.
    n1: u32,
    n2: u32,
    b_offset1: u32,
    b_offset2: u32,
}
#params

const ADD_BIAS: u32 = 1u;
const ACCUMULATE: u32 = 2u;

#kernel by_subgroup
// For devices that run on the host's processor. Lanes run along N, and a thread owns a large block of C, ROWS x COLS. Every
// subgroup there has THREADS lanes, and a workgroup is one of them: a lane loads rows of A of its own and hands them to the
// others, so that THREADS rows cost one load.
#import columns_operands

@compute @workgroup_size(#{THREADS})
fn by_subgroup(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let row = group.y * #{ROWS}u;
#import columns_start
#import columns_of_b
    // The lane's rows of A, alike.
#ifdef TN
    let a_step = params.lda;
#unroll r in 0..ROWS/THREADS
    let a_at#{r} = params.a_offset + min(row + #{r * THREADS}u + lane, params.m - 1u);
#end
#else
    let a_step = 1u;
#unroll r in 0..ROWS/THREADS
    let a_at#{r} = params.a_offset + min(row + #{r * THREADS}u + lane, params.m - 1u) * params.lda;
#end
#endif
    // STEPS of K at a time, then what is left of it one by one.
    var k = 0u;
#unroll rest in 0..2
    for (; k + #{STEPS - rest * (STEPS - 1)}u <= params.k; k += #{STEPS - rest * (STEPS - 1)}u) {
#unroll s in 0..STEPS - rest * (STEPS - 1)
#unroll r in 0..ROWS/THREADS
        let own#{r}_#{s} = a[a_at#{r} + (k + #{s}u) * a_step];
#end
#unroll j in 0..COLS
        let y#{s}_#{j} = load_b(b_at#{j} + (k + #{s}u) * b_step);
#end
#end
#unroll i in 0..ROWS
#unroll s in 0..STEPS - rest * (STEPS - 1)
        let x#{i}_#{s} = subgroupBroadcast(own#{i / THREADS}_#{s}, #{i % THREADS}u);
#end
#unroll j in 0..COLS
#unroll s in 0..STEPS - rest * (STEPS - 1)
        c#{i}_#{j} = fma(x#{i}_#{s}, y#{s}_#{j}, c#{i}_#{j});
#end
#end
#end
    }
#end
#import columns_write
}

#kernel by_column_staged
// The same where subgroups are not known: A is staged in workgroup memory, `window` columns at a time.
#import columns_operands

var<workgroup> staged: array<f32, #{DEPTH * ROWS}>; // [window, ROWS], with window DEPTH at most

@compute @workgroup_size(#{THREADS})
fn by_column_staged(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let row = group.y * #{ROWS}u;
#import columns_start
#import columns_of_b
    // DEPTH comes as a parameter: a loop whose length compilers know is unrolled, and then slower by a half.
    for (var depth = 0u; depth < params.k; depth += params.window) {
        let count = min(params.window, params.k - depth);
        // Steps of K past the end are zero.
        for (var at = local; at < (count + 3u) / 4u * #{ROWS}u; at += #{THREADS}u) {
            let in_block = at % #{ROWS}u;
            let step = at / #{ROWS}u * 4u;
            let a_row = min(row + in_block, params.m - 1u);
#unroll s in 0..4
            let a_col#{s} = min(depth + step + #{s}u, params.k - 1u);
#ifdef TN
            let value#{s} = a[params.a_offset + a_col#{s} * params.lda + a_row];
#else
            let value#{s} = a[params.a_offset + a_row * params.lda + a_col#{s}];
#endif
            staged[(step + #{s}u) * #{ROWS}u + in_block] = select(0.0, value#{s}, step + #{s}u < count);
#end
        }
        workgroupBarrier();
        for (var k = 0u; k < count; k += 2u) {
            let b_from0 = (depth + k) * b_step;
            let b_from1 = min(depth + k + 1u, params.k - 1u) * b_step;
#unroll j in 0..COLS
            let y0_#{j} = load_b(b_at#{j} + b_from0);
            let y1_#{j} = select(0.0, load_b(b_at#{j} + b_from1), k + 1u < count);
#end
#unroll i in 0..ROWS
            let x0_#{i} = staged[k * #{ROWS}u + #{i}u];
            let x1_#{i} = staged[k * #{ROWS}u + #{ROWS + i}u];
#unroll j in 0..COLS
            c#{i}_#{j} = fma(x0_#{i}, y0_#{j}, c#{i}_#{j});
            c#{i}_#{j} = fma(x1_#{i}, y1_#{j}, c#{i}_#{j});
#end
#end
        }
        workgroupBarrier();
    }
#import columns_write
}

#kernel by_lane
// NT for the same devices: a lane owns a row of W and ROWS rows of C's column. W comes in WINDOWS uniforms of `window`
// whole rows, one a workgroup; A is read at the same address by all lanes. A sum goes over CHAINS accumulators, so that
// it does not wait for itself.
@group(0) @binding(0) var<storage, read_write> c: array<f32>; // [M, N]
@group(0) @binding(1) var<uniform> bias: array<vec4<f32>, 4096>; // [N]
@group(0) @binding(2) var<uniform> a: array<vec4<f32>, 4096>; // rows of [M, K]
#unroll w in 0..WINDOWS
#ifdef PACKED
#import packed
@group(0) @binding(#{3 + w}) var<uniform> b#{w}: array<vec4<u32>, 4096>; // rows of [N, K], packed
#else
@group(0) @binding(#{3 + w}) var<uniform> b#{w}: array<vec4<f32>, 4096>; // rows of [N, K]
#endif
#end

@compute @workgroup_size(#{THREADS})
fn by_lane(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let row = group.y * #{ROWS}u;
    let in_window = group.x * #{THREADS}u + local;
    let col = group.z * params.window + in_window;
    let last = min(params.window, params.n - group.z * params.window) - 1u;
    // Uniforms begin at multiples of 256 bytes.
#ifdef PACKED
    let before = (params.before + group.z * params.window * params.ldb) % 128u;
#else
    let before = (params.before + group.z * params.window * params.ldb) % 64u;
#endif
    let bj = before + min(in_window, last) * params.ldb;
#unroll i in 0..ROWS
    let ai#{i} = params.a_offset + min(row + #{i}u, params.m - 1u) * params.lda;
#unroll c in 0..CHAINS
    var sum#{i}_#{c} = 0.0;
#end
#end
#unroll w in 0..WINDOWS
    if (group.z == #{w}u) {
#ifdef VEC
#ifdef PACKED
        for (var k = 0u; k < params.k; k += 8u) {
            let words = b#{w}[(bj + k) / 8u];
            let even = widen_even(words);
            let odd = widen_odd(words);
#unroll i in 0..ROWS
            let x#{i}_0 = a[(ai#{i} + k) / 4u];
            let x#{i}_1 = a[(ai#{i} + k) / 4u + 1u];
#unroll s in 0..4
            sum#{i}_#{2 * s % CHAINS} = fma(x#{i}_#{s / 2}[#{2 * s % 4}], even[#{s}], sum#{i}_#{2 * s % CHAINS});
            sum#{i}_#{(2 * s + 1) % CHAINS} = fma(x#{i}_#{s / 2}[#{2 * s % 4 + 1}], odd[#{s}], sum#{i}_#{(2 * s + 1) % CHAINS});
#end
#end
        }
#else
        for (var k = 0u; k < params.k; k += 4u) {
            let y = b#{w}[(bj + k) / 4u];
#unroll i in 0..ROWS
            let x#{i} = a[(ai#{i} + k) / 4u];
#unroll s in 0..4
            sum#{i}_#{s % CHAINS} = fma(x#{i}[#{s}], y[#{s}], sum#{i}_#{s % CHAINS});
#end
#end
        }
#endif
#else
        for (var k = 0u; k < params.k; k++) {
            let at = bj + k;
#ifdef PACKED
            let y = widen_one(b#{w}[at / 8u][(at / 2u) % 4u], at);
#else
            let y = b#{w}[at / 4u][at % 4u];
#endif
#unroll i in 0..ROWS
            let ax#{i} = ai#{i} + k;
            sum#{i}_0 = fma(a[ax#{i} / 4u][ax#{i} % 4u], y, sum#{i}_0);
#end
        }
#endif
    }
#end
    if (in_window > last) {
        return;
    }
    var shifted = 0.0;
    if ((params.flags & ADD_BIAS) != 0u) {
        let bias_at = params.bias_offset + col;
        shifted = bias[bias_at / 4u][bias_at % 4u];
    }
#unroll i in 0..ROWS
    if (row + #{i}u < params.m) {
        let at = params.c_offset + (row + #{i}u) * params.ldc + col;
        var total = sum#{i}_0;
#unroll c in 1..CHAINS
        total += sum#{i}_#{c};
#end
        var value = fma(params.alpha, total, shifted);
        if ((params.flags & ACCUMULATE) != 0u) {
            value += c[at];
        }
        c[at] = value;
    }
#end
}

#kernel tiled
// For GPUs, of operands that lie as whole vec4s, C too: a workgroup owns a TILE x TILE part of C, a thread blocks of 4 x 4
// spread over it, BLOCK x BLOCK in all. DEPTH of what is summed is staged k-major while the next vec4s are on their way to
// registers. Those that lie along K are transposed as they are staged, with vec4s of a row in another order for every
// four rows, so that the stores of a subgroup meet no bank twice. K may be summed in parts (src/ops/matmul/split.rs):
// then C is [parts, M, N].
#import vector_tile

@compute @workgroup_size(#{TILE / BLOCK * (TILE / BLOCK)})
fn tiled(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let row = group.y * #{TILE}u;
    let col = group.x * #{TILE}u;
    // The thread's first block, in vec4s.
    let my_row = local / #{TILE / BLOCK}u;
    let my_col = local % #{TILE / BLOCK}u;
#unroll i in 0..BLOCK
#unroll j in 0..BLOCK/4
    var c#{i}_#{j} = vec4<f32>(0.0);
#end
#end
    let k_first = group.z * params.window;
    let k_end = min(k_first + params.window, params.k);
#import vector_tile_staging
    var buffer = 0u;
    // Each turn but the first multiplies what the one before it has staged; the last one stages nothing but zeros.
    for (var depth = k_first; depth < k_end + #{DEPTH}u; depth += #{DEPTH}u) {
#unroll s in 0..DEPTH*BLOCK*BLOCK/TILE/4
        var a#{s} = vec4<f32>(0.0);
        if (depth + k_of_a#{s} < k_end) {
            a#{s} = a[from_a#{s}];
        }
        from_a#{s} += step_a;
#ifdef PACKED
        var b#{s} = vec2<u32>(0u);
#else
        var b#{s} = vec4<f32>(0.0);
#endif
        if (depth + k_of_b#{s} < k_end) {
            b#{s} = b[from_b#{s}];
        }
        from_b#{s} += step_b;
#end
        if (depth > k_first) {
#import vector_tile_product
        }
#if BUFFERS == 2
        buffer = #{DEPTH * TILE / 4}u - buffer;
#else
        workgroupBarrier();
#endif
#unroll s in 0..DEPTH*BLOCK*BLOCK/TILE/4
#ifdef TN
        tile_a[buffer + to_a#{s}] = a#{s};
#else
#unroll i in 0..4
        tile_a[buffer + to_a#{s} + #{i * TILE / 4}u][row_of_a#{s} % 4u] = a#{s}[#{i}];
#end
#endif
#ifdef PACKED
        let wide#{s} = widen_four(b#{s});
#else
        let wide#{s} = b#{s};
#endif
#ifdef NT
#unroll i in 0..4
        tile_b[buffer + to_b#{s} + #{i * TILE / 4}u][col_of_b#{s} % 4u] = wide#{s}[#{i}];
#end
#else
        tile_b[buffer + to_b#{s}] = wide#{s};
#endif
#end
        workgroupBarrier();
    }
    let c_first = params.c_offset + group.z * params.m * params.ldc;
#import vector_tile_write
}

#kernel tiled_odd
// The same of operands that lie anyhow, element by element: staged rows are padded by 4 words (against bank conflicts of
// the transposing store), a thread owns BLOCK x BLOCK of C.
#import storage_operands
#import tile

fn load_a(row: u32, k: u32) -> f32 {
    if (row >= params.m || k >= params.k) {
        return 0.0;
    }
#ifdef TN
    return a[params.a_offset + k * params.lda + row];
#else
    return a[params.a_offset + row * params.lda + k];
#endif
}

fn load_b(k: u32, col: u32) -> f32 {
    if (col >= params.n || k >= params.k) {
        return 0.0;
    }
#ifdef NT
    let at = params.b_offset + col * params.ldb + k;
#else
    let at = params.b_offset + k * params.ldb + col;
#endif
#ifdef PACKED
    return widen_one(b[at / 2u], at);
#else
    return b[at];
#endif
}

@compute @workgroup_size(#{TILE / BLOCK * (TILE / BLOCK)})
fn tiled_odd(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let row = group.y * #{TILE}u;
    let col = group.x * #{TILE}u;
    let my_row = (local / SIDE) * #{BLOCK}u;
    let my_col = (local % SIDE) * #{BLOCK}u;
#unroll i in 0..BLOCK
#unroll j in 0..BLOCK/4
    var c#{i}_#{j} = vec4<f32>(0.0);
#end
#end
    let k_first = group.z * params.window;
    let c_first = params.c_offset + group.z * params.m * params.ldc;
    for (var depth = k_first; depth < min(k_first + params.window, params.k); depth += #{DEPTH}u) {
        for (var at = local; at < #{DEPTH * TILE / 4}u; at += THREADS) {
            // Neighbouring threads read neighbouring addresses: along K where K runs fastest, else along the tile.
#ifdef TN
            let ka = at / #{TILE / 4}u;
            let ra = at % #{TILE / 4}u;
#else
            let ka = at % #{DEPTH}u;
            let ra = at / #{DEPTH}u;
#endif
            let ra4 = row + ra * 4u;
            let da = depth + ka;
            tile_a[ka * STRIDE + ra] = vec4<f32>(load_a(ra4, da), load_a(ra4 + 1u, da), load_a(ra4 + 2u, da), load_a(ra4 + 3u, da));
#ifdef NT
            let kb = at % #{DEPTH}u;
            let cb = at / #{DEPTH}u;
#else
            let kb = at / #{TILE / 4}u;
            let cb = at % #{TILE / 4}u;
#endif
            let cb4 = col + cb * 4u;
            let db = depth + kb;
            tile_b[kb * STRIDE + cb] = vec4<f32>(load_b(db, cb4), load_b(db, cb4 + 1u), load_b(db, cb4 + 2u), load_b(db, cb4 + 3u));
        }
        workgroupBarrier();
#import tile_product
        workgroupBarrier();
    }
#import tile_write
}

#kernel sum_parts
// C = alpha * (the sum of K's parts, in order) (+ bias) (+ C). k: how many parts there are.
@group(0) @binding(0) var<storage, read_write> parts: array<f32>; // [k, M, N]
@group(0) @binding(1) var<storage, read_write> bias: array<f32>; // [N]
@group(0) @binding(2) var<storage, read_write> c: array<f32>; // [M, N], rows of ldc

@compute @workgroup_size(64)
fn sum_parts(@builtin(global_invocation_id) id: vec3<u32>) {
    if (id.x >= params.n) {
        return;
    }
    let size = params.m * params.n;
    var sum = 0.0;
    for (var part = 0u; part < params.k; part++) {
        sum += parts[part * size + id.y * params.n + id.x];
    }
    var value = params.alpha * sum;
    if ((params.flags & ADD_BIAS) != 0u) {
        value += bias[id.x];
    }
    let at = params.c_offset + id.y * params.ldc + id.x;
    if ((params.flags & ACCUMULATE) != 0u) {
        value += c[at];
    }
    c[at] = value;
}

#kernel rows
// NT with few rows of A: a workgroup owns one row of W [N, K], its threads run along K, ROWS rows of A are served
// by one pass over W. The sums meet in workgroup memory, always in the same order.
// Of several WEIGHTS, a workgroup owns a row of one, counted through them all, and each has its C; with two SUMS the same
// row of both, and C = silu(A W_0^T) * (A W_1^T). Such operands are whole, and their C is written as it is.
// VEC: rows of W and A are whole vec4s, of which a thread loads TURNS at a time, each with VEC elements of W.
#import rows_operands

var<workgroup> partial: array<f32, #{SUMS * ROWS * THREADS}>;

@compute @workgroup_size(#{THREADS})
fn rows(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let row = group.y * #{ROWS}u;
    let n0 = params.n;
    let offset0 = params.b_offset;
    let col0 = group.x + group.z * 32768u;
#unroll w in 1..WEIGHTS
    let n#{w} = params.n#{w};
    let offset#{w} = params.b_offset#{w};
#if SUMS == 1
    let col#{w} = col#{w - 1} - n#{w - 1}; // wraps, beyond all columns, where the row is of an earlier weight
#else
    let col#{w} = col0;
#endif
#end
#unroll i in 0..ROWS
    let a_at#{i} = params.a_offset + min(row + #{i}u, params.m - 1u) * params.lda;
#unroll s in 0..SUMS
#ifdef VEC
    var sum#{s}_#{i} = vec4<f32>(0.0);
#else
    var sum#{s}_#{i} = 0.0;
#endif
#end
#end
#unroll w in 0..WEIGHTS
    if (col#{w} < n#{w}) {
        let weight = offset#{w} + col#{w} * params.ldb;
#ifdef VEC
        var at = local;
#unroll t in 0..2
        // Several at a time, then the rest one by one.
        for (; at + #{(1 - t) * (TURNS - 1) * THREADS}u < params.k / #{VEC}u; at += #{(t + (1 - t) * TURNS) * THREADS}u) {
#unroll q in 0..t + (1 - t) * TURNS
            let y#{q} = b#{w}[weight / #{VEC}u + at + #{q * THREADS}u];
#end
#unroll q in 0..t + (1 - t) * TURNS
#ifdef PACKED
            let even#{q} = widen_even(y#{q});
            let odd#{q} = widen_odd(y#{q});
#endif
#unroll i in 0..ROWS
#ifdef PACKED
            let x#{q}_#{i} = a[a_at#{i} / 4u + 2u * at + #{2 * q * THREADS}u];
            let z#{q}_#{i} = a[a_at#{i} / 4u + 2u * at + #{2 * q * THREADS + 1}u];
            sum#{w % SUMS}_#{i} = fma(vec4<f32>(x#{q}_#{i}.xz, z#{q}_#{i}.xz), even#{q}, sum#{w % SUMS}_#{i});
            sum#{w % SUMS}_#{i} = fma(vec4<f32>(x#{q}_#{i}.yw, z#{q}_#{i}.yw), odd#{q}, sum#{w % SUMS}_#{i});
#else
            sum#{w % SUMS}_#{i} = fma(a[a_at#{i} / 4u + at + #{q * THREADS}u], y#{q}, sum#{w % SUMS}_#{i});
#endif
#end
#end
        }
#end
#else
#ifdef PACKED
        // Word by word, of which the first and the last may be half a neighbour's.
        let skipped = weight & 1u;
        let words = (params.k + skipped + 1u) / 2u;
        for (var at = local; at < words; at += #{THREADS}u) {
            let y = widen(b#{w}[weight / 2u + at]);
            let k = 2u * at - skipped; // wraps where the first half is a neighbour's
            if (k < params.k) {
#unroll i in 0..ROWS
                sum#{w % SUMS}_#{i} = fma(a[a_at#{i} + k], y.x, sum#{w % SUMS}_#{i});
#end
            }
            if (k + 1u < params.k) {
#unroll i in 0..ROWS
                sum#{w % SUMS}_#{i} = fma(a[a_at#{i} + k + 1u], y.y, sum#{w % SUMS}_#{i});
#end
            }
        }
#else
        for (var k = local; k < params.k; k += #{THREADS}u) {
            let y = b#{w}[weight + k];
#unroll i in 0..ROWS
            sum#{w % SUMS}_#{i} = fma(a[a_at#{i} + k], y, sum#{w % SUMS}_#{i});
#end
        }
#endif
#endif
    }
#end
#unroll s in 0..SUMS
#unroll i in 0..ROWS
#ifdef VEC
    let total#{s}_#{i} = (sum#{s}_#{i}.x + sum#{s}_#{i}.y) + (sum#{s}_#{i}.z + sum#{s}_#{i}.w);
#else
    let total#{s}_#{i} = sum#{s}_#{i};
#endif
    partial[#{(s * ROWS + i) * THREADS}u + local] = total#{s}_#{i};
#end
#end
    workgroupBarrier();
    for (var width = #{THREADS / 2}u; width > 0u; width /= 2u) {
        if (local < width) {
#unroll s in 0..SUMS*ROWS
            partial[#{s * THREADS}u + local] += partial[#{s * THREADS}u + local + width];
#end
        }
        workgroupBarrier();
    }
    if (local >= #{ROWS}u || row + local >= params.m) {
        return;
    }
    let total = partial[local * #{THREADS}u];
#if WEIGHTS == 1
    if (col0 < n0) {
        let at = params.c_offset + (row + local) * params.ldc + col0;
        var value = params.alpha * total;
        if ((params.flags & ADD_BIAS) != 0u) {
            value += bias[col0];
        }
        if ((params.flags & ACCUMULATE) != 0u) {
            value += c0[at];
        }
        c0[at] = value;
    }
#else
#if SUMS == 1
#unroll w in 0..WEIGHTS
    if (col#{w} < n#{w}) {
        c#{w}[(row + local) * n#{w} + col#{w}] = total;
    }
#end
#else
    if (col0 < n0) {
        let gate = total;
        c0[(row + local) * n0 + col0] = gate * (1.0 / (1.0 + exp(-gate))) * partial[#{ROWS * THREADS}u + local * #{THREADS}u];
    }
#endif
#endif
}
