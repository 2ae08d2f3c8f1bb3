//! Error codes on gRPC: a status carries an encoded [`rpc::ErrorDetail`], so that clients decide on codes, not on prose.

use prost::Message as _;
use tonic::{Code, Status};

use crate::error_code::{Class, ErrorCode, NOT_LEADER};
use crate::rpc;

/// A status with a stable code and one sentence (what happened, to which object, why, what to do).
#[must_use]
pub fn status(code: &ErrorCode, message: impl Into<String>) -> Status {
    with_leader(code, message.into(), String::new())
}

/// The status of a member that is not the leader; `leader` ("ip:port") is empty while there is none.
#[must_use]
pub fn not_leader(leader: impl Into<String>) -> Status {
    let leader = leader.into();
    let message = if leader.is_empty() {
        "this coordinator is not the leader, and none is known right now".to_owned()
    } else {
        format!("this coordinator is not the leader; {leader} is")
    };
    with_leader(&NOT_LEADER, message, leader)
}

fn with_leader(code: &ErrorCode, message: String, leader: String) -> Status {
    let grpc = match code.class {
        Class::Retry => Code::Unavailable,
        Class::Superseded => Code::Aborted,
        Class::Refused => Code::FailedPrecondition,
        Class::Broken => Code::DataLoss,
        Class::Bug => Code::Internal,
    };
    let detail = rpc::ErrorDetail { code: code.code.to_owned(), message: message.clone(), leader };
    Status::with_details(grpc, message, detail.encode_to_vec().into())
}

/// The detail of a status made by this module.
#[must_use]
pub fn detail(status: &Status) -> Option<rpc::ErrorDetail> {
    if status.details().is_empty() {
        return None;
    }
    rpc::ErrorDetail::decode(status.details()).ok().filter(|d| !d.code.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_leader_travels_in_the_details() {
        let d = detail(&not_leader("127.0.0.1:1")).expect("has details");
        assert_eq!((d.code.as_str(), d.leader.as_str()), ("OUT-C-0001", "127.0.0.1:1"));
        assert!(detail(&Status::internal("x")).is_none());
    }
}
