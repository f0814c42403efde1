//! From logits to the next token.

use crate::rng::Rng;

/// The likeliest token; the lowest id of several that are equally likely.
pub fn greedy(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

/// A token drawn with the probabilities softmax(logits / temperature), from the fewest likeliest tokens that together
/// have at least `top_p` of them. Order as in transformers: temperature first, then the cut.
pub fn sample(logits: &[f32], temperature: f32, top_p: f32, rng: &mut Rng) -> u32 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: f32| (f64::from(logit - largest) / f64::from(temperature)).exp();
    let mut tokens: Vec<(u32, f64)> = (0..).zip(logits.iter().map(|&logit| weight(logit))).collect();
    // Stable, so that equally likely tokens stay in the order of their ids.
    tokens.sort_by(|a, b| b.1.total_cmp(&a.1));
    let total: f64 = tokens.iter().map(|(_, weight)| weight).sum();
    let mut kept = 0.0;
    let enough = tokens.iter().position(|(_, weight)| {
        kept += weight;
        kept >= f64::from(top_p) * total
    });
    tokens.truncate(enough.map_or(tokens.len(), |last| last + 1));
    let kept: f64 = tokens.iter().map(|(_, weight)| weight).sum();
    let mut left = f64::from(rng.unit()) * kept;
    for &(token, weight) in &tokens {
        left -= weight;
        if left < 0.0 {
            return token;
        }
    }
    tokens.last().map_or(0, |&(token, _)| token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_lowest_of_equals() {
        assert_eq!(greedy(&[-1.0, 3.0, 3.0, 2.0]), 1);
    }

    #[test]
    fn samples_follow_the_probabilities_and_the_cut() {
        // 0.6, 0.3, 0.1
        let logits = [0.1f32.ln(), 0.6f32.ln(), 0.3f32.ln()];
        let draw = |temperature, top_p| {
            let mut rng = Rng::new(1, 2);
            let mut counts = [0; 3];
            (0..10_000).for_each(|_| counts[sample(&logits, temperature, top_p, &mut rng) as usize] += 1);
            counts
        };
        for (count, expected) in draw(1.0, 1.0).into_iter().zip([1000, 6000, 3000_i32]) {
            assert!((count - expected).abs() < 200, "{count} of {expected}");
        }
        assert_eq!(draw(1.0, 0.85)[0], 0);
        assert_eq!(draw(1.0, 0.5), [0, 10_000, 0]);
        assert_eq!(draw(0.01, 1.0), [0, 10_000, 0]);
        assert_eq!(draw(1.0, 1.0), draw(1.0, 1.0));
    }
}
