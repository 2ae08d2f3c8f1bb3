//! What a real QEMU or guest agent does not do on demand, by scripted peers.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use outrider_process::tasks::TaskGroup;
use outrider_proto::ids::{CheckpointId, FabricId, VmGuid};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

use super::super::Qemu;
use super::super::names::Bitmaps;
use super::super::qmp::{Qmp, QmpError};
use super::real::{Host, NAME, lease, until};
use crate::hypervisor::{CheckpointRequest, Hypervisor, HypervisorError, Retry};

const QUIET: CheckpointRequest = CheckpointRequest { quiesce: true, truncate_logs: false };
const PLAIN: CheckpointRequest = CheckpointRequest { quiesce: false, truncate_logs: false };

/// What a peer was told, in order.
type Told = Arc<Mutex<Vec<String>>>;

/// A QEMU that does nothing but answer.
#[derive(Clone)]
struct Peer {
    guid: VmGuid,
    version: (u32, u32),
    /// The socket closes at this command.
    closes_at: Option<&'static str>,
    iothreads: bool,
    /// It does not hold its disk (yet).
    inactive: bool,
    /// On its disk.
    bitmap: Option<String>,
    /// This command is refused with this text.
    refuses: Option<(&'static str, &'static str)>,
    told: Told,
}

impl Peer {
    fn new(version: (u32, u32)) -> Self {
        Self {
            guid: VmGuid::random(),
            version,
            closes_at: None,
            iothreads: false,
            inactive: false,
            bitmap: None,
            refuses: None,
            told: Told::default(),
        }
    }

    fn serve(&self, socket: &Path) {
        let listener = UnixListener::bind(socket).expect("listens");
        let peer = self.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                peer.talk(stream).await;
            }
        });
    }

    async fn talk(&self, stream: UnixStream) {
        let (read, mut write) = stream.into_split();
        let version =
            json!({ "qemu": { "major": self.version.0, "minor": self.version.1, "micro": 0 } });
        let greeting = json!({ "QMP": { "version": version, "capabilities": [] } });
        let mut out = format!("{greeting}\n");
        let mut lines = BufReader::new(read).lines();
        loop {
            if write.write_all(out.as_bytes()).await.is_err() {
                return;
            }
            let Ok(Some(line)) = lines.next_line().await else { return };
            let asked: Value = serde_json::from_str(&line).expect("JSON");
            let command = asked["execute"].as_str().expect("a command").to_owned();
            self.told.lock().expect("no panic").push(command.clone());
            if self.closes_at == Some(command.as_str()) {
                return;
            }
            let answer = match self.refuses {
                Some((refused, text)) if refused == command => {
                    json!({ "id": asked["id"], "error": { "class": "GenericError", "desc": text } })
                }
                _ => json!({ "id": asked["id"], "return": self.answer(&command) }),
            };
            out = format!("{answer}\n");
        }
    }

    fn answer(&self, command: &str) -> Value {
        let bitmaps: Vec<Value> =
            self.bitmap.iter().map(|name| json!({ "name": name, "recording": true })).collect();
        let node = json!({
            "node-name": "d0", "drv": "qcow2", "ro": false, "file": "/srv/a.qcow2",
            "active": !self.inactive, "dirty-bitmaps": bitmaps,
            "image": { "virtual-size": 1 << 20, "format-specific": { "data": { "compat": "1.1" } } },
        });
        match command {
            "query-uuid" => json!({ "UUID": self.guid.to_string() }),
            "query-name" => json!({ "name": "web" }),
            "query-status" => json!({ "status": "running" }),
            "query-block" => {
                json!([{ "device": "", "qdev": "disk0", "removable": false, "inserted": node }])
            }
            "query-named-block-nodes" => json!([node]),
            "query-block-exports" | "query-block-jobs" | "query-fdsets" => json!([]),
            "query-iothreads" if self.iothreads => json!([{ "id": "io1" }]),
            "query-iothreads" => json!([]),
            "add-fd" => json!({ "fdset-id": 1 }),
            _ => json!({}),
        }
    }

    fn was_told(&self, command: &str) -> bool {
        self.told.lock().expect("no panic").iter().any(|c| c == command)
    }
}

/// A guest agent.
#[derive(Clone)]
struct Guest {
    frozen: Arc<Mutex<bool>>,
    /// Commands that get no answer, as long as this holds.
    hangs_at: Arc<Mutex<Option<&'static str>>>,
    told: Told,
}

