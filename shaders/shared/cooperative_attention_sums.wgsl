                // In the forward values are summed, the second tile; in the backward what made the scores.
#unroll n in 0..OUTPUTS
                for (var k = 0u; k < KEYS; k += #{STEPS * SIDE}u) {
#unroll s in 0..STEPS
#unroll i in 0..UNIT_ROWS/SIDE
                    let w#{s}_#{i} = coopLoadT<Left>(&weights#{n}[(unit_row + #{i * SIDE}u) * WEIGHTS_STRIDE + (k + #{s * SIDE}u) / #{W}u], WEIGHTS_STRIDE);
#end
#unroll c in 0..E/ACROSS/SIDE
                    let v#{s}_#{c} = coopLoadT<Right>(&tile#{n + 2 - SCORES}[(k + #{s * SIDE}u) * TILE_STRIDE + across * #{E / ACROSS / W}u + #{c * SIDE / W}u], TILE_STRIDE);
#unroll i in 0..UNIT_ROWS/SIDE
                    sum#{n}_#{i}_#{c} = coopMultiplyAdd(w#{s}_#{i}, v#{s}_#{c}, sum#{n}_#{i}_#{c});
#end
#end
#end
                }
#end
