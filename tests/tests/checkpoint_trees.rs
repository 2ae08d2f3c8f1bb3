//! Checkpoint trees (P2) against the simulated cluster, with storage and coordinator in memory: every checkpoint of every
//! point is exact, what did not change is not read again, and nothing that befalls a layer befalls the point.

mod lab_world;

use std::path::PathBuf;

use lab_world::{DEADLINE, Job, MIB, World, work};
use outrider_disk::{
    DiskChain, DiskFormat, DiskKind, DiskWriter, NewDisk, ReadLayer, compare, vhdx::VhdxLayer,
};
use outrider_lab::{
    CheckpointOnMigration, CheckpointState, Comparison, DiskSource, GateSpec, MigrationKind,
    VmState, WaitFor,
};
use outrider_node::fakes::sealer;
use outrider_node::pipeline::Pool;
use outrider_node::restore::{self, Reader};
use outrider_proto::manifest::Manifest;
use outrider_proto::rpc::{BackupKind, BackupWork};
use uuid::Uuid;

async fn vm(world: &World) -> VmState {
    world.lab.vm(&world.name()).await.expect("it is there")
}

async fn checkpoint(world: &World, name: &str) -> Uuid {
    world.lab.user_checkpoint(&world.name(), name).await.expect("made")
}

async fn delete(world: &World, checkpoint: Uuid) {
    world.lab.delete_checkpoint(&world.name(), checkpoint).await.expect("deleted");
    world.lab.wait(WaitFor::NoMerge { vm: world.name() }, DEADLINE).await.expect("merged");
}

/// "first" is followed by "left" and "right"; the VM follows "right". Each has something of its own.
async fn branched(world: &World) -> [Uuid; 3] {
    let first = checkpoint(world, "first").await;
    world.write(MIB, 11).await;
    let left = checkpoint(world, "left").await;
    world.write(MIB, 12).await;
    world.lab.apply_checkpoint(&world.name(), first).await.expect("applied");
    world.write(MIB, 13).await;
    let right = checkpoint(world, "right").await;
    world.write(MIB, 14).await;
    [first, left, right]
}

fn reader(world: &World) -> Reader {
    Reader {
        store: std::sync::Arc::new(world.store.clone()),
        sealer: sealer(),
        pool: Pool::new(2, 8 << 20),
    }
}

async fn manifest(world: &World, job: Job) -> Manifest {
    let id = world.commit(job).manifest_id.parse().expect("an id");
    restore::fetch_manifest(&reader(world), id).await.expect("the manifest opens")
}

/// Flat, and with every checkpoint: byte for byte what the lab saw. `names` is the tree as (name, parent's name).
async fn judge(world: &World, job: Job, names: &[(&str, Option<&str>)], current: Option<&str>) {
    world.judge(job).await;
    let manifest = manifest(world, job).await;
    let tree = &manifest.tree;
    let name = |id| tree.checkpoint(id).expect("it is held").name.as_str();
    let shape: Vec<(&str, Option<&str>)> =
        tree.checkpoints.iter().map(|c| (c.name.as_str(), c.parent.map(name))).collect();
    assert_eq!(shape, names);
    assert_eq!(tree.current.map(name), current);
    for checkpoint in &tree.checkpoints {
        let kinds: Vec<&str> =
            checkpoint.config.iter().filter_map(|f| f.name.rsplit('.').next()).collect();
        assert_eq!(kinds, ["vmcx", "vmrs", "vmgs"], "{:?}", checkpoint.name);
        assert_eq!(checkpoint.facts.notes, format!("why {:?}", checkpoint.name));
        assert!(checkpoint.facts.created_unix_ms > 0);
    }
    let dir = world.folder.path().join(format!("tree-{}", job.id));
    let files = restore::export_tree(&reader(world), &manifest, &dir).await.expect("it is written");
    assert_eq!(files.len(), manifest.disks.len() * (names.len() + 1));
    let own = world.commit(job).checkpoint_id.parse().expect("a GUID");
    for file in &files {
        let place = manifest.disks.iter().position(|d| d.slot == file.slot).expect("a disk");
        let checkpoint = file.checkpoint.map_or(own, |c| c.0);
        let compared =
            world.lab.compare_disk(&file.path, checkpoint, place).await.expect("comparable");
        assert_eq!(compared, Comparison::Identical, "{file:?}");
        // A real differencing disk over the file of the checkpoint that it follows.
        let chain = DiskChain::open(&file.path).expect("a sound chain");
        let follows = match file.checkpoint {
            Some(id) => tree.checkpoint(id).expect("it is held").parent,
            None => tree.current,
        };
        let parent = files.iter().find(|f| f.slot == file.slot && f.checkpoint == follows);
        let expected = follows.and(parent).map(|p| p.path.canonicalize().expect("it is there"));
        let found = chain.files().get(1).map(|p| p.canonicalize().expect("it is there"));
        assert_eq!(found, expected, "{file:?}");
    }
    // As of each checkpoint alone, flat.
    for checkpoint in &tree.checkpoints {
        let then = manifest.at(&checkpoint.name).expect("it is held");
        let dir = world.folder.path().join(format!("at-{}-{}", job.id, checkpoint.id));
        std::fs::create_dir_all(&dir).expect("a folder");
        let files =
            restore::export_disks(&reader(world), &then, &dir).await.expect("it is written");
        for (place, file) in files.iter().enumerate() {
            let compared =
                world.lab.compare_disk(file, checkpoint.id.0, place).await.expect("comparable");
            assert_eq!(compared, Comparison::Identical, "{:?} disk {place}", checkpoint.name);
        }
    }
}

