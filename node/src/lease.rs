//! A job's lease, by the agent's own monotonic clock.
//!
//! The leader renews while it is provably leader, as the answer to a heartbeat of ours; a lease's life counts from the
//! moment that heartbeat was *sent*. Without a renewal for the cutoff the job closes its handles and makes no hypervisor
//! call; once lost, a lease stays lost, however many renewals arrive late (a process that was stopped finds them all in
//! its socket when it wakes up). A lease that was never renewed may have lain in a buffer, too: it allows reading only.
//! Every mutating call of the hypervisor asks [`Lease::may_mutate`] right before it is made.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use outrider_process::clock::Clock;
use outrider_proto::ids::{JobId, LeaseEpoch};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Why a job may not go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LeaseLost {
    /// No renewal within the cutoff.
    #[error(
        "the lease of job {job} (epoch {epoch}) was not renewed within {cutoff:?}: the coordinators could not be reached, \
         or this process was stopped; whoever gets the next lease goes on"
    )]
    NotRenewed {
        /// Job.
        job: JobId,
        /// Lease.
        epoch: LeaseEpoch,
        /// Bound.
        cutoff: Duration,
    },
    /// The coordinator ended it.
    #[error("the lease of job {job} (epoch {epoch}) was ended: {reason}")]
    Ended {
        /// Job.
        job: JobId,
        /// Lease.
        epoch: LeaseEpoch,
        /// The coordinator's word, such as `superseded`.
        reason: String,
    },
    /// The old host has not said yet that it closed its handles.
    #[error(
        "job {job} may read but not change anything yet: the host that worked on it before has not closed its files"
    )]
    PredecessorOpen {
        /// Job.
        job: JobId,
    },
    /// No heartbeat was answered since the lease arrived.
    #[error(
        "job {job} may read but not change anything yet: its lease was not confirmed by the answer to a heartbeat"
    )]
    NeverRenewed {
        /// Job.
        job: JobId,
    },
}

/// One lease. Cheap to share.
#[derive(Clone)]
pub struct Lease {
    inner: Arc<Inner>,
}

struct Inner {
    job: JobId,
    epoch: LeaseEpoch,
    cutoff: Duration,
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
    held_back: watch::Sender<HeldBack>,
    stop: CancellationToken,
}

/// What keeps a job from changing anything, though its lease lives.
#[derive(Debug, Clone, Copy)]
struct HeldBack {
    predecessor_open: bool,
    never_renewed: bool,
}

struct State {
    renewed: Duration,
    lost: Option<LeaseLost>,
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Lease({} epoch {})", self.inner.job, self.inner.epoch)
    }
}

impl Lease {
    /// A lease that arrived just now.
    pub fn granted(
        job: JobId,
        epoch: LeaseEpoch,
        cutoff: Duration,
        predecessor_open: bool,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let state = Mutex::new(State { renewed: clock.monotonic(), lost: None });
        Self {
            inner: Arc::new(Inner {
                job,
                epoch,
                cutoff,
                clock,
                state,
                held_back: watch::Sender::new(HeldBack { predecessor_open, never_renewed: true }),
                stop: CancellationToken::new(),
            }),
        }
    }

    /// The job.
    pub fn job(&self) -> JobId {
        self.inner.job
    }

    /// The lease's number.
    pub fn epoch(&self) -> LeaseEpoch {
        self.inner.epoch
    }

    /// Whether work may go on (reading, sending).
    ///
    /// # Errors
    /// [`LeaseLost`], for ever.
    pub fn check(&self) -> Result<(), LeaseLost> {
        let lost = self.inner.looked_at().lost.clone();
        match lost {
            Some(lost) => {
                self.inner.stop.cancel();
                Err(lost)
            }
            None => Ok(()),
        }
    }

    /// Whether a call that changes something at the hypervisor may be made now.
    ///
    /// # Errors
    /// [`LeaseLost::PredecessorOpen`] passes by itself; the others do not.
    pub fn may_mutate(&self) -> Result<(), LeaseLost> {
        self.check()?;
        let held_back = *self.inner.held_back.borrow();
        if held_back.never_renewed {
            return Err(LeaseLost::NeverRenewed { job: self.inner.job });
        }
        if held_back.predecessor_open {
            return Err(LeaseLost::PredecessorOpen { job: self.inner.job });
        }
        Ok(())
    }

    /// Waits until [`Lease::may_mutate`], or the lease is lost.
    ///
    /// # Errors
    /// [`LeaseLost`].
    pub async fn wait_to_mutate(&self) -> Result<(), LeaseLost> {
        let mut held_back = self.inner.held_back.subscribe();
        tokio::select! {
            lost = self.lost() => Err(lost),
            // The sender lives as long as `self`.
            _ = held_back.wait_for(|h| !h.predecessor_open && !h.never_renewed) => self.may_mutate(),
        }
    }

