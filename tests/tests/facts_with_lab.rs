//! What a VM, its guest, its host and its cluster are decides whether and how it is backed up: the consistency plan and the
//! prechecks over the class model of WMI (requirements C1 to C6, P5, P9, J2, J9, J12; facts section 13).

mod lab_world;

use std::time::Duration;

use lab_world::{DEADLINE, Job, MIB, World, work};
use outrider_lab::{
    CheckpointOnMigration, DiskSource, Fault, FaultKind, HoldSpec, HostShape, NetworkShape,
    Relation, VmShape, WaitFor, When,
};
use outrider_node::hypervisor::Hypervisor;
use outrider_node::hypervisor::facts::{GuestKind, Release, Service};
use outrider_node::lease::Lease;
use outrider_process::clock::{Clock, SystemClock};
use outrider_proto::ids::{JobId, LeaseEpoch, VmGuid, VmRole};
use outrider_proto::rpc::{self, BackupKind, BackupWork, Consistency};

impl World {
    /// One whole job under a policy; gives how its last attempt ended, and the job.
    async fn run(&self, policy: BackupWork) -> (rpc::FinishRequest, Job) {
        let job = Job::new(BackupKind::Incremental);
        self.attempt_of(job, "alpha", 1, policy).await.end().await;
        let end = self.coordinator.with(|d| d.finished.last().cloned()).expect("it ended");
        (end, job)
    }

    /// A job that has to succeed.
    async fn done(&self, policy: BackupWork) -> (rpc::CommitRequest, rpc::FinishRequest) {
        let (end, job) = self.run(policy).await;
        assert!(end.data_safe && end.host_clean, "{end:?}");
        self.judge(job).await;
        self.assert_clean().await;
        (self.commit(job), end)
    }

    /// A job that has to fail, with this in its sentence, and leaves the host clean.
    async fn refused(&self, policy: BackupWork, code: &str, says: &str) -> rpc::FinishRequest {
        let (end, _) = self.run(policy).await;
        assert!(!end.data_safe && end.host_clean, "{end:?}");
        assert!(end.message.contains(says), "{:?} is not in: {}", says, end.message);
        assert_eq!(end.error_code, code, "{}", end.message);
        self.assert_clean().await;
        end
    }

    async fn shape(&self, shape: VmShape) {
        self.lab.shape_vm(&self.name(), shape).await.expect("shaped");
    }

    /// Starts a job that has to wait, lets `meanwhile` happen once it does, and gives its end.
    async fn waits_until<F: Future<Output = ()>>(&self, says: &str, meanwhile: F) {
        let job = Job::new(BackupKind::Incremental);
        let mut attempt = self.attempt_of(job, "alpha", 1, work()).await;
        attempt.reaches("waiting for the VM").await;
        let asked = self.lab.call_log(None).await.expect("told");
        assert!(asked.iter().all(|c| c.method != "CreateSnapshot"), "{says}: not waited for");
        assert!(self.coordinator.with(|d| d.commits.is_empty()), "{says}: not waited for");
        meanwhile.await;
        assert!(attempt.end().await, "{says}: {:?}", self.coordinator.with(|d| d.finished.clone()));
        self.judge(job).await;
        self.assert_clean().await;
    }
}

const CRASH: &str = "OUT-N-0020";

fn least(minimum: Consistency) -> BackupWork {
    BackupWork { minimum: minimum.into(), ..work() }
}

/// C1, C2, C4: what the guest is decides what a checkpoint is worth, and the point says why.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_guest_is_decides_what_its_point_is_worth() {
    let os =
        |name: &str| VmShape { guest_os: Some((name.into(), "1".into())), ..VmShape::default() };
    let backup = |enabled, status| VmShape {
        backup_service: Some((enabled, [status, 2])),
        ..VmShape::default()
    };
    let table = [
        (os("Windows Server 2025 Datacenter"), Consistency::Application, "writers"),
        (os("Ubuntu 24.04 LTS"), Consistency::FileSystem, "froze"),
        (os("FreeBSD 14.1"), Consistency::FileSystem, "froze"),
        (os(""), Consistency::FileSystem, "Data Exchange"),
        (backup(3, 2), Consistency::Crash, "switched off"),
        (backup(2, 12), Consistency::Crash, "does not answer"),
        (backup(2, 7), Consistency::Crash, "too old"),
        (backup(2, 13), Consistency::Crash, "stopped answering"),
    ];
    let world = World::small().await;
    for (shape, expected, says) in table {
        world.shape(shape).await;
        let (commit, _) = world.done(work()).await;
        assert_eq!(commit.achieved(), expected, "{:?}", commit.reasons);
        assert!(commit.reasons[0].contains(says), "{says}: {:?}", commit.reasons);
    }
    // C6: less than the minimum is a failure that names each condition with its remedy.
    let end = world.refused(least(Consistency::Application), CRASH, "stopped answering").await;
    assert!(!end.retry, "nothing passes by itself");
    // C5
    world.shape(backup(2, 2)).await;
    let quiet = BackupWork { no_quiesce: true, ..work() };
    let (commit, _) = world.done(quiet).await;
    assert_eq!(commit.achieved(), Consistency::Crash);
    assert!(commit.reasons[0].contains("switched off for its group"), "{:?}", commit.reasons);
}

