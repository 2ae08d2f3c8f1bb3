//! Played agents and storage nodes.

use std::sync::Arc;
use std::time::Duration;

use outrider_process::identity::{Identity, Role};
use outrider_proto::frame::Space;
use outrider_proto::ids::{ChunkId, JobId, NodeIncarnation, PointId, SessionId, VmGuid, Window};
use outrider_proto::layout::Layout;
use outrider_proto::receipt::{NamedReceipt, PgReceipt, Receipt};
use outrider_proto::rpc::agent_client::AgentClient;
use outrider_proto::rpc::agent_down::What;
use outrider_proto::rpc::storage_registry_client::StorageRegistryClient;
use outrider_proto::rpc::{self, agent_up, storage_down, storage_up, vm_change};
use ring::signature::{Ed25519KeyPair, KeyPair};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use crate::fabric::Fabric;

const DEADLINE: Duration = Duration::from_secs(20);

/// Tries until it succeeds, for a bounded time.
pub(crate) async fn eventually<T>(what: &str, mut attempt: impl AsyncFnMut() -> Option<T>) -> T {
    let tries = async {
        loop {
            if let Some(result) = attempt().await {
                return result;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    match tokio::time::timeout(DEADLINE, tries).await {
        Ok(result) => result,
        Err(_) => panic!("waited in vain: {what}"),
    }
}

/// An error with its sources.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(Some(error), |error| error.source());
    sources.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

pub(crate) struct Agent {
    host: String,
    client: AgentClient<Channel>,
    up: mpsc::Sender<rpc::AgentUp>,
    down: Streaming<rpc::AgentDown>,
}

impl Agent {
    pub(crate) async fn attach(fabric: &Fabric, host: &str, boot_id: u64) -> Self {
        let mut agent = eventually("the agent attaches", async || {
            Self::try_attach(fabric, host, host, boot_id).await.ok()
        })
        .await;
        let welcome = agent.wait(|what| match what {
            What::Welcome(welcome) => Some(welcome),
            _ => None,
        });
        assert!(welcome.await.renew_ms > 0);
        agent
    }

    pub(crate) async fn try_attach(
        fabric: &Fabric,
        certificate: &str,
        host: &str,
        boot_id: u64,
    ) -> Result<Self, Status> {
        let identity: Arc<Identity> = fabric.identity(Role::Node, certificate);
        let leader = fabric.leader().await;
        let mut client = AgentClient::new(fabric.channel(leader, &identity).await);
        let (up, messages) = mpsc::channel(64);
        let hello = agent_up::What::Hello(rpc::Hello {
            host: host.to_owned(),
            realm: "cluster".into(),
            version: "test".into(),
            hypervisor: "hyperv".into(),
            boot_id,
            host_started_unix_ms: 0,
        });
        up.send(rpc::AgentUp { what: Some(hello) }).await.expect("the stream is open");
        let down = client.attach(ReceiverStream::new(messages)).await?.into_inner();
        Ok(Self { host: host.to_owned(), client, up, down })
    }

    async fn say(&self, what: agent_up::What) {
        self.up.send(rpc::AgentUp { what: Some(what) }).await.expect("the stream is open");
    }

    fn facts(&self, (name, guid, owner): (&str, VmGuid, &str)) -> rpc::VmFacts {
        rpc::VmFacts {
            vm: Some(rpc::VmKey {
                realm: "cluster".into(),
                guid: guid.to_string(),
                role: rpc::VmRole::Primary.into(),
            }),
            name: name.into(),
            state: "running".into(),
            clustered: true,
            cluster_owner: owner.into(),
            generation: 2,
            config_version: "9.0".into(),
            disks: Vec::new(),
            realized: true,
        }
    }

    pub(crate) async fn inventory(&self, vms: &[(&str, VmGuid, &str)]) {
        let vms = vms.iter().map(|vm| self.facts(*vm)).collect();
        let up = vec![self.host.clone()];
        self.say(agent_up::What::Inventory(rpc::Inventory {
            vms,
            nodes_up: up,
            nodes_down: vec![],
        }))
        .await;
    }

    pub(crate) async fn seen(&self, vm: (&str, VmGuid, &str)) {
        let seen = vm_change::What::Seen(self.facts(vm));
        self.say(agent_up::What::Change(rpc::VmChange { what: Some(seen) })).await;
    }

    pub(crate) async fn beat(&self, beat: u64) {
        self.say(agent_up::What::Heartbeat(rpc::Heartbeat { beat })).await;
    }

    pub(crate) async fn closed(&self, lease: &rpc::JobLease) {
        self.say(agent_up::What::Closed(rpc::SourcesClosed {
            job_id: lease.job_id.clone(),
            lease_epoch: lease.lease_epoch,
        }))
        .await;
    }

    pub(crate) async fn progress(&self, lease: &rpc::JobLease, phase: &str, read_bytes: u64) {
        self.say(agent_up::What::Progress(rpc::JobProgress {
            job_id: lease.job_id.clone(),
            lease_epoch: lease.lease_epoch,
            phase: phase.into(),
            stats: Some(rpc::JobStats { read_bytes, ..Default::default() }),
            total_bytes: 8192,
        }))
        .await;
    }

    /// Waits for a message from the leader; others are passed over.
    pub(crate) async fn wait<T>(&mut self, mut pick: impl FnMut(What) -> Option<T>) -> T {
        let wait = async {
            loop {
                let message = self.down.message().await.expect("the stream stands");
                let what = message.expect("the stream stands").what;
                if let Some(found) = what.and_then(&mut pick) {
                    return found;
                }
            }
        };
        tokio::time::timeout(DEADLINE, wait).await.expect("the leader says it in time")
    }

    /// Waits until the leader ends the stream.
    pub(crate) async fn cut_off(&mut self) {
        let ends = async { while let Ok(Some(_)) = self.down.message().await {} };
        tokio::time::timeout(DEADLINE, ends).await.expect("the leader lets go in time");
    }

    pub(crate) async fn lease(&mut self) -> rpc::JobLease {
        self.wait(|what| match what {
            What::Lease(lease) => Some(lease),
            _ => None,
        })
        .await
    }

    pub(crate) async fn record_duty(&mut self, lease: &rpc::JobLease) -> Result<rpc::Duty, Status> {
        let request = rpc::RecordDutyRequest {
            job_id: lease.job_id.clone(),
            lease_epoch: lease.lease_epoch,
            attempt: lease.attempt,
            checkpoint_name: format!("outrider {} {}", lease.job_id, lease.attempt),
        };
        Ok(self.client.record_duty(request).await?.into_inner().duty.expect("a duty"))
    }

    pub(crate) async fn duty(
        &mut self,
        lease: &rpc::JobLease,
        duty: &rpc::Duty,
        state: rpc::DutyState,
    ) -> Result<rpc::Duty, Status> {
        let request = rpc::UpdateDutyRequest {
            job_id: lease.job_id.clone(),
            lease_epoch: lease.lease_epoch,
            duty_id: duty.duty_id.clone(),
            state: state.into(),
            ..Default::default()
        };
        Ok(self.client.update_duty(request).await?.into_inner().duty.expect("a duty"))
    }

    pub(crate) async fn commit(
        &mut self,
        request: rpc::CommitRequest,
    ) -> Result<rpc::CommitReply, Status> {
        Ok(self.client.commit(request).await?.into_inner())
    }

    pub(crate) async fn bind(
        &mut self,
        lease: &rpc::JobLease,
        point: &str,
        manifest: ChunkId,
    ) -> Result<rpc::BindReply, Status> {
        let binding = rpc::Binding {
            point_id: point.to_owned(),
            manifest_id: manifest.to_string(),
            reference_point_id: "rp-1".into(),
            disks: Vec::new(),
            tracking_unproven: false,
        };
        let request = rpc::BindRequest {
            job_id: lease.job_id.clone(),
            lease_epoch: lease.lease_epoch,
            binding: Some(binding),
        };
        Ok(self.client.bind(request).await?.into_inner())
    }

    pub(crate) async fn finish(
        &mut self,
        lease: &rpc::JobLease,
        clean: bool,
    ) -> Result<(), Status> {
        let request = rpc::FinishRequest {
            job_id: lease.job_id.clone(),
            lease_epoch: lease.lease_epoch,
            data_safe: true,
            host_clean: clean,
            ..Default::default()
        };
        self.client.finish(request).await.map(drop)
    }
}

pub(crate) struct StorageNode {
    name: String,
    incarnation: u64,
    key: Ed25519KeyPair,
    down: tokio::sync::Mutex<Streaming<rpc::StorageDown>>,
    _up: mpsc::Sender<rpc::StorageUp>,
}

fn key(name: &str, incarnation: u64) -> Ed25519KeyPair {
    let seed =
        *ring::digest::digest(&ring::digest::SHA256, format!("{name} {incarnation}").as_bytes())
            .as_ref()
            .first_chunk::<32>()
            .expect("32 bytes");
    Ed25519KeyPair::from_seed_unchecked(&seed).expect("a seed of 32 bytes")
}

impl StorageNode {
    pub(crate) async fn attach_three(fabric: &Fabric) -> Vec<Self> {
        let mut nodes = Vec::new();
        for name in ["s1", "s2", "s3"] {
            nodes.push(Self::attach(fabric, name, 1).await);
        }
        nodes
    }

    pub(crate) async fn attach(fabric: &Fabric, name: &str, incarnation: u64) -> Self {
        eventually("the storage node attaches", async || {
            Self::try_attach_as(fabric, name, name, incarnation).await.ok()
        })
        .await
    }

    pub(crate) async fn try_attach(
        fabric: &Fabric,
        certificate: &str,
        name: &str,
    ) -> Result<(), Status> {
        Self::try_attach_as(fabric, certificate, name, 1).await.map(drop)
    }

    async fn try_attach_as(
        fabric: &Fabric,
        certificate: &str,
        name: &str,
        incarnation: u64,
    ) -> Result<Self, Status> {
        let identity = fabric.identity(Role::Storage, certificate);
        let leader = fabric.leader().await;
        let mut client = StorageRegistryClient::new(fabric.channel(leader, &identity).await);
        let key = key(name, incarnation);
        let (up, messages) = mpsc::channel(8);
        let node = rpc::StorageNode {
            name: name.to_owned(),
            addresses: vec!["127.0.0.1:1".into()],
            zone: name.to_owned(),
            capacity_bytes: 1 << 40,
            receipt_key: key.public_key().as_ref().to_vec(),
            incarnation,
            online: true,
        };
        let hello =
            storage_up::What::Hello(rpc::StorageHello { node: Some(node), version: "t".into() });
        up.send(rpc::StorageUp { what: Some(hello) }).await.expect("the stream is open");
        let down = client.attach(ReceiverStream::new(messages)).await?.into_inner();
        let down = tokio::sync::Mutex::new(down);
        Ok(Self { name: name.to_owned(), incarnation, key, down, _up: up })
    }

    /// Waits for the layout.
    pub(crate) async fn layout(&self) -> Layout {
        let wait = async {
            let mut down = self.down.lock().await;
            loop {
                let message = down.message().await.expect("the stream stands");
                if let Some(storage_down::What::Layout(layout)) =
                    message.expect("the stream stands").what
                {
                    return Layout::try_from(&layout).expect("a good layout");
                }
            }
        };
        tokio::time::timeout(DEADLINE, wait).await.expect("a layout is made in time")
    }
}

/// A commit that claims nothing yet.
pub(crate) fn commit_request(
    lease: &rpc::JobLease,
    point: &str,
    manifest: ChunkId,
) -> rpc::CommitRequest {
    rpc::CommitRequest {
        job_id: lease.job_id.clone(),
        lease_epoch: lease.lease_epoch,
        placement_epoch: lease.placement_epoch,
        point_id: point.to_owned(),
        manifest_id: manifest.to_string(),
        achieved: rpc::Consistency::Application.into(),
        kind: rpc::BackupKind::Full.into(),
        taken_unix_ms: 1,
        checkpoint_id: "cp-1".into(),
        ..Default::default()
    }
}

/// Claims one put to the manifest's PG, with receipts of the given nodes.
pub(crate) fn claim(
    request: &mut rpc::CommitRequest,
    fabric: &Fabric,
    layout: &Layout,
    nodes: &[StorageNode],
    manifest: ChunkId,
) {
    let pg = layout.pg_of(&manifest).expect("a layout");
    let session = SessionId::random();
    let job: JobId = request.job_id.parse().expect("an id");
    let point: PointId = request.point_id.parse().expect("an id");
    let receipts = nodes.iter().map(|node| {
        Receipt {
            fabric: fabric.id,
            job,
            session,
            window: Window(1),
            node: node.name.clone(),
            incarnation: NodeIncarnation(node.incarnation),
            layout_epoch: layout.epoch,
            pgs: vec![PgReceipt { pg, puts_through: 1, haves: 0 }],
        }
        .sign(&node.key)
    });
    request.windows.push(rpc::WindowClaim {
        session: session.to_string(),
        window: 1,
        pg: vec![pg.0.into()],
        puts: vec![1],
        haves: vec![0],
        receipt: receipts.collect(),
    });
    request.root_receipts.extend(nodes.iter().map(|node| {
        NamedReceipt {
            fabric: fabric.id,
            node: node.name.clone(),
            incarnation: NodeIncarnation(node.incarnation),
            space: Space::Root as u8,
            key: point.to_bytes().to_vec(),
            id: ChunkId([5; 32]),
        }
        .sign(&node.key)
    }));
}
