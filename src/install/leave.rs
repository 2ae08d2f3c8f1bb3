//! Leaving the fabric (O9): before the agent is removed, the coordinators have it remove what is ours at the hypervisor, since only
//! they know what that is and whether nobody works on it. Without them nothing is removed.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use outrider_node::Config;
use outrider_process::config::load;
use outrider_process::identity::Identity;
use outrider_process::leader::LeaderClient;
use outrider_process::network::Network;
use outrider_proto::rpc::agent_client::AgentClient;
use outrider_proto::rpc::{RetireReply, RetireRequest, RetireStep};
use outrider_proto::{error_code, status};
use tokio::time::Instant;
use tonic::Status;

use super::places::Places;
use crate::report::Failure;

/// How long a coordinator that leads is looked for.
const PATIENCE: Duration = Duration::from_secs(15);
/// Between two looks at how far it is.
const LOOK: Duration = Duration::from_secs(1);

/// This host on its way out.
pub(super) struct Farewell {
    leader: LeaderClient,
    /// An earlier attempt got as far as being forgotten.
    gone: bool,
    /// VMs whose next backup reads everything.
    pub(super) voided: u32,
}

/// Has everything of ours removed at the hypervisor, and waits for that. Nothing of the agent is touched yet.
///
/// # Errors
/// Refused: the coordinators cannot be asked, or it took longer than `patience`; then the host stays.
pub(super) async fn clean(
    places: &Places,
    patience: Duration,
    say: impl Fn(&str),
) -> Result<Farewell, Failure> {
    let identity = Identity::load(&places.identity).map_err(|e| {
        Failure::from(e).during("the coordinators cannot be asked what is to be removed")
    })?;
    let config: Config = load(&places.config)?;
    let network = Network::new(config.network.clone());
    let leader = LeaderClient::new(config.coordinators, Arc::new(identity)).over(network);
    let mut farewell = Farewell { leader, gone: false, voided: 0 };
    let mut reply = match farewell.ask(RetireStep::Begin).await {
        Ok(reply) => reply,
        Err(failure) if is(&failure, &error_code::REVOKED) => {
            farewell.gone = true;
            return Ok(farewell);
        }
        Err(failure) if is(&failure, &error_code::UNKNOWN_HOST) => {
            say("the coordinators have never heard of this host: nothing of ours can be on it");
            farewell.gone = true;
            return Ok(farewell);
        }
        Err(failure) => return Err(unreachable(&failure)),
    };
    let until = Instant::now() + patience;
    let mut told = Vec::new();
    while !reply.waits.is_empty() {
        if reply.waits != told {
            reply.waits.iter().for_each(|wait| say(wait));
            told.clone_from(&reply.waits);
        }
        if Instant::now() >= until {
            // It stays: otherwise it would never be backed up again, and nobody would know why.
            let kept = farewell.ask(RetireStep::Cancel).await;
            let mut failure = Failure::refused(format!(
                "this host is not clean after {}; the agent was left as it is",
                humantime::format_duration(patience)
            ))
            .because(reply.waits.join("; "))
            .hint("See to what is named, or give more time with --wait. --force removes the agent and leaves the rest behind.");
            if let Err(e) = kept {
                failure = failure.during(format!(
                    "and the coordinators still hold it for leaving ({}); `outrider host retire --cancel` keeps it",
                    e.message()
                ));
            }
            return Err(failure);
        }
        tokio::time::sleep(LOOK).await;
        match farewell.ask(RetireStep::Look).await {
            Ok(look) => reply = look,
            // A leader that changes meanwhile is waited for.
            Err(failure) if Instant::now() < until => {
                told = vec![failure.message().to_owned()];
                reply.waits.clone_from(&told);
            }
            Err(failure) => return Err(unreachable(&failure)),
        }
    }
    farewell.voided = reply.voided;
    Ok(farewell)
}

impl Farewell {
    async fn ask(&self, step: RetireStep) -> Result<RetireReply, Status> {
        self.leader
            .call(PATIENCE, |channel| async move {
                let request = RetireRequest { step: step.into() };
                Ok(AgentClient::new(channel).retire(request).await?.into_inner())
            })
            .await
    }

    /// Gives the name and the certificate up. The agent must have stopped.
    ///
    /// # Errors
    /// Refused, or nobody leads: repeat it.
    pub(super) async fn forget(&self) -> Result<(), Failure> {
        if self.gone {
            return Ok(());
        }
        match self.ask(RetireStep::Forget).await {
            Ok(_) => Ok(()),
            // Its answer was lost.
            Err(failure) if is(&failure, &error_code::REVOKED) => Ok(()),
            Err(failure) => Err(Failure::from(failure)
                .during("the host is clean, and the coordinators did not forget it")
                .hint("Run the same command again, or `outrider host forget` as an operator.")),
        }
    }
}

/// What can be told of this host without the coordinators, for whoever removes the agent all the same.
pub(super) async fn left_behind(config: &Path) -> Vec<String> {
    let mut left = Vec::new();
    let config = match load::<Config>(config) {
        Ok(config) => config,
        Err(e) => return vec![format!("what is left cannot be told: {}", Failure::from(e))],
    };
    let name = config.name.clone();
    match outrider_node::agent::look(&config).await {
        Ok(found) => {
            for vm in found {
                for checkpoint in vm.checkpoints.iter().filter(|c| c.ours) {
                    left.push(format!("checkpoint {:?} of VM {:?}", checkpoint.name, vm.name));
                }
                let points = vm.points.iter().filter(|p| p.ours != Some(false)).count();
                if points > 0 {
                    left.push(format!(
                        "{points} reference point(s) of VM {:?}; the coordinators alone know which are ours",
                        vm.name
                    ));
                }
            }
        }
        Err(e) => left.push(format!("what is left at the hypervisor cannot be told: {e}")),
    }
    left.push(format!("the name {name:?} stays taken, and its certificate good, until `outrider host forget {name} --force`"));
    left
}

fn unreachable(failure: &Status) -> Failure {
    Failure::refused("the coordinators cannot be asked, so nothing was removed: they alone know which reference points are ours")
        .because(failure.message())
        .hint(
            "Start the coordinators, or look at the network between. --force removes the agent and leaves what is ours at the \
             hypervisor behind.",
        )
}

fn is(failure: &Status, code: &error_code::ErrorCode) -> bool {
    status::detail(failure).is_some_and(|detail| detail.code == code.code)
}
