// C[M, N] = alpha * A[M, K] W[N, K]^T (+ bias[N]) (+ C) in NT, C[M, K] = alpha * A[M, N] W[N, K] (+ C) else, for one W
// in four bits (shared/nf4.wgsl): f32 accumulation in a fixed order. Rows of W are whole words: K is a multiple of 8.
#import nf4

struct Params {
    m: u32,
    n: u32, // columns of C
    k: u32, // summed over
    row: u32, // elements of a row of W
    lda: u32,
    ldc: u32,
    a_offset: u32,
    w_offset: u32, // elements of W before the first, in the bindings of codes and of factors
    c_offset: u32,
    flags: u32, // ADD_BIAS, ACCUMULATE
    alpha: f32,
    bias_offset: u32,
    window: u32, // by_lane alone: rows of W in one uniform
    before: u32, // by_lane alone: four bits for each window, how many vectors of codes precede its first row
}
#params

const ADD_BIAS: u32 = 1u;
const ACCUMULATE: u32 = 2u;

#kernel by_lane
// NT for devices that run on the host's processor, as matmul.by_lane: a lane owns a row of W and ROWS rows of C's
// column; codes and factors are bound as uniforms, A is read at the same address by all lanes. K is a multiple of 32.
@group(0) @binding(0) var<storage, read_write> c: array<f32>; // [M, N]
@group(0) @binding(1) var<uniform> bias: array<vec4<f32>, 4096>; // [N]
@group(0) @binding(2) var<uniform> a: array<vec4<f32>, 4096>; // rows of [M, K]
@group(0) @binding(3) var<uniform> factors: array<vec4<f32>, 4096>; // of all windows
#unroll w in 0..WINDOWS
@group(0) @binding(#{4 + w}) var<uniform> w#{w}: array<vec4<u32>, 4096>; // rows of [N, K]
#end

@compute @workgroup_size(#{THREADS})
fn by_lane(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let row = group.y * #{ROWS}u;
    let in_window = group.x * #{THREADS}u + local;
    let col = group.z * params.window + in_window;
    let last = min(params.window, params.n - group.z * params.window) - 1u;
    let own = min(in_window, last);
    let quads = params.k / 32u; // vectors of a row
    let wj = ((params.before >> (4u * group.z)) & 15u) + own * quads;
    let fj = params.w_offset + (group.z * params.window + own) * params.k;
#unroll i in 0..ROWS
    let ai#{i} = (params.a_offset + min(row + #{i}u, params.m - 1u) * params.lda) / 4u;
    var sum#{i} = 0.0;
#end
#unroll w in 0..WINDOWS
    if (group.z == #{w}u) {
        for (var quad = 0u; quad < quads; quad++) {
            var words = w#{w}[wj + quad];
            let block = (fj + 32u * quad) / BLOCK_OF_CODES;
            let factor = factors[block / 4u][block % 4u];
#unroll i in 0..ROWS
#unroll c in 0..CHAINS
            var part#{i}_#{c} = 0.0;
#end
#end
            for (var at = 8u * quad; at < 8u * quad + 8u; at += 2u) {
                let word = words.x;
                words = words.yzwx;
#unroll s in 0..8
                let y#{s} = value_of((word >> #{4 * s + 4 - 8 * (s % 2)}u) & 15u);
#end
#unroll i in 0..ROWS
                let x#{i}_0 = a[ai#{i} + at];
                let x#{i}_1 = a[ai#{i} + at + 1u];
#unroll s in 0..8
                part#{i}_#{s % CHAINS} = fma(x#{i}_#{s / 4}[#{s % 4}], y#{s}, part#{i}_#{s % CHAINS});
#end
#end
            }
#unroll i in 0..ROWS
#unroll c in 1..CHAINS
            part#{i}_0 += part#{i}_#{c};
#end
            sum#{i} = fma(factor, part#{i}_0, sum#{i});
#end
        }
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
        var value = fma(params.alpha, sum#{i}, shifted);
        if ((params.flags & ACCUMULATE) != 0u) {
            value += c[at];
        }
        c[at] = value;
    }
#end
}

#kernel tiled
// As matmul.tiled: a workgroup owns a TILE x TILE part of C and stages DEPTH of what is summed of both operands. Eight
// neighbours of W, a word, are decoded on their way by one thread.
@group(0) @binding(0) var<storage, read_write> a: array<f32>; // [M, K] in NT, else [M, N]
@group(0) @binding(1) var<storage, read_write> w: array<u32>; // rows of [N, K], eight to a word
@group(0) @binding(2) var<storage, read_write> factors: array<f32>; // their blocks'
@group(0) @binding(3) var<storage, read_write> bias: array<f32>; // [N]
@group(0) @binding(4) var<storage, read_write> c: array<f32>;

#import tile

fn bias_at(col: u32) -> f32 {
    return bias[params.bias_offset + col];
}
var<workgroup> table: array<f32, 16>;

fn load_a(row: u32, k: u32) -> f32 {
    if (row >= params.m || k >= params.k) {
        return 0.0;
    }
    return a[params.a_offset + row * params.lda + k];
}

@compute @workgroup_size(#{TILE / BLOCK * (TILE / BLOCK)})
fn tiled(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let row = group.y * #{TILE}u;
    let col = group.x * #{TILE}u;
    let my_row = (local / SIDE) * #{BLOCK}u;
    let my_col = (local % SIDE) * #{BLOCK}u;
    if (local < 16u) {
        table[local] = value_of(local);
    }
    workgroupBarrier();
#unroll i in 0..BLOCK
#unroll j in 0..BLOCK/4
    var c#{i}_#{j} = vec4<f32>(0.0);
#end
#end
    for (var depth = 0u; depth < params.k; depth += #{DEPTH}u) {
        for (var at = local; at < #{DEPTH * TILE / 4}u; at += THREADS) {
            let ka = at % #{DEPTH}u;
            let ra = at / #{DEPTH}u;
            let ra4 = row + ra * 4u;
            let da = depth + ka;
            tile_a[ka * STRIDE + ra] = vec4<f32>(load_a(ra4, da), load_a(ra4 + 1u, da), load_a(ra4 + 2u, da), load_a(ra4 + 3u, da));
        }
        for (var at = local; at < #{DEPTH * TILE / 8}u; at += THREADS) {
            // Where a word lies: along K in NT, else along the columns of C.
#ifdef NT
            let along = at % #{DEPTH / 8}u;
            let across = at / #{DEPTH / 8}u;
            let w_row = col + across;
            let w_col = depth + 8u * along;
            let inside = w_row < params.n && w_col < params.k;
#else
            let along = at % #{TILE / 8}u;
            let across = at / #{TILE / 8}u;
            let w_row = depth + across;
            let w_col = col + 8u * along;
            let inside = w_row < params.k && w_col < params.n;
#endif
            var word = 0u;
            var factor = 0.0; // makes zeros of what is outside
            if (inside) {
                let element = params.w_offset + w_row * params.row + w_col;
                word = w[element / 8u];
                factor = factors[element / BLOCK_OF_CODES];
            }
#unroll s in 0..8
            let y#{s} = factor * table[(word >> #{4 * s + 4 - 8 * (s % 2)}u) & 15u];
#end
#ifdef NT
#unroll s in 0..8
            tile_b[(8u * along + #{s}u) * STRIDE + across / 4u][across % 4u] = y#{s};
#end
#else
            tile_b[across * STRIDE + 2u * along] = vec4<f32>(y0, y1, y2, y3);
            tile_b[across * STRIDE + 2u * along + 1u] = vec4<f32>(y4, y5, y6, y7);
#endif
        }
        workgroupBarrier();
#import tile_product
        workgroupBarrier();
    }
    let c_first = params.c_offset;
#import tile_write
}

#kernel rows
// NT with few rows of A: a workgroup owns COLS rows of W, for which its threads read A once, and run along the words of them,
// TURNS at a time. Values come from workgroup memory, where sixteen never meet in one bank; a factor is multiplied with what
// eight of them sum.
@group(0) @binding(0) var<storage, read_write> a: array<vec4<f32>>; // [M, K]
@group(0) @binding(1) var<storage, read_write> w: array<u32>; // rows of [N, K], eight to a word
@group(0) @binding(2) var<storage, read_write> factors: array<f32>; // their blocks'
@group(0) @binding(3) var<storage, read_write> bias: array<f32>; // [N]
@group(0) @binding(4) var<storage, read_write> c: array<f32>; // [M, N]

var<workgroup> values: array<f32, 16>;
var<workgroup> partial: array<f32, #{COLS * ROWS * THREADS}>;

fn first_four(word: u32) -> vec4<f32> {
    return vec4<f32>(
        values[(word >> 4u) & 15u],
        values[word & 15u],
        values[(word >> 12u) & 15u],
        values[(word >> 8u) & 15u],
    );
}

@compute @workgroup_size(#{THREADS})
fn rows(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let row = group.y * #{ROWS}u;
    let col = (group.x + group.z * 32768u) * #{COLS}u;
    if (local < 16u) {
        values[local] = value_of(local);
    }
    workgroupBarrier();
#unroll i in 0..ROWS
    let a_at#{i} = (params.a_offset + min(row + #{i}u, params.m - 1u) * params.lda) / 4u;
#end
#unroll r in 0..COLS
    let weight#{r} = params.w_offset + min(col + #{r}u, params.n - 1u) * params.row;
#unroll i in 0..ROWS
    var sum#{r}_#{i} = 0.0;
#end
#end
    var k = 8u * local;
#unroll t in 0..2
    // Several at a time, then the rest one by one.
    for (; k + #{(1 - t) * (TURNS - 1) * 8 * THREADS}u < params.k; k += #{(t + (1 - t) * TURNS) * 8 * THREADS}u) {
#unroll q in 0..t + (1 - t) * TURNS
#unroll r in 0..COLS
        let word#{q}_#{r} = w[(weight#{r} + k + #{q * 8 * THREADS}u) / 8u];
        let factor#{q}_#{r} = factors[(weight#{r} + k + #{q * 8 * THREADS}u) / BLOCK_OF_CODES];
#end
#end
#unroll q in 0..t + (1 - t) * TURNS
#unroll i in 0..ROWS
        let x#{q}_#{i} = a[a_at#{i} + k / 4u + #{q * 2 * THREADS}u];
        let z#{q}_#{i} = a[a_at#{i} + k / 4u + #{q * 2 * THREADS + 1}u];
#end
#unroll r in 0..COLS
        let y#{q}_#{r} = first_four(word#{q}_#{r});
        let v#{q}_#{r} = first_four(word#{q}_#{r} >> 16u);
#unroll i in 0..ROWS
        sum#{r}_#{i} = fma(factor#{q}_#{r}, dot(x#{q}_#{i}, y#{q}_#{r}) + dot(z#{q}_#{i}, v#{q}_#{r}), sum#{r}_#{i});
#end
#end
#end
    }
#end
#unroll r in 0..COLS
#unroll i in 0..ROWS
    partial[#{(r * ROWS + i) * THREADS}u + local] = sum#{r}_#{i};
#end
#end
    workgroupBarrier();
    for (var width = #{THREADS / 2}u; width > 0u; width /= 2u) {
        if (local < width) {
#unroll s in 0..COLS*ROWS
            partial[#{s * THREADS}u + local] += partial[#{s * THREADS}u + local + width];
#end
        }
        workgroupBarrier();
    }
    let own_row = row + local % #{ROWS}u;
    let own_col = col + local / #{ROWS}u;
    if (local < #{COLS * ROWS}u && own_row < params.m && own_col < params.n) {
        let at = params.c_offset + own_row * params.ldc + own_col;
        var value = params.alpha * partial[local * #{THREADS}u];
        if ((params.flags & ADD_BIAS) != 0u) {
            value += bias[params.bias_offset + own_col];
        }
        if ((params.flags & ACCUMULATE) != 0u) {
            value += c[at];
        }
        c[at] = value;
    }
}
