        // A subgroup's unit. HELD: its rows lie in matrices from now on, else they are loaded again for every block. Its sums
        // do always.
        let unit = done + subgroup;
        let unit_row = min(unit, UNITS - 1u) / ACROSS * #{UNIT_ROWS}u;
        let across = unit % ACROSS;
        let scores_at = unit_row * SCORES_STRIDE + across * #{KEYS / ACROSS / W}u;
        let tile_at = across * #{KEYS / ACROSS}u * TILE_STRIDE;
        let unit_at = own_at + unit_row * own_stride;
#ifdef HELD
#unroll n in 0..SCORES
#unroll i in 0..UNIT_ROWS/SIDE
#unroll e in 0..E/SIDE
        let own#{n}_#{i}_#{e} = coopLoadT<Left>(&own[unit_at + #{n}u * own_second + #{i * SIDE}u * own_stride + #{e * SIDE / W}u], own_stride);
#end
#end
#end
#endif
#unroll n in 0..OUTPUTS
#unroll i in 0..UNIT_ROWS/SIDE
#unroll c in 0..E/ACROSS/SIDE
        var sum#{n}_#{i}_#{c} = zeros;
#end
#end
#end