/// Nothing of ours but one bound reference point, and the administrator's checkpoints as they were.
async fn assert_clean(world: &World, checkpoints: usize) {
    world.lab.wait(WaitFor::NoMerge { vm: world.name() }, DEADLINE).await.expect("merged");
    let vm = vm(world).await;
    assert_eq!(vm.recovery_checkpoints().count(), 0, "{vm:?}");
    assert_eq!(vm.checkpoints.len(), checkpoints, "{vm:?}");
    assert_eq!(vm.reference_points.len(), 1, "{vm:?}");
}

fn warnings(world: &World) -> String {
    world.coordinator.with(|d| d.finished.last().map(|f| f.warnings.join("; ")).unwrap_or_default())
}

const BRANCHED: [(&str, Option<&str>); 3] =
    [("first", None), ("left", Some("first")), ("right", Some("first"))];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn branched_checkpoints_are_exact_point_after_point_while_some_are_removed() {
    let world = World::small().await;
    let [first, _left, right] = branched(&world).await;
    let flat = world.attempt_of(
        Job::new(BackupKind::Full),
        "alpha",
        1,
        BackupWork { flat_checkpoints: true, ..work() },
    );
    assert!(flat.await.end().await);
    let alone =
        world.coordinator.with(|d| d.finished.last().and_then(|f| f.stats)).expect("figures");
    let full = world.back_up("alpha", BackupKind::Full).await;
    assert_clean(&world, 3).await;
    judge(&world, full, &BRANCHED, Some("right")).await;
    let reasons = world.commit(full).reasons.join("; ");
    assert!(reasons.contains("checkpoints kept") && reasons.contains("\"left\""), "{reasons}");
    // The disks once, and what the files of the branches decide from either side: not the disks four times.
    let stats = world.commit(full).stats.expect("figures");
    assert!(
        stats.read_bytes < 3 * alone.read_bytes,
        "{} of {}",
        stats.read_bytes,
        alone.read_bytes
    );
    assert!(stats.sent_bytes < alone.disk_bytes, "{stats:?}");

    // Nothing of the layers changed: they are neither read nor sent again.
    world.write(MIB, 15).await;
    let second = world.back_up("alpha", BackupKind::Incremental).await;
    assert_eq!(world.commit(second).kind(), BackupKind::Incremental);
    judge(&world, second, &BRANCHED, Some("right")).await;
    let reasons = world.commit(second).reasons.join("; ");
    assert!(reasons.contains("6 of them unchanged"), "{reasons}");

    // The merge writes into the file that "right" had frozen: its layer goes, the others are as they were.
    delete(&world, right).await;
    world.write(MIB, 16).await;
    let third = world.back_up("alpha", BackupKind::Incremental).await;
    let left_alone = [("first", None), ("left", Some("first"))];
    judge(&world, third, &left_alone, Some("first")).await;
    assert_eq!(world.commit(third).kind(), BackupKind::Incremental);

    // A file that two branches come from stays, without a checkpoint; the branch has no parent any more.
    delete(&world, first).await;
    world.write(MIB, 17).await;
    let fourth = world.back_up("alpha", BackupKind::Incremental).await;
    judge(&world, fourth, &[("left", None)], None).await;
    assert_clean(&world, 1).await;
    // The points before are what they were.
    for (job, names, current) in [
        (full, &BRANCHED[..], Some("right")),
        (second, &BRANCHED[..], Some("right")),
        (third, &left_alone[..], Some("first")),
    ] {
        let again = manifest(&world, job).await;
        assert_eq!(again.tree.checkpoints.len(), names.len());
        assert_eq!(again.tree.current.is_some(), current.is_some());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_that_is_merged_into_its_parent_changes_that_layer_only() {
    let world = World::small().await;
    // One after the other: removing the middle one writes its changes into the file that it had frozen.
    let [_a, b, _c] = {
        let a = checkpoint(&world, "a").await;
        world.write(MIB, 21).await;
        let b = checkpoint(&world, "b").await;
        world.write(MIB, 22).await;
        let c = checkpoint(&world, "c").await;
        world.write(MIB, 23).await;
        [a, b, c]
    };
    let full = world.back_up("alpha", BackupKind::Full).await;
    judge(&world, full, &[("a", None), ("b", Some("a")), ("c", Some("b"))], Some("c")).await;
    delete(&world, b).await;
    let second = world.back_up("alpha", BackupKind::Incremental).await;
    judge(&world, second, &[("a", None), ("c", Some("a"))], Some("c")).await;
    let reasons = world.commit(second).reasons.join("; ");
    assert!(reasons.contains("2 of them unchanged"), "\"a\" on both disks: {reasons}");
    world.write(MIB, 24).await;
    checkpoint(&world, "d").await;
    world.write(MIB, 25).await;
    let third = world.back_up("alpha", BackupKind::Incremental).await;
    let names = [("a", None), ("c", Some("a")), ("d", Some("c"))];
    judge(&world, third, &names, Some("d")).await;
    assert_clean(&world, 3).await;
}

/// Killed and moved while it reads layers: what reached storage is neither read nor sent again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_or_moved_in_the_middle_of_a_layer_the_next_attempt_is_exact_and_sends_nothing_twice()
 {
    for moves in [false, true] {
        let disk = DiskSource::Empty { size: 96 * MIB, block_size: 1 << 20 };
        let world = World::new(CheckpointOnMigration::Travels, vec![disk]).await;
        let write = |from: u64, len: u64, seed| {
            outrider_lab::GuestWrite::at(&world.name(), 0, from * MIB, len * MIB, seed)
        };
        world.lab.guest_write(write(0, 40, 31)).await.expect("written");
        checkpoint(&world, "first").await;
        // Other bytes in the same places: the layer has much to read and to send.
        world.lab.guest_write(write(0, 40, 32)).await.expect("written");
        // The point itself, the layer's bytes beneath, and no more than half of them.
        let spec = GateSpec { vm: world.name(), host: Some("alpha".into()), budget: 66 * MIB };
        let gate = world.lab.set_gate(spec).await.expect("a gate");
        let job = Job::new(BackupKind::Full);
        let mut attempt = world.attempt(job, "alpha", 1).await;
        attempt.reaches("reading checkpoints").await;
        world.lab.wait(WaitFor::GateBlocked { gate }, DEADLINE).await.expect("it reads that far");
        world.until_settled().await;
        let host = if moves {
            world.lab.migrate(&world.name(), "beta", MigrationKind::Live).await.expect("it moves");
            "beta"
        } else {
            "alpha"
        };
        // Ended first: what it sent after the gate opened would be in no barrier.
        attempt.task.abort();
        world.lab.release_gate(gate).await.expect("released");
        attempt.kill().await;
        let good = world.attempt(job, host, 2).await.end().await;
        assert!(good, "{:?}", world.coordinator.with(|d| d.finished.last().cloned()));
        let stats = world.commit(job).stats.expect("figures");
        assert!(stats.resent_bytes <= lab_world::IN_HAND, "moves: {moves}: {stats:?}");
        // 40 MiB of the point and three leaf pages of the layer were there already: 8 MiB each.
        assert!(stats.adopted_pages >= 7, "moves: {moves}: {stats:?}");
        assert!(stats.read_bytes <= 32 * MIB, "moves: {moves}: {stats:?}");
        judge(&world, job, &[("first", None)], Some("first")).await;
        world.lab.wait(WaitFor::NoMerge { vm: world.name() }, DEADLINE).await.expect("merged");
        assert_eq!(vm(&world).await.recovery_checkpoints().count(), 0);
    }
}

fn frozen(vm: &VmState, id: Uuid, place: usize) -> PathBuf {
    let of = |c: &&CheckpointState| c.id == id;
    vm.checkpoints.iter().find(of).expect("it is there").frozen[place].clone()
}

/// Somebody writes into a frozen file of another branch: between two points its layer is read again; while it is read the
/// point is kept flat, says so, and is exact.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_file_that_is_written_to_is_read_again_and_never_half_of_each() {
    let world = World::small().await;
    let [_, left, _] = branched(&world).await;
    world.back_up("alpha", BackupKind::Full).await;
    let file = frozen(&vm(&world).await, left, 0);
    let before = VhdxLayer::open(&file).expect("opens").info().data_write_guid;
    let mut disk = DiskWriter::open(&file).expect("opens");
    disk.write_at(3 * MIB, &[0xAB; 4096]).expect("written");
    disk.close().expect("closed");
    assert_ne!(VhdxLayer::open(&file).expect("opens").info().data_write_guid, before);

    let second = world.back_up("alpha", BackupKind::Incremental).await;
    world.judge(second).await;
    let kept = manifest(&world, second).await;
    let dir = world.folder.path().join("written");
    let files = restore::export_tree(&reader(&world), &kept, &dir).await.expect("written");
    let slot = &kept.disks[0].slot;
    let layer = files.iter().find(|f| f.checkpoint.is_some_and(|c| c.0 == left) && f.slot == *slot);
    let restored = DiskChain::open(&layer.expect("it is kept").path).expect("opens");
    let live = DiskChain::open(&file).expect("opens");
    assert_eq!(compare::first_difference(&live, &restored).expect("comparable"), None);

    // In the middle of the next run. Nothing is read but by the gate, so the layers come after it opens.
    let spec = GateSpec { vm: world.name(), host: None, budget: 0 };
    let gate = world.lab.set_gate(spec).await.expect("a gate");
    let job = Job::new(BackupKind::Full);
    let mut attempt = world.attempt(job, "alpha", 1).await;
    world.lab.wait(WaitFor::GateBlocked { gate }, DEADLINE).await.expect("it reads");
    world.lab.release_gate(gate).await.expect("open");
    attempt.reaches("reading checkpoints").await;
    let spec = GateSpec { vm: world.name(), host: None, budget: 0 };
    let gate = world.lab.set_gate(spec).await.expect("a gate");
    let mut disk = DiskWriter::open(&file).expect("opens");
    disk.write_at(5 * MIB, &[0xCD; 4096]).expect("written");
    disk.close().expect("closed");
    world.lab.release_gate(gate).await.expect("open");
    let good = attempt.end().await;
    assert!(good, "{:?}", world.coordinator.with(|d| d.finished.last().cloned()));
    world.judge(job).await;
    let kept = manifest(&world, job).await;
    match kept.tree.checkpoints.as_slice() {
        [] => {
            assert!(warnings(&world).contains("written to meanwhile"), "{}", warnings(&world));
            let reasons = world.commit(job).reasons.join("; ");
            assert!(reasons.contains("not kept with this point"), "{reasons}");
        }
        // The write came first: then it is all of it.
        _ => {
            let dir = world.folder.path().join("written again");
            let files = restore::export_tree(&reader(&world), &kept, &dir).await.expect("written");
            let layer =
                files.iter().find(|f| f.checkpoint.is_some_and(|c| c.0 == left) && f.slot == *slot);
            let restored = DiskChain::open(&layer.expect("it is kept").path).expect("opens");
            let live = DiskChain::open(&file).expect("opens");
            assert_eq!(compare::first_difference(&live, &restored).expect("comparable"), None);
        }
    }
}

/// A layer that cannot be read costs the tree of this point, never the point.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_that_cannot_be_read_leaves_the_point_flat_exact_and_says_so() {
    let world = World::small().await;
    let [_, left, _] = branched(&world).await;
    let file = frozen(&vm(&world).await, left, 1);
    let aside = file.with_extension("aside");
    std::fs::rename(&file, &aside).expect("renamed");
    let flat = world.back_up("alpha", BackupKind::Full).await;
    world.judge(flat).await;
    assert!(manifest(&world, flat).await.tree.checkpoints.is_empty());
    let name = file.file_name().expect("a name").to_string_lossy().into_owned();
    assert!(warnings(&world).contains(&name), "the file is named: {}", warnings(&world));
    std::fs::rename(&aside, &file).expect("renamed");
    world.write(MIB, 18).await;
    let whole = world.back_up("alpha", BackupKind::Incremental).await;
    judge(&world, whole, &BRANCHED, Some("right")).await;
    assert_eq!(warnings(&world), "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_policy_may_leave_checkpoints_flat_and_the_next_point_keep_them() {
    let world = World::small().await;
    branched(&world).await;
    let flat = BackupWork { flat_checkpoints: true, ..work() };
    let first = Job::new(BackupKind::Full);
    assert!(world.attempt_of(first, "alpha", 1, flat.clone()).await.end().await);
    world.judge(first).await;
    let manifest_of_first = manifest(&world, first).await;
    assert!(manifest_of_first.tree.checkpoints.is_empty());
    world.write(MIB, 18).await;
    let second = world.back_up("alpha", BackupKind::Incremental).await;
    assert_eq!(world.commit(second).kind(), BackupKind::Incremental);
    judge(&world, second, &BRANCHED, Some("right")).await;
    // And back: an incremental over a point with a tree.
    world.write(MIB, 19).await;
    let third = Job::new(BackupKind::Incremental);
    assert!(world.attempt_of(third, "alpha", 1, flat).await.end().await);
    assert_eq!(world.commit(third).kind(), BackupKind::Incremental);
    world.judge(third).await;
}

/// Files of the older format do not tell when they are written to: their layers are read each time, and are exact.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn layers_of_vhd_disks_are_read_each_time_and_come_back_as_vhds() {
    let given = tempfile::tempdir().expect("a temporary folder");
    let path = given.path().join("old.vhd");
    let new = NewDisk::of(DiskFormat::Vhd, DiskKind::Dynamic, 9 * MIB + 512);
    DiskWriter::create(&path, &new).expect("made").close().expect("closed");
    let disks =
        vec![DiskSource::CopyOf(path), DiskSource::Empty { size: 11 * MIB, block_size: 1 << 20 }];
    let world = World::new(CheckpointOnMigration::Travels, disks).await;
    world.write(4 * MIB, 1).await;
    branched(&world).await;
    let full = world.back_up("alpha", BackupKind::Full).await;
    judge(&world, full, &BRANCHED, Some("right")).await;
    world.write(MIB, 15).await;
    let second = world.back_up("alpha", BackupKind::Incremental).await;
    judge(&world, second, &BRANCHED, Some("right")).await;
    let reasons = world.commit(second).reasons.join("; ");
    assert!(reasons.contains("3 of them unchanged"), "those of the VHDX: {reasons}");
    let dir = world.folder.path().join(format!("tree-{}", second.id)).join("Virtual Hard Disks");
    let avhds = std::fs::read_dir(dir)
        .expect("written")
        .flatten()
        .filter(|e| e.path().extension().is_some_and(|e| e == "avhd"));
    assert_eq!(avhds.count(), 3, "left, right, now");
}

