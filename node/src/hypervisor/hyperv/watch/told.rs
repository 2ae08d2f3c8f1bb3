//! What the reader knows, and what a look adds to it. Pure.

use std::collections::HashMap;
use std::time::Instant;

use outrider_proto::ids::VmGuid;

use super::due::SETTLED;
use crate::hypervisor::hyperv::cluster::ClusterView;
use crate::hypervisor::{Change, ReplicaRole, VmSeen};

/// What was told.
#[derive(Debug)]
pub(super) struct Told {
    /// VMs that are realized here.
    vms: HashMap<VmGuid, VmSeen>,
    view: ClusterView,
    /// VMs that a look did not find, although no event said that they left; and since when.
    missing: HashMap<VmGuid, Instant>,
}

/// VMs that another look has to confirm as gone.
type Missing = Vec<VmGuid>;

impl Told {
    /// After an inventory.
    pub(super) fn new(vms: Vec<VmSeen>, view: ClusterView) -> Self {
        let here = vms.into_iter().filter(|vm| vm.realized).map(|vm| (vm.guid, vm));
        Self { vms: here.collect(), view, missing: HashMap::new() }
    }

    /// The cluster as it was last read.
    pub(super) fn view(&self) -> &ClusterView {
        &self.view
    }

    /// A look at the cluster. A host that is cut off from it tells nothing of it.
    pub(super) fn cluster(&mut self, now: ClusterView) -> Vec<Change> {
        let mut changes = Vec::new();
        if now.speaks {
            for (vm, owner) in &now.owners {
                if self.view.owners.get(vm) != Some(owner) {
                    changes.push(Change::Owner(*vm, owner.clone()));
                }
            }
            for (host, up) in &now.hosts {
                if self.view.hosts.get(host) != Some(up) {
                    changes.push(Change::Host { host: host.clone(), up: *up });
                }
            }
        }
        let (owners, hosts) = (self.view.owners.clone(), self.view.hosts.clone());
        self.view = now;
        for vm in self.vms.values_mut() {
            let (clustered, owner) = self.view.owner_of(vm.guid);
            if (vm.clustered, vm.cluster_owner.as_deref()) != (clustered, owner) {
                vm.clustered = clustered;
                vm.cluster_owner = owner.map(str::to_owned);
                changes.push(Change::Seen(Box::new(vm.clone())));
            }
        }
        if !self.view.speaks {
            // What was told of others stands until it can be read again.
            self.view.hosts = hosts;
            self.view.owners = owners;
        }
        changes
    }

    /// Whether a VM is known to be here.
    pub(super) fn has(&self, vm: VmGuid) -> bool {
        self.vms.contains_key(&vm)
    }

