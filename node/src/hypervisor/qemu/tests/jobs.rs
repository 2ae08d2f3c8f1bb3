//! Whole jobs on real QEMU processes, with storage and coordinator in memory.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use outrider_process::clock::{Clock, SystemClock};
use outrider_proto::ids::{FabricId, JobId, LeaseEpoch, PointId, VmGuid, VmKey, VmRole};
use outrider_proto::manifest::Manifest;
use outrider_proto::rpc::{
    BackupKind, BackupWork, CommitRequest, Consistency, JobLease, job_lease::Work,
};
use serde_json::json;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::super::Qemu;
use super::real::{Host, MIB, Vm, qemu_is_missing, until};
use crate::config::{ByteCount, JobTimes, Limits};
use crate::fakes::{MemoryCoordinator, MemoryStore, sealer};
use crate::hypervisor::Hypervisor;
use crate::job::{self, JobContext, Progress};
use crate::lease::Lease;
use crate::metrics::NodeMetrics;
use crate::pipeline::Pool;
use crate::restore::{self, Reader};
use crate::source::Sources;

const CHUNK: u32 = 64 << 10;
const LEAF: u64 = 128 * CHUNK as u64;

/// A fabric in memory, hosts in a folder, and one VM.
pub(super) struct World {
    pub(super) folder: tempfile::TempDir,
    fabric: FabricId,
    store: MemoryStore,
    pub(super) coordinator: MemoryCoordinator,
    pub(super) guid: VmGuid,
    vm_wait: Duration,
}

pub(super) struct Attempt {
    pub(super) task: JoinHandle<bool>,
    lease: Lease,
    sources: Sources,
}

impl Attempt {
    /// As the coordinator ends a lease after a move: at once, and what was open is closed.
    async fn moved(self) {
        self.lease.end("moved");
        self.task.abort();
        let _ = self.task.await;
        self.sources.close().await;
    }
}

impl World {
    pub(super) fn new() -> Self {
        Self {
            folder: tempfile::tempdir().expect("a folder"),
            fabric: FabricId::random(),
            store: MemoryStore::new(),
            coordinator: MemoryCoordinator::new(),
            guid: VmGuid::random(),
            vm_wait: JobTimes::default().vm_wait,
        }
    }