/// Storage loses what it has not confirmed yet, and forgets what it had confirmed, in the middle of layers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn layers_survive_what_storage_loses_before_the_commit() {
    let world = World::small().await;
    branched(&world).await;
    world.store.lose_at_next_barrier(3);
    world.coordinator.with(|d| {
        d.lacking.push_back(vec![0]);
        d.lacking.push_back((0..64).collect());
    });
    let full = world.back_up("alpha", BackupKind::Full).await;
    judge(&world, full, &BRANCHED, Some("right")).await;

    // Pages and data of the parent point are gone from storage: what is taken over is read again.
    let mut nth = 0_u32;
    world.store.forget(|_| {
        nth += 1;
        nth.is_multiple_of(3)
    });
    world.write(MIB, 15).await;
    let second = world.back_up("alpha", BackupKind::Full).await;
    judge(&world, second, &BRANCHED, Some("right")).await;
}

/// A saved state that a checkpoint carries is a file of its configuration set, and is told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_of_a_saved_vm_keeps_its_memory() {
    let world = World::small().await;
    world.lab.save_vm(&world.name()).await.expect("saved");
    let saved = checkpoint(&world, "asleep").await;
    let full = world.back_up("alpha", BackupKind::Full).await;
    let kept = manifest(&world, full).await;
    assert!(kept.tree.checkpoints[0].facts.saved_state, "{:?}", kept.tree);
    assert!(kept.machine.saved_state, "so is the VM at the point");
    let of_it = &kept.tree.checkpoints[0].config;
    let memory = of_it.iter().find(|f| f.name.ends_with(".vmrs")).expect("it is kept");
    let mut bytes = Vec::new();
    for id in &memory.chunks {
        let length = (memory.size as usize - bytes.len()).min(kept.chunk_size as usize);
        if id.is_hole() {
            bytes.resize(bytes.len() + length, 0);
            continue;
        }
        let record = reader(&world).store.get(&[*id]).await.expect("it is there").remove(0);
        bytes.extend_from_slice(&sealer().open(&record).expect("opens"));
    }
    let folder = world.folder.path().join("Volume1");
    let name = format!("{}.vmrs", saved.to_string().to_uppercase());
    let folders = std::fs::read_dir(folder).expect("it is there").flatten();
    let of_lab = folders.map(|f| f.path().join("Snapshots").join(&name)).find(|f| f.exists());
    let of_lab = std::fs::read(of_lab.expect("the lab has written it")).expect("readable");
    assert!(of_lab.len() > 8 << 20, "more than is read at once");
    assert!(bytes == of_lab, "the saved state is kept as it is");
    assert!(memory.chunks.iter().any(outrider_proto::ids::ChunkId::is_hole), "its zeros are not");
    assert!(kept.at(&saved.to_string()).expect("by GUID").machine.saved_state);
}

