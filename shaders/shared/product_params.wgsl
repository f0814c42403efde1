    // What every product of two dense operands is told: src/ops/matmul.rs, `launch`.
    m: u32, // cooperative.largest: elements
    n: u32,
    k: u32,
    lda: u32,
    ldb: u32,
    ldc: u32,
    a_offset: u32,
    b_offset: u32,
    c_offset: u32,
    flags: u32, // ADD_BIAS, ACCUMULATE
    alpha: f32,
    bias_offset: u32,
    window: u32, // rows in one uniform; columns of A staged at a time; what a part of K has
