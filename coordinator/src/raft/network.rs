//! Raft between members: openraft's requests as JSON in the `Raft` service, over mutual TLS.

use std::sync::Arc;

use openraft::error::{
    InstallSnapshotError, NetworkError, RPCError, RaftError, RemoteError, Unreachable,
};
use openraft::network::{RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse,
    VoteRequest, VoteResponse,
};
use openraft::{AnyError, BasicNode};
use outrider_process::identity::{Identity, Role};
use outrider_proto::rpc::{self, raft_client::RaftClient};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tonic::transport::{Channel, Endpoint};

use super::Types;
use super::store::encode;

/// Version of the encoding: JSON.
pub(super) const VERSION: u32 = 1;
/// A snapshot part is 512 KiB, which JSON blows up to four times that; entries are small.
pub(super) const MAX_MESSAGE: usize = 64 << 20;

/// Makes connections to members.
pub(crate) struct Network {
    pub(crate) identity: Arc<Identity>,
}

/// The connection to one member. It connects when it is used, and again when it was lost.
pub(crate) struct Connection {
    target: u64,
    client: Result<RaftClient<Channel>, tonic::transport::Error>,
}

impl RaftNetworkFactory<Types> for Network {
    type Network = Connection;

    async fn new_client(&mut self, target: u64, node: &BasicNode) -> Connection {
        Connection { target, client: client(&self.identity, &node.addr) }
    }
}

/// A client of the member at this address; it connects when it is used.
pub(super) fn client(
    identity: &Identity,
    address: &str,
) -> Result<RaftClient<Channel>, tonic::transport::Error> {
    Ok(RaftClient::new(endpoint(identity, address)?.connect_lazy())
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE))
}

fn endpoint(identity: &Identity, address: &str) -> Result<Endpoint, tonic::transport::Error> {
    Endpoint::from_shared(format!("https://{address}"))?
        .tcp_nodelay(true)
        .connect_timeout(std::time::Duration::from_secs(2))
        .tls_config(identity.tonic_client_tls(Role::Coordinator))
}

enum Call {
    Append,
    Vote,
    Snapshot,
}

impl Connection {
    async fn call<Q, A, E>(
        &self,
        call: Call,
        request: &Q,
        option: &RPCOption,
    ) -> Result<A, RPCError<u64, BasicNode, RaftError<u64, E>>>
    where
        Q: Serialize,
        A: DeserializeOwned,
        E: std::error::Error + DeserializeOwned,
    {
        let mut client = match &self.client {
            Ok(client) => client.clone(),
            Err(error) => return Err(Unreachable::new(error).into()),
        };
        let message = rpc::RaftMessage { version: VERSION, body: encode(request) };
        let mut message = tonic::Request::new(message);
        message.set_timeout(option.hard_ttl());
        let answer = match call {
            Call::Append => client.append(message).await,
            Call::Vote => client.vote(message).await,
            Call::Snapshot => client.install_snapshot(message).await,
        };
        // openraft waits before the next try when a member is unreachable; it must not spin on one that is down.
        let body = answer.map_err(|status| Unreachable::new(&status))?.into_inner().body;
        let result: Result<A, RaftError<u64, E>> = serde_json::from_slice(&body)
            .map_err(|error| NetworkError::new(&AnyError::new(&error)))?;
        result.map_err(|error| RemoteError::new(self.target, error).into())
    }
}

impl RaftNetwork<Types> for Connection {
    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<Types>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<u64>, RPCError<u64, BasicNode, RaftError<u64>>> {
        self.call(Call::Append, &request, &option).await
    }

    async fn install_snapshot(
        &mut self,
        request: InstallSnapshotRequest<Types>,
        option: RPCOption,
    ) -> Result<
        InstallSnapshotResponse<u64>,
        RPCError<u64, BasicNode, RaftError<u64, InstallSnapshotError>>,
    > {
        self.call(Call::Snapshot, &request, &option).await
    }

    async fn vote(
        &mut self,
        request: VoteRequest<u64>,
        option: RPCOption,
    ) -> Result<VoteResponse<u64>, RPCError<u64, BasicNode, RaftError<u64>>> {
        self.call(Call::Vote, &request, &option).await
    }

    fn backoff(&self) -> openraft::network::Backoff {
        // A member that came back should be heard from well within an election.
        openraft::network::Backoff::new(std::iter::repeat(std::time::Duration::from_millis(200)))
    }
}
