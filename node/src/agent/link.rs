//! The stream to the leader. Losing it stops no job: leases end by the jobs' own clocks.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use outrider_process::backoff::Backoff;
use outrider_process::observability::Readiness;
use outrider_process::tasks::TaskGroup;
use outrider_process::telemetry::host_events;
use outrider_process::telemetry::propagate::InjectTrace;
use outrider_proto::layout::Layout;
use outrider_proto::rpc::agent_client::AgentClient;
use outrider_proto::rpc::{self, AgentUp, agent_down, agent_up::What};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::jobs::Jobs;
use super::survey::Surveys;
use super::{Agent, watcher};

/// Messages waiting to go up.
const UP: usize = 256;
/// Heartbeats whose sending times are remembered.
const BEATS: usize = 64;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Used until the leader said its own.
const DEFAULT_RENEW: Duration = Duration::from_secs(1);
/// A leader is elected in less; whoever finds none for longer is told about.
const LONELY: Duration = Duration::from_secs(30);
/// How often progress goes up.
const PROGRESS: Duration = Duration::from_millis(500);

/// Attaches to the leader for ever.
pub(super) async fn serve(
    agent: &Arc<Agent>,
    tasks: &TaskGroup,
    readiness: &watch::Sender<Readiness>,
) {
    let mut jobs = Jobs::new(agent.clone(), tasks.child("jobs"));
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE, Backoff::any_seed());
    let mut lost: Option<Instant> = None;
    let mut told = false;
    loop {
        let failure = attach(agent, &mut jobs, readiness, &mut backoff).await;
        if agent.metrics.attached.set(0) == 1 {
            (lost, told) = (None, false);
        }
        if !told && lost.get_or_insert_with(Instant::now).elapsed() >= LONELY {
            told = true;
            tracing::warn!(
                event_id = host_events::DISCONNECTED,
                reason = failure.message(),
                "no coordinator has been reached for 30 seconds; running jobs stop when their leases end"
            );
        }
        agent.leader.learn(&failure);
        readiness.send_replace(Readiness::NotReady(format!(
            "not attached to a coordinator: {}",
            failure.message()
        )));
        tracing::debug!(status = %failure, "not attached to the leader, trying again");
        tokio::time::sleep(backoff.next_wait()).await;
    }
}

