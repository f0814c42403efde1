// The operands of a product in storage. PACKED: B in 16 bits.
@group(0) @binding(0) var<storage, read_write> a: array<f32>; // [M, K], or [K, M] in TN
#ifdef PACKED
#import packed
@group(0) @binding(1) var<storage, read_write> b: array<u32>; // [K, N], or [N, K] in NT, packed
#else
@group(0) @binding(1) var<storage, read_write> b: array<f32>; // [K, N], or [N, K] in NT
#endif
@group(0) @binding(2) var<storage, read_write> bias: array<f32>; // [N]
@group(0) @binding(3) var<storage, read_write> c: array<f32>; // [M, N]

fn bias_at(col: u32) -> f32 {
    return bias[col];
}
