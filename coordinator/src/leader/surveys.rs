//! Surveys: agents are asked what backups left on their hosts, at intervals for the alarms, and now when somebody wants to know.

use std::collections::BTreeMap;
use std::time::Duration;

use outrider_proto::ids::VmGuid;
use outrider_proto::rpc::{self, agent_down::What};
use tokio::sync::oneshot;

use super::sessions::AgentSession;
use super::{Leader, Reign};
use crate::follow::{Event, MOST_SOUGHT, Searched};
use crate::state::Change;
use crate::traces::{VmTraces, from_message};

/// How long a host may take to look: hundreds of VMs, and a provider under load.
const PATIENCE: Duration = Duration::from_secs(60);

/// Between two looks at a host that leaves.
const LEAVING: Duration = Duration::from_secs(5);

/// What an agent was asked, and who waits for it.
#[derive(Default)]
pub(super) struct Asked {
    last: u64,
    /// By the leader's own clock; none: never.
    at: Option<Duration>,
    /// VMs that the last question asked for.
    sought: Vec<VmGuid>,
    waiting: BTreeMap<u64, oneshot::Sender<rpc::Survey>>,
}

/// Why a host could not be looked at.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SurveyError {
    #[error("its agent is not connected; start it, and check its network")]
    Silent,
    #[error(
        "its agent did not answer within {}: its release is older than this command, or its hypervisor hangs",
        humantime::format_duration(PATIENCE)
    )]
    Late,
    #[error("its hypervisor refused: {0}")]
    Refused(String),
}

impl Leader {
    /// What backups left on a host, looked at now.
    ///
    /// # Errors
    /// [`SurveyError`].
    pub(crate) async fn survey(&self, host: &str) -> Result<Vec<VmTraces>, SurveyError> {
        let (sender, answer) = oneshot::channel();
        let now = self.member().clock().monotonic();
        let sought = self.sought(host);
        let asked = self.reigning(|reign| ask(reign, host, now, sought, Some(sender)));
        if asked.flatten().is_none() {
            return Err(SurveyError::Silent);
        }
        match tokio::time::timeout(PATIENCE, answer).await {
            Err(_) => Err(SurveyError::Late),
            // The session ended.
            Ok(Err(_)) => Err(SurveyError::Silent),
            Ok(Ok(survey)) if !survey.error.is_empty() => Err(SurveyError::Refused(survey.error)),
            Ok(Ok(survey)) => Ok(read(survey)),
        }
    }

    /// Asks the agents that were not asked for a while.
    pub(super) fn look_at_hosts(&self) {
        let (now, every) = (self.member().clock().monotonic(), self.settings().look_every);
        let leaving: Vec<String> = self.member().replica().read(|state| {
            state.hosts.keys().filter(|host| state.is_leaving(host)).cloned().collect()
        });
        let due = self.reigning(|reign| {
            let due = reign.agents.iter().filter(|(host, agent)| {
                let every = if leaving.contains(host) { every.min(LEAVING) } else { every };
                agent.told.welcome && agent.surveys.at.is_none_or(|at| now >= at + every)
            });
            due.map(|(host, _)| host.clone()).collect::<Vec<String>>()
        });
        for host in due.unwrap_or_default() {
            let sought = self.sought(&host);
            self.reigning(|reign| ask(reign, &host, now, sought, None));
        }
    }

    /// VMs of the host's realm that nobody shows, to be asked for.
    fn sought(&self, host: &str) -> Vec<VmGuid> {
        let sought = self.reigning(|reign| {
            self.member().replica().read(|state| {
                let realm = state.hosts.get(host).map(|h| h.realm.as_str()).unwrap_or_default();
                reign.follow.sought(realm, state)
            })
        });
        let guids = sought.unwrap_or_default().into_iter().map(|vm| vm.guid);
        guids.take(MOST_SOUGHT).collect()
    }

