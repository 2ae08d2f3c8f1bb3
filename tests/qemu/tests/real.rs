//! Guest and hosts by themselves: what the tests of backups rely on must be true without a backup.

use std::path::Path;

use outrider_qemulab::{Cluster, Format, Installation, NewVm, Shape, image};
use serde_json::json;

const MIB: u64 = 1 << 20;

/// What this machine has; `None` (with a loud word) when it cannot run VMs. In CI that is a failure.
fn installation() -> Option<Installation> {
    match Installation::find(None) {
        Ok(found) => Some(found),
        Err(missing) => {
            assert!(std::env::var_os("OUTRIDER_CI").is_none(), "{missing}");
            println!("SKIPPED: {missing}");
            None
        }
    }
}

fn two_disks(name: &str, shape: Shape) -> NewVm {
    NewVm {
        name: name.to_owned(),
        host: "alpha".to_owned(),
        disks: vec![(48 * MIB + 1536, Format::Qcow2), (33 * MIB + 512, Format::Raw)],
        shape,
        agent: true,
    }
}

#[tokio::test]
async fn a_guest_keeps_its_word_across_migration_and_power_cut() {
    let Some(installation) = installation() else { return };
    let dir = tempfile::tempdir().expect("a folder");
    let mut cluster =
        Cluster::new(dir.path(), &["alpha", "beta"], &installation).await.expect("a cluster");
    println!("{} with {}", installation.version, cluster.accelerator());
    let vm = cluster.create(two_disks("web", Shape::Blockdev)).await.expect("it boots");
    let ready = vm.guest.ready().await.expect("it says so");
    assert_eq!(ready.file_systems, ["clean", "clean"]);
    assert_eq!(ready.agent, installation.agent.is_some());
    let written = vm.guest.write(1, 4 * MIB).await.expect("it writes");
    assert!(written >= 4 * MIB, "{written}");

    let bitmap = json!({ "node": "disk0", "name": "since", "persistent": true });
    vm.qmp.execute("block-dirty-bitmap-add", bitmap).await.expect("a bitmap");
    vm.guest.write_at(2, 2 * MIB).await.expect("it writes");
    let before = vm.guest.commits_beyond(vm.guest.last_committed()).await.expect("it commits");
    let moved = cluster.migrate("web", "beta").await.expect("it moves");
    println!("moved in {:?}, {:?} of them still", moved.took, moved.downtime);

    let vm = cluster.vm("web").expect("it is there");
    assert_eq!(vm.host, "beta");
    vm.guest.commits_beyond(before).await.expect("it goes on writing");
    let nodes = vm.qmp.execute("query-named-block-nodes", json!({ "flat": true })).await;
    let nodes = nodes.expect("nodes");
    let nodes = nodes.as_array().expect("a list");
    let bitmap = nodes
        .iter()
        .find(|n| n["node-name"] == "disk0")
        .map(|n| n["dirty-bitmaps"][0].clone())
        .expect("its disk");
    assert_eq!((&bitmap["name"], &bitmap["recording"]), (&json!("since"), &json!(true)));
    assert!(bitmap["count"].as_u64() > Some(0), "{bitmap}");
    let left = cluster.leftovers("web", "").await.expect("asked");
    assert_eq!(left, ["bitmap since on \"disk0\""], "nothing but what this test made");

    // The host loses power while the guest writes.
    let committed = cluster.vm("web").expect("it is there").guest.last_committed();
    let machine = cluster.kill_host("beta").expect("killed").remove(0);
    for disk in &machine.disks {
        let unsound = image::check_file_system(&disk.path, disk.format, &dir.path().join("fsck"));
        assert_eq!(unsound.expect("checked"), None, "{}", disk.path.display());
    }
    let vm = cluster.start(machine, "alpha").await.expect("it boots elsewhere");
    let ready = vm.guest.ready().await.expect("it says so");
    assert!(ready.file_systems.iter().all(|s| s == "clean" || s == "replay"), "{ready:?}");
    let verdict = vm.guest.verified().await.expect("it checks its journal");
    assert!(verdict.committed >= committed, "{verdict:?}, {committed} were on disk");
    assert_eq!((verdict.bad, verdict.errors), (0, 0), "{verdict:?}");
    assert!(verdict.blocks > 500, "{verdict:?}");

    // A wrong byte on a disk does not go unnoticed.
    let machine = cluster.shut_down("web").await.expect("it turns itself off");
    let raw = &machine.disks[1];
    spoil(&raw.path);
    let vm = cluster.start(machine, "beta").await.expect("it boots");
    let verdict = vm.guest.verified().await.expect("it checks its journal");
    assert!(verdict.bad > 0, "{verdict:?}");
}

