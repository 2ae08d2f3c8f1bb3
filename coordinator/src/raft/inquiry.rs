//! A member with an empty database asks all others, and takes part again step by step: see [`super::admission`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use outrider_process::identity::Identity;
use outrider_proto::rpc;
use tokio_util::sync::CancellationToken;

use super::admission::{Known, Standing, Verdict, judge};
use super::member::{Member, StartError};
use super::network::{self, VERSION};

/// Between two rounds of questions, and between two looks at what was applied.
const PAUSE: Duration = Duration::from_millis(200);
/// A member that does not answer is asked again in the next round.
const PATIENCE: Duration = Duration::from_secs(2);
/// Rounds between two complaints.
const COMPLAIN: u32 = 50;

/// Returns when this member takes part without bounds, or `stop` is cancelled. `members`: all, by id, with their
/// addresses.
///
/// # Errors
/// [`StartError`].
pub(crate) async fn settle(
    member: &Member,
    identity: &Arc<Identity>,
    members: &BTreeMap<u64, String>,
    stop: CancellationToken,
) -> Result<(), StartError> {
    let mut answers: BTreeMap<u64, Known> = BTreeMap::new();
    let mut rounds = 0;
    let mut applied = member.replica().changes();
    // One member begins a new fabric; the others hear of it from the leader that it becomes.
    let mut begins = members.keys().next() == Some(&member.id());
    loop {
        match member.admission().standing() {
            Standing::Full => return Ok(()),
            Standing::Empty => {
                if rounds > 0 && rounds % COMPLAIN == 0 {
                    complain(member, members, &answers);
                }
                rounds += 1;
                let others = members.iter().filter(|(id, _)| **id != member.id());
                let asked = others.map(async |(id, address)| (*id, ask(identity, address).await));
                for (id, answer) in futures::future::join_all(asked).await {
                    if let Some(known) = answer {
                        answers.insert(id, known);
                    }
                }
                if answers.len() + 1 == members.len() {
                    let told: Vec<Known> = answers.values().copied().collect();
                    if let Verdict::Return(bounds) = judge(&told) {
                        tracing::info!(?bounds, "the database is empty, the others were heard");
                        member.admission().begin(bounds).await.map_err(StartError::Mark)?;
                        continue;
                    }
                }
            }
            Standing::Returning(bounds) => {
                if bounds.last_log.is_none() && std::mem::take(&mut begins) {
                    member.bootstrap(members).await?;
                }
                let index = *applied.borrow_and_update();
                if member.admission().applied(index).await.map_err(StartError::Mark)? {
                    member.stand();
                    tracing::info!(index, "this member takes part without bounds");
                    continue;
                }
            }
        }
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            _ = applied.changed() => {}
            () = tokio::time::sleep(PAUSE) => {}
        }
    }
}

async fn ask(identity: &Identity, address: &str) -> Option<Known> {
    let mut client = network::client(identity, address).ok()?;
    let mut question = tonic::Request::new(rpc::RaftMessage { version: VERSION, body: Vec::new() });
    question.set_timeout(PATIENCE);
    match tokio::time::timeout(PATIENCE, client.standing(question)).await {
        Ok(Ok(answer)) => serde_json::from_slice(&answer.into_inner().body).ok(),
        Ok(Err(status)) => {
            tracing::debug!(address, %status, "a member did not tell what it knows");
            None
        }
        Err(_) => None,
    }
}

fn complain(member: &Member, members: &BTreeMap<u64, String>, answers: &BTreeMap<u64, Known>) {
    let silent: Vec<&str> = members
        .iter()
        .filter(|(id, _)| **id != member.id() && !answers.contains_key(id))
        .map(|(_, address)| address.as_str())
        .collect();
    if silent.is_empty() {
        tracing::error!(
            "more than one coordinator has lost its database, and what a majority confirmed may be lost with them: put the \
             database of one of them back from its disk or a copy; none of them votes until then"
        );
    } else {
        tracing::warn!(
            silent = silent.join(", "),
            "this coordinator's database is empty: before it takes part it has to hear from every other member whether the \
             fabric exists already; start those that are silent"
        );
    }
}