    pub(super) fn host(&self, name: &str) -> Host {
        Host::new(&self.path(name), self.fabric)
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// An image with content that no two chunks share.
    pub(super) fn image(&self, size: u64) -> PathBuf {
        let (raw, path) = (self.path("content"), self.path("a.qcow2"));
        let mut content = vec![0; usize::try_from(size).expect("small")];
        blake3::Hasher::new().update(b"content").finalize_xof().fill(&mut content);
        std::fs::write(&raw, content).expect("written");
        convert(("raw", &raw), ("qcow2", &path));
        std::fs::remove_file(&raw).expect("removed");
        path
    }

    /// Starts the VM, and waits until the agent sees it.
    async fn start(&self, host: &Host, agent: &Arc<Qemu>, image: &Path) -> Vm {
        let vm = Vm::start(host, self.guid, &[image], &[]).await;
        until("it is seen", || async { agent.fleet.find(self.guid) }).await;
        vm
    }

    /// A whole backup: the job, and what it committed.
    pub(super) async fn backed_up(&self, agent: &Arc<Qemu>, epoch: u64) -> (JobId, CommitRequest) {
        let (job, point) = (JobId::random(), PointId::random());
        self.ends_well(self.attempt(agent, job, point, epoch)).await;
        (job, self.commit(job))
    }

    /// Waits until a backup has stored so much.
    async fn stored(&self, bytes: u64) {
        let stored = || async { (self.store.puts().1 > bytes).then_some(()) };
        until("a part is stored", stored).await;
    }

    pub(super) fn commit(&self, job: JobId) -> CommitRequest {
        self.coordinator.with(|d| d.commits[&job.to_string()].clone())
    }

    fn reader(&self) -> Reader {
        let pool = Pool::new(2, 8 << 20);
        Reader { store: Arc::new(self.store.clone()), sealer: sealer(), pool }
    }

    /// The manifest of what a job committed.
    async fn manifest(&self, job: JobId) -> Manifest {
        let id = self.commit(job).manifest_id.parse().expect("an id");
        restore::fetch_manifest(&self.reader(), id).await.expect("the manifest opens")
    }

    pub(super) fn attempt(
        &self,
        agent: &Arc<Qemu>,
        job: JobId,
        point: PointId,
        epoch: u64,
    ) -> Attempt {
        let work = Work::Backup(BackupWork {
            kind: BackupKind::Incremental.into(),
            wanted: Consistency::Crash.into(),
            minimum: Consistency::Crash.into(),
            point_id: point.to_string(),
            ..BackupWork::default()
        });
        self.attempt_at(agent, job, epoch, work)
    }

    pub(super) fn attempt_at(
        &self,
        agent: &Arc<Qemu>,
        job: JobId,
        epoch: u64,
        work: Work,
    ) -> Attempt {
        let clock = Arc::new(SystemClock::new());
        let hour = Duration::from_secs(3600);
        let lease = Lease::granted(job, LeaseEpoch(epoch), hour, false, clock.clone());
        lease.renew(clock.monotonic());
        self.coordinator.with(|d| d.lease_epoch = epoch);
        let sources = Sources::new(agent.clone(), Duration::from_secs(1));
        let brief = Duration::from_millis(20);
        let context = JobContext {
            hypervisor: agent.clone(),
            coordinator: Arc::new(self.coordinator.clone()),
            store: Arc::new(self.store.clone()),
            sealer: sealer(),
            lease: lease.clone(),
            sources: sources.clone(),
            pool: Pool::new(2, 8 << 20),
            limits: Limits { read_size: ByteCount(1 << 20), ..Limits::default() },
            times: JobTimes {
                busy_first: brief,
                busy_ceiling: brief,
                barrier_interval: brief,
                vm_wait: self.vm_wait,
                ..JobTimes::default()
            },
            clock,
            host: "h".into(),
            scratch: self.folder.path().join("scratch"),
            progress: watch::Sender::new(Progress::default()),
            metrics: NodeMetrics::default(),
            commands: Arc::default(),
            told: job::Told::default(),
        };
        let key = VmKey { realm: "kvm".into(), guid: self.guid, role: VmRole::Primary };
        let message = JobLease {
            job_id: job.to_string(),
            attempt: u32::try_from(epoch).expect("small"),
            lease_epoch: epoch,
            vm: Some((&key).into()),
            vm_name: "web".into(),
            chunk_size: CHUNK,
            work: Some(work),
            ..JobLease::default()
        };
        let task = tokio::spawn(async move { job::run(context, message).await });
        Attempt { task, lease, sources }
    }

    pub(super) async fn ends_well(&self, attempt: Attempt) {
        let ended = tokio::time::timeout(Duration::from_secs(120), attempt.task).await;
        let good = ended.expect("ends in time").expect("no panic");
        assert!(good, "{:?}", self.coordinator.with(|d| d.finished.last().cloned()));
    }

    /// The disk of a committed point is what the image holds now.
    async fn judge(&self, job: JobId, image: &Path) {
        let (reader, manifest) = (self.reader(), self.manifest(job).await);
        let out = self.path(&format!("{job}.vhdx"));
        restore::export_disk(&reader, &manifest.disks[0], CHUNK, &out).await.expect("exported");
        let compared = Command::new("qemu-img")
            .args(["compare", "-f", "vhdx", "-F", "qcow2"])
            .args([&out, image])
            .output()
            .expect("qemu-img");
        let said = String::from_utf8_lossy(&compared.stdout).into_owned();
        assert!(compared.status.success(), "the point differs from the disk: {said}");
    }
}

fn convert(from: (&str, &Path), to: (&str, &Path)) {
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-f", from.0, "-O", to.0]).args([from.1, to.1]);
    assert!(command.status().is_ok_and(|s| s.success()), "{command:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_a_migration_interrupts_goes_on_from_what_is_stored_and_is_exact() {
    if qemu_is_missing() {
        return;
    }
    let world = World::new();
    let (from, to) = (world.host("h1"), world.host("h2"));
    let image = world.image(5 * LEAF + 3 * 512);
    let way = format!("unix:{}", world.path("way").display());
    let source = Vm::start(&from, world.guid, &[&image], &[]).await;
    let target = Vm::start(&to, world.guid, &[&image], &["-incoming", &way]).await;
    // Slow enough to be in the middle of it.
    let here = from.agent_with(|c| c.max_read_rate = Some(ByteCount(4 << 20))).await;
    let there = to.agent().await;
    source.ask("cont", serde_json::Value::Null).await;
    source.ask("migrate-set-parameters", json!({ "max-bandwidth": 1_000_000 })).await;
    let (job, point) = (JobId::random(), PointId::random());
    let first = world.attempt(&here, job, point, 1);
    // Two leaf pages and a part of the third.
    world.stored(2 * LEAF + LEAF / 2).await;
    source.ask("migrate", json!({ "uri": way })).await;
    until("the checkpoint gives way", || async {
        here.checkpoints(world.guid).await.expect("listed").is_empty().then_some(())
    })
    .await;
    // Into a page that is stored, into one that is not, and beyond what was allocated.
    source.write(0, 0xa1, 5 * u64::from(CHUNK), 4096).await;
    source.write(0, 0xa2, 4 * LEAF, 2 * MIB).await;
    source.ask("migrate-set-parameters", json!({ "max-bandwidth": 1_000_000_000 })).await;
    until("it has arrived", || async {
        let status = target.ask("query-status", serde_json::Value::Null).await;
        (status["status"] != "inmigrate").then_some(())
    })
    .await;
    first.moved().await;
    let (_, sent_before, _) = world.store.puts();
    let second = world.attempt(&there, job, point, 2);
    // It was started to stand still. From QEMU 10.0 on it does not hold its disks before it is let go on: the job waits.
    target.ask("cont", serde_json::Value::Null).await;
    world.ends_well(second).await;
    let commit = world.commit(job);
    let stats = commit.stats.expect("figures");
    assert!(stats.adopted_pages >= 1, "{stats:?}");
    assert_eq!(stats.resent_bytes, 0, "{stats:?}");
    assert!(commit.reasons.iter().any(|r| r.contains("lost in a move")), "{:?}", commit.reasons);
    let sent_after = world.store.puts().1 - sent_before;
    assert!(sent_after < 3 * LEAF, "{sent_after} bytes were sent after the move: {stats:?}");
    assert_eq!(target.ours().await.len(), 1, "one bitmap: {:?}", target.ours().await);
    assert!(
        world
            .coordinator
            .with(|d| d.duties.iter().all(|k| k.state() == outrider_proto::rpc::DutyState::Done))
    );
    // And on the new host the next one is an incremental.
    target.write(0, 0xa3, LEAF, 4096).await;
    let (next, commit) = world.backed_up(&there, 3).await;
    assert_eq!(commit.kind(), BackupKind::Incremental, "{:?}", commit.reasons);
    assert_eq!(commit.stats.expect("figures").changed_bytes, u64::from(CHUNK));
    source.end().await;
    target.end().await;
    world.judge(next, &image).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_is_restarted_in_a_backup_goes_on_and_one_that_is_killed_starts_over() {
    if qemu_is_missing() {
        return;
    }
    for killed in [false, true] {
        let world = World::new();
        let (host, image) = (world.host("h"), world.image(3 * LEAF));
        let vm = Vm::start(&host, world.guid, &[&image], &[]).await;
        let agent = host.agent_with(|c| c.max_read_rate = Some(ByteCount(6 << 20))).await;
        let (job, point) = (JobId::random(), PointId::random());
        let attempt = world.attempt(&agent, job, point, 1);
        world.stored(LEAF + LEAF / 2).await;
        if killed {
            drop(vm);
        } else {
            vm.end().await;
        }
        // The same attempt waits for its VM.
        let vm = Vm::start(&host, world.guid, &[&image], &[]).await;
        world.ends_well(attempt).await;
        let commit = world.commit(job);
        let carried = commit.reasons.iter().any(|r| r.contains("lost in a move"));
        assert_eq!(carried, !killed, "{:?}", commit.reasons);
        assert_eq!(vm.ours().await.len(), 1, "{:?}", vm.ours().await);
        vm.end().await;
        world.judge(job, &image).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_ends_for_good_in_a_backup_is_told_as_that_and_nothing_is_left() {
    if qemu_is_missing() {
        return;
    }
    for killed in [false, true] {
        let world = World { vm_wait: Duration::from_millis(200), ..World::new() };
        let (host, image) = (world.host("h"), world.image(3 * LEAF));
        let vm = Vm::start(&host, world.guid, &[&image], &[]).await;
        let agent = host.agent_with(|c| c.max_read_rate = Some(ByteCount(6 << 20))).await;
        let attempt = world.attempt(&agent, JobId::random(), PointId::random(), 1);
        world.stored(LEAF + LEAF / 2).await;
        if killed {
            drop(vm);
        } else {
            vm.end().await;
        }
        let ended = tokio::time::timeout(Duration::from_secs(120), attempt.task).await;
        assert!(!ended.expect("ends in time").expect("no panic"), "it cannot succeed");
        let end = world.coordinator.with(|d| d.finished.last().cloned()).expect("it ended");
        assert!(end.message.contains("VM \"web\" ended while it was backed up"), "{end:?}");
        assert!(end.message.contains("goes on where the VM is started"), "{end:?}");
        assert!(end.retry && !end.data_safe, "{end:?}");
        assert!(!end.message.contains("pipe"), "{end:?}");
        let scratch = std::fs::read_dir(host.folder.join("scratch")).expect("a folder");
        let left: Vec<_> = scratch.map(|e| e.expect("an entry").file_name()).collect();
        assert!(left.iter().all(|n| n == "held" || n == "definitions"), "{left:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_moved_image_keeps_its_base_and_one_without_our_bitmap_is_read_in_full_and_says_why() {
    if qemu_is_missing() {
        return;
    }
    let world = World::new();
    let (host, first) = (world.host("h"), world.image(2 * LEAF));
    let agent = host.agent().await;
    let vm = world.start(&host, &agent, &first).await;
    world.backed_up(&agent, 1).await;
    vm.end().await;

    // As `cp` moves it while the VM is off.
    let second = world.path("elsewhere.qcow2");
    std::fs::rename(&first, &second).expect("moved");
    let vm = world.start(&host, &agent, &second).await;
    vm.write(0, 0xb1, LEAF, 4096).await;
    let (job, commit) = world.backed_up(&agent, 2).await;
    assert_eq!(commit.kind(), BackupKind::Incremental, "{:?}", commit.reasons);
    assert_eq!(commit.stats.expect("figures").changed_bytes, u64::from(CHUNK));
    vm.end().await;
    world.judge(job, &second).await;

    // As a storage migration by somebody else leaves it: the content without the bitmap.
    let third = world.path("converted.qcow2");
    convert(("qcow2", &second), ("qcow2", &third));
    let vm = world.start(&host, &agent, &third).await;
    vm.write(0, 0xb2, 0, 4096).await;
    let (job, commit) = world.backed_up(&agent, 3).await;
    assert!(commit.stats.expect("figures").read_bytes > LEAF, "in full: {:?}", commit.stats);
    assert!(!commit.reasons.is_empty(), "it says why");
    println!("{:?} {:?}", commit.kind(), commit.reasons);
    assert_eq!(vm.ours().await.len(), 1, "{:?}", vm.ours().await);
    vm.end().await;
    world.judge(job, &third).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_disk_is_what_qemu_itself_would_make() {
    if qemu_is_missing() {
        return;
    }
    let world = World::new();
    let (host, image) = (world.host("h"), world.image(2 * LEAF + 512));
    let agent = host.agent().await;
    let vm = world.start(&host, &agent, &image).await;
    let (job, _) = world.backed_up(&agent, 1).await;
    vm.end().await;
    let manifest = world.manifest(job).await;
    assert_eq!(manifest.config[0].name, "vm.json");
    let disk = &manifest.disks[0];
    assert_eq!((disk.file_name.as_str(), agent.disk_extension(disk)), ("a.qcow2", "qcow2"));
    for name in ["restored.qcow2", "restored.raw"] {
        let path = world.path(name);
        let content = {
            let (agent, disk, path, image) =
                (agent.clone(), disk.clone(), path.clone(), image.clone());
            tokio::task::spawn_blocking(move || {
                let raw = path.with_extension("content");
                convert(("qcow2", &image), ("raw", &raw));
                let content = std::fs::read(&raw).expect("read");
                let mut new = agent.create_disk(&path, &disk, false).expect("made");
                // With a hole at its start.
                new.write_at(MIB, &content[usize::try_from(MIB).expect("small")..])
                    .expect("written");
                new.finish().expect("finished");
                content
            })
            .await
            .expect("no panic")
        };
        let format = if name.ends_with("qcow2") { "qcow2" } else { "raw" };
        let back = world.path("back");
        convert((format, &path), ("raw", &back));
        let back = std::fs::read(&back).expect("read");
        let hole = usize::try_from(MIB).expect("small");
        assert!(back[..hole].iter().all(|b| *b == 0) && back[hole..] == content[hole..], "{name}");
    }
    // A file that is there is never written over.
    let taken = world.path("restored.raw");
    let (refusing, like) = (agent.clone(), disk.clone());
    let refused =
        tokio::task::spawn_blocking(move || refusing.create_disk(&taken, &like, false).err());
    assert!(refused.await.expect("no panic").is_some());
}
