//! The replicated state: what every member agrees on, and the only ways to change it.
//!
//! Pure: no clock, no I/O, no randomness. [`State::apply`] gives the same result on every member, whatever it is given,
//! so it refuses instead of panicking. Times are those of the leader that proposed the command. Progress of running jobs
//! is not here: it lives on the leader.

pub(crate) mod absence;
pub(crate) mod bindings;
pub(crate) mod change;
pub(crate) mod departures;
pub(crate) mod domains;
pub(crate) mod duties;
pub(crate) mod enrolment;
pub(crate) mod facts;
pub(crate) mod groups;
pub(crate) mod hosts;
pub(crate) mod jobs;
mod lasting;
pub(crate) mod layout;
mod pairs;
pub(crate) mod points;
mod runs;
pub(crate) mod vms;

#[cfg(test)]
mod invariants;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeMap;

use outrider_proto::ids::{DutyId, GroupId, PointId, VmKey};
use serde::{Deserialize, Serialize};

pub(crate) use change::{Change, Command, Outcome, Refusal};

use bindings::Base;
use domains::Keys;
use duties::{Cleanups, Duty};
use enrolment::Enrolment;
use groups::Group;
use hosts::Host;
use jobs::Jobs;
use layout::Storage;
use points::Point;
use vms::Vm;

use crate::traces::Lasting;

/// Everything that is replicated.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct State {
    /// Wrapped keys; none before the first leader made them.
    pub(crate) keys: Option<Keys>,
    /// Addresses under which members want to be reached, by member; told by each one that has led.
    pub(crate) advertised: BTreeMap<u64, String>,
    /// Who may join, and who has.
    pub(crate) enrolment: Enrolment,
    /// By name.
    pub(crate) hosts: BTreeMap<String, Host>,
    /// All VMs that were ever seen.
    #[serde(with = "pairs")]
    pub(crate) vms: BTreeMap<VmKey, Vm>,
    /// Protection groups.
    pub(crate) groups: BTreeMap<GroupId, Group>,
    /// Jobs, their attempts and leases.
    pub(crate) jobs: Jobs,
    /// Duties that are not done.
    pub(crate) duties: BTreeMap<DutyId, Duty>,
    /// How often cleaning up failed, per VM with open duties.
    #[serde(with = "pairs")]
    pub(crate) cleanups: BTreeMap<VmKey, Cleanups>,
    /// Base of the next incremental.
    #[serde(with = "pairs")]
    pub(crate) bases: BTreeMap<VmKey, Base>,
    /// Why a VM has no base, where more is known than that.
    #[serde(with = "pairs")]
    pub(crate) unbased: BTreeMap<VmKey, String>,
    /// What should not last and does, on hosts.
    #[serde(with = "pairs")]
    pub(crate) lasting: BTreeMap<VmKey, Lasting>,
    /// Recovery points.
    pub(crate) points: BTreeMap<PointId, Point>,
    /// Storage nodes and layout.
    pub(crate) storage: Storage,
}

impl State {
    /// Changes the state as the command says, or refuses. Never panics.
    pub(crate) fn apply(&mut self, command: Command) -> Outcome {
        self.change(command.change, command.at_ms)
    }

    fn change(&mut self, change: Change, now: u64) -> Outcome {
        match change {
            Change::Many(all) => {
                for one in all {
                    // Parts of a batch stand alone; whoever needs an answer proposes one change.
                    let _ = self.change(one, now);
                }
                Outcome::Done
            }
            Change::CreateKeys(keys) => self.create_keys(*keys),
            Change::Advertise { member, address } => {
                self.advertised.insert(member, address);
                Outcome::Done
            }
            Change::SetEnrolmentAuthority(authority) => self.set_enrolment_authority(*authority),
            Change::CreateToken(token) => self.create_token(*token, now),
            Change::RevokeToken { public_key, by } => self.revoke_token(public_key, by),
            Change::Enrol(enrol) => self.enrol(*enrol, now),
            Change::HostAttached(host) => self.host_attached(host, now),
            Change::HostUp { host } => self.host_up(&host, now),
            Change::HostDown { host } => self.host_down(&host, now),
            Change::RetireHost { host, by } => self.retire_host(&host, &by, now),
            Change::KeepHost { host } => self.keep_host(&host),
            Change::ReleaseBase { vm, duty } => self.release_base(&vm, duty),
            Change::ForgetHost { host, by, force } => self.forget_host(&host, &by, force, now),
            Change::VmSeen(sighting) => self.vm_seen(*sighting, now),
            Change::VmPlaced { vm, host } => self.vm_placed(&vm, &host, now),
            Change::VmDuplicate { vm, duplicate } => self.vm_duplicate(&vm, duplicate),
            Change::VmGone { vm } => self.vm_gone(&vm, now),
            Change::VmAbsent { vm } => self.vm_absent(&vm, now),
            Change::Lasting { host, vms } => self.lasts(&host, vms),
            Change::SettleVm { vm } => self.settle_vm(&vm),
            Change::RoleLeft { vm } => self.role_left(&vm, now),
            Change::TrackingUnproven { vm } => self.tracking_unproven(&vm, now),
            Change::CreateGroup(group) => self.create_group(*group),
            Change::EditGroup { group, policy } => self.edit_group(group, *policy, now),
            Change::RunGroup { group, jobs, skipped, next_run_ms } => {
                self.run_group(group, jobs, skipped, next_run_ms, now)
            }
            Change::CreateJob(job) => self.create_job(*job, now),
            Change::Lease { job, host, boot_id, placement } => {
                self.lease(job, &host, boot_id, placement, now)
            }
            Change::LeaseLost { job, epoch, why, not_before_ms } => {
                self.lease_lost(job, epoch, &why, not_before_ms, now)
            }
            Change::SourcesClosed { job, epoch } => self.sources_closed(job, epoch),
            Change::Cancel { job, by } => self.cancel(job, &by, now),
            Change::Finish { job, epoch, report, retry_at_ms } => {
                self.finish(job, epoch, *report, retry_at_ms, now)
            }
            Change::RecordDuty(duty) => self.record_duty(*duty),
            Change::UpdateDuty { job, epoch, duty, step } => {
                self.update_duty(job, epoch, duty, &step)
            }
            Change::Commit(proposal) => self.commit(*proposal, now),
            Change::Bind { job, epoch, binding } => self.bind(job, epoch, *binding, now),
            Change::RaiseIncarnation { job, epoch, vm, why } => {
                self.raise_incarnation(job, epoch, &vm, &why)
            }
            Change::StorageSeen(node) => self.storage_seen(*node),
            Change::SetLayout(layout) => self.set_layout(*layout),
        }
    }
}
