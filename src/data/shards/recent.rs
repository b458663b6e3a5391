//! A bounded cache of the most recently used values: shard indexes, open files.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// A cache of values by number. When it is full, the least recently used values are dropped.
#[derive(Debug)]
pub struct Recent<V> {
    state: Mutex<Entries<V>>,
    /// Largest total weight. A single value may be heavier.
    most: u64,
}

#[derive(Debug)]
struct Entries<V> {
    /// Value, weight, and time of the last use.
    values: HashMap<usize, (V, u64, u64)>,
    weight: u64,
    clock: u64,
}

impl<V: Clone> Recent<V> {
    /// Makes a cache for values with a total weight of `most`.
    pub fn new(most: u64) -> Self {
        let state = Entries {
            values: HashMap::new(),
            weight: 0,
            clock: 0,
        };
        Self {
            state: Mutex::new(state),
            most,
        }
    }

    /// Returns a cached value.
    pub fn get(&self, number: usize) -> Option<V> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.clock += 1;
        let clock = state.clock;
        let (value, _, used) = state.values.get_mut(&number)?;
        *used = clock;
        Some(value.clone())
    }

    /// Caches a value.
    pub fn put(&self, number: usize, value: V, weight: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.clock += 1;
        let clock = state.clock;
        state.weight += weight;
        if let Some((_, before, _)) = state.values.insert(number, (value, weight, clock)) {
            state.weight -= before;
        }
        while state.weight > self.most && state.values.len() > 1 {
            let oldest = state.values.iter().min_by_key(|(_, (_, _, used))| *used);
            let Some(oldest) = oldest.map(|(number, _)| *number) else {
                break;
            };
            if let Some((_, weight, _)) = state.values.remove(&oldest) {
                state.weight -= weight;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recently_used_values_are_kept_and_the_weight_is_bounded() {
        let recent = Recent::new(10);
        recent.put(1, 'a', 4);
        recent.put(2, 'b', 4);
        assert_eq!(recent.get(1), Some('a'));
        recent.put(3, 'c', 4);
        assert_eq!((recent.get(1), recent.get(2)), (Some('a'), None));
        recent.put(4, 'd', 100);
        assert_eq!((recent.get(1), recent.get(4)), (None, Some('d')));
        recent.put(4, 'e', 1);
        recent.put(5, 'f', 9);
        assert_eq!((recent.get(4), recent.get(5)), (Some('e'), Some('f')));
    }
}