    /// The predecessor said that its files are closed.
    pub fn predecessor_closed(&self) {
        self.inner.held_back.send_modify(|h| h.predecessor_open = false);
    }

    /// A renewal arrived, in answer to the heartbeat sent at `sent` (our monotonic clock). One that comes too late
    /// changes nothing.
    pub fn renew(&self, sent: Duration) {
        let mut state = self.inner.looked_at();
        if state.lost.is_some() {
            return;
        }
        state.renewed = state.renewed.max(sent);
        drop(state);
        self.inner.held_back.send_if_modified(|h| std::mem::take(&mut h.never_renewed));
    }

    /// The coordinator ended the lease.
    pub fn end(&self, reason: &str) {
        let mut state = self.inner.looked_at();
        if state.lost.is_none() {
            state.lost = Some(LeaseLost::Ended {
                job: self.inner.job,
                epoch: self.inner.epoch,
                reason: reason.to_owned(),
            });
        }
        drop(state);
        self.inner.stop.cancel();
    }

    /// Returns when the lease is lost, and why. Looks at the clock again at every possible cutoff.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn lost(&self) -> LeaseLost {
        loop {
            let left = {
                let state = self.inner.looked_at();
                if let Some(lost) = &state.lost {
                    let lost = lost.clone();
                    drop(state);
                    self.inner.stop.cancel();
                    return lost;
                }
                let age = self.inner.clock.monotonic().saturating_sub(state.renewed);
                self.inner.cutoff.saturating_sub(age)
            };
            tokio::select! {
                () = self.inner.stop.cancelled() => {}
                () = tokio::time::sleep(left.max(Duration::from_millis(1))) => {}
            }
        }
    }

    /// Cancelled once the loss of the lease was noticed.
    pub fn stopped(&self) -> CancellationToken {
        self.inner.stop.clone()
    }
}

impl Inner {
    /// The state, after a look at the clock.
    fn looked_at(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is held.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let age = self.clock.monotonic().saturating_sub(state.renewed);
        if state.lost.is_none() && age >= self.cutoff {
            state.lost = Some(LeaseLost::NotRenewed {
                job: self.job,
                epoch: self.epoch,
                cutoff: self.cutoff,
            });
        }
        state
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrider_process::clock::ManualClock;

    fn lease(predecessor_open: bool) -> (Lease, Arc<ManualClock>) {
        let clock = Arc::new(ManualClock::at(0));
        let lease = Lease::granted(
            JobId::random(),
            LeaseEpoch(3),
            Duration::from_secs(20),
            predecessor_open,
            clock.clone(),
        );
        (lease, clock)
    }

    #[test]
    fn a_lease_ends_at_the_cutoff_and_no_late_renewal_revives_it() {
        let (lease, clock) = lease(false);
        clock.advance(Duration::from_secs(19));
        lease.renew(clock.monotonic());
        clock.advance(Duration::from_secs(19));
        assert_eq!(lease.may_mutate(), Ok(()));
        clock.advance(Duration::from_secs(1));
        lease.renew(clock.monotonic());
        assert!(matches!(lease.may_mutate(), Err(LeaseLost::NotRenewed { .. })));
        lease.renew(clock.monotonic());
        assert!(matches!(lease.check(), Err(LeaseLost::NotRenewed { .. })));
        assert!(lease.stopped().is_cancelled());
    }

    #[test]
    fn a_lease_that_lay_in_a_buffer_changes_nothing() {
        let (lease, clock) = lease(false);
        assert!(matches!(lease.may_mutate(), Err(LeaseLost::NeverRenewed { .. })));
        clock.advance(Duration::from_secs(15));
        // The answer to a heartbeat that was sent long ago: it does not count from its arrival.
        lease.renew(Duration::from_secs(1));
        assert_eq!(lease.may_mutate(), Ok(()));
        clock.advance(Duration::from_secs(6));
        assert!(matches!(lease.check(), Err(LeaseLost::NotRenewed { .. })));
    }

    #[tokio::test]
    async fn nothing_is_changed_before_the_predecessor_closed_its_files() {
        let (lease, clock) = lease(true);
        lease.renew(clock.monotonic());
        assert_eq!(lease.check(), Ok(()));
        assert!(matches!(lease.may_mutate(), Err(LeaseLost::PredecessorOpen { .. })));
        let waiting = tokio::spawn({
            let lease = lease.clone();
            async move { lease.wait_to_mutate().await }
        });
        lease.predecessor_closed();
        assert_eq!(waiting.await.expect("no panic"), Ok(()));
    }

    #[tokio::test]
    async fn a_superseded_job_is_told_at_once() {
        let (lease, _clock) = lease(false);
        let waiting = tokio::spawn({
            let lease = lease.clone();
            async move { lease.lost().await }
        });
        lease.end("superseded");
        let lost = waiting.await.expect("no panic");
        assert!(lost.to_string().contains("superseded"), "{lost}");
        assert_eq!(lease.check(), Err(lost));
    }
}
