//! The agents' side: one stream each, and the calls that fence their work.

use std::future::Future;
use std::sync::Arc;

use outrider_process::identity::{PeerName, Role};
use outrider_process::tasks::TaskSpawner;
use outrider_process::telemetry::propagate;
use outrider_proto::error_code;
use outrider_proto::ids::{DutyId, JobId, VmKey};
use outrider_proto::model::{self, FieldError, parse, required};
use outrider_proto::rpc;
use outrider_proto::rpc::agent_server::{Agent, AgentServer};
use outrider_proto::rpc::agent_up::What;
use outrider_proto::rpc::vm_change;
use outrider_proto::status::status;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument;

use super::{departures, peer, wire};
use crate::commit;
use crate::follow::Event;
use crate::leader::{AgentSession, Leader, Progress};
use crate::schedule;
use crate::state::duties::{DutyStep, NewDuty};
use crate::state::hosts::Attached;
use crate::state::jobs::{Job, Report};
use crate::state::{Change, Outcome, Refusal, State};

/// Serves node agents.
pub(crate) struct AgentService {
    leader: Arc<Leader>,
    tasks: TaskSpawner,
}

impl AgentService {
    pub(crate) fn server(leader: Arc<Leader>, tasks: TaskSpawner) -> AgentServer<Self> {
        AgentServer::new(Self { leader, tasks }).max_decoding_message_size(super::MAX_MESSAGE)
    }

    fn read<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        self.leader.member().replica().read(look)
    }

    /// The caller, if it is a host whose certificate was not given up.
    fn enter<T>(&self, request: &Request<T>) -> Result<PeerName, Status> {
        let peer = peer::require(request, Role::Node)?;
        let key = peer::key_of(request);
        match self.read(|state| key.and_then(|key| state.revoked(&key).cloned())) {
            None => Ok(peer),
            Some(revoked) => {
                Err(super::refused(&Refusal::Revoked { member: revoked.member, by: revoked.by }))
            }
        }
    }

    /// Refuses hosts that never held the job. Whether the lease is current is for the state to say.
    fn holder(&self, peer: &PeerName, id: JobId) -> Result<(), Status> {
        let held = self.read(|state| state.jobs.get(id).map(|job| job.was_held_by(&peer.name)));
        match held {
            Some(true) => Ok(()),
            Some(false) => Err(status(
                &error_code::DENIED,
                format!(
                    "job {id} was never given to {peer}; a host may only speak of its own jobs"
                ),
            )),
            // A member that lags does not know the job yet; the proposal finds out.
            None => Ok(()),
        }
    }

    /// As [`Self::holder`], for the lease itself: another host's lease is not the caller's to use.
    fn lease_holder(&self, peer: &PeerName, id: JobId, epoch: u64) -> Result<(), Status> {
        self.holder(peer, id)?;
        let other = self.read(|state| {
            let job = state.jobs.get(id)?;
            let attempt = job.attempts.iter().find(|a| a.epoch.0 == epoch)?;
            (attempt.host != peer.name).then(|| attempt.host.clone())
        });
        match other {
            None => Ok(()),
            Some(host) => Err(status(
                &error_code::DENIED,
                format!("lease {epoch} of job {id} belongs to {host}, not to {peer}"),
            )),
        }
    }

    async fn propose(&self, change: Change) -> Result<Outcome, Status> {
        match self.leader.propose(change).await {
            Ok(Outcome::Refused(refusal)) => Err(super::refused(&refusal)),
            Ok(Outcome::Superseded(why)) => Err(superseded(&why)),
            Ok(outcome) => Ok(outcome),
            Err(error) => Err(super::proposal(&self.leader, error)),
        }
    }

    async fn prove(&self) -> Result<(), Status> {
        match self.leader.member().prove().await {
            Ok(_) => Ok(()),
            Err(error) => Err(super::proposal(&self.leader, error)),
        }
    }
}

#[tonic::async_trait]
impl Agent for AgentService {
    type AttachStream = ReceiverStream<Result<rpc::AgentDown, Status>>;

