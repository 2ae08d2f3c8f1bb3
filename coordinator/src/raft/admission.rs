//! What a member may do whose database is empty.
//!
//! Such a member may have lost its disk: it promised its vote and acknowledged entries, and knows of neither. If it voted
//! and acknowledged right away, a change that a majority had confirmed could be lost, and a term could have two leaders
//! (openraft's FAQ shows how). So it first hears from every other member. If the fabric is new, it begins with them. If
//! not, it takes nothing from terms before the latest that any of them has seen, and gives no vote until it has applied
//! everything that any of them held when it asked. That it is on its way back is kept on disk until then.

use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::store::encode;

/// Key of the mark in the database: [`Bounds`].
pub(super) const MARK: &str = "returning";

/// What a member tells of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Known {
    /// The latest term that it has seen.
    pub(super) term: u64,
    /// Index of its last entry.
    pub(super) last_log: Option<u64>,
    /// False for one that has lost what it once knew, or has just begun.
    pub(super) remembers: bool,
}

impl Known {
    /// The first entry is the membership that each member writes by itself; a leader writes those behind it.
    fn has_begun(self) -> bool {
        self.last_log.is_some_and(|index| index > 0)
    }
}

/// Where a member stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// It knows what it has promised.
    Full,
    /// Its database is empty, and the others have not been heard.
    Empty,
    /// It takes part within bounds.
    Returning(Bounds),
}

/// What bounds a member that is on its way back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Bounds {
    /// The latest term that any other member has seen.
    pub(super) term: u64,
    /// The last entry that any other member held; none: the fabric is new.
    pub(super) last_log: Option<u64>,
}

/// What follows from what all others told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Take part within these bounds.
    Return(Bounds),
    /// The fabric exists, and more than one member has lost what it knew.
    TooMuchLost,
}

/// Decides for a member with an empty database. Pure.
pub(super) fn judge(others: &[Known]) -> Verdict {
    if !others.iter().any(|known| known.has_begun()) {
        return Verdict::Return(Bounds { term: 0, last_log: None });
    }
    if !others.iter().all(|known| known.remembers) {
        return Verdict::TooMuchLost;
    }
    let term = others.iter().map(|known| known.term).max().unwrap_or(0);
    let last_log = others.iter().filter_map(|known| known.last_log).max();
    Verdict::Return(Bounds { term, last_log })
}

/// Why a request of another member is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum NotYet {
    /// The others have not been heard.
    #[error("this member's database is empty: it asks all other members first")]
    Empty,
    /// From before what it may have promised.
    #[error("this member lost its database and takes nothing of term {0} or before")]
    OldTerm(u64),
    /// Not caught up.
    #[error("this member lost its database and gives no vote before it has entry {0}")]
    Behind(u64),
}

/// Where this member stands, in memory and on disk.
#[derive(Debug)]
pub(super) struct Admission {
    now: Mutex<Now>,
    full: watch::Sender<bool>,
}

#[derive(Debug)]
struct Now {
    standing: Standing,
    /// Until nothing is written any more: connections that outlive Raft must not keep the database open.
    meta: Option<sled::Tree>,
}

impl Admission {
    /// `mark`: what stands under [`MARK`] in `meta`. `empty`: the database holds no vote, no entry, no snapshot.
    pub(super) fn new(meta: sled::Tree, mark: Option<Bounds>, empty: bool) -> Self {
        let standing = match mark {
            Some(bounds) => Standing::Returning(bounds),
            None if empty => Standing::Empty,
            None => Standing::Full,
        };
        let meta = (standing != Standing::Full).then_some(meta);
        let full = watch::Sender::new(standing == Standing::Full);
        Self { now: Mutex::new(Now { standing, meta }), full }
    }

    /// Whether this member takes part without bounds.
    pub(super) fn full(&self) -> watch::Receiver<bool> {
        self.full.subscribe()
    }

    pub(super) fn standing(&self) -> Standing {
        self.lock().standing
    }

    /// Lets go of the database.
    pub(super) fn close(&self) {
        self.lock().meta = None;
    }

    /// Whether entries or a snapshot of a leader of this term may be taken.
    pub(super) fn takes(&self, term: u64) -> Result<(), NotYet> {
        match self.standing() {
            Standing::Full => Ok(()),
            Standing::Empty => Err(NotYet::Empty),
            Standing::Returning(bounds) if term < bounds.term => Err(NotYet::OldTerm(term)),
            Standing::Returning(_) => Ok(()),
        }
    }

