// Bits of an f32 to 16 bits, rounded to nearest, ties to even: with TO_F16 IEEE's, else bfloat16. By integers: no float
// register can round, flush or quiet what is only moved.

#ifdef TO_F16
fn narrow(bits: u32) -> u32 {
    let sign = (bits >> 16u) & 0x8000u;
    let size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) {
        return sign | 0x7e00u | ((size >> 13u) & 0x3ffu); // NaN stays NaN
    }
    if (size >= 0x477ff000u) {
        return sign | 0x7c00u; // 65520 and more: infinity
    }
    if (size >= 0x38800000u) {
        let rebased = size - 0x38000000u;
        return sign | ((rebased + 0xfffu + ((rebased >> 13u) & 1u)) >> 13u);
    }
    if (size <= 0x33000000u) {
        return sign; // half of the smallest subnormal, and less
    }
    // A subnormal, in units of 2^-24.
    let shift = 126u - (size >> 23u);
    let mantissa = (size & 0x7fffffu) | 0x800000u;
    return sign | ((mantissa + (1u << (shift - 1u)) - 1u + ((mantissa >> shift) & 1u)) >> shift);
}
#else
fn narrow(bits: u32) -> u32 {
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (bits >> 16u) | 0x40u; // NaN stays NaN
    }
    return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
}
#endif
