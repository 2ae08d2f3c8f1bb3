//! Backup jobs of the node agent against the simulated cluster, with storage and coordinator in memory: what a job leaves
//! at the hypervisor, and whether its points are exact, when it is interrupted at any arrow.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use outrider_lab::{
    CheckpointOnMigration, CreateVm, CsvConfig, Delays, DiskSource, Fault, FaultKind, GateSpec,
    GuestWrite, HoldSpec, LabConfig, LabControl, MigrationKind, TruthConfig, VmState, WaitFor,
    When,
};
use outrider_node::config::{JobTimes, Limits};
use outrider_node::fakes::{MemoryCoordinator, MemoryStore, sealer};
use outrider_node::hypervisor::hyperv::HyperV;
use outrider_node::hypervisor::{Change, Hypervisor, Inventory};
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

const DEADLINE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;
const CHUNK: u32 = 64 << 10;

struct World {
    folder: tempfile::TempDir,
    addr: SocketAddr,
    lab: LabControl,
    coordinator: MemoryCoordinator,
    store: MemoryStore,
    vm: VmState,
}

/// A job, which may have several attempts.
#[derive(Clone, Copy)]
struct Job {
    id: JobId,
    point: PointId,
    kind: BackupKind,
}

impl Job {
    fn new(kind: BackupKind) -> Self {
        Self { id: JobId::random(), point: PointId::random(), kind }
    }
}

/// An attempt at work: aborting it is a kill, as far as hypervisor and storage can tell.
struct Attempt {
    task: JoinHandle<bool>,
    sources: Sources,
}

impl Attempt {
    async fn end(self) -> bool {
        tokio::time::timeout(DEADLINE, self.task).await.expect("ends in time").expect("no panic")
    }

    async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
        self.sources.close().await;
    }
}

