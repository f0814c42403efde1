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

/// Makes tokens that were `seen` less likely, each once: positive scores are divided by the penalty, negative ones
/// multiplied with it (Keskar et al., "CTRL", 2019; as transformers does).
pub fn penalise(scores: &mut [f32], seen: &[u32], penalty: f32) {
    if penalty == 1.0 {
        return;
    }
    let mut done = std::collections::HashSet::new();
    for &token in seen {
        if done.insert(token)
            && let Some(score) = scores.get_mut(token as usize)
        {
            *score = if *score < 0.0 { *score * penalty } else { *score / penalty };
        }
    }
}

/// A token drawn with the probabilities softmax(logits / temperature), from the `top_k` likeliest (0: all), and of
/// these from the fewest that together have at least `top_p`. Order as in transformers: temperature, then the cuts.
pub fn sample(logits: &[f32], temperature: f32, top_k: usize, top_p: f32, rng: &mut Rng) -> u32 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: f32| (f64::from(logit - largest) / f64::from(temperature)).exp();
    let mut tokens: Vec<(u32, f64)> = (0..).zip(logits.iter().map(|&logit| weight(logit))).collect();
    // Stable, so that equally likely tokens stay in the order of their ids.
    tokens.sort_by(|a, b| b.1.total_cmp(&a.1));
    if top_k > 0 {
        tokens.truncate(top_k);
    }
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
        let draw_of = |temperature, top_k, top_p| {
            let mut rng = Rng::new(1, 2);
            let mut counts = [0; 3];
            (0..10_000).for_each(|_| counts[sample(&logits, temperature, top_k, top_p, &mut rng) as usize] += 1);
            counts
        };
        let draw = |temperature, top_p| draw_of(temperature, 0, top_p);
        for (count, expected) in draw(1.0, 1.0).into_iter().zip([1000, 6000, 3000_i32]) {
            assert!((count - expected).abs() < 200, "{count} of {expected}");
        }
        assert_eq!(draw(1.0, 0.85)[0], 0);
        assert_eq!(draw(1.0, 0.5), [0, 10_000, 0]);
        assert_eq!(draw(0.01, 1.0), [0, 10_000, 0]);
        assert_eq!(draw(1.0, 1.0), draw(1.0, 1.0));
        assert_eq!(draw_of(1.0, 1, 1.0), [0, 10_000, 0]);
        assert_eq!(draw_of(1.0, 2, 1.0)[0], 0);
    }

    #[test]
    fn a_repeated_token_is_penalised_once() {
        let mut scores = [2.0, -1.0, 4.0];
        penalise(&mut scores, &[0, 1, 0, 9], 2.0);
        assert_eq!(scores, [1.0, -2.0, 4.0]);
    }
}
