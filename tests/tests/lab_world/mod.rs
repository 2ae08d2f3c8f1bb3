//! The node agent's jobs against the simulated cluster, with storage and coordinator in memory.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use outrider_lab::{
    CheckpointOnMigration, CreateVm, CsvConfig, Delays, DiskSource, GuestWrite, LabConfig,
    LabControl, TruthConfig, VmState, WaitFor,
};
use outrider_node::config::{JobTimes, Limits};
use outrider_node::fakes::{MemoryCoordinator, MemoryStore, sealer};
use outrider_node::hypervisor::hyperv::HyperV;
use outrider_node::job::{self, JobContext, Progress};
use outrider_node::lease::Lease;
use outrider_node::metrics::NodeMetrics;
use outrider_node::pipeline::Pool;
use outrider_node::restore::{self, Reader};
use outrider_node::source::Sources;
use outrider_process::clock::{Clock, SystemClock};
use outrider_proto::ids::{JobId, LeaseEpoch, PointId, VmGuid, VmKey, VmRole};
use outrider_proto::rpc::{
    self, BackupKind, BackupWork, Consistency, DutyState, JobLease, job_lease::Work,
};
use outrider_wmi::lab::{LabFiles, LabWmi};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const CHUNK: u32 = 64 << 10;

pub(crate) struct World {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) addr: SocketAddr,
    pub(crate) lab: LabControl,
    pub(crate) coordinator: MemoryCoordinator,
    pub(crate) store: MemoryStore,
    pub(crate) vm: VmState,
    /// What the VM is to its realm.
    pub(crate) role: VmRole,
    /// Workers and memory of the agents of this world: few of both, for all its jobs together.
    pub(crate) pool: Pool,
}

/// A job, which may have several attempts.
#[derive(Clone, Copy)]
pub(crate) struct Job {
    pub(crate) id: JobId,
    pub(crate) point: PointId,
    pub(crate) kind: BackupKind,
}

impl Job {
    pub(crate) fn new(kind: BackupKind) -> Self {
        Self { id: JobId::random(), point: PointId::random(), kind }
    }
}

/// An attempt at work: aborting it is a kill, as far as hypervisor and storage can tell.
pub(crate) struct Attempt {
    pub(crate) task: JoinHandle<bool>,
    pub(crate) progress: watch::Receiver<Progress>,
    pub(crate) sources: Sources,
}

impl Attempt {
    pub(crate) async fn end(self) -> bool {
        tokio::time::timeout(DEADLINE, self.task).await.expect("ends in time").expect("no panic")
    }

    /// Waits until the job is in this phase.
    pub(crate) async fn reaches(&mut self, phase: &str) {
        let there = self.progress.wait_for(|p| p.phase == phase);
        tokio::time::timeout(DEADLINE, there).await.expect("in time").expect("the job lives");
    }

    pub(crate) async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
        self.sources.close().await;
    }
}

/// Bytes that a job has in hand at most: as much as its pool takes. When it is killed these may have been put and not be durable yet: they are sent again.
pub(crate) const IN_HAND: u64 = 8 << 20;

