// Sums over the rows of a matrix, of 32 columns a workgroup: 8 times 4 neighbours, and of those a thread every 32nd row,
// so that 256 threads have as many rows under way. Their sums are added in a fixed order.

const COLUMN_QUADS: u32 = 8u;
const ROW_LANES: u32 = 32u;
var<workgroup> column_parts: array<vec4<f32>, 256>;

// The sum of what the threads of a column have, for the first 8 threads. Every thread must call it.
fn column_sum(local: u32, part: vec4<f32>) -> vec4<f32> {
    column_parts[local] = part;
    for (var width = 128u; width >= COLUMN_QUADS; width /= 2u) {
        workgroupBarrier();
        if (local < width) {
            column_parts[local] += column_parts[local + width];
        }
    }
    let sum = column_parts[local];
    workgroupBarrier();
    return sum;
}
