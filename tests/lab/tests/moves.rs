//! Migrations: what they do to checkpoints, what agents hear, and that change tracking never reports too little.

mod support;

use std::collections::BTreeSet;

use outrider_disk::{RawDisk, ReadDisk};
use outrider_lab::{
    CheckpointOnMigration, Comparison, ControlError, GuestWrite, MigrationKind, VmState,
};
use outrider_wmi::{NS_CLUSTER, NS_VIRTUALIZATION, Object, Wmi};
use proptest::prelude::*;
use support::{Agent, DEADLINE, Lab, MIB, checkpoint_id, rct_id};

#[tokio::test(flavor = "multi_thread")]
async fn a_travelling_checkpoint_is_finished_by_the_new_host() {
    let lab = Lab::start(CheckpointOnMigration::Travels).await;
    let vm = lab.vm("vm", 32 * MIB).await;
    let alpha = lab.agent("alpha").await;
    let made = alpha.checkpoint(&vm).await;
    lab.control.migrate("vm", "beta", MigrationKind::Live).await.expect("moved");
    let state = lab.state(&vm).await;
    assert_eq!((state.host.as_str(), state.owner.as_deref()), ("beta", Some("beta")));
    let beta = lab.agent("beta").await;
    let seen = beta.wmi.get(NS_VIRTUALIZATION, &made.path).await.expect("it came along");
    assert!(alpha.wmi.get(NS_VIRTUALIZATION, &made.path).await.is_err());
    let frozen = beta.frozen(&seen).await;
    let same = lab.control.compare_disk(&frozen[0], checkpoint_id(&made), 0).await;
    assert_eq!(same.expect("compared"), Comparison::Identical);
    beta.convert(&seen).await;
    lab.no_merge(&vm).await;
    assert_eq!(lab.state(&vm).await.disks[0].chain.len(), 1);
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_checkpoint_is_gone_and_merged_without_a_word() {
    let lab = Lab::start(CheckpointOnMigration::Lost).await;
    let vm = lab.vm("vm", 32 * MIB).await;
    let alpha = lab.agent("alpha").await;
    let base = alpha.checkpoint(&vm).await;
    let point = alpha.convert(&base).await;
    lab.no_merge(&vm).await;
    lab.control.guest_write(GuestWrite::at("vm", 0, 5 * MIB, 1, 1)).await.expect("written");
    alpha.checkpoint(&vm).await;
    lab.control.migrate("vm", "beta", MigrationKind::Live).await.expect("moved");
    lab.no_merge(&vm).await;
    let state = lab.state(&vm).await;
    assert_eq!((state.checkpoints.len(), state.disks[0].chain.len()), (0, 1));
    assert_eq!(state.reference_points.len(), 1);
    let beta = lab.agent("beta").await;
    let next = beta.checkpoint(&vm).await;
    let frozen = beta.frozen(&next).await;
    let changed = beta.changes(&frozen[0], &rct_id(&point), 32 * MIB).await.expect("tracked");
    assert_eq!(changed, vec![(5 * MIB, MIB)], "what changed before the lost one is not lost");
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blocking_checkpoint_refuses_the_migration_until_it_is_gone() {
    let lab = Lab::start(CheckpointOnMigration::Blocks).await;
    let vm = lab.vm("vm", 32 * MIB).await;
    let alpha = lab.agent("alpha").await;
    let made = alpha.checkpoint(&vm).await;
    let refused = lab.control.migrate("vm", "beta", MigrationKind::Live).await;
    assert!(matches!(refused, Err(ControlError::Refused { code: 5960, .. })), "{refused:?}");
    alpha.destroy(&made).await;
    lab.no_merge(&vm).await;
    lab.control.migrate("vm", "beta", MigrationKind::Live).await.expect("moved");
    lab.stop().await;
}

/// What an agent of `host` heard of the VM and its group, until both were handed over.
async fn hand_over_order(lab: &Lab, vm: &VmState, to: &str) -> Vec<&'static str> {
    let agent = lab.agent(to).await;
    let name = support::guid(vm);
    let mut systems = agent
        .wmi
        .subscribe(
            NS_VIRTUALIZATION,
            "SELECT * FROM __InstanceCreationEvent WITHIN 2 WHERE TargetInstance ISA 'Msvm_ComputerSystem'",
        )
        .await
        .expect("subscribed");
    let mut groups = agent
        .wmi
        .subscribe(
            NS_CLUSTER,
            "SELECT * FROM __InstanceModificationEvent WITHIN 2 WHERE TargetInstance ISA 'MSCluster_ResourceGroup' AND TargetInstance.OwnerNode <> PreviousInstance.OwnerNode",
        )
        .await
        .expect("subscribed");
    lab.control.migrate(&name, to, MigrationKind::Live).await.expect("moved");
    let mut heard = Vec::new();
    let target = |event: Option<Result<Object, _>>| {
        let event: Object = event.expect("the stream lives").expect("nothing lost");
        event.object("TargetInstance").expect("a target").clone()
    };
    while heard.len() < 2 {
        let next = tokio::time::timeout(DEADLINE, async {
            tokio::select! {
                event = systems.next() => {
                    assert_eq!(target(event).str("Name"), Some(name.as_str()));
                    "realized"
                }
                event = groups.next() => {
                    assert_eq!(target(event).str("OwnerNode"), Some(to));
                    "owner"
                }
            }
        });
        heard.push(next.await.expect("events come"));
    }
    heard
}

#[tokio::test(flavor = "multi_thread")]
async fn both_orders_of_owner_change_and_realized_vm_happen() {
    let lab = Lab::start(CheckpointOnMigration::Travels).await;
    let vm = lab.vm("vm", 16 * MIB).await;
    let mut orders = BTreeSet::new();
    for round in 0..40 {
        let to = if round % 2 == 0 { "beta" } else { "alpha" };
        orders.insert(hand_over_order(&lab, &vm, to).await);
        if orders.len() == 2 {
            return lab.stop().await;
        }
    }
    panic!("only one order in 40 migrations: {orders:?}");
}

#[derive(Debug, Clone)]
enum Step {
    Write { offset: u64, len: u64 },
    Scatter { bytes: u64 },
    Live,
    Quick,
    Crash,
    Restart,
    Abandon,
    UserCheckpoint,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..63 * MIB, 1..200_000_u64).prop_map(|(offset, len)| Step::Write { offset, len }),
        2 => (1..3 * MIB).prop_map(|bytes| Step::Scatter { bytes }),
        1 => Just(Step::Live),
        1 => Just(Step::Quick),
        1 => Just(Step::Crash),
        1 => Just(Step::Restart),
        1 => Just(Step::Abandon),
        1 => Just(Step::UserCheckpoint),
    ]
}