    /// An agent's answer.
    pub(crate) async fn surveyed(&self, session: &AgentSession, mut survey: rpc::Survey) {
        let now_ms = self.member().clock().unix_millis();
        let search = survey.search.take();
        let mut lasting = None;
        let searched = self.reigning(|reign| {
            let Reign { agents, traces, .. } = reign;
            let agent = agents.get_mut(&session.host).filter(|a| a.number() == session.number)?;
            let waiting = agent.surveys.waiting.remove(&survey.number);
            let searched = search.and_then(|s| agent.surveys.searched(session, survey.number, s));
            if survey.error.is_empty() {
                let own = |vm: &VmTraces| vm.vm.realm == session.realm;
                let found = read(survey.clone()).into_iter().filter(own).collect();
                let replica = self.member().replica();
                lasting =
                    replica.read(|state| traces.surveyed(&session.host, found, state, now_ms));
            }
            if let Some(waiting) = waiting {
                // Whoever asked may have gone.
                let _ = waiting.send(survey);
            }
            searched
        });
        if let Some(vms) = lasting {
            let change = Change::Lasting { host: session.host.clone(), vms };
            if let Err(error) = self.propose(change).await {
                // The next look tells it again.
                tracing::debug!(%error, host = session.host, "what lasts there was not recorded");
            }
        }
        if let Some(searched) = searched.flatten() {
            // With what the agents report, one after the other: a VM that is seen meanwhile is not called absent.
            self.report(session.term, Event::Searched(searched)).await;
        }
    }

    /// Alarms about what lasts too long on hosts.
    pub(crate) fn trace_alarms(&self) -> Vec<String> {
        let (now, bearable) = (self.member().clock().unix_millis(), self.settings().bearable);
        let alarms = self.reigning(|reign| {
            self.member().replica().read(|state| reign.traces.alarms(state, &bearable, now))
        });
        alarms.unwrap_or_default()
    }
}

impl Asked {
    /// What an answer says of the VMs that were asked for; none when it is no answer to the last question, whose time is known.
    fn searched(
        &self,
        session: &AgentSession,
        number: u64,
        search: rpc::Search,
    ) -> Option<Searched> {
        let asked = self.at.filter(|_| number == self.last && !self.sought.is_empty())?;
        // What cannot be read is taken for a VM that is there.
        let found: Option<Vec<VmGuid>> = search.found.iter().map(|vm| vm.parse().ok()).collect();
        Some(Searched {
            host: session.host.clone(),
            realm: session.realm.clone(),
            asked,
            sought: self.sought.clone(),
            found: found.unwrap_or_else(|| self.sought.clone()),
            cluster: search.cluster_hosts,
        })
    }
}

/// None: the host has no agent here, or it does not read its stream.
fn ask(
    reign: &mut Reign,
    host: &str,
    now: Duration,
    sought: Vec<VmGuid>,
    waiter: Option<oneshot::Sender<rpc::Survey>>,
) -> Option<()> {
    let agent = reign.agents.get_mut(host)?;
    let asked = &mut agent.surveys;
    asked.last += 1;
    asked.at = Some(now);
    let names = sought.iter().map(ToString::to_string).collect();
    asked.sought = sought;
    let request = What::Survey(rpc::SurveyRequest { number: asked.last, sought: names });
    agent.down.try_send(Ok(rpc::AgentDown { what: Some(request) })).ok()?;
    asked.waiting.retain(|_, waiting| !waiting.is_closed());
    if let Some(waiter) = waiter {
        asked.waiting.insert(asked.last, waiter);
    }
    Some(())
}

fn read(survey: rpc::Survey) -> Vec<VmTraces> {
    let vms = survey.vms.into_iter().filter_map(|vm| match from_message(vm) {
        Ok(vm) => Some(vm),
        Err(error) => {
            tracing::warn!(%error, "a VM of a survey was left out");
            None
        }
    });
    vms.collect()
}
