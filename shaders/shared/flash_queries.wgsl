    // A workgroup's 32 queries of one head, a thread's 4 of them, and the keys from `first` to `end` that any of them sees.
    let head = group.y;
    let kv_head = head * params.kv_heads / params.heads;
    let size = params.head_size;
    let last = params.queries - 1u;
    let ty = lane / 8u;
    let tx = lane % 8u;
    let query = group.x * 32u + ty * 4u;
    var first = ranges[min(group.x * 32u, last)].x;
    var end = 0u;
    for (var r = 0u; r < 32u; r++) {
        let range = ranges[min(group.x * 32u + r, last)];
        first = min(first, range.x);
        end = max(end, range.y);
    }
#import span
