//! The storage nodes' side: one stream each.

use std::sync::Arc;

use outrider_process::identity::Role;
use outrider_process::tasks::TaskSpawner;
use outrider_proto::layout::StorageNode;
use outrider_proto::model::required;
use outrider_proto::rpc;
use outrider_proto::rpc::storage_registry_server::{StorageRegistry, StorageRegistryServer};
use outrider_proto::rpc::storage_up::What;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::peer;
use crate::leader::Leader;

/// Serves storage nodes.
pub(crate) struct StorageService {
    leader: Arc<Leader>,
    tasks: TaskSpawner,
}

impl StorageService {
    pub(crate) fn server(leader: Arc<Leader>, tasks: TaskSpawner) -> StorageRegistryServer<Self> {
        StorageRegistryServer::new(Self { leader, tasks })
    }
}

#[tonic::async_trait]
impl StorageRegistry for StorageService {
    type AttachStream = ReceiverStream<Result<rpc::StorageDown, Status>>;

    async fn attach(
        &self,
        request: Request<Streaming<rpc::StorageUp>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let peer = peer::require(&request, Role::Storage)?;
        let mut up = request.into_inner();
        let hello = match up.message().await?.and_then(|m| m.what) {
            Some(What::Hello(hello)) => hello,
            _ => return Err(Status::invalid_argument("the first message must be StorageHello")),
        };
        let node = required("StorageHello", "node", hello.node.as_ref())?;
        let mut node = StorageNode::try_from(node)?;
        peer::same_name(&peer, &node.name)?;
        node.online = false;
        let (session, down) = self
            .leader
            .attach_storage(node)
            .await
            .map_err(|error| super::attach(&self.leader, error))?;
        let leader = Arc::clone(&self.leader);
        let stop = self.tasks.token();
        self.tasks.spawn("storage session", async move {
            loop {
                let message = tokio::select! {
                    () = stop.cancelled() => break,
                    () = session.over.cancelled() => break,
                    message = up.message() => message,
                };
                match message.map(|m| m.and_then(|m| m.what)) {
                    Ok(Some(What::Status(status))) => leader.storage_status(&session, status),
                    Ok(Some(What::Hello(_))) => {}
                    Ok(None) | Err(_) => break,
                }
            }
            leader.detach_storage(&session);
        });
        Ok(Response::new(ReceiverStream::new(down)))
    }
}
