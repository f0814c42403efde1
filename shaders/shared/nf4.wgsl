// Codes of four bits, eight to a word: of two in a byte the first is in the high half. A factor goes with 64 of them.

const BLOCK_OF_CODES: u32 = 64u; // codes of a factor

// The code at a place (0 to 7) of a word.
fn code_at(word: u32, place: u32) -> u32 {
    return (word >> ((4u * place) ^ 4u)) & 15u;
}

// What a code stands for, times its factor. By its bits, because a table costs a load for each.
fn value_of(code: u32) -> f32 {
    let b0 = (code & 1u) != 0u;
    let b1 = (code & 2u) != 0u;
    let b2 = (code & 4u) != 0u;
#ifdef FP4
    let low = select(select(0.0, 0.0052083335, b0), select(0.6666667, 1.0, b0), b1);
    let high = select(select(0.33333334, 0.5, b0), select(0.16666667, 0.25, b0), b1);
    return bitcast<f32>(bitcast<u32>(select(low, high, b2)) | ((code & 8u) << 28u));
#else
    let b3 = (code & 8u) != 0u;
    let v0 = select(select(-1.0, -0.6961928, b0), select(-0.52507305, -0.3949175, b0), b1);
    let v1 = select(select(-0.28444138, -0.18477343, b0), select(-0.091050036, 0.0, b0), b1);
    let v2 = select(select(0.0795803, 0.1609302, b0), select(0.2461123, 0.33791524, b0), b1);
    let v3 = select(select(0.44070983, 0.562617, b0), select(0.72295684, 1.0, b0), b1);
    return select(select(v0, v1, b2), select(v2, v3, b2), b3);
#endif
}
