//! Time as an argument: logic asks a [`Clock`], tests move it.
//!
//! Leases and fences use [`Clock::monotonic`], which no operator and no time server can set back.
//! It goes on while the machine sleeps: a lease that ended meanwhile must not seem alive to the one who wakes up.
//! Wall time is for people and for records only.

use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

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
    start: Duration,
}

impl SystemClock {
    /// A clock whose monotonic time starts now.
    pub fn new() -> Self {
        Self { start: awake_or_asleep() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn monotonic(&self) -> Duration {
        awake_or_asleep().saturating_sub(self.start)
    }

    fn unix_millis(&self) -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }
}

/// Time since the machine was started, sleep included (`clock_gettime(2)`, CLOCK_BOOTTIME).
#[cfg(target_os = "linux")]
fn awake_or_asleep() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::try_from(now).unwrap_or_default()
}

/// Time since the first call. What Rust asks there (the performance counter of Windows) goes on in sleep, too.
#[cfg(not(target_os = "linux"))]
fn awake_or_asleep() -> Duration {
    static FIRST: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
    FIRST.get_or_init(std::time::Instant::now).elapsed()
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

    #[cfg(target_os = "linux")]
    #[test]
    fn monotonic_time_is_the_one_that_goes_on_in_sleep() {
        let uptime = std::fs::read_to_string("/proc/uptime").expect("Linux");
        let uptime: f64 = uptime.split(' ').next().and_then(|s| s.parse().ok()).expect("seconds");
        // The machine has been up for so long, sleep included; the reading comes a little later.
        assert!(awake_or_asleep().as_secs_f64() >= uptime - 0.01);
        let clock = SystemClock::new();
        let first = clock.monotonic();
        assert!(clock.monotonic() >= first);
    }

    #[test]
    fn a_jump_of_the_wall_clock_leaves_monotonic_time_alone() {
        let clock = ManualClock::at(1_000);
        clock.advance(Duration::from_secs(2));
        clock.set_unix_millis(10);
        assert_eq!(clock.monotonic(), Duration::from_secs(2));
        assert_eq!(clock.unix_millis(), 10);
    }
}
