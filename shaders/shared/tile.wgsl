// A TILE x TILE part of C, owned by a workgroup that stages DEPTH of what is summed of both operands; a thread has
// BLOCK x BLOCK of it.
const STRIDE: u32 = #{(TILE + 4) / 4}u; // of a staged row, in vec4s
const SIDE: u32 = #{TILE / BLOCK}u; // threads along one side of the tile
const THREADS: u32 = SIDE * SIDE;

var<workgroup> tile_a: array<vec4<f32>, #{DEPTH * (TILE + 4) / 4}>; // [DEPTH, TILE + 4]
var<workgroup> tile_b: array<vec4<f32>, #{DEPTH * (TILE + 4) / 4}>; // [DEPTH, TILE + 4]
