//! The client of one process: one transport, one view of the layout, a store per job.

use std::sync::Arc;

use bytes::Bytes;
use outrider_process::identity::Identity;
use outrider_process::network::Network;
use outrider_process::tasks::TaskGroup;
use outrider_proto::ids::{FabricId, JobId, LeaseEpoch};
use outrider_proto::layout::Layout;
use tokio::sync::watch;

use crate::error::TransportError;
use crate::job::JobStore;
use crate::limits::Limits;
use crate::quic::QuicTransport;
use crate::transport::{ChunkTransport, ClientRole};

/// What a job shows to storage nodes.
#[derive(Debug, Clone)]
pub struct JobAccess {
    /// Job.
    pub job: JobId,
    /// Its ticket, as the coordinator signed it.
    pub ticket: Bytes,
    /// Lease under which it runs: the fence of its journal.
    pub lease_epoch: LeaseEpoch,
}

/// Opens stores for jobs.
pub struct StoreClient {
    transport: Arc<dyn ChunkTransport>,
    layout: watch::Receiver<Layout>,
    limits: Limits,
    tasks: TaskGroup,
}

impl StoreClient {
    /// A client over QUIC.
    ///
    /// # Errors
    /// [`TransportError::Unreachable`] when the system gives no UDP socket, or the identity cannot be used for TLS.
    pub fn new(
        identity: &Identity,
        fabric: FabricId,
        layout: watch::Receiver<Layout>,
        role: ClientRole,
        limits: Limits,
    ) -> Result<Self, TransportError> {
        Self::through(identity, fabric, layout, role, limits, Network::default())
    }

    /// A client over QUIC that connects over these networks only.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn through(
        identity: &Identity,
        fabric: FabricId,
        layout: watch::Receiver<Layout>,
        role: ClientRole,
        limits: Limits,
        network: Network,
    ) -> Result<Self, TransportError> {
        let transport = QuicTransport::new(identity, fabric, role, &limits)?.over(network);
        Ok(Self::over(Arc::new(transport), layout, limits))
    }

    /// A client over any transport.
    #[must_use]
    pub fn over(
        transport: Arc<dyn ChunkTransport>,
        layout: watch::Receiver<Layout>,
        limits: Limits,
    ) -> Self {
        Self { transport, layout, limits, tasks: TaskGroup::new("storage-client") }
    }

    /// The store of one job. Connections are made when they are needed.
    #[must_use]
    pub fn open_job(&self, access: JobAccess) -> JobStore {
        JobStore::new(
            Arc::clone(&self.transport),
            self.layout.clone(),
            self.limits.clone(),
            access,
            self.tasks.child("job"),
        )
    }

    /// The layout as it is now.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.layout.borrow().clone()
    }

    /// Stops all stores of this client and waits for their tasks.
    pub async fn shutdown(self, grace: std::time::Duration) {
        let report = self.tasks.shutdown(grace).await;
        tracing::debug!(%report, "storage client closed");
    }
}

impl std::fmt::Debug for StoreClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoreClient").field("limits", &self.limits).finish_non_exhaustive()
    }
}
