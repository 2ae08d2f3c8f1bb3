//! Follow: from what agents see to where each VM runs. Rules in `docs/follow.md`, one test each.
//!
//! [`Follow`] holds what the agents told *this* leader; the state holds what was decided. Agents attach to a new leader
//! with a full inventory, so that what a leader knows can be lost with it. Pure: events and state in, changes out.

mod absence;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use outrider_proto::ids::{VmKey, VmRole};

use crate::state::vms::{Sighting, is_placed, is_primary};
use crate::state::{Change, State};

use absence::Absence;
pub(crate) use absence::{MOST_SOUGHT, Searched};

/// An instance of a VM as one agent reports it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Instance {
    pub(crate) facts: Sighting,
    /// False: a planned VM, which never claims.
    pub(crate) realized: bool,
    /// Host that the cluster database names, as this agent read it.
    pub(crate) owner: Option<String>,
}

/// What an agent reports.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Event {
    /// All that the host has, and what the cluster says of its nodes.
    Inventory {
        host: String,
        realm: String,
        vms: Vec<Instance>,
        up: Vec<String>,
        down: Vec<String>,
    },
    /// A VM appeared or changed.
    Seen { host: String, instance: Instance },
    /// The host has the VM no more.
    Gone { host: String, vm: VmKey },
    /// The cluster database names an owner.
    Owner { vm: VmKey, owner: String },
    /// The cluster database calls a host up or down.
    Host { realm: String, host: String, up: bool },
    /// This leader has not heard the host's agent for longer than any lease lives, or hears it again.
    Silent { host: String, silent: bool },
    /// The host was removed from the fabric.
    Forgotten { host: String },
    /// A host looked for VMs that nobody shows.
    Searched(Searched),
}

/// What agents told this leader.
#[derive(Debug, Default)]
pub(crate) struct Follow {
    vms: BTreeMap<VmKey, Reports>,
    /// Hosts whose full inventory this leader has: only their silence about a VM means something.
    heard: BTreeSet<String>,
    /// Hosts that are silent for so long that none of them holds a lease.
    silent: BTreeSet<String>,
    /// Realms with a cluster database: it says which hosts are dead.
    clusters: BTreeSet<String>,
    /// What hosts answered about VMs that nobody shows.
    absence: Absence,
    /// Between the two looks of all hosts that prove that a VM is nowhere.
    grace: Duration,
    clock: u64,
}

#[derive(Debug, Default)]
struct Reports {
    /// Latest owner event of the cluster.
    owner: Option<String>,
    by: BTreeMap<String, Report>,
}

#[derive(Debug)]
struct Report {
    realized: bool,
    clustered: bool,
    owner: Option<String>,
    /// An owner event named another host since this instance appeared: its own, perhaps older, reading counts no more.
    disowned: bool,
    /// When its claim began; later claims win in a cluster.
    since: Option<u64>,
}

impl Report {
    fn claims(&self, host: &str) -> bool {
        self.realized && !self.disowned && (!self.clustered || self.owner.as_deref() == Some(host))
    }
}

impl Follow {
    /// With the time between the two looks of all hosts that prove that a VM is nowhere.
    pub(crate) fn new(grace: Duration) -> Self {
        Self { grace, ..Self::default() }
    }

    /// Takes an event in and says what follows from it.
    pub(crate) fn apply(&mut self, event: Event, state: &State) -> Vec<Change> {
        let mut changes = Vec::new();
        match event {
            // On its way when the host was removed.
            Event::Inventory { host, .. } | Event::Seen { host, .. }
                if !state.hosts.contains_key(&host) => {}
            Event::Forgotten { host } => {
                self.heard.remove(&host);
                self.silent.remove(&host);
                self.absence.forget(&host);
                for reports in self.vms.values_mut() {
                    reports.by.remove(&host);
                }
            }
            Event::Searched(answer) => self.searched(&answer, state, &mut changes),
            Event::Inventory { host, realm, vms, up, down } => {
                self.silent.remove(&host);
                if !up.is_empty() || !down.is_empty() {
                    self.clusters.insert(realm.clone());
                }
                self.inventory(&host, &realm, vms, state, &mut changes);
                for (nodes, is_up) in [(up, true), (down, false)] {
                    for node in nodes {
                        self.host(&realm, &node, is_up, state, &mut changes);
                    }
                }
            }
            Event::Seen { host, instance } => {
                self.seen(&host, instance, false, state, &mut changes);
            }
            Event::Gone { host, vm } => self.gone(&host, &vm, state, &mut changes),
            Event::Owner { vm, owner } => self.owner(&vm, owner, state, &mut changes),
            Event::Host { realm, host, up } => {
                self.clusters.insert(realm.clone());
                self.host(&realm, &host, up, state, &mut changes);
            }
            Event::Silent { host, silent: false } => drop(self.silent.remove(&host)),
            Event::Silent { host, silent: true } => self.silent(host, state, &mut changes),
        }
        changes
    }

