// Two 16-bit floats in a word, the first in the low half: with F16 IEEE's, else bfloat16, the upper half of an f32.

#ifdef F16
// By integers, because not every driver has unpack2x16float, and some flush subnormals in it.
fn widen(word: u32) -> vec2<f32> {
    let half = vec2<u32>(word & 0xffffu, word >> 16u);
    let size = half & vec2<u32>(0x7fffu);
    let normal = (size << vec2<u32>(13u)) + select(vec2<u32>(0x38000000u), vec2<u32>(0x70000000u), size >= vec2<u32>(0x7c00u));
    let subnormal = bitcast<vec2<u32>>(vec2<f32>(size) * 0x1p-24f);
    let sign = (half & vec2<u32>(0x8000u)) << vec2<u32>(16u);
    return bitcast<vec2<f32>>(sign | select(normal, subnormal, size < vec2<u32>(0x400u)));
}

// The half of a word that the element at `at` is.
fn widen_one(word: u32, at: u32) -> f32 {
    return widen(word >> (16u * (at & 1u))).x;
}

// Of eight elements in a row, those at even places, and those at odd ones.
fn widen_even(words: vec4<u32>) -> vec4<f32> {
    return vec4<f32>(widen(words.x).x, widen(words.y).x, widen(words.z).x, widen(words.w).x);
}

fn widen_odd(words: vec4<u32>) -> vec4<f32> {
    return vec4<f32>(widen(words.x).y, widen(words.y).y, widen(words.z).y, widen(words.w).y);
}
#else
fn widen(word: u32) -> vec2<f32> {
    return bitcast<vec2<f32>>(vec2<u32>(word << 16u, word & 0xffff0000u));
}

// The half of a word that the element at `at` is.
fn widen_one(word: u32, at: u32) -> f32 {
    return bitcast<f32>((word << (16u - 16u * (at & 1u))) & 0xffff0000u);
}

// Of eight elements in a row, those at even places, and those at odd ones.
fn widen_even(words: vec4<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(words << vec4<u32>(16u));
}

fn widen_odd(words: vec4<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(words & vec4<u32>(0xffff0000u));
}
#endif
