//! Hosts that leave: the steps that operators and the hosts themselves take.

use tonic::Status;

use crate::leader::Leader;
use crate::state::{Change, Outcome};
use crate::traces::{Known, Owner, orphans};

/// Removes a host from the fabric. It must be clean, or the operator must insist.
pub(super) async fn forget(
    leader: &Leader,
    host: &str,
    by: String,
    force: bool,
) -> Result<(), Status> {
    let change = Change::ForgetHost { host: host.to_owned(), by: by.clone(), force };
    match leader.propose(change).await {
        Ok(Outcome::Refused(refusal)) => Err(super::refused(&refusal)),
        Ok(_) => {
            tracing::info!(host, by, force, "a host was removed from the fabric");
            leader.forget_host(host).await;
            Ok(())
        }
        Err(error) => Err(super::proposal(leader, error)),
    }
}

/// What of ours a host shows although no duty names it. Sentences for whoever waits. Looking changes nothing: the leader decides by
/// what was seen (`schedule`).
pub(super) async fn litter(leader: &Leader, host: &str) -> Vec<String> {
    let found = match leader.survey(host).await {
        Ok(found) => found,
        Err(error) => return vec![format!("host {host} cannot be looked at: {error}")],
    };
    let waits = found.into_iter().filter_map(|vm| {
        let known = leader.member().replica().read(|state| Known::of(state, &vm.vm));
        let (unexplained, _) = orphans(&vm, &known);
        let first = unexplained.into_iter().find(|orphan| orphan.owner == Owner::Ours)?;
        Some(format!(
            "VM {:?}: {} {:?} of ours is there, and is being removed",
            vm.name,
            first.what.as_str(),
            first.id
        ))
    });
    waits.collect()
}
