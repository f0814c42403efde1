// What products by columns have beside A and C. PACKED: B in 16 bits.
@group(0) @binding(1) var<storage, read_write> bias: array<f32>; // [N]
#ifdef PACKED
#import packed
@group(0) @binding(2) var<storage, read_write> b: array<u32>; // [K, N], or [N, K] in NT, packed
#else
@group(0) @binding(2) var<storage, read_write> b: array<f32>; // [K, N], or [N, K] in NT
#endif

fn load_b(at: u32) -> f32 {
#ifdef PACKED
    return widen_one(b[at / 2u], at);
#else
    return b[at];
#endif
}
