    // From `first` to `end` is the same for all lanes. WGSL asks for a proof of that where barriers depend on it, and what
    // is read from storage proves nothing.
    if (lane == 0u) {
        span = vec2<u32>(first, end);
    }
    let same = workgroupUniformLoad(&span);
    first = same.x;
    end = same.y;
