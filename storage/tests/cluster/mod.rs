//! Harness: storage nodes over real QUIC on loopback, with identities of one fabric.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use outrider_process::config::ByteSize;
use outrider_process::identity::ca::FabricCa;
use outrider_process::identity::{Identity, Role};
use outrider_process::metrics::Metrics;
use outrider_process::tasks::TaskGroup;
use outrider_proto::ids::{
    ChunkId, DomainId, FabricId, JobId, KeyEpoch, LayoutEpoch, LeaseEpoch, VmGuid, WriterId,
};
use outrider_proto::layout::{Layout, assign};
use outrider_proto::record::{Kind, Record};
use outrider_proto::seal::{DomainKeys, Key32, Sealer};
use outrider_proto::ticket::{Operations, Ticket};
use outrider_storage::StorageServer;
use outrider_storage::config::{Config, Limits};
use outrider_storage_client::quic::QuicTransport;
use outrider_storage_client::{ClientRole, JobAccess, JobStore, StoreClient};
use tokio::sync::watch;

pub const DEADLINE: Duration = Duration::from_secs(30);
const DAY: Duration = Duration::from_secs(24 * 3600);

pub struct Cluster {
    pub fabric: FabricId,
    pub ca: FabricCa,
    pub dir: tempfile::TempDir,
    pub tickets: Identity,
    pub nodes: BTreeMap<String, StorageServer>,
    pub layout: watch::Sender<Layout>,
    pub replicas: u8,
    pub min_durable: u8,
}

pub fn domain() -> DomainId {
    DomainId::from_bytes([1; 16])
}

pub fn sealer() -> Sealer {
    let keys = DomainKeys {
        domain: domain(),
        id_key: Key32([2; 32]),
        data_keys: BTreeMap::from([(KeyEpoch(1), Key32([3; 32]))]),
        current: KeyEpoch(1),
    };
    Sealer::new(Arc::new(keys), WriterId([4; 16]))
}

pub fn record(n: u32) -> Record {
    let sealer = sealer();
    // Bytes that do not shrink, so that segments fill.
    let mut plain = vec![0; 8 << 10];
    blake3::Hasher::new().update(&n.to_le_bytes()).finalize_xof().fill(&mut plain);
    sealer.seal(Kind::Data, sealer.chunk_id(&plain), &[], &plain).expect("sealed")
}

pub fn client_limits() -> outrider_storage_client::Limits {
    outrider_storage_client::Limits {
        first_pause: Duration::from_millis(5),
        longest_pause: Duration::from_millis(50),
        barrier_attempts: 3,
        ..Default::default()
    }
}

impl Cluster {
    pub async fn start(count: usize, replicas: u8, min_durable: u8) -> Self {
        let fabric = FabricId::random();
        let ca = FabricCa::create(&fabric.to_string()).expect("a fabric");
        let dir = tempfile::tempdir().expect("a directory");
        let tickets = issue(&ca, dir.path(), Role::Coordinator, "c1");
        let (layout, _) = watch::channel(Layout::default());
        let mut cluster = Self {
            fabric,
            ca,
            dir,
            tickets,
            nodes: BTreeMap::new(),
            layout,
            replicas,
            min_durable,
        };
        for n in 1..=count {
            cluster.start_node(&format!("s{n}")).await;
        }
        cluster.publish(1);
        cluster
    }

    pub fn config(&self, name: &str) -> Config {
        Config {
            name: name.to_owned(),
            identity_dir: self.dir.path().join(format!("storage-{name}")),
            observability: None,
            telemetry: Default::default(),
            log: Default::default(),
            fabric: self.fabric,
            data_dir: self.dir.path().join(format!("data-{name}")),
            listen: "127.0.0.1:0".parse().expect("an address"),
            advertise: vec![],
            coordinators: vec![],
            zone: String::new(),
            capacity: ByteSize::gib(1),
            segment_size: ByteSize::mib(1),
            limits: Limits {
                barrier: Duration::from_secs(3),
                forward_patience: Duration::from_millis(300),
                catch_up_every: Duration::from_millis(200),
                min_free: ByteSize::mib(1),
                ..Default::default()
            },
        }
    }

