//! The whole: the agent's own pipeline, from a disk to one storage node, with the storage node's own server.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use outrider_disk::{ReadDisk, open_disk};
use outrider_node::lease::Lease;
use outrider_node::pipeline::{Bounds, DiskJob, DiskPlan, Pipeline, Pool, Stats};
use outrider_node::store::ClientStore;
use outrider_process::clock::SystemClock;
use outrider_process::config;
use outrider_process::identity::{Identity, SigningKey};
use outrider_process::metrics::Metrics;
use outrider_process::tasks::TaskGroup;
use outrider_proto::ids::{FabricId, JobId, LayoutEpoch, LeaseEpoch, VmGuid};
use outrider_proto::layout::Layout;
use outrider_proto::seal::Sealer;
use outrider_proto::ticket::{Operations, Ticket};
use outrider_storage::StorageServer;
use outrider_storage_client::{ClientRole, JobAccess, Limits, StoreClient};
use ring::signature::{Ed25519KeyPair, KeyPair};
use tokio::sync::watch;

use super::sample::CHUNK;
use crate::report::Failure;

/// As the agent's defaults.
const READ: usize = 4 << 20;
const IN_FLIGHT: usize = 32 << 20;
const BARRIER_BYTES: u64 = 256 << 20;
const BARRIER_INTERVAL: Duration = Duration::from_secs(5);
/// Longer than any run.
const DAY: Duration = Duration::from_secs(86_400);
const GRACE: Duration = Duration::from_secs(5);

/// What a run needs.
pub(super) struct Whole<'a> {
    pub(super) disk: &'a Path,
    pub(super) dir: &'a Path,
    pub(super) fabric: FabricId,
    pub(super) storage: Arc<Identity>,
    pub(super) agent: &'a Identity,
    pub(super) sealer: Sealer,
    pub(super) workers: usize,
}

impl Whole<'_> {
    /// Captures the disk once, until everything is durable; gives the guest bytes read, and the time.
    pub(super) async fn run(self) -> Result<(u64, Duration), Failure> {
        let tasks = TaskGroup::new("bench");
        let config = self.storage_config()?;
        let mut metrics = Metrics::new("storage", &config.name);
        let server = StorageServer::start(
            &config,
            self.storage.clone(),
            &mut metrics,
            tasks.child("storage"),
        )
        .await?;
        let layout = Layout {
            epoch: LayoutEpoch(1),
            replicas: 1,
            min_durable: 1,
            nodes: vec![server.described.clone()],
            pgs: vec![vec![0]; 64],
        };
        let signer = Ed25519KeyPair::from_pkcs8(SigningKey::generate_pkcs8().expose())
            .map_err(|e| Failure::new(format!("no key for tickets: {e}")))?;
        let ticket_key: [u8; 32] = signer.public_key().as_ref().try_into()?;
        server.ticket_key.send_replace(Some(ticket_key));
        server.layout.send_replace(layout.clone());

        let job = JobId::random();
        let (_layout, seen) = watch::channel(layout);
        let limits = Limits { in_flight: IN_FLIGHT, ..Limits::default() };
        let client = StoreClient::new(self.agent, self.fabric, seen, ClientRole::Agent, limits)?;
        let store = client.open_job(JobAccess {
            job,
            ticket: Bytes::from(self.ticket(job).sign(&signer)),
            lease_epoch: LeaseEpoch(1),
        });
        let result = self.capture(job, store).await;
        client.shutdown(GRACE).await;
        server.shutdown().await;
        let report = tasks.shutdown(GRACE).await;
        if !report.is_clean() {
            return Err(Failure::new(report.to_string()));
        }
        result
    }

    fn storage_config(&self) -> Result<outrider_storage::Config, Failure> {
        let mut table = toml::Table::new();
        let texts = [
            ("name", self.storage.peer().name.clone()),
            ("identity_dir", self.storage.dir().display().to_string()),
            ("fabric", self.fabric.to_string()),
            ("data_dir", self.dir.display().to_string()),
            ("listen", "127.0.0.1:0".to_owned()),
        ];
        for (key, value) in texts {
            table.insert(key.to_owned(), value.into());
        }
        table.insert("coordinators".to_owned(), toml::Value::Array(vec![]));
        Ok(config::parse(Path::new("bench"), &toml::to_string(&table)?, |_| None)?)
    }

    fn ticket(&self, job: JobId) -> Ticket {
        Ticket {
            operations: Operations::BACKUP,
            fabric: self.fabric,
            job,
            vm: VmGuid::random(),
            domain: self.sealer.domain(),
            lease_epoch: LeaseEpoch(1),
            not_after_unix_ms: u64::MAX,
            host: self.agent.peer().name.clone(),
        }
    }

    async fn capture(
        self,
        job: JobId,
        store: outrider_storage_client::JobStore,
    ) -> Result<(u64, Duration), Failure> {
        let source: Arc<dyn ReadDisk> = Arc::from(open_disk(self.disk)?);
        let allocated = source.allocated()?;
        let chunk = u32::try_from(CHUNK)?;
        let plan = DiskPlan::full(source.info().size, chunk, &allocated);
        let lease = Lease::granted(job, LeaseEpoch(1), DAY, false, Arc::new(SystemClock::new()));
        let stats = Arc::new(Stats::default());
        let bounds = Bounds {
            read_size: READ,
            barrier_bytes: BARRIER_BYTES,
            barrier_interval: BARRIER_INTERVAL,
        };
        let pipeline = Pipeline::new(
            Arc::new(ClientStore(store)),
            self.sealer,
            Pool::new(self.workers, IN_FLIGHT),
            lease,
            Arc::clone(&stats),
            bounds,
            chunk,
            vec![DiskJob { source, plan }],
        );
        let began = Instant::now();
        pipeline.capture().await?;
        if !pipeline.flush().await? {
            return Err(Failure::new("the storage node lost records on the way; its log says why"));
        }
        let took = began.elapsed();
        Ok((stats.snapshot().read_bytes, took))
    }
}
