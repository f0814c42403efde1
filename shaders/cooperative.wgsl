// C[M, N] = alpha * op(A) op(B) (+ bias[N]) (+ C) by cooperative matrices: operands rounded to f16, sums in f32 in a fixed
// order. Layouts, leading dimensions and offsets as in matmul.wgsl. PACKED: B is in f16.
//
// SCALED: A, a gradient, is multiplied by the power of two that brings its largest element to 2^14 and beyond, short of
// 2^15, before it is rounded, and the sums are divided by it: neither do large ones overflow nor small ones vanish.
#ifdef SIDE
enable f16;
enable wgpu_cooperative_matrix;
#endif

struct Params {
#import product_params
}
#params

const ADD_BIAS: u32 = 1u;
const ACCUMULATE: u32 = 2u;
const PARTS: u32 = 256u; // workgroups of `largest`

var<workgroup> most: array<atomic<u32>, 4>; // one is used; whole vec4s keep what lies behind it aligned

#kernel product
// A workgroup owns ROWS x COLS of C and stages DEPTH of what is summed of both operands, in rows padded by 8 (against
// bank conflicts; columns begin at multiples of 16 bytes). A subgroup computes a unit of it, UNIT_ROWS x UNIT_COLS, in
// matrices of SIDE x SIDE. There is a text for the usual number of lanes, but any number works: subgroups without a
// unit only help to stage, and where there are fewer subgroups than units, all is done again for the rest. K may be summed in
// parts, as by matmul.tiled.
#ifdef VEC
@group(0) @binding(0) var<storage, read_write> a: array<vec4<f32>>; // [M, K], or [K, M] in TN
#else
@group(0) @binding(0) var<storage, read_write> a: array<f32>; // [M, K], or [K, M] in TN
#endif
#ifdef PACKED
alias Element = f16;
#else
alias Element = f32;
#endif
#ifdef VEC
@group(0) @binding(1) var<storage, read_write> b: array<vec4<Element>>; // [K, N], or [N, K] in NT
#else
@group(0) @binding(1) var<storage, read_write> b: array<Element>; // [K, N], or [N, K] in NT
#endif
@group(0) @binding(2) var<storage, read_write> bias: array<f32>; // [N]
@group(0) @binding(3) var<storage, read_write> c: array<f32>; // [M, N]
#ifdef SCALED
@group(0) @binding(4) var<storage, read_write> largest: array<u32>; // [PARTS], bits of |x|
#endif

const DEPTH: u32 = #{DEPTH}u;
const ACROSS: u32 = #{COLS / UNIT_COLS}u; // units side by side
const UNITS: u32 = #{ROWS / UNIT_ROWS * (COLS / UNIT_COLS)}u;
const CELLS: u32 = #{OUT * SIDE * SIDE}u; // that a subgroup hands out at a time

#ifdef TN
const A_STRIDE: u32 = #{ROWS + 8}u;
var<workgroup> tile_a: array<f16, #{DEPTH * (ROWS + 8)}>; // [DEPTH, ROWS + 8]
#else
const A_STRIDE: u32 = #{DEPTH + 8}u;
var<workgroup> tile_a: array<f16, #{ROWS * (DEPTH + 8)}>; // [ROWS, DEPTH + 8]
#endif
#ifdef NT
const B_STRIDE: u32 = #{DEPTH + 8}u;
var<workgroup> tile_b: array<f16, #{COLS * (DEPTH + 8)}>; // [COLS, DEPTH + 8]
#else
const B_STRIDE: u32 = #{COLS + 8}u;
var<workgroup> tile_b: array<f16, #{DEPTH * (COLS + 8)}>; // [DEPTH, COLS + 8]
#endif
var<workgroup> results: array<f32, #{ROWS / UNIT_ROWS * (COLS / UNIT_COLS) * OUT * SIDE * SIDE}>; // [UNITS, SIDE, OUT * SIDE]

alias Left = coop_mat#{SIDE}x#{SIDE}<f16, A>;
alias Right = coop_mat#{SIDE}x#{SIDE}<f16, B>;
alias Sum = coop_mat#{SIDE}x#{SIDE}<f32, C>;

