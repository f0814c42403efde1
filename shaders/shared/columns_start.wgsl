// A thread's columns, THREADS apart, and its block of C. The last workgroup begins before its first column where N ends
// inside, so that columns lie at fixed distances. Where N is less than a workgroup's, what lies beyond is read in vain.
    let first_col = group.x * #{COLS * THREADS}u;
    let col = local + min(first_col, max(params.n, #{COLS * THREADS}u) - #{COLS * THREADS}u);
#unroll i in 0..ROWS
#unroll j in 0..COLS
    var c#{i}_#{j} = 0.0;
#end
#end