impl Guest {
    fn new(frozen: bool) -> Self {
        Self {
            frozen: Arc::new(Mutex::new(frozen)),
            hangs_at: Arc::default(),
            told: Told::default(),
        }
    }

    fn serve(&self, socket: &Path) {
        let listener = UnixListener::bind(socket).expect("listens");
        let guest = self.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                guest.talk(stream).await;
            }
        });
    }

    async fn talk(&self, stream: UnixStream) {
        let (read, mut write) = stream.into_split();
        let mut read = BufReader::new(read);
        loop {
            let mut line = Vec::new();
            if read.read_until(b'\n', &mut line).await.unwrap_or(0) == 0 {
                return;
            }
            let begin = line.iter().position(|b| *b == b'{').expect("JSON");
            let asked: Value = serde_json::from_slice(&line[begin..]).expect("JSON");
            let command = asked["execute"].as_str().expect("a command").to_owned();
            self.told.lock().expect("no panic").push(command.clone());
            if *self.hangs_at.lock().expect("no panic") == Some(command.as_str()) {
                continue;
            }
            let answer = match command.as_str() {
                "guest-sync-delimited" => asked["arguments"]["id"].clone(),
                "guest-fsfreeze-status" => {
                    json!(if self.is_frozen() { "frozen" } else { "thawed" })
                }
                "guest-fsfreeze-freeze" => {
                    *self.frozen.lock().expect("no panic") = true;
                    json!(2)
                }
                "guest-fsfreeze-thaw" => {
                    let was = std::mem::take(&mut *self.frozen.lock().expect("no panic"));
                    json!(if was { 2 } else { 0 })
                }
                other => panic!("nobody asks a guest for {other}"),
            };
            let mut out = if command == "guest-sync-delimited" { vec![0xff] } else { Vec::new() };
            out.extend_from_slice(format!("{}\n", json!({ "return": answer })).as_bytes());
            if write.write_all(&out).await.is_err() {
                return;
            }
        }
    }

    fn is_frozen(&self) -> bool {
        *self.frozen.lock().expect("no panic")
    }

    fn was_told(&self, command: &str) -> bool {
        self.told.lock().expect("no panic").iter().any(|c| c == command)
    }
}

struct World {
    _dir: tempfile::TempDir,
    folder: PathBuf,
    host: Host,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let folder = dir.path().to_owned();
        let host = Host::new(&folder, FabricId::random());
        Self { _dir: dir, folder, host }
    }

    async fn with(&self, peer: &Peer, guest: Option<&Guest>) -> Arc<Qemu> {
        peer.serve(&self.folder.join("web.qmp"));
        if let Some(guest) = guest {
            guest.serve(&self.folder.join("web.qga"));
        }
        self.host.agent().await
    }

    async fn records(&self) -> usize {
        std::fs::read_dir(self.folder.join("scratch/held")).map_or(0, Iterator::count)
    }
}

#[tokio::test]
async fn a_qemu_that_is_too_old_is_told_with_what_to_do() {
    let world = World::new();
    let peer = Peer::new((6, 2));
    let agent = world.with(&peer, None).await;
    let refused =
        agent.create_checkpoint(&lease(), peer.guid, NAME, PLAIN).await.expect_err("refused");
    let text = refused.to_string();
    assert!(text.contains("6.2.0") && text.contains("Update QEMU"), "{text}");
    assert_eq!(refused.retry(), Retry::No);
    let disk = agent.inventory().await.expect("listed").vms[0].disks[0].clone();
    assert!(
        disk.uncapturable.is_some_and(|why| why.contains("older")),
        "the operator sees it beforehand"
    );
    assert!(!peer.was_told("blockdev-add"));
}

#[tokio::test]
async fn a_monitor_that_another_program_holds_is_told_as_that() {
    let dir = tempfile::tempdir().expect("a folder");
    let socket = dir.path().join("web.qmp");
    let _busy = UnixListener::bind(&socket).expect("listens");
    let tasks = TaskGroup::new("test");
    let error = Qmp::connect(&socket, &tasks.spawner()).await.map(drop).expect_err("no greeting");
    assert!(matches!(error, QmpError::NoGreeting { .. }), "{error}");
    assert!(error.to_string().contains("one client at a time"), "{error}");
}

