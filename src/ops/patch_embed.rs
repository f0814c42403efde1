//! CLIP's input: y[b, 0] = class + position[0], y[b, 1 + p] = patches[b, p] + position[1 + p].
//! PyTorch: `torch.cat([class.expand(B, 1, D), patches], 1) + position`, as in `CLIPVisionEmbeddings`.
//!
//! The patch convolution before it has a stride as long as its kernel, so it is a product of [`patchify`]'s rows with
//! the weight [D, 3 * p * p].

use super::{Case, Comparison, Cost, Op, Random, Shapes, THREADS, case::floats, elementwise, embedding, groups_for};
use crate::{
    error::Result,
    gpu::Gpu,
    tensor::{ALIGNMENT, Tensor},
};

/// patches [B, P, D], class_embedding [D] and position [P + 1, D] to [B, P + 1, D].
pub fn assemble(patches: &Tensor, class_embedding: &Tensor, position: &Tensor) -> Tensor {
    let (gpu, d, tokens) = (patches.gpu(), class_embedding.len(), position.len() / class_embedding.len());
    let width = (tokens - 1) * d;
    let images = patches.len() / width;
    assert!(patches.len() == images * width && position.len() == tokens * d, "{patches:?} at {position:?}");
    let y = Tensor::empty(gpu, &[images, tokens, d]);
    for (first, count) in bindable_images(gpu, images, tokens, d) {
        let bindings = [
            patches.range(first * width, count * width),
            class_embedding.binding(),
            position.binding(),
            y.range(first * tokens * d, count * tokens * d),
        ];
        let params = [count as u32, tokens as u32 - 1, d as u32];
        gpu.dispatch("patch_embed.assemble", &bindings, &params, groups_for(count * tokens * d, THREADS));
    }
    y
}

/// The gradient of the patches [B, P, D]: dy [B, P + 1, D] without the class token's rows.
pub fn backward(dy: &Tensor) -> Tensor {
    let (images, tokens, d) = sizes(dy);
    let rows = (0..images * tokens).filter(|row| row % tokens != 0).map(|row| row as u32);
    let ids: Vec<u32> = rows.collect();
    let ids = Tensor::from_u32(dy.gpu(), &ids, &[ids.len()]);
    embedding::gather(dy, &ids).reshape(&[images, tokens - 1, d])
}

/// dposition [P + 1, D] += the sum of dy [B, P + 1, D] over the images; dclass [D] += its first row.
pub fn backward_position(dy: &Tensor, dposition: &Tensor, dclass: &Tensor) {
    let (images, tokens, d) = sizes(dy);
    assert!(dposition.len() == tokens * d && dclass.len() == d, "{dy:?} into {dposition:?} and {dclass:?}");
    for (first, count) in bindable_images(dy.gpu(), images, tokens, d) {
        let bindings = [dy.range(first * tokens * d, count * tokens * d), dposition.binding(), dclass.binding()];
        let params = [count as u32, tokens as u32 - 1, d as u32];
        dy.gpu().dispatch("patch_embed.backward_position", &bindings, &params, groups_for(tokens * d, THREADS));
    }
}

/// B, P + 1, D of a tensor of that shape.
fn sizes(y: &Tensor) -> (usize, usize, usize) {
    assert!(y.shape().len() == 3 && y.shape()[1] > 0, "{y:?} is not [B, P + 1, D]");
    (y.shape()[0], y.shape()[1], y.shape()[2])
}

/// Cuts a batch into parts that can be bound: `(first, count)`. Where a whole number of aligned blocks makes an
/// image, with and without its class token, a part may begin at any image; else at every 64th.
fn bindable_images(gpu: &Gpu, images: usize, tokens: usize, d: usize) -> impl Iterator<Item = (usize, usize)> {
    let unit = if d.is_multiple_of(ALIGNMENT) { 1 } else { ALIGNMENT };
    let most = gpu.max_binding() as usize / (tokens * d * 4).max(1);
    let step = (most / unit * unit).max(unit);
    (0..images).step_by(step).map(move |first| (first, step.min(images - first)))
}

