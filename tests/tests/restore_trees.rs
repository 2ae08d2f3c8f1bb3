//! Restores with the checkpoints of a VM (P2): real differencing chains, judged by the simulated cluster and by libvhdi.

#[path = "../../node/disk/tests/judges/tools.rs"]
mod judges;

use std::path::{Path, PathBuf};

use outrider_disk::{DiskChain, RawDisk, compare};
use outrider_lab::{DiskSource, HostSetup, NicSetup, VmSetup};
use outrider_proto::rpc::{self, BackupKind};
use outrider_tests::fabric::MIB;
use outrider_tests::restores::{copy_to, group, in_place, planned, report, restored};
use outrider_tests::{Fabric, Plan};

const VM: &str = "ledger";

async fn setup(fabric: &Fabric, setup: VmSetup) {
    fabric.lab.set_up_vm(VM, setup).await.expect("set up");
}

/// Two checkpoints in branches, with everything that a VM has besides: the VM comes back on another host, and in its own
/// place, with the same tree; each checkpoint, applied, is what it was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_comes_back_with_its_checkpoints_elsewhere_and_in_its_own_place() {
    let fabric = Fabric::start(Plan::default()).await;
    fabric.vm(VM, "alpha", 24 * MIB).await;
    setup(&fabric, VmSetup { tpm: true, group: Some(group()), ..VmSetup::default() }).await;
    fabric.write(VM, 2 * MIB, 81).await;
    let first = fabric.lab.user_checkpoint(VM, "first").await.expect("made");
    fabric.write(VM, MIB, 82).await;
    let left = fabric.lab.user_checkpoint(VM, "left").await.expect("made");
    fabric.write(VM, MIB, 83).await;
    fabric.lab.apply_checkpoint(VM, first).await.expect("applied");
    fabric.write(VM, MIB, 84).await;
    let point = fabric.operator.backed_up(VM, BackupKind::Full).await;
    let kept = point.reasons.join("; ");
    assert!(kept.contains("\"first\", \"left\""), "the point says what it holds: {kept}");
    fabric.write(VM, MIB, 85).await;
    let guardians = HostSetup { guardians_of: vec!["alpha".into()], ..HostSetup::default() };
    fabric.lab.set_up_host("beta", guardians).await.expect("imported");

    // Elsewhere, under a new GUID: checkpoints get new GUIDs, too.
    let request =
        rpc::RestoreRequest { with_checkpoints: true, ..copy_to(&point, "beta", "with tree") };
    let told = report(&fabric, request).await;
    assert!(!told.contains("was not restored"), "nothing is taken out: {told}");
    let copy = fabric.seen("with tree").await;
    fabric.assert_disks_are(&copy, &point).await;
    assert_eq!((copy.host.as_str(), copy.enabled_state), ("beta", 2), "it runs: {copy:?}");
    assert_tree(&fabric, "with tree", &[("first", first), ("left", left)]).await;

    // In place: what it had since is gone, and its checkpoints are those of the point.
    fabric.lab.user_checkpoint(VM, "later").await.expect("made");
    let request =
        rpc::RestoreRequest { with_checkpoints: true, power_on: true, ..in_place(&point) };
    let told = report(&fabric, request).await;
    assert!(told.contains("\"later\""), "the lost checkpoint is told: {told}");
    let after = fabric.seen(VM).await;
    fabric.assert_disks_are(&after, &point).await;
    let ids: Vec<_> = after.checkpoints.iter().map(|c| c.id).collect();
    assert_eq!(ids, [first, left], "with the VM's GUID theirs are kept: {after:?}");
    assert_tree(&fabric, VM, &[("first", first), ("left", left)]).await;
    assert_eq!(planned(&fabric).await, []);

    // The restored VM is backed up like any other, its tree included.
    fabric.settled().await;
    let again = fabric.operator.backed_up(VM, BackupKind::Incremental).await;
    assert!(again.reasons.join("; ").contains("checkpoints kept"), "{again:?}");
    fabric.assert_restores_exactly(&again, "beta").await;

    // And flat, on request or without a word, as ever.
    report(&fabric, copy_to(&point, "beta", "flat")).await;
    let flat = fabric.seen("flat").await;
    fabric.assert_disks_are(&flat, &point).await;
    assert_eq!((flat.checkpoints.len(), flat.disks[0].chain.len()), (0, 1), "{flat:?}");

    // As of one checkpoint alone: restored, and exported from the command line.
    let then = rpc::RestoreRequest { checkpoint: "left".into(), ..copy_to(&point, "beta", "then") };
    report(&fabric, then).await;
    let then = fabric.seen("then").await;
    assert_eq!((then.checkpoints.len(), then.enabled_state), (0, 2), "{then:?}");
    let unknown =
        rpc::RestoreRequest { checkpoint: "never".into(), ..copy_to(&point, "beta", "never") };
    let job = restored(&fabric, unknown).await;
    assert!(job.reason.contains("\"first\", \"left\""), "it says what there is: {job:?}");
    for (how, files) in [(["--checkpoint", "left"].as_slice(), 1), (&["--with-checkpoints"], 3)] {
        let to = fabric.dir().join(format!("export {files}"));
        let to = to.to_string_lossy();
        let args = ["export", "--json", "--point", point.point_id.as_str(), "--to", &to];
        let done = fabric.operator.cli(&[args.as_slice(), how].concat());
        let written = done.json()["files"].as_array().expect("files").clone();
        assert_eq!((done.code, written.len()), (Some(0), files), "{done:?}");
        if files == 1 {
            let file = PathBuf::from(written[0].as_str().expect("a path"));
            let compared = fabric.lab.compare_disk(&file, left, 0).await.expect("comparable");
            assert_eq!(compared, outrider_lab::Comparison::Identical);
        }
    }
}

