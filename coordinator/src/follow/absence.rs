//! F15: when a VM is proven to be nowhere in its realm. Silence proves nothing; only answers to the very question do.
//!
//! Every host of the realm has to say twice that neither it nor the cluster's database knows the VM: all of them before one
//! moment, and all of them again after a second one, a grace time later. A VM that travels from a host that answers late to one
//! that answered early would have to do so twice. Whatever shows the VM meanwhile begins the proof anew.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use outrider_proto::ids::{VmGuid, VmKey};

use crate::state::State;

/// VMs that are asked for with one question.
pub(crate) const MOST_SOUGHT: usize = 64;

/// A host's answer: which of the VMs it was asked for it knows in any form, or finds in the cluster's database.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Searched {
    pub(crate) host: String,
    pub(crate) realm: String,
    /// When it was asked, by the leader's own clock: what it says it saw later.
    pub(crate) asked: Duration,
    pub(crate) sought: Vec<VmGuid>,
    pub(crate) found: Vec<VmGuid>,
    /// Members of its cluster, whatever their state; none on a stand-alone host.
    pub(crate) cluster: Vec<String>,
}

/// What hosts answered to this leader.
#[derive(Debug, Default)]
pub(super) struct Absence {
    /// By realm and GUID (a realm shows a GUID in one role at a time), then by host.
    missed: BTreeMap<(String, VmGuid), BTreeMap<String, Missed>>,
    /// Members of its cluster as each host named them last, by realm.
    clusters: BTreeMap<String, BTreeMap<String, Vec<String>>>,
}

/// When a host said that it does not know a VM, first and last.
#[derive(Debug, Clone, Copy)]
struct Missed {
    first: Duration,
    last: Duration,
}

impl Absence {
    /// Somebody shows the VM.
    pub(super) fn shown(&mut self, vm: &VmKey) {
        self.missed.remove(&(vm.realm.clone(), vm.guid));
    }

    /// The host was removed from the fabric.
    pub(super) fn forget(&mut self, host: &str) {
        for hosts in self.missed.values_mut() {
            hosts.remove(host);
        }
        for hosts in self.clusters.values_mut() {
            hosts.remove(host);
        }
    }

    pub(super) fn heard(&mut self, answer: &Searched) {
        let told = self.clusters.entry(answer.realm.clone()).or_default();
        told.insert(answer.host.clone(), answer.cluster.clone());
        for guid in &answer.sought {
            let place = (answer.realm.clone(), *guid);
            if answer.found.contains(guid) {
                self.missed.remove(&place);
                continue;
            }
            let hosts = self.missed.entry(place).or_default();
            let fresh = Missed { first: answer.asked, last: answer.asked };
            let missed = hosts.entry(answer.host.clone()).or_insert(fresh);
            missed.last = missed.last.max(answer.asked);
        }
    }

    /// Forgets VMs of a realm that nobody looks for any more.
    pub(super) fn keep(&mut self, realm: &str, sought: &[VmKey]) {
        let wanted: BTreeSet<VmGuid> = sought.iter().map(|vm| vm.guid).collect();
        self.missed.retain(|(of, guid), _| of != realm || wanted.contains(guid));
    }

    /// Whether all that could know the VM said twice, `grace` apart, that they do not. A host that is down or cut off does not
    /// answer, and so does a member of the cluster without an agent: nothing is proven without them.
    pub(super) fn proven(
        &self,
        vm: &VmKey,
        clustered: bool,
        grace: Duration,
        state: &State,
    ) -> bool {
        let Some(missed) = self.missed.get(&(vm.realm.clone(), vm.guid)) else { return false };
        let told = self.clusters.get(&vm.realm);
        let members: BTreeSet<&str> =
            told.into_iter().flat_map(BTreeMap::values).flatten().map(String::as_str).collect();
        if clustered && members.is_empty() {
            return false;
        }
        let hosts = state.hosts.iter().filter(|(_, h)| h.realm == vm.realm).map(|(name, _)| name);
        let answers: Option<Vec<&Missed>> = hosts
            .map(String::as_str)
            .chain(members)
            .map(|host| {
                missed.iter().find(|(name, _)| name.eq_ignore_ascii_case(host)).map(|(_, m)| m)
            })
            .collect();
        let Some(answers) = answers.filter(|answers| !answers.is_empty()) else { return false };
        let first = answers.iter().map(|m| m.first).max().unwrap_or_default();
        let last = answers.iter().map(|m| m.last).min().unwrap_or_default();
        last.saturating_sub(first) >= grace && last > first
    }
}
