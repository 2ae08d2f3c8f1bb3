//! Sessions: the streams of agents and storage nodes to this leader, and what each has been told.

use std::collections::BTreeMap;
use std::time::Duration;

use outrider_proto::ids::{JobId, LeaseEpoch};
use outrider_proto::layout::StorageNode;
use outrider_proto::rpc;
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::Status;

use super::{Leader, Progress, Reign};
use crate::follow::Event;
use crate::lease::Held;
use crate::raft::ProposeError;
use crate::state::hosts::Attached;
use crate::state::{Change, Outcome};

/// Messages that wait for an agent. One that reads no more is cut off and attaches anew.
const SESSION_QUEUE: usize = 1024;

/// A stream that cannot be served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AttachError {
    #[error(transparent)]
    Propose(#[from] ProposeError),
    #[error("this coordinator has no keys yet")]
    NoKeys,
    #[error("{0}")]
    Refused(crate::state::Refusal),
}

/// An agent's stream, for its service.
#[derive(Debug)]
pub(crate) struct AgentSession {
    pub(crate) host: String,
    pub(crate) realm: String,
    pub(crate) number: u64,
    pub(crate) term: u64,
    /// Cancelled when the leader is done with the stream.
    pub(crate) over: CancellationToken,
}

/// A storage node's stream, for its service.
#[derive(Debug)]
pub(crate) struct StorageSession {
    pub(crate) name: String,
    pub(crate) number: u64,
    pub(crate) over: CancellationToken,
}

pub(super) type Down<T> = mpsc::Sender<Result<T, Status>>;

/// An attached agent.
pub(super) struct Agent {
    number: u64,
    boot_id: u64,
    pub(super) down: Down<rpc::AgentDown>,
    pub(super) told: Told,
    /// Latest heartbeat heard; 0: none yet.
    pub(super) beat: u64,
    /// When it was heard, Unix milliseconds.
    pub(super) heard_ms: u64,
    /// The same by the leader's own clock.
    heard: Duration,
    /// When the leader last renewed without being asked.
    pub(super) pushed: Duration,
    pub(super) surveys: super::surveys::Asked,
    _over: DropGuard,
}

/// What an agent knows from us.
#[derive(Default)]
pub(super) struct Told {
    pub(super) welcome: bool,
    pub(super) layout: Option<rpc::Layout>,
    pub(super) leases: BTreeMap<Held, bool>,
}

/// An attached storage node.
pub(super) struct Storage {
    number: u64,
    pub(super) down: Down<rpc::StorageDown>,
    pub(super) facts: bool,
    pub(super) layout: Option<rpc::Layout>,
    status: Option<rpc::StorageStatus>,
    _over: DropGuard,
}

impl Agent {
    pub(super) fn boot_id(&self) -> u64 {
        self.boot_id
    }

    pub(super) fn number(&self) -> u64 {
        self.number
    }
}

impl Reign {
    fn number(&mut self) -> u64 {
        self.next_session += 1;
        self.next_session
    }
}

