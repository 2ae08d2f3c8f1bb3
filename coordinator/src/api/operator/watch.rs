//! Watching jobs: every change once, live progress at a bearable rate.

use std::collections::BTreeMap;
use std::time::Duration;

use outrider_proto::ids::JobId;
use outrider_proto::rpc;
use outrider_proto::status::not_leader;
use tokio::sync::mpsc;
use tonic::Status;

use super::view;
use crate::leader::Leader;

/// Between two looks: smooth for eyes, cheap for the leader.
const LOOK: Duration = Duration::from_millis(200);

/// Sends jobs as they change: those named, until all have ended; without names all that are unfinished or change.
/// Ends, too, when the reader is gone or this member no longer leads.
pub(super) async fn watch(
    leader: &Leader,
    ids: Vec<JobId>,
    sender: mpsc::Sender<Result<rpc::Job, Status>>,
) {
    let mut applied = leader.member().replica().changes();
    let mut progressed = leader.progresses();
    let mut sent: BTreeMap<JobId, rpc::Job> = BTreeMap::new();
    loop {
        applied.mark_unchanged();
        progressed.mark_unchanged();
        if leader.member().leads().is_none() {
            let address = leader.member().leader_address().unwrap_or_default();
            let _ = sender.send(Err(not_leader(address))).await;
            return;
        }
        let (changed, all_ended) = look(leader, &ids, &sent);
        for (id, job) in changed {
            if sender.send(Ok(job.clone())).await.is_err() {
                return;
            }
            sent.insert(id, job);
        }
        if all_ended {
            return;
        }
        tokio::select! {
            () = sender.closed() => return,
            _ = applied.changed() => {}
            _ = progressed.changed() => {}
            // Leadership ends without a change of the state.
            () = tokio::time::sleep(LOOK * 5) => continue,
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn look(
    leader: &Leader,
    ids: &[JobId],
    sent: &BTreeMap<JobId, rpc::Job>,
) -> (Vec<(JobId, rpc::Job)>, bool) {
    let outlook = leader.outlook();
    leader.member().replica().read(|state| {
        let named: Vec<JobId> = if ids.is_empty() {
            let mut all: Vec<JobId> = state.jobs.unfinished().map(|job| job.id).collect();
            all.extend(sent.iter().filter(|(_, job)| job.ended_unix_ms == 0).map(|(id, _)| *id));
            all.sort();
            all.dedup();
            all
        } else {
            ids.to_vec()
        };
        let mut all_ended = !ids.is_empty();
        let mut changed = Vec::new();
        for id in named {
            let Some(job) = state.jobs.get(id) else { continue };
            all_ended &= job.has_ended();
            let shown = view::job(state, &outlook, job);
            if sent.get(&id) != Some(&shown) {
                changed.push((id, shown));
            }
        }
        (changed, all_ended)
    })
}