/// The VM has these checkpoints, as the lab recorded the originals; each is applied in turn.
async fn assert_tree(fabric: &Fabric, vm: &str, expected: &[(&str, uuid::Uuid)]) {
    let seen = fabric.seen(vm).await;
    let names: Vec<_> = seen.checkpoints.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(names, expected.iter().map(|(name, _)| *name).collect::<Vec<_>>(), "{seen:?}");
    let first = &seen.checkpoints[0];
    assert_eq!(first.parent, None);
    assert_eq!(seen.current, Some(first.id), "it follows the one that was applied: {seen:?}");
    for (now, (name, recorded)) in seen.checkpoints.iter().zip(expected) {
        assert_eq!(now.notes, format!("why {name:?}"));
        let parent = if now.id == first.id { None } else { Some(first.id) };
        assert_eq!(now.parent, parent, "{seen:?}");
        let file = &now.frozen[0];
        let compared = fabric.lab.compare_disk(file, *recorded, 0).await.expect("comparable");
        assert_eq!(compared, outrider_lab::Comparison::Identical, "{name}: {}", file.display());
    }
    if vm != VM {
        let left = seen.checkpoints[1].id;
        fabric.lab.apply_checkpoint(vm, left).await.expect("applied");
        let applied = fabric.seen(vm).await;
        let leaf = applied.disks[0].chain.last().expect("a leaf");
        assert_eq!(applied.disks[0].chain.len(), 3, "base, left's own, the new one: {applied:?}");
        fabric.lab.stop_vm(vm).await.expect("off");
        let compared = fabric.lab.compare_disk(leaf, expected[1].1, 0).await.expect("comparable");
        assert_eq!(compared, outrider_lab::Comparison::Identical, "applied");
    }
}

/// Other people's reader shows the same disk in a chain, from its leaf to its base.
fn judged_by_libvhdi(fabric: &Fabric, leaf: &Path) {
    let raw = fabric.dir().join("judged.raw");
    let ours = DiskChain::open(leaf).expect("a sound chain");
    judges::read_with_libvhdi(&ours.files(), &raw);
    let theirs = RawDisk::open(&raw).expect("it was written");
    let difference = compare::first_difference(&theirs, &ours).expect("comparable");
    assert_eq!(difference, None, "{}", leaf.display());
}