    async fn attach(
        &self,
        request: Request<Streaming<rpc::AgentUp>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let peer = self.enter(&request)?;
        let key = peer::key_of(&request).unwrap_or_default();
        let mut up = request.into_inner();
        let hello = match up.message().await?.and_then(|m| m.what) {
            Some(What::Hello(hello)) => hello,
            _ => return Err(Status::invalid_argument("the first message must be Hello")),
        };
        peer::same_name(&peer, &hello.host)?;
        if hello.realm.is_empty() || hello.realm.contains('/') {
            return Err(Status::invalid_argument(format!(
                "realm {:?} is empty or holds a slash; set `realm` of the agent to the name of its cluster",
                hello.realm
            )));
        }
        let attached = Attached {
            host: hello.host,
            realm: hello.realm,
            version: hello.version,
            hypervisor: hello.hypervisor,
            boot_id: hello.boot_id,
            started_ms: hello.host_started_unix_ms,
            key,
        };
        let (session, down) = self
            .leader
            .attach_agent(attached)
            .await
            .map_err(|error| super::attach(&self.leader, error))?;
        let leader = Arc::clone(&self.leader);
        let stop = self.tasks.token();
        self.tasks.spawn("agent session", async move {
            loop {
                let message = tokio::select! {
                    () = stop.cancelled() => break,
                    () = session.over.cancelled() => break,
                    message = up.message() => message,
                };
                let what = match message {
                    Ok(Some(message)) => message.what,
                    Ok(None) | Err(_) => break,
                };
                if let Some(what) = what
                    && let Err(error) = heard(&leader, &session, what).await
                {
                    tracing::warn!(host = session.host, %error, "a message of the agent was left out");
                }
            }
            leader.detach_agent(&session);
        });
        Ok(Response::new(ReceiverStream::new(down)))
    }

    async fn record_duty(
        &self,
        request: Request<rpc::RecordDutyRequest>,
    ) -> Result<Response<rpc::DutyReply>, Status> {
        let peer = self.enter(&request)?;
        traced(request, "record duty", async |r: rpc::RecordDutyRequest| {
            let (job, epoch) = wire::held("RecordDutyRequest", &r.job_id, r.lease_epoch)?;
            self.lease_holder(&peer, job, epoch.0)?;
            if r.checkpoint_name.is_empty() {
                return Err(Status::invalid_argument("checkpoint_name is empty"));
            }
            let duty = NewDuty {
                id: DutyId::random(),
                job,
                epoch,
                attempt: r.attempt,
                checkpoint_name: r.checkpoint_name,
            };
            match self.propose(Change::RecordDuty(Box::new(duty))).await? {
                Outcome::Duty(id) => Ok(self.duty(id, job)),
                other => Err(unexpected(&other)),
            }
        })
        .await
    }

    async fn update_duty(
        &self,
        request: Request<rpc::UpdateDutyRequest>,
    ) -> Result<Response<rpc::DutyReply>, Status> {
        let peer = self.enter(&request)?;
        traced(request, "update duty", async |r: rpc::UpdateDutyRequest| {
            let (job, epoch) = wire::held("UpdateDutyRequest", &r.job_id, r.lease_epoch)?;
            self.lease_holder(&peer, job, epoch.0)?;
            let state = wire::duty_state(r.state())
                .ok_or_else(|| Status::invalid_argument("state of UpdateDutyRequest is missing"))?;
            let duty = parse("UpdateDutyRequest", "duty_id", &r.duty_id)?;
            let step = DutyStep {
                state,
                checkpoint: r.checkpoint_id,
                reference_point: r.reference_point_id,
                converting: r.converting.then_some(r.reference_points_before),
            };
            match self.propose(Change::UpdateDuty { job, epoch, duty, step }).await? {
                Outcome::Duty(id) => Ok(self.duty(id, job)),
                other => Err(unexpected(&other)),
            }
        })
        .await
    }

