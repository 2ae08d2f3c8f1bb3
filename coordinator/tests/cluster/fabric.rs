//! A fabric on loopback: an authority, coordinators in this process, and certificates for whoever is played.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use outrider_coordinator::config::{
    EnrolmentConfig, LeaseConfig, LimitsConfig, MemberConfig, RaftConfig, StorageConfig,
};
use outrider_coordinator::{Config, CoordinatorError, run};
use outrider_process::identity::ca::FabricCa;
use outrider_process::identity::{Identity, Role};
use outrider_process::secret::kek::KeyEncryptionKey;
use outrider_process::telemetry::{LogConfig, TraceConfig};
use outrider_proto::ids::FabricId;
use outrider_proto::layout::Layout;
use outrider_proto::rpc;
use outrider_proto::rpc::operator_client::OperatorClient;
use outrider_proto::rpc::raft_client::RaftClient;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

use crate::fake::eventually;

/// Short, so that tests may wait for its end.
pub(crate) const LEASE: Duration = Duration::from_millis(1500);

/// Who calls.
#[derive(Clone, Copy)]
pub(crate) enum Caller {
    Operator,
    Node(&'static str),
}

/// Clusters at a time: elections are timed for a machine of their own.
static ROOM: tokio::sync::Semaphore = tokio::sync::Semaphore::const_new(2);

pub(crate) struct Fabric {
    _room: tokio::sync::SemaphorePermit<'static>,
    pub(crate) id: FabricId,
    ca: FabricCa,
    dir: tempfile::TempDir,
    members: BTreeMap<u64, Member>,
    addresses: BTreeMap<u64, SocketAddr>,
}

struct Member {
    token: CancellationToken,
    task: JoinHandle<Result<(), CoordinatorError>>,
}

impl Fabric {
    /// Starts this many coordinators and waits until they serve.
    pub(crate) async fn start(count: u64) -> Self {
        let room = ROOM.acquire().await.expect("never closed");
        let id = FabricId::random();
        let ca = FabricCa::create(&id.to_string()).expect("an authority");
        let dir = tempfile::tempdir().expect("a directory");
        let kek = KeyEncryptionKey::generate();
        std::fs::write(dir.path().join("kek"), kek.to_text().expose()).expect("written");
        // Ports must be known to all before the first one starts.
        let sockets: Vec<_> = (0..count)
            .map(|_| std::net::TcpListener::bind("127.0.0.1:0").expect("bound"))
            .collect();
        let addresses = (1..)
            .zip(sockets.iter().map(|s| s.local_addr().expect("bound")))
            .collect::<BTreeMap<u64, _>>();
        drop(sockets);
        let mut fabric = Self { _room: room, id, ca, dir, members: BTreeMap::new(), addresses };
        let mut starting = Vec::new();
        for id in 1..=count {
            starting.push(fabric.launch(id));
        }
        for ready in starting {
            ready.await.expect("the coordinator serves");
        }
        eventually("all take part", async || {
            for id in 1..=count {
                if !fabric.known(id).await["remembers"].as_bool()? {
                    return None;
                }
            }
            Some(())
        })
        .await;
        fabric
    }

    fn launch(&mut self, id: u64) -> oneshot::Receiver<outrider_process::ports::Ready> {
        let (ready, serves) = oneshot::channel();
        let token = CancellationToken::new();
        let task = tokio::spawn(run(self.config(id), ready, token.clone()));
        self.members.insert(id, Member { token, task });
        serves
    }

    fn config(&self, id: u64) -> Config {
        let name = format!("c{id}");
        Config {
            identity_dir: self.identity_dir(Role::Coordinator, &name),
            name,
            id,
            fabric: self.id,
            data_dir: self.dir.path().join(format!("data-{id}")),
            kek_file: self.dir.path().join("kek"),
            listen: self.addresses[&id],
            advertise: None,
            members: self
                .addresses
                .iter()
                .map(|(id, address)| MemberConfig { id: *id, address: address.to_string() })
                .collect(),
            lease: LeaseConfig { duration: LEASE, renew: LEASE / 3, cutoff: LEASE * 2 / 3 },
            storage: StorageConfig::default(),
            raft: RaftConfig::default(),
            enrolment: EnrolmentConfig::default(),
            traces: outrider_coordinator::config::TracesConfig::default(),
            limits: LimitsConfig { back_off: Duration::from_millis(50), ..LimitsConfig::default() },
            observability: None,
            telemetry: TraceConfig::default(),
            log: LogConfig::default(),
        }
    }

    fn identity_dir(&self, role: Role, name: &str) -> PathBuf {
        let dir = self.dir.path().join(format!("{role}-{name}"));
        if !dir.exists() {
            let issued = self.ca.issue(role, name, Duration::from_secs(3600)).expect("issued");
            issued.save(&dir).expect("saved");
        }
        dir
    }

    pub(crate) fn identity(&self, role: Role, name: &str) -> Arc<Identity> {
        Arc::new(Identity::load(&self.identity_dir(role, name)).expect("loaded"))
    }

    pub(crate) fn address(&self, id: u64) -> String {
        self.addresses[&id].to_string()
    }

    pub(crate) fn others(&self, id: u64) -> Vec<u64> {
        self.members.keys().copied().filter(|other| *other != id).collect()
    }

