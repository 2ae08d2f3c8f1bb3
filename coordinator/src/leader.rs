//! The leader at work: who is attached, which leases live, what is to be done.
//!
//! Level-triggered: whatever happens wakes [`Leader::step`], which compares the replicated state with what each attached
//! agent and storage node was told, and sends the difference. What only the leader knows ([`Reign`]) ends with its
//! leadership: sessions are cut, and everybody attaches to the next leader.

mod offer;
mod sessions;
mod surveys;
mod tell;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use outrider_process::telemetry::current_traceparent;
use outrider_proto::ids::{DutyId, FabricId, GroupId, JobId, PointId, VmKey};
use outrider_proto::layout::Layout;
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::config::{LeaseConfig, StorageConfig};
use crate::follow::{Event, Follow};
use crate::keys::KeyRing;
use crate::lease::Holds;
use crate::metrics::{Metrics, gauge};
use crate::raft::{Member, ProposeError};
use crate::schedule::{self, Decision, Limits, Live};
use crate::state::enrolment::Authority;
use crate::state::facts::{BackupKind, Stats};
use crate::state::jobs::{NewJob, Work};
use crate::state::{Change, Outcome};
use crate::traces::{Bounds, Watch};

pub(crate) use offer::{operator_ticket, wire_layout};
pub(crate) use sessions::{AgentSession, AttachError};

/// Events of agents that wait for their decision. Full: the streams are read no further.
const EVENT_QUEUE: usize = 256;
/// A majority that does not answer within this is taken for lost; a following leader is elected in less.
const DOUBT: Duration = Duration::from_secs(2);
/// Longest pause between two looks, for what only time brings (leases, schedules).
const LOOK: Duration = Duration::from_millis(250);

/// What does not change while the process runs.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) fabric: FabricId,
    /// This member, and where others reach it.
    pub(crate) id: u64,
    pub(crate) address: String,
    pub(crate) lease: LeaseConfig,
    pub(crate) storage: StorageConfig,
    pub(crate) limits: Limits,
    /// Between two looks at what backups left on a host.
    pub(crate) look_every: Duration,
    /// What of it is no alarm yet.
    pub(crate) bearable: Bounds,
    /// Between the two looks of all hosts that prove that a VM is nowhere.
    pub(crate) absent_after: Duration,
    /// The fabric's authority.
    pub(crate) ca_pem: String,
    /// The enrolment authority beside this member's certificate.
    pub(crate) enrolment: Option<Authority>,
}

/// The leader's work on this member, also while it does not lead. Shared by all services.
pub(crate) struct Leader {
    member: Member,
    settings: Settings,
    keys: OnceLock<Arc<KeyRing>>,
    reign: Mutex<Option<Reign>>,
    progress: Mutex<BTreeMap<JobId, Progress>>,
    progressed: watch::Sender<u64>,
    events: mpsc::Sender<(u64, Event)>,
    wake: Notify,
    metrics: Metrics,
}

/// What this member knows because it leads.
struct Reign {
    term: u64,
    follow: Follow,
    holds: Holds,
    agents: BTreeMap<String, sessions::Agent>,
    storage: BTreeMap<String, sessions::Storage>,
    /// Since when each host is quiet, and whether that was told as silence.
    quiet: BTreeMap<String, (Duration, bool)>,
    /// What backups left on hosts, as last looked at.
    traces: Watch,
    next_session: u64,
}

/// What operators are shown of jobs beside the state.
#[derive(Debug)]
pub(crate) struct Outlook {
    pub(crate) live: Live,
    pub(crate) progress: BTreeMap<JobId, Progress>,
    pub(crate) limits: Limits,
    pub(crate) now_ms: u64,
}

/// How far a running job is.
#[derive(Debug, Clone, Default)]
pub(crate) struct Progress {
    pub(crate) phase: String,
    pub(crate) stats: Stats,
    pub(crate) total_bytes: u64,
}

