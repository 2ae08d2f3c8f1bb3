//! Restored VMs and the originals that they must not harm: real QEMU processes, whole jobs.

use std::path::{Path, PathBuf};

use outrider_proto::ids::{FabricId, JobId, VmGuid};
use outrider_proto::rpc::{CommitRequest, FinishRequest, RestoreWork, job_lease::Work};
use serde_json::{Value, json};

use super::jobs::World;
use super::real::{Host, MIB, Vm, lease, qcow2, qemu_is_missing, seen, until};
use crate::hypervisor::{Hypervisor, NewVm, Power};

fn last_end(world: &World) -> FinishRequest {
    world.coordinator.with(|d| d.finished.last().cloned()).expect("it ended")
}

/// A restore of a point in its VM's place.
fn in_place(commit: &CommitRequest) -> Work {
    Work::Restore(RestoreWork {
        point_id: commit.point_id.clone(),
        manifest_id: commit.manifest_id.clone(),
        keep_guid: true,
        overwrite: true,
        power_on: true,
        ..RestoreWork::default()
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_whose_image_is_no_more_what_it_was_started_with_is_told_so_and_never_replaced() {
    if qemu_is_missing() {
        return;
    }
    let world = World::new();
    let host = world.host("h");
    let image = world.path("a.qcow2");
    qcow2(&image, 20 * MIB);
    let vm = Vm::start(&host, world.guid, &[&image], &[]).await;
    vm.ask("cont", Value::Null).await;
    vm.write(0, 1, 0, MIB).await;
    let over = world.path("over.qcow2");
    let snapshot = json!({
        "node-name": "d0", "snapshot-file": over, "snapshot-node-name": "d1", "format": "qcow2",
    });
    vm.ask("blockdev-snapshot-sync", snapshot).await;
    vm.write(0, 2, 0, MIB).await;
    let agent = host.agent().await;
    let (_, commit) = world.backed_up(&agent, 1).await;
    let told = |sentences: &[String]| {
        sentences.iter().any(|s| s.contains("only the disks of this point") && s.contains("over"))
    };
    assert!(told(&commit.reasons), "the point says so: {:?}", commit.reasons);
    assert!(told(&last_end(&world).warnings), "{:?}", last_end(&world));

    let restore = world.attempt_at(&agent, JobId::random(), 2, in_place(&commit));
    let _ = restore.task.await.expect("no panic");
    let ended = last_end(&world);
    assert!(!ended.data_safe && ended.message.contains("Restore the disks alone"), "{ended:?}");
    assert_eq!(vm.ask("query-status", Value::Null).await["status"], "running", "untouched");
    assert!(!host.folder.join("web.json").exists() && !host.folder.join("web").exists());
    vm.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_in_place_removes_the_files_that_it_replaces_and_keeps_other_disks() {
    if qemu_is_missing() {
        return;
    }
    let world = World::new();
    let host = world.host("h");
    let (image, later) = (world.image(9 * MIB), world.path("later.qcow2"));
    qcow2(&later, MIB);
    let vm = Vm::start(&host, world.guid, &[&image], &[]).await;
    let agent = host.agent().await;
    let (_, commit) = world.backed_up(&agent, 1).await;
    assert_eq!(last_end(&world).warnings, [] as [String; 0]);
    vm.end().await;
    // A disk more, since the point.
    let vm = Vm::start(&host, world.guid, &[&image, &later], &[]).await;
    vm.ask("cont", Value::Null).await;
    vm.write(0, 9, 0, MIB).await;
    seen(&agent, world.guid).await;

    let work = in_place(&commit);
    world.ends_well(world.attempt_at(&agent, JobId::random(), 2, work)).await;
    let warnings = last_end(&world).warnings;
    let says = |what: &str, file: &Path| {
        let file = file.display().to_string();
        warnings.iter().any(|w| w.contains(what) && w.contains(&file))
    };
    assert!(!image.exists() && says("were removed", &image), "{warnings:?}");
    assert!(later.exists() && says("does not hold", &later), "{warnings:?}");
    let restored = disks_of(&agent.vm(world.guid).await.expect("it runs").vm);
    assert_eq!(restored, [host.folder.join("web/Virtual Hard Disks/a.qcow2")]);
    assert_eq!(agent.vm(world.guid).await.expect("it runs").vm.power, Power::Running);
    agent.stop_vm(&lease(), world.guid).await.expect("it ends");
    vm.end().await;
}

fn disks_of(vm: &crate::hypervisor::VmSeen) -> Vec<PathBuf> {
    vm.disks.iter().map(|d| PathBuf::from(&d.path)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_was_set_aside_comes_back_as_it_was_also_where_no_restore_had_defined_it() {
    if qemu_is_missing() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let host = Host::new(dir.path(), FabricId::random());
    let image = dir.path().join("a.qcow2");
    qcow2(&image, MIB);
    let guid = VmGuid::random();
    let vm = Vm::start(&host, guid, &[&image], &[]).await;
    vm.ask("cont", Value::Null).await;
    let agent = host.agent().await;
    seen(&agent, guid).await;
    let lease = lease();
    let aside = agent.set_aside(&lease, guid, &mut Vec::new()).await.expect("set aside");
    assert!(aside.ran && aside.name == "web", "{aside:?}");
    assert!(aside.config.iter().all(|file| agent.is_definition(file)), "{aside:?}");
    let files: Vec<_> = aside.disks.iter().map(|d| (d.slot.clone(), d.file.clone())).collect();
    assert_eq!(files, [("disk0".to_owned(), image.clone())]);
    assert!(aside.disks[0].id.is_some());
    until("it has ended", || async { agent.fleet.find(guid).is_none().then_some(()) }).await;
    // A job that dies here leaves a VM that can be started.
    assert!(host.folder.join("web.json").exists());
    let copy = dir.path().join("kept").join("vm.json");
    std::fs::create_dir_all(copy.parent().expect("a folder")).expect("made");
    std::fs::copy(&aside.config[0], &copy).expect("copied");
    agent.remove_vm(&lease, guid).await.expect("removed");
    assert!(agent.start_vm(&lease, guid).await.is_err(), "it is gone");
    let back = NewVm {
        definition: copy,
        name: aside.name,
        keep_guid: true,
        disks: files,
        ..NewVm::default()
    };
    agent.define_vm(&lease, &back).await.expect("brought back");
    agent.start_vm(&lease, guid).await.expect("it runs");
    let now = agent.vm(guid).await.expect("it is here").vm;
    assert_eq!((now.power, disks_of(&now)), (Power::Running, vec![image]));
    agent.stop_vm(&lease, guid).await.expect("it ends");
    vm.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_only_its_starter_can_start_is_not_stopped_for_a_restore() {
    if qemu_is_missing() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let host = Host::new(dir.path(), FabricId::random());
    let image = dir.path().join("a.qcow2");
    qcow2(&image, MIB);
    // Something with "fd=" that this QEMU takes.
    let vm =
        Vm::start(&host, VmGuid::random(), &[&image], &["-smbios", "type=11,value=fd=7"]).await;
    let agent = host.agent().await;
    let guid = agent.inventory().await.expect("listed").vms[0].guid;
    let refused =
        agent.set_aside(&lease(), guid, &mut Vec::new()).await.expect_err("refused").to_string();
    assert!(refused.contains("could not be brought back"), "{refused}");
    assert!(agent.fleet.find(guid).is_some() && !host.folder.join("web.json").exists());
    vm.ask("query-status", Value::Null).await;
    vm.end().await;
}
