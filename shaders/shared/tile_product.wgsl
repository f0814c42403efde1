        // What is staged, multiplied and added to the thread's c.
#unroll k in 0..DEPTH
        {
#unroll q in 0..BLOCK/4
            let x#{q} = tile_a[#{k}u * STRIDE + my_row / 4u + #{q}u];
            let y#{q} = tile_b[#{k}u * STRIDE + my_col / 4u + #{q}u];
#end
#unroll i in 0..BLOCK
#unroll j in 0..BLOCK/4
            c#{i}_#{j} = fma(vec4<f32>(x#{i / 4}[#{i % 4}]), y#{j}, c#{i}_#{j});
#end
#end
        }
#end