impl Leader {
    /// The leader's work and the queue that [`Self::follow`] empties.
    pub(crate) fn new(
        member: Member,
        settings: Settings,
        metrics: Metrics,
    ) -> (Arc<Self>, mpsc::Receiver<(u64, Event)>) {
        let (events, queue) = mpsc::channel(EVENT_QUEUE);
        let leader = Self {
            member,
            settings,
            keys: OnceLock::new(),
            reign: Mutex::default(),
            progress: Mutex::default(),
            progressed: watch::Sender::new(0),
            events,
            wake: Notify::new(),
            metrics,
        };
        (Arc::new(leader), queue)
    }

    /// The member below.
    pub(crate) fn member(&self) -> &Member {
        &self.member
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Open keys; none before they were replicated to this member.
    pub(crate) fn keys(&self) -> Option<&Arc<KeyRing>> {
        self.keys.get()
    }

    /// Gives the member its open keys.
    pub(crate) fn set_keys(&self, keys: KeyRing) {
        let _ = self.keys.set(Arc::new(keys));
        self.wake.notify_one();
    }

    /// Proposes a change; [`Self::step`] sees its effect.
    ///
    /// # Errors
    /// [`ProposeError`].
    pub(crate) async fn propose(&self, change: Change) -> Result<Outcome, ProposeError> {
        self.member.propose(change).await
    }

    /// Leads whenever this member is leader, until the token is cancelled.
    pub(crate) async fn lead(&self, token: CancellationToken) {
        let mut applied = self.member.replica().changes();
        let mut raft = self.member.raft().metrics();
        loop {
            tokio::select! {
                () = token.cancelled() => break,
                _ = applied.changed() => {}
                _ = raft.changed() => {}
                () = self.wake.notified() => {}
                () = tokio::time::sleep(LOOK) => {}
            }
            applied.mark_unchanged();
            raft.mark_unchanged();
            tokio::select! {
                () = token.cancelled() => break,
                () = self.step() => {}
            }
        }
        self.abdicate();
    }

    /// Lets agents and storage nodes go when no majority confirms any more that this member leads: openraft's leader
    /// does not step down by itself, and they must look for the one that others may have elected.
    pub(crate) async fn doubt(&self, token: CancellationToken) {
        let mut proven = self.member.clock().monotonic();
        loop {
            tokio::select! {
                () = token.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
            let now = self.member.clock().monotonic();
            if self.lock().is_none() {
                proven = now;
                continue;
            }
            if matches!(tokio::time::timeout(DOUBT, self.member.prove()).await, Ok(Ok(_))) {
                proven = now;
            } else if self.member.clock().monotonic().saturating_sub(proven) > DOUBT {
                tracing::warn!("no majority confirms that this member leads");
                self.abdicate();
            }
        }
    }

    /// Decides on what agents report, one report after the other, each on the state that the last one left.
    pub(crate) async fn follow(
        &self,
        mut queue: mpsc::Receiver<(u64, Event)>,
        token: CancellationToken,
    ) {
        loop {
            let (term, event) = tokio::select! {
                () = token.cancelled() => return,
                received = queue.recv() => match received {
                    Some(received) => received,
                    None => return,
                },
            };
            let changes = self.reigning(|reign| {
                (reign.term == term)
                    .then(|| self.member.replica().read(|state| reign.follow.apply(event, state)))
            });
            let Some(changes) = changes.flatten().filter(|changes| !changes.is_empty()) else {
                continue;
            };
            tokio::select! {
                () = token.cancelled() => return,
                result = self.propose(Change::Many(changes)) => if let Err(error) = result {
                    // The next leader hears it all again: agents attach there with a full inventory.
                    tracing::warn!(%error, "what agents reported was not recorded");
                },
            }
        }
    }

    /// Hands a report to [`Self::follow`].
    pub(crate) async fn report(&self, term: u64, event: Event) {
        // Closed only while the process ends.
        let _ = self.events.send((term, event)).await;
    }

    /// One look at everything.
    async fn step(&self) {
        let leads = self.member.leads();
        self.metrics.leader.set(i64::from(leads.is_some()));
        self.count();
        let Some(term) = leads else {
            self.abdicate();
            return;
        };
        if self.reigning(|reign| reign.term) != Some(term) {
            self.abdicate();
            // Also waits until everything committed by earlier leaders is applied here.
            if !matches!(self.member.prove().await, Ok(proven) if proven == term) {
                return;
            }
            self.begin(term);
        }
        if let Err(error) = self.work(term).await {
            tracing::debug!(%error, "the leader's work was interrupted");
        }
        self.tell(term);
    }

    fn begin(&self, term: u64) {
        tracing::info!(term, "this member leads");
        self.metrics.reigns.inc();
        *self.lock() = Some(Reign {
            term,
            follow: Follow::new(self.settings.absent_after),
            holds: Holds::new(self.settings.lease.duration),
            agents: BTreeMap::new(),
            storage: BTreeMap::new(),
            quiet: BTreeMap::new(),
            traces: Watch::default(),
            next_session: 1,
        });
    }

    fn abdicate(&self) {
        if let Some(reign) = self.lock().take() {
            tracing::info!(term = reign.term, "this member no longer leads");
            self.progress.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
    }

    /// Proposes what is due.
    async fn work(&self, term: u64) -> Result<(), ProposeError> {
        let (member, address) = (self.settings.id, &self.settings.address);
        if self.member.replica().read(|state| state.advertised.get(&member) != Some(address)) {
            self.propose(Change::Advertise { member, address: address.clone() }).await?;
        }
        if let Some(authority) = &self.settings.enrolment
            && self.member.replica().read(|state| state.enrolment.authority.is_none())
        {
            self.propose(Change::SetEnrolmentAuthority(Box::new(authority.clone()))).await?;
        }
        if let Some(layout) = self
            .member
            .replica()
            .read(|state| crate::layout::plan(&state.storage, &self.settings.storage))
        {
            self.propose(Change::SetLayout(Box::new(layout))).await?;
        }
        self.end_leases(term).await?;
        self.listen_for_silence(term);
        self.push_renewals(term).await?;
        self.look_at_hosts();
        if self.keys().is_none() {
            return Ok(());
        }
        let now = self.member.clock().unix_millis();
        let live = self.live();
        let decisions = self
            .member
            .replica()
            .read(|state| schedule::decide(state, &live, &self.settings.limits, now));
        for decision in decisions {
            self.carry_out(decision).await?;
        }
        Ok(())
    }

    async fn carry_out(&self, decision: Decision) -> Result<(), ProposeError> {
        match decision {
            Decision::RunGroup { group, vms, checks, skipped, next_run_ms } => {
                let job = |vm: VmKey| match checks.contains(&vm) {
                    true => {
                        let kind = BackupKind::ConsistencyCheck;
                        backup(vm, Some(group), kind, schedule::check::WHY)
                    }
                    false => backup(vm, Some(group), BackupKind::Incremental, "scheduled"),
                };
                let jobs = vms.into_iter().map(job).collect();
                self.propose(Change::RunGroup { group, jobs, skipped, next_run_ms }).await?;
            }
            Decision::Cleanup { vm, why } => {
                let job = new_job(vm, None, |_| Work::Cleanup { why });
                self.propose(Change::CreateJob(Box::new(job))).await?;
            }
            Decision::Release { vm } => {
                let duty = DutyId::random();
                tracing::info!(%vm, "its host leaves: its base is given up");
                self.propose(Change::ReleaseBase { vm, duty }).await?;
            }
            Decision::Drop { job, host } => {
                let by = format!("the fabric: host {host} is leaving it");
                self.propose(Change::Cancel { job, by }).await?;
            }
            Decision::Lease { job, host, boot_id, placement } => {
                let outcome = self
                    .propose(Change::Lease { job, host: host.clone(), boot_id, placement })
                    .await?;
                if let Outcome::Leased(epoch) = outcome {
                    tracing::info!(job_id = %job, host, lease_epoch = epoch.0, "leased");
                    self.metrics.leases.inc();
                }
            }
        }
        Ok(())
    }

    /// Who is attached.
    pub(crate) fn live(&self) -> Live {
        let live = self.reigning(|reign| Live {
            attached: reign
                .agents
                .iter()
                .map(|(host, agent)| (host.clone(), agent.boot_id()))
                .collect(),
            litter: self.member.replica().read(|state| reign.traces.litter(state)),
        });
        live.unwrap_or_default()
    }

    /// When each attached agent was heard last, Unix milliseconds.
    pub(crate) fn heard(&self) -> BTreeMap<String, u64> {
        let heard = self.reigning(|reign| {
            reign.agents.iter().map(|(host, agent)| (host.clone(), agent.heard_ms)).collect()
        });
        heard.unwrap_or_default()
    }

    /// The layout, with who is online.
    pub(crate) fn layout(&self) -> Layout {
        let mut layout = self.member.replica().read(|state| state.storage.layout());
        self.reigning(|reign| {
            for node in &mut layout.nodes {
                node.online = reign.storage.contains_key(&node.name);
            }
        });
        layout
    }

    /// What only the leader knows of jobs. Taken *before* the state is read: see [`Self::lock`].
    pub(crate) fn outlook(&self) -> Outlook {
        Outlook {
            live: self.live(),
            progress: self.progress.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            limits: self.settings.limits,
            now_ms: self.member.clock().unix_millis(),
        }
    }

    /// Tells when some job's progress changed.
    pub(crate) fn progresses(&self) -> watch::Receiver<u64> {
        self.progressed.subscribe()
    }

    /// Lets a host go that was removed from the fabric: its stream, and what it told.
    pub(crate) async fn forget_host(&self, host: &str) {
        let term = self.reigning(|reign| {
            reign.agents.remove(host);
            reign.quiet.remove(host);
            reign.traces.forget(host);
            reign.term
        });
        if let Some(term) = term {
            self.report(term, Event::Forgotten { host: host.to_owned() }).await;
        }
    }

    fn set_progress(&self, job: JobId, progress: Progress) {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).insert(job, progress);
        self.progressed.send_modify(|count| *count += 1);
    }

    /// The replica's lock is the innermost one: whoever reads the state takes no other lock meanwhile.
    fn lock(&self) -> MutexGuard<'_, Option<Reign>> {
        self.reign.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works on the reign, if there is one.
    fn reigning<T>(&self, work: impl FnOnce(&mut Reign) -> T) -> Option<T> {
        self.lock().as_mut().map(work)
    }

    fn count(&self) {
        let m = &self.metrics;
        self.member.replica().read(|state| {
            let running = state.jobs.unfinished().filter(|job| job.lease().is_some()).count();
            let pending = state.jobs.unfinished().count() - running;
            m.jobs_running.set(gauge(running));
            m.jobs_pending.set(gauge(pending));
            m.vms.set(gauge(state.vms.len()));
            m.points.set(gauge(state.points.len()));
            m.open_duties.set(gauge(state.duties.values().filter(|duty| duty.is_open()).count()));
            m.resting_duties.set(gauge(state.resting_duties().count()));
        });
        let (agents, storage) =
            self.reigning(|reign| (reign.agents.len(), reign.storage.len())).unwrap_or_default();
        m.agents.set(gauge(agents));
        m.storage_nodes.set(gauge(storage));
        m.trace_alarms.set(gauge(self.trace_alarms().len()));
        m.term.set(self.member.raft().metrics().borrow().current_term);
        m.applied.set(*self.member.replica().changes().borrow());
        self.forget_progress();
    }

    fn forget_progress(&self) {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        if !progress.is_empty() {
            self.member.replica().read(|state| {
                progress.retain(|job, _| state.jobs.get(*job).is_some_and(|j| !j.has_ended()));
            });
        }
    }
}

/// A backup job with a trace of its own.
pub(crate) fn backup(vm: VmKey, group: Option<GroupId>, kind: BackupKind, why: &str) -> NewJob {
    new_job(vm, group, |_| Work::Backup { kind, why: why.to_owned(), point: PointId::random() })
}

/// A job whose trace begins with the decision to do it.
pub(crate) fn new_job(
    vm: VmKey,
    group: Option<GroupId>,
    work: impl FnOnce(JobId) -> Work,
) -> NewJob {
    let id = JobId::random();
    let work = work(id);
    let span = tracing::info_span!("job", job_id = %id, vm = %vm, kind = work.name());
    let traceparent = span.in_scope(current_traceparent).unwrap_or_default();
    NewJob { id, work, vm, group, traceparent }
}
