// What the updates of AdamW share: their parameters, the clip factor, and where updated weights go: `parameter`, with
// COPY a copy of it in 16 bits beside it, with STOCHASTIC bfloat16 alone, rounded up or down at random so that the mean
// is the exact value.
#import index

struct Params {
    count: u32, // of vec4s, or of blocks
    learning_rate: f32,
    beta1: f32,
    beta2: f32,
    epsilon: f32,
    decay: f32, // 1 - learning_rate * weight_decay
    correction1: f32, // 1 - beta1^t
    correction2: f32, // sqrt(1 - beta2^t)
    max_norm: f32, // 0: no clipping
    gradient_scale: f32, // what the gradients are multiplied with first: 1 / the loss scale
    copy_first: u32, // in vec4s: where the bound part of the copy begins
    absmax_first: u32, // in blocks: where the bound part of the absmax begins
    seed: u32,
    step: u32,
    first: u32, // the first vec4's place among all weights
}
#params

// By its bits: a fast-math compiler may take it that no value is infinite.
fn is_finite(x: f32) -> bool {
    return (bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u;
}

// What gradients are multiplied with, for the sum of their squares as they are.
fn gradient_factor(square_sum: f32) -> f32 {
    var factor = params.gradient_scale;
    if (params.max_norm > 0.0) {
        factor *= min(1.0, params.max_norm / (sqrt(square_sum) * params.gradient_scale + 1.0e-6));
    }
    return factor;
}

#ifdef STOCHASTIC
#import philox

fn widen_four(words: vec2<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(vec4<u32>(words.x << 16u, words.x & 0xffff0000u, words.y << 16u, words.y & 0xffff0000u));
}

fn narrow_four(x: vec4<f32>, i: u32) -> vec2<u32> {
    let random = philox(vec4<u32>(params.first + i, params.step, 0u, 1u), vec2<u32>(params.seed, 0u));
    let bits = bitcast<vec4<u32>>(x);
    let finite = (bits & vec4<u32>(0x7f800000u)) != vec4<u32>(0x7f800000u);
    let half = (bits + select(vec4<u32>(0u), random & vec4<u32>(0xffffu), finite)) >> vec4<u32>(16u);
    return vec2<u32>(half.x | (half.y << 16u), half.z | (half.w << 16u));
}
#endif
#ifdef COPY
#import narrow

fn narrow_four(x: vec4<f32>) -> vec2<u32> {
    let bits = bitcast<vec4<u32>>(x);
    return vec2<u32>(narrow(bits.x) | (narrow(bits.y) << 16u), narrow(bits.z) | (narrow(bits.w) << 16u));
}
#endif
