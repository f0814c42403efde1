// What matmul.rows reads and writes: A, each W, bias where there is one W, each C.
#ifdef PACKED
#import packed
#endif
#ifdef VEC
@group(0) @binding(0) var<storage, read_write> a: array<vec4<f32>>; // [M, K]
#else
@group(0) @binding(0) var<storage, read_write> a: array<f32>; // [M, K]
#endif
#unroll w in 0..WEIGHTS
#ifdef VEC
#ifdef PACKED
@group(0) @binding(#{1 + w}) var<storage, read_write> b#{w}: array<vec4<u32>>; // [N_w, K], packed
#else
@group(0) @binding(#{1 + w}) var<storage, read_write> b#{w}: array<vec4<f32>>; // [N_w, K]
#endif
#else
#ifdef PACKED
@group(0) @binding(#{1 + w}) var<storage, read_write> b#{w}: array<u32>; // [N_w, K], packed
#else
@group(0) @binding(#{1 + w}) var<storage, read_write> b#{w}: array<f32>; // [N_w, K]
#endif
#endif
#end
#if WEIGHTS == 1
@group(0) @binding(2) var<storage, read_write> bias: array<f32>; // [N]
@group(0) @binding(3) var<storage, read_write> c0: array<f32>; // [M, N]
#else
#unroll w in 0..WEIGHTS - SUMS + 1
@group(0) @binding(#{1 + WEIGHTS + w}) var<storage, read_write> c#{w}: array<f32>; // [M, N_w]
#end
#endif