    pub async fn start_node(&mut self, name: &str) {
        let config = self.config(name);
        if !config.identity_dir.exists() {
            issue(&self.ca, self.dir.path(), Role::Storage, name);
        }
        let identity = Arc::new(Identity::load(&config.identity_dir).expect("loaded"));
        let mut metrics = Metrics::new("storage", name);
        let tasks = TaskGroup::new(name);
        let server = StorageServer::start(&config, identity, &mut metrics, tasks).await;
        let server = server.expect("started");
        server.ticket_key.send_replace(Some(self.tickets.signing_key().public_key()));
        self.nodes.insert(name.to_owned(), server);
    }

    /// Tells all nodes and clients the layout of the nodes that run, keeping the others as they were described.
    pub fn publish(&self, epoch: u64) {
        let mut layout = self.layout.borrow().clone();
        for server in self.nodes.values() {
            match layout.nodes.iter_mut().find(|n| n.name == server.described.name) {
                Some(known) => *known = server.described.clone(),
                None => layout.nodes.push(server.described.clone()),
            }
        }
        layout.epoch = LayoutEpoch(epoch);
        layout.replicas = self.replicas;
        layout.min_durable = self.min_durable;
        layout.pgs = assign(&layout.nodes, 8, self.replicas);
        self.layout.send_replace(layout.clone());
        for server in self.nodes.values() {
            server.layout.send_replace(layout.clone());
        }
    }

    pub async fn stop_node(&mut self, name: &str) {
        self.nodes.remove(name).expect("runs").shutdown().await;
    }

    pub fn ticket(&self, job: JobId, host: &str, operations: Operations) -> Ticket {
        Ticket {
            operations,
            fabric: self.fabric,
            job,
            vm: VmGuid::random(),
            domain: domain(),
            lease_epoch: LeaseEpoch(5),
            not_after_unix_ms: u64::MAX,
            host: host.to_owned(),
        }
    }

    pub fn agent(&self, host: &str) -> Identity {
        issue(&self.ca, self.dir.path(), Role::Node, host)
    }

    pub fn client(&self, identity: &Identity, role: ClientRole) -> StoreClient {
        StoreClient::new(identity, self.fabric, self.layout.subscribe(), role, client_limits())
            .expect("a client")
    }

    pub fn transport(&self, identity: &Identity, role: ClientRole) -> QuicTransport {
        QuicTransport::new(identity, self.fabric, role, &client_limits()).expect("a transport")
    }

    pub fn job(&self, client: &StoreClient, host: &str, operations: Operations) -> JobStore {
        let job = JobId::random();
        client.open_job(self.access(job, host, operations))
    }

    pub fn access(&self, job: JobId, host: &str, operations: Operations) -> JobAccess {
        let ticket = self.ticket(job, host, operations).sign(self.tickets.signing_key().pair());
        JobAccess { job, ticket: Bytes::from(ticket), lease_epoch: LeaseEpoch(5) }
    }

    pub async fn shutdown(self) {
        for (_, server) in self.nodes {
            server.shutdown().await;
        }
    }
}

pub fn issue(ca: &FabricCa, dir: &Path, role: Role, name: &str) -> Identity {
    let dir = dir.join(format!("{role}-{name}"));
    ca.issue(role, name, DAY).expect("issued").save(&dir).expect("saved");
    Identity::load(&dir).expect("loaded")
}

pub async fn put_all(store: &JobStore, numbers: std::ops::Range<u32>) -> Vec<ChunkId> {
    let mut ids = Vec::new();
    for n in numbers {
        let record = record(n);
        ids.push(record.id());
        store.put(record).await.expect("taken");
    }
    ids
}

/// Waits for a state, not for a time.
pub async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while !holds() {
        assert!(tokio::time::Instant::now() < deadline, "{what} did not come to be");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Rots the first byte of a record's payload in a store's folder, wherever it is.
pub fn rot(dir: &Path, record: &Record) {
    use std::io::{Seek, SeekFrom, Write};
    let find = |bytes: &[u8]| bytes.windows(32).position(|w| w == record.id().0);
    let payload = outrider_proto::record::HEADER_LEN - find(record.bytes()).expect("in the header");
    for entry in std::fs::read_dir(dir.join("segments")).expect("a folder") {
        let path = entry.expect("an entry").path();
        let bytes = std::fs::read(&path).expect("read");
        // The footer has the id, too, but at the end.
        if let Some(at) = find(&bytes).map(|at| at + payload) {
            let mut file = std::fs::File::options().write(true).open(&path).expect("opened");
            file.seek(SeekFrom::Start(at as u64)).expect("sought");
            file.write_all(&[!bytes[at]]).expect("rotten");
            return;
        }
    }
    panic!("the record is nowhere");
}