    async fn commit(
        &self,
        request: Request<rpc::CommitRequest>,
    ) -> Result<Response<rpc::CommitReply>, Status> {
        let peer = self.enter(&request)?;
        traced(request, "commit", async |r: rpc::CommitRequest| {
            let (job, epoch) = wire::held("CommitRequest", &r.job_id, r.lease_epoch)?;
            self.lease_holder(&peer, job, epoch.0)?;
            commit::commit(&self.leader, job, epoch, r)
                .await
                .map_err(|error| commit_status(&self.leader, error))
        })
        .await
    }

    async fn bind(
        &self,
        request: Request<rpc::BindRequest>,
    ) -> Result<Response<rpc::BindReply>, Status> {
        let peer = self.enter(&request)?;
        traced(request, "bind", async |r: rpc::BindRequest| {
            let (job, epoch) = wire::held("BindRequest", &r.job_id, r.lease_epoch)?;
            self.lease_holder(&peer, job, epoch.0)?;
            let binding = required("BindRequest", "binding", r.binding.as_ref())?;
            let binding = Box::new(model::Binding::try_from(binding)?);
            let change = Change::Bind { job, epoch, binding };
            let (bound, reason) = match self.leader.propose(change).await {
                Ok(Outcome::Bound) => (true, String::new()),
                Ok(Outcome::Superseded(why)) => return Err(superseded(&why)),
                Ok(Outcome::Refused(refusal)) => (false, refusal.to_string()),
                Ok(other) => return Err(unexpected(&other)),
                Err(error) => return Err(super::proposal(&self.leader, error)),
            };
            Ok(rpc::BindReply { bound, reason })
        })
        .await
    }

    async fn ask(
        &self,
        request: Request<rpc::AskRequest>,
    ) -> Result<Response<rpc::AskReply>, Status> {
        let peer = self.enter(&request)?;
        traced(request, "ask", async |r: rpc::AskRequest| {
            self.prove().await?;
            let job: Option<JobId> = model::parse_optional("AskRequest", "job_id", &r.job_id)?;
            let vm = r.vm.as_ref().map(VmKey::try_from).transpose()?;
            let reply = self.read(|state| answer(state, &peer.name, job, vm.as_ref()));
            reply.ok_or_else(|| {
                status(
                    &error_code::DENIED,
                    format!("neither the job nor the VM asked for was ever given to {peer}"),
                )
            })
        })
        .await
    }

    async fn raise_incarnation(
        &self,
        request: Request<rpc::RaiseIncarnationRequest>,
    ) -> Result<Response<rpc::RaiseIncarnationReply>, Status> {
        let peer = self.enter(&request)?;
        traced(request, "raise incarnation", async |r: rpc::RaiseIncarnationRequest| {
            let (job, epoch) = wire::held("RaiseIncarnationRequest", &r.job_id, r.lease_epoch)?;
            self.lease_holder(&peer, job, epoch.0)?;
            let vm = model::vm_key("RaiseIncarnationRequest", r.vm.as_ref())?;
            match self.propose(Change::RaiseIncarnation { job, epoch, vm, why: r.why }).await? {
                Outcome::Incarnation(n) => Ok(rpc::RaiseIncarnationReply { incarnation: n.0 }),
                other => Err(unexpected(&other)),
            }
        })
        .await
    }

    async fn retire(
        &self,
        request: Request<rpc::RetireRequest>,
    ) -> Result<Response<rpc::RetireReply>, Status> {
        let peer = self.enter(&request)?;
        let host = peer.name.clone();
        let by = peer.to_string();
        self.prove().await?;
        match request.into_inner().step() {
            rpc::RetireStep::Unspecified => {
                return Err(Status::invalid_argument("step of RetireRequest is missing"));
            }
            rpc::RetireStep::Look => {}
            rpc::RetireStep::Begin => {
                self.propose(Change::RetireHost { host: host.clone(), by }).await?;
            }
            rpc::RetireStep::Cancel => {
                self.propose(Change::KeepHost { host: host.clone() }).await?;
            }
            rpc::RetireStep::Forget => {
                departures::forget(&self.leader, &host, by, false).await?;
            }
        }
        let mut reply = self.retired(&host);
        if reply.retiring && reply.waits.is_empty() {
            // By what is known it is clean: is it by what is there?
            reply.waits = departures::litter(&self.leader, &host).await;
        }
        Ok(Response::new(reply))
    }