    /// Whether a candidate may be answered.
    pub(super) fn votes(&self) -> Result<(), NotYet> {
        match self.standing() {
            Standing::Full => Ok(()),
            Standing::Empty => Err(NotYet::Empty),
            Standing::Returning(Bounds { last_log: Some(index), .. }) => Err(NotYet::Behind(index)),
            Standing::Returning(_) => Ok(()),
        }
    }

    /// Begins the way back. Durable when it returns; nothing happens once this was closed.
    pub(super) async fn begin(&self, bounds: Bounds) -> sled::Result<()> {
        let Some(meta) = self.lock().meta.clone() else { return Ok(()) };
        meta.insert(MARK, encode(&bounds))?;
        meta.flush_async().await?;
        self.lock().standing = Standing::Returning(bounds);
        Ok(())
    }

    /// Ends it once this entry is applied here. Gives whether it has ended.
    pub(super) async fn applied(&self, index: u64) -> sled::Result<bool> {
        let Standing::Returning(bounds) = self.standing() else { return Ok(true) };
        // A new fabric has begun with the first entry that a leader wrote.
        if index < bounds.last_log.unwrap_or(1) {
            return Ok(false);
        }
        let Some(meta) = self.lock().meta.clone() else { return Ok(false) };
        meta.remove(MARK)?;
        meta.flush_async().await?;
        *self.lock() = Now { standing: Standing::Full, meta: None };
        self.full.send_replace(true);
        Ok(true)
    }

    fn lock(&self) -> MutexGuard<'_, Now> {
        // Only plain assignments happen while it is held.
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(term: u64, last_log: Option<u64>, remembers: bool) -> Known {
        Known { term, last_log, remembers }
    }

    #[test]
    fn all_others_together_say_whether_a_fabric_is_new_and_what_bounds_a_return() {
        let empty = known(0, None, false);
        let bounds = |term, last_log| Verdict::Return(Bounds { term, last_log });
        let table = [
            (vec![], bounds(0, None), "a fabric of one member"),
            (vec![empty, empty], bounds(0, None), "all are new"),
            (vec![known(3, Some(0), false), empty], bounds(0, None), "one stands for election"),
            (
                vec![known(5, Some(90), true), known(7, Some(80), true)],
                bounds(7, Some(90)),
                "the latest term and the last entry, whoever has them",
            ),
            (vec![known(5, Some(90), true), empty], Verdict::TooMuchLost, "another one lost it"),
        ];
        for (others, expected, why) in table {
            assert_eq!(judge(&others), expected, "{why}");
        }
    }

    #[tokio::test]
    async fn what_was_lost_is_not_promised_again_and_a_restart_does_not_change_that() {
        let db = sled::Config::new().temporary(true).open().expect("a database");
        let meta = db.open_tree("meta").expect("a tree");
        let load = |empty| {
            let mark = meta.get(MARK).expect("read");
            let mark = mark.map(|bytes| serde_json::from_slice(&bytes).expect("what was written"));
            Admission::new(meta.clone(), mark, empty)
        };
        let member = load(true);
        assert_eq!((member.takes(9), member.votes()), (Err(NotYet::Empty), Err(NotYet::Empty)));

        member.begin(Bounds { term: 4, last_log: Some(10) }).await.expect("kept");
        for member in [member, load(false)] {
            assert_eq!(member.takes(3), Err(NotYet::OldTerm(3)), "a leader that was replaced");
            assert_eq!(member.takes(4), Ok(()));
            assert_eq!(member.votes(), Err(NotYet::Behind(10)));
            assert!(!member.applied(9).await.expect("asked"));
        }
        let member = load(false);
        assert!(member.applied(10).await.expect("ended"));
        assert_eq!((member.takes(1), member.votes()), (Ok(()), Ok(())), "openraft's own rules");
        assert_eq!(load(false).standing(), Standing::Full);

        let new = load(true);
        new.begin(Bounds { term: 0, last_log: None }).await.expect("kept");
        assert_eq!((new.votes(), new.takes(1)), (Ok(()), Ok(())));
        assert!(new.applied(1).await.expect("begun"));
    }
}
