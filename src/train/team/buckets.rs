//! Which gradients leave a device together: those that are finished at the same time, as neighbours in the arenas.

use crate::{
    models::names,
    train::optimizer::{Optimizer, Span},
};

/// Gradients that leave a device together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// The decoder's milestone behind which all of them are computed; none: the end of the backward.
    pub milestone: Option<usize>,
    pub spans: Vec<Span>,
}

impl Bucket {
    /// Of all spans together.
    pub fn elements(&self) -> usize {
        self.spans.iter().map(|span| span.count).sum()
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

/// The milestone at which the gradient of a tensor is whole, in a decoder of so many layers; none: only at the end.
fn milestone(name: &str, layers: usize, tied: bool) -> Option<usize> {
    let layer = || name.strip_prefix(names::DECODER_LAYERS)?.split_once('.')?.0.parse().ok();
    match name {
        names::LM_HEAD if !tied => Some(layers),
        names::FINAL_NORM => Some(layers),
        _ => layer(),
    }
}

/// All gradients in the order in which a backward finishes them, in buckets of at least `least` elements but for the
/// last.
pub fn buckets(optimizer: &Optimizer, layers: usize, tied: bool, least: usize) -> Vec<Bucket> {
    let mut spans: Vec<(Option<usize>, Span)> =
        optimizer.gradients().map(|(name, span)| (milestone(name, layers, tied), span)).collect();
    // The last layers come first, then what has no milestone; within one the order of the arenas stays.
    spans.sort_by_key(|(milestone, _)| milestone.map_or((1, 0), |number| (0, layers - number.min(layers))));
    let mut buckets: Vec<Bucket> = Vec::new();
    for (milestone, span) in spans {
        match buckets.last_mut().filter(|last| last.milestone == milestone || last.elements() < least) {
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
    fn a_bucket_is_whole_once_the_backward_is_behind_it() {
        let bucket = |milestone| Bucket { milestone, spans: Vec::new() };
        assert!(bucket(Some(3)).is_whole(Some(3)) && bucket(Some(3)).is_whole(Some(2)));
        assert!(!bucket(Some(3)).is_whole(Some(4)) && !bucket(None).is_whole(Some(0)));
        assert!(bucket(None).is_whole(None) && bucket(Some(3)).is_whole(None));
    }

    #[test]
    fn gradients_are_whole_where_their_last_reader_is_behind() {
        assert_eq!(milestone("language_model.model.layers.11.mlp.up_proj.lora_A.weight", 12, true), Some(11));
        assert_eq!(milestone(names::LM_HEAD, 12, false), Some(12));
        assert_eq!(milestone(names::EMBED_TOKENS, 12, false), None);
        assert_eq!(milestone("multi_modal_projector.linear_1.weight", 12, false), None);
    }
}
