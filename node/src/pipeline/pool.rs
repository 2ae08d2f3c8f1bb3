//! Worker threads and bytes in flight, shared by all jobs of a host.
//!
//! A read of a source may stand still for as long as its volume does, and nobody can end it from outside. One that stands
//! gives back what it holds of both, so that a volume that is away never keeps other jobs from theirs. What it holds in
//! truth, a thread and its bytes, is bounded by [`Turns`]: as many reads of one job at once as there are workers.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A worker thread panicked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a worker thread of the agent failed; please report this with the agent's log")]
pub struct PoolError;

/// Bounds what reads, hashes, compresses and encrypts at the same time, and how many plain bytes wait for it. Cheap to
/// clone.
#[derive(Debug, Clone)]
pub struct Pool {
    workers: Arc<Semaphore>,
    budget: Arc<Semaphore>,
    capacity: u32,
    count: usize,
    stands: Duration,
}

/// The reads of one job that may be under way at once.
#[derive(Debug, Clone)]
pub struct Turns(Arc<Semaphore>);

impl Turns {
    /// Waits for a turn; it is over when this is dropped.
    pub async fn next(&self) -> OwnedSemaphorePermit {
        self.0.clone().acquire_owned().await.expect("the semaphore is never closed")
    }
}

/// After this a read counts as one that stands still.
const STANDS: Duration = Duration::from_secs(1);

/// The budget counts KiB, so that a semaphore's range is enough.
const UNIT: usize = 1 << 10;

impl Pool {
    /// `workers` threads, `bytes` in flight.
    #[must_use]
    pub fn new(workers: usize, bytes: usize) -> Self {
        let capacity = u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX).max(1);
        Self {
            workers: Arc::new(Semaphore::new(workers.max(1))),
            budget: Arc::new(Semaphore::new(capacity as usize)),
            capacity,
            count: workers.max(1),
            stands: STANDS,
        }
    }

    /// Turns for one job.
    #[must_use]
    pub fn turns(&self) -> Turns {
        Turns(Arc::new(Semaphore::new(self.count)))
    }

    /// Waits until `bytes` more may be in memory (more than there are at all count as all).
    pub async fn reserve(&self, bytes: usize) -> OwnedSemaphorePermit {
        let units = u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX).min(self.capacity);
        self.budget.clone().acquire_many_owned(units).await.expect("the semaphore is never closed")
    }

    /// Runs work that touches a source, whose volume may be away, on a worker thread; `bytes` more are in memory until the
    /// permit that comes with the answer is dropped. Work that stands still counts neither as a worker nor with its bytes
    /// until it goes on.
    ///
    /// # Errors
    /// [`PoolError`] when it panicked.
    ///
    /// # Cancel safety
    /// Work that has begun goes on when the future is dropped, and holds nothing of the pool.
    pub async fn read<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<(T, OwnedSemaphorePermit), PoolError> {
        let budget = self.reserve(bytes).await;
        let worker =
            self.workers.clone().acquire_owned().await.expect("the semaphore is never closed");
        let span = tracing::Span::current();
        let mut running = tokio::task::spawn_blocking(move || span.in_scope(work));
        if let Ok(done) = tokio::time::timeout(self.stands, &mut running).await {
            return Ok((done.map_err(|_| PoolError)?, budget));
        }
        drop((worker, budget));
        let done = running.await.map_err(|_| PoolError)?;
        // What is done with it now counts again.
        Ok((done, self.reserve(bytes).await))
    }

    /// Runs work that blocks or computes, and never waits for a source, on a worker thread.
    ///
    /// # Errors
    /// [`PoolError`] when it panicked.
    ///
    /// # Cancel safety
    /// Work that has begun goes on when the future is dropped.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, PoolError> {
        let worker =
            self.workers.clone().acquire_owned().await.expect("the semaphore is never closed");
        let span = tracing::Span::current();
        tokio::task::spawn_blocking(move || {
            let _worker = worker;
            span.in_scope(work)
        })
        .await
        .map_err(|_| PoolError)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);
    const ALL: usize = 1 << 20;

    #[tokio::test]
    async fn a_read_that_stands_keeps_nobody_from_thread_or_memory() {
        let pool = Pool { stands: Duration::from_millis(10), ..Pool::new(1, ALL) };
        let (goes_on, volume) = std::sync::mpsc::sync_channel::<u32>(1);
        let standing = pool.clone();
        let standing =
            tokio::spawn(async move { standing.read(ALL, move || volume.recv().ok()).await });
        let others = async {
            for n in 0..3 {
                let _all = pool.reserve(ALL).await;
                assert_eq!(pool.run(move || n).await, Ok(n));
            }
        };
        tokio::time::timeout(LONG, others).await.expect("the others go on");
        assert!(!standing.is_finished());
        goes_on.send(7).expect("it waits");
        let done = tokio::time::timeout(LONG, standing).await.expect("in time").expect("no panic");
        let (value, budget) = done.expect("read");
        assert_eq!(value, Some(7));
        assert_eq!(pool.budget.available_permits(), 0, "what was read counts again");
        drop(budget);
        assert_eq!(pool.workers.available_permits(), 1);
        assert_eq!(pool.budget.available_permits(), ALL / UNIT);
    }

    #[tokio::test]
    async fn a_read_that_does_not_stand_holds_its_worker_and_a_job_has_so_many_turns() {
        let pool = Pool { stands: LONG, ..Pool::new(1, ALL) };
        let (goes_on, volume) = std::sync::mpsc::sync_channel::<()>(1);
        let reading = pool.clone();
        let reading = tokio::spawn(async move { reading.read(1, move || volume.recv()).await });
        while pool.workers.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let soon = Duration::from_millis(50);
        tokio::time::timeout(soon, pool.run(|| ())).await.expect_err("its worker reads");
        goes_on.send(()).expect("it reads");
        reading.await.expect("no panic").expect("read").0.expect("sent");
        let turns = pool.turns();
        let first = turns.next().await;
        tokio::time::timeout(soon, turns.next()).await.expect_err("one at once");
        drop(first);
        drop(tokio::time::timeout(LONG, turns.next()).await.expect("the next one"));
    }
}
