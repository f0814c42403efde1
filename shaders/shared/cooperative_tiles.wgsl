// What a workgroup of cooperative.product stages and hands out, and how four neighbours get in and out.

// Tiles and results lie in elements of W numbers: fours, so that four neighbours are stored at once; or SCALAR, for Metal, which
// loads matrices from scalars only. Strides count elements too.
#ifdef SCALAR
const W: u32 = 1u;
alias Halves = f16;
alias Floats = f32;
#else
const W: u32 = 4u;
alias Halves = vec4<f16>;
alias Floats = vec4<f32>;
#endif
// Elements that four neighbours are.
const EACH: u32 = 4u / W;
#ifdef TN
const A_STRIDE: u32 = #{ROWS + 8}u / W;
var<workgroup> tile_a: array<Halves, DEPTH * A_STRIDE>; // [DEPTH, ROWS + 8]
#else
const A_STRIDE: u32 = #{DEPTH + 8}u / W;
var<workgroup> tile_a: array<Halves, #{ROWS}u * A_STRIDE>; // [ROWS, DEPTH + 8]
#endif
#ifdef NT
const B_STRIDE: u32 = #{DEPTH + 8}u / W;
var<workgroup> tile_b: array<Halves, #{COLS}u * B_STRIDE>; // [COLS, DEPTH + 8]
#else
const B_STRIDE: u32 = #{COLS + 8}u / W;
var<workgroup> tile_b: array<Halves, DEPTH * B_STRIDE>; // [DEPTH, COLS + 8]
#endif
#ifdef DIRECT
var<workgroup> results: array<Floats, PARTS / W>;
#else
// What a subgroup hands out at a time, SIDE x OUT * SIDE. Memory is dear here: with 4 KiB of it the large tile has as many
// neighbours on a core as without, with 16 bytes more, or 10 KiB in all, half of them. So what else needs some has this.
const OUT_STRIDE: u32 = #{OUT * SIDE}u / W;
const OUT_FOURS: u32 = #{OUT * SIDE * SIDE / 4}u;
const OUT_ACROSS: u32 = #{OUT * SIDE / 4}u; // fours side by side
var<workgroup> results: array<Floats, UNITS * OUT_FOURS * EACH>; // [UNITS, SIDE, OUT * SIDE]
#endif

// Four neighbours from element `at` on.
fn put_a(at: u32, x: vec4<f16>) {
#ifdef SCALAR
#unroll i in 0..4
    tile_a[at + #{i}u] = x[#{i}];
#end
#else
    tile_a[at] = x;
#endif
}

fn put_b(at: u32, x: vec4<f16>) {
#ifdef SCALAR
#unroll i in 0..4
    tile_b[at + #{i}u] = x[#{i}];
#end
#else
    tile_b[at] = x;
#endif
}

fn put_result(at: u32, x: vec4<f32>) {
#ifdef SCALAR
#unroll i in 0..4
    results[at + #{i}u] = x[#{i}];
#end
#else
    results[at] = x;
#endif
}

fn result(at: u32) -> vec4<f32> {
#ifdef SCALAR
    return vec4<f32>(results[at], results[at + 1u], results[at + 2u], results[at + 3u]);
#else
    return results[at];
#endif
}
