// The end of a product whose thread owns ROWS x COLS of C, columns THREADS apart: alpha, bias, and what C holds.
#unroll j in 0..COLS
    {
        let at_col = col + #{j * THREADS}u;
        if (at_col < params.n) {
            var shift = 0.0;
            if ((params.flags & ADD_BIAS) != 0u) {
                shift = bias_at(at_col);
            }
#unroll i in 0..ROWS
            if (row + #{i}u < params.m) {
                let at = params.c_offset + (row + #{i}u) * params.ldc + at_col;
                var value = fma(params.alpha, c#{i}_#{j}, shift);
                if ((params.flags & ACCUMULATE) != 0u) {
                    value += c[at];
                }
                c[at] = value;
            }
#end
        }
    }
#end
