// C[M, N] = alpha * op(A) op(B) (+ bias[N]) (+ C) by cooperative matrices: operands rounded to f16, sums in f32 in a fixed
// order. Layouts, leading dimensions and offsets as in matmul.wgsl. PACKED: B is in f16. BF16: it is in bfloat16.
//
// Where the flags say so an operand is multiplied by the power of two that brings its largest element to 2^14 and beyond,
// short of 2^15, before it is rounded, and the sums are divided by it: neither do large ones overflow nor small ones vanish.
#ifdef SIDE
enable f16;
enable wgpu_cooperative_matrix;
#endif

struct Params {
#import product_params
#ifdef PAIRS
#if PAIRS == 2
    k2: u32,
    ldb2: u32,
    b2_offset: u32,
    alpha2: f32,
#endif
#endif
}
#params

const ADD_BIAS: u32 = 1u;
const ACCUMULATE: u32 = 2u;
const SCALE: u32 = 4u; // of A; times 2, 4 and 8: of B, A2, B2
const PARTS: u32 = 256u; // workgroups of `largest`
const FOURS: u32 = PARTS / 4u;

#kernel product
// A workgroup owns ROWS x COLS of C and stages DEPTH of what is summed of both operands, in rows padded by 8 (against
// bank conflicts; columns begin at multiples of 16 bytes). A subgroup computes a unit of it, UNIT_ROWS x UNIT_COLS, in
// matrices of SIDE x SIDE. There is a text for the usual number of lanes, but any number works: subgroups without a
// unit only help to stage, and where there are fewer subgroups than units, all is done again for the rest. K may be summed
// in parts, as by matmul.tiled.
// EXACT: there are as many subgroups as units, M and N have a whole tile at least, and the last tiles begin where they end
// with C. So no load in the loop needs a test: tests make loads wait for one another.
// PAIRS = 2, of those: alpha2 * op(A2) op(B2), in f32, is added on the way, an adapter's part: C is not read and written
// again for it. Its K has whole steps, alpha is 1.
// PLAIN_B, of those: B, in f32, is never scaled, which costs the large tile registers.
// DIRECT, of those: K has whole steps, and matrices go to C as they are. There is no bias, and what is added to has whole
// tiles alone. It pays where K is short; where it is long the loop of the others is faster (docs/kernels.md).
#ifdef VEC
@group(0) @binding(0) var<storage, read_write> a0: array<vec4<f32>>; // [M, K], or [K, M] in TN
#else
@group(0) @binding(0) var<storage, read_write> a0: array<f32>; // [M, K], or [K, M] in TN
#endif
#ifdef PACKED
alias Element = f16;
#else
alias Element = f32;
#endif
#ifdef BF16
alias Four = vec2<u32>;
#else
alias Four = vec4<Element>;
#endif
#ifdef VEC
@group(0) @binding(1) var<storage, read_write> b0: array<Four>; // [K, N], or [N, K] in NT
#else
@group(0) @binding(1) var<storage, read_write> b0: array<Element>; // [K, N], or [N, K] in NT
#endif
#ifndef DIRECT
@group(0) @binding(2) var<storage, read_write> bias: array<f32>; // [N]
#endif
#ifdef VEC
@group(0) @binding(3) var<storage, read_write> c: array<vec4<f32>>; // [M, N]
#else
@group(0) @binding(3) var<storage, read_write> c: array<f32>; // [M, N]
#endif
@group(0) @binding(4) var<storage, read_write> largest_a: array<vec4<u32>>; // [PARTS], bits of |x|
@group(0) @binding(5) var<storage, read_write> largest_rest: array<vec4<u32>>; // [3, PARTS]: of B, A2, B2
#if PAIRS == 2
@group(0) @binding(6) var<storage, read_write> a1: array<vec4<f32>>; // [M, K2]
@group(0) @binding(7) var<storage, read_write> b1: array<vec4<f32>>; // [K2, N], or [N, K2] in NT
#endif

const DEPTH: u32 = #{DEPTH}u;
const ACROSS: u32 = #{COLS / UNIT_COLS}u; // units side by side
const UNITS: u32 = #{ROWS / UNIT_ROWS * (COLS / UNIT_COLS)}u;

