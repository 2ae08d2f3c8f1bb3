//! One client, one storage node, one copy, over loopback: `cargo run --release --example throughput -- [MiB]`.
//!
//! Prints MB/s of sealed bytes that a barrier confirmed as durable, and of the same bytes read back.

use std::sync::Arc;
use std::time::Instant;

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
use outrider_proto::record::{CIPHER_AES_256_GCM, Codec, Header, Kind, Record};
use outrider_proto::ticket::{Operations, Ticket};
use outrider_storage::StorageServer;
use outrider_storage::config::Config;
use outrider_storage_client::{ClientRole, JobAccess, Limits, StoreClient};
use tokio::sync::watch;

type Failure = Box<dyn std::error::Error>;

/// A record of noise: well formed and hashed, sealed by nobody.
fn record(n: u64, len: usize, domain: DomainId) -> Result<Record, Failure> {
    let mut payload = vec![0; len];
    let mut seed = blake3::Hasher::new();
    seed.update(&n.to_le_bytes());
    seed.finalize_xof().fill(&mut payload);
    let header = Header {
        kind: Kind::Data,
        cipher: CIPHER_AES_256_GCM,
        codec: Codec::Stored,
        key_epoch: KeyEpoch(1),
        plain_len: u32::try_from(len - 16)?,
        clear_len: 0,
        payload_len: u32::try_from(len)?,
        id: ChunkId(*blake3::hash(&n.to_le_bytes()).as_bytes()),
        domain,
        writer: WriterId([1; 16]),
        nonce: [2; 12],
        payload_hash: *blake3::hash(&payload).as_bytes(),
    };
    Ok(Record::decode_unverified(Bytes::from([header.encode().as_slice(), &payload].concat()))?)
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let mib: u64 = std::env::args().nth(1).map_or(Ok(1024), |a| a.parse())?;
    let dir = tempfile::tempdir()?;
    let fabric = FabricId::random();
    let ca = FabricCa::create(&fabric.to_string())?;
    let issue = |role, name: &str| -> Result<Arc<Identity>, Failure> {
        let at = dir.path().join(name);
        ca.issue(role, name, std::time::Duration::from_secs(3600))?.save(&at)?;
        Ok(Arc::new(Identity::load(&at)?))
    };
    let (node, agent) = (issue(Role::Storage, "s1")?, issue(Role::Node, "hv1")?);
    let coordinator = issue(Role::Coordinator, "c1")?;
    let config = Config {
        name: "s1".into(),
        identity_dir: dir.path().join("s1"),
        observability: None,
        telemetry: Default::default(),
        log: Default::default(),
        fabric,
        data_dir: dir.path().join("data"),
        listen: "127.0.0.1:0".parse()?,
        advertise: vec![],
        coordinators: vec![],
        zone: String::new(),
        capacity: ByteSize::tib(1),
        segment_size: ByteSize::mib(256),
        limits: Default::default(),
    };
    let mut metrics = Metrics::new("storage", "s1");
    let server = StorageServer::start(&config, node, &mut metrics, TaskGroup::new("s1")).await?;
    let nodes = vec![server.described.clone()];
    let pgs = assign(&nodes, 64, 1);
    let layout = Layout { epoch: LayoutEpoch(1), replicas: 1, min_durable: 1, nodes, pgs };
    server.layout.send_replace(layout.clone());
    server.ticket_key.send_replace(Some(coordinator.signing_key().public_key()));
    let (job, domain) = (JobId::random(), DomainId::random());
    let ticket = Ticket {
        operations: Operations(Operations::BACKUP.0 | Operations::RESTORE.0),
        fabric,
        job,
        vm: VmGuid::random(),
        domain,
        lease_epoch: LeaseEpoch(1),
        not_after_unix_ms: u64::MAX,
        host: "hv1".into(),
    };
    let ticket = Bytes::from(ticket.sign(coordinator.signing_key().pair()));
    let (_layout, view) = watch::channel(layout);
    let client = StoreClient::new(&agent, fabric, view, ClientRole::Agent, Limits::default())?;
    let store = client.open_job(JobAccess { job, ticket, lease_epoch: LeaseEpoch(1) });

    let len = 256 << 10;
    let records = (0..mib * 4).map(|n| record(n, len, domain)).collect::<Result<Vec<_>, _>>()?;
    let ids: Vec<ChunkId> = records.iter().map(Record::id).collect();
    let began = Instant::now();
    for record in records {
        store.put(record).await?;
    }
    let sent = began.elapsed();
    store.barrier().await?;
    let durable = began.elapsed();
    let began = Instant::now();
    for part in ids.chunks(256) {
        store.get(part).await?;
    }
    let read = began.elapsed();
    let rate = |t: std::time::Duration| (mib << 20) as f64 / 1e6 / t.as_secs_f64();
    println!("sent     {:7.0} MB/s", rate(sent));
    println!("durable  {:7.0} MB/s", rate(durable));
    println!("read     {:7.0} MB/s", rate(read));
    store.close();
    server.shutdown().await;
    Ok(())
}
