use super::*;
use crate::consistency::tests::state;
use crate::hypervisor::facts::{
    Group, Node, ReplicaSide, Replication, ReplicationHealth, ReplicationState, Volume,
};
use crate::hypervisor::{DiskSeen, Power};
use outrider_proto::ids::CheckpointId;

const GIB: u64 = 1 << 30;

fn vm() -> VmState {
    state(Power::Running, true)
}

fn situation(require_all_disks: bool) -> Situation<'static> {
    Situation { foreign: &[], require_all_disks, redirected_waited: false }
}

fn obstacle(state: &VmState) -> Option<Obstacle> {
    check(state, situation(false)).0
}

fn disk(path: &str, format: Format, uncapturable: Option<&'static str>) -> DiskSeen {
    let slot = "0\\1".to_owned();
    DiskSeen { disk_id: None, size: 0, slot, path: path.to_owned(), format, uncapturable }
}

fn volume(free: u64, disk_bytes: u64) -> Volume {
    let folder = "/csv/v1".into();
    Volume { folder, free, disk_bytes, access: Access::Direct, usual: Access::Direct }
}

#[test]
fn a_healthy_vm_has_no_obstacle() {
    let mut vm = vm();
    vm.volumes = vec![volume(GIB, 0)];
    assert_eq!(check(&vm, situation(true)), (None, vec![]));
}

/// J9: at least 1 GiB, and disk size x churn x window, of each volume by what lies on it.
#[test]
fn too_little_space_names_the_volume_and_the_need() {
    for (free, disk_bytes, needs_mib) in [(GIB - 1, 0, "1024"), (4 * GIB, 100 * GIB, "5120")] {
        let mut vm = vm();
        vm.volumes = vec![volume(100 * GIB, 100 * GIB), volume(free, disk_bytes)];
        let found = obstacle(&vm).expect("too little");
        assert_eq!((found.code, found.passes), (error_code::LOW_SPACE, false));
        let says = found.sentence.contains("/csv/v1") && found.sentence.contains(needs_mib);
        assert!(says, "{}", found.sentence);
    }
    let mut vm = vm();
    // What lies on another volume needs no space here.
    vm.volumes = vec![volume(2 * GIB, 10 * GIB), volume(100 * GIB, 1000 * GIB)];
    assert_eq!(obstacle(&vm), None);
}

/// P5
#[test]
fn a_disk_that_cannot_be_captured_is_a_warning_unless_the_group_insists() {
    let mut vm = vm();
    vm.vm.disks = vec![
        disk("PhysicalDrive2", Format::Device, Some("it is a pass-through disk")),
        disk("FC0", Format::Device, Some("it is a virtual Fibre Channel adapter")),
    ];
    let insisted = check(&vm, situation(true)).0.expect("an obstacle");
    assert_eq!((insisted.code, insisted.passes), (error_code::DISK_UNSUPPORTED, false));
    let (none, warnings) = check(&vm, situation(false));
    assert_eq!(none, None);
    assert!(warnings[0].contains("pass-through") && warnings[1].contains("FC0"), "{warnings:?}");
}

/// Facts 2.5: a VHD set belongs to several VMs; no policy makes half of it a backup.
#[test]
fn a_vhd_set_is_refused_whatever_the_policy() {
    let mut vm = vm();
    vm.vm.disks = vec![disk(r"C:\q.vhds", Format::VhdSet, Some("it is shared between VMs"))];
    let found = obstacle(&vm).expect("an obstacle");
    assert!(!found.passes && found.sentence.contains("VHD set"), "{}", found.sentence);
}

#[test]
fn another_products_checkpoint_is_waited_for_and_never_touched() {
    let foreign =
        [Checkpoint { id: CheckpointId::random(), name: "Other 7".into(), path: String::new() }];
    let found = check(&vm(), Situation { foreign: &foreign, ..situation(false) }).0;
    let found = found.expect("an obstacle");
    assert!(found.passes && found.sentence.contains("Other 7"));
}

type Change = fn(&mut VmState);