/// A disk was taken out of the VM after a checkpoint: it is kept with the checkpoint, read once, and comes back with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_only_checkpoints_have_is_kept_with_them() {
    let world = World::small().await;
    let first = checkpoint(&world, "first").await;
    world.write(MIB, 41).await;
    let both = checkpoint(&world, "both").await;
    world.lab.remove_disk(&world.name(), 1).await.expect("taken out");
    world.write(MIB, 42).await;
    let full = world.back_up("alpha", BackupKind::Full).await;
    world.write(MIB, 43).await;
    let second = world.back_up("alpha", BackupKind::Incremental).await;
    assert_eq!(world.commit(second).kind(), BackupKind::Incremental);
    let reasons = world.commit(second).reasons.join("; ");
    assert!(reasons.contains("4 layers of disks, 4 of them unchanged"), "{reasons}");
    for job in [full, second] {
        world.judge_disks(job, 1).await;
        let manifest = manifest(&world, job).await;
        assert_eq!((manifest.disks.len(), manifest.tree.former.len()), (1, 1), "{manifest:?}");
        let dir = world.folder.path().join(format!("former-{}", job.id));
        let files =
            restore::export_tree(&reader(&world), &manifest, &dir).await.expect("it is written");
        let slot = &manifest.disks[0].slot;
        let own = world.commit(job).checkpoint_id.parse().expect("a GUID");
        let mut shape = Vec::new();
        for file in &files {
            let place = usize::from(file.slot != *slot);
            let checkpoint = file.checkpoint.map_or(own, |c| c.0);
            let compared =
                world.lab.compare_disk(&file.path, checkpoint, place).await.expect("comparable");
            assert_eq!(compared, Comparison::Identical, "{file:?}");
            let chain = DiskChain::open(&file.path).expect("a sound chain").files().len();
            shape.push((place, checkpoint, chain));
        }
        let expected = [(0, first, 1), (0, both, 2), (0, own, 3), (1, first, 1), (1, both, 2)];
        assert_eq!(shape, expected, "{files:?}");
    }
    assert_clean(&world, 2).await;
    // With the last checkpoint that has it, it goes.
    for checkpoint in [both, first] {
        delete(&world, checkpoint).await;
    }
    world.write(MIB, 44).await;
    let third = world.back_up("alpha", BackupKind::Incremental).await;
    world.judge_disks(third, 1).await;
    assert!(manifest(&world, third).await.tree.former.is_empty());
}