// Operands come in fours of neighbours in storage, zeros where the matrix ends: of A those at (row, k) and on along K, in
// TN along M; of B at (k, col) and on along N, in NT along K. VEC: these lie in storage as whole vectors.
fn load_a(row: u32, k: u32) -> vec4<f32> {
    var x = vec4<f32>();
#ifdef TN
    let at = params.a_offset + k * params.lda + row;
#else
    let at = params.a_offset + row * params.lda + k;
#endif
    if (row < params.m && k < params.k) {
#ifdef VEC
        x = a[at / 4u];
#else
        x.x = a[at];
#unroll i in 1..4
#ifdef TN
        if (row + #{i}u < params.m) {
#else
        if (k + #{i}u < params.k) {
#endif
            x[#{i}] = a[at + #{i}u];
        }
#end
#endif
    }
    return x;
}

fn load_b(k: u32, col: u32) -> vec4<Element> {
    var x = vec4<Element>();
#ifdef NT
    let at = params.b_offset + col * params.ldb + k;
#else
    let at = params.b_offset + k * params.ldb + col;
#endif
    if (col < params.n && k < params.k) {
#ifdef VEC
        x = b[at / 4u];
#else
#unroll i in 0..4
#ifdef NT
        if (k + #{i}u < params.k) {
#else
        if (col + #{i}u < params.n) {
#endif
            x[#{i}] = b[at + #{i}u];
        }
#end
#endif
    }
    return x;
}

@compute @workgroup_size(#{THREADS})
fn product(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
) {
    let row = group.y * #{ROWS}u;
    let col = group.x * #{COLS}u;
    let k_first = group.z * params.window;
    let c_first = params.c_offset + group.z * params.m * params.ldc;
    // Sums begin with zeros that are loaded: not every backend writes a matrix of zeros.
    for (var at = local; at < CELLS; at += #{THREADS}u) {
        results[at] = 0.0;
    }
    var scale = 1.0;
    var unscale = 1.0;
#ifdef SCALED
    if (local == 0u) {
        atomicStore(&most[0], 0u);
    }
    workgroupBarrier();
    for (var part = local; part < PARTS; part += #{THREADS}u) {
        atomicMax(&most[0], largest[part]);
    }
    workgroupBarrier();
    let exponent = atomicLoad(&most[0]) >> 23u;
    if (exponent < 255u) { // else something is infinite, and shall stay so
        let kept = max(exponent, 15u);
        scale = bitcast<f32>((268u - kept) << 23u);
        unscale = bitcast<f32>((kept - 14u) << 23u);
    }
#else
    workgroupBarrier();
#endif
    let zeros = coopLoadT<Sum>(&results[0], #{SIDE}u);
    for (var first = 0u; first < UNITS; first += subgroups) {
        let unit = first + subgroup;
        let unit_row = unit / ACROSS * #{UNIT_ROWS}u;
        let unit_col = unit % ACROSS * #{UNIT_COLS}u;
#unroll i in 0..UNIT_ROWS/SIDE
#unroll j in 0..UNIT_COLS/SIDE
        var c#{i}_#{j} = zeros;
#end
#end
        // What is staged next is on its way while the last is multiplied: neighbours read neighbours, fours along the rows.
#unroll s in 0..ROWS*DEPTH/4/THREADS
        let a_at#{s} = local + #{s * THREADS}u;
#ifdef TN
        let a_row#{s} = a_at#{s} % #{ROWS / 4}u * 4u;
        let a_k#{s} = a_at#{s} / #{ROWS / 4}u;
        let a_to#{s} = a_k#{s} * A_STRIDE + a_row#{s};
#else
        let a_row#{s} = a_at#{s} / #{DEPTH / 4}u;
        let a_k#{s} = a_at#{s} % #{DEPTH / 4}u * 4u;
        let a_to#{s} = a_row#{s} * A_STRIDE + a_k#{s};
#endif
        var x#{s} = load_a(row + a_row#{s}, k_first + a_k#{s});
#end
#unroll s in 0..COLS*DEPTH/4/THREADS
        let b_at#{s} = local + #{s * THREADS}u;
#ifdef NT
        let b_col#{s} = b_at#{s} / #{DEPTH / 4}u;
        let b_k#{s} = b_at#{s} % #{DEPTH / 4}u * 4u;
        let b_to#{s} = b_col#{s} * B_STRIDE + b_k#{s};
#else
        let b_col#{s} = b_at#{s} % #{COLS / 4}u * 4u;
        let b_k#{s} = b_at#{s} / #{COLS / 4}u;
        let b_to#{s} = b_k#{s} * B_STRIDE + b_col#{s};
#endif
        var y#{s} = load_b(k_first + b_k#{s}, col + b_col#{s});
#end
        for (var depth = k_first; depth < min(k_first + params.window, params.k); depth += DEPTH) {
#unroll s in 0..ROWS*DEPTH/4/THREADS
            let a_half#{s} = vec4<f16>(x#{s} * scale);
#unroll i in 0..4
            tile_a[a_to#{s} + #{i}u] = a_half#{s}[#{i}];
#end
#end
#unroll s in 0..COLS*DEPTH/4/THREADS
            let b_half#{s} = vec4<f16>(y#{s});
#unroll i in 0..4
            tile_b[b_to#{s} + #{i}u] = b_half#{s}[#{i}];
#end
#end
            workgroupBarrier();
#unroll s in 0..ROWS*DEPTH/4/THREADS
            x#{s} = load_a(row + a_row#{s}, depth + DEPTH + a_k#{s});
#end
#unroll s in 0..COLS*DEPTH/4/THREADS
            y#{s} = load_b(depth + DEPTH + b_k#{s}, col + b_col#{s});
#end
            // Once, or not at all: a loop, because matrices may not be used under a condition.
            for (var mine = unit; mine < UNITS; mine += UNITS) {
                for (var k = 0u; k < DEPTH; k += #{STEPS * SIDE}u) {
#unroll s in 0..STEPS
#unroll i in 0..UNIT_ROWS/SIDE
#ifdef TN
                    let a#{s}_#{i} = coopLoad<Left>(&tile_a[(k + #{s * SIDE}u) * A_STRIDE + unit_row + #{i * SIDE}u], A_STRIDE);
#else
                    let a#{s}_#{i} = coopLoadT<Left>(&tile_a[(unit_row + #{i * SIDE}u) * A_STRIDE + k + #{s * SIDE}u], A_STRIDE);
#endif
#end
#unroll j in 0..UNIT_COLS/SIDE
#ifdef NT
                    let b#{s}_#{j} = coopLoad<Right>(&tile_b[(unit_col + #{j * SIDE}u) * B_STRIDE + k + #{s * SIDE}u], B_STRIDE);
#else
                    let b#{s}_#{j} = coopLoadT<Right>(&tile_b[(k + #{s * SIDE}u) * B_STRIDE + unit_col + #{j * SIDE}u], B_STRIDE);
#endif
#unroll i in 0..UNIT_ROWS/SIDE
                    c#{i}_#{j} = coopMultiplyAdd(a#{s}_#{i}, b#{s}_#{j}, c#{i}_#{j});
#end
#end
#end
                }
            }
            workgroupBarrier();
        }
        // Out by way of workgroup memory, OUT matrices side by side of each subgroup at a time.
        let ready = min(subgroups, UNITS - first);
#unroll i in 0..UNIT_ROWS/SIDE
#unroll j in 0..UNIT_COLS/SIDE/OUT
        for (var mine = unit; mine < UNITS; mine += UNITS) {
#unroll o in 0..OUT
            coopStoreT(c#{i}_#{j * OUT + o}, &results[subgroup * CELLS + #{o * SIDE}u], #{OUT * SIDE}u);
#end
        }
        workgroupBarrier();
        for (var at = local; at < ready * CELLS; at += #{THREADS}u) {
            let its = first + at / CELLS;
            let at_row = row + its / ACROSS * #{UNIT_ROWS}u + #{i * SIDE}u + at % CELLS / #{OUT * SIDE}u;
            let at_col = col + its % ACROSS * #{UNIT_COLS}u + #{j * OUT * SIDE}u + at % #{OUT * SIDE}u;
            if (at_row < params.m && at_col < params.n) {
                var shift = 0.0;
                if ((params.flags & ADD_BIAS) != 0u) {
                    shift = bias[at_col];
                }
                let to = c_first + at_row * params.ldc + at_col;
                var value = fma(params.alpha, results[at] * unscale, shift);
                if ((params.flags & ACCUMULATE) != 0u) {
                    value += c[to];
                }
                c[to] = value;
            }
        }
        workgroupBarrier();
#end
#end
    }
}

#kernel largest
// Of each workgroup's elements the largest size, as bits: of floats without sign these order as numbers do.
@group(0) @binding(0) var<storage, read_write> a: array<f32>; // [m]
@group(0) @binding(1) var<storage, read_write> parts: array<u32>; // [PARTS]

@compute @workgroup_size(256)
fn largest(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    if (local == 0u) {
        atomicStore(&most[0], 0u);
    }
    workgroupBarrier();
    var own = 0u;
    for (var at = group.x * 256u + local; at < params.m; at += PARTS * 256u) {
        own = max(own, bitcast<u32>(a[at]) & 0x7fffffffu);
    }
    atomicMax(&most[0], own);
    workgroupBarrier();
    if (local == 0u) {
        parts[group.x] = atomicLoad(&most[0]);
    }
}
