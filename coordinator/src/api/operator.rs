//! The operators' side: everything that the command line, the console and scripts use.

mod names;
mod orphans;
mod policy;
mod refusals;
mod restores;
mod tokens;
mod view;
mod watch;

use std::sync::Arc;

use outrider_process::identity::{PeerName, Role};
use outrider_process::tasks::TaskSpawner;
use outrider_proto::error_code;
use outrider_proto::ids::{GroupId, JobId, VmKey};
use outrider_proto::model::{parse, required};
use outrider_proto::rpc;
use outrider_proto::rpc::operator_server::{Operator, OperatorServer};
use outrider_proto::status::status;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{departures, peer, wire};
use crate::leader::{Leader, backup, operator_ticket, wire_layout};
use crate::schedule::check;
use crate::state::facts::BackupKind;
use crate::state::groups::NewGroup;
use crate::state::jobs::NewJob;
use crate::state::points::Point;
use crate::state::{Change, Outcome, State};

use names::NameError;
use policy::policy;
use refusals::{named, unknown_job, unmeant, unworkable};

/// Serves operators.
pub(crate) struct OperatorService {
    leader: Arc<Leader>,
    tasks: TaskSpawner,
}

impl OperatorService {
    pub(crate) fn server(leader: Arc<Leader>, tasks: TaskSpawner) -> OperatorServer<Self> {
        OperatorServer::new(Self { leader, tasks })
    }

    fn read<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        self.leader.member().replica().read(look)
    }

    /// The caller, if it is an operator and this member leads provably: what it reads is current.
    async fn enter<T>(&self, request: &Request<T>) -> Result<PeerName, Status> {
        let peer = peer::require(request, Role::Operator)?;
        match self.leader.member().prove().await {
            Ok(_) => Ok(peer),
            Err(error) => Err(super::proposal(&self.leader, error)),
        }
    }

    async fn propose(&self, change: Change) -> Result<Outcome, Status> {
        match self.leader.propose(change).await {
            Ok(Outcome::Refused(refusal)) => Err(super::refused(&refusal)),
            Ok(outcome) => Ok(outcome),
            Err(error) => Err(super::proposal(&self.leader, error)),
        }
    }

    async fn create(&self, job: NewJob) -> Result<rpc::Job, Status> {
        let id = job.id;
        self.propose(Change::CreateJob(Box::new(job))).await?;
        self.job(id)
    }

    fn token(&self, public_key: &[u8; 32]) -> Result<rpc::JoinToken, Status> {
        let now = self.leader.member().clock().unix_millis();
        self.read(|state| {
            let token = state.enrolment.tokens.get(&hex::encode(public_key))?;
            Some(tokens::view(public_key, token, now))
        })
        .ok_or_else(|| Status::unavailable("the token was just forgotten"))
    }

    fn job(&self, id: JobId) -> Result<rpc::Job, Status> {
        let outlook = self.leader.outlook();
        self.read(|state| state.jobs.get(id).map(|job| view::job(state, &outlook, job)))
            .ok_or_else(|| unknown_job(&id))
    }
}

#[tonic::async_trait]
impl Operator for OperatorService {
    type WatchJobsStream = ReceiverStream<Result<rpc::Job, Status>>;

    async fn status(
        &self,
        request: Request<rpc::StatusRequest>,
    ) -> Result<Response<rpc::StatusReply>, Status> {
        peer::require(&request, Role::Operator)?;
        // Any member answers; one that cannot prove that it leads says that it may be behind.
        let stale = self.leader.member().prove().await.is_err();
        Ok(Response::new(view::status(&self.leader, stale)))
    }

    async fn list_hosts(
        &self,
        request: Request<rpc::ListHostsRequest>,
    ) -> Result<Response<rpc::ListHostsReply>, Status> {
        self.enter(&request).await?;
        let (live, heard) = (self.leader.live(), self.leader.heard());
        let hosts = self.read(|state| view::hosts(state, &live, &heard));
        Ok(Response::new(rpc::ListHostsReply { hosts }))
    }

    async fn list_vms(
        &self,
        request: Request<rpc::ListVmsRequest>,
    ) -> Result<Response<rpc::ListVmsReply>, Status> {
        self.enter(&request).await?;
        let wanted = request.into_inner().name;
        let vms = self.read(|state| {
            if wanted.is_empty() {
                return Ok(view::vms(state, state.vms.keys().cloned().collect()));
            }
            let found = names::vms(state, &wanted);
            if found.is_empty() {
                return Err(named(NameError::UnknownVm(wanted)));
            }
            Ok(view::vms(state, found))
        })?;
        Ok(Response::new(rpc::ListVmsReply { vms }))
    }

