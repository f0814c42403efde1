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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// The decoder's milestone behind which all of them are computed; none: the end of the backward.
    pub milestone: Option<usize>,
    pub spans: Vec<Span>,
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

/// The decoder layer of a tensor.
fn layer(name: &str) -> Option<usize> {
    name.strip_prefix(names::DECODER_LAYERS)?.split_once('.')?.0.parse().ok()
}

/// All gradients, given by name, in the order in which a backward finishes them, in buckets of at least `least` elements.
/// The last one, of what is whole only at the end, stands by itself.
pub fn buckets<'a>(gradients: impl Iterator<Item = (&'a str, Span)> + Clone, least: usize) -> Vec<Bucket> {
    let layers = gradients.clone().filter_map(|(name, _)| layer(name)).max().map_or(0, |last| last + 1);
    let milestone = |name: &str| match name {
        // Embeddings that are the head too have another name.
        names::LM_HEAD | names::FINAL_NORM => Some(layers),
        _ => layer(name),
    };
    let mut spans: Vec<(Option<usize>, Span)> = gradients.map(|(name, span)| (milestone(name), span)).collect();
    // The last layers come first, then what has no milestone; within one the order of the arenas stays.
    spans.sort_by_key(|(milestone, _)| milestone.map_or((1, 0), |number| (0, layers - number)));
    let mut buckets: Vec<Bucket> = Vec::new();
    for (milestone, span) in spans {
        let goes_on = |last: &Bucket| last.milestone == milestone || (milestone.is_some() && last.elements() < least);
        match buckets.last_mut().filter(|last| goes_on(last)) {
            Some(last) => {
                last.milestone = milestone;
                last.spans.push(span);
            }
            None => buckets.push(Bucket { milestone, spans: vec![span] }),
        }
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
        let of = |spans| Bucket { milestone: None, spans };
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
        let bucket = |milestone| Bucket { milestone, spans: Vec::new() };
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
        let made = buckets(gradients.clone(), 100);
        assert_eq!(made.iter().map(|bucket| bucket.milestone).collect::<Vec<_>>(), [Some(12), Some(0), None]);
        assert_eq!(made[0].spans, [Span { shard: 0, first: 192, count: 128 }]);
        assert_eq!(made[1].spans, [Span { shard: 0, first: 64, count: 128 }]);
        assert_eq!(made[2].spans.len(), 2);
        assert_eq!((made[2].place(0, 64 * 5 + 3), made[2].place(0, 64)), (Some(67), None));
        let small = buckets(gradients.clone(), 1);
        assert_eq!(
            small.iter().map(|bucket| bucket.milestone).collect::<Vec<_>>(),
            [Some(12), Some(11), Some(0), None]
        );
        // What is whole only at the end may be begun long before: it shares with nothing.
        assert_eq!(buckets(gradients, 1 << 20).len(), 2);
    }
}
