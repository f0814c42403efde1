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

#ifdef UNPACK
// For drivers that are known to keep subnormals.
fn widen_upper(words: vec4<u32>) -> vec4<f32> {
    return vec4<f32>(
        unpack2x16float(words.x).y,
        unpack2x16float(words.y).y,
        unpack2x16float(words.z).y,
        unpack2x16float(words.w).y,
    );
}
#else
// The halves in the upper parts of words. Exponents are moved so that infinity stays what it is, and multiplied back;
// below 2^-14, the smallest normal number, that reads a leading one that is not there. Nothing is subnormal on the way.
fn widen_upper(words: vec4<u32>) -> vec4<f32> {
    let moved = bitcast<vec4<u32>>(bitcast<vec4<i32>>(words) >> vec4<u32>(3u)) & vec4<u32>(0x8fffe000u);
    let value = bitcast<vec4<f32>>(moved | vec4<u32>(0x70000000u)) * 0x1p-112f;
    let edge = bitcast<vec4<f32>>((words & vec4<u32>(0x80000000u)) | vec4<u32>(0x38800000u));
    return select(value, value + value - edge, abs(value) < vec4<f32>(0x1p-14f));
}
#endif
#else
fn widen(word: u32) -> vec2<f32> {
    return bitcast<vec2<f32>>(vec2<u32>(word << 16u, word & 0xffff0000u));
}

// The half of a word that the element at `at` is.
fn widen_one(word: u32, at: u32) -> f32 {
    return bitcast<f32>((word << (16u - 16u * (at & 1u))) & 0xffff0000u);
}

fn widen_upper(words: vec4<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(words & vec4<u32>(0xffff0000u));
}
#endif

// Of eight elements in a row, those at even places, and those at odd ones.
fn widen_even(words: vec4<u32>) -> vec4<f32> {
    return widen_upper(words << vec4<u32>(16u));
}

fn widen_odd(words: vec4<u32>) -> vec4<f32> {
    return widen_upper(words);
}

// Four elements in a row.
fn widen_four(words: vec2<u32>) -> vec4<f32> {
    return widen_upper(vec4<u32>(words.x << 16u, words.x, words.y << 16u, words.y));
}
