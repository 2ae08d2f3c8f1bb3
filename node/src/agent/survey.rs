//! Surveys that the leader asks for: one at a time, in the order of asking. The stream goes on meanwhile.

use std::collections::VecDeque;
use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use outrider_proto::rpc;

use super::Agent;
use super::wire::Wire;

/// Questions that wait; a leader asks again for those beyond.
const WAITING: usize = 16;

/// The surveys of one stream.
pub(super) struct Surveys {
    agent: Arc<Agent>,
    waiting: VecDeque<u64>,
    running: Option<BoxFuture<'static, rpc::Survey>>,
}

impl Surveys {
    pub(super) fn new(agent: &Arc<Agent>) -> Self {
        Self { agent: agent.clone(), waiting: VecDeque::new(), running: None }
    }

    /// Takes a question in.
    pub(super) fn asked(&mut self, number: u64) {
        if self.waiting.len() < WAITING {
            self.waiting.push_back(number);
        }
    }

    /// The next answer; never, while nothing was asked.
    ///
    /// # Cancel safety
    /// Cancel safe: a survey that has begun goes on with the next call.
    pub(super) async fn next(&mut self) -> rpc::Survey {
        if self.running.is_none()
            && let Some(number) = self.waiting.pop_front()
        {
            self.running = Some(survey(self.agent.clone(), number).boxed());
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

async fn survey(agent: Arc<Agent>, number: u64) -> rpc::Survey {
    match agent.hypervisor.traces().await {
        Ok(vms) => {
            let wire = Wire { realm: agent.config.realm.clone() };
            let vms = vms.into_iter().map(|vm| wire.traces(vm)).collect();
            rpc::Survey { number, vms, error: String::new() }
        }
        Err(e) => {
            tracing::warn!(error = %e, "what backups left here cannot be listed");
            rpc::Survey { number, vms: Vec::new(), error: e.to_string() }
        }
    }
}