#import cooperative_tiles

alias Left = coop_mat#{SIDE}x#{SIDE}<f16, A>;
alias Right = coop_mat#{SIDE}x#{SIDE}<f16, B>;
alias Sum = coop_mat#{SIDE}x#{SIDE}<f32, C>;

// What a place in storage, `at`, counts: elements, or whole vectors.
#ifdef VEC
const PER: u32 = 4u;
#else
const PER: u32 = 1u;
#endif

#import cooperative_scale

// B as it waits for its turn, and as it is staged: bf16 waits as it is, for it takes no more registers than f16.
#ifdef BF16
alias Waiting = vec2<u32>;
#else
alias Waiting = vec4<f16>;
#endif

fn taken_b0(x: Four, scale: f32) -> Waiting {
#ifdef BF16
    return x;
#else
#ifdef PACKED
    return x;
#else
#ifdef PLAIN_B
    return vec4<f16>(x);
#else
    return vec4<f16>(scale * x);
#endif
#endif
#endif
}

fn staged_b0(x: Waiting) -> vec4<f16> {
#ifdef BF16
    return vec4<f16>(bitcast<vec4<f32>>(vec4<u32>(x.x << 16u, x.x & 0xffff0000u, x.y << 16u, x.y & 0xffff0000u)));
#else
    return x;
#endif
}

#if PAIRS == 2
fn staged_b1(x: vec4<f16>) -> vec4<f16> {
    return x;
}
#endif

// A distance that may be negative, as `at` counts.
fn back(elements: u32) -> u32 {
    return bitcast<u32>(bitcast<i32>(elements) / i32(PER));
}

// The row of a tile, of DEPTH numbers, that a thread stages: neighbours' are four apart. Rows are 80 bytes from each other,
// so sixteen lanes that store two whole ones meet every bank once then, and some twice where they are next to each other.
fn spread(own: u32) -> u32 {
#if 7 < THREADS / (DEPTH / 4)
    return (own & 0xfffffff8u) | ((own & 1u) << 2u) | ((own >> 1u) & 3u);
#else
    return own;
#endif
}

// Operands come in fours of neighbours in storage: of A those at (row, k) and on along K, in TN along M; of B at (k, col) and on
// along N, in NT along K. Beyond the matrix they are zeros, and before the sum begins: k counts from there, and wraps.
#ifdef DIRECT
fn load_a0(at: u32, row: u32, k: u32, length: u32) -> vec4<f32> {
    return a0[at];
}

