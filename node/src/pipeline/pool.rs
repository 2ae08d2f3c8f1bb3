//! Worker threads and bytes in flight, shared by all jobs of a host.

use std::sync::Arc;

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
}

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
        }
    }

    /// Waits until `bytes` more may be in memory (more than there are at all count as all).
    pub async fn reserve(&self, bytes: usize) -> OwnedSemaphorePermit {
        let units = u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX).min(self.capacity);
        self.budget.clone().acquire_many_owned(units).await.expect("the semaphore is never closed")
    }

    /// Runs work that blocks or computes on a worker thread.
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