impl Leader {
    /// Takes an agent's stream on. An earlier stream of the host is cut.
    ///
    /// # Errors
    /// [`AttachError`]; the agent tries again, here or at the leader.
    pub(crate) async fn attach_agent(
        &self,
        attached: Attached,
    ) -> Result<(AgentSession, mpsc::Receiver<Result<rpc::AgentDown, Status>>), AttachError> {
        let term = self.member.prove().await?;
        if self.keys().is_none() {
            return Err(AttachError::NoKeys);
        }
        let (host, realm, boot_id) =
            (attached.host.clone(), attached.realm.clone(), attached.boot_id);
        self.propose(Change::HostAttached(attached)).await?;
        self.agent_restarted(&host, boot_id).await?;
        let (down, receiver) = mpsc::channel(SESSION_QUEUE);
        let over = CancellationToken::new();
        let guard = over.clone().drop_guard();
        // Ended leases of this very agent: it may not have heard of their end.
        let ended: BTreeMap<Held, bool> = self.member.replica().read(|state| {
            let open = state.jobs.open().filter(|(job, attempt)| {
                attempt.host == host
                    && attempt.boot_id == boot_id
                    && job.current(attempt.epoch).is_none()
            });
            open.map(|(job, attempt)| ((job.id, attempt.epoch), false)).collect()
        });
        let pushed = self.member.clock().monotonic();
        let number = self.reigning(|reign| {
            if reign.term != term {
                return None;
            }
            let number = reign.number();
            let told = Told { leases: ended, ..Told::default() };
            let heard_ms = self.member.clock().unix_millis();
            let agent = Agent {
                number,
                boot_id,
                down,
                told,
                beat: 0,
                heard_ms,
                heard: pushed,
                pushed,
                surveys: super::surveys::Asked::default(),
                _over: guard,
            };
            reign.agents.insert(host.clone(), agent);
            Some(number)
        });
        let Some(number) = number.flatten() else {
            return Err(ProposeError::NotLeader { leader: self.member.leader_address() }.into());
        };
        tracing::info!(host, term, "agent attached");
        self.wake.notify_one();
        Ok((AgentSession { host, realm, number, term, over }, receiver))
    }

    /// A host has one agent: whatever its last process held is closed.
    async fn agent_restarted(&self, host: &str, boot_id: u64) -> Result<(), ProposeError> {
        let old: Vec<(JobId, LeaseEpoch, bool)> = self.member.replica().read(|state| {
            let open = state.jobs.open().filter(|(_, a)| a.host == host && a.boot_id != boot_id);
            open.map(|(job, a)| (job.id, a.epoch, job.current(a.epoch).is_some())).collect()
        });
        for (job, epoch, current) in old {
            if current {
                let why = format!("the agent on {host} restarted");
                self.propose(Change::LeaseLost { job, epoch, why, not_before_ms: 0 }).await?;
            }
            self.propose(Change::SourcesClosed { job, epoch }).await?;
        }
        Ok(())
    }

    /// The agent's stream has ended. Its leases live on until their time is over.
    pub(crate) fn detach_agent(&self, session: &AgentSession) {
        self.reigning(|reign| {
            if reign.agents.get(&session.host).is_some_and(|a| a.number == session.number) {
                reign.agents.remove(&session.host);
                tracing::info!(host = session.host, "agent detached");
            }
        });
        self.wake.notify_one();
    }

    /// Answers a heartbeat: renews what the host holds, if this member is provably leader.
    pub(crate) async fn heartbeat(&self, session: &AgentSession, beat: u64) {
        let heard = self.member.clock().monotonic();
        match self.member.prove().await {
            Ok(term) if term == session.term => self.renew(session, beat, heard),
            Ok(_) => {}
            Err(error) => tracing::debug!(%error, host = session.host, "heartbeat not answered"),
        }
    }

    fn renew(&self, session: &AgentSession, beat: u64, heard: Duration) {
        let held = self.leases_of(&session.host);
        let heard_ms = self.member.clock().unix_millis();
        self.reigning(|reign| {
            let Some(agent) =
                reign.agents.get_mut(&session.host).filter(|a| a.number == session.number)
            else {
                return;
            };
            agent.beat = agent.beat.max(beat);
            agent.heard_ms = heard_ms;
            agent.heard = heard;
            for (held, boot_id) in held {
                if boot_id == agent.boot_id && agent.told.leases.contains_key(&held) {
                    reign.holds.renew(held, heard);
                    let _ = agent.down.try_send(Ok(renewal(held, beat)));
                    self.metrics.renewals.inc();
                }
            }
        });
    }

