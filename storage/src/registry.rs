//! The stream to the leading coordinator: who we are and how we are; layout and ticket key come back.
//!
//! The last of both is kept in a file, so that a node that starts before any coordinator can serve at once.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use outrider_process::backoff::Backoff;
use outrider_process::fs::{self, FsError};
use outrider_process::leader::LeaderClient;
use outrider_proto::ids::FabricId;
use outrider_proto::layout::{Layout, StorageNode};
use outrider_proto::rpc;
use outrider_proto::rpc::storage_registry_client::StorageRegistryClient;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::metrics::StorageMetrics;
use crate::store::Store;

/// File of the last known facts in the data folder.
const FILE: &str = "fabric-facts";

/// What coordinators told last.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Facts {
    /// Layout.
    pub layout: Layout,
    /// Public key of tickets.
    pub ticket_key: Option<[u8; 32]>,
}

impl Facts {
    /// The facts kept in a data folder; empty when there are none that can be read.
    #[must_use]
    pub fn load(dir: &Path) -> Self {
        let read = std::fs::read(dir.join(FILE)).ok();
        read.and_then(|bytes| postcard::from_bytes(&bytes).ok()).unwrap_or_default()
    }

    /// Keeps them.
    ///
    /// # Errors
    /// [`FsError`].
    pub fn save(&self, dir: &Path) -> Result<(), FsError> {
        let bytes = postcard::to_stdvec(self).expect("numbers and text always encode");
        fs::write_atomic(&dir.join(FILE), &bytes)
    }
}

/// The task that keeps the stream.
pub struct Registry {
    /// Finds the leader.
    pub leader: Arc<LeaderClient>,
    /// Fabric.
    pub fabric: FabricId,
    /// How this node describes itself.
    pub node: StorageNode,
    /// Store, for the status.
    pub store: Arc<Store>,
    /// Figures.
    pub metrics: StorageMetrics,
    /// Where the layout goes.
    pub layout: watch::Sender<Layout>,
    /// Where the ticket key goes.
    pub ticket_key: watch::Sender<Option<[u8; 32]>>,
    /// Whether something may be missing here.
    pub incomplete: watch::Receiver<bool>,
    /// Data folder.
    pub dir: PathBuf,
    /// Pause between two reports.
    pub every: Duration,
}

impl Registry {
    /// Attaches again and again until cancelled.
    pub async fn run(self, token: CancellationToken) {
        let mut pauses =
            Backoff::new(Duration::from_millis(50), Duration::from_secs(2), Backoff::any_seed());
        loop {
            let attached = tokio::select! {
                attached = self.attach(&mut pauses) => attached,
                () = token.cancelled() => return,
            };
            if let Err(status) = attached {
                tracing::debug!(%status, "the stream to the leader ended");
                self.leader.learn(&status);
            }
            tokio::select! {
                () = tokio::time::sleep(pauses.next_wait()) => {}
                () = token.cancelled() => return,
            }
        }
    }

    async fn attach(&self, pauses: &mut Backoff) -> Result<(), Status> {
        let channel = self.leader.channel().await?;
        let (up, outgoing) = mpsc::channel(4);
        let hello = rpc::StorageHello {
            node: Some((&self.node).into()),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        self.send(&up, rpc::storage_up::What::Hello(hello)).await?;
        let outgoing = futures::stream::unfold(outgoing, |mut outgoing| async move {
            outgoing.recv().await.map(|message| (message, outgoing))
        });
        let mut down = StorageRegistryClient::new(channel).attach(outgoing).await?.into_inner();
        tracing::info!(leader = self.leader.target(), "attached to the leader");
        let mut reports = tokio::time::interval(self.every);
        loop {
            tokio::select! {
                message = down.message() => {
                    let Some(message) = message? else { return Ok(()) };
                    pauses.reset();
                    self.take(message)?;
                }
                _ = reports.tick() => {
                    self.send(&up, rpc::storage_up::What::Status(self.status())).await?;
                }
            }
        }
    }

    async fn send(
        &self,
        up: &mpsc::Sender<rpc::StorageUp>,
        what: rpc::storage_up::What,
    ) -> Result<(), Status> {
        let message = rpc::StorageUp { what: Some(what) };
        up.send(message).await.map_err(|_| Status::unavailable("the stream to the leader ended"))
    }

    fn take(&self, message: rpc::StorageDown) -> Result<(), Status> {
        match message.what {
            Some(rpc::storage_down::What::Layout(layout)) => {
                let layout = Layout::try_from(&layout)?;
                // A leader that lags behind must not take us back.
                if layout.epoch >= self.layout.borrow().epoch {
                    self.layout.send_if_modified(|now| {
                        let changed = *now != layout;
                        *now = layout;
                        changed
                    });
                }
            }
            Some(rpc::storage_down::What::Facts(facts)) => {
                if facts.fabric != self.fabric.to_string() {
                    return Err(Status::failed_precondition(format!(
                        "the coordinator is of fabric {}, this node of {}",
                        facts.fabric, self.fabric
                    )));
                }
                let key = facts.ticket_key.try_into().map_err(|_| {
                    Status::invalid_argument("the coordinator's ticket key is no Ed25519 key")
                })?;
                self.ticket_key.send_if_modified(|now| {
                    let changed = *now != Some(key);
                    *now = Some(key);
                    changed
                });
            }
            None => {}
        }
        let facts =
            Facts { layout: self.layout.borrow().clone(), ticket_key: *self.ticket_key.borrow() };
        if let Err(error) = facts.save(&self.dir) {
            tracing::warn!(%error, "the layout was not kept; this node will need a coordinator at its next start");
        }
        Ok(())
    }

    fn status(&self) -> rpc::StorageStatus {
        let status = self.metrics.observe(&self.store);
        let catching_up = *self.incomplete.borrow();
        let state = match (&status.failed, status.full, catching_up) {
            (Some(_), _, _) => "read-only",
            (None, true, _) => "full",
            (None, false, true) => "catching up",
            (None, false, false) => "serving",
        };
        rpc::StorageStatus {
            incarnation: self.store.incarnation().0,
            stored_bytes: status.stored_bytes,
            free_bytes: status.free_bytes,
            chunks: status.chunks,
            segments: status.segments,
            state: state.to_owned(),
            catching_up_ids: u64::try_from(self.metrics.catching_up.get()).unwrap_or(0),
            damaged_records: status.damaged,
        }
    }
}