    async fn settle_vm(
        &self,
        request: Request<rpc::SettleVmRequest>,
    ) -> Result<Response<rpc::Vm>, Status> {
        let peer = self.enter(&request).await?;
        let wanted = request.into_inner().vm;
        let vm = self.read(|state| names::vm(state, &wanted)).map_err(named)?;
        self.propose(Change::SettleVm { vm: vm.clone() }).await?;
        tracing::info!(operator = peer.name, %vm, "what a deleted VM left was looked after");
        let shown = self.read(|state| view::vms(state, vec![vm])).pop();
        shown.map(Response::new).ok_or_else(|| named(NameError::UnknownVm(wanted)))
    }

    async fn create_group(
        &self,
        request: Request<rpc::CreateGroupRequest>,
    ) -> Result<Response<rpc::Group>, Status> {
        self.enter(&request).await?;
        let r = request.into_inner();
        names::check_name("group", &r.name).map_err(named)?;
        if r.vms.is_empty() && r.name_patterns.is_empty() {
            return Err(Status::invalid_argument(
                "a protection group needs at least one VM or one name pattern; name some with --vm or --pattern",
            ));
        }
        for pattern in &r.name_patterns {
            names::check_name("name pattern", pattern).map_err(named)?;
        }
        let policy = policy(r.policy.unwrap_or_default())?;
        let mut vms = std::collections::BTreeSet::new();
        for vm in &r.vms {
            let key = self.read(|state| names::vm_at_work(state, vm)).map_err(named)?;
            if let Some(error) = self.read(|state| unmeant(state, &key, vm)) {
                return Err(error);
            }
            vms.insert(key);
        }
        let id = GroupId::random();
        let group = NewGroup {
            id,
            name: r.name,
            vms,
            patterns: r.name_patterns,
            policy,
            created_ms: self.leader.member().clock().unix_millis(),
        };
        self.propose(Change::CreateGroup(Box::new(group))).await?;
        self.read(|state| view::group(state, id))
            .map(Response::new)
            .ok_or_else(|| named(NameError::UnknownGroup(id.to_string())))
    }

    async fn edit_group(
        &self,
        request: Request<rpc::EditGroupRequest>,
    ) -> Result<Response<rpc::Group>, Status> {
        self.enter(&request).await?;
        let r = request.into_inner();
        let id = self.read(|state| names::group(state, &r.group)).map_err(named)?;
        let policy = policy(required("EditGroupRequest", "policy", r.policy)?)?;
        self.propose(Change::EditGroup { group: id, policy: Box::new(policy) }).await?;
        self.read(|state| view::group(state, id))
            .map(Response::new)
            .ok_or_else(|| named(NameError::UnknownGroup(id.to_string())))
    }

    async fn list_groups(
        &self,
        request: Request<rpc::ListGroupsRequest>,
    ) -> Result<Response<rpc::ListGroupsReply>, Status> {
        self.enter(&request).await?;
        let groups = self
            .read(|state| state.groups.keys().filter_map(|id| view::group(state, *id)).collect());
        Ok(Response::new(rpc::ListGroupsReply { groups }))
    }

    async fn run_backup(
        &self,
        request: Request<rpc::RunBackupRequest>,
    ) -> Result<Response<rpc::RunBackupReply>, Status> {
        let peer = self.enter(&request).await?;
        let r = request.into_inner();
        let kind = wire::to_backup_kind(r.kind());
        let vms: Vec<VmKey> = self.read(|state| match (r.vm.is_empty(), r.group.is_empty()) {
            (false, true) => {
                let key = names::vm_at_work(state, &r.vm).map_err(named)?;
                unmeant(state, &key, &r.vm).map_or(Ok(vec![key]), Err)
            }
            (true, false) => {
                names::group(state, &r.group).map(|id| state.members(id)).map_err(named)
            }
            _ => Err(Status::invalid_argument("name either a VM or a protection group")),
        })?;
        if vms.is_empty() {
            return Err(status(
                &error_code::UNKNOWN_VM,
                format!(
                    "protection group {:?} holds no VM right now; list the VMs with `outrider vm list`",
                    r.group
                ),
            ));
        }
        let why = format!("asked for by {}", peer.name);
        let mut jobs = Vec::new();
        let mut refusal = None;
        for vm in vms {
            if let Some(error) = self.read(|state| unworkable(state, &vm)) {
                refusal = Some(error);
                continue;
            }
            let now = self.leader.member().clock().unix_millis();
            let (group, due) = self.read(|state| {
                (state.group_of(&vm).map(|(id, _)| id), check::is_due(state, &vm, now))
            });
            let (kind, why) = match kind {
                BackupKind::Incremental if due => {
                    (BackupKind::ConsistencyCheck, format!("{}; {why}", check::WHY))
                }
                kind => (kind, why.clone()),
            };
            match self.create(backup(vm, group, kind, &why)).await {
                Ok(job) => jobs.push(job),
                Err(error) => refusal = Some(error),
            }
        }
        // A group's run goes on with those that can; one VM that cannot is told so.
        match refusal {
            Some(error) if jobs.is_empty() => Err(error),
            _ => Ok(Response::new(rpc::RunBackupReply { jobs })),
        }
    }