    /// VMs of a realm that nobody shows, and that something is still owed to or waits for.
    pub(crate) fn sought(&self, realm: &str, state: &State) -> Vec<VmKey> {
        let shown = |vm: &VmKey| {
            roles(vm).any(|role| self.vms.get(&role).is_some_and(|reports| !reports.by.is_empty()))
        };
        state.owed().into_iter().filter(|vm| vm.realm == realm && !shown(vm)).collect()
    }

    /// F15: only what all hosts and the cluster's database say twice is taken for an absence.
    fn searched(&mut self, answer: &Searched, state: &State, changes: &mut Vec<Change>) {
        self.absence.heard(answer);
        let sought = self.sought(&answer.realm, state);
        self.absence.keep(&answer.realm, &sought);
        for vm in sought {
            let clustered = state.vms.get(&vm).is_some_and(|known| known.clustered);
            if self.absence.proven(&vm, clustered, self.grace, state) {
                tracing::warn!(%vm, "no host and no cluster database of its realm knows this VM any more");
                changes.push(Change::VmAbsent { vm });
            }
        }
    }

    fn inventory(
        &mut self,
        host: &str,
        realm: &str,
        vms: Vec<Instance>,
        state: &State,
        changes: &mut Vec<Change>,
    ) {
        self.heard.insert(host.to_owned());
        let named: BTreeSet<VmKey> = vms.iter().map(|i| i.facts.vm.clone()).collect();
        for instance in vms {
            self.seen(host, instance, true, state, changes);
        }
        // What the inventory does not name is not there any more; but nothing is deleted or called gone for it.
        let missing: Vec<VmKey> = self
            .vms
            .iter()
            .filter(|(key, r)| {
                key.realm == realm && r.by.contains_key(host) && !named.contains(*key)
            })
            .map(|(key, _)| key.clone())
            .collect();
        for key in missing {
            if let Some(reports) = self.vms.get_mut(&key) {
                reports.by.remove(host);
            }
        }
        // VMs that the state places here and the host does not name: others may have claimed them already.
        let lost: Vec<VmKey> = state
            .vms
            .iter()
            .filter(|(key, vm)| vm.host.as_deref() == Some(host) && !named.contains(*key))
            .map(|(key, _)| key.clone())
            .collect();
        for key in lost {
            self.decide(&key, state, changes);
        }
    }

    fn seen(
        &mut self,
        host: &str,
        instance: Instance,
        fresh: bool,
        state: &State,
        changes: &mut Vec<Change>,
    ) {
        let key = instance.facts.vm.clone();
        self.absence.shown(&key);
        let reports = self.vms.entry(key.clone()).or_default();
        let cluster_owner = reports.owner.clone();
        let (clustered, realized) = (instance.facts.clustered, instance.realized);
        let report = reports.by.entry(host.to_owned()).or_insert_with(|| Report {
            realized: false,
            clustered,
            owner: None,
            disowned: false,
            since: None,
        });
        let appeared = realized && !report.realized;
        report.realized = realized;
        report.clustered = clustered;
        report.owner = instance.owner;
        if appeared || fresh {
            report.disowned = false;
            // The event may have come before the instance: an owner event that names this host stands.
            if cluster_owner.as_deref() == Some(host) {
                report.owner = cluster_owner;
            }
        }
        self.renew_claim(&key, host);
        // A planned instance tells nothing of the VM, not even its name for certain.
        if !realized {
            self.decide(&key, state, changes);
            return;
        }
        let known = state.vms.get(&key);
        let speaks = match known {
            None => true,
            Some(vm) => {
                vm.host.as_deref().is_none_or(|h| h == host)
                    || self.claims(&key).any(|(claimant, _)| claimant == host)
            }
        };
        if speaks && !known.is_some_and(|vm| vm.shows(&instance.facts)) {
            changes.push(Change::VmSeen(Box::new(instance.facts)));
        }
        self.other_roles(&key, state, changes);
        self.decide(&key, state, changes);
    }

