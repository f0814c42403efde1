// Weights in four bits, as src/quant has them: from floats, and back. FP4: the other table.
#ifdef HALF
enable f16;
#endif
#import index

struct Params {
    count: u32,
    x_offset: u32, // see the kernels
    y_offset: u32,
    factor_offset: u32,
    offset: f32, // of factors in eight bits
    zero: u32, // 0
}
#params

#kernel factors
// y[i] = map[code] * absmax[i / 256] + offset, rounded after each, as a host does it. A word of codes a thread.
@group(0) @binding(0) var<storage, read_write> codes: array<u32>; // four to a word
@group(0) @binding(1) var<storage, read_write> absmax: array<f32>; // from x_offset (in factors) on
@group(0) @binding(2) var<storage, read_write> map: array<f32>; // [256]
@group(0) @binding(3) var<storage, read_write> y: array<vec4<f32>>; // [blocks]

@compute @workgroup_size(64)
fn factors(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = linear_thread(group, groups, local);
    if (4u * i >= params.count) {
        return;
    }
    let word = codes[i];
    let nested = vec4<f32>(map[word & 255u], map[(word >> 8u) & 255u], map[(word >> 16u) & 255u], map[word >> 24u]);
    let scaled = nested * absmax[(params.x_offset + 4u * i) / 256u];
    // No compiler knows that this is the same number, and makes one fused operation of the two.
    y[i] = bitcast<vec4<f32>>(bitcast<vec4<u32>>(scaled) ^ vec4<u32>(params.zero)) + params.offset;
}

#kernel dequantize
// One word a thread. x_offset, factor_offset: how many elements the bindings begin before the first; y_offset likewise.
#import nf4
@group(0) @binding(0) var<storage, read_write> x: array<u32>; // eight codes to a word
@group(0) @binding(1) var<storage, read_write> factors: array<f32>; // [blocks]
#ifdef VEC
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>; // [count]
#else
@group(0) @binding(2) var<storage, read_write> y: array<f32>; // [count]
#endif

@compute @workgroup_size(64)
fn dequantize(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = linear_thread(group, groups, local);
    let first = 8u * i; // of the words' elements
    let skipped = params.x_offset % 8u;
    if (first >= params.count + skipped) {
        return;
    }
    let word = x[params.x_offset / 8u + i];
#ifdef VEC
    let factor = factors[(params.factor_offset + first) / BLOCK_OF_CODES];
    let to = (params.y_offset + first) / 4u;
    y[to] = factor * vec4<f32>(value_of((word >> 4u) & 15u), value_of(word & 15u), value_of((word >> 12u) & 15u), value_of((word >> 8u) & 15u));
    y[to + 1u] = factor * vec4<f32>(value_of((word >> 20u) & 15u), value_of((word >> 16u) & 15u), value_of(word >> 28u), value_of((word >> 24u) & 15u));
#else
    // A word lies in one block.
    let factor = factors[(params.factor_offset - skipped + first) / BLOCK_OF_CODES];
    for (var place = 0u; place < 8u; place++) {
        let at = first + place - skipped; // wraps before the first
        if (at < params.count) {
            y[params.y_offset + at] = factor * value_of(code_at(word, place));
        }
    }
#endif
}

#kernel decode
// The same for GPUs, where all offsets and the count are multiples of 8: half a word at a time, four times a thread, so
// that neighbours write beside each other; values from workgroup memory, where sixteen never meet in one bank. HALF: to
// f16.
#import nf4
@group(0) @binding(0) var<storage, read_write> x: array<u32>; // eight codes to a word
@group(0) @binding(1) var<storage, read_write> factors: array<f32>; // [blocks]
#ifdef HALF
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f16>>; // [count]
#else
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>; // [count]
#endif
var<workgroup> values: array<f32, 16>;

