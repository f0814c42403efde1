    // A thread weighs one row, together with its neighbours in the subgroup: every so many-th vec4 of it is its own.
    let row = lane / #{THREADS / ROWS}u;
    let part = lane % #{THREADS / ROWS}u;
    let row_at = row * SCORES_STRIDE + part * #{4 / W}u;
    let weights_at = row * WEIGHTS_STRIDE + part * #{4 / W}u;
    // It stages one vec4 of some rows.
    let staged_row = lane / #{E / 4}u;
    let staged_to = staged_row * TILE_STRIDE + lane % #{E / 4}u * #{4 / W}u;
    // All that any of the workgroup's rows sees: from `first` to `end`.
    let range = ranges[min(own_row + row, own_rows - 1u)];
    if (lane == 0u) {
        atomicStore(&marks[FIRST_SEEN], 0xffffffffu);
        atomicStore(&marks[END_SEEN], 0u);
    }
    // Sums begin with zeros that are loaded: not every backend writes a matrix of zeros.
    for (var at = lane; at < #{SIDE * SIDE / W}u; at += #{THREADS}u) {
        scores0[at] = Single();
    }
    workgroupBarrier();
    let zeros = coopLoadT<Sum>(&scores0[0], #{SIDE / W}u);
    atomicMin(&marks[FIRST_SEEN], range.x);
    atomicMax(&marks[END_SEEN], range.y);
    workgroupBarrier();
    var first = atomicLoad(&marks[FIRST_SEEN]);
    var end = atomicLoad(&marks[END_SEEN]);
    // The same for all lanes, provably (span.wgsl); a whole vec4 of workgroup memory.
    if (lane == 0u) {
        span = vec4<u32>(first, end, 0u, 0u);
    }
    let same = workgroupUniformLoad(&span);
    first = same.x;
    end = same.y;
