//! Real QEMU processes, without a guest.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use outrider_disk::{RangeSet, ReadDisk};
use outrider_process::clock::{Clock, SystemClock};
use outrider_process::tasks::TaskGroup;
use outrider_proto::ids::{FabricId, JobId, LeaseEpoch, VmGuid};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::super::qmp::Qmp;
use super::super::{Qemu, names};
use crate::config::{ByteCount, QemuConfig};
use crate::hypervisor::{
    Change, Checkpoint, CheckpointRequest, Hypervisor, HypervisorError, ReplicaRole, Retry,
};
use crate::lease::Lease;

pub(super) const PLAIN: CheckpointRequest =
    CheckpointRequest { quiesce: false, truncate_logs: false };
pub(super) const NAME: &str = "Outrider 0b7f-job 1 4";
pub(super) const MIB: u64 = 1 << 20;
pub(super) const DEADLINE: Duration = Duration::from_secs(60);

/// The emulator; `OUTRIDER_QEMU` names another one than that of this machine.
pub(super) fn qemu() -> OsString {
    std::env::var_os("OUTRIDER_QEMU").unwrap_or_else(|| "qemu-system-x86_64".into())
}

/// The emulator of a VM that waits for its migration; `OUTRIDER_QEMU_TARGET` names one of another version.
fn qemu_at_target() -> OsString {
    std::env::var_os("OUTRIDER_QEMU_TARGET").unwrap_or_else(qemu)
}

/// Whether QEMU is there; without it a test says so and passes, except in CI.
pub(super) fn qemu_is_missing() -> bool {
    let there = Command::new(qemu()).arg("--version").output().is_ok();
    assert!(there || std::env::var_os("OUTRIDER_CI").is_none(), "qemu-system-x86_64 is missing");
    if !there {
        eprintln!("SKIPPED: qemu-system-x86_64 is not installed");
    }
    !there
}

pub(super) fn lease() -> Lease {
    let clock = Arc::new(SystemClock::new());
    let lease = Lease::granted(
        JobId::random(),
        LeaseEpoch(1),
        Duration::from_secs(3600),
        false,
        clock.clone(),
    );
    lease.renew(clock.monotonic());
    lease
}

/// A host: a folder of sockets and an agent's view of it.
pub(super) struct Host {
    pub(super) folder: PathBuf,
    pub(super) fabric: FabricId,
}

impl Host {
    pub(super) fn new(folder: &Path, fabric: FabricId) -> Self {
        std::fs::create_dir_all(folder).expect("a folder");
        Self { folder: folder.to_owned(), fabric }
    }

    pub(super) async fn agent(&self) -> Arc<Qemu> {
        self.agent_with(|_| {}).await
    }

    pub(super) async fn agent_with(&self, change: impl FnOnce(&mut QemuConfig)) -> Arc<Qemu> {
        let mut config = QemuConfig {
            sockets: self.folder.clone(),
            images: vec![self.folder.clone()],
            scratch: None,
            scratch_limit: ByteCount(1 << 30),
            freeze: Duration::from_secs(5),
            guest_agent: Duration::from_millis(500),
            max_read_rate: None,
            read_depth: 2,
        };
        change(&mut config);
        let scratch = self.folder.join("scratch");
        let started = Qemu::start(config, &scratch, self.fabric, TaskGroup::new("test")).await;
        Arc::new(started.expect("an agent"))
    }
}

