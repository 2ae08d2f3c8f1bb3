//! Surveys that the leader asks for: one at a time, in the order of asking. The stream goes on meanwhile.

use std::collections::VecDeque;
use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use outrider_proto::ids::VmGuid;
use outrider_proto::rpc;

use super::Agent;
use super::wire::Wire;

/// Questions that wait; a leader asks again for those beyond.
const WAITING: usize = 16;

/// The surveys of one stream.
pub(super) struct Surveys {
    agent: Arc<Agent>,
    waiting: VecDeque<rpc::SurveyRequest>,
    running: Option<BoxFuture<'static, rpc::Survey>>,
}

impl Surveys {
    pub(super) fn new(agent: &Arc<Agent>) -> Self {
        Self { agent: agent.clone(), waiting: VecDeque::new(), running: None }
    }

    /// Takes a question in.
    pub(super) fn asked(&mut self, question: rpc::SurveyRequest) {
        if self.waiting.len() < WAITING {
            self.waiting.push_back(question);
        }
    }

    /// The next answer; never, while nothing was asked.
    ///
    /// # Cancel safety
    /// Cancel safe: a survey that has begun goes on with the next call.
    pub(super) async fn next(&mut self) -> rpc::Survey {
        if self.running.is_none()
            && let Some(question) = self.waiting.pop_front()
        {
            self.running = Some(survey(self.agent.clone(), question).boxed());
        }
        match &mut self.running {
            Some(running) => {
                let answer = running.await;
                self.running = None;
                answer
            }
            None => std::future::pending().await,
        }
    }
}

async fn survey(agent: Arc<Agent>, question: rpc::SurveyRequest) -> rpc::Survey {
    let number = question.number;
    match agent.hypervisor.traces().await {
        Ok(vms) => {
            let wire = Wire { realm: agent.config.realm.clone() };
            let vms = vms.into_iter().map(|vm| wire.traces(vm)).collect();
            let search = search(&agent, &question.sought).await;
            rpc::Survey { number, vms, error: String::new(), search }
        }
        Err(e) => {
            tracing::warn!(error = %e, "what backups left here cannot be listed");
            rpc::Survey { number, error: e.to_string(), ..rpc::Survey::default() }
        }
    }
}

/// What is here of VMs that nobody shows; none when that cannot be said for certain.
async fn search(agent: &Agent, sought: &[String]) -> Option<rpc::Search> {
    if sought.is_empty() {
        return None;
    }
    let vms: Vec<VmGuid> = sought.iter().map(|vm| vm.parse().ok()).collect::<Option<_>>()?;
    match agent.hypervisor.search(&vms).await {
        Ok(found) => found.map(|found| rpc::Search {
            found: found.vms.iter().map(ToString::to_string).collect(),
            cluster_hosts: found.cluster_hosts,
        }),
        Err(e) => {
            tracing::warn!(error = %e, "whether VMs that nobody shows are here cannot be said");
            None
        }
    }
}
