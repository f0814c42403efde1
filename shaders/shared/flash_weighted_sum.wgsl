        // acc += weights * rows of the block's keys, staged CHUNK at a time; summed_at reads what is summed.
        for (var chunk = 0u; chunk < 32u && block + chunk < end; chunk += #{CHUNK}u) {
#unroll i in 0..4
            {
                let at = lane + #{i * 64}u;
                let key = min(block + chunk + at / #{COLS * 8}u, params.keys - 1u);
                let e = at % #{COLS * 8}u * 4u;
                let source = (key * params.kv_heads + kv_head) * size;
                stage[at] = vec4<f32>(
                    select(0.0, summed_at(source + min(e, size - 1u)), e < size),
                    select(0.0, summed_at(source + min(e + 1u, size - 1u)), e + 1u < size),
                    select(0.0, summed_at(source + min(e + 2u, size - 1u)), e + 2u < size),
                    select(0.0, summed_at(source + min(e + 3u, size - 1u)), e + 3u < size),
                );
            }
#end
            workgroupBarrier();
            for (var j = 0u; j < #{CHUNK}u; j++) {
                let w = weights[(chunk + j) * 9u + ty];
#unroll c in 0..COLS
                {
                    let x = stage[j * #{COLS * 8}u + #{c * 8}u + tx];
#unroll r in 0..4
                    acc#{r}_#{c} = fma(vec4<f32>(w[#{r}]), x, acc#{r}_#{c});
#end
                }
#end
            }
            workgroupBarrier();
        }
