    // The thread's c into C, which begins at c_first.
#unroll j in 0..BLOCK/4
    let col#{j} = col + (my_col + #{j * TILE / BLOCK}u) * 4u;
    if (col#{j} < params.n) {
        var shift = vec4<f32>(0.0);
        if ((params.flags & ADD_BIAS) != 0u) {
            shift = bias[col#{j} / 4u];
        }
#unroll i in 0..BLOCK
        let row#{i} = row + (my_row + #{i / 4 * TILE / BLOCK}u) * 4u + #{i % 4}u;
        if (row#{i} < params.m) {
            let at = (c_first + row#{i} * params.ldc + col#{j}) / 4u;
            var value = fma(vec4<f32>(params.alpha), c#{i}_#{j}, shift);
            if ((params.flags & ACCUMULATE) != 0u) {
                value += c[at];
            }
            c[at] = value;
        }
#end
    }
#end