    pub(crate) async fn channel(&self, id: u64, identity: &Identity) -> Channel {
        Endpoint::from_shared(format!("https://{}", self.addresses[&id]))
            .expect("an address")
            .tls_config(identity.tonic_client_tls(Role::Coordinator))
            .expect("TLS")
            .connect()
            .await
            .expect("connected")
    }

    pub(crate) async fn operator_as(&self, id: u64, caller: Caller) -> OperatorClient<Channel> {
        OperatorClient::new(self.channel(id, &self.caller(caller)).await)
    }

    pub(crate) async fn operator_at(&self, id: u64) -> OperatorClient<Channel> {
        self.operator_as(id, Caller::Operator).await
    }

    pub(crate) async fn operator(&self) -> OperatorClient<Channel> {
        let leader = self.leader().await;
        self.operator_at(leader).await
    }

    pub(crate) async fn raft_as(
        &self,
        id: u64,
        caller: Caller,
    ) -> Result<tonic::Response<rpc::RaftMessage>, tonic::Status> {
        let mut client = RaftClient::new(self.channel(id, &self.caller(caller)).await);
        client.vote(rpc::RaftMessage { version: 1, body: b"{}".to_vec() }).await
    }

    fn caller(&self, caller: Caller) -> Arc<Identity> {
        match caller {
            Caller::Operator => self.identity(Role::Operator, "ann"),
            Caller::Node(name) => self.identity(Role::Node, name),
        }
    }

    /// Waits for a member that proves to lead.
    pub(crate) async fn leader(&self) -> u64 {
        eventually("there is a leader", async || {
            for id in self.members.keys() {
                let reply = self.operator_at(*id).await.status(rpc::StatusRequest {}).await;
                if reply.is_ok_and(|r| !r.get_ref().stale && r.get_ref().leader_id == *id) {
                    return Some(*id);
                }
            }
            None
        })
        .await
    }

    /// Waits for the layout.
    pub(crate) async fn layout(&self) -> Layout {
        eventually("a layout is made", async || {
            let status = self.operator().await.status(rpc::StatusRequest {}).await.ok()?;
            Layout::try_from(&status.into_inner().layout?).ok()
        })
        .await
    }

    /// Waits until a VM is placed.
    pub(crate) async fn vm_on(&self, name: &str, host: &str) {
        eventually("the VM is placed", async || {
            let request = rpc::ListVmsRequest::default();
            let vms = self.operator().await.list_vms(request).await.ok()?.into_inner().vms;
            vms.iter().any(|vm| vm.name == name && vm.host == host).then_some(())
        })
        .await;
    }

    pub(crate) async fn job(&self, id: &str) -> rpc::Job {
        let request = rpc::ListJobsRequest { job_id: id.to_owned(), ..Default::default() };
        let reply = self.operator().await.list_jobs(request).await.expect("answers");
        reply.into_inner().jobs.remove(0)
    }

    /// Waits for a job's state.
    pub(crate) async fn job_in(&self, id: &str, state: &str) {
        eventually(&format!("the job is {state}"), async || {
            (self.job(id).await.state == state).then_some(())
        })
        .await;
    }

    /// Ends a member.
    pub(crate) async fn stop(&mut self, id: u64) {
        if let Some(member) = self.members.remove(&id) {
            member.token.cancel();
            member.task.await.expect("no panic").expect("a clean end");
        }
    }

    /// Starts a member that was ended; it may not be ready before others run.
    pub(crate) async fn start_again(&mut self, id: u64) {
        self.launch(id).await.expect("the coordinator serves again");
    }

    /// A member that was ended loses its disk.
    pub(crate) fn lose_disk(&self, id: u64) {
        assert!(!self.members.contains_key(&id), "end it first");
        std::fs::remove_dir_all(self.dir.path().join(format!("data-{id}"))).expect("removed");
    }

    /// The latest term that a member has seen, and the index of its last entry.
    pub(crate) async fn standing(&self, id: u64) -> (u64, Option<u64>) {
        let known = self.known(id).await;
        (known["term"].as_u64().expect("a term"), known["last_log"].as_u64())
    }

    /// What a member tells of itself.
    async fn known(&self, id: u64) -> serde_json::Value {
        let identity = self.identity(Role::Coordinator, "c1");
        let mut client = RaftClient::new(self.channel(id, &identity).await);
        let question = rpc::RaftMessage { version: 1, body: Vec::new() };
        let answer = client.standing(question).await.expect("answers").into_inner().body;
        serde_json::from_slice(&answer).expect("JSON")
    }

    pub(crate) async fn restart_all(&mut self) {
        let ids: Vec<u64> = self.members.keys().copied().collect();
        for id in &ids {
            self.stop(*id).await;
        }
        let serving: Vec<_> = ids.iter().map(|id| self.launch(*id)).collect();
        for ready in serving {
            ready.await.expect("the coordinator serves again");
        }
    }

    pub(crate) async fn restart_with_wrong_kek(&mut self) -> CoordinatorError {
        self.stop(1).await;
        let kek = KeyEncryptionKey::generate();
        std::fs::write(self.dir.path().join("kek"), kek.to_text().expose()).expect("written");
        let _ = self.launch(1).await;
        let member = self.members.remove(&1).expect("launched");
        member.task.await.expect("no panic").expect_err("refuses")
    }

    pub(crate) async fn shutdown(mut self) {
        let ids: Vec<u64> = self.members.keys().copied().collect();
        for id in ids {
            self.stop(id).await;
        }
    }
}
