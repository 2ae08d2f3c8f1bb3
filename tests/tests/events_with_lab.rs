//! What an agent hears of its hypervisor when events are late, early, lost or gone (facts, sections 1, 4.2 and 5).

mod lab_world;

use std::time::Duration;

use lab_world::{DEADLINE, World, times};
use outrider_lab::{Fault, FaultKind, HostShape, MigrationKind};
use outrider_node::config::JobTimes;
use outrider_node::hypervisor::{Change, Hypervisor, VmSeen};
use outrider_proto::ids::VmGuid;
use tokio::sync::mpsc::Receiver;

/// A host's watch, begun as the agent does it.
struct Watch {
    changes: Receiver<Change>,
    /// What its inventory showed.
    vms: Vec<VmSeen>,
    up: Vec<String>,
    down: Vec<String>,
}

impl Watch {
    async fn begin(world: &World, host: &str) -> Self {
        Self::begin_with(world, host, times()).await
    }

    async fn begin_with(world: &World, host: &str, times: JobTimes) -> Self {
        let hypervisor = world.hypervisor_with(host, times).await;
        let changes = hypervisor.watch().await.expect("it is watched");
        let inventory = hypervisor.inventory().await.expect("an inventory");
        let (up, down) = (inventory.nodes_up, inventory.nodes_down);
        Self { changes, vms: inventory.vms, up, down }
    }

    /// The first change that is wanted; gives those before it, too.
    async fn until(&mut self, wanted: impl Fn(&Change) -> bool) -> Vec<Change> {
        let mut all = Vec::new();
        let heard = async {
            while let Some(change) = self.changes.recv().await {
                let found = wanted(&change);
                all.push(change);
                if found {
                    return true;
                }
            }
            false
        };
        let heard = tokio::time::timeout(DEADLINE, heard).await;
        assert_eq!(heard, Ok(true), "never heard; before that: {all:?}");
        all
    }

    /// Nothing of this kind has come until now.
    fn nothing_yet(&mut self, unwanted: impl Fn(&Change) -> bool) {
        while let Ok(change) = self.changes.try_recv() {
            assert!(!unwanted(&change), "{change:?}");
        }
    }

    /// The watch ends by itself.
    async fn ends(mut self) {
        let ended = async { while self.changes.recv().await.is_some() {} };
        tokio::time::timeout(DEADLINE, ended).await.expect("it ends");
    }
}

fn realized(vm: VmGuid) -> impl Fn(&Change) -> bool {
    move |change| matches!(change, Change::Seen(seen) if seen.guid == vm && seen.realized)
}

fn gone(vm: VmGuid) -> impl Fn(&Change) -> bool {
    move |change| matches!(change, Change::Gone(guid, _) if *guid == vm)
}

fn owned_by(vm: VmGuid, host: &str) -> impl Fn(&Change) -> bool {
    move |change| matches!(change, Change::Owner(guid, owner) if *guid == vm && owner == host)
}

fn one(changes: &[Change], wanted: impl Fn(&Change) -> bool) {
    assert_eq!(changes.iter().filter(|c| wanted(c)).count(), 1, "{changes:?}");
}

impl World {
    async fn fault(&self, kind: FaultKind, host: &str) -> u64 {
        self.lab.set_fault(Fault::new(kind).on_host(host)).await.expect("in force")
    }

    async fn late(&self, kind: FaultKind) -> u64 {
        self.lab.set_fault(Fault::new(kind).on_vm(&self.name())).await.expect("in force")
    }

    async fn clear(&self, fault: u64) {
        self.lab.clear_fault(fault).await.expect("cleared");
    }

    async fn moves(&self, to: &str) {
        self.lab.migrate(&self.name(), to, MigrationKind::Live).await.expect("it moves");
    }

    fn guid(&self) -> VmGuid {
        VmGuid(self.vm.id)
    }
}

/// Events come first: what they tell of is not to be read yet. Nobody says when it is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_events_tell_before_it_can_be_read_is_found_by_looking_again() {
    let world = World::small().await;
    let (mut alpha, mut beta) =
        (Watch::begin(&world, "alpha").await, Watch::begin(&world, "beta").await);
    let vm = world.guid();
    let late = world.late(FaultKind::LateReads).await;
    world.moves("beta").await;
    // The cluster's event is there, so that the hypervisor's, sent before or right after it, are on their way.
    beta.until(owned_by(vm, "beta")).await;
    beta.nothing_yet(realized(vm));
    alpha.nothing_yet(gone(vm));
    world.clear(late).await;
    let heard = beta.until(realized(vm)).await;
    one(&heard, realized(vm));
    alpha.until(gone(vm)).await;
}

/// The same with the cluster's database.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_that_cannot_be_read_yet_is_found_by_looking_again() {
    let world = World::small().await;
    let mut beta = Watch::begin(&world, "beta").await;
    let vm = world.guid();
    let late = world.late(FaultKind::LateClusterReads).await;
    world.moves("beta").await;
    let before = beta.until(realized(vm)).await;
    assert!(!before.iter().any(owned_by(vm, "beta")), "{before:?}");
    world.clear(late).await;
    let heard = beta.until(owned_by(vm, "beta")).await;
    // Whatever is said of the owner is true now: never the one before.
    assert!(!heard.iter().any(owned_by(vm, "alpha")), "{heard:?}");
}

