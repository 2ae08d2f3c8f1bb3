//! The gRPC services of a coordinator, all on one port, all behind mutual TLS.
//!
//! Each call names who may make it ([`peer`]); a member that does not lead says who does.

pub(crate) mod agent;
mod departures;
pub(crate) mod enrolment;
pub(crate) mod operator;
pub(crate) mod peer;
pub(crate) mod storage;
pub(crate) mod wire;

use outrider_proto::error_code;
use outrider_proto::status;
use tonic::Status;

use crate::leader::{AttachError, Leader};
use crate::raft::ProposeError;
use crate::state::Refusal;

/// Largest request: a commit of a long job carries the receipts of all its windows.
const MAX_MESSAGE: usize = 64 << 20;
/// Messages that wait for a reader of a stream of ours.
const STREAM_QUEUE: usize = 64;

fn proposal(leader: &Leader, error: ProposeError) -> Status {
    match error {
        ProposeError::NotLeader { leader: address } => {
            status::not_leader(address.or_else(|| other_leader(leader)).unwrap_or_default())
        }
        ProposeError::NoMajority => status::status(
            &error_code::NO_LEADER,
            "no majority of the coordinators confirmed this in time; ask again, and start the coordinators that are down",
        ),
        ProposeError::Stopped(fatal) => status::status(
            &error_code::INTERNAL,
            format!("Raft has stopped on this coordinator ({fatal}); restart it"),
        ),
    }
}

fn attach(leader: &Leader, error: AttachError) -> Status {
    match error {
        AttachError::Propose(error) => proposal(leader, error),
        AttachError::NoKeys => status::status(
            &error_code::NO_LEADER,
            "the coordinators have just begun to lead and have no keys yet; try again",
        ),
        AttachError::Refused(refusal) => refused(&refusal),
    }
}

fn refused(refusal: &Refusal) -> Status {
    status::status(refusal.code(), refusal.to_string())
}

/// The leader, unless this member believes to be it: then it has just failed to prove that.
fn other_leader(leader: &Leader) -> Option<String> {
    if leader.member().leads().is_some() { None } else { leader.member().leader_address() }
}
