// Linear indices over a dispatch that was folded into two dimensions (`groups_for` in src/ops/mod.rs).

fn linear_group(group: vec3<u32>, groups: vec3<u32>) -> u32 {
    return group.x + group.y * groups.x;
}

fn linear_thread(group: vec3<u32>, groups: vec3<u32>, local: u32) -> u32 {
    return linear_group(group, groups) * 64u + local;
}

// The first of four items of a thread, which are 64 apart: a workgroup of 64 has 256 in a row.
fn first_of_four(group: vec3<u32>, groups: vec3<u32>, local: u32) -> u32 {
    return linear_group(group, groups) * 256u + local;
}