/// Facts 10.2, 1.11: the guest's writers fail: once more, then less if the policy allows it, else a failure that says what the
/// writer's code means.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_whose_writers_fail_is_crash_consistent_only_where_that_is_allowed() {
    let world = World::small().await;
    let broken = FaultKind::JobFails {
        method: "CreateSnapshot".into(),
        code: 32768,
        description: "'vm': Schattenkopie fehlgeschlagen: 0x800423F4".into(),
    };
    world.lab.set_fault(Fault::new(broken.clone()).times(2)).await.expect("in force");
    let end = world.refused(least(Consistency::Application), "OUT-N-0001", "vssadmin").await;
    assert!(end.message.contains("0x800423F4"), "the guest's own words: {}", end.message);
    world.lab.set_fault(Fault::new(broken).times(2)).await.expect("in force");
    let (commit, end) = world.done(work()).await;
    assert_eq!(commit.achieved(), Consistency::Crash);
    assert!(end.warnings.iter().any(|w| w.contains("less consistent")), "{:?}", end.warnings);
    // A host that has no space is no guest that fails: nothing less is tried.
    let full = FaultKind::JobFails {
        method: "CreateSnapshot".into(),
        code: 32768,
        description: "no space (0x80070070)".into(),
    };
    world.lab.set_fault(Fault::new(full).times(1)).await.expect("in force");
    world.refused(work(), "OUT-N-0001", "free space on the volume").await;
}

/// C3: a running VM is saved only where the group allows it, and runs on afterwards, also when the agent dies meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_is_saved_only_where_that_is_allowed_and_runs_on() {
    let world = World::small().await;
    let saved = BackupWork { wanted: Consistency::SavedState.into(), ..work() };
    world.refused(saved.clone(), CRASH, "--allow-offline").await;
    let allowed = BackupWork { allow_offline: true, ..saved };
    let (commit, _) = world.done(allowed.clone()).await;
    assert_eq!(commit.achieved(), Consistency::SavedState);
    assert_eq!(world.lab.vm(&world.name()).await.expect("there").enabled_state, 2, "it runs");
    // The agent dies while the VM is saved: whoever comes next starts it again.
    let hold =
        HoldSpec { method: "CreateSnapshot".into(), vm: None, host: None, when: When::Before };
    let hold = world.lab.hold(hold).await.expect("held");
    let job = Job::new(BackupKind::Incremental);
    let attempt = world.attempt_of(job, "alpha", 1, allowed.clone()).await;
    world.lab.wait(WaitFor::MethodHeld { hold }, DEADLINE).await.expect("it gets there");
    assert_eq!(world.lab.vm(&world.name()).await.expect("there").enabled_state, 6, "it is saved");
    attempt.kill().await;
    let _ = world.lab.release(hold).await;
    assert!(world.attempt_of(job, "alpha", 2, allowed.clone()).await.end().await);
    assert_eq!(world.lab.vm(&world.name()).await.expect("there").enabled_state, 2, "it runs");
    world.assert_clean().await;
    // Taking it offline would turn it off: refused before anything is done.
    world.shape(VmShape { offline_action: Some(0), ..VmShape::default() }).await;
    world.refused(allowed, "OUT-N-0001", "OfflineAction").await;
    assert_eq!(world.lab.vm(&world.name()).await.expect("there").enabled_state, 2, "it runs");
}