/// Cuts a picture [3, S, S] into its patches: [P, 3 * p * p], patches in reading order, each in the order channel,
/// row, column, which is that of a convolution weight [D, 3, p, p]. What is left at the right and at the bottom when
/// p does not divide S is dropped, as the convolution drops it.
pub fn patchify(pixels: &[f32], image_size: usize, patch_size: usize) -> Vec<f32> {
    assert_eq!(pixels.len(), 3 * image_size * image_size, "pixels of a square of {image_size}");
    let side = image_size / patch_size;
    let mut out = Vec::with_capacity(3 * (side * patch_size).pow(2));
    for patch in 0..side * side {
        let (top, left) = (patch / side * patch_size, patch % side * patch_size);
        for channel in 0..3 {
            for row in top..top + patch_size {
                let start = (channel * image_size + row) * image_size + left;
                out.extend_from_slice(&pixels[start..start + patch_size]);
            }
        }
    }
    out
}

/// [`assemble`] on the host.
pub fn reference(patches: &[f64], class_embedding: &[f64], position: &[f64]) -> Vec<f64> {
    let (d, tokens) = (class_embedding.len(), position.len() / class_embedding.len());
    let mut y = Vec::new();
    for image in patches.chunks((tokens - 1) * d) {
        let rows = class_embedding.iter().chain(image);
        y.extend(rows.zip(position).map(|(x, position)| x + position));
    }
    y
}

fn check(gpu: &Gpu, n: usize) -> Result<Vec<Comparison>> {
    let mut out = Vec::new();
    // Rows that are aligned, and rows that are not, in a batch that a small binding cuts.
    for (images, patches, d) in [(3, n, 64), (66, n % 5 + 1, n / 2 + 1)] {
        let mut random = Random::new((n * 2 + d) as u64);
        let (x, tx) = random.tensor(gpu, &[images, patches, d]);
        let ((class, tclass), (position, tposition)) =
            (random.tensor(gpu, &[d]), random.tensor(gpu, &[patches + 1, d]));
        let (x, class, position) =
            (super::testing::wide(&x), super::testing::wide(&class), super::testing::wide(&position));
        let y = assemble(&tx, &tclass, &tposition);
        let (dposition, dclass) = (elementwise::zeros(gpu, &[patches + 1, d]), elementwise::zeros(gpu, &[d]));
        let dpatches = backward(&y);
        backward_position(&y, &dposition, &dclass);
        backward_position(&y, &dposition, &dclass);

        let width = (patches + 1) * d;
        let want = reference(&x, &class, &position);
        let want_dpatches = want.chunks(width).flat_map(|image| image[d..].to_vec()).collect();
        let sums: Vec<f64> = (0..width).map(|i| 2.0 * want.iter().skip(i).step_by(width).sum::<f64>()).collect();
        out.extend([
            Comparison::new("y", y.to_vec()?, want, 1e-6),
            Comparison::new("dpatches", dpatches.to_vec()?, want_dpatches, 1e-6),
            Comparison::new("dclass", dclass.to_vec()?, sums[..d].to_vec(), 1e-5),
            Comparison::new("dposition", dposition.to_vec()?, sums, 1e-5),
        ]);
    }
    Ok(out)
}

fn cases(shapes: &Shapes) -> Vec<Case> {
    let (p, d) = (shapes.patches, shapes.vision_hidden);
    let case = |pass, flops, bytes| Case::of(pass, format!("1x{p}x{d}"), Cost::each(p * d, flops, bytes));
    vec![
        case("forward", 1, 12).run(move |gpu| {
            let (patches, class) = (floats(gpu, &[1, p, d]), floats(gpu, &[d]));
            let position = floats(gpu, &[p + 1, d]);
            move || assemble(&patches, &class, &position)
        }),
        case("backward position", 1, 12).run(move |gpu| {
            let dy = floats(gpu, &[1, p + 1, d]);
            let (dposition, dclass) = (elementwise::zeros(gpu, &[p + 1, d]), elementwise::zeros(gpu, &[d]));
            move || backward_position(&dy, &dposition, &dclass)
        }),
    ]
}

pub const OP: Op = Op {
    name: "patch_embed",
    check,
    cases,
    cost: |n| {
        let elements = (3 * (n + 1) * 64) as u64;
        Cost { flops: elements, bytes: 8 * elements }
    },
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_are_cut_in_reading_order() {
        // 5 by 5 with patches of 2: the last row and column are dropped.
        let pixels: Vec<f32> = (0..75).map(|i| i as f32).collect();
        let patches = patchify(&pixels, 5, 2);
        assert_eq!(patches.len(), 4 * 12);
        assert_eq!(patches[..12], [0., 1., 5., 6., 25., 26., 30., 31., 50., 51., 55., 56.]);
        assert_eq!(patches[12..16], [2., 3., 7., 8.]);
        assert_eq!(patches[24..28], [10., 11., 15., 16.]);
        assert_eq!(patches[47], 68.0);
    }
}