/// J12, facts 1.1, 4.1, 5, 6: what is waited out, what is not, each with its own sentence.
#[test]
fn conflicting_operations_and_unusable_hosts_have_a_sentence_each() {
    let table: [(&str, Change, bool, &str); 17] = [
        ("planned", |s| s.vm.realized = false, true, "planned"),
        ("migrating", |s| (s.health, s.operation) = (11, 32774), true, "migrated"),
        ("storage 1", |s| (s.health, s.operation) = (11, 32778), true, "storage"),
        ("storage 2", |s| (s.health, s.operation) = (11, 32779), true, "storage"),
        ("merging", |s| (s.health, s.operation) = (11, 32772), true, "merged"),
        ("backup", |s| (s.health, s.operation) = (11, 32776), true, "another backup"),
        ("export", |s| (s.health, s.operation) = (11, 32773), true, "exported"),
        ("a number of the future", |s| (s.health, s.operation) = (11, 40000), true, "busy"),
        (
            "queued",
            |s| s.facts.group = Some(Group { queued: true, ..Group::default() }),
            true,
            "queue",
        ),
        (
            "locked",
            |s| s.facts.group = Some(Group { locked: true, ..Group::default() }),
            true,
            "locked",
        ),
        (
            "unmonitored",
            |s| s.facts.group = Some(Group { unmonitored: true, ..Group::default() }),
            true,
            "isolated",
        ),
        (
            "draining",
            |s| s.facts.host.node = Node { draining: true, ..Node::default() },
            true,
            "drained",
        ),
        (
            "isolated",
            |s| s.facts.host.node = Node { isolated: true, ..Node::default() },
            true,
            "isolated",
        ),
        (
            "quarantined",
            |s| s.facts.host.node = Node { quarantined: true, ..Node::default() },
            true,
            "quarantine",
        ),
        ("2012 R2", |s| s.facts.host.build = Some(9600), false, "2012 R2"),
        ("2012", |s| s.facts.host.build = Some(9200), false, "Server 2012:"),
        (
            "no access",
            |s| s.volumes = vec![Volume { access: Access::None, ..volume(GIB, 0) }],
            true,
            "cannot be reached",
        ),
    ];
    let mut sentences = Vec::new();
    for (name, change, passes, says) in table {
        let mut vm = vm();
        change(&mut vm);
        let found = obstacle(&vm).unwrap_or_else(|| panic!("{name}: no obstacle"));
        assert_eq!(found.passes, passes, "{name}: {}", found.sentence);
        assert!(found.sentence.contains(says), "{name}: {}", found.sentence);
        sentences.push(found.sentence);
    }
    // A number alone decides nothing while the VM is not busy.
    let mut idle = vm();
    idle.operation = 32795;
    assert_eq!(obstacle(&idle), None);
    // Paused nodes run their VMs on.
    idle.facts.host.node.paused = true;
    assert_eq!(obstacle(&idle), None);
}

/// P9: each forbidden state of the receiving side has its own sentence; the sending side is refused only while it changes
/// sides.
#[test]
fn a_replica_is_refused_with_the_exact_reason() {
    use ReplicationState as S;
    let table = [
        (S::ReadyForInitial, "initial replication has not begun"),
        (S::InitialRunning, "initial replication is running"),
        (S::ResyncRequired, "has to be resynchronised"),
        (S::Resynchronizing, "being resynchronised"),
        (S::ResyncSuspended, "resynchronisation of its replica is suspended"),
        (S::FailoverRunning, "failover to it is in progress"),
        (S::Recovered, "completed or cancelled"),
        (S::FailbackRunning, "failback"),
        (S::DiskUpdate, "disks of its replica are being changed"),
        (S::DiskUpdateCritical, "changing the disks of its replica failed"),
        (S::Critical, "critical state"),
    ];
    let with = |side, state, health| {
        let mut vm = vm();
        vm.facts.replication = vec![Replication { side, state, health }];
        vm
    };
    for side in [ReplicaSide::Replica, ReplicaSide::Extended] {
        for (state, says) in table {
            let found = obstacle(&with(side, state, ReplicationHealth::Ok)).expect("refused");
            assert!(found.passes, "retried with back-off: {}", found.sentence);
            assert_eq!(found.code, error_code::REPLICA_STATE);
            assert!(found.sentence.contains(says), "{state:?}: {}", found.sentence);
        }
        for good in [S::Replicating, S::Synced, S::Committed, S::Suspended, S::Other(17)] {
            assert_eq!(obstacle(&with(side, good, ReplicationHealth::Warning)), None, "{good:?}");
            let ill = obstacle(&with(side, good, ReplicationHealth::Critical)).expect("refused");
            assert!(ill.sentence.contains("health of its replication is critical"));
        }
    }
    let primary = |state, health| with(ReplicaSide::Primary, state, health);
    assert!(obstacle(&primary(S::FailoverRunning, ReplicationHealth::Ok)).is_some());
    for state in [S::InitialRunning, S::ResyncRequired, S::Critical] {
        let vm = primary(state, ReplicationHealth::Critical);
        let (none, warnings) = check(&vm, situation(false));
        assert_eq!(none, None, "the primary does not depend on its replica");
        assert!(warnings[0].contains("critical"), "{warnings:?}");
    }
    let hit = replica::collision(
        &with(ReplicaSide::Replica, S::Replicating, ReplicationHealth::Ok),
        "32775",
    );
    assert!(hit.is_some_and(|o| o.passes && o.sentence.contains("replication log")));
    assert_eq!(replica::collision(&vm(), "32775"), None);
}