#[tokio::test]
async fn a_socket_that_goes_in_the_middle_leaves_a_thawed_guest() {
    let world = World::new();
    let peer = Peer { closes_at: Some("blockdev-add"), ..Peer::new((7, 2)) };
    let guest = Guest::new(false);
    let agent = world.with(&peer, Some(&guest)).await;
    let failed = agent.create_checkpoint(&lease(), peer.guid, NAME, QUIET).await.expect_err("lost");
    assert_eq!(failed.retry(), Retry::Inspect, "{failed}");
    assert!(guest.was_told("guest-fsfreeze-freeze"));
    until("it is thawed", || async { (!guest.is_frozen()).then_some(()) }).await;
}

#[tokio::test]
async fn a_guest_without_an_agent_leads_to_another_way_of_taking_the_checkpoint() {
    let world = World::new();
    let peer = Peer::new((7, 2));
    let agent = world.with(&peer, None).await;
    assert!(!agent.vm(peer.guid).await.expect("known").facts.guest.backup.answers());
    let refused =
        agent.create_checkpoint(&lease(), peer.guid, NAME, QUIET).await.expect_err("refused");
    assert!(refused.is_guest_failure(), "{refused}");
    assert!(
        refused.to_string().contains("web.qga") || refused.to_string().contains("NAME.qga"),
        "{refused}"
    );
    assert!(!peer.was_told("blockdev-add"));
}

#[tokio::test]
async fn a_guest_agent_that_hangs_in_the_freeze_is_thawed_when_it_comes_back() {
    let world = World::new();
    let peer = Peer::new((7, 2));
    let guest = Guest::new(false);
    *guest.hangs_at.lock().expect("no panic") = Some("guest-fsfreeze-freeze");
    let agent = world.with(&peer, Some(&guest)).await;
    let refused =
        agent.create_checkpoint(&lease(), peer.guid, NAME, QUIET).await.expect_err("refused");
    assert!(refused.is_guest_failure(), "{refused}");
    assert!(!peer.was_told("blockdev-add"));
    until("it is told to thaw", || async { guest.was_told("guest-fsfreeze-thaw").then_some(()) })
        .await;
    until("the record is gone", || async { (world.records().await == 0).then_some(()) }).await;
    // One that does not even answer at the start.
    *guest.hangs_at.lock().expect("no panic") = Some("guest-sync-delimited");
    let refused =
        agent.create_checkpoint(&lease(), peer.guid, NAME, QUIET).await.expect_err("refused");
    assert!(refused.to_string().contains("did not answer"), "{refused}");
    assert!(!guest.is_frozen());
}

#[tokio::test]
async fn a_guest_that_somebody_else_has_frozen_is_not_touched() {
    let world = World::new();
    let peer = Peer::new((7, 2));
    let guest = Guest::new(true);
    let agent = world.with(&peer, Some(&guest)).await;
    let refused =
        agent.create_checkpoint(&lease(), peer.guid, NAME, QUIET).await.expect_err("refused");
    assert!(refused.to_string().contains("somebody else"), "{refused}");
    assert!(guest.is_frozen() && !guest.was_told("guest-fsfreeze-thaw"));
}

#[tokio::test]
async fn an_agent_that_starts_thaws_what_its_predecessor_had_frozen() {
    let world = World::new();
    let peer = Peer::new((7, 2));
    let guest = Guest::new(true);
    let held = world.folder.join("scratch/held");
    std::fs::create_dir_all(&held).expect("a folder");
    // The peer is this process.
    std::fs::write(held.join(format!("{}.frozen", peer.guid)), std::process::id().to_string())
        .expect("written");
    let _agent = world.with(&peer, Some(&guest)).await;
    until("it is thawed", || async { (!guest.is_frozen()).then_some(()) }).await;
    until("the record is gone", || async { (world.records().await == 0).then_some(()) }).await;
    // A record of another process of the VM is no reason to touch this one.
    let other = World::new();
    let (peer, guest) = (Peer::new((7, 2)), Guest::new(true));
    let held = other.folder.join("scratch/held");
    std::fs::create_dir_all(&held).expect("a folder");
    std::fs::write(held.join(format!("{}.frozen", peer.guid)), "1").expect("written");
    let _agent = other.with(&peer, Some(&guest)).await;
    until("the record is gone", || async { (other.records().await == 0).then_some(()) }).await;
    assert!(guest.is_frozen());
}

