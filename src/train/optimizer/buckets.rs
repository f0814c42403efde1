//! Which gradients leave a device together: those that are finished at the same time, as neighbours in the arenas.

use std::ops::Range;

use crate::{models::names, tensor::ALIGNMENT};

/// A run of gradients: `count` elements of the shard's, from `first` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub shard: usize,
    pub first: usize,
    pub count: usize,
}

/// Gradients that leave a device together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    /// The decoder's milestone behind which all of them are computed; none: the end of the backward.
    pub milestone: Option<usize>,
    pub spans: Vec<Span>,
    /// Buckets of one turn are made at the same time: parts of what is too large for one.
    pub turn: usize,
    pub part: usize,
}

/// Gradients of a bucket that are added up at once: while the next ones leave, their sum comes back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parcel {
    pub bucket: usize,
    pub range: Range<usize>,
}

impl Bucket {
    /// Of all spans together.
    pub fn elements(&self) -> usize {
        self.spans.iter().map(|span| span.count).sum()
    }

    /// Values in the bucket's order, from `first` on, each span's by themselves.
    pub fn split<'a>(&'a self, first: usize, values: &'a [f32]) -> impl Iterator<Item = (Span, &'a [f32])> {
        let mut end = 0;
        self.spans.iter().filter_map(move |span| {
            let start = end;
            end += span.count;
            let (from, to) = (first.max(start), (first + values.len()).min(end));
            let part = || Span { shard: span.shard, first: span.first + from - start, count: to - from };
            (from < to).then(|| (part(), &values[from - first..to - first]))
        })
    }

    /// How far into the bucket these gradients are.
    pub fn place(&self, shard: usize, first: usize) -> Option<usize> {
        let mut before = 0;
        for span in &self.spans {
            if span.shard == shard && (span.first..span.first + span.count).contains(&first) {
                return Some(before + first - span.first);
            }
            before += span.count;
        }
        None
    }

    /// Whether its gradients are whole when the backward has come back to `milestone`, or to its end.
    pub fn is_whole(&self, milestone: Option<usize>) -> bool {
        match (self.milestone, milestone) {
            (_, None) => true,
            (Some(needed), Some(reached)) => reached <= needed,
            (None, Some(_)) => false,
        }
    }
}

/// How many layers have something that trains, or that come before one that has.
pub fn layers<'a>(names: impl Iterator<Item = &'a str>) -> usize {
    names.filter_map(names::decoder_layer).max().map_or(0, |last| last + 1)
}

/// The decoder's milestone behind which a forward reads a weight, so that its gradient is whole when the backward comes
/// back to it; none: before all of them, and at the end of the backward.
pub fn milestone(name: &str, layers: usize) -> Option<usize> {
    match name {
        // Embeddings that are the head too have another name.
        names::LM_HEAD | names::FINAL_NORM => Some(layers),
        _ => names::decoder_layer(name),
    }
}

/// All gradients, given by name, in the order in which a backward finishes them, in buckets of at least `least` elements,
/// and at most `most` or one tensor. What is whole only at the end stands by itself.
pub fn buckets<'a>(gradients: impl Iterator<Item = (&'a str, Span)> + Clone, least: usize, most: usize) -> Vec<Bucket> {
    let layers = layers(gradients.clone().map(|(name, _)| name));
    let mut spans: Vec<(Option<usize>, Span)> = gradients.map(|(name, span)| (milestone(name, layers), span)).collect();
    // The last layers come first, then what has no milestone; within one the order of the arenas stays.
    spans.sort_by_key(|(milestone, _)| milestone.map_or((1, 0), |number| (0, layers - number)));
    let mut buckets: Vec<Bucket> = Vec::new();
    for (milestone, span) in spans {
        let spans = vec![span];
        let next = match buckets.last_mut() {
            None => Bucket { milestone, spans, ..Bucket::default() },
            Some(last) => {
                let same = last.milestone == milestone;
                let is_small = milestone.is_some() && last.part == 0 && last.elements() < least;
                if (same || is_small) && last.elements() + span.count <= most {
                    last.milestone = milestone;
                    last.spans.push(span);
                    continue;
                }
                let (turn, part) = if same { (last.turn, last.part + 1) } else { (last.turn + 1, 0) };
                Bucket { milestone, spans, turn, part }
            }
        };
        buckets.push(next);
    }
    buckets.iter_mut().for_each(|bucket| join(&mut bucket.spans));
    buckets
}

