// What a thread takes of a row at once: a number, or with VEC four neighbours.
#ifdef VEC
alias Wide = vec4<f32>;
alias Places = vec4<u32>;
const WIDTH: u32 = 4u;

fn sum_of(x: Wide) -> f32 {
    return (x.x + x.y) + (x.z + x.w);
}

fn largest_of(x: Wide) -> f32 {
    return max(max(x.x, x.y), max(x.z, x.w));
}

// The columns of the i-th.
fn places(i: u32) -> Places {
    return vec4<u32>(4u * i) + vec4<u32>(0u, 1u, 2u, 3u);
}
#else
alias Wide = f32;
alias Places = u32;
const WIDTH: u32 = 1u;

fn sum_of(x: Wide) -> f32 {
    return x;
}

fn largest_of(x: Wide) -> f32 {
    return x;
}

fn places(i: u32) -> Places {
    return i;
}
#endif
