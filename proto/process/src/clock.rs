//! Time as an argument: logic asks a [`Clock`], tests move it.
//!
//! Leases and fences use [`Clock::monotonic`], which no operator and no time server can set back.
//! Wall time is for people and for records only.

use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A source of time.
pub trait Clock: Send + Sync + 'static {
    /// Time since some fixed moment of this process; never goes back.
    fn monotonic(&self) -> Duration;

    /// Wall-clock milliseconds since 1970-01-01 UTC; may jump.
    fn unix_millis(&self) -> u64;
}

/// The machine's clocks.
#[derive(Debug, Clone, Copy)]
pub struct SystemClock {
    start: Instant,
}

impl SystemClock {
    /// A clock whose monotonic time starts now.
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }

    fn unix_millis(&self) -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }
}

/// A clock that stands still until it is moved.
#[derive(Debug)]
pub struct ManualClock {
    now: Mutex<(Duration, u64)>,
}

impl ManualClock {
    /// A clock at monotonic zero and the given wall time in milliseconds.
    pub fn at(unix_millis: u64) -> Self {
        Self { now: Mutex::new((Duration::ZERO, unix_millis)) }
    }

    /// Moves both clocks forward.
    pub fn advance(&self, by: Duration) {
        let mut now = self.lock();
        now.0 += by;
        now.1 = now.1.saturating_add(u64::try_from(by.as_millis()).unwrap_or(u64::MAX));
    }

    /// Makes only the wall clock jump, as an operator or a time server would.
    pub fn set_unix_millis(&self, unix_millis: u64) {
        self.lock().1 = unix_millis;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, (Duration, u64)> {
        self.now.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Clock for ManualClock {
    fn monotonic(&self) -> Duration {
        self.lock().0
    }

    fn unix_millis(&self) -> u64 {
        self.lock().1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jump_of_the_wall_clock_leaves_monotonic_time_alone() {
        let clock = ManualClock::at(1_000);
        clock.advance(Duration::from_secs(2));
        clock.set_unix_millis(10);
        assert_eq!(clock.monotonic(), Duration::from_secs(2));
        assert_eq!(clock.unix_millis(), 10);
    }
}
