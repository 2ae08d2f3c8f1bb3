//! How long to wait before trying again: exponential, jittered, with a ceiling. Pure: the caller
//! sleeps, so the caller can also be cancelled.

use std::time::Duration;

/// An endless iterator of waits.
///
/// Each wait lies between half of the step and the whole step; the step doubles up to the ceiling.
/// The jitter comes from the seed alone, so a run can be repeated.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    ceiling: Duration,
    step: Duration,
    random: u64,
}

impl Backoff {
    /// Starts at `first`, never waits longer than `ceiling`.
    pub fn new(first: Duration, ceiling: Duration, seed: u64) -> Self {
        let first = first.min(ceiling);
        Self { first, ceiling, step: first, random: splitmix(seed) }
    }

    /// A seed that differs between processes and calls, for use outside tests.
    pub fn any_seed() -> u64 {
        use std::hash::{BuildHasher, Hasher};
        std::collections::hash_map::RandomState::new().build_hasher().finish()
    }

    /// After a success: the next wait is a first one again.
    pub fn reset(&mut self) {
        self.step = self.first;
    }

    /// The next wait.
    pub fn next_wait(&mut self) -> Duration {
        self.random = splitmix(self.random);
        // 1024 steps of jitter are plenty to part a herd.
        let part = u32::try_from(self.random % 1024).unwrap_or(0);
        let half = self.step / 2;
        let wait = half + half.mul_f64(f64::from(part) / 1023.0);
        self.step = self.step.saturating_mul(2).min(self.ceiling);
        wait
    }
}

impl Iterator for Backoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        Some(self.next_wait())
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): enough for jitter, never for keys.
fn splitmix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_ceiling_and_never_pass_it() {
        let ceiling = Duration::from_secs(5);
        for seed in 0..100 {
            let waits: Vec<_> =
                Backoff::new(Duration::from_millis(100), ceiling, seed).take(20).collect();
            assert!(waits.iter().all(|wait| *wait <= ceiling), "seed {seed}: {waits:?}");
            assert!(waits[0] >= Duration::from_millis(50), "seed {seed}");
            assert!(waits[19] >= ceiling / 2, "seed {seed}: {waits:?}");
        }
    }

    #[test]
    fn two_seeds_do_not_wait_in_step_and_one_seed_repeats() {
        let of = |seed| -> Vec<_> {
            Backoff::new(Duration::from_secs(1), Duration::from_secs(60), seed).take(8).collect()
        };
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
    }

    #[test]
    fn a_success_starts_over() {
        let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_secs(60), 7);
        let _ = backoff.by_ref().take(10).count();
        backoff.reset();
        assert!(backoff.next_wait() <= Duration::from_millis(10));
    }
}