    /// A realm has one instance of a GUID: what it shows in this role is in no other any more.
    fn other_roles(&mut self, key: &VmKey, state: &State, changes: &mut Vec<Change>) {
        let holds = |vm: &VmKey| {
            let placed =
                state.vms.get(vm).is_some_and(|v| v.host.is_some() && v.gone_since_ms.is_none());
            placed || state.bases.contains_key(vm)
        };
        let former = roles(key).filter(|other| other != key && holds(other));
        for other in former.collect::<Vec<_>>() {
            if let Some(reports) = self.vms.get_mut(&other) {
                reports.by.clear();
            }
            changes.push(Change::RoleLeft { vm: other.clone() });
            self.release_duplicates(&other, state, changes);
        }
    }

    fn gone(&mut self, host: &str, key: &VmKey, state: &State, changes: &mut Vec<Change>) {
        let reports = self.vms.entry(key.clone()).or_default();
        reports.by.remove(host);
        let held = state.vms.get(key).is_some_and(|vm| vm.host.as_deref() == Some(host));
        let before = changes.len();
        self.decide(key, state, changes);
        let claimed = changes[before..].iter().any(|c| matches!(c, Change::VmPlaced { .. }));
        if held && !claimed && state.vms.get(key).is_some_and(|vm| vm.gone_since_ms.is_none()) {
            changes.push(Change::VmGone { vm: key.clone() });
            self.release_duplicates(key, state, changes);
        }
    }

    /// The cluster's database knows GUIDs, not roles.
    fn owner(&mut self, key: &VmKey, owner: String, state: &State, changes: &mut Vec<Change>) {
        let known: Vec<VmKey> =
            roles(key).filter(|role| role != key && self.vms.contains_key(role)).collect();
        for role in known {
            self.owner_of_role(&role, owner.clone(), state, changes);
        }
        self.owner_of_role(key, owner, state, changes);
    }

    fn owner_of_role(
        &mut self,
        key: &VmKey,
        owner: String,
        state: &State,
        changes: &mut Vec<Change>,
    ) {
        let reports = self.vms.entry(key.clone()).or_default();
        for (host, report) in &mut reports.by {
            report.disowned = *host != owner;
            if *host == owner {
                report.owner = Some(owner.clone());
            }
        }
        reports.owner = Some(owner.clone());
        let hosts: Vec<String> = reports.by.keys().cloned().collect();
        for host in hosts {
            self.renew_claim(key, &host);
        }
        self.decide(key, state, changes);
    }

    fn host(
        &mut self,
        realm: &str,
        host: &str,
        up: bool,
        state: &State,
        changes: &mut Vec<Change>,
    ) {
        // A cluster speaks of its own nodes only.
        let Some(known) = state.hosts.get(host).filter(|h| h.realm == realm) else { return };
        if up {
            if !known.up {
                changes.push(Change::HostUp { host: host.to_owned() });
            }
            return;
        }
        if known.up {
            changes.push(Change::HostDown { host: host.to_owned() });
        }
        self.heard.remove(host);
        let had: Vec<VmKey> = self
            .vms
            .iter()
            .filter(|(_, r)| r.by.contains_key(host))
            .map(|(key, _)| key.clone())
            .collect();
        for key in had {
            let mut realized = false;
            if let Some(reports) = self.vms.get_mut(&key) {
                realized = reports.by.remove(host).is_some_and(|r| r.realized);
            }
            let moved = state.vms.get(&key).is_some_and(|vm| vm.host.as_deref() != Some(host));
            if known.up && realized && moved {
                // Restarted elsewhere before we heard of the crash: nobody said good-bye on the old host.
                changes.push(Change::TrackingUnproven { vm: key.clone() });
            }
            self.decide_without(&key, Some(host), state, changes);
        }
        let placed: Vec<VmKey> = state
            .vms
            .iter()
            .filter(|(_, vm)| vm.host.as_deref() == Some(host))
            .map(|(key, _)| key.clone())
            .collect();
        for key in placed {
            self.release_duplicates(&key, state, changes);
        }
    }

    fn silent(&mut self, host: String, state: &State, changes: &mut Vec<Change>) {
        let placed = state.vms.iter().filter(|(_, vm)| vm.host.as_deref() == Some(host.as_str()));
        let placed: Vec<VmKey> = placed.map(|(key, _)| key.clone()).collect();
        self.silent.insert(host);
        for key in placed {
            self.decide(&key, state, changes);
        }
    }

    fn claims(&self, key: &VmKey) -> impl Iterator<Item = (&str, &Report)> {
        self.vms
            .get(key)
            .into_iter()
            .flat_map(|reports| &reports.by)
            .filter(|(host, report)| report.claims(host))
            .map(|(host, report)| (host.as_str(), report))
    }