#[tokio::test]
async fn nbd_served_for_another_program_is_waited_for_and_an_odd_answer_is_told() {
    let world = World::new();
    let refuses = Some(("nbd-server-start", "NBD server already running"));
    let peer = Peer { refuses, ..Peer::new((7, 2)) };
    let agent = world.with(&peer, None).await;
    let refused =
        agent.create_checkpoint(&lease(), peer.guid, NAME, PLAIN).await.expect_err("refused");
    assert_eq!(refused.retry(), Retry::Later);
    assert!(refused.to_string().contains("another program"), "{refused}");
    let left = std::fs::read_dir(&world.folder).expect("read").flatten();
    assert!(
        left.map(|f| f.path()).all(|p| p.extension().is_none_or(|e| e != "nbd")),
        "no socket is left"
    );

    let world = World::new();
    let refuses = Some(("qom-set", "Property 'virtio-blk-device.drive' is locked"));
    let peer = Peer { refuses, ..Peer::new((10, 0)) };
    let agent = world.with(&peer, None).await;
    let refused =
        agent.create_checkpoint(&lease(), peer.guid, NAME, PLAIN).await.expect_err("refused");
    assert!(matches!(refused, HypervisorError::Qemu(_)), "{refused}");
    assert!(
        refused.to_string().contains("qom-set") && refused.to_string().contains("locked"),
        "{refused}"
    );
    assert!(peer.was_told("block-dirty-bitmap-add"));
}

#[tokio::test]
async fn iothreads_are_refused_where_they_would_crash_the_vm() {
    for (version, refused) in [((7, 2), true), ((9, 0), false)] {
        let world = World::new();
        let peer = Peer { iothreads: true, ..Peer::new(version) };
        let agent = world.with(&peer, None).await;
        let disk = agent.inventory().await.expect("listed").vms[0].disks[0].clone();
        assert_eq!(disk.uncapturable.is_some_and(|why| why.contains("iothreads")), refused);
        if refused {
            let error = agent
                .create_checkpoint(&lease(), peer.guid, NAME, PLAIN)
                .await
                .expect_err("refused");
            assert!(error.to_string().contains("older than 9.0"), "{error}");
            assert!(!peer.was_told("nbd-server-start"));
        }
    }
}

#[tokio::test]
async fn a_disk_that_takes_no_bitmap_is_captured_all_the_same() {
    let world = World::new();
    let peer = Peer {
        refuses: Some(("block-dirty-bitmap-add", "Bitmaps are not supported here")),
        ..Peer::new((7, 2))
    };
    let agent = world.with(&peer, None).await;
    agent.create_checkpoint(&lease(), peer.guid, NAME, PLAIN).await.expect("a checkpoint");
    assert!(peer.was_told("block-dirty-bitmap-add") && peer.was_told("block-export-add"));
    // Nothing records since it, so whoever asks for a base finds none and reads in full.
    assert!(agent.reference_points(peer.guid).await.expect("listed").is_empty());
}

#[tokio::test]
async fn a_vm_that_arrived_and_was_not_let_go_on_is_not_here_yet_and_its_disks_are_not_touched() {
    let world = World::new();
    let bitmap = Bitmaps::of(world.host.fabric).since(CheckpointId::random());
    let peer = Peer { inactive: true, bitmap: Some(bitmap), ..Peer::new((10, 0)) };
    let agent = world.with(&peer, None).await;
    let vm = agent.inventory().await.expect("listed").vms.remove(0);
    assert!(!vm.realized && vm.disks[0].uncapturable.is_none(), "{vm:?}");
    let refused = agent.create_checkpoint(&lease(), peer.guid, NAME, PLAIN).await;
    let refused = refused.expect_err("not now");
    assert_eq!(refused.retry(), Retry::Later, "{refused}");
    assert!(refused.to_string().contains("inactive"), "{refused}");
    // QEMU may end when such a disk is written to, and the bitmap is kept in it.
    let point = agent.reference_points(peer.guid).await.expect("listed").remove(0);
    let refused = agent.destroy_reference_point(&lease(), peer.guid, &point).await;
    assert_eq!(refused.expect_err("not now").retry(), Retry::Later);
    for never in ["nbd-server-start", "blockdev-add", "block-dirty-bitmap-remove"] {
        assert!(!peer.was_told(never), "{never}");
    }
}