/// A disk was taken out of the VM after a checkpoint, a drive has another image since, and one switch is of the old host alone:
/// the VM comes back elsewhere with its checkpoints as they were, fitted to the new host as the VM is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_only_checkpoints_have_comes_back_with_them_and_is_mended_as_the_vm_is() {
    let fabric = Fabric::start(Plan::default()).await;
    let disk = || DiskSource::Empty { size: 12 * MIB, block_size: 1 << 20 };
    fabric.vm_with(VM, "alpha", vec![disk(), disk()]).await;
    let switches = |names: &[&str]| HostSetup {
        switches: Some(names.iter().map(|n| (*n).to_owned()).collect()),
        ..HostSetup::default()
    };
    fabric.lab.set_up_host("alpha", switches(&["External", "Lab"])).await.expect("set up");
    fabric.lab.set_up_host("beta", switches(&["External", "Test"])).await.expect("set up");
    let image = fabric.dir().join("installer.iso");
    std::fs::write(&image, b"an image").expect("written");
    let nics = |names: &[&str]| names.iter().map(|n| NicSetup::on(n)).collect();
    let then = VmSetup {
        nics: nics(&["External", "Lab"]),
        image: Some(image.clone()),
        ..VmSetup::default()
    };
    setup(&fabric, then).await;
    fabric.write(VM, 2 * MIB, 91).await;
    let before = fabric.lab.user_checkpoint(VM, "before").await.expect("made");
    fabric.lab.remove_disk(VM, 1).await.expect("taken out");
    setup(&fabric, VmSetup { nics: nics(&["External"]), ..VmSetup::default() }).await;
    fabric.write(VM, MIB, 92).await;
    let point = fabric.operator.backed_up(VM, BackupKind::Full).await;
    std::fs::remove_file(&image).expect("removed");

    let request =
        rpc::RestoreRequest { with_checkpoints: true, ..copy_to(&point, "beta", "with tree") };
    let told = report(&fabric, request).await;
    let copy = fabric.seen("with tree").await;
    fabric.assert_disks_are(&copy, &point).await;
    assert_eq!((copy.disks.len(), copy.enabled_state), (1, 2), "it runs: {copy:?}");
    let [kept] = copy.checkpoints.as_slice() else { panic!("one checkpoint: {copy:?}") };
    assert_eq!(kept.frozen.len(), 2, "both disks are in the checkpoint: {kept:?}");
    let libvhdi = judges::libvhdi_is_there();
    for (place, file) in kept.frozen.iter().enumerate() {
        let restored = copy.disks[0].chain[0].parent();
        assert_eq!(file.parent(), restored, "a file of the copy, not of the original");
        let compared = fabric.lab.compare_disk(file, before, place).await.expect("comparable");
        assert_eq!(compared, outrider_lab::Comparison::Identical, "{}", file.display());
        if libvhdi {
            judged_by_libvhdi(&fabric, file);
        }
    }
    let leaf = copy.disks[0].chain.last().expect("a file");
    if libvhdi {
        judged_by_libvhdi(&fabric, leaf);
    }
    assert_eq!(copy.disks[0].chain.len(), 2, "a differencing disk over the checkpoint's: {copy:?}");

    // What the checkpoint's own settings name is fitted to the host, and told as the checkpoint's.
    let connected: Vec<_> = kept.nics.iter().map(|(_, switch)| switch.as_deref()).collect();
    assert_eq!(connected, [Some("External"), None], "by name, else not at all: {kept:?}");
    assert_eq!(kept.images, Vec::<PathBuf>::new(), "the missing image is ejected");
    for thing in ["which this host does not have", "ejected"] {
        let of_it = told
            .lines()
            .any(|line| line.starts_with("in the checkpoint \"before\"") && line.contains(thing));
        assert!(of_it, "{thing} is told of the checkpoint: {told}");
    }
    assert_eq!(copy.nics[0].1.as_deref(), Some("External"), "{copy:?}");
}