    fn renew_claim(&mut self, key: &VmKey, host: &str) {
        self.clock += 1;
        let clock = self.clock;
        if let Some(report) = self.vms.get_mut(key).and_then(|r| r.by.get_mut(host)) {
            if report.claims(host) {
                report.since.get_or_insert(clock);
            } else {
                report.since = None;
            }
        }
    }

    fn decide(&self, key: &VmKey, state: &State, changes: &mut Vec<Change>) {
        self.decide_without(key, None, state, changes);
    }

    /// As if `dead` were down already: the change that says so is proposed with this decision.
    fn decide_without(
        &self,
        key: &VmKey,
        dead: Option<&str>,
        state: &State,
        changes: &mut Vec<Change>,
    ) {
        if !is_placed(key) {
            return;
        }
        let Some((newest, report)) =
            self.claims(key).max_by_key(|(host, report)| (report.since, *host))
        else {
            return;
        };
        let known = state.vms.get(key);
        if is_primary(key)
            && known.is_none_or(|vm| vm.host.is_none())
            && let Some(original) = original_elsewhere(key, dead, state)
        {
            if !known.is_some_and(|vm| vm.duplicate) {
                tracing::info!(vm = %key, of = %original, "a duplicate is shown, not followed");
                changes.push(Change::VmDuplicate { vm: key.clone(), duplicate: true });
            }
            return;
        }
        let place = |host: &str| Change::VmPlaced { vm: key.clone(), host: host.to_owned() };
        let Some(current) = known.and_then(|vm| vm.host.as_deref()) else {
            changes.push(place(newest));
            return;
        };
        let holds = self.claims(key).any(|(host, _)| host == current);
        let current_is_silent =
            self.silent.contains(current) && !self.clusters.contains(&key.realm);
        if newest == current || !report.clustered && holds && !current_is_silent {
            if known.is_some_and(|vm| vm.gone_since_ms.is_some()) {
                changes.push(place(current));
            }
            return;
        }
        let current_is_down =
            dead == Some(current) || state.hosts.get(current).is_some_and(|h| !h.up);
        let current_said_gone = known.is_some_and(|vm| vm.gone_since_ms.is_some())
            || self.heard.contains(current) && !self.instance_at(key, current);
        // In a cluster the database has agreed already; elsewhere the old host must have let go.
        if report.clustered || current_is_down || current_said_gone {
            changes.push(place(newest));
        } else if current_is_silent {
            // Nobody says whether it crashed: what it last wrote down of changes is not relied on unseen.
            changes.push(Change::TrackingUnproven { vm: key.clone() });
            changes.push(place(newest));
        }
    }

    fn instance_at(&self, key: &VmKey, host: &str) -> bool {
        self.vms.get(key).is_some_and(|r| r.by.get(host).is_some_and(|report| report.realized))
    }

    /// The first one is gone: a duplicate in another realm is now the VM.
    fn release_duplicates(&self, gone: &VmKey, state: &State, changes: &mut Vec<Change>) {
        // Nobody is a duplicate of a replica.
        if !is_primary(gone) {
            return;
        }
        let waiting = state
            .vms
            .iter()
            .filter(|(key, vm)| vm.duplicate && key.guid == gone.guid && key.realm != gone.realm);
        for (key, _) in waiting {
            if let Some((host, _)) = self.claims(key).max_by_key(|(host, r)| (r.since, *host)) {
                changes.push(Change::VmPlaced { vm: key.clone(), host: host.to_owned() });
                return;
            }
        }
    }
}

/// A VM in all its roles.
fn roles(key: &VmKey) -> impl Iterator<Item = VmKey> + '_ {
    let all = [VmRole::Primary, VmRole::Replica, VmRole::TestReplica];
    all.into_iter().map(|role| VmKey { role, ..key.clone() })
}

/// A VM of another realm with this GUID that is followed and alive.
fn original_elsewhere<'a>(key: &VmKey, dead: Option<&str>, state: &'a State) -> Option<&'a VmKey> {
    state
        .vms
        .iter()
        .find(|(other, vm)| {
            let alive = |host: &String| {
                dead != Some(host.as_str()) && state.hosts.get(host).is_none_or(|h| h.up)
            };
            other.guid == key.guid
                && other.realm != key.realm
                && is_primary(other)
                && !vm.duplicate
                && vm.gone_since_ms.is_none()
                && vm.host.as_ref().is_some_and(alive)
        })
        .map(|(other, _)| other)
}

#[cfg(test)]
mod tests;
