// What forward and backward of cooperative_attention share.
struct Params {
    queries: u32, // T
    keys: u32, // S
    heads: u32, // H
    kv_heads: u32, // K
    head_size: u32,
    scale: f32,
    queries_room: u32, // rows of what is packed: T or S, and zeros behind
    keys_room: u32,
}
#params

const LOG2_E: f32 = 1.4426950408889634;
const ROWS: u32 = #{ROWS}u;
const KEYS: u32 = #{KEYS}u;
const ACROSS: u32 = #{ACROSS}u;
const UNITS: u32 = #{ROWS / UNIT_ROWS * ACROSS}u;
const TILE_STRIDE: u32 = #{(E + 8) / W}u; // in elements of what matrices are loaded from
const SCORES_STRIDE: u32 = #{(KEYS + PAD) / W}u;
const WEIGHTS_STRIDE: u32 = #{(KEYS + 8) / W}u;

alias Left = coop_mat#{SIDE}x#{SIDE}<f16, A>;
alias Right = coop_mat#{SIDE}x#{SIDE}<f16, B>;
alias Sum = coop_mat#{SIDE}x#{SIDE}<f32, C>;
#if W == 4
alias Half = vec4<f16>;
alias Single = vec4<f32>;
#else
alias Half = f16;
alias Single = f32;
#endif

var<workgroup> span: vec4<u32>;
var<workgroup> tile0: array<Half, #{KEYS * (E + 8) / W}>; // [KEYS, E + 8]
var<workgroup> tile1: array<Half, #{KEYS * (E + 8) / W}>; // [KEYS, E + 8]
#unroll n in 0..SCORES
var<workgroup> scores#{n}: array<Single, #{ROWS * (KEYS + PAD) / W}>; // [ROWS, KEYS + PAD]
#end
#unroll n in 0..OUTPUTS
var<workgroup> weights#{n}: array<Half, #{ROWS * (KEYS + 8) / W}>; // [ROWS, KEYS + 8]
#end

// Four neighbours, from or to an element of such an array.
#unroll n in 0..2
fn put#{n}(at: u32, x: vec4<f16>) {
#if W == 4
    tile#{n}[at] = x;
#else
#unroll c in 0..4
    tile#{n}[at + #{c}u] = x[#{c}];
#end
#endif
}

#end
#unroll n in 0..OUTPUTS
fn weigh#{n}(at: u32, x: vec4<f16>) {
#if W == 4
    weights#{n}[at] = x;
#else
#unroll c in 0..4
    weights#{n}[at + #{c}u] = x[#{c}];
#end
#endif
}

#end
#unroll n in 0..SCORES
fn score#{n}(at: u32) -> vec4<f32> {
#if W == 4
    return scores#{n}[at];
#else
    return vec4<f32>(scores#{n}[at], scores#{n}[at + 1u], scores#{n}[at + 2u], scores#{n}[at + 3u]);
#endif
}

#end
fn put_score0(at: u32, x: vec4<f32>) {
#if W == 4
    scores0[at] = x;
#else
#unroll c in 0..4
    scores0[at + #{c}u] = x[#{c}];
#end
#endif
}

// One number, by its place among all.
fn one_of_scores0(at: u32) -> f32 {
#if W == 4
    return scores0[at / 4u][at % 4u];
#else
    return scores0[at];
#endif
}

// Which of four rows in a row from `at` on lie in the range.
fn sees(range: vec2<u32>, at: u32) -> vec4<bool> {
    return vec4<u32>(at, at + 1u, at + 2u, at + 3u) - range.x < vec4<u32>(range.y - range.x);
}