fn load_b0(at: u32, k: u32, col: u32, length: u32) -> Four {
    return b0[at];
}
#else
fn load_a0(at: u32, row: u32, k: u32, length: u32) -> vec4<f32> {
#ifdef VEC
    // Read anyway, so that nothing waits behind a condition.
    let inside = row < params.m && k < length;
    return select(vec4<f32>(), a0[select(0u, at, inside)], inside);
#else
    var x = vec4<f32>();
#unroll i in 0..4
#ifdef TN
    if (row + #{i}u < params.m && k < length) {
#else
    if (row < params.m && k + #{i}u < length) {
#endif
        x[#{i}] = a0[at + #{i}u];
    }
#end
    return x;
#endif
}

fn load_b0(at: u32, k: u32, col: u32, length: u32) -> Four {
#ifdef VEC
    let inside = col < params.n && k < length;
    return select(Four(), b0[select(0u, at, inside)], inside);
#else
    var x = Four();
#unroll i in 0..4
#ifdef NT
    if (col < params.n && k + #{i}u < length) {
#else
    if (col + #{i}u < params.n && k < length) {
#endif
        x[#{i}] = b0[at + #{i}u];
    }
#end
    return x;
#endif
}

fn bias_at(col: u32) -> f32 {
    if ((params.flags & ADD_BIAS) != 0u) {
        return bias[col];
    }
    return 0.0;
}

// Four neighbours of C.
fn write_out(c_first: u32, row: u32, col: u32, sums: vec4<f32>) {
    if (row >= params.m || col >= params.n) {
        return;
    }
    let at = c_first + row * params.ldc + col;
#ifdef VEC
    let shift = vec4<f32>(bias_at(col), bias_at(col + 1u), bias_at(col + 2u), bias_at(col + 3u));
    var value = sums + shift;
    if ((params.flags & ACCUMULATE) != 0u) {
        value += c[at / 4u];
    }
    c[at / 4u] = value;
#else
#unroll i in 0..4
    if (col + #{i}u < params.n) {
        var value = sums[#{i}] + bias_at(col + #{i}u);
        if ((params.flags & ACCUMULATE) != 0u) {
            value += c[at + #{i}u];
        }
        c[at + #{i}u] = value;
    }
#end
#endif
}
#endif

@compute @workgroup_size(#{THREADS})
fn product(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
) {
#ifdef EXACT
    let row = min(group.y * #{ROWS}u, params.m - #{ROWS}u);
    let col = min(group.x * #{COLS}u, params.n - #{COLS}u);
#else
    let row = group.y * #{ROWS}u;
    let col = group.x * #{COLS}u;
#endif
    let k_first = group.z * params.window;
    // Steps of DEPTH end where the sum does; the first one may begin before it (EXACT: but not before the operands, K has a
    // whole one). So the others need not look where it ends.
    let length = min(params.window, params.k - k_first);
    let steps0 = (length + DEPTH - 1u) / DEPTH;
#ifdef DIRECT
    let begin = 0u;
#else
    let begin = length - steps0 * DEPTH;
#endif
    let c_first = params.c_offset + group.z * params.m * params.ldc;
    // The largest of A, B, A2, B2, by way of the results' memory.
    var largest = vec4<u32>();
    if (params.flags >= SCALE) {
        for (var at = local; at < FOURS; at += #{THREADS}u) {
            if ((params.flags & SCALE) != 0u) {
                largest.x = most(largest_a[at]);
            }
#unroll r in 1..2*PAIRS
            if ((params.flags & (SCALE << #{r}u)) != 0u) {
                largest[#{r}] = most(largest_rest[#{r - 1}u * FOURS + at]);
            }
#end
            put_result(at * EACH, bitcast<vec4<f32>>(largest));
        }
        workgroupBarrier();
        for (var at = 0u; at < FOURS; at++) {
            largest = max(largest, bitcast<vec4<u32>>(result(at * EACH)));
        }
        workgroupBarrier();
    }
    let scale_a0 = power(power_for(largest.x));
#ifdef PLAIN_B
    let scale_b0 = 1.0;
#else
    let scale_b0 = power(power_for(largest.y));
#endif
#ifndef DIRECT
    // Sums begin with zeros that are loaded: not every backend writes a matrix of zeros.
    for (var at = local; at < #{SIDE * SIDE / 4}u; at += #{THREADS}u) {
        put_result(at * EACH, vec4<f32>());
    }
#endif
    workgroupBarrier();
#ifdef DIRECT
    let zeros = Sum();
#else
    let zeros = coopLoadT<Sum>(&results[0], #{SIDE}u / W);
#endif
    // A thread's first four of each tile: neighbours read neighbours, fours along the rows. The others are at distances
    // that are the same for all threads, and are counted off one by one: addresses of their own would cost registers.
#ifdef TN
    let a_k = local / #{ROWS / 4}u;
    let a_row = row + local % #{ROWS / 4}u * 4u;
    let a_to = a_k * A_STRIDE + local % #{ROWS / 4}u * EACH;
    let a_first0 = (params.a_offset + (k_first + a_k) * params.lda + a_row) / PER + back(begin * params.lda);
    let a_step0 = DEPTH * params.lda / PER;
    let a_apart = #{THREADS / (ROWS / 4)}u;
    let a_apart_k = a_apart;
    let a_apart_row = 0u;
#else
    let a_k = local % #{DEPTH / 4}u * 4u;
    let a_own = spread(local / #{DEPTH / 4}u);
    let a_row = row + a_own;
    let a_to = a_own * A_STRIDE + local % #{DEPTH / 4}u * EACH;
    let a_first0 = (params.a_offset + a_row * params.lda + k_first + a_k) / PER + back(begin);
    let a_step0 = DEPTH / PER;
    let a_apart = #{THREADS / (DEPTH / 4)}u;
    let a_apart_k = 0u;
    let a_apart_row = a_apart;
#endif
#ifdef NT
    let b_k = local % #{DEPTH / 4}u * 4u;
    let b_own = spread(local / #{DEPTH / 4}u);
    let b_col = col + b_own;
    let b_to = b_own * B_STRIDE + local % #{DEPTH / 4}u * EACH;
    let b_first0 = (params.b_offset + b_col * params.ldb + k_first + b_k) / PER + back(begin);
    let b_step0 = DEPTH / PER;
    let b_apart = #{THREADS / (DEPTH / 4)}u;
    let b_apart_k = 0u;
    let b_apart_col = b_apart;
#else
    let b_k = local / #{COLS / 4}u;
    let b_col = col + local % #{COLS / 4}u * 4u;
    let b_to = b_k * B_STRIDE + local % #{COLS / 4}u * EACH;
    let b_first0 = (params.b_offset + (k_first + b_k) * params.ldb + b_col) / PER + back(begin * params.ldb);
    let b_step0 = DEPTH * params.ldb / PER;
    let b_apart = #{THREADS / (COLS / 4)}u;
    let b_apart_k = b_apart;
    let b_apart_col = 0u;
#endif
#ifdef EXACT
    {
        let first = 0u;
#else
    for (var first = 0u; first < UNITS; first += subgroups) {
#endif
        let unit = first + subgroup;
        let unit_row = unit / ACROSS * #{UNIT_ROWS}u;
        let unit_col = unit % ACROSS * #{UNIT_COLS}u;
#unroll i in 0..UNIT_ROWS/SIDE
#unroll j in 0..UNIT_COLS/SIDE
        var c#{i}_#{j} = zeros;
#end
#end
#unroll p in 0..PAIRS
#if p == 0
        // What is staged next is on its way while the last is multiplied, in f16: the registers are few.
        let a_far0 = a_apart * params.lda / PER;
        let b_far0 = b_apart * params.ldb / PER;
        var a_from0 = a_first0;
        var b_from0 = b_first0;
        var a_at0 = a_from0;
        var b_at0 = b_from0;
#unroll s in 0..ROWS*DEPTH/4/THREADS
        var x0_#{s} = vec4<f16>(scale_a0 * load_a0(a_at0, a_row + #{s}u * a_apart_row, begin + a_k + #{s}u * a_apart_k, length));
        a_at0 += a_far0;
#end
#unroll s in 0..COLS*DEPTH/4/THREADS
        var y0_#{s} = taken_b0(load_b0(b_at0, begin + b_k + #{s}u * b_apart_k, b_col + #{s}u * b_apart_col, length), scale_b0);
        b_at0 += b_far0;
#end
#else
        // The second pair, in the first part of K alone. It has few steps, each loaded when it is needed: what is loaded ahead
        // would cost the first pair registers. Sums go on under its scales. These keep the first one's finite: short of
        // its own by 2^20 at most.
        let steps1 = select(0u, params.k2 / DEPTH, group.z == 0u);
        let a_far1 = a_apart * params.k2 / PER;
        let b_far1 = b_apart * params.ldb2 / PER;
        var a_from1 = (a_row * params.k2 + a_k) / PER;
        let a_step1 = DEPTH / PER;
#ifdef NT
        var b_from1 = (params.b2_offset + b_col * params.ldb2 + b_k) / PER;
        let b_step1 = DEPTH / PER;
#else
        var b_from1 = (params.b2_offset + b_k * params.ldb2 + b_col) / PER;
        let b_step1 = DEPTH * params.ldb2 / PER;
#endif
        let powers = vec2<i32>(power_for(largest.z), power_for(largest.w));
        let first_powers = power_for(largest.x) + power_for(largest.y);
        let alpha_power = i32((bitcast<u32>(params.alpha2) >> 23u) & 255u) - 127;
        let excess = max(powers.x + powers.y - alpha_power - first_powers - 20, 0);
        let power_a1 = max(powers.x - excess, -126);
        let power_b1 = max(powers.y - (excess - (powers.x - power_a1)), -126);
        let scale_a1 = power(power_a1);
        let scale_b1 = power(power_b1);
        let change = power(power_a1 + power_b1 - first_powers) / params.alpha2;
#unroll i in 0..UNIT_ROWS/SIDE
#unroll j in 0..UNIT_COLS/SIDE
        c#{i}_#{j} = c#{i}_#{j} * change;
#end
#end
#endif
        for (var step = 1u; step <= steps#{p}; step++) {
#if p == 1
#unroll s in 0..ROWS*DEPTH/4/THREADS
            let x1_#{s} = vec4<f16>(scale_a1 * a1[a_from1 + #{s}u * a_far1]);
#end
#unroll s in 0..COLS*DEPTH/4/THREADS
            let y1_#{s} = vec4<f16>(scale_b1 * b1[b_from1 + #{s}u * b_far1]);
#end
            a_from1 += a_step1;
            b_from1 += b_step1;
#endif
#unroll s in 0..ROWS*DEPTH/4/THREADS
            put_a(a_to + #{s}u * a_apart * A_STRIDE, x#{p}_#{s});
#end
#unroll s in 0..COLS*DEPTH/4/THREADS
            put_b(b_to + #{s}u * b_apart * B_STRIDE, staged_b#{p}(y#{p}_#{s}));
#end
            workgroupBarrier();
#if p == 0
            // The last step loads what it has once more.
            a_from0 += select(0u, a_step0, step < steps0);
            b_from0 += select(0u, b_step0, step < steps0);
            a_at0 = a_from0;
            b_at0 = b_from0;
#ifndef EXACT
            let here = begin + min(step, steps0 - 1u) * DEPTH;
#endif
#unroll s in 0..ROWS*DEPTH/4/THREADS
#ifdef EXACT
            x0_#{s} = vec4<f16>(scale_a0 * a0[a_at0]);
#else
            x0_#{s} = vec4<f16>(scale_a0 * load_a0(a_at0, a_row + #{s}u * a_apart_row, here + a_k + #{s}u * a_apart_k, length));
#endif
            a_at0 += a_far0;
#end
#unroll s in 0..COLS*DEPTH/4/THREADS
#ifdef EXACT
            y0_#{s} = taken_b0(b0[b_at0], scale_b0);
#else
            y0_#{s} = taken_b0(load_b0(b_at0, here + b_k + #{s}u * b_apart_k, b_col + #{s}u * b_apart_col, length), scale_b0);
#endif
            b_at0 += b_far0;
#end
#endif
#ifndef EXACT
            // Once, or not at all: a loop, because matrices may not be used under a condition.
            for (var mine = unit; mine < UNITS; mine += UNITS) {
#endif
#unroll s in 0..DEPTH/SIDE
#unroll i in 0..UNIT_ROWS/SIDE
#ifdef TN
                let a#{p}_#{s}_#{i} = coopLoad<Left>(&tile_a[#{s * SIDE}u * A_STRIDE + (unit_row + #{i * SIDE}u) / W], A_STRIDE);
#else
                let a#{p}_#{s}_#{i} = coopLoadT<Left>(&tile_a[(unit_row + #{i * SIDE}u) * A_STRIDE + #{s * SIDE}u / W], A_STRIDE);
#endif
#end
#unroll j in 0..UNIT_COLS/SIDE
#ifdef NT
                let b#{p}_#{s}_#{j} = coopLoad<Right>(&tile_b[(unit_col + #{j * SIDE}u) * B_STRIDE + #{s * SIDE}u / W], B_STRIDE);
#else
                let b#{p}_#{s}_#{j} = coopLoadT<Right>(&tile_b[#{s * SIDE}u * B_STRIDE + (unit_col + #{j * SIDE}u) / W], B_STRIDE);
#endif
#unroll i in 0..UNIT_ROWS/SIDE
                c#{i}_#{j} = coopMultiplyAdd(a#{p}_#{s}_#{i}, b#{p}_#{s}_#{j}, c#{i}_#{j});
#end
#end
#end
#ifndef EXACT
            }
#endif
            workgroupBarrier();
        }
#end
        let unscale_a = inverse(scale_a#{PAIRS - 1});
        let unscale_b = inverse(scale_b#{PAIRS - 1});
#if PAIRS == 2
        let weight = params.alpha2;
#else
        let weight = params.alpha;
#endif
#ifdef DIRECT
        let c_stride = params.ldc / 4u;
        let c_at = (c_first + (row + unit_row) * params.ldc + col + unit_col) / 4u;
#unroll i in 0..UNIT_ROWS/SIDE
#unroll j in 0..UNIT_COLS/SIDE
        let c_at#{i}_#{j} = c_at + #{i * SIDE}u * c_stride + #{j * SIDE / 4}u;
        c#{i}_#{j} = c#{i}_#{j} * unscale_a;
        c#{i}_#{j} = c#{i}_#{j} * unscale_b;
        c#{i}_#{j} = c#{i}_#{j} * weight;
#end
#end
        for (var adds = params.flags & ACCUMULATE; adds != 0u; adds = 0u) {
#unroll i in 0..UNIT_ROWS/SIDE
#unroll j in 0..UNIT_COLS/SIDE
            c#{i}_#{j} = c#{i}_#{j} + coopLoadT<Sum>(&c[c_at#{i}_#{j}], c_stride);
#end
#end
        }
#unroll i in 0..UNIT_ROWS/SIDE
#unroll j in 0..UNIT_COLS/SIDE
        coopStoreT(c#{i}_#{j}, &c[c_at#{i}_#{j}], c_stride);
#end
#end
#else
        // Out by way of workgroup memory, OUT matrices side by side of each subgroup at a time.
        let ready = min(subgroups, UNITS - first);
#unroll i in 0..UNIT_ROWS/SIDE
#unroll j in 0..UNIT_COLS/SIDE/OUT
#ifndef EXACT
        for (var mine = unit; mine < UNITS; mine += UNITS) {
#endif
#unroll o in 0..OUT
            coopStoreT(c#{i}_#{j * OUT + o}, &results[subgroup * OUT_FOURS * EACH + #{o * SIDE}u / W], OUT_STRIDE);
#end
#ifndef EXACT
        }
#endif
        workgroupBarrier();
        for (var at = local; at < ready * OUT_FOURS; at += #{THREADS}u) {
            let its = at / OUT_FOURS;
            let c_row = row + (first + its) / ACROSS * #{UNIT_ROWS}u + #{i * SIDE}u + at % OUT_FOURS / OUT_ACROSS;
            let c_col = col + (first + its) % ACROSS * #{UNIT_COLS}u + #{j * OUT * SIDE}u + at % OUT_ACROSS * 4u;
#ifdef EXACT
            // What is before this tile's own rows and columns, the tile before writes.
            if (c_row >= group.y * #{ROWS}u && c_col >= group.x * #{COLS}u) {
                write_out(c_first, c_row, c_col, result(at * EACH) * unscale_a * unscale_b * weight);
            }
#else
            write_out(c_first, c_row, c_col, result(at * EACH) * unscale_a * unscale_b * weight);
#endif
        }
        workgroupBarrier();
#end
#end
#endif
    }
}

#kernel largest
// Of each workgroup's elements the largest size, as bits: of floats without sign these order as numbers do.
@group(0) @binding(0) var<storage, read_write> a: array<f32>; // [m]
@group(0) @binding(1) var<storage, read_write> parts: array<u32>; // [PARTS]

var<workgroup> most: atomic<u32>;

@compute @workgroup_size(256)
fn largest(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    if (local == 0u) {
        atomicStore(&most, 0u);
    }
    workgroupBarrier();
    var own = 0u;
    for (var at = group.x * 256u + local; at < params.m; at += PARTS * 256u) {
        own = max(own, bitcast<u32>(a[at]) & 0x7fffffffu);
    }
    atomicMax(&most, own);
    workgroupBarrier();
    if (local == 0u) {
        parts[group.x] = atomicLoad(&most);
    }
}