/// One stream, until it ends; gives the reason.
async fn attach(
    agent: &Arc<Agent>,
    jobs: &mut Jobs,
    readiness: &watch::Sender<Readiness>,
    backoff: &mut Backoff,
) -> Status {
    let channel = match agent.leader.channel().await {
        Ok(channel) => channel,
        Err(status) => return status,
    };
    // A host that comes back has to say so before it gets work: a provider that does not answer yet is asked again.
    let host_started = match agent.hypervisor.host_started().await {
        Ok(started) => started.unwrap_or(0),
        Err(e) => return Status::unavailable(format!("the hypervisor does not answer: {e}")),
    };
    let (stream_in, stream_out) = mpsc::channel::<AgentUp>(UP);
    let (up, mut from_watcher) = mpsc::channel::<What>(UP);
    let hello = What::Hello(rpc::Hello {
        host: agent.config.name.clone(),
        realm: agent.config.realm.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        hypervisor: agent.hypervisor.kind().to_owned(),
        boot_id: agent.boot_id,
        host_started_unix_ms: host_started,
    });
    if stream_in.send(AgentUp { what: Some(hello) }).await.is_err() {
        return Status::internal("the stream closed before it began");
    }
    let mut client = AgentClient::with_interceptor(channel, InjectTrace);
    let mut down = match client.attach(ReceiverStream::new(stream_out)).await {
        Ok(response) => response.into_inner(),
        Err(status) => return status,
    };
    // Ends with this function: its channel closes.
    let watching = watcher::report(agent, up, readiness);
    let talking = async {
        let mut beats = Beats::new(agent);
        let mut surveys = Surveys::new(agent);
        let mut renew = DEFAULT_RENEW;
        let mut next_beat = Instant::now();
        let mut progress = tokio::time::interval(PROGRESS);
        let mut welcomed = false;
        loop {
            let message = tokio::select! {
                message = down.next() => match message {
                    None => return Status::unavailable("the leader closed the stream"),
                    Some(Err(status)) => return status,
                    Some(Ok(message)) => message.what,
                },
                Some(what) = from_watcher.recv() => {
                    if send(&stream_in, what).await.is_err() { return gone(); }
                    continue;
                }
                closed = jobs.next_closed() => {
                    if send(&stream_in, What::Closed(closed)).await.is_err() { return gone(); }
                    continue;
                }
                survey = surveys.next() => {
                    if send(&stream_in, What::Survey(survey)).await.is_err() { return gone(); }
                    continue;
                }
                _ = progress.tick() => {
                    for report in jobs.progress() {
                        if send(&stream_in, What::Progress(report)).await.is_err() { return gone(); }
                    }
                    continue;
                }
                () = tokio::time::sleep_until(next_beat) => {
                    let beat = beats.next();
                    if send(&stream_in, What::Heartbeat(beat)).await.is_err() { return gone(); }
                    next_beat = Instant::now() + renew;
                    continue;
                }
            };
            match message {
                None => {}
                Some(agent_down::What::Welcome(welcome)) => {
                    renew = Duration::from_millis(welcome.renew_ms.max(100));
                    jobs.welcome(Duration::from_millis(welcome.cutoff_ms));
                    accept_layout(agent, welcome.layout.as_ref());
                    agent.metrics.attached.set(1);
                    readiness.send_replace(Readiness::Ready);
                    if !welcomed {
                        welcomed = true;
                        backoff.reset();
                        tracing::info!(
                            event_id = host_events::CONNECTED,
                            leader = agent.leader.target(),
                            term = welcome.leader_term,
                            "attached to the leader"
                        );
                        // The old leader may have died before it noted them.
                        for closed in jobs.closed_lately() {
                            if send(&stream_in, What::Closed(closed)).await.is_err() {
                                return gone();
                            }
                        }
                    }
                }
                Some(agent_down::What::Lease(lease)) => {
                    accept_layout(agent, lease.layout.as_ref());
                    if jobs.leased(lease) {
                        // A lease changes nothing before a heartbeat was answered: ask now.
                        next_beat = Instant::now();
                    }
                }
                Some(agent_down::What::Renewal(renewal)) => {
                    if let Some(sent) = beats.sent(renewal.beat) {
                        jobs.renewed(&renewal.job_id, renewal.lease_epoch, sent);
                    }
                }
                Some(agent_down::What::Ended(ended)) => {
                    let cancelled = ended.cancelled;
                    jobs.ended(&ended.job_id, ended.lease_epoch, &ended.reason, cancelled);
                }
                Some(agent_down::What::Layout(layout)) => accept_layout(agent, Some(&layout)),
                Some(agent_down::What::Survey(request)) => surveys.asked(request),
                Some(agent_down::What::OldHostClosed(closed)) => {
                    jobs.predecessor_closed(&closed.job_id, closed.lease_epoch);
                }
            }
        }
    };
    tokio::select! {
        status = talking => status,
        () = watching => Status::internal("the watcher ended"),
    }
}

async fn send(stream: &mpsc::Sender<AgentUp>, what: What) -> Result<(), ()> {
    stream.send(AgentUp { what: Some(what) }).await.map_err(|_| ())
}

fn gone() -> Status {
    Status::unavailable("the leader does not read from the stream any more")
}

fn accept_layout(agent: &Agent, layout: Option<&rpc::Layout>) {
    let Some(layout) = layout else { return };
    match Layout::try_from(layout) {
        // The same epoch may bring new incarnations and addresses.
        Ok(layout) => {
            agent.layout.send_if_modified(|now| {
                let newer = layout.epoch >= now.epoch && *now != layout;
                if newer {
                    *now = layout;
                }
                newer
            });
        }
        Err(e) => tracing::warn!(error = %e, "a layout from the coordinator cannot be read"),
    }
}

/// Heartbeats of one stream and when they were sent.
struct Beats<'a> {
    agent: &'a Agent,
    last: u64,
    sent: VecDeque<(u64, Duration)>,
}

impl<'a> Beats<'a> {
    fn new(agent: &'a Agent) -> Self {
        Self { agent, last: 0, sent: VecDeque::new() }
    }

    fn next(&mut self) -> rpc::Heartbeat {
        self.last += 1;
        if self.sent.len() == BEATS {
            self.sent.pop_front();
        }
        self.sent.push_back((self.last, self.agent.clock.monotonic()));
        rpc::Heartbeat { beat: self.last }
    }

    fn sent(&self, beat: u64) -> Option<Duration> {
        self.sent.iter().find(|(b, _)| *b == beat).map(|(_, at)| *at)
    }
}
