//! Commands: the only ways to change the state, and their answers. They are the Raft log, so they live on disk: fields
//! are added with `#[serde(default)]`, never renamed or retyped.

use outrider_process::identity::Role;
use outrider_proto::error_code::{self, ErrorCode};
use outrider_proto::ids::{
    DutyId, GroupId, JobId, LeaseEpoch, PlacementEpoch, PointId, VmIncarnation, VmKey,
};
use outrider_proto::layout::StorageNode;
use outrider_proto::model::Binding;
use serde::{Deserialize, Serialize};

use super::domains::Keys;
use super::duties::{DutyStep, NewDuty};
use super::enrolment::{Authority, Enrol, NewToken};
use super::groups::{NewGroup, Policy};
use super::hosts::Attached;
use super::jobs::{NewJob, Report};
use super::layout::NewLayout;
use super::points::Proposal;
use super::vms::Sighting;
use crate::traces::Lasting;

/// A change and the leader's time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Command {
    /// Wall clock of the leader that proposed it, Unix milliseconds.
    pub(crate) at_ms: u64,
    /// What to change.
    pub(crate) change: Change,
}

/// What may be changed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum Change {
    /// Several, each applied or refused alone.
    Many(Vec<Change>),
    /// First keys of the fabric; later ones are ignored.
    CreateKeys(Box<Keys>),
    /// The leader says where agents and operators reach it.
    Advertise { member: u64, address: String },
    /// The first one is kept: what signs those that join.
    SetEnrolmentAuthority(Box<Authority>),
    /// An operator lets machines join.
    CreateToken(Box<NewToken>),
    /// An operator takes it back.
    RevokeToken { public_key: [u8; 32], by: String },
    /// A machine joins.
    Enrol(Box<Enrol>),
    /// An agent said hello.
    HostAttached(Attached),
    /// The cluster calls a host up.
    HostUp { host: String },
    /// The cluster calls a host down: what ran there is unproven.
    HostDown { host: String },
    /// A host is to leave: no new work, what is ours there is removed.
    RetireHost { host: String, by: String },
    /// It stays after all.
    KeepHost { host: String },
    /// A host that leaves: the VM's base is given up, its reference point becomes a duty.
    ReleaseBase { vm: VmKey, duty: DutyId },
    /// A host has left; with `force` although something of ours may be there.
    ForgetHost { host: String, by: String, force: bool },
    /// Facts of a VM.
    VmSeen(Box<Sighting>),
    /// Follow decided: the VM runs on this host.
    VmPlaced { vm: VmKey, host: String },
    /// Follow decided: this is (no longer) a duplicate.
    VmDuplicate { vm: VmKey, duplicate: bool },
    /// No host has it any more.
    VmGone { vm: VmKey },
    /// Nobody that could know it knows it: what waits for it ends, and its duties rest until it comes back.
    VmAbsent { vm: VmKey },
    /// What a look at a host showed that should not last.
    Lasting { host: String, vms: Vec<(VmKey, Lasting)> },
    /// An operator looked after what a deleted VM left: its resting duties end.
    SettleVm { vm: VmKey },
    /// Its realm shows it in another role now.
    RoleLeft { vm: VmKey },
    /// Its host crashed although it has moved by now.
    TrackingUnproven { vm: VmKey },
    /// New protection group.
    CreateGroup(Box<NewGroup>),
    /// Another policy for a group.
    EditGroup { group: GroupId, policy: Box<Policy> },
    /// A scheduled run of a group.
    RunGroup { group: GroupId, jobs: Vec<NewJob>, skipped: u64, next_run_ms: u64 },
    /// One job.
    CreateJob(Box<NewJob>),
    /// Gives a pending job to a host.
    Lease { job: JobId, host: String, boot_id: u64, placement: PlacementEpoch },
    /// The holder is silent, restarted, or gave it up. The job is not leased again before `not_before_ms`.
    LeaseLost { job: JobId, epoch: LeaseEpoch, why: String, not_before_ms: u64 },
    /// The holder of an ended lease has nothing open any more.
    SourcesClosed { job: JobId, epoch: LeaseEpoch },
    /// An operator cancels.
    Cancel { job: JobId, by: String },
    /// The holder ends its attempt; without `retry_at_ms` a failure is final.
    Finish { job: JobId, epoch: LeaseEpoch, report: Box<Report>, retry_at_ms: Option<u64> },
    /// Before a checkpoint is created.
    RecordDuty(Box<NewDuty>),
    /// What became of it.
    UpdateDuty { job: JobId, epoch: LeaseEpoch, duty: DutyId, step: DutyStep },
    /// A recovery point whose receipts were verified.
    Commit(Box<Proposal>),
    /// Base rule.
    Bind { job: JobId, epoch: LeaseEpoch, binding: Box<Binding> },
    /// Disks are about to change behind change tracking.
    RaiseIncarnation { job: JobId, epoch: LeaseEpoch, vm: VmKey, why: String },
    /// A storage node registered or restarted.
    StorageSeen(Box<StorageNode>),
    /// The layout.
    SetLayout(Box<NewLayout>),
}

/// The answer of [`super::State::apply`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum Outcome {
    /// Nothing to tell (also for Raft's own entries).
    Done,
    /// Refused, nothing was changed.
    Refused(Refusal),
    /// Jobs were created.
    Jobs(Vec<JobId>),
    /// The job is leased.
    Leased(LeaseEpoch),
    /// The group exists.
    Group(GroupId),
    /// The point is committed, now or earlier by the same job.
    Committed(PointId),
    /// The caller's lease or placement is not current.
    Superseded(String),
    /// Receipts name a layout or an incarnation that is no longer current.
    ReceiptsVoid,
    /// The duty stands.
    Duty(DutyId),
    /// The binding stands.
    Bound,
    /// The VM's incarnation.
    Incarnation(VmIncarnation),
}