    /// For agents that send no heartbeats: renews at intervals, as long as the stream stands.
    pub(super) async fn push_renewals(&self, term: u64) -> Result<(), ProposeError> {
        let now = self.member.clock().monotonic();
        let due =
            |agent: &Agent| agent.beat == 0 && now >= agent.pushed + self.settings.lease.renew;
        let hosts: Vec<String> = self
            .reigning(|reign| {
                let silent = reign.agents.iter().filter(|(_, agent)| due(agent));
                silent.map(|(host, _)| host.clone()).collect()
            })
            .unwrap_or_default();
        if hosts.is_empty() || self.member.prove().await? != term {
            return Ok(());
        }
        for host in hosts {
            let held = self.leases_of(&host);
            self.reigning(|reign| {
                let Some(agent) = reign.agents.get_mut(&host) else { return };
                agent.pushed = now;
                for (held, boot_id) in held {
                    if boot_id == agent.boot_id && agent.told.leases.contains_key(&held) {
                        reign.holds.renew(held, now);
                        let _ = agent.down.try_send(Ok(renewal(held, 0)));
                        self.metrics.renewals.inc();
                    }
                }
            });
        }
        Ok(())
    }

    fn leases_of(&self, host: &str) -> Vec<(Held, u64)> {
        self.member.replica().read(|state| {
            let leased = state.jobs.unfinished().filter_map(|job| Some((job.id, job.lease()?)));
            leased
                .filter(|(_, lease)| lease.host == host)
                .map(|(id, lease)| ((id, lease.epoch), lease.boot_id))
                .collect()
        })
    }

    /// Tells [`Self::follow`] which hosts have become silent beyond any lease, and which are heard again. A leader that has
    /// just begun counts from then.
    pub(super) fn listen_for_silence(&self, term: u64) {
        let now = self.member.clock().monotonic();
        let known: Vec<String> =
            self.member.replica().read(|state| state.hosts.keys().cloned().collect());
        self.reigning(|reign| {
            for host in known {
                let attached = reign.agents.get(&host);
                let quiet = reign.quiet.entry(host.clone()).or_insert((now, false));
                if let Some(agent) = attached {
                    // One that sends no heartbeats is heard as long as its stream stands.
                    quiet.0 = if agent.beat == 0 { now } else { quiet.0.max(agent.heard) };
                }
                let silent = now.saturating_sub(quiet.0) > self.settings.lease.duration;
                if silent == quiet.1 {
                    continue;
                }
                // With a full queue it is told at the next look.
                let event = Event::Silent { host: host.clone(), silent };
                if self.events.try_send((term, event)).is_ok() {
                    quiet.1 = silent;
                    tracing::info!(host, silent, "whether this host's agent is heard");
                }
            }
        });
    }

    /// Ends leases whose time is over by the leader's clock.
    pub(super) async fn end_leases(&self, term: u64) -> Result<(), ProposeError> {
        let now = self.member.clock().monotonic();
        let open: Vec<Held> = self.member.replica().read(|state| {
            state.jobs.open().map(|(job, attempt)| (job.id, attempt.epoch)).collect()
        });
        let over = self
            .reigning(|reign| {
                reign.holds.sync(open.into_iter(), now);
                if reign.term == term { reign.holds.over(now) } else { Vec::new() }
            })
            .unwrap_or_default();
        for (job, epoch) in over {
            let lost = Change::LeaseLost {
                job,
                epoch,
                why: "its host was not heard from in time".to_owned(),
                not_before_ms: 0,
            };
            if self.propose(lost).await? == Outcome::Done {
                tracing::warn!(job_id = %job, lease_epoch = epoch.0, "lease lost");
                self.metrics.leases_lost.inc();
            }
            self.propose(Change::SourcesClosed { job, epoch }).await?;
        }
        Ok(())
    }

