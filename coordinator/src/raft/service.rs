//! The members' side of the `Raft` service.

use outrider_process::identity::Role;
use outrider_proto::rpc::RaftMessage;
use outrider_proto::rpc::raft_server::Raft as RaftRpc;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tonic::{Request, Response, Status};

use super::network::VERSION;
use super::store::encode;
use super::{Raft, network};
use crate::api::peer;

/// Serves members only.
pub(crate) struct RaftService {
    raft: Raft,
}

impl RaftService {
    /// The service of this member.
    pub(crate) fn server(raft: Raft) -> outrider_proto::rpc::raft_server::RaftServer<Self> {
        outrider_proto::rpc::raft_server::RaftServer::new(Self { raft })
            .max_decoding_message_size(network::MAX_MESSAGE)
            .max_encoding_message_size(network::MAX_MESSAGE)
    }
}

#[tonic::async_trait]
impl RaftRpc for RaftService {
    async fn append(&self, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        let body = open(request)?;
        answer(&self.raft.append_entries(parse(&body)?).await)
    }

    async fn vote(&self, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        let body = open(request)?;
        answer(&self.raft.vote(parse(&body)?).await)
    }

    async fn install_snapshot(
        &self,
        request: Request<RaftMessage>,
    ) -> Result<Response<RaftMessage>, Status> {
        let body = open(request)?;
        answer(&self.raft.install_snapshot(parse(&body)?).await)
    }
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
