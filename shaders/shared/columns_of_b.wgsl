    // A thread's columns of B, from an element of which the next one along K is b_step away.
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
