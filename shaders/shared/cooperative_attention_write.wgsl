        // Out by way of workgroup memory, as many columns at a time as there are scores in a row.
        let out_stride = own_heads * params.head_size;
        let out_at = own_row * out_stride + group.y * params.head_size;
#unroll n in 0..OUTPUTS
#unroll p in 0..E/KEYS
        for (var mine = unit; mine < UNITS; mine += UNITS) {
#unroll i in 0..UNIT_ROWS/SIDE
#unroll j in 0..KEYS/ACROSS/SIDE
            coopStoreT(sum#{n}_#{i}_#{p * (KEYS / ACROSS / SIDE) + j}, &scores0[scores_at + #{(i * SIDE * (KEYS + PAD) + j * SIDE) / W}u], SCORES_STRIDE);
#end
#end
        }
        workgroupBarrier();
        for (var at = lane; at < ROWS * KEYS; at += #{THREADS}u) {
            let r = at / KEYS;
            let c = at % KEYS;
            let e = c / #{KEYS / ACROSS}u * #{E / ACROSS}u + c % #{KEYS / ACROSS}u + #{p * (KEYS / ACROSS)}u;
            // Of the units that had a subgroup.
            let is_done = r / #{UNIT_ROWS}u * ACROSS - done < subgroups;
            if (is_done && own_row + r < own_rows && e < params.head_size) {
                give#{n}(r, out_at + r * out_stride + e, one_of_scores0(r * #{KEYS + PAD}u + c), factor#{n});
            }
        }
        workgroupBarrier();
#end
#end