    /// VMs that the cluster gives this host and that no look has found here: their own event is late or lost.
    pub(super) fn expected(&self) -> impl Iterator<Item = VmGuid> + '_ {
        let ours = |owner: &String| owner.eq_ignore_ascii_case(&self.view.this);
        let owned =
            self.view.owners.iter().filter(move |(_, owner)| self.view.speaks && ours(owner));
        owned.map(|(vm, _)| *vm).filter(|vm| !self.has(*vm))
    }

    /// A look at everything.
    pub(super) fn all(&mut self, vms: Vec<VmSeen>) -> (Vec<Change>, Missing) {
        let mut changes = Vec::new();
        let mut missing: Missing = self.vms.keys().copied().collect();
        for vm in vms.into_iter().filter(|vm| vm.realized) {
            missing.retain(|guid| *guid != vm.guid);
            self.seen(vm, &mut changes);
        }
        (changes, missing)
    }

    /// A look at some VMs: each with whether an event called it deleted, and what was found.
    pub(super) fn some(
        &mut self,
        looked: Vec<(VmGuid, bool, Option<VmSeen>)>,
        now: Instant,
    ) -> (Vec<Change>, Missing) {
        let (mut changes, mut missing) = (Vec::new(), Missing::new());
        let absent =
            |guid: &VmGuid| looked.iter().any(|(vm, _, seen)| vm == guid && seen.is_none());
        // A provider that restarts calls everything deleted and shows nothing: that is not believed at once.
        let doubtful = self.vms.len() > 1 && self.vms.keys().all(absent);
        for (guid, deleted, seen) in looked {
            match seen {
                Some(vm) => self.seen(vm, &mut changes),
                None => {
                    let since = *self.missing.entry(guid).or_insert(now);
                    let settled = now.duration_since(since) >= SETTLED;
                    let known = self.vms.contains_key(&guid);
                    if settled || deleted && !doubtful {
                        self.missing.remove(&guid);
                        match self.vms.remove(&guid) {
                            Some(was) => changes.push(Change::Gone(guid, was.replica)),
                            // It came and went between our looks; the reader's inventory may have met it.
                            None if deleted => changes.push(Change::Gone(guid, ReplicaRole::None)),
                            None => {}
                        }
                    } else if known {
                        missing.push(guid);
                    } else {
                        self.missing.remove(&guid);
                    }
                }
            }
        }
        (changes, missing)
    }

    fn seen(&mut self, vm: VmSeen, changes: &mut Vec<Change>) {
        self.missing.remove(&vm.guid);
        let before = self.vms.insert(vm.guid, vm.clone());
        if before.as_ref() == Some(&vm) {
            return;
        }
        // In another role it is another VM, whose history is its own.
        if let Some(before) = before.filter(|before| before.replica != vm.replica) {
            changes.push(Change::Gone(before.guid, before.replica));
        }
        changes.push(Change::Seen(Box::new(vm)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::Power;

    fn guid(n: u128) -> VmGuid {
        VmGuid(uuid::Uuid::from_u128(n))
    }

    fn vm(n: u128) -> VmSeen {
        VmSeen {
            guid: guid(n),
            name: format!("vm{n}"),
            power: Power::Running,
            replica: ReplicaRole::None,
            realized: true,
            clustered: true,
            cluster_owner: Some("hv1".into()),
            generation: 2,
            version: "10.0".into(),
            disks: Vec::new(),
        }
    }

    fn view(owners: &[(u128, &str)], hosts: &[(&str, bool)]) -> ClusterView {
        ClusterView {
            owners: owners.iter().map(|(n, owner)| (guid(*n), (*owner).to_owned())).collect(),
            hosts: hosts.iter().map(|(host, up)| ((*host).to_owned(), *up)).collect(),
            this: "HV1".into(),
            speaks: true,
            ..ClusterView::default()
        }
    }

    #[test]
    fn a_vm_that_the_cluster_gives_us_is_expected_until_it_is_found() {
        let mut told = told();
        told.cluster(view(&[(3, "hv1"), (4, "hv2")], &[]));
        assert_eq!(told.expected().collect::<Vec<_>>(), [guid(3)]);
        told.some(vec![(guid(3), false, Some(vm(3)))], Instant::now());
        assert_eq!(told.expected().count(), 0);
    }

    fn told() -> Told {
        Told::new(vec![vm(1), vm(2)], view(&[(1, "hv1"), (2, "hv1")], &[("hv1", true)]))
    }

    #[test]
    fn what_was_told_is_not_told_again() {
        let mut told = told();
        let (changes, missing) = told.some(vec![(guid(1), false, Some(vm(1)))], Instant::now());
        assert!(changes.is_empty() && missing.is_empty());
        assert!(told.cluster(view(&[(1, "hv1"), (2, "hv1")], &[("hv1", true)])).is_empty());
        let (changes, missing) = told.all(vec![vm(1), vm(2)]);
        assert!(changes.is_empty() && missing.is_empty());
    }

    #[test]
    fn a_vm_that_is_called_deleted_and_not_there_is_gone_at_once() {
        let (changes, _) = told().some(vec![(guid(1), true, None)], Instant::now());
        assert_eq!(changes, [Change::Gone(guid(1), ReplicaRole::None)]);
    }

    /// Events are ahead of reads: the look after the deletion still shows the VM, the next one does not.
    #[test]
    fn a_vm_that_nobody_called_deleted_is_gone_when_a_second_look_does_not_find_it() {
        let (mut told, start) = (told(), Instant::now());
        let (changes, _) = told.some(vec![(guid(1), true, Some(vm(1)))], start);
        assert!(changes.is_empty());
        let (changes, missing) = told.some(vec![(guid(1), false, None)], start);
        assert_eq!((changes, missing), (vec![], vec![guid(1)]));
        let (changes, missing) = told.some(vec![(guid(1), false, None)], start + SETTLED);
        assert_eq!(changes, [Change::Gone(guid(1), ReplicaRole::None)]);
        assert!(missing.is_empty());
    }

    #[test]
    fn a_vm_that_comes_back_before_the_second_look_was_never_gone() {
        let (mut told, start) = (told(), Instant::now());
        told.some(vec![(guid(1), false, None)], start);
        let (changes, _) = told.some(vec![(guid(1), false, Some(vm(1)))], start + SETTLED);
        assert!(changes.is_empty());
        let (_, missing) = told.some(vec![(guid(1), false, None)], start + 2 * SETTLED);
        assert_eq!(missing, [guid(1)], "it has all its time again");
    }

    /// Rule F6: an empty answer calls nothing gone.
    #[test]
    fn a_provider_that_calls_everything_deleted_is_not_believed_at_once() {
        let (mut told, start) = (told(), Instant::now());
        let all = || vec![(guid(1), true, None), (guid(2), true, None)];
        let (changes, missing) = told.some(all(), start);
        assert_eq!((changes, missing.len()), (vec![], 2));
        let (changes, _) = told.some(all(), start + SETTLED);
        assert_eq!(changes.len(), 2, "it stays so");
    }

    #[test]
    fn a_look_at_everything_finds_what_events_did_not_tell() {
        let mut told = told();
        let renamed = VmSeen { name: "other".into(), ..vm(2) };
        let (changes, missing) = told.all(vec![renamed.clone(), vm(3)]);
        let seen = |vm| Change::Seen(Box::new(vm));
        assert_eq!(changes, [seen(renamed), seen(vm(3))]);
        assert_eq!(missing, [guid(1)]);
    }

    #[test]
    fn owners_and_hosts_are_told_when_they_differ() {
        let mut told = told();
        let changes =
            told.cluster(view(&[(1, "hv2"), (2, "hv1")], &[("hv1", true), ("hv2", false)]));
        let moved = VmSeen { cluster_owner: Some("hv2".into()), ..vm(1) };
        assert_eq!(
            changes,
            [
                Change::Owner(guid(1), "hv2".into()),
                Change::Host { host: "hv2".into(), up: false },
                Change::Seen(Box::new(moved)),
            ]
        );
        let changes = told.cluster(view(&[(2, "hv1")], &[("hv1", true)]));
        let alone = VmSeen { clustered: false, cluster_owner: None, ..vm(1) };
        assert_eq!(changes, [Change::Seen(Box::new(alone))], "its cluster role was removed");
    }

    /// Facts 4.3: only the cluster's view decides, and a host that is cut off does not have it.
    #[test]
    fn a_host_that_is_cut_off_says_nothing_of_the_cluster_and_claims_nothing() {
        let mut told = told();
        let cut_off = ClusterView {
            speaks: false,
            ..view(&[(1, "hv1"), (2, "hv1")], &[("hv1", false), ("hv2", false)])
        };
        let mut changes = told.cluster(cut_off);
        changes.sort_by_key(|c| match c {
            Change::Seen(vm) => vm.guid,
            other => panic!("{other:?}"),
        });
        let silent = |n| Change::Seen(Box::new(VmSeen { cluster_owner: None, ..vm(n) }));
        assert_eq!(changes, [silent(1), silent(2)], "clustered still, and of no known owner");
        let back = told.cluster(view(&[(1, "hv1"), (2, "hv2")], &[("hv1", true), ("hv2", true)]));
        assert!(back.contains(&Change::Owner(guid(2), "hv2".into())), "{back:?}");
        assert!(back.contains(&Change::Seen(Box::new(vm(1)))), "{back:?}");
    }

    /// Rule F1: a primary that becomes the replica of its former replica.
    #[test]
    fn a_vm_in_another_role_is_another_vm() {
        let mut told = told();
        let replica = VmSeen { replica: ReplicaRole::Replica, ..vm(1) };
        let (changes, _) = told.some(vec![(guid(1), false, Some(replica.clone()))], Instant::now());
        let expected = [Change::Gone(guid(1), ReplicaRole::None), Change::Seen(Box::new(replica))];
        assert_eq!(changes, expected);
        let (changes, _) = told.some(vec![(guid(1), true, None)], Instant::now());
        assert_eq!(changes, [Change::Gone(guid(1), ReplicaRole::Replica)]);
    }
}