/// Why a change was refused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("no VM {0} is known; list the VMs with `outrider vm list`")]
    UnknownVm(VmKey),
    #[error("no job {0} is known; list the jobs with `outrider job list`")]
    UnknownJob(JobId),
    #[error("no protection group {0} is known; list the groups with `outrider group list`")]
    UnknownGroup(GroupId),
    #[error("no recovery point {0} is known; list the points with `outrider point list`")]
    UnknownPoint(PointId),
    #[error("no host {0:?} is known; list the hosts with `outrider host list`")]
    UnknownHost(String),
    #[error("no duty {0} is known for this VM")]
    UnknownDuty(DutyId),
    #[error("a protection group named {0:?} exists already; choose another name")]
    NameTaken(String),
    #[error("VM {vm} is in the protection group {group:?} already; a VM has one policy only")]
    VmTaken { vm: VmKey, group: String },
    #[error("job {job} works on VM {vm}; wait for it, or cancel it with `outrider job cancel`")]
    Busy { vm: VmKey, job: JobId },
    #[error("job {0} has ended already")]
    Ended(JobId),
    #[error("job {job} is no {expected} job")]
    WrongKind { job: JobId, expected: String },
    #[error("job {job} was to make the recovery point {expected}, not {found}")]
    WrongPoint { job: JobId, expected: PointId, found: PointId },
    #[error("{0}")]
    NotBindable(String),
    #[error("job {0} is not pending, or its VM has moved")]
    NotLeasable(JobId),
    #[error("storage node {node} restarted as {current}; {found} is older")]
    StaleStorageNode { node: String, current: u64, found: u64 },
    #[error(
        "join token {0} is not known to this fabric; make one with `outrider fabric token create`"
    )]
    UnknownToken(String),
    #[error(
        "join token {id} expired {} ago; make a new one with `outrider fabric token create`",
        ago(*.ago_ms)
    )]
    TokenExpired { id: String, ago_ms: u64 },
    #[error(
        "join token {id} is used up: {by} joined by it; make a new one with `outrider fabric token create`"
    )]
    TokenUsedUp { id: String, by: String },
    #[error(
        "join token {id} was revoked by {by}; ask them, or make a new one with `outrider fabric token create`"
    )]
    TokenRevoked { id: String, by: String },
    #[error(
        "join token {id} is for {wanted:?} alone, not for {found:?}; make one for that name with `outrider fabric token create`"
    )]
    TokenName { id: String, wanted: String, found: String },
    #[error(
        "a {role} named {name:?} is a member already, with another key; if this machine is to take its place, make a \
         token with `outrider fabric token create --role {role} --name {name:?} --replace`"
    )]
    NameHeld { role: Role, name: String },
    #[error(
        "the key of this machine was given up when {member} was removed from the fabric by {by}; remove the folder of its identity, so \
         that it makes a new one, and join again"
    )]
    Revoked { member: String, by: String },
    #[error(
        "host {0:?} is not leaving; begin with `outrider host retire`, or say --force if the machine is gone"
    )]
    NotLeaving(String),
    #[error("host {host:?} is not clean yet: {waits}")]
    NotClean { host: String, waits: String },
    #[error("there are {0} join tokens already; wait until old ones expire")]
    TooManyTokens(usize),
    #[error("layout epoch {found} does not follow {current}")]
    StaleLayout { current: u64, found: u64 },
}

impl Refusal {
    /// The stable code.
    pub(crate) fn code(&self) -> &'static ErrorCode {
        match self {
            Self::UnknownVm(_) => &error_code::UNKNOWN_VM,
            Self::UnknownJob(_) | Self::Ended(_) => &error_code::UNKNOWN_JOB,
            Self::UnknownGroup(_) => &error_code::UNKNOWN_GROUP,
            Self::UnknownPoint(_) => &error_code::UNKNOWN_POINT,
            Self::UnknownHost(_) => &error_code::UNKNOWN_HOST,
            Self::NameTaken(_) => &error_code::AMBIGUOUS_NAME,
            Self::VmTaken { .. } => &error_code::VM_TAKEN,
            Self::Busy { .. } => &error_code::BUSY,
            Self::UnknownToken(_)
            | Self::TokenExpired { .. }
            | Self::TokenUsedUp { .. }
            | Self::TokenRevoked { .. }
            | Self::TokenName { .. }
            | Self::TooManyTokens(_) => &error_code::TOKEN_REFUSED,
            Self::NameHeld { .. } => &error_code::NAME_HELD,
            Self::Revoked { .. } => &error_code::REVOKED,
            Self::NotLeaving(_) | Self::NotClean { .. } => &error_code::HOST_NOT_LEFT,
            Self::UnknownDuty(_)
            | Self::WrongKind { .. }
            | Self::WrongPoint { .. }
            | Self::NotBindable(_)
            | Self::NotLeasable(_)
            | Self::StaleStorageNode { .. }
            | Self::StaleLayout { .. } => &error_code::DENIED,
        }
    }
}

/// A time in the largest units that tell it.
fn ago(ms: u64) -> String {
    let seconds = std::time::Duration::from_secs(ms.div_ceil(1000));
    humantime::format_duration(seconds).to_string()
}

impl From<Refusal> for Outcome {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}
