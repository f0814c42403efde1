#unroll n in 0..SCORES
#unroll i in 0..UNIT_ROWS/SIDE
#unroll j in 0..KEYS/ACROSS/SIDE
                var c#{n}_#{i}_#{j} = zeros;
#end
#end
#ifdef HELD
#unroll e in 0..E/SIDE
#unroll j in 0..KEYS/ACROSS/SIDE
                let b#{n}_#{e}_#{j} = coopLoad<Right>(&tile#{n}[tile_at + #{(j * SIDE * (E + 8) + e * SIDE) / W}u], TILE_STRIDE);
#unroll i in 0..UNIT_ROWS/SIDE
                c#{n}_#{i}_#{j} = coopMultiplyAdd(own#{n}_#{i}_#{e}, b#{n}_#{e}_#{j}, c#{n}_#{i}_#{j});
#end
#end
#end
#else
                for (var e = 0u; e < #{E / W}u; e += #{SIDE / W}u) {
#unroll i in 0..UNIT_ROWS/SIDE
                    let a#{n}_#{i} = coopLoadT<Left>(&own[unit_at + #{n}u * own_second + #{i * SIDE}u * own_stride + e], own_stride);
#end
#unroll j in 0..KEYS/ACROSS/SIDE
                    let b#{n}_#{j} = coopLoad<Right>(&tile#{n}[tile_at + #{j * SIDE * (E + 8) / W}u + e], TILE_STRIDE);
#unroll i in 0..UNIT_ROWS/SIDE
                    c#{n}_#{i}_#{j} = coopMultiplyAdd(a#{n}_#{i}, b#{n}_#{j}, c#{n}_#{i}_#{j});
#end
#end
                }
#endif
#unroll i in 0..UNIT_ROWS/SIDE
#unroll j in 0..KEYS/ACROSS/SIDE
                coopStoreT(c#{n}_#{i}_#{j}, &scores#{n}[scores_at + #{(i * SIDE * (KEYS + PAD) + j * SIDE) / W}u], SCORES_STRIDE);
#end
#end
#end