/// P9: the receiving side is refused with the exact reason, and succeeds when that has passed; a collision with the
/// replication log is waited out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_is_refused_with_the_exact_reason_and_then_succeeds() {
    let mut world = World::small().await;
    world.role = VmRole::Replica;
    world.lab.stop_vm(&world.name()).await.expect("off");
    let relation = |state, health| VmShape {
        replication: Some(vec![Relation { mode: 2, state, health }]),
        ..VmShape::default()
    };
    let replica = OneReason { patience: Duration::from_millis(200) };
    for (state, health, says) in [
        (2, 1, "initial replication is running"),
        (9, 1, "has to be resynchronised"),
        (12, 1, "failover to it is in progress"),
        (3, 3, "health of its replication is critical"),
    ] {
        world.shape(relation(state, health)).await;
        replica.expect(&world, says).await;
    }
    world.shape(relation(3, 1)).await;
    let (commit, _) = world.done(work()).await;
    assert_eq!(commit.achieved(), Consistency::Crash);
    assert!(commit.reasons[0].contains("replica"), "{:?}", commit.reasons);
    // The log is being applied: nothing tells so but the refusal.
    world.shape(VmShape { applying_log: Some(true), ..VmShape::default() }).await;
    replica.expect(&world, "applying the replication log").await;
    world.shape(VmShape { applying_log: Some(false), ..VmShape::default() }).await;
    // What replication writes is in no change tracking: everything is read again.
    world.lab.apply_log(&world.name(), 2 * MIB, 9).await.expect("applied");
    let (commit, _) = world.done(work()).await;
    assert!(
        commit.reasons.iter().any(|r| r.contains("replication writes")),
        "{:?}",
        commit.reasons
    );
    assert!(world.coordinator.with(|d| d.binding.is_none()), "a replica has no base");
    // A planned failover: the run for the replica does not take the VM that it has become.
    world.shape(VmShape { replication: Some(vec![]), ..VmShape::default() }).await;
    let end = world.refused(work(), "OUT-N-0024", "is the VM itself now").await;
    assert!(!end.retry);
}

/// O8: the networks that the cluster has for itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_networks_of_the_cluster_alone_are_known() {
    let world = World::small().await;
    let network = |name: &str, role, address: [u8; 4]| NetworkShape {
        name: name.into(),
        role,
        address: address.into(),
        prefix: 24,
    };
    let hypervisor = world.hypervisor("alpha").await;
    assert_eq!(hypervisor.cluster_only_networks().await.expect("told"), []);
    let networks = vec![
        network("Storage", 0, [10, 7, 0, 0]),
        network("CSV and migration", 1, [10, 8, 0, 0]),
        network("Everybody", 3, [10, 9, 0, 0]),
    ];
    world.lab.shape_networks(networks).await.expect("shaped");
    let found = hypervisor.cluster_only_networks().await.expect("told");
    assert_eq!(found.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.8.0.0/24"]);
}

/// Runs a job with little patience and expects its reason.
struct OneReason {
    patience: Duration,
}

impl OneReason {
    async fn expect(&self, world: &World, says: &str) {
        let job = Job::new(BackupKind::Incremental);
        let mut times = lab_world::times();
        times.busy_patience = self.patience;
        times.redirected_patience = self.patience;
        let attempt = world.attempt_with(job, "alpha", 1, work(), times).await;
        attempt.end().await;
        let end = world.coordinator.with(|d| d.finished.last().cloned()).expect("it ended");
        assert!(!end.data_safe && end.host_clean && end.retry, "{end:?}");
        assert!(end.message.contains(says), "{says:?} is not in: {}", end.message);
        world.assert_clean().await;
    }
}

/// P5: each disk that the host cannot capture is named; the run goes on without it only where the policy allows that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disks_that_cannot_be_captured_are_named_and_left_out_or_refused() {
    let disks = vec![
        DiskSource::Empty { size: 9 * MIB, block_size: 1 << 20 },
        DiskSource::PassThrough,
        DiskSource::FibreChannel,
        DiskSource::Shared { size: MIB },
        DiskSource::PersistentMemory { size: MIB },
    ];
    let mut world = World::new(CheckpointOnMigration::Travels, disks).await;
    let insisting = BackupWork { require_all_disks: true, ..work() };
    world.refused(insisting, "OUT-N-0007", "cannot be captured").await;
    // The judge compares the disks that there are.
    world.vm.disks.truncate(1);
    let (_, end) = world.done(work()).await;
    for kind in ["pass-through", "Fibre Channel", "shared between VMs", "persistent memory"] {
        assert!(end.warnings.iter().any(|w| w.contains(kind)), "{kind}: {:?}", end.warnings);
    }
    world.lab.add_disk(&world.name(), DiskSource::VhdSet { size: MIB }).await.expect("added");
    world.refused(work(), "OUT-N-0007", "VHD set").await;
}

