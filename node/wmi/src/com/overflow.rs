//! What to do when WMI says that its own queue of events overflowed (`WBEM_E_QUOTA_VIOLATION`).
//!
//! It may say so once, with the subscription as good as before, or for ever, and each time at once. So it is asked again
//! after growing pauses, and a subscription that says nothing else is given up.

use std::time::Duration;

const FIRST: Duration = Duration::from_millis(200);
const LONGEST: Duration = Duration::from_secs(30);
/// Failures in a row that a subscription survives; with the pauses between them that is about three minutes.
pub const MOST: u32 = 12;

/// Failures in a row.
#[derive(Debug, Default)]
pub struct Overflow(u32);

impl Overflow {
    /// Another failure: how long to wait before asking again; `None` when there were too many.
    pub fn failed(&mut self) -> Option<Duration> {
        self.0 += 1;
        (self.0 <= MOST).then(|| (FIRST * 2_u32.saturating_pow(self.0 - 1)).min(LONGEST))
    }

    /// The subscription works.
    pub fn works(&mut self) {
        self.0 = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_what_lasts_is_given_up() {
        let mut overflow = Overflow::default();
        let pauses: Vec<Duration> = std::iter::from_fn(|| overflow.failed()).take(100).collect();
        assert_eq!(pauses.len(), MOST as usize);
        assert!(pauses.windows(2).all(|p| p[0] <= p[1]), "{pauses:?}");
        assert_eq!((pauses[0], pauses[MOST as usize - 1]), (FIRST, LONGEST));
        overflow.works();
        assert_eq!(overflow.failed(), Some(FIRST));
    }
}