impl World {
    async fn new(switch: CheckpointOnMigration, disks: Vec<DiskSource>) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let csv = |name: &str| CsvConfig { name: name.into(), path: folder.path().join(name) };
        let config = LabConfig {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            address_file: None,
            realm: "cluster".into(),
            hosts: vec!["alpha".into(), "beta".into()],
            csvs: vec![csv("Volume1")],
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
        }
    }

    async fn small() -> Self {
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

    fn name(&self) -> String {
        self.vm.id.to_string()
    }

    fn key(&self) -> VmKey {
        VmKey { realm: "cluster".into(), guid: VmGuid(self.vm.id), role: VmRole::Primary }
    }

    async fn write(&self, bytes: u64, seed: u64) {
        let write = GuestWrite::scattered(&self.name(), bytes, seed);
        self.lab.guest_write(write).await.expect("the guest writes");
    }

    async fn hypervisor(&self, host: &str) -> Arc<HyperV> {
        let wmi = LabWmi::connect(self.addr, host).await.expect("the host answers");
        let files = LabFiles::new(self.addr, host);
        Arc::new(HyperV::new(Arc::new(wmi), Arc::new(files), times()))
    }

    async fn attempt(&self, job: Job, host: &str, epoch: u64) -> Attempt {
        let hypervisor = self.hypervisor(host).await;
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
        let sources = Sources::new(hypervisor.clone());
        let context = JobContext {
            hypervisor,
            coordinator: Arc::new(self.coordinator.clone()),
            store: Arc::new(self.store.clone()),
            sealer: sealer(),
            lease,
            sources: sources.clone(),
            pool: Pool::new(2, 8 << 20),
            limits: Limits {
                read_size: outrider_node::config::ByteCount(256 << 10),
                ..Limits::default()
            },
            times: times(),
            clock,
            host: host.into(),
            scratch: self.folder.path().to_owned(),
            progress,
            metrics: NodeMetrics::default(),
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
                wanted: Consistency::Application.into(),
                minimum: Consistency::Crash.into(),
                point_id: job.point.to_string(),
                ..BackupWork::default()
            })),
            ..JobLease::default()
        };
        let task = tokio::spawn(async move { job::run(context, message).await });
        Attempt { task, sources }
    }

    /// A whole job on one host; both results have to be good.
    async fn back_up(&self, host: &str, kind: BackupKind) -> Job {
        let job = Job::new(kind);
        let good = self.attempt(job, host, 1).await.end().await;
        assert!(good, "{:?}", self.coordinator.with(|d| d.finished.last().cloned()));
        job
    }

    /// Everything sent so far is durable: barriers come while reads stand still.
    async fn until_settled(&self) {
        let settled = async {
            while !self.store.settled() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(DEADLINE, settled).await.expect("a barrier comes");
    }

    fn commit(&self, job: Job) -> rpc::CommitRequest {
        self.coordinator
            .with(|d| d.commits.get(&job.id.to_string()).cloned())
            .expect("it committed")
    }

    /// Restores the disks of a job's point and compares them with what its checkpoint froze.
    async fn judge(&self, job: Job) {
        let commit = self.commit(job);
        let reader = Reader {
            store: Arc::new(self.store.clone()),
            sealer: sealer(),
            pool: Pool::new(2, 8 << 20),
        };
        let id = commit.manifest_id.parse().expect("an id");
        let manifest = restore::fetch_manifest(&reader, id).await.expect("the manifest opens");
        let dir = tempfile::tempdir_in(self.folder.path()).expect("a folder");
        let files: Vec<PathBuf> =
            restore::export_disks(&reader, &manifest, dir.path()).await.expect("it restores");
        assert_eq!(files.len(), self.vm.disks.len());
        for (index, file) in files.iter().enumerate() {
            let checkpoint = commit.checkpoint_id.parse().expect("a GUID");
            let compared =
                self.lab.compare_disk(file, checkpoint, index).await.expect("comparable");
            assert!(
                compared == outrider_lab::Comparison::Identical,
                "disk {index} differs: {compared:?}"
            );
        }
    }

    /// Nothing of ours but one bound reference point.
    async fn assert_clean(&self) {
        self.lab.wait(WaitFor::NoMerge { vm: self.name() }, DEADLINE).await.expect("merged");
        let vm = self.lab.vm(&self.name()).await.expect("it is there");
        assert_eq!(vm.checkpoints.len(), 0, "a checkpoint is left");
        for disk in &vm.disks {
            assert_eq!(disk.chain.len(), 1, "a chain is longer than it was");
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

fn times() -> JobTimes {
    JobTimes {
        busy_first: Duration::from_millis(5),
        busy_ceiling: Duration::from_millis(50),
        busy_patience: Duration::from_secs(20),
        merge_wait: Duration::from_secs(20),
        barrier_interval: Duration::from_millis(100),
        ..JobTimes::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_then_two_incrementals_restore_to_the_exact_bytes_and_leave_one_reference_point() {
    let world = World::small().await;
    let first = world.back_up("alpha", BackupKind::Incremental).await;
    assert_eq!(world.commit(first).kind(), BackupKind::Full, "there was no base");
    assert_eq!(world.commit(first).achieved(), Consistency::Application);
    world.assert_clean().await;
    let mut jobs = vec![first];
    for seed in [2, 3] {
        world.write(MIB, seed).await;
        let job = world.back_up("alpha", BackupKind::Incremental).await;
        let commit = world.commit(job);
        assert_eq!(commit.kind(), BackupKind::Incremental, "{:?}", commit.reasons);
        let stats = commit.stats.expect("figures");
        assert!(stats.read_bytes < 24 * MIB, "{stats:?}");
        world.assert_clean().await;
        jobs.push(job);
    }
    for job in jobs {
        world.judge(job).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_any_call_of_the_hypervisor_the_next_attempt_finishes_clean_and_exact() {
    let calls = [
        ("CreateSnapshot", When::Before),
        ("CreateSnapshot", When::After),
        ("ModifySystemSettings", When::Before),
        ("ModifySystemSettings", When::After),
        ("ConvertToReferencePoint", When::Before),
        ("ConvertToReferencePoint", When::After),
        ("DestroyReferencePoint", When::Before),
        ("DestroyReferencePoint", When::After),
    ];
    for (method, when) in calls {
        let world = World::small().await;
        world.back_up("alpha", BackupKind::Incremental).await;
        world.write(MIB, 2).await;
        let spec = HoldSpec { method: method.into(), vm: None, host: None, when };
        let hold = world.lab.hold(spec).await.expect("held");
        let job = Job::new(BackupKind::Incremental);
        let attempt = world.attempt(job, "alpha", 1).await;
        world.lab.wait(WaitFor::MethodHeld { hold }, DEADLINE).await.expect("it gets there");
        attempt.kill().await;
        // A call that was held before its effect is gone with its caller.
        let _ = world.lab.release(hold).await;
        let good = world.attempt(job, "alpha", 2).await.end().await;
        assert!(
            good,
            "{method} {when:?}: {:?}",
            world.coordinator.with(|d| d.finished.last().cloned())
        );
        world.judge(job).await;
        world.assert_clean().await;
        world.write(MIB, 3).await;
        let next = world.back_up("alpha", BackupKind::Incremental).await;
        world.judge(next).await;
        world.assert_clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_migration_in_the_middle_the_new_host_reads_only_what_is_missing() {
    for switch in [CheckpointOnMigration::Travels, CheckpointOnMigration::Lost] {
        let disk = DiskSource::Empty { size: 96 * MIB, block_size: 1 << 20 };
        let world = World::new(switch, vec![disk]).await;
        let vm = world.name();
        world.lab.guest_write(GuestWrite::at(&vm, 0, 0, 64 * MIB, 5)).await.expect("written");
        let spec = GateSpec { vm: vm.clone(), host: Some("alpha".into()), budget: 48 * MIB };
        let gate = world.lab.set_gate(spec).await.expect("a gate");
        let job = Job::new(BackupKind::Full);
        let attempt = world.attempt(job, "alpha", 1).await;
        world.lab.wait(WaitFor::GateBlocked { gate }, DEADLINE).await.expect("it reads that far");
        world.until_settled().await;
        world.lab.migrate(&vm, "beta", MigrationKind::Live).await.expect("it moves");
        world.lab.release_gate(gate).await.expect("released");
        attempt.kill().await;
        let good = world.attempt(job, "beta", 2).await.end().await;
        assert!(good, "{switch:?}: {:?}", world.coordinator.with(|d| d.finished.last().cloned()));
        let stats = world.commit(job).stats.expect("figures");
        assert_eq!(stats.resent_bytes, 0, "{switch:?}");
        if switch == CheckpointOnMigration::Lost {
            assert_eq!(stats.reread_bytes, 0, "another checkpoint is no second reading: {stats:?}");
        } else {
            // The leaf page in hand when it moved; the old host had read 48 MiB at most.
            let read = stats.read_bytes + 48 * MIB;
            assert!(stats.reread_bytes < 32 * MIB, "{stats:?}");
            assert!(stats.reread_bytes + 64 * MIB <= read, "more than was read: {stats:?}");
            assert!(stats.reread_bytes > 0, "what storage had of that leaf counts: {stats:?}");
            assert!(stats.adopted_pages > 0, "{stats:?}");
            assert!(stats.read_bytes < 64 * MIB, "{stats:?}");
        }
        world.judge(job).await;
        world.assert_clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lacking_receipts_are_cured_and_the_commit_is_made() {
    let world = World::small().await;
    world.coordinator.with(|d| d.lacking.push_back((0..16).collect()));
    world.store.lose_at_next_barrier(7);
    let job = world.back_up("alpha", BackupKind::Full).await;
    world.judge(job).await;
    world.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rejected_tracking_ids_mean_reading_in_full() {
    for as_job in [true, false] {
        let world = World::small().await;
        world.back_up("alpha", BackupKind::Incremental).await;
        world.write(MIB, 2).await;
        world.lab.set_fault(Fault::new(FaultKind::RejectIds { as_job })).await.expect("in force");
        let job = world.back_up("alpha", BackupKind::Incremental).await;
        let commit = world.commit(job);
        assert_eq!(commit.kind(), BackupKind::Full);
        assert!(commit.reasons.iter().any(|r| r.contains("read in full")), "{:?}", commit.reasons);
        world.judge(job).await;
        world.assert_clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_cannot_come_to_rest_gives_a_crash_consistent_point_that_says_so() {
    let world = World::small().await;
    let failing = FaultKind::JobFails {
        method: "CreateSnapshot".into(),
        code: 32768,
        description: "a VSS writer failed".into(),
    };
    world.lab.set_fault(Fault::new(failing).times(1)).await.expect("in force");
    let job = world.back_up("alpha", BackupKind::Full).await;
    let commit = world.commit(job);
    assert_eq!(commit.achieved(), Consistency::Crash);
    assert!(commit.reasons.iter().any(|r| r.contains("VSS writer")), "{:?}", commit.reasons);
    world.judge(job).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_null_reference_point_is_found_by_difference() {
    let world = World::small().await;
    let fault = FaultKind::NullResult { method: "ConvertToReferencePoint".into() };
    world.lab.set_fault(Fault::new(fault)).await.expect("in force");
    world.back_up("alpha", BackupKind::Full).await;
    world.assert_clean().await;
    assert!(world.coordinator.with(|d| d.binding.is_some()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_under_another_name_defines_and_starts_a_vm_with_the_exact_disks() {
    let world = World::small().await;
    let job = world.back_up("alpha", BackupKind::Full).await;
    let commit = world.commit(job);
    let mut restoring = Job::new(BackupKind::Full);
    restoring.point = job.point;
    let hypervisor = world.hypervisor("beta").await;
    let clock = Arc::new(SystemClock::new());
    let lease = Lease::granted(
        restoring.id,
        LeaseEpoch(1),
        Duration::from_secs(3600),
        false,
        clock.clone(),
    );
    lease.renew(clock.monotonic());
    let sources = Sources::new(hypervisor.clone());
    let context = JobContext {
        hypervisor: hypervisor.clone(),
        coordinator: Arc::new(world.coordinator.clone()),
        store: Arc::new(world.store.clone()),
        sealer: sealer(),
        lease,
        sources,
        pool: Pool::new(2, 8 << 20),
        limits: Limits::default(),
        times: times(),
        clock,
        host: "beta".into(),
        scratch: world.folder.path().to_owned(),
        progress: watch::Sender::new(Progress::default()),
        metrics: NodeMetrics::default(),
    };
    let message = JobLease {
        job_id: restoring.id.to_string(),
        lease_epoch: 1,
        vm: Some((&world.key()).into()),
        work: Some(Work::Restore(rpc::RestoreWork {
            point_id: commit.point_id.clone(),
            manifest_id: commit.manifest_id.clone(),
            target_name: "restored".into(),
            power_on: true,
            highly_available: true,
            ..rpc::RestoreWork::default()
        })),
        ..JobLease::default()
    };
    assert!(
        job::run(context, message).await,
        "{:?}",
        world.coordinator.with(|d| d.finished.last().cloned())
    );
    let Inventory { vms, .. } = hypervisor.inventory().await.expect("listed");
    let made = vms.iter().find(|vm| vm.name == "restored").expect("it is there");
    assert_ne!(made.guid, VmGuid(world.vm.id));
    assert_eq!(made.cluster_owner.as_deref(), Some("beta"));
    assert_eq!(made.power, outrider_node::hypervisor::Power::Running);
    let checkpoint = commit.checkpoint_id.parse().expect("a GUID");
    for (index, disk) in made.disks.iter().enumerate() {
        let compared = world
            .lab
            .compare_disk(std::path::Path::new(&disk.path), checkpoint, index)
            .await
            .expect("comparable");
        assert!(compared == outrider_lab::Comparison::Identical, "disk {index}: {compared:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_is_made_is_seen_with_its_cluster_owner() {
    let world = World::small().await;
    let hypervisor = world.hypervisor("beta").await;
    let mut changes = hypervisor.watch().await.expect("subscribed");
    let disk = DiskSource::Empty { size: MIB, block_size: 0 };
    let made = CreateVm::new("new", "beta", "Volume1", vec![disk]);
    let made = world.lab.create_vm(made).await.expect("made");
    let guid = VmGuid(made.id);
    let (mut seen, mut owner) = (false, false);
    let both = async {
        while let Some(change) = changes.recv().await {
            match change {
                Change::Seen(vm) if vm.guid == guid => seen = vm.realized && vm.disks.len() == 1,
                Change::Owner(vm, host) if vm == guid => owner = host == "beta",
                _ => {}
            }
            if seen && owner {
                return;
            }
        }
    };
    let heard = tokio::time::timeout(DEADLINE, both).await;
    assert!(heard.is_ok() && seen && owner, "seen {seen}, owner {owner}");
}
