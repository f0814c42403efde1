    // The thread's c into C, which begins at c_first; bias_at tells the bias of a column.
#unroll j in 0..BLOCK
    if (col + my_col + #{j}u < params.n) {
        let at_col = col + my_col + #{j}u;
        var shift = 0.0;
        if ((params.flags & ADD_BIAS) != 0u) {
            shift = bias_at(at_col);
        }
#unroll i in 0..BLOCK
        if (row + my_row + #{i}u < params.m) {
            let at = c_first + (row + my_row + #{i}u) * params.ldc + at_col;
            var value = fma(params.alpha, c#{i}_#{j / 4}[#{j % 4}], shift);
            if ((params.flags & ACCUMULATE) != 0u) {
                value += c[at];
            }
            c[at] = value;
        }
#end
    }
#end
