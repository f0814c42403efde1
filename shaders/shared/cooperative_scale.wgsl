// Powers of two that bring an operand near the end of f16's range.

fn most(x: vec4<u32>) -> u32 {
    return max(max(x.x, x.y), max(x.z, x.w));
}

// What an operand with this largest element is multiplied with, as a power of two: none where it is not scaled, where all
// of it is zero, and where something is infinite, and shall stay so.
fn power_for(largest: u32) -> i32 {
    let exponent = largest >> 23u;
    return select(141 - i32(max(exponent, 15u)), 0, largest == 0u || exponent == 255u);
}

fn power(of_two: i32) -> f32 {
    return bitcast<f32>(u32(clamp(of_two, -126, 127) + 127) << 23u);
}

// Of a power of two.
fn inverse(scale: f32) -> f32 {
    return bitcast<f32>(0x7f000000u - bitcast<u32>(scale));
}
