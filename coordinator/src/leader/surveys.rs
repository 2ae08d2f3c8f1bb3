//! Surveys: agents are asked what backups left on their hosts, at intervals for the alarms, and now when somebody wants to know.

use std::collections::BTreeMap;
use std::time::Duration;

use outrider_proto::rpc::{self, agent_down::What};
use tokio::sync::oneshot;

use super::sessions::AgentSession;
use super::{Leader, Reign};
use crate::traces::{VmTraces, from_message};

/// How long a host may take to look: hundreds of VMs, and a provider under load.
const PATIENCE: Duration = Duration::from_secs(60);

/// What an agent was asked, and who waits for it.
#[derive(Default)]
pub(super) struct Asked {
    last: u64,
    /// By the leader's own clock; none: never.
    at: Option<Duration>,
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
        let asked = self.reigning(|reign| ask(reign, host, now, Some(sender)));
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
        self.reigning(|reign| {
            let due = reign.agents.iter().filter(|(_, agent)| {
                agent.told.welcome && agent.surveys.at.is_none_or(|at| now >= at + every)
            });
            let due: Vec<String> = due.map(|(host, _)| host.clone()).collect();
            for host in due {
                ask(reign, &host, now, None);
            }
        });
    }

    /// An agent's answer.
    pub(crate) fn surveyed(&self, session: &AgentSession, survey: rpc::Survey) {
        let now_ms = self.member().clock().unix_millis();
        self.reigning(|reign| {
            let Reign { agents, traces, .. } = reign;
            let agent = agents.get_mut(&session.host).filter(|a| a.number() == session.number);
            let Some(agent) = agent else { return };
            let waiting = agent.surveys.waiting.remove(&survey.number);
            if survey.error.is_empty() {
                let own = |vm: &VmTraces| vm.vm.realm == session.realm;
                let found = read(survey.clone()).into_iter().filter(own).collect();
                traces.surveyed(&session.host, found, now_ms);
            }
            if let Some(waiting) = waiting {
                // Whoever asked may have gone.
                let _ = waiting.send(survey);
            }
        });
    }

    /// Alarms about what lasts too long on hosts.
    pub(crate) fn trace_alarms(&self) -> Vec<String> {
        let (now, bearable) = (self.member().clock().unix_millis(), self.settings().bearable);
        self.reigning(|reign| reign.traces.alarms(&bearable, now)).unwrap_or_default()
    }
}

/// None: the host has no agent here, or it does not read its stream.
fn ask(
    reign: &mut Reign,
    host: &str,
    now: Duration,
    waiter: Option<oneshot::Sender<rpc::Survey>>,
) -> Option<()> {
    let agent = reign.agents.get_mut(host)?;
    let asked = &mut agent.surveys;
    asked.last += 1;
    asked.at = Some(now);
    let request = What::Survey(rpc::SurveyRequest { number: asked.last });
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