    async fn list_jobs(
        &self,
        request: Request<rpc::ListJobsRequest>,
    ) -> Result<Response<rpc::ListJobsReply>, Status> {
        self.enter(&request).await?;
        let r = request.into_inner();
        if !r.job_id.is_empty() {
            let id = parse("ListJobsRequest", "job_id", &r.job_id)?;
            return Ok(Response::new(rpc::ListJobsReply { jobs: vec![self.job(id)?] }));
        }
        let outlook = self.leader.outlook();
        let jobs = self.read(|state| {
            let vm = if r.vm.is_empty() { None } else { Some(names::vm(state, &r.vm)?) };
            Ok(view::jobs(state, &outlook, vm.as_ref(), &r.state, r.limit))
        });
        Ok(Response::new(rpc::ListJobsReply { jobs: jobs.map_err(named)? }))
    }

    async fn watch_jobs(
        &self,
        request: Request<rpc::WatchJobsRequest>,
    ) -> Result<Response<Self::WatchJobsStream>, Status> {
        self.enter(&request).await?;
        let ids = request
            .into_inner()
            .job_ids
            .iter()
            .map(|id| parse("WatchJobsRequest", "job_ids", id))
            .collect::<Result<Vec<JobId>, _>>()?;
        if let Some(id) = ids.iter().find(|id| self.read(|state| state.jobs.get(**id).is_none())) {
            return Err(unknown_job(id));
        }
        let (sender, receiver) = tokio::sync::mpsc::channel(super::STREAM_QUEUE);
        let (leader, stop) = (Arc::clone(&self.leader), self.tasks.token());
        self.tasks.spawn("watch jobs", async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = watch::watch(&leader, ids, sender) => {}
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn cancel_job(
        &self,
        request: Request<rpc::CancelJobRequest>,
    ) -> Result<Response<rpc::Job>, Status> {
        let peer = self.enter(&request).await?;
        let job = parse("CancelJobRequest", "job_id", &request.into_inner().job_id)?;
        self.propose(Change::Cancel { job, by: peer.name }).await?;
        self.job(job).map(Response::new)
    }

    async fn list_points(
        &self,
        request: Request<rpc::ListPointsRequest>,
    ) -> Result<Response<rpc::ListPointsReply>, Status> {
        self.enter(&request).await?;
        let r = request.into_inner();
        let points = self.read(|state| {
            let vm =
                if r.vm.is_empty() { None } else { Some(names::vm_with_points(state, &r.vm)?) };
            let mut points: Vec<&Point> = state
                .points
                .values()
                .filter(|p| vm.as_ref().is_none_or(|vm| p.vm == *vm))
                .collect();
            points.sort_by_key(|p| (p.committed_ms, p.taken_ms));
            Ok(points.into_iter().map(view::point).collect())
        });
        Ok(Response::new(rpc::ListPointsReply { points: points.map_err(named)? }))
    }

    async fn restore(
        &self,
        request: Request<rpc::RestoreRequest>,
    ) -> Result<Response<rpc::Job>, Status> {
        self.enter(&request).await?;
        let r = request.into_inner();
        let job = self.read(|state| restores::job(state, r))?;
        self.create(job).await.map(Response::new)
    }

    async fn read_access(
        &self,
        request: Request<rpc::ReadAccessRequest>,
    ) -> Result<Response<rpc::ReadAccessReply>, Status> {
        let peer = self.enter(&request).await?;
        let r = request.into_inner();
        let point =
            self.read(|state| names::point(state, &r.point_id, "").cloned()).map_err(named)?;
        let no_keys =
            || status(&error_code::NO_LEADER, "the coordinators have no keys yet; try again");
        let keys = self.leader.keys().ok_or_else(no_keys)?;
        let now = self.leader.member().clock().unix_millis();
        let ticket = operator_ticket(self.leader.settings(), keys, point.vm.guid, &peer.name, now);
        tracing::info!(operator = peer.name, point_id = %point.id, "read access given");
        Ok(Response::new(rpc::ReadAccessReply {
            point: Some(view::point(&point)),
            ticket,
            keys: Some(keys.default_domain().0.as_ref().into()),
            layout: wire_layout(&self.leader.layout()),
        }))
    }

    async fn create_join_token(
        &self,
        request: Request<rpc::CreateJoinTokenRequest>,
    ) -> Result<Response<rpc::JoinToken>, Status> {
        let peer = self.enter(&request).await?;
        let new = tokens::parse(request.into_inner(), peer.name.clone())?;
        let key = new.public_key;
        let (role, name, replace) = (new.role, new.name.clone(), new.replace);
        self.propose(Change::CreateToken(Box::new(new))).await?;
        let token = self.token(&key)?;
        tracing::info!(
            operator = peer.name, token = token.token_id, %role, name, replace, uses = token.uses,
            "a join token was made"
        );
        Ok(Response::new(token))
    }

    async fn list_join_tokens(
        &self,
        request: Request<rpc::ListJoinTokensRequest>,
    ) -> Result<Response<rpc::ListJoinTokensReply>, Status> {
        self.enter(&request).await?;
        let now = self.leader.member().clock().unix_millis();
        let tokens = self.read(|state| tokens::list(state, now));
        Ok(Response::new(rpc::ListJoinTokensReply { tokens }))
    }

    async fn list_orphans(
        &self,
        request: Request<rpc::ListOrphansRequest>,
    ) -> Result<Response<rpc::ListOrphansReply>, Status> {
        self.enter(&request).await?;
        let wanted = request.into_inner().host;
        let hosts: Vec<String> = self.read(|state| {
            let all = state.hosts.keys().filter(|name| wanted.is_empty() || **name == wanted);
            all.cloned().collect()
        });
        if hosts.is_empty() && !wanted.is_empty() {
            return Err(named(NameError::UnknownHost(wanted)));
        }
        Ok(Response::new(orphans::list(&self.leader, hosts).await))
    }

    async fn retire_host(
        &self,
        request: Request<rpc::RetireHostRequest>,
    ) -> Result<Response<rpc::RetireHostReply>, Status> {
        let peer = self.enter(&request).await?;
        let r = request.into_inner();
        let host = r.host;
        if r.cancel {
            self.propose(Change::KeepHost { host: host.clone() }).await?;
            tracing::info!(operator = peer.name, host, "a host stays after all");
        } else {
            self.propose(Change::RetireHost { host: host.clone(), by: peer.name.clone() }).await?;
            tracing::info!(operator = peer.name, host, "a host is to leave");
        }
        let (live, heard) = (self.leader.live(), self.leader.heard());
        let (shown, mut waits) = self.read(|state| {
            let shown = view::hosts(state, &live, &heard).into_iter().find(|h| h.name == host);
            let waits = if r.cancel { Vec::new() } else { state.departure(&host).waits() };
            (shown, waits)
        });
        if !r.cancel && waits.is_empty() {
            waits = departures::litter(&self.leader, &host).await;
        }
        Ok(Response::new(rpc::RetireHostReply { host: shown, waits }))
    }

    async fn forget_host(
        &self,
        request: Request<rpc::ForgetHostRequest>,
    ) -> Result<Response<rpc::ForgetHostReply>, Status> {
        let peer = self.enter(&request).await?;
        let r = request.into_inner();
        let left = self.read(|state| state.departure(&r.host).waits());
        departures::forget(&self.leader, &r.host, peer.name, r.force).await?;
        Ok(Response::new(rpc::ForgetHostReply { left }))
    }

    async fn revoke_join_token(
        &self,
        request: Request<rpc::RevokeJoinTokenRequest>,
    ) -> Result<Response<rpc::JoinToken>, Status> {
        let peer = self.enter(&request).await?;
        let id = request.into_inner().token_id;
        let public_key = self.read(|state| tokens::find(state, &id))?;
        self.propose(Change::RevokeToken { public_key, by: peer.name.clone() }).await?;
        let token = self.token(&public_key)?;
        tracing::info!(operator = peer.name, token = token.token_id, "a join token was revoked");
        Ok(Response::new(token))
    }
}