    async fn storage_places(
        &self,
        request: Request<rpc::StoragePlacesRequest>,
    ) -> Result<Response<rpc::Layout>, Status> {
        self.enter(&request)?;
        self.prove().await?;
        Ok(Response::new((&self.leader.layout()).into()))
    }

    async fn finish(
        &self,
        request: Request<rpc::FinishRequest>,
    ) -> Result<Response<rpc::FinishReply>, Status> {
        let peer = self.enter(&request)?;
        traced(request, "finish", async |r: rpc::FinishRequest| {
            let (job, epoch) = wire::held("FinishRequest", &r.job_id, r.lease_epoch)?;
            self.lease_holder(&peer, job, epoch.0)?;
            let now = self.leader.member().clock().unix_millis();
            let retry_at_ms = self.read(|state| {
                let limits = &self.leader.settings().limits;
                state.jobs.get(job).and_then(|job| schedule::retry_at(job, r.retry, limits, now))
            });
            let report = Report {
                data_safe: r.data_safe,
                host_clean: r.host_clean,
                error_code: r.error_code,
                message: r.message,
                stats: wire::to_stats(r.stats),
                warnings: r.warnings,
                restored_vm: r.restored_vm.as_ref().map(VmKey::try_from).transpose()?,
                commands: r.commands.into_iter().map(wire::to_command).collect(),
            };
            let report = Box::new(report);
            self.propose(Change::Finish { job, epoch, report, retry_at_ms }).await?;
            Ok(rpc::FinishReply {})
        })
        .await
    }
}

impl AgentService {
    /// How far a host is on its way out.
    fn retired(&self, host: &str) -> rpc::RetireReply {
        self.read(|state| {
            let found = state.hosts.get(host);
            rpc::RetireReply {
                retiring: state.is_leaving(host),
                waits: state.departure(host).waits(),
                voided: found.and_then(|h| h.leaving.as_ref()).map_or(0, |l| l.voided),
                forgotten: found.is_none(),
            }
        })
    }

    fn duty(&self, id: DutyId, job: JobId) -> rpc::DutyReply {
        let duty = self.read(|state| state.duties.get(&id).map(wire::duty));
        rpc::DutyReply { duty: Some(duty.unwrap_or_else(|| wire::done_duty(id, job))) }
    }
}

/// One message of an agent's stream.
async fn heard(leader: &Leader, session: &AgentSession, what: What) -> Result<(), FieldError> {
    match what {
        What::Hello(_) => {}
        What::Heartbeat(beat) => leader.heartbeat(session, beat.beat).await,
        What::Inventory(inventory) => {
            let vms = inventory
                .vms
                .into_iter()
                .map(wire::to_instance)
                .collect::<Result<Vec<_>, _>>()?
                .into_iter()
                .filter(|instance| own_realm(session, &instance.facts.vm))
                .collect();
            let event = Event::Inventory {
                host: session.host.clone(),
                realm: session.realm.clone(),
                vms,
                up: inventory.nodes_up,
                down: inventory.nodes_down,
            };
            leader.report(session.term, event).await;
        }
        What::Change(change) => {
            if let Some(event) = changed(session, change)? {
                leader.report(session.term, event).await;
            }
        }
        What::Progress(p) => {
            let (job, epoch) = wire::held("JobProgress", &p.job_id, p.lease_epoch)?;
            let progress = Progress {
                phase: p.phase,
                stats: wire::to_stats(p.stats),
                total_bytes: p.total_bytes,
            };
            leader.progressed(session, job, epoch, progress);
        }
        What::Survey(survey) => leader.surveyed(session, survey).await,
        What::Closed(closed) => {
            let (job, epoch) = wire::held("SourcesClosed", &closed.job_id, closed.lease_epoch)?;
            if let Err(error) = leader.closed(session, job, epoch).await {
                // Its time runs out by the leader's clock instead.
                tracing::debug!(%error, host = session.host, "closing was not recorded");
            }
        }
    }
    Ok(())
}

