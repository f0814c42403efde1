    // What a thread stages: where it reads (what is beyond the last row is read from the last), which step of K that is,
    // and where it goes.
#unroll s in 0..DEPTH*BLOCK*BLOCK/TILE/4
#ifdef TN
    let k_of_a#{s} = local / ACROSS + #{s}u * (THREADS / ACROSS);
    var from_a#{s} = (params.a_offset + (k_first + k_of_a#{s}) * params.lda + min(row + local % ACROSS * 4u, params.m - 4u)) / 4u;
    let to_a#{s} = k_of_a#{s} * ACROSS + local % ACROSS;
#else
    let row_of_a#{s} = local / ALONG + #{s}u * (THREADS / ALONG);
    let k_of_a#{s} = local % ALONG * 4u;
    var from_a#{s} = (params.a_offset + min(row + row_of_a#{s}, params.m - 1u) * params.lda + k_first + k_of_a#{s}) / 4u;
    let to_a#{s} = k_of_a#{s} * ACROSS + ((row_of_a#{s} / 4u) ^ (local % ALONG * 2u));
#endif
#ifdef NT
    let col_of_b#{s} = local / ALONG + #{s}u * (THREADS / ALONG);
    let k_of_b#{s} = local % ALONG * 4u;
    var from_b#{s} = (params.b_offset + min(col + col_of_b#{s}, params.n - 1u) * params.ldb + k_first + k_of_b#{s}) / 4u;
    let to_b#{s} = k_of_b#{s} * ACROSS + ((col_of_b#{s} / 4u) ^ (local % ALONG * 2u));
#else
    let k_of_b#{s} = local / ACROSS + #{s}u * (THREADS / ACROSS);
    var from_b#{s} = (params.b_offset + (k_first + k_of_b#{s}) * params.ldb + min(col + local % ACROSS * 4u, params.n - 4u)) / 4u;
    let to_b#{s} = k_of_b#{s} * ACROSS + local % ACROSS;
#endif
#end
#ifdef TN
    let step_a = #{DEPTH / 4}u * params.lda;
#else
    let step_a = ALONG;
#endif
#ifdef NT
    let step_b = ALONG;
#else
    let step_b = #{DEPTH / 4}u * params.ldb;
#endif