/// A QEMU process and its second monitor.
pub(super) struct Vm {
    child: Child,
    control: Qmp,
    _tasks: TaskGroup,
    guid: VmGuid,
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Vm {
    /// Starts with these images, in this order (qcow2 by extension, else raw).
    pub(super) async fn start(host: &Host, guid: VmGuid, images: &[&Path], more: &[&str]) -> Self {
        let control = host.folder.join("web.control");
        let arrives = more.contains(&"-incoming");
        let mut command = Command::new(if arrives { qemu_at_target() } else { qemu() });
        // One that all versions know, so that a VM can move between two of them.
        command.args(["-name", "web", "-machine", "pc-q35-7.2,accel=tcg", "-m", "64"]);
        command.args(["-display", "none", "-nodefaults", "-S", "-uuid", &guid.to_string()]);
        for (id, path) in [("outrider", host.folder.join("web.qmp")), ("control", control.clone())]
        {
            let _ = std::fs::remove_file(&path);
            let socket = format!("socket,id={id},path={},server=on,wait=off", path.display());
            command.args(["-chardev", &socket, "-mon", &format!("chardev={id},mode=control")]);
        }
        for (i, image) in images.iter().enumerate() {
            let format =
                if image.extension().is_some_and(|e| e == "qcow2") { "qcow2" } else { "raw" };
            let node = json!({
                "driver": format, "node-name": format!("d{i}"),
                "file": { "driver": "file", "filename": image },
            });
            command.args(["-blockdev", &node.to_string()]);
            command.args(["-device", &format!("virtio-blk-pci,id=disk{i},drive=d{i}")]);
        }
        let child = command.args(more).stdout(Stdio::null()).spawn().expect("QEMU starts");
        let tasks = TaskGroup::new("control");
        let control = until("QEMU listens", || async {
            Qmp::connect(&control, &tasks.spawner()).await.ok().map(|(qmp, _)| qmp)
        })
        .await;
        Self { child, control, _tasks: tasks, guid }
    }

    pub(super) async fn ask(&self, command: &str, arguments: Value) -> Value {
        self.control.execute(command, arguments).await.expect(command)
    }

    /// Lets the "guest" write.
    pub(super) async fn write(&self, disk: usize, byte: u8, offset: u64, len: u64) {
        let line = format!(
            "qemu-io -d /machine/peripheral/disk{disk}/virtio-backend \"write -P {byte} {offset} {len}\""
        );
        let said = self.ask("human-monitor-command", json!({ "command-line": line })).await;
        // It tells what it did on its standard output, and only errors to us.
        assert_eq!(said.as_str().map(str::trim), Some(""), "{said}");
    }

    /// What of ours is in QEMU: nodes, exports, the NBD server, named bitmaps.
    pub(super) async fn ours(&self) -> Vec<String> {
        let nodes = self.ask("query-named-block-nodes", json!({ "flat": true })).await;
        let mut found = Vec::new();
        for node in nodes.as_array().expect("nodes") {
            let name = node["node-name"].as_str().unwrap_or_default();
            if names::parse_node(name).is_some() {
                found.push(name.to_owned());
            }
            for bitmap in node["dirty-bitmaps"].as_array().into_iter().flatten() {
                found.extend(bitmap["name"].as_str().map(|b| format!("{name}/{b}")));
            }
        }
        let exports = self.ask("query-block-exports", Value::Null).await;
        found.extend(super::super::server::export_ids(&exports));
        found
    }

    pub(super) async fn end(mut self) {
        let _ = self.control.execute("quit", Value::Null).await;
        let _ = tokio::task::block_in_place(|| self.child.wait());
    }
}

pub(super) async fn until<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut look: impl FnMut() -> F,
) -> T {
    let until = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < until, "stuck: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub(super) fn qcow2(path: &Path, size: u64) {
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(path)
        .arg(size.to_string())
        .status();
    assert!(made.is_ok_and(|s| s.success()));
}

fn raw(path: &Path, size: u64) {
    std::fs::File::create(path).and_then(|f| f.set_len(size)).expect("a file");
}

async fn opened(
    agent: &Arc<Qemu>,
    checkpoint: &Checkpoint,
) -> Vec<Arc<dyn crate::source::FrozenSource>> {
    let frozen = agent.checkpoint_disks(checkpoint).await.expect("disks");
    let agent = agent.clone();
    tokio::task::spawn_blocking(move || {
        frozen.iter().map(|d| Arc::from(agent.open_disk(&d.path).expect("opens"))).collect()
    })
    .await
    .expect("no panic")
}

async fn read(disk: &Arc<dyn crate::source::FrozenSource>, offset: u64, len: u64) -> Vec<u8> {
    let disk = disk.clone();
    tokio::task::spawn_blocking(move || {
        let mut buf = vec![0xee; usize::try_from(len).expect("small")];
        disk.read_at(offset, &mut buf).map(|()| buf)
    })
    .await
    .expect("no panic")
    .expect("readable")
}