fn changed(session: &AgentSession, change: rpc::VmChange) -> Result<Option<Event>, FieldError> {
    let host = session.host.clone();
    let event = match required("VmChange", "what", change.what)? {
        vm_change::What::Seen(facts) => {
            let instance = wire::to_instance(facts)?;
            own_realm(session, &instance.facts.vm).then_some(Event::Seen { host, instance })
        }
        vm_change::What::Gone(vm) => {
            let vm = VmKey::try_from(&vm)?;
            own_realm(session, &vm).then_some(Event::Gone { host, vm })
        }
        vm_change::What::Owner(change) => {
            let vm = model::vm_key("OwnerChange", change.vm.as_ref())?;
            own_realm(session, &vm).then_some(Event::Owner { vm, owner: change.owner })
        }
        vm_change::What::Host(state) => {
            Some(Event::Host { realm: session.realm.clone(), host: state.host, up: state.up })
        }
    };
    Ok(event)
}

/// An agent speaks of its own realm only.
fn own_realm(session: &AgentSession, vm: &VmKey) -> bool {
    let own = vm.realm == session.realm;
    if !own {
        tracing::warn!(host = session.host, vm = %vm, "a VM of another realm was left out");
    }
    own
}

fn answer(
    state: &State,
    host: &str,
    job: Option<JobId>,
    vm: Option<&VmKey>,
) -> Option<rpc::AskReply> {
    let job: Option<&Job> = job.and_then(|id| state.jobs.get(id));
    let key = vm.or_else(|| job.map(|job| &job.vm))?;
    let vm = state.vms.get(key);
    let concerns = job.is_some_and(|job| job.was_held_by(host))
        || vm.is_some_and(|vm| vm.host.as_deref() == Some(host));
    if !concerns {
        return None;
    }
    Some(rpc::AskReply {
        committed_point_id: job
            .and_then(|job| job.committed)
            .map(|point| point.to_string())
            .unwrap_or_default(),
        binding: state.bases.get(key).map(|base| (&base.binding).into()),
        duties: state.open_duties(key).map(wire::duty).collect(),
        incarnation: vm.map_or(0, |vm| vm.incarnation.0),
        current_lease_epoch: job.filter(|job| !job.has_ended()).map_or(0, |job| job.lease_epoch.0),
    })
}

fn superseded(why: &str) -> Status {
    status(&error_code::SUPERSEDED, format!("stop and do not touch the hypervisor: {why}"))
}

fn unexpected(outcome: &Outcome) -> Status {
    status(&error_code::INTERNAL, format!("the state answered {outcome:?}"))
}

fn commit_status(leader: &Leader, error: commit::CommitError) -> Status {
    match error {
        commit::CommitError::Field(error) => error.into(),
        commit::CommitError::Missing { field } => {
            Status::invalid_argument(format!("field {field} of CommitRequest is missing or uneven"))
        }
        commit::CommitError::Propose(error) => super::proposal(leader, error),
        commit::CommitError::Refused(refusal) => super::refused(&refusal),
        commit::CommitError::Unexpected(outcome) => unexpected(&outcome),
    }
}

/// Runs a call in a span below the caller's.
async fn traced<Q, A, F>(
    request: Request<Q>,
    call: &'static str,
    work: impl FnOnce(Q) -> F,
) -> Result<Response<A>, Status>
where
    F: Future<Output = Result<A, Status>>,
{
    let span = span(request.metadata(), call);
    work(request.into_inner()).instrument(span).await.map(Response::new)
}

fn span(metadata: &MetadataMap, call: &'static str) -> tracing::Span {
    let span = tracing::info_span!("agent call", call);
    propagate::extract(metadata, &span);
    span
}
