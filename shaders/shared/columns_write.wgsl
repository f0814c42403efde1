// The end of a product whose thread owns ROWS x COLS of C from (row, col) on, columns THREADS apart, of which those from
// `first_col` on are to be written: alpha, bias, and what C holds. A loop over an array, since as many branches written out
// take seconds to compile.
    var block: array<f32, #{ROWS * COLS}>;
#unroll j in 0..COLS
#unroll i in 0..ROWS
    block[#{i * COLS + j}] = c#{i}_#{j};
#end
    let at_col#{j} = col + #{j * THREADS}u;
    let in_c#{j} = at_col#{j} >= first_col && at_col#{j} < params.n;
    var shift#{j} = 0.0;
    if (in_c#{j} && (params.flags & ADD_BIAS) != 0u) {
        shift#{j} = bias[params.bias_offset + at_col#{j}];
    }
#end
    for (var i = 0u; i < #{ROWS}u; i++) {
        let at_row = row + i;
        if (at_row < params.m) {
            let c_row = params.c_offset + at_row * params.ldc;
#unroll j in 0..COLS
            if (in_c#{j}) {
                var value = fma(params.alpha, block[i * #{COLS}u + #{j}u], shift#{j});
                if ((params.flags & ACCUMULATE) != 0u) {
                    value += c[c_row + at_col#{j}];
                }
                c[c_row + at_col#{j}] = value;
            }
#end
        }
    }