fn all(bytes: &[u8], byte: u8) -> bool {
    bytes.iter().all(|b| *b == byte)
}

pub(super) async fn seen(agent: &Arc<Qemu>, guid: VmGuid) {
    until("the agent sees the VM", || async { agent.fleet.find(guid) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_stays_what_it_was_and_the_next_one_knows_what_changed() {
    if qemu_is_missing() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let host = Host::new(dir.path(), FabricId::random());
    // Neither size is a multiple of a chunk, a cluster or a MiB; the raw one not even of a sector.
    let (a, b) = (dir.path().join("a.qcow2"), dir.path().join("b.raw"));
    qcow2(&a, 100 * MIB + 3 * 512);
    raw(&b, 10_000_001);
    let vm = Vm::start(&host, VmGuid::random(), &[&a, &b], &[]).await;
    let agent = host.agent().await;
    vm.ask("cont", Value::Null).await;
    vm.write(0, 1, 0, MIB).await;
    vm.write(1, 1, 9_999_872, 512).await;
    let lease = lease();
    let first = agent.create_checkpoint(&lease, vm.guid, NAME, PLAIN).await.expect("a checkpoint");
    assert_eq!(agent.checkpoints(vm.guid).await.expect("listed"), std::slice::from_ref(&first));
    let again = agent.create_checkpoint(&lease, vm.guid, "Outrider other 1 1", PLAIN).await;
    assert!(matches!(again, Err(HypervisorError::Occupied { name, .. }) if name == NAME));
    // The guest goes on.
    vm.write(0, 2, MIB / 2, MIB).await;
    vm.write(1, 2, 9_999_360, 1024).await;
    let disks = opened(&agent, &first).await;
    assert_eq!(disks[0].info().size, 100 * MIB + 3 * 512);
    assert_eq!(disks[1].info().size, 10_000_384, "as the guest sees it: in whole sectors");
    assert!(all(&read(&disks[0], 0, MIB).await, 1));
    assert!(all(&read(&disks[0], MIB, 99 * MIB + 3 * 512).await, 0));
    assert!(all(&read(&disks[1], 9_999_360, 512).await, 0));
    assert!(all(&read(&disks[1], 9_999_872, 512).await, 1));
    let of = disks[0].clone();
    let allocated = tokio::task::spawn_blocking(move || of.allocated())
        .await
        .expect("no panic")
        .expect("a map");
    assert!(allocated.overlaps(0, MIB) && allocated.total_len() < 4 * MIB, "{allocated:?}");
    drop(disks);
    let base = agent.convert(&lease, vm.guid, &first).await.expect("a reference point");
    assert_eq!(base.tracking.len(), 2, "both disks are tracked: {base:?}");
    assert_eq!(agent.point_of(first.id), Some(base.id.clone()));
    assert_eq!(agent.reference_points(vm.guid).await.expect("listed"), std::slice::from_ref(&base));
    assert_eq!(vm.ours().await.len(), 2, "two bitmaps and nothing else: {:?}", vm.ours().await);

    vm.write(0, 3, 50 * MIB, 4096).await;
    let second = agent.create_checkpoint(&lease, vm.guid, NAME, PLAIN).await.expect("a checkpoint");
    let frozen = agent.checkpoint_disks(&second).await.expect("disks");
    let tracking = base.tracking_of(&frozen[0].slot).expect("tracked");
    let changed = agent.changes(&frozen[0].path, 100 * MIB, tracking).await.expect("changes");
    let mut wanted = RangeSet::new();
    wanted.insert(MIB / 2, MIB);
    wanted.insert(50 * MIB, 65536);
    assert_eq!(changed, wanted);
    let none =
        agent.changes(&frozen[1].path, 10_000_384, "6c1a0000-0000-4000-8000-000000000000").await;
    assert!(matches!(none, Err(HypervisorError::TrackingLost { .. })), "{none:?}");
    agent.destroy_checkpoint(&lease, vm.guid, &second).await.expect("gone");
    agent.destroy_reference_point(&lease, vm.guid, &base).await.expect("gone");
    assert_eq!(vm.ours().await, Vec::<String>::new());
    assert_eq!(vm.ask("query-status", Value::Null).await["status"], "running");
    vm.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_was_killed_finds_its_checkpoint_again_and_removes_what_was_half_made() {
    if qemu_is_missing() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let host = Host::new(dir.path(), FabricId::random());
    let a = dir.path().join("a.qcow2");
    qcow2(&a, 20 * MIB);
    let vm = Vm::start(&host, VmGuid::random(), &[&a], &[]).await;
    let agent = host.agent().await;
    vm.write(0, 7, 0, MIB).await;
    let lease = lease();
    let made = agent.create_checkpoint(&lease, vm.guid, NAME, PLAIN).await.expect("a checkpoint");
    drop(agent);
    vm.write(0, 8, 0, MIB).await;
    let agent = host.agent().await;
    assert_eq!(agent.checkpoints(vm.guid).await.expect("listed"), std::slice::from_ref(&made));
    assert!(all(&read(&opened(&agent, &made).await[0], 0, MIB).await, 7));
    assert!(agent.reference_points(vm.guid).await.expect("listed").is_empty(), "not yet one");
    // Killed in the middle of making one: a node without an export.
    agent.destroy_checkpoint(&lease, vm.guid, &made).await.expect("gone");
    drop(agent);
    let half = names::node(names::Node::Filter, 0, made.id);
    let scratch = names::node(names::Node::Scratch, 0, made.id);
    let file = dir.path().join("half.raw");
    raw(&file, 20 * MIB);
    vm.ask("blockdev-add", json!({ "driver": "file", "node-name": scratch, "filename": file }))
        .await;
    let filter = json!({ "driver": "copy-before-write", "node-name": half, "file": "d0", "target": scratch });
    vm.ask("blockdev-add", filter).await;
    let device = "/machine/peripheral/disk0/virtio-backend";
    vm.ask("qom-set", json!({ "path": device, "property": "drive", "value": half })).await;
    let agent = host.agent().await;
    assert_eq!(vm.ours().await, Vec::<String>::new());
    assert!(agent.checkpoints(vm.guid).await.expect("listed").is_empty());
    vm.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scratch_file_that_grows_too_large_costs_the_checkpoint_and_not_the_guest() {
    if qemu_is_missing() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let host = Host::new(dir.path(), FabricId::random());
    let a = dir.path().join("a.qcow2");
    qcow2(&a, 64 * MIB);
    let vm = Vm::start(&host, VmGuid::random(), &[&a], &[]).await;
    let agent = host.agent_with(|c| c.scratch_limit = ByteCount(MIB)).await;
    vm.write(0, 1, 0, 32 * MIB).await;
    agent.create_checkpoint(&lease(), vm.guid, NAME, PLAIN).await.expect("a checkpoint");
    vm.write(0, 2, 0, 32 * MIB).await;
    until("the checkpoint is given up", || async {
        agent.checkpoints(vm.guid).await.expect("listed").is_empty().then_some(())
    })
    .await;
    vm.write(0, 3, 0, 32 * MIB).await;
    // Its bitmap goes on: it still is a proof of what changed since.
    assert_eq!(agent.reference_points(vm.guid).await.expect("listed").len(), 1);
    vm.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_gives_way_to_a_migration_and_its_bitmap_travels() {
    if qemu_is_missing() {
        return;
    }
    for with_capability in [true, false] {
        let dir = tempfile::tempdir().expect("a folder");
        let fabric = FabricId::random();
        let (from, to) =
            (Host::new(&dir.path().join("h1"), fabric), Host::new(&dir.path().join("h2"), fabric));
        let a = dir.path().join("a.qcow2");
        qcow2(&a, 64 * MIB);
        let guid = VmGuid::random();
        let way = dir.path().join("way");
        let source = Vm::start(&from, guid, &[&a], &[]).await;
        let target =
            Vm::start(&to, guid, &[&a], &["-incoming", &format!("unix:{}", way.display())]).await;
        let (here, there) = (from.agent().await, to.agent().await);
        let arriving = there.inventory().await.expect("listed").vms.remove(0);
        assert!(!arriving.realized, "a VM on its way claims nothing");
        source.ask("cont", Value::Null).await;
        source.write(0, 1, 0, 8 * MIB).await;
        if with_capability {
            let capability =
                json!({ "capabilities": [{ "capability": "dirty-bitmaps", "state": true }] });
            source.ask("migrate-set-capabilities", capability.clone()).await;
            target.ask("migrate-set-capabilities", capability).await;
        }
        let lease = lease();
        let made = here.create_checkpoint(&lease, guid, NAME, PLAIN).await.expect("a checkpoint");
        let mut changes = there.watch().await.expect("watched");
        // Slow enough that it cannot end before the agent has heard of it.
        source.ask("migrate-set-parameters", json!({ "max-bandwidth": 1_000_000 })).await;
        source.ask("migrate", json!({ "uri": format!("unix:{}", way.display()) })).await;
        until("the checkpoint gives way", || async {
            here.checkpoints(guid).await.expect("listed").is_empty().then_some(())
        })
        .await;
        let refused = here.create_checkpoint(&lease, guid, NAME, PLAIN).await.expect_err("not now");
        assert_eq!(refused.retry(), Retry::Later, "{refused}");
        source.write(0, 2, 4 * MIB, 4096).await;
        source.ask("migrate-set-parameters", json!({ "max-bandwidth": 1_000_000_000 })).await;
        // It was started to stand still. From QEMU 10.0 on it does not hold its disks before it is let go on.
        until("it has arrived", || async {
            let status = target.ask("query-status", Value::Null).await;
            (status["status"] != "inmigrate").then_some(())
        })
        .await;
        target.ask("cont", Value::Null).await;
        let arrived = async {
            loop {
                match changes.recv().await {
                    Some(Change::Seen(vm)) if vm.realized => return vm,
                    Some(_) => {}
                    None => panic!("the watch ended"),
                }
            }
        };
        tokio::time::timeout(DEADLINE, arrived).await.expect("the target tells of the arrival");
        until("the source says that it has left", || async {
            let seen = here.inventory().await.expect("listed").vms.remove(0);
            (!seen.realized).then_some(())
        })
        .await;
        let point = there.reference_points(guid).await.expect("listed").remove(0);
        assert_eq!(Some(point.id.clone()), there.point_of(made.id));
        let tracking = point.tracking_of("disk0").expect("it recorded all the way").to_owned();
        target.write(0, 3, 60 * MIB, 4096).await;
        let next = there.create_checkpoint(&lease, guid, NAME, PLAIN).await.expect("a checkpoint");
        let frozen = there.checkpoint_disks(&next).await.expect("disks");
        let changed = there.changes(&frozen[0].path, 64 * MIB, &tracking).await.expect("changes");
        let mut wanted = RangeSet::new();
        wanted.insert(4 * MIB, 65536);
        wanted.insert(60 * MIB, 65536);
        assert_eq!(changed, wanted, "dirty-bitmaps: {with_capability}");
        assert!(all(&read(&opened(&there, &next).await[0], 4 * MIB, 4096).await, 2));
        source.end().await;
        target.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_qemu_means_lost_tracking_and_a_clean_end_keeps_it() {
    if qemu_is_missing() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let host = Host::new(dir.path(), FabricId::random());
    let a = dir.path().join("a.qcow2");
    qcow2(&a, 20 * MIB);
    let guid = VmGuid::random();
    let agent = host.agent().await;
    let lease = lease();
    let vm = Vm::start(&host, guid, &[&a], &[]).await;
    seen(&agent, guid).await;
    let made = agent.create_checkpoint(&lease, guid, NAME, PLAIN).await.expect("a checkpoint");
    let base = agent.convert(&lease, guid, &made).await.expect("a reference point");
    let mut changes = agent.watch().await.expect("watched");
    vm.end().await;
    let gone = tokio::time::timeout(DEADLINE, changes.recv()).await.expect("told");
    assert_eq!(gone, Some(Change::Gone(guid, ReplicaRole::None)));
    assert!(matches!(agent.vm(guid).await, Err(HypervisorError::NoSuchVm { .. })));

    let vm = Vm::start(&host, guid, &[&a], &[]).await;
    seen(&agent, guid).await;
    assert_eq!(
        agent.reference_points(guid).await.expect("listed"),
        std::slice::from_ref(&base),
        "kept by a clean end"
    );
    drop(vm);
    until("the agent notices", || async { agent.fleet.find(guid).is_none().then_some(()) }).await;

    let vm = Vm::start(&host, guid, &[&a], &[]).await;
    seen(&agent, guid).await;
    let points = agent.reference_points(guid).await.expect("listed");
    assert_eq!(
        (points.len(), points[0].tracking.len()),
        (1, 0),
        "there, and proves nothing: {points:?}"
    );
    let next = agent.create_checkpoint(&lease, guid, NAME, PLAIN).await.expect("a checkpoint");
    let frozen = agent.checkpoint_disks(&next).await.expect("disks");
    let lost =
        agent.changes(&frozen[0].path, 20 * MIB, &base.id).await.expect_err("lost").to_string();
    assert!(lost.contains("inconsistent"), "{lost}");
    agent.destroy_reference_point(&lease, guid, &base).await.expect("removed");
    vm.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_that_cannot_be_read_is_given_up_at_once_and_its_bitmap_goes_on() {
    if qemu_is_missing() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let host = Host::new(dir.path(), FabricId::random());
    let a = dir.path().join("a.qcow2");
    qcow2(&a, 20 * MIB);
    let vm = Vm::start(&host, VmGuid::random(), &[&a], &[]).await;
    let agent = host.agent().await;
    let made = agent.create_checkpoint(&lease(), vm.guid, NAME, PLAIN).await.expect("a checkpoint");
    agent.checkpoints_of().broken.mark(made.id);
    assert!(agent.checkpoints(vm.guid).await.expect("listed").is_empty());
    until("only the bitmap is left", || async { (vm.ours().await.len() == 1).then_some(()) }).await;
    let point = agent.reference_points(vm.guid).await.expect("listed").remove(0);
    assert_eq!(Some(point.id), agent.point_of(made.id));
    vm.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_with_iothreads_is_captured_where_its_qemu_survives_that_and_refused_elsewhere() {
    if qemu_is_missing() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let host = Host::new(dir.path(), FabricId::random());
    let (a, b) = (dir.path().join("a.qcow2"), dir.path().join("b.raw"));
    qcow2(&a, 20 * MIB);
    raw(&b, 10 * MIB);
    let threads = ["-object", "iothread,id=io", "-global", "virtio-blk-pci.iothread=io"];
    let vm = Vm::start(&host, VmGuid::random(), &[&a, &b], &threads).await;
    let agent = host.agent().await;
    vm.ask("cont", Value::Null).await;
    let disk = json!({ "path": "/machine/peripheral/disk0", "property": "iothread" });
    assert_eq!(vm.ask("qom-get", disk).await, "/objects/io");
    let version = agent.fleet.find(vm.guid).expect("seen").qmp.version();
    let made = agent.create_checkpoint(&lease(), vm.guid, NAME, PLAIN).await;
    println!("{version}: {made:?}");
    if version < super::super::IOTHREADS {
        assert!(made.expect_err("refused").to_string().contains("iothreads"));
        vm.end().await;
        return;
    }
    agent.destroy_checkpoint(&lease(), vm.guid, &made.expect("made")).await.expect("gone");
    vm.write(0, 1, 0, MIB).await;
    vm.write(1, 1, 0, MIB).await;
    let made = agent.create_checkpoint(&lease(), vm.guid, NAME, PLAIN).await.expect("made");
    vm.write(0, 2, 0, 2 * MIB).await;
    vm.write(1, 2, 0, 2 * MIB).await;
    // Readers come and go.
    for _ in 0..3 {
        let disks = opened(&agent, &made).await;
        for disk in &disks {
            assert!(all(&read(disk, 0, MIB).await, 1) && all(&read(disk, MIB, MIB).await, 0));
        }
    }
    let base = agent.convert(&lease(), vm.guid, &made).await.expect("a reference point");
    assert_eq!(base.tracking.len(), 2, "{base:?}");
    assert_eq!(vm.ours().await.len(), 2, "{:?}", vm.ours().await);
    assert_eq!(vm.ask("query-status", Value::Null).await["status"], "running");
    vm.end().await;
}