impl World {
    pub(crate) async fn new(switch: CheckpointOnMigration, disks: Vec<DiskSource>) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let csv = |name: &str| CsvConfig { name: name.into(), path: folder.path().join(name) };
        let config = LabConfig {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            address_file: None,
            realm: "cluster".into(),
            hosts: vec!["alpha".into(), "beta".into()],
            csvs: vec![csv("Volume1"), csv("Volume2")],
            seed: 1,
            delays: Delays { job_ms: 1, migration_ms: 1, merge_ms: 1, job_retention_ms: 300_000 },
            checkpoint_on_migration: switch,
            truth: TruthConfig { dir: folder.path().join("truth"), keep: 50 },
        };
        let (sender, ready) = tokio::sync::oneshot::channel();
        tokio::spawn(outrider_lab::run(config, CancellationToken::new(), Some(sender)));
        let addr = ready.await.expect("the lab listens");
        let lab = LabControl::connect(addr).await.expect("the lab answers");
        let vm = lab
            .create_vm(CreateVm::new("장부 <1>", "alpha", "Volume1", disks))
            .await
            .expect("the VM is made");
        Self {
            folder,
            addr,
            lab,
            coordinator: MemoryCoordinator::new(),
            store: MemoryStore::new(),
            vm,
            role: VmRole::Primary,
            pool: Pool::new(2, 8 << 20),
        }
    }

    /// Another VM in the same cluster, on another volume, that the same agents back up.
    pub(crate) async fn neighbour(&self, volume: &str) -> Self {
        let disks = vec![DiskSource::Empty { size: 8 * MIB, block_size: 1 << 20 }];
        let new = CreateVm::new("neighbour", "alpha", volume, disks);
        let other = Self {
            folder: tempfile::tempdir().expect("a temporary folder"),
            addr: self.addr,
            lab: LabControl::connect(self.addr).await.expect("the lab answers"),
            coordinator: MemoryCoordinator::new(),
            store: MemoryStore::new(),
            vm: self.lab.create_vm(new).await.expect("the VM is made"),
            role: VmRole::Primary,
            pool: self.pool.clone(),
        };
        other.write(4 * MIB, 2).await;
        other
    }

    pub(crate) async fn small() -> Self {
        // Sizes that are no multiple of the chunk.
        let disk = |size, block_size| DiskSource::Empty { size, block_size };
        let world = Self::new(
            CheckpointOnMigration::Travels,
            vec![disk(40 * MIB + 512, 1 << 20), disk(9 * MIB, 32 << 20)],
        )
        .await;
        world.write(6 * MIB, 1).await;
        world
    }

    pub(crate) fn name(&self) -> String {
        self.vm.id.to_string()
    }

    pub(crate) fn key(&self) -> VmKey {
        VmKey { realm: "cluster".into(), guid: VmGuid(self.vm.id), role: self.role }
    }

    pub(crate) async fn write(&self, bytes: u64, seed: u64) {
        let write = GuestWrite::scattered(&self.name(), bytes, seed);
        self.lab.guest_write(write).await.expect("the guest writes");
    }

    pub(crate) async fn hypervisor(&self, host: &str) -> Arc<HyperV> {
        self.hypervisor_with(host, times()).await
    }

    pub(crate) async fn hypervisor_with(&self, host: &str, times: JobTimes) -> Arc<HyperV> {
        let wmi = LabWmi::connect(self.addr, host).await.expect("the host answers");
        let files = LabFiles::new(self.addr, host);
        Arc::new(HyperV::new(Arc::new(wmi), Arc::new(files), times))
    }

    pub(crate) async fn attempt(&self, job: Job, host: &str, epoch: u64) -> Attempt {
        self.attempt_of(job, host, epoch, work()).await
    }

    /// An attempt under another policy.
    pub(crate) async fn attempt_of(
        &self,
        job: Job,
        host: &str,
        epoch: u64,
        policy: BackupWork,
    ) -> Attempt {
        self.attempt_with(job, host, epoch, policy, times()).await
    }

    /// An attempt under another policy, with another patience.
    pub(crate) async fn attempt_with(
        &self,
        job: Job,
        host: &str,
        epoch: u64,
        policy: BackupWork,
        times: JobTimes,
    ) -> Attempt {
        let hypervisor = self.hypervisor_with(host, times.clone()).await;
        self.attempt_on(hypervisor, job, host, epoch, policy, times).await
    }

    /// An attempt of an agent that has seen this host before.
    pub(crate) async fn attempt_on(
        &self,
        hypervisor: Arc<HyperV>,
        job: Job,
        host: &str,
        epoch: u64,
        policy: BackupWork,
        times: JobTimes,
    ) -> Attempt {
        let clock = Arc::new(SystemClock::new());
        let lease = Lease::granted(
            job.id,
            LeaseEpoch(epoch),
            Duration::from_secs(3600),
            false,
            clock.clone(),
        );
        lease.renew(clock.monotonic());
        self.coordinator.with(|d| d.lease_epoch = epoch);
        let progress = watch::Sender::new(Progress::default());
        let sources = Sources::new(hypervisor.clone(), times.volume_patience);
        let context = JobContext {
            hypervisor,
            coordinator: Arc::new(self.coordinator.clone()),
            store: Arc::new(self.store.clone()),
            sealer: sealer(),
            lease,
            sources: sources.clone(),
            pool: self.pool.clone(),
            limits: Limits {
                read_size: outrider_node::config::ByteCount(256 << 10),
                ..Limits::default()
            },
            times,
            clock,
            host: host.into(),
            scratch: self.folder.path().to_owned(),
            progress: progress.clone(),
            metrics: NodeMetrics::default(),
            commands: Arc::default(),
            told: job::Told::default(),
        };
        let message = JobLease {
            job_id: job.id.to_string(),
            attempt: u32::try_from(epoch).expect("small"),
            lease_epoch: epoch,
            vm: Some((&self.key()).into()),
            vm_name: self.vm.name.clone(),
            incarnation: self.coordinator.with(|d| d.incarnation),
            chunk_size: CHUNK,
            work: Some(Work::Backup(BackupWork {
                kind: job.kind.into(),
                point_id: job.point.to_string(),
                ..policy
            })),
            ..JobLease::default()
        };
        let task = tokio::spawn(async move { job::run(context, message).await });
        Attempt { task, sources, progress: progress.subscribe() }
    }

    /// A whole job on one host; both results have to be good.
    pub(crate) async fn back_up(&self, host: &str, kind: BackupKind) -> Job {
        let job = Job::new(kind);
        let good = self.attempt(job, host, 1).await.end().await;
        assert!(good, "{:?}", self.coordinator.with(|d| d.finished.last().cloned()));
        job
    }

    /// Everything sent so far is durable: barriers come while reads stand still.
    pub(crate) async fn until_settled(&self) {
        let settled = async {
            while !self.store.settled() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(DEADLINE, settled).await.expect("a barrier comes");
    }

    pub(crate) fn commit(&self, job: Job) -> rpc::CommitRequest {
        self.coordinator
            .with(|d| d.commits.get(&job.id.to_string()).cloned())
            .expect("it committed")
    }

    /// Restores the disks of a job's point and compares them with what its checkpoint froze.
    /// Gives the files, which stay as long as the world.
    pub(crate) async fn judge(&self, job: Job) -> Vec<PathBuf> {
        self.judge_disks(job, self.vm.disks.len()).await
    }

    /// The same for a VM that has not so many disks as at first.
    pub(crate) async fn judge_disks(&self, job: Job, disks: usize) -> Vec<PathBuf> {
        let commit = self.commit(job);
        let reader = Reader {
            store: Arc::new(self.store.clone()),
            sealer: sealer(),
            pool: Pool::new(2, 8 << 20),
        };
        let id = commit.manifest_id.parse().expect("an id");
        let manifest = restore::fetch_manifest(&reader, id).await.expect("the manifest opens");
        let dir = self.folder.path().join(format!("restored-{}", job.id));
        std::fs::create_dir_all(&dir).expect("a folder");
        let files: Vec<PathBuf> =
            restore::export_disks(&reader, &manifest, &dir).await.expect("it restores");
        assert_eq!(files.len(), disks);
        for (index, file) in files.iter().enumerate() {
            let checkpoint = commit.checkpoint_id.parse().expect("a GUID");
            let compared =
                self.lab.compare_disk(file, checkpoint, index).await.expect("comparable");
            assert!(
                compared == outrider_lab::Comparison::Identical,
                "disk {index} differs: {compared:?}"
            );
        }
        files
    }

    /// Nothing of ours but one bound reference point.
    pub(crate) async fn assert_clean(&self) {
        self.lab.wait(WaitFor::NoMerge { vm: self.name() }, DEADLINE).await.expect("merged");
        let vm = self.lab.vm(&self.name()).await.expect("it is there");
        assert_eq!(vm.checkpoints.len(), 0, "a checkpoint is left");
        for disk in &vm.disks {
            assert!(disk.chain.len() <= 1, "a chain is longer than it was");
        }
        let bound = self.coordinator.with(|d| d.binding.clone()).map(|b| b.reference_point_id);
        match bound {
            Some(bound) => {
                assert_eq!(vm.reference_points.len(), 1, "{:?}", vm.reference_points);
                let id = vm.reference_points[0].id.to_string().to_uppercase();
                assert!(bound.to_uppercase().ends_with(&id), "{bound} is bound, {id} exists");
            }
            None => assert!(vm.reference_points.is_empty(), "an unbound reference point is left"),
        }
        let open = self
            .coordinator
            .with(|d| d.duties.iter().filter(|k| k.state() != DutyState::Done).count());
        assert_eq!(open, 0, "a duty is open");
    }
}

/// Application is asked for, anything is accepted.
pub(crate) fn work() -> BackupWork {
    BackupWork {
        wanted: Consistency::Application.into(),
        minimum: Consistency::Crash.into(),
        ..BackupWork::default()
    }
}

pub(crate) fn times() -> JobTimes {
    JobTimes {
        busy_first: Duration::from_millis(5),
        busy_ceiling: Duration::from_millis(50),
        busy_patience: Duration::from_secs(20),
        merge_wait: Duration::from_secs(20),
        barrier_interval: Duration::from_millis(100),
        ..JobTimes::default()
    }
}