/// J12, facts 4.1 and 6: what passes is waited for, and the run goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_passes_by_itself_is_waited_for() {
    type Set = (&'static str, VmShape, VmShape);
    let vms: [Set; 2] = [
        (
            "queued for a move",
            VmShape { group_status: Some(4), ..VmShape::default() },
            VmShape { group_status: Some(0), ..VmShape::default() },
        ),
        (
            "locked",
            VmShape { resource_status: Some(1), ..VmShape::default() },
            VmShape { resource_status: Some(0), ..VmShape::default() },
        ),
    ];
    for (says, before, after) in vms {
        let world = World::small().await;
        world.shape(before).await;
        world.waits_until(says, world.shape(after)).await;
    }
    for (says, status) in [("isolated", 1), ("quarantined", 2), ("draining", 4)] {
        let world = World::small().await;
        let set = async |status| {
            let shape = HostShape { status: Some(status), ..HostShape::default() };
            world.lab.shape_host("alpha", shape).await.expect("shaped");
        };
        set(status).await;
        world.waits_until(says, set(0)).await;
    }
}

/// Facts 6: a volume that this host usually reaches directly is waited for while it is redirected, for a bounded time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redirected_volume_is_waited_for_and_then_read_with_a_warning() {
    let world = World::small().await;
    let job = Job::new(BackupKind::Incremental);
    let mut times = lab_world::times();
    times.redirected_patience = Duration::from_millis(100);
    let hypervisor = world.hypervisor_with("alpha", times.clone()).await;
    // It is seen in its usual mode first.
    hypervisor.inventory().await.expect("told");
    world.lab.shape_csv("Volume1", 1).await.expect("shaped");
    let attempt =
        world.attempt_on(hypervisor.clone(), job, "alpha", 1, work(), times.clone()).await;
    assert!(attempt.end().await);
    let end = world.coordinator.with(|d| d.finished.last().cloned()).expect("it ended");
    assert!(end.warnings.iter().any(|w| w.contains("redirected mode")), "{:?}", end.warnings);
    // To an agent that never saw it otherwise it is the volume's nature.
    let (_, end) = world.done(work()).await;
    assert!(end.warnings.is_empty(), "{:?}", end.warnings);
    // No access at all is no mode to read in.
    world.lab.shape_csv("Volume1", 2).await.expect("shaped");
    OneReason { patience: Duration::from_millis(100) }.expect(&world, "cannot be reached").await;
}

/// J2, facts 2.2: without change tracking everything is read, it is said why, and no reference point is left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_change_tracking_everything_is_read_and_nothing_is_left() {
    let world = World::small().await;
    let off = BackupWork { no_change_tracking: true, ..work() };
    for _ in 0..2 {
        let (commit, _) = world.done(off.clone()).await;
        assert_eq!(commit.kind(), BackupKind::Full);
        assert!(commit.reasons.iter().any(|r| r.contains("switched off")), "{:?}", commit.reasons);
        assert!(world.coordinator.with(|d| d.binding.is_none()), "nothing is bound");
    }
    world.lab.shape_cluster(8).await.expect("shaped");
    let (commit, _) = world.done(work()).await;
    assert!(commit.reasons.iter().any(|r| r.contains("functional level")), "{:?}", commit.reasons);
    world.lab.shape_cluster(11).await.expect("shaped");
    world.shape(VmShape { version: Some("5.0".into()), ..VmShape::default() }).await;
    let (commit, _) = world.done(work()).await;
    assert_eq!((commit.kind(), commit.achieved()), (BackupKind::Full, Consistency::Crash));
    assert!(commit.reasons.iter().any(|r| r.contains("version 5.0")), "{:?}", commit.reasons);
    // And with it again, there is a base from then on.
    world.shape(VmShape { version: Some("10.0".into()), ..VmShape::default() }).await;
    world.done(work()).await;
    world.write(MIB, 7).await;
    let (commit, _) = world.done(work()).await;
    assert_eq!(commit.kind(), BackupKind::Incremental, "{:?}", commit.reasons);
}