/// Facts 6: redirected mode counts only where it is not the volume's normal mode, and only for a bounded time.
#[test]
fn a_redirected_volume_is_waited_for_only_when_that_is_not_its_normal_mode() {
    let mut vm = vm();
    vm.volumes = vec![Volume { access: Access::Redirected, ..volume(GIB, 0) }];
    let found = obstacle(&vm).expect("usually direct");
    assert!(found.passes && found.sentence.contains("redirected"), "{}", found.sentence);
    let later = Situation { redirected_waited: true, ..situation(false) };
    let (none, warnings) = check(&vm, later);
    assert_eq!(none, None);
    assert!(warnings[0].contains("redirected"));
    vm.volumes[0].usual = Access::Redirected;
    assert_eq!(check(&vm, situation(false)), (None, vec![]));
}

/// Facts 14.7: nobody knows whether this blocks recovery checkpoints; either answer is safe, since the run is tried.
#[test]
fn disabled_checkpoints_are_a_warning() {
    let mut vm = vm();
    vm.facts.user_snapshots = UserSnapshots::Disabled;
    vm.facts.shielded = true;
    let (none, warnings) = check(&vm, situation(false));
    assert_eq!(none, None);
    assert!(warnings[0].contains("disabled") && warnings[1].contains("shielded"), "{warnings:?}");
}

/// Facts 2.2: version 6.2 and functional level 9; else everything is read, and that is said.
#[test]
fn change_tracking_needs_its_version_and_level() {
    let table = [
        ("10.0", Some(11), true),
        ("6.2", Some(9), true),
        ("6.1", Some(9), false),
        ("5.0", Some(9), false),
        ("10.0", Some(8), false),
        ("10.0", None, true),
        ("", None, true),
    ];
    for (version, level, tracked) in table {
        let mut vm = vm();
        vm.vm.version = version.into();
        vm.facts.host.functional_level = level;
        let found = untracked(&vm);
        assert_eq!(found.is_none(), tracked, "{version} {level:?}: {found:?}");
        assert_eq!(obstacle(&vm), None, "it is read in full, not refused");
    }
}

/// Both sides of a replication have one GUID: a run never goes on with the other one.
#[test]
fn a_run_for_one_side_of_a_replication_does_not_take_the_other() {
    use crate::hypervisor::ReplicaRole;
    use outrider_proto::ids::VmRole;
    let mut state = vm();
    assert_eq!(replica::other_role(&state, VmRole::Primary), None);
    state.vm.replica = ReplicaRole::Replica;
    assert_eq!(replica::other_role(&state, VmRole::Replica), None);
    let told = replica::other_role(&state, VmRole::Primary).expect("the other one");
    assert!(told.sentence.contains("NAME@replica") && !told.passes, "{}", told.sentence);
    assert!(untracked(&state).is_some_and(|t| t.contains("replication writes")));
    state.vm.replica = ReplicaRole::TestReplica;
    assert!(replica::other_role(&state, VmRole::Replica).is_some());
}

/// J9: what Windows' own tools cannot handle; they count as Windows does.
#[test]
fn a_target_is_shorter_than_260() {
    let of = |folder: &str, times: usize| format!(r"C:\vms\{}", folder.repeat(times));
    assert_eq!(target_path(Path::new(&of("x", 252))), None);
    let told = target_path(Path::new(&of("x", 253))).expect("too long");
    assert!(told.contains("260 characters") && told.contains("--folder"), "{told}");
    assert!(target_path(Path::new(&of("🐘", 127))).is_some(), "two units each");
    assert_eq!(target_path(Path::new(&of("장", 252))), None);
}

/// J9: names, not addresses.
#[test]
fn a_file_server_is_named() {
    assert!(target_path(Path::new(r"\\10.0.0.7\vms\web")).is_some_and(|t| t.contains("name")));
    for fine in [r"\\files\vms\web", r"C:\ClusterStorage\Volume1\web", r"\\?\C:\web", "/csv/web"] {
        assert_eq!(target_path(Path::new(fine)), None, "{fine}");
    }
    assert!(target_remark(Path::new(r"\\files\vms")).is_some_and(|t| t.contains("\"files\"")));
    assert_eq!(target_remark(Path::new(r"C:\vms")), None);
    let mut vm = vm();
    vm.vm.disks = vec![disk(r"\\10.0.0.7\vms\a.vhdx", Format::Vhdx, None)];
    let (none, warnings) = check(&vm, situation(true));
    assert_eq!(none, None);
    assert!(warnings[0].contains("named by address"), "{warnings:?}");
}
