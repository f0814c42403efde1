// Operands in storage, for kernels whose threads own columns.
#import storage_operands

fn load_b(at: u32) -> f32 {
#ifdef PACKED
    return widen_one(b[at / 2u], at);
#else
    return b[at];
#endif
}