@compute @workgroup_size(64)
fn decode(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = first_of_four(group, groups, local);
#unroll e in 0..4
    let half#{e} = x[params.x_offset / 8u + (i + #{e * 64}u) / 2u] >> (16u * (local & 1u));
    let factor#{e} = factors[(params.factor_offset + 4u * (i + #{e * 64}u)) / BLOCK_OF_CODES];
#end
    if (local < 16u) {
        values[local] = value_of(local);
    }
    workgroupBarrier();
#unroll e in 0..4
    if (i + #{e * 64}u < params.count / 4u) {
        let value = factor#{e} * vec4<f32>(
            values[(half#{e} >> 4u) & 15u],
            values[half#{e} & 15u],
            values[(half#{e} >> 12u) & 15u],
            values[(half#{e} >> 8u) & 15u],
        );
#ifdef HALF
        y[params.y_offset / 4u + i + #{e * 64}u] = vec4<f16>(value);
#else
        y[params.y_offset / 4u + i + #{e * 64}u] = value;
#endif
    }
#end
}

#kernel quantize
// One block a thread: 64 elements of x, eight words of codes, one factor. All that decides is done so that no denormal
// number appears: devices may take those for zero. A value and the factor are split into mantissas in [1, 2) and
// exponents; the reciprocal's rounding is set right by integers, because devices need not round a division.
@group(0) @binding(0) var<storage, read_write> x: array<u32>; // bits of f32, or 16-bit, from x_offset (in elements) on
@group(0) @binding(1) var<storage, read_write> codes: array<u32>; // [blocks, 8]
@group(0) @binding(2) var<storage, read_write> absmax: array<u32>; // [blocks], bits

#ifdef PACKED
#import packed
// The size of an element, as bits of f32 without sign, and its sign in the top bit.
fn load(at: u32) -> u32 {
#ifdef F16
    return bitcast<u32>(widen_one(x[at / 2u], at));
#else
    return (x[at / 2u] << (16u - 16u * (at & 1u))) & 0xffff0000u;
#endif
}
#else
fn load(at: u32) -> u32 {
    return x[at];
}
#endif

const LEAST: u32 = 0x006ce3eeu; // 1e-38, the least divisor

// The biased exponent of a number, as if denormal ones had all their bits: size = mantissa * 2^(exponent - 127).
fn exponent_of(size: u32) -> i32 {
    if (size >= 0x00800000u) {
        return i32(size >> 23u);
    }
    return i32(firstLeadingBit(size)) - 22;
}

// The 24 bits of its mantissa.
fn mantissa_of(size: u32) -> u32 {
    if (size >= 0x00800000u) {
        return (size & 0x7fffffu) | 0x800000u;
    }
    return size << (23u - firstLeadingBit(size));
}

// Bounds of codes from the lowest value to the highest, and the codes in that order.
#ifdef FP4
const BOUNDS = array<f32, 15>(-0.8333334, -0.5833334, -0.4166667, -0.29166669, -0.20833334, -0.0859375, -0.0026041667, 0.0,
    0.0026041667, 0.0859375, 0.20833334, 0.29166669, 0.4166667, 0.5833334, 0.8333334);
// Four bits each: 11 10 13 12 15 14 9 0, 8 1 6 7 4 5 2 3.
const ORDER_LOW: u32 = 0x09efcdabu;
const ORDER_HIGH: u32 = 0x32547618u;
#else
const BOUNDS = array<f32, 15>(-0.84809637, -0.6106329, -0.45999527, -0.33967942, -0.2346074, -0.13791174, -0.045525018,
    0.03979015, 0.12025525, 0.20352125, 0.29201376, 0.38931254, 0.50166345, 0.6427869, 0.86147845);
const ORDER_LOW: u32 = 0x76543210u;
const ORDER_HIGH: u32 = 0xfedcba98u;
#endif

@compute @workgroup_size(64)
fn quantize(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let block = linear_thread(group, groups, local);
    if (block >= params.count) {
        return;
    }
    let first = params.x_offset + 64u * block;
    var largest = 0u;
    for (var i = 0u; i < 64u; i++) {
        largest = max(largest, load(first + i) & 0x7fffffffu);
    }
    absmax[block] = largest;

    // 1 / factor = inverse * 2^(127 - scale), inverse in (0.5, 1].
    let divisor = max(largest, LEAST);
    let scale = exponent_of(divisor);
    let m = mantissa_of(divisor);
    var inverse = 1.0;
    if (m != 0x800000u) {
        // r = round(2^47 / m), 24 bits of it: what the device says, and the rest.
        let near = clamp(1.0 / bitcast<f32>((m & 0x7fffffu) | 0x3f800000u), 0.5, 0.99999994);
        var r = (bitcast<u32>(near) & 0x7fffffu) | 0x800000u;
        var rest = bitcast<i32>(0u - r * m); // of 2^47, whose low word is 0
        for (var i = 0u; i < 4u; i++) {
            if (2 * rest > i32(m)) {
                r += 1u;
                rest -= i32(m);
            } else if (2 * rest < -i32(m)) {
                r -= 1u;
                rest += i32(m);
            }
        }
        // The reciprocal of a very large factor is denormal on a host, with one or two bits less.
        if (scale >= 253) {
            let lost = u32(scale - 252);
            let cut = r & ((1u << lost) - 1u);
            let half = 1u << (lost - 1u);
            r >>= lost;
            if (cut > half || (cut == half && rest > 0)) {
                r += 1u;
            }
            r <<= lost;
        }
        inverse = f32(r) * 0x1p-24f;
    }

    for (var word_index = 0u; word_index < 8u; word_index++) {
        var word = 0u;
        for (var place = 0u; place < 8u; place++) {
            let bits = load(first + 8u * word_index + place);
            let size = bits & 0x7fffffffu;
            var scaled = 0.0;
            if (size > 0x7f800000u || largest >= 0x7f800000u) {
                // Not a number, or infinite: above every bound, but for finite values over an infinite factor.
                scaled = select(2.0, 0.0, size < 0x7f800000u && largest == 0x7f800000u);
            } else if (size != 0u) {
                let below = scale - exponent_of(size);
                let product = bitcast<f32>((mantissa_of(size) & 0x7fffffu) | 0x3f800000u) * inverse;
                if (below < 100) {
                    scaled = product * bitcast<f32>(u32(127 - below) << 23u);
                } else if (below < 150 || (below == 150 && product > 1.0)) {
                    scaled = 0x1p-100f; // above zero, and no more matters
                }
                scaled = select(min(scaled, 1.0), -min(scaled, 1.0), (bits >> 31u) != 0u);
            }
            var rank = 0u;
#unroll i in 0..15
            rank += select(0u, 1u, scaled > BOUNDS[#{i}]);
#end
            let code = (select(ORDER_LOW, ORDER_HIGH, rank >= 8u) >> (4u * (rank % 8u))) & 15u;
            word |= code << ((4u * place) ^ 4u);
        }
        codes[8u * block + word_index] = word;
    }
}