/// Part 9: hosts before Server 2016 are no sources; the refusal says why and what to do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_older_than_2016_is_refused_with_reason_and_remedy() {
    let world = World::small().await;
    for (build, name) in [(9600, "2012 R2"), (9200, "Server 2012"), (7601, "2008 R2")] {
        let shape = HostShape { build: Some(build), ..HostShape::default() };
        world.lab.shape_host("alpha", shape).await.expect("shaped");
        let end = world.refused(work(), "OUT-N-0021", name).await;
        assert!(end.message.contains("upgrade the host") && !end.retry, "{}", end.message);
    }
}

/// Facts 14.7: nobody knows whether disabled user checkpoints block recovery checkpoints. If they do not, the run succeeds
/// with a warning; if they do, it fails with the hypervisor's words, and nothing is left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disabled_user_checkpoints_are_safe_whatever_they_do() {
    let world = World::small().await;
    world.shape(VmShape { user_snapshot_type: Some(2), ..VmShape::default() }).await;
    let (_, end) = world.done(work()).await;
    assert!(
        end.warnings.iter().any(|w| w.contains("checkpoints are disabled")),
        "{:?}",
        end.warnings
    );
    let blocked = FaultKind::MethodReturns { method: "CreateSnapshot".into(), code: 32770 };
    world.lab.set_fault(Fault::new(blocked)).await.expect("in force");
    world.refused(work(), "OUT-N-0001", "not supported").await;
}

/// Facts 1.10, 1.7: a job that vanished before it was seen to finish has an unknown outcome, which is looked at; one that
/// completes with warnings has done its work.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_that_vanish_or_warn_are_looked_at_not_guessed() {
    let world = World::small().await;
    for method in
        ["CreateSnapshot", "ModifySystemSettings", "ConvertToReferencePoint", "DestroySnapshot"]
    {
        let fault = FaultKind::JobWarns { method: method.into() };
        world.lab.set_fault(Fault::new(fault)).await.expect("in force");
    }
    world.done(work()).await;
    world.lab.clear_faults().await.expect("cleared");
    let vanish = FaultKind::JobVanishes { method: "CreateSnapshot".into() };
    world.lab.set_fault(Fault::new(vanish).times(1)).await.expect("in force");
    let (commit, _) = world.done(work()).await;
    assert!(!commit.point_id.is_empty(), "the checkpoint that was made is found and used");
    let vanish = FaultKind::JobVanishes { method: "ConvertToReferencePoint".into() };
    world.lab.set_fault(Fault::new(vanish).times(1)).await.expect("in force");
    let job = Job::new(BackupKind::Incremental);
    world.attempt(job, "alpha", 1).await.end().await;
    // Whatever came of the conversion: the next attempt ends clean, with a base that is bound or none.
    world.attempt(job, "alpha", 2).await.end().await;
    let end = world.coordinator.with(|d| d.finished.last().cloned()).expect("it ended");
    assert!(end.data_safe && end.host_clean, "{end:?}");
    world.judge(job).await;
    world.assert_clean().await;
}

/// Facts 1.1 to 1.4, 4.1: what the provider shows comes through in words, and numbers that mean nothing decide nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_facts_of_a_vm_come_through_in_words() {
    let world = World::small().await;
    let hypervisor = world.hypervisor("alpha").await;
    let vm = VmGuid(world.vm.id);
    let state = hypervisor.vm(vm).await.expect("told");
    let facts = &state.facts;
    assert_eq!(facts.guest.kind, GuestKind::Windows);
    assert_eq!(facts.guest.os_version, "10.0.20348");
    assert_eq!((facts.guest.backup, facts.guest.other_version), (Service::Works, Some(false)));
    assert_eq!(facts.host.release(), Release::Server2016);
    assert_eq!(facts.host.functional_level, Some(11));
    assert_eq!(facts.scsi, Some(true));
    assert_eq!(facts.group.and_then(|g| g.offline_saves), Some(true));
    assert_eq!(state.volumes.len(), 1);
    assert_eq!(state.volumes[0].disk_bytes, world.vm.disks.iter().map(|d| d.size).sum::<u64>());
    // Both sets of EnabledState, and one that nobody can be sure of.
    use outrider_node::hypervisor::Power;
    for (number, power) in [(32769, Power::Saved), (32768, Power::Paused), (32784, Power::Other)] {
        world.shape(VmShape { enabled_state: Some(number), ..VmShape::default() }).await;
        assert_eq!(hypervisor.vm(vm).await.expect("told").vm.power, power, "{number}");
    }
    // The guest tells nothing, the summary does.
    let silent = VmShape {
        enabled_state: Some(0),
        exchange_service: Some((3, [12, 2])),
        services_version: Some(2),
        ..VmShape::default()
    };
    world.shape(silent).await;
    let guest = hypervisor.vm(vm).await.expect("told").facts.guest;
    assert_eq!((guest.kind, guest.exchange), (GuestKind::Windows, Service::Off));
    assert_eq!(guest.other_version, Some(true));
}

