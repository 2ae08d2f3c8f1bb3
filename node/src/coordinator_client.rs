//! What a job asks of the coordinators' leader. A trait, so that jobs are tested without one.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use outrider_process::leader::LeaderClient;
use outrider_process::telemetry::propagate::InjectTrace;
use outrider_proto::error_code::Class;
use outrider_proto::rpc::agent_client::AgentClient;
use outrider_proto::rpc::{
    AskReply, AskRequest, BindReply, BindRequest, CommitReply, CommitRequest, Duty, FinishRequest,
    RaiseIncarnationRequest, RecordDutyRequest, UpdateDutyRequest,
};
use outrider_proto::{error_code, status};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// Why the coordinator did not do what was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CoordinatorError {
    /// Another lease holds the job, or the VM moved.
    #[error("the coordinator says superseded: {reason}")]
    Superseded {
        /// Its sentence.
        reason: String,
    },
    /// Refused on purpose.
    #[error("the coordinator refused to {doing}: {reason}")]
    Refused {
        /// What was asked.
        doing: &'static str,
        /// Its sentence.
        reason: String,
    },
    /// Nobody leads or answers; the outcome is unknown.
    #[error("no coordinator could {doing}: {reason}")]
    Unavailable {
        /// What was asked.
        doing: &'static str,
        /// The last failure.
        reason: String,
    },
}

/// The calls of a job. Each is idempotent, so an unknown outcome is cured by calling again.
#[async_trait]
pub trait Coordinator: Send + Sync + 'static {
    /// Records a duty, before the checkpoint is created.
    async fn record_duty(&self, request: RecordDutyRequest) -> Result<Duty, CoordinatorError>;
    /// Tells what became of a duty.
    async fn update_duty(&self, request: UpdateDutyRequest) -> Result<Duty, CoordinatorError>;
    /// Proposes the recovery point.
    async fn commit(&self, request: CommitRequest) -> Result<CommitReply, CoordinatorError>;
    /// Binds the point to a reference point.
    async fn bind(&self, request: BindRequest) -> Result<BindReply, CoordinatorError>;
    /// What is known of the VM and the job.
    async fn ask(&self, request: AskRequest) -> Result<AskReply, CoordinatorError>;
    /// Clears the bindings, before a disk is written by us; gives the new incarnation.
    async fn raise_incarnation(
        &self,
        request: RaiseIncarnationRequest,
    ) -> Result<u64, CoordinatorError>;
    /// Ends the attempt.
    async fn finish(&self, request: FinishRequest) -> Result<(), CoordinatorError>;
}

/// The coordinators over gRPC.
pub struct GrpcCoordinator {
    leader: Arc<LeaderClient>,
    patience: Duration,
}

type Client = AgentClient<InterceptedService<Channel, InjectTrace>>;

impl GrpcCoordinator {
    /// Calls at whoever leads, for as long as `patience` each.
    #[must_use]
    pub fn new(leader: Arc<LeaderClient>, patience: Duration) -> Self {
        Self { leader, patience }
    }

    async fn call<Q, A, F, Fut>(
        &self,
        doing: &'static str,
        request: Q,
        call: F,
    ) -> Result<A, CoordinatorError>
    where
        Q: Clone,
        F: Fn(Client, Q) -> Fut,
        Fut: Future<Output = Result<tonic::Response<A>, Status>>,
    {
        let answer = self
            .leader
            .call(self.patience, |channel| {
                let call =
                    call(AgentClient::with_interceptor(channel, InjectTrace), request.clone());
                async move { call.await.map(tonic::Response::into_inner) }
            })
            .await;
        answer.map_err(|status| classify(doing, &status))
    }
}

fn classify(doing: &'static str, failure: &Status) -> CoordinatorError {
    let reason = failure.message().to_owned();
    let class = status::detail(failure).and_then(|d| error_code::find(&d.code)).map(|c| c.class);
    match (class, failure.code()) {
        (Some(Class::Superseded), _) | (None, Code::Aborted) => {
            CoordinatorError::Superseded { reason }
        }
        (Some(Class::Retry), _)
        | (None, Code::Unavailable | Code::DeadlineExceeded | Code::Unknown | Code::Cancelled) => {
            CoordinatorError::Unavailable { doing, reason }
        }
        _ => CoordinatorError::Refused { doing, reason },
    }
}

#[async_trait]
impl Coordinator for GrpcCoordinator {
    async fn record_duty(&self, request: RecordDutyRequest) -> Result<Duty, CoordinatorError> {
        const DOING: &str = "record the duty to remove a checkpoint";
        let reply =
            self.call(DOING, request, |mut c, q| async move { c.record_duty(q).await }).await?;
        reply.duty.ok_or(CoordinatorError::Refused {
            doing: DOING,
            reason: "no duty in its answer".into(),
        })
    }

    async fn update_duty(&self, request: UpdateDutyRequest) -> Result<Duty, CoordinatorError> {
        const DOING: &str = "update a duty";
        let reply =
            self.call(DOING, request, |mut c, q| async move { c.update_duty(q).await }).await?;
        reply.duty.ok_or(CoordinatorError::Refused {
            doing: DOING,
            reason: "no duty in its answer".into(),
        })
    }

    async fn commit(&self, request: CommitRequest) -> Result<CommitReply, CoordinatorError> {
        self.call("commit a recovery point", request, |mut c, q| async move { c.commit(q).await })
            .await
    }

    async fn bind(&self, request: BindRequest) -> Result<BindReply, CoordinatorError> {
        self.call("bind a reference point", request, |mut c, q| async move { c.bind(q).await })
            .await
    }

    async fn ask(&self, request: AskRequest) -> Result<AskReply, CoordinatorError> {
        self.call("tell what is known of a VM", request, |mut c, q| async move { c.ask(q).await })
            .await
    }

    async fn raise_incarnation(
        &self,
        request: RaiseIncarnationRequest,
    ) -> Result<u64, CoordinatorError> {
        let reply = self
            .call("raise a VM's incarnation", request, |mut c, q| async move {
                c.raise_incarnation(q).await
            })
            .await?;
        Ok(reply.incarnation)
    }

    async fn finish(&self, request: FinishRequest) -> Result<(), CoordinatorError> {
        self.call("end an attempt", request, |mut c, q| async move { c.finish(q).await }).await?;
        Ok(())
    }
}
