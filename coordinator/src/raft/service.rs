//! The members' side of the `Raft` service.

use openraft::raft::{AppendEntriesRequest, InstallSnapshotRequest, VoteRequest};
use outrider_process::identity::Role;
use outrider_proto::rpc::RaftMessage;
use outrider_proto::rpc::raft_server::Raft as RaftRpc;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tonic::{Request, Response, Status};

use super::admission::{Known, NotYet, Standing};
use super::network::VERSION;
use super::store::encode;
use super::{Member, Types, network};
use crate::api::peer;

/// Serves members only.
pub(crate) struct RaftService {
    member: Member,
}

impl RaftService {
    /// The service of this member.
    pub(crate) fn server(member: Member) -> outrider_proto::rpc::raft_server::RaftServer<Self> {
        outrider_proto::rpc::raft_server::RaftServer::new(Self { member })
            .max_decoding_message_size(network::MAX_MESSAGE)
            .max_encoding_message_size(network::MAX_MESSAGE)
    }
}

#[tonic::async_trait]
impl RaftRpc for RaftService {
    async fn append(&self, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        let body = open(request)?;
        let request: AppendEntriesRequest<Types> = parse(&body)?;
        self.member.admission().takes(request.vote.leader_id.term).map_err(refused)?;
        answer(&self.member.raft().append_entries(request).await)
    }

    async fn vote(&self, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        let body = open(request)?;
        let request: VoteRequest<u64> = parse(&body)?;
        self.member.admission().votes().map_err(refused)?;
        answer(&self.member.raft().vote(request).await)
    }

    async fn install_snapshot(
        &self,
        request: Request<RaftMessage>,
    ) -> Result<Response<RaftMessage>, Status> {
        let body = open(request)?;
        let request: InstallSnapshotRequest<Types> = parse(&body)?;
        self.member.admission().takes(request.vote.leader_id.term).map_err(refused)?;
        answer(&self.member.raft().install_snapshot(request).await)
    }

    async fn standing(
        &self,
        request: Request<RaftMessage>,
    ) -> Result<Response<RaftMessage>, Status> {
        open(request)?;
        let remembers = self.member.admission().standing() == Standing::Full;
        let metrics = self.member.raft().metrics();
        let known = {
            let metrics = metrics.borrow();
            Known { term: metrics.current_term, last_log: metrics.last_log_index, remembers }
        };
        answer(&known)
    }
}

fn refused(why: NotYet) -> Status {
    Status::unavailable(why.to_string())
}

fn open(request: Request<RaftMessage>) -> Result<Vec<u8>, Status> {
    peer::require(&request, Role::Coordinator)?;
    let message = request.into_inner();
    if message.version != VERSION {
        return Err(Status::unimplemented(format!(
            "Raft message of version {}; this member speaks {VERSION}: run one release on all members",
            message.version
        )));
    }
    Ok(message.body)
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Status> {
    serde_json::from_slice(body)
        .map_err(|error| Status::invalid_argument(format!("Raft message is malformed: {error}")))
}

fn answer<T: Serialize>(result: &T) -> Result<Response<RaftMessage>, Status> {
    Ok(Response::new(RaftMessage { version: VERSION, body: encode(result) }))
}