/// The checklist over the lab's transport: nothing differs on a healthy host, and what would stop backups is said.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_doctor_tells_a_healthy_host_from_one_that_stops_backups() {
    use outrider_node::doctor::{Verdict, examine};
    let world = World::small().await;
    let text = format!(
        "name = \"alpha\"\nidentity_dir = \"id\"\nfabric = \"f\"\nrealm = \"cluster\"\ncoordinators = []\n\
         scratch_dir = \"s\"\nhypervisor = \"lab\"\n[lab]\naddress = \"{}\"\n",
        world.addr
    );
    let path = std::path::Path::new("node.toml");
    let config = outrider_process::config::parse(path, &text, |_| None).expect("a valid file");
    let found = examine(&config).await;
    let odd: Vec<_> = found.iter().filter(|f| f.verdict != Verdict::Good).collect();
    assert!(odd.is_empty(), "{odd:?}");
    assert!(found.iter().any(|f| f.area == "VMs" && f.detail.contains("APPLICATION")), "{found:?}");
    let calls = world.lab.call_log(None).await.expect("told");
    let changes = ["CreateSnapshot", "DestroySnapshot", "ModifySystemSettings"];
    assert!(calls.iter().all(|c| !changes.contains(&c.method.as_str())), "it only reads");
    let shape = HostShape { build: Some(9600), ..HostShape::default() };
    world.lab.shape_host("alpha", shape).await.expect("shaped");
    world.shape(VmShape { backup_service: Some((2, [12, 2])), ..VmShape::default() }).await;
    let found = examine(&config).await;
    assert!(
        found.iter().any(|f| f.verdict == Verdict::Stops && f.detail.contains("2012 R2")),
        "{found:?}"
    );
}

/// A VM of Hyper-V is called booted when its heartbeat service is in contact, and never else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_without_a_heartbeat_is_never_called_booted() {
    use outrider_node::hypervisor::{BootCheck, Sign};
    let world = World::small().await;
    let hypervisor = world.hypervisor("alpha").await;
    let clock = std::sync::Arc::new(SystemClock::new());
    let hour = Duration::from_secs(3600);
    let lease = Lease::granted(JobId::random(), LeaseEpoch(1), hour, false, clock.clone());
    lease.renew(clock.monotonic());
    let vm = VmGuid(world.vm.id);
    let check = BootCheck { patience: DEADLINE, text: None, screen: false };
    let brief = BootCheck { patience: Duration::from_millis(50), ..check.clone() };
    let heartbeat = |enabled, status| VmShape {
        heartbeat_service: Some((enabled, [status, 2])),
        ..VmShape::default()
    };
    for (shape, says) in [
        (heartbeat(2, 12), "never in contact"),
        (heartbeat(2, 13), "lost contact"),
        (heartbeat(2, 3), "status 3"),
        (heartbeat(3, 2), "Enable-VMIntegrationService"),
    ] {
        world.lab.stop_vm(&world.name()).await.expect("stopped");
        world.shape(shape).await;
        let seen = hypervisor.boot_vm(&lease, vm, &brief).await.expect("started");
        assert_eq!(seen.sign, None, "{seen:?}");
        assert!(seen.sentence("web").contains(says), "{says}: {}", seen.sentence("web"));
    }
    world.lab.stop_vm(&world.name()).await.expect("stopped");
    world.shape(heartbeat(2, 2)).await;
    let seen = hypervisor.boot_vm(&lease, vm, &check).await.expect("started");
    assert_eq!(seen.sign, Some(Sign::Heartbeat), "{seen:?}");
    let text = BootCheck { text: Some("login:".into()), ..check.clone() };
    assert!(hypervisor.boot_obstacle(&text).is_some_and(|why| why.contains("--boot-text")));
    let screen = BootCheck { screen: true, ..check };
    assert!(hypervisor.boot_obstacle(&screen).is_some_and(|why| why.contains("--boot-screen")));
}
