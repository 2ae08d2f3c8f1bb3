//! Commit: judges the receipts, then proposes the recovery point.

use outrider_proto::ids::{JobId, LeaseEpoch, PgId, PlacementEpoch, PointId, Window};
use outrider_proto::model::{FieldError, parse, parse_optional};
use outrider_proto::rpc;

use crate::api::wire;
use crate::leader::Leader;
use crate::metrics::Word;
use crate::raft::ProposeError;
use crate::receipts::{Evidence, Lacking, WindowClaim, verify};
use crate::state::points::Proposal;
use crate::state::{Change, Outcome, Refusal, State};

/// A commit that was neither taken nor answered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CommitError {
    #[error(transparent)]
    Field(#[from] FieldError),
    #[error("field {field} of CommitRequest is missing or uneven")]
    Missing { field: &'static str },
    #[error(transparent)]
    Propose(#[from] ProposeError),
    #[error("{0}")]
    Refused(Refusal),
    #[error("the state answered {0:?}")]
    Unexpected(Outcome),
}

/// Answers a commit. Idempotent by job id for ever.
///
/// # Errors
/// [`CommitError`]; the agent asks again.
pub(crate) async fn commit(
    leader: &Leader,
    job: JobId,
    epoch: LeaseEpoch,
    request: rpc::CommitRequest,
) -> Result<rpc::CommitReply, CommitError> {
    let reply = decide(leader, job, epoch, request).await?;
    let outcome = match reply.outcome() {
        rpc::CommitOutcome::Committed => "committed",
        rpc::CommitOutcome::Superseded => "superseded",
        rpc::CommitOutcome::ReceiptsLacking => "receipts lacking",
        rpc::CommitOutcome::Unspecified => "unspecified",
    };
    leader.metrics().commits.get_or_create(&Word { outcome }).inc();
    tracing::info!(job_id = %job, lease_epoch = epoch.0, outcome, reason = reply.reason, "commit");
    Ok(reply)
}

async fn decide(
    leader: &Leader,
    job: JobId,
    epoch: LeaseEpoch,
    request: rpc::CommitRequest,
) -> Result<rpc::CommitReply, CommitError> {
    let replica = leader.member().replica();
    // What was committed, or superseded, stays so: an early answer from this member's state is final.
    if let Some(reply) = replica.read(|state| settled(state, job, epoch)) {
        return Ok(reply);
    }
    let windows = request.windows.iter().map(claim).collect::<Result<Vec<_>, _>>()?;
    let mut proposal = proposal(job, epoch, &request)?;
    let roots: Vec<Vec<u8>> = request.root_receipts.iter().map(|r| r.to_vec()).collect();
    let evidence = Evidence {
        fabric: leader.settings().fabric,
        job,
        point: proposal.point,
        manifest: proposal.manifest,
        windows: &windows,
        roots: &roots,
    };
    let layout = replica.read(|state| state.storage.layout());
    match verify(&evidence, &layout) {
        Ok(witnesses) => {
            proposal.layout = layout.epoch;
            proposal.witnesses = witnesses.into_iter().collect();
        }
        Err(lacking) => return Ok(receipts_lacking(&lacking)),
    }
    match leader.propose(Change::Commit(Box::new(proposal))).await? {
        Outcome::Committed(point) => Ok(committed(point)),
        Outcome::Superseded(why) => Ok(superseded(why)),
        // A node restarted, or the layout changed, between our look and the log: judge anew.
        Outcome::ReceiptsVoid => {
            let layout = replica.read(|state| state.storage.layout());
            let lacking = verify(&evidence, &layout).err().unwrap_or(Lacking::Pgs(Vec::new()));
            Ok(receipts_lacking(&lacking))
        }
        Outcome::Refused(refusal) => Err(CommitError::Refused(refusal)),
        other => Err(CommitError::Unexpected(other)),
    }
}

fn settled(state: &State, job: JobId, epoch: LeaseEpoch) -> Option<rpc::CommitReply> {
    let job = state.jobs.get(job)?;
    if let Some(point) = job.committed {
        return Some(committed(point));
    }
    // A lease that this member has not heard of yet is for the proposal to judge.
    let known = epoch <= job.lease_epoch;
    (known && job.current(epoch).is_none()).then(|| superseded(job.superseded(epoch)))
}

fn claim(window: &rpc::WindowClaim) -> Result<WindowClaim, CommitError> {
    let count = window.pg.len();
    if window.puts.len() != count || window.haves.len() != count {
        return Err(CommitError::Missing { field: "windows.puts or windows.haves" });
    }
    let mut pgs = Vec::with_capacity(count);
    for ((pg, puts), haves) in window.pg.iter().zip(&window.puts).zip(&window.haves) {
        let pg = u16::try_from(*pg).map_err(|_| CommitError::Missing { field: "windows.pg" })?;
        pgs.push((PgId(pg), *puts, *haves));
    }
    Ok(WindowClaim {
        session: parse("WindowClaim", "session", &window.session)?,
        window: Window(window.window),
        pgs,
        receipts: window.receipt.iter().map(|r| r.to_vec()).collect(),
    })
}

fn proposal(
    job: JobId,
    epoch: LeaseEpoch,
    r: &rpc::CommitRequest,
) -> Result<Proposal, CommitError> {
    let consistency =
        wire::to_consistency(r.achieved()).ok_or(CommitError::Missing { field: "achieved" })?;
    Ok(Proposal {
        job,
        epoch,
        placement: PlacementEpoch(r.placement_epoch),
        point: parse::<PointId>("CommitRequest", "point_id", &r.point_id)?,
        manifest: parse("CommitRequest", "manifest_id", &r.manifest_id)?,
        taken_ms: r.taken_unix_ms,
        consistency,
        kind: wire::to_backup_kind(r.kind()),
        stats: wire::to_stats(r.stats),
        reasons: r.reasons.clone(),
        checkpoint: r.checkpoint_id.clone(),
        tracking_unproven: r.tracking_unproven,
        disks: r.disks.iter().cloned().map(wire::to_disk).collect(),
        parent: parse_optional("CommitRequest", "parent_point_id", &r.parent_point_id)?,
        layout: outrider_proto::ids::LayoutEpoch(0),
        witnesses: Vec::new(),
    })
}

fn committed(point: PointId) -> rpc::CommitReply {
    rpc::CommitReply {
        outcome: rpc::CommitOutcome::Committed.into(),
        point_id: point.to_string(),
        ..rpc::CommitReply::default()
    }
}

fn superseded(reason: String) -> rpc::CommitReply {
    rpc::CommitReply {
        outcome: rpc::CommitOutcome::Superseded.into(),
        reason,
        ..rpc::CommitReply::default()
    }
}

fn receipts_lacking(lacking: &Lacking) -> rpc::CommitReply {
    let pgs: &[PgId] = match lacking {
        Lacking::Pgs(pgs) => pgs,
        Lacking::NoLayout | Lacking::Root { .. } => &[],
    };
    rpc::CommitReply {
        outcome: rpc::CommitOutcome::ReceiptsLacking.into(),
        lacking_pgs: pgs.iter().map(|pg| u32::from(pg.0)).collect(),
        reason: lacking.to_string(),
        ..rpc::CommitReply::default()
    }
}