/// Flips bits in blocks that belong to the guest's data file, by the word of ext4's own tool.
fn spoil(image: &Path) {
    use std::os::unix::fs::FileExt;
    let output = std::process::Command::new("/usr/sbin/debugfs")
        .args(["-R", "blocks /data"])
        .arg(image)
        .output()
        .expect("debugfs runs");
    let list = String::from_utf8_lossy(&output.stdout).into_owned();
    let blocks: Vec<u64> = list.split_whitespace().filter_map(|b| b.parse().ok()).collect();
    assert!(blocks.len() > 100, "{list} {}", String::from_utf8_lossy(&output.stderr));
    let file = std::fs::File::options().read(true).write(true).open(image).expect("writable");
    let mut log = [0; 4];
    file.read_exact_at(&mut log, 1024 + 24).expect("a superblock");
    let size = 1024 << u32::from_le_bytes(log);
    for block in blocks.iter().step_by(20) {
        let mut bytes = [0; 64];
        file.read_exact_at(&mut bytes, block * size).expect("readable");
        bytes.iter_mut().for_each(|b| *b ^= 0x10);
        file.write_all_at(&bytes, block * size).expect("writable");
    }
}

#[tokio::test]
async fn a_migration_that_fails_returns_and_every_command_line_works() {
    let Some(installation) = installation() else { return };
    let dir = tempfile::tempdir().expect("a folder");
    let mut cluster =
        Cluster::new(dir.path(), &["alpha", "beta"], &installation).await.expect("a cluster");
    for (name, shape) in [("json", Shape::Json), ("drive", Shape::Drive)] {
        let vm = cluster.create(two_disks(name, shape)).await.expect("it boots");
        vm.guest.write_at(5, MIB).await.expect("it writes");
        let first = vm.guest.commits_beyond(0).await.expect("it commits");
        let migration = cluster.begin_migration(name, "beta").await.expect("it begins");
        let during = cluster.vm(name).expect("there").guest.commits_beyond(first).await;
        let during = during.expect("it writes during the migration");
        let reason = cluster.fail(migration).await.expect("it returns");
        println!("the migration of {name} failed: {reason}");
        let vm = cluster.vm(name).expect("it is there");
        assert_eq!(vm.host, "alpha");
        vm.guest.commits_beyond(during).await.expect("it goes on writing");
        let migration = cluster.begin_migration(name, "beta").await.expect("it begins");
        cluster.complete(migration).await.expect("it moves at the second try");
        cluster.reset(name).await.expect("it comes up again");
        let vm = cluster.vm(name).expect("it is there");
        let verdict = vm.guest.verify().await.expect("it checks its journal");
        assert_eq!((verdict.bad, vm.host.as_str()), (0, "beta"), "{verdict:?}");
        let latency = vm.guest.latency().await.expect("figures");
        println!("{name}: {latency:?}");
    }
}

#[tokio::test]
async fn a_guest_at_rest_writes_nothing() {
    let Some(installation) = installation() else { return };
    let dir = tempfile::tempdir().expect("a folder");
    let mut cluster = Cluster::new(dir.path(), &["alpha"], &installation).await.expect("a cluster");
    let vm = cluster.create(two_disks("web", Shape::Blockdev)).await.expect("it boots");
    vm.guest.write(1, 4 * MIB).await.expect("it writes");
    vm.flush().await.expect("flushed");
    let disk = &vm.machine.disks[0];
    let copies = ["before", "after"].map(|n| dir.path().join(n));
    image::snapshot(&disk.path, disk.format, &copies[0]).expect("copied");
    // Time itself is what has to pass here: write-back of the guest's kernel works by the clock.
    tokio::time::sleep(std::time::Duration::from_secs(12)).await;
    image::snapshot(&disk.path, disk.format, &copies[1]).expect("copied");
    let raw = |i: usize| (copies[i].as_path(), Format::Raw);
    assert_eq!(image::compare(raw(0), raw(1)).expect("compared"), None);
}
