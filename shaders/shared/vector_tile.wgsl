// What a workgroup of matmul.tiled reads, writes and stages: a TILE x TILE part of C, of operands that lie as whole vec4s.
@group(0) @binding(0) var<storage, read_write> a: array<vec4<f32>>; // [M, K], or [K, M] in TN
#ifdef PACKED
#import packed
@group(0) @binding(1) var<storage, read_write> b: array<vec2<u32>>; // [K, N], or [N, K] in NT, packed
#else
@group(0) @binding(1) var<storage, read_write> b: array<vec4<f32>>; // [K, N], or [N, K] in NT
#endif
@group(0) @binding(2) var<storage, read_write> bias: array<vec4<f32>>; // [N]
@group(0) @binding(3) var<storage, read_write> c: array<vec4<f32>>; // [M, N]

const THREADS: u32 = #{TILE / BLOCK * (TILE / BLOCK)}u;
const ALONG: u32 = #{DEPTH / 4}u; // vec4s of a staged part along K
const ACROSS: u32 = #{TILE / 4}u; // and along the tile

var<workgroup> tile_a: array<vec4<f32>, #{BUFFERS * DEPTH * TILE / 4}>; // [BUFFERS, DEPTH, TILE]
var<workgroup> tile_b: array<vec4<f32>, #{BUFFERS * DEPTH * TILE / 4}>; // [BUFFERS, DEPTH, TILE]