async fn owner(lab: &Lab, vm: &VmState) -> Agent {
    lab.agent(&lab.state(vm).await.host).await
}

async fn other_host(lab: &Lab, vm: &VmState) -> &'static str {
    let host = lab.state(vm).await.host;
    ["alpha", "beta", "gamma"].into_iter().find(|h| *h != host).expect("three hosts")
}

async fn play(steps: Vec<Step>, seed: u64) {
    const SIZE: u64 = 64 * MIB;
    let lab = Lab::seeded(CheckpointOnMigration::Travels, seed).await;
    let vm = lab.vm("vm", SIZE).await;
    lab.control.guest_write(GuestWrite::scattered("vm", 4 * MIB, seed)).await.expect("written");
    let agent = owner(&lab, &vm).await;
    let base = agent.checkpoint(&vm).await;
    let before = checkpoint_id(&base);
    let point = agent.convert(&base).await;
    lab.no_merge(&vm).await;
    for (n, step) in (100..).zip(steps) {
        match step {
            Step::Write { offset, len } => {
                let write = GuestWrite::at("vm", 0, offset, len, n);
                lab.control.guest_write(write).await.map(drop)
            }
            Step::Scatter { bytes } => {
                lab.control.guest_write(GuestWrite::scattered("vm", bytes, n)).await.map(drop)
            }
            Step::Live => {
                let to = other_host(&lab, &vm).await;
                lab.control.migrate("vm", to, MigrationKind::Live).await
            }
            Step::Quick => {
                let to = other_host(&lab, &vm).await;
                lab.control.migrate("vm", to, MigrationKind::Quick).await
            }
            Step::Crash => {
                let host = lab.state(&vm).await.host;
                lab.control.crash_host(&host).await.expect("crashed");
                lab.control.start_host(&host).await
            }
            Step::Restart => {
                lab.control.stop_vm("vm").await.expect("stopped");
                lab.control.start_vm("vm").await
            }
            Step::Abandon => {
                // A backup that failed: its checkpoint is destroyed, the bound reference point stays.
                let agent = owner(&lab, &vm).await;
                let made = agent.checkpoint(&vm).await;
                let write = GuestWrite::scattered("vm", MIB, n);
                lab.control.guest_write(write).await.expect("written");
                agent.destroy(&made).await;
                lab.no_merge(&vm).await;
                Ok(())
            }
            Step::UserCheckpoint => {
                let made = lab.control.user_checkpoint("vm", "user").await.expect("made");
                let write = GuestWrite::scattered("vm", MIB, n);
                lab.control.guest_write(write).await.expect("written");
                // Half of them stay until the end: the VM runs on a longer chain then.
                if n % 2 == 0 {
                    lab.control.delete_checkpoint("vm", made).await.expect("deleted");
                    lab.no_merge(&vm).await;
                }
                Ok(())
            }
        }
        .expect("the step works");
    }
    let agent = owner(&lab, &vm).await;
    let made = agent.checkpoint(&vm).await;
    let after = checkpoint_id(&made);
    let frozen = agent.frozen(&made).await;
    let changed = agent.changes(&frozen[0], &rct_id(&point), SIZE).await.expect("tracked");
    let truth = async |id| {
        let path = lab.control.truth_path("vm", id, 0).await.expect("an answer").expect("kept");
        RawDisk::open(path).expect("opens")
    };
    let (old, new) = (truth(before).await, truth(after).await);
    const PIECE: u64 = 64 << 10;
    let (mut a, mut b) = (vec![0; PIECE as usize], vec![0; PIECE as usize]);
    for offset in (0..SIZE).step_by(PIECE as usize) {
        old.read_at(offset, &mut a).expect("reads");
        new.read_at(offset, &mut b).expect("reads");
        let reported = changed.iter().any(|(o, l)| *o <= offset && offset + PIECE <= o + l);
        assert!(a == b || reported, "a change at {offset} is not reported");
    }
    lab.stop().await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 20, ..ProptestConfig::default() })]

    #[test]
    fn change_tracking_never_reports_less_than_what_changed(
        steps in prop::collection::vec(step(), 1..12),
        seed in 0..u64::MAX,
    ) {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(play(steps, seed));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_steady_guest_writes_until_it_is_told_to_stop() {
    let lab = Lab::start(CheckpointOnMigration::Travels).await;
    let vm = lab.vm("vm", 16 * MIB).await;
    let agent = lab.agent("alpha").await;
    let base = agent.checkpoint(&vm).await;
    let point = agent.convert(&base).await;
    lab.no_merge(&vm).await;
    lab.control.guest_rate("vm", 1_000_000, 5).await.expect("set");
    let changed = async || {
        let made = agent.checkpoint(&vm).await;
        let frozen = agent.frozen(&made).await;
        let changed = agent.changes(&frozen[0], &rct_id(&point), 16 * MIB).await.expect("tracked");
        agent.destroy(&made).await;
        lab.no_merge(&vm).await;
        changed
    };
    let begun = tokio::time::timeout(DEADLINE, async { while changed().await.is_empty() {} });
    begun.await.expect("it writes");
    lab.control.guest_rate("vm", 0, 0).await.expect("set");
    let first = changed().await;
    assert_eq!(changed().await, first);
    lab.stop().await;
}
