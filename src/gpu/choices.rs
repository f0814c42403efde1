//! Which of several ways to the same result a device takes, where somebody has measured: kernels' families differ in what
//! they are good at, and how much of it a device rewards cannot be told from its limits.
//!
//! An op asks by a [`Question`] and knows its own ways; without an answer it goes by a rule of its own.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
};

/// What is asked: an op, and the sizes of its operands that matter. Those that change from step to step are in
/// [`bucket`]s.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Question {
    pub op: &'static str,
    pub sizes: [usize; 3],
}

/// The next power of two: sizes that share it share an answer.
pub fn bucket(size: usize) -> usize {
    size.next_power_of_two()
}

/// The names of ways that won, by question. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Choices(Arc<RwLock<HashMap<Question, &'static str>>>);

impl Choices {
    pub fn get(&self, question: &Question) -> Option<&'static str> {
        let table = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if table.is_empty() { None } else { table.get(question).copied() }
    }

    /// Takes the place of all there were.
    pub fn set(&self, table: HashMap<Question, &'static str>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = table;
    }

    pub fn len(&self) -> usize {
        self.0.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_share_the_answer_of_their_power_of_two() {
        assert_eq!([1, 2, 3, 4, 5, 64, 65, 2048].map(bucket), [1, 2, 4, 4, 8, 64, 128, 2048]);
    }

    #[test]
    fn clones_share_answers() {
        let choices = Choices::default();
        let question = Question { op: "matmul.nt", sizes: [8, 96, 64] };
        let other = choices.clone();
        assert!(choices.get(&question).is_none() && choices.is_empty());
        other.set(HashMap::from([(question, "rows")]));
        assert_eq!((choices.get(&question), choices.len()), (Some("rows"), 1));
        assert_eq!(choices.get(&Question { sizes: [16, 96, 64], ..question }), None);
    }
}