/// Reads are ahead: one provider's event comes when the other's has long been told, in both orders.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_that_come_late_tell_nothing_twice_and_nothing_old() {
    let world = World::small().await;
    let vm = world.guid();
    for (cluster_late, to, from) in [(true, "beta", "alpha"), (false, "alpha", "beta")] {
        let mut target = Watch::begin(&world, to).await;
        let mut source = Watch::begin(&world, from).await;
        let held = world.fault(FaultKind::HoldEvents { cluster: cluster_late }, to).await;
        world.moves(to).await;
        // Whichever event came, it made us look at both.
        let mut heard = target.until(|c| owned_by(vm, to)(c) || realized(vm)(c)).await;
        heard.extend(target.until(|c| owned_by(vm, to)(c) || realized(vm)(c)).await);
        source.until(gone(vm)).await;
        world.clear(held).await;
        // A later change is heard after all that is late.
        world.lab.save_vm(&world.name()).await.expect("saved");
        let saved = |c: &Change| matches!(c, Change::Seen(s) if s.power == outrider_node::hypervisor::Power::Saved);
        heard.extend(target.until(saved).await);
        world.lab.start_vm(&world.name()).await.expect("runs");
        one(&heard, owned_by(vm, to));
        assert!(!heard.iter().any(owned_by(vm, from)), "{heard:?}");
        assert!(!heard.iter().any(gone(vm)), "{heard:?}");
    }
}

/// Notifications that are lost without a word are made up for by the next look at everything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_lost_without_a_word_are_made_up_for() {
    let world = World::small().await;
    let often = JobTimes { inventory_interval: Duration::from_millis(200), ..times() };
    let mut alpha = Watch::begin_with(&world, "alpha", often.clone()).await;
    let mut beta = Watch::begin_with(&world, "beta", often).await;
    let vm = world.guid();
    for host in ["alpha", "beta"] {
        world.fault(FaultKind::DropEvents, host).await;
    }
    world.moves("beta").await;
    let heard = alpha.until(gone(vm)).await;
    one(&heard, owned_by(vm, "beta"));
    let heard = beta.until(realized(vm)).await;
    one(&heard, owned_by(vm, "beta"));
}

/// Notifications that WMI itself calls lost ask for an inventory.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_called_lost_ask_for_an_inventory() {
    let world = World::small().await;
    let mut alpha = Watch::begin(&world, "alpha").await;
    let fault = Fault::new(FaultKind::OverflowEvents).on_host("alpha").times(1);
    world.lab.set_fault(fault).await.expect("in force");
    world.lab.save_vm(&world.name()).await.expect("saved");
    alpha.until(|c| *c == Change::Lost).await;
    let saved = |c: &Change| matches!(c, Change::Seen(s) if s.power == outrider_node::hypervisor::Power::Saved);
    alpha.until(saved).await;
}

/// A subscription that WMI gives up, and its service that restarts, end the watch: the agent subscribes anew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_subscription_and_a_restart_of_wmi_end_the_watch_and_a_new_one_stands() {
    let world = World::small().await;
    let watch = Watch::begin(&world, "alpha").await;
    let fault = Fault::new(FaultKind::EndSubscriptions).on_host("alpha").times(1);
    world.lab.set_fault(fault).await.expect("in force");
    world.lab.save_vm(&world.name()).await.expect("saved");
    watch.ends().await;
    let watch = Watch::begin(&world, "alpha").await;
    world.lab.restart_wmi("alpha").await.expect("restarted");
    watch.ends().await;
    let away = world.fault(FaultKind::WmiAway, "alpha").await;
    let hypervisor = world.hypervisor("alpha").await;
    let refused = hypervisor.watch().await.map(drop).expect_err("it is away");
    assert!(refused.to_string().contains("1753"), "{refused}");
    world.clear(away).await;
    let mut watch = Watch::begin(&world, "alpha").await;
    assert_eq!(watch.vms.len(), 1);
    world.lab.start_vm(&world.name()).await.expect("runs");
    watch.until(realized(world.guid())).await;
}

/// A host that is cut off from its cluster reads a database that may be long over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_isolated_host_is_neither_up_nor_down_and_claims_nothing() {
    let world = World::small().await;
    let (mut alpha, mut beta) =
        (Watch::begin(&world, "alpha").await, Watch::begin(&world, "beta").await);
    assert_eq!(
        (alpha.up.as_slice(), alpha.down.as_slice()),
        (&["alpha".into(), "beta".into()][..], &[][..])
    );
    let vm = world.guid();
    let shape = |status| HostShape { status: Some(status), ..HostShape::default() };
    world.lab.shape_host("alpha", shape(1)).await.expect("isolated");
    let silent =
        |c: &Change| matches!(c, Change::Seen(s) if s.clustered && s.cluster_owner.is_none());
    alpha.until(silent).await;
    let again = Watch::begin(&world, "alpha").await;
    assert!(again.up.is_empty() && again.down.is_empty());
    assert!(again.vms.iter().all(|vm| vm.clustered && vm.cluster_owner.is_none()));
    // The cluster gives the VM away; the old host still has it and says nothing of it.
    let seen = Watch::begin(&world, "beta").await;
    assert_eq!((seen.up.as_slice(), seen.down.as_slice()), (&["beta".into()][..], &[][..]));
    world.lab.shape_host("alpha", shape(0)).await.expect("back");
    alpha.until(|c| matches!(c, Change::Seen(s) if s.guid == vm && s.cluster_owner.as_deref() == Some("alpha"))).await;
    beta.nothing_yet(|c| matches!(c, Change::Host { up: false, .. }));
    // A drain pauses a node: that is up.
    world.lab.drain_host("alpha").await.expect("drained");
    beta.until(realized(vm)).await;
    beta.nothing_yet(|c| matches!(c, Change::Host { up: false, .. }));
}