    /// The agent says that nothing of the lease is open. If the lease was current, it gives it up with that.
    ///
    /// # Errors
    /// [`ProposeError`].
    pub(crate) async fn closed(
        &self,
        session: &AgentSession,
        job: JobId,
        epoch: LeaseEpoch,
    ) -> Result<(), ProposeError> {
        let held = self.member.replica().read(|state| {
            let job = state.jobs.get(job)?;
            let attempt =
                job.attempts.iter().find(|a| a.epoch == epoch && a.host == session.host)?;
            Some(job.current(attempt.epoch).is_some())
        });
        match held {
            None => return Ok(()),
            Some(true) => {
                let why = format!("the agent on {} gave it up", session.host);
                // An agent that cannot even begin would get it back, and give it back, as fast as both can.
                let pause = self.settings.limits.back_off_ms;
                let not_before_ms = self.member.clock().unix_millis().saturating_add(pause);
                self.propose(Change::LeaseLost { job, epoch, why, not_before_ms }).await?;
            }
            Some(false) => {}
        }
        self.propose(Change::SourcesClosed { job, epoch }).await?;
        Ok(())
    }

    /// Takes a job's progress from its holder.
    pub(crate) fn progressed(
        &self,
        session: &AgentSession,
        job: JobId,
        epoch: LeaseEpoch,
        progress: Progress,
    ) {
        let current = self.member.replica().read(|state| {
            state
                .jobs
                .get(job)
                .and_then(|job| job.current(epoch))
                .is_some_and(|lease| lease.host == session.host)
        });
        if current {
            self.set_progress(job, progress);
        }
    }

    /// Takes a storage node's stream on.
    ///
    /// # Errors
    /// [`AttachError`].
    pub(crate) async fn attach_storage(
        &self,
        node: StorageNode,
    ) -> Result<(StorageSession, mpsc::Receiver<Result<rpc::StorageDown, Status>>), AttachError>
    {
        let term = self.member.prove().await?;
        let name = node.name.clone();
        let known = self.member.replica().read(|state| {
            let offline = |n: &StorageNode| StorageNode { online: node.online, ..n.clone() };
            state.storage.nodes.get(&name).map(offline).as_ref() == Some(&node)
        });
        if !known
            && let Outcome::Refused(refusal) =
                self.propose(Change::StorageSeen(Box::new(node))).await?
        {
            return Err(AttachError::Refused(refusal));
        }
        let (down, receiver) = mpsc::channel(SESSION_QUEUE);
        let over = CancellationToken::new();
        let guard = over.clone().drop_guard();
        let number = self.reigning(|reign| {
            if reign.term != term {
                return None;
            }
            let number = reign.number();
            let session =
                Storage { number, down, facts: false, layout: None, status: None, _over: guard };
            reign.storage.insert(name.clone(), session);
            Some(number)
        });
        let Some(number) = number.flatten() else {
            return Err(ProposeError::NotLeader { leader: self.member.leader_address() }.into());
        };
        tracing::info!(storage = name, term, "storage node attached");
        self.wake.notify_one();
        Ok((StorageSession { name, number, over }, receiver))
    }

    /// The storage node's stream has ended.
    pub(crate) fn detach_storage(&self, session: &StorageSession) {
        self.reigning(|reign| {
            if reign.storage.get(&session.name).is_some_and(|s| s.number == session.number) {
                reign.storage.remove(&session.name);
                tracing::info!(storage = session.name, "storage node detached");
            }
        });
        self.wake.notify_one();
    }

    /// Keeps what a storage node says of itself.
    pub(crate) fn storage_status(&self, session: &StorageSession, status: rpc::StorageStatus) {
        self.reigning(|reign| {
            if let Some(storage) =
                reign.storage.get_mut(&session.name).filter(|s| s.number == session.number)
            {
                storage.status = Some(status);
            }
        });
    }

    /// What the attached storage nodes said last, by name.
    pub(crate) fn storage_statuses(&self) -> BTreeMap<String, Option<rpc::StorageStatus>> {
        self.reigning(|reign| {
            reign.storage.iter().map(|(name, s)| (name.clone(), s.status.clone())).collect()
        })
        .unwrap_or_default()
    }
}

fn renewal(held: Held, beat: u64) -> rpc::AgentDown {
    let renewal = rpc::LeaseRenewal { job_id: held.0.to_string(), lease_epoch: held.1.0, beat };
    rpc::AgentDown { what: Some(rpc::agent_down::What::Renewal(renewal)) }
}