/// All buckets in parcels of about `most` elements, in order.
pub fn parcels(buckets: &[Bucket], most: usize) -> Vec<Parcel> {
    let most = most.next_multiple_of(ALIGNMENT);
    let of = |(bucket, of): (usize, &Bucket)| {
        let count = of.elements();
        (0..count).step_by(most).map(move |first| Parcel { bucket, range: first..count.min(first + most) })
    };
    buckets.iter().enumerate().flat_map(of).collect()
}

/// Makes one span of neighbours.
fn join(spans: &mut Vec<Span>) {
    spans.sort_by_key(|span| (span.shard, span.first));
    let mut joined: Vec<Span> = Vec::new();
    for span in spans.drain(..) {
        match joined.last_mut() {
            Some(last) if last.shard == span.shard && last.first + last.count == span.first => last.count += span.count,
            _ => joined.push(span),
        }
    }
    *spans = joined;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_one_span() {
        let span = |shard, first, count| Span { shard, first, count };
        let mut spans = vec![span(0, 64, 64), span(1, 128, 64), span(0, 0, 64), span(0, 256, 64)];
        join(&mut spans);
        assert_eq!(spans, [span(0, 0, 128), span(0, 256, 64), span(1, 128, 64)]);
    }

    #[test]
    fn parcels_cover_buckets_and_come_apart_into_spans() {
        let span = |shard, first, count| Span { shard, first, count };
        let of = |spans| Bucket { spans, ..Bucket::default() };
        let buckets = [of(vec![span(0, 64, 64)]), of(vec![span(0, 256, 64), span(1, 0, 192)])];
        let parcels = parcels(&buckets, 100);
        let ranges: Vec<_> = parcels.iter().map(|parcel| (parcel.bucket, parcel.range.clone())).collect();
        assert_eq!(ranges, [(0, 0..64), (1, 0..128), (1, 128..256)]);
        let values: Vec<f32> = (0..128u8).map(f32::from).collect();
        let split: Vec<_> = buckets[1].split(0, &values).collect();
        assert_eq!(split, [(span(0, 256, 64), &values[..64]), (span(1, 0, 64), &values[64..])]);
        assert_eq!(buckets[1].split(128, &values).collect::<Vec<_>>(), [(span(1, 64, 128), &values[..])]);
        assert_eq!(buckets[1].split(64, &[]).count(), 0);
    }

    #[test]
    fn a_bucket_is_whole_once_the_backward_is_behind_it() {
        let bucket = |milestone| Bucket { milestone, ..Bucket::default() };
        assert!(bucket(Some(3)).is_whole(Some(3)) && bucket(Some(3)).is_whole(Some(2)));
        assert!(!bucket(Some(3)).is_whole(Some(4)) && !bucket(None).is_whole(Some(0)));
        assert!(bucket(None).is_whole(None) && bucket(Some(3)).is_whole(None));
    }

    #[test]
    fn buckets_follow_the_backward() {
        let names = [
            names::EMBED_TOKENS,
            "language_model.model.layers.0.mlp.up_proj.lora_A.weight",
            "language_model.model.layers.11.mlp.up_proj.lora_A.weight",
            names::FINAL_NORM,
            names::LM_HEAD,
            "multi_modal_projector.linear_1.weight",
        ];
        let gradients =
            names.iter().enumerate().map(|(at, name)| (*name, Span { shard: 0, first: at * 64, count: 64 }));
        let made = buckets(gradients.clone(), 100, 1 << 30);
        assert_eq!(made.iter().map(|bucket| bucket.milestone).collect::<Vec<_>>(), [Some(12), Some(0), None]);
        assert_eq!(made[0].spans, [Span { shard: 0, first: 192, count: 128 }]);
        assert_eq!(made[1].spans, [Span { shard: 0, first: 64, count: 128 }]);
        assert_eq!(made[2].spans.len(), 2);
        assert_eq!((made[2].place(0, 64 * 5 + 3), made[2].place(0, 64)), (Some(67), None));
        let small = buckets(gradients.clone(), 1, 1 << 30);
        assert_eq!(
            small.iter().map(|bucket| bucket.milestone).collect::<Vec<_>>(),
            [Some(12), Some(11), Some(0), None]
        );
        // What is whole only at the end may be begun long before: it shares with nothing.
        assert_eq!(buckets(gradients.clone(), 1 << 20, 1 << 30).len(), 2);
        // What is too large is cut between tensors, and its parts have the same turn.
        let cut = buckets(gradients, 1, 100);
        let turns: Vec<_> = cut.iter().map(|bucket| (bucket.milestone, bucket.turn, bucket.part)).collect();
        assert_eq!(
            turns,
            [(Some(12), 0, 0), (Some(12), 0, 1), (Some(11), 1, 0), (Some(0), 2, 0), (None, 3, 0), (None, 3, 1)]
        );
    }
}
