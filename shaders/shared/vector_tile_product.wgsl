            // What is staged, multiplied and added to the thread's c.
#unroll k in 0..DEPTH
            {
#unroll q in 0..BLOCK/4
#ifdef TN
                let x#{q} = tile_a[buffer + #{k * TILE / 4 + q * TILE / BLOCK}u + my_row];
#else
                let x#{q} = tile_a[buffer + #{k * TILE / 4 + q * TILE / BLOCK}u + (my_row ^ #{k / 4 * 2}u)];
#endif
#ifdef NT
                let y#{q} = tile_b[buffer + #{k * TILE / 4 + q * TILE / BLOCK}u + (my_col ^ #{k / 4 * 2}u)];
#else
                let y#{q} = tile_b[buffer + #{k * TILE / 4 + q * TILE / BLOCK}u + my_col];
#endif
#end
#unroll i in 0..BLOCK
#unroll j in 0..BLOCK/4
                c#{i}_#{j} = fma(vec4<f32>(x#{i / 4}[#{i % 4}]), y#{j}, c#{i}_#{j});
#end
#end
            }
#end
