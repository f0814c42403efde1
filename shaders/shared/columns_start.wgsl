// A thread's columns of B, THREADS apart, from an element of which the next one along K is b_step away; and its block of C.
// The last workgroup begins before its first column where N ends inside, so that columns lie at fixed distances. Where N is
// less than a workgroup's, what lies beyond is read in vain.
    let first_col = group.x * #{COLS * THREADS}u;
    let col = local + min(first_col, max(params.n, #{COLS * THREADS}u) - #{COLS * THREADS}u);
#ifdef NT
    let b_step = 1u;
    let b_at0 = params.b_offset + col * params.ldb;
#unroll j in 1..COLS
    let b_at#{j} = b_at#{j - 1} + #{THREADS}u * params.ldb;
#end
#else
    let b_step = params.ldb;
#unroll j in 0..COLS
    let b_at#{j} = params.b_offset + col + #{j * THREADS}u;
#end
#endif
#unroll i in 0..ROWS
#unroll j in 0..COLS
    var c#{i}_#{j} = 0.0;
#end
#end
