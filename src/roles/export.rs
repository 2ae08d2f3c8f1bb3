//! A restore by the operator's own machine: keys and ticket from the coordinators, chunks from the storage nodes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use outrider_node::pipeline::Pool;
use outrider_node::restore::{self, Reader};
use outrider_node::store::ClientStore;
use outrider_proto::ids::{FabricId, JobId, LeaseEpoch, WriterId};
use outrider_proto::layout::Layout;
use outrider_proto::model;
use outrider_proto::seal::{DomainKeys, Sealer};
use outrider_storage_client::{ClientRole, JobAccess, Limits, StoreClient};
use tokio::sync::watch;

use crate::operator::Operator;
use crate::report::Failure;

/// Plain bytes in memory at a time.
const IN_FLIGHT: usize = 32 << 20;
/// How long connections to storage nodes may take to close.
const GRACE: Duration = Duration::from_secs(2);

/// What of a recovery point is exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What<'a> {
    /// The disks at the point.
    Point,
    /// The disks at a checkpoint of the point, by its name or GUID.
    Checkpoint(&'a str),
    /// The disks at the point and at each checkpoint, as differencing disks.
    Tree,
}

/// Writes the disks of a recovery point into a folder, which is made if it is missing; gives the files in the order of
/// the VM's slots.
pub(crate) async fn export_disks(
    operator: &Operator,
    point: &str,
    what: What<'_>,
    to: &Path,
) -> Result<Vec<PathBuf>, Failure> {
    let access = operator.read_access(point).await?;
    let point = model::required("ReadAccessReply", "point", access.point.as_ref())?;
    let keys = model::required("ReadAccessReply", "keys", access.keys.as_ref())?;
    let layout = model::required("ReadAccessReply", "layout", access.layout.as_ref())?;
    let layout = Layout::try_from(layout)?;
    let keys = Arc::new(DomainKeys::try_from(keys)?);
    let peer = operator.identity().peer();
    let fabric: FabricId = peer.fabric.parse()?;
    let manifest_id = model::parse("Point", "manifest_id", &point.manifest_id)?;
    std::fs::create_dir_all(to)
        .map_err(|e| Failure::from(e).during(format!("cannot make {}", to.display())))?;

    // The layout does not change under one export: a node that is gone is passed over.
    let (_layout, seen) = watch::channel(layout);
    let limits = Limits { in_flight: IN_FLIGHT, ..Limits::default() };
    let client = StoreClient::new(operator.identity(), fabric, seen, ClientRole::Operator, limits)?;
    let store = client.open_job(JobAccess {
        // Reads belong to no window; what they may do stands in the ticket.
        job: JobId::random(),
        ticket: Bytes::from(access.ticket.clone()),
        lease_epoch: LeaseEpoch(0),
    });
    let workers = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let reader = Reader {
        store: Arc::new(ClientStore(store)),
        sealer: Sealer::new(keys, WriterId::of(fabric, &peer.name)),
        pool: Pool::new(workers, IN_FLIGHT),
    };
    let result = async {
        let manifest = restore::fetch_manifest(&reader, manifest_id).await?;
        Ok(match what {
            What::Point => restore::export_disks(&reader, &manifest, to).await?,
            What::Checkpoint(wanted) => {
                let then = manifest.at(wanted).map_err(|e| Failure::usage(e.to_string()))?;
                restore::export_disks(&reader, &then, to).await?
            }
            What::Tree => {
                let files = restore::export_tree(&reader, &manifest, to).await?;
                files.into_iter().map(|f| f.path).collect()
            }
        })
    };
    let result: Result<_, Failure> = Box::pin(result).await;
    drop(reader);
    client.shutdown(GRACE).await;
    result.map_err(|f| {
        f.during(format!("cannot export recovery point {} to {}", point.point_id, to.display()))
    })
}
