//! Hosts that leave: the steps that operators and the hosts themselves take.

use tonic::Status;

use crate::leader::{Leader, new_job};
use crate::state::jobs::Work;
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

/// What of ours a host shows although no duty names it: cleanup jobs are made for it. Sentences for whoever waits.
pub(super) async fn litter(leader: &Leader, host: &str) -> Result<Vec<String>, Status> {
    let found = match leader.survey(host).await {
        Ok(found) => found,
        Err(error) => return Ok(vec![format!("host {host} cannot be looked at: {error}")]),
    };
    let mut waits = Vec::new();
    for vm in found {
        let state = leader.member().replica();
        let known = state.read(|state| Known::of(state, &vm.vm));
        let ours: Vec<_> = orphans(&vm, &known)
            .0
            .into_iter()
            .filter(|orphan| orphan.owner == Owner::Ours)
            .collect();
        let Some(first) = ours.first() else { continue };
        waits.push(format!(
            "VM {:?}: {} {:?} of ours is there, and is being removed",
            vm.name,
            first.what.as_str(),
            first.id
        ));
        let why = format!("host {host} is leaving the fabric");
        let job = new_job(vm.vm, None, |_| Work::Cleanup { why });
        match leader.propose(Change::CreateJob(Box::new(job))).await {
            // One is on its way already.
            Ok(_) => {}
            Err(error) => return Err(super::proposal(leader, error)),
        }
    }
    Ok(waits)
}
