//! Traces against a real OTLP receiver: what two processes do is one trace.

use std::net::SocketAddr;
use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::trace::v1::Span;
use outrider_process::tasks::TaskGroup;
use outrider_process::telemetry::propagate::{InjectTrace, extract};
use outrider_process::telemetry::{self, LogConfig, TelemetryConfig, TelemetryGuard};
use tokio::sync::mpsc;
use tonic::transport::Server;
use tracing::instrument::WithSubscriber;
use tracing::{Dispatch, Instrument};

const DEADLINE: Duration = Duration::from_secs(30);

/// A receiver as an operator runs it, keeping what arrives.
struct Receiver {
    spans: mpsc::Sender<(String, Span)>,
}

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        for resource in request.into_inner().resource_spans {
            let service = resource
                .resource
                .iter()
                .flat_map(|resource| &resource.attributes)
                .find(|attribute| attribute.key == "service.name")
                .map(|attribute| format!("{:?}", attribute.value))
                .unwrap_or_default();
            for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                self.spans.send((service.clone(), span)).await.expect("the test listens");
            }
        }
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

/// The "second process": a gRPC server that works in a span of its own.
struct Worker {
    dispatch: Dispatch,
}

#[tonic::async_trait]
impl TraceService for Worker {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        let work = async {
            let span = tracing::info_span!(target: "outrider_test", "segment.fsync");
            extract(request.metadata(), &span);
            async {}.instrument(span).await;
        };
        work.with_subscriber(self.dispatch.clone()).await;
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

async fn serve<S: TraceService>(service: S, group: &TaskGroup) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("bound");
    let router = Server::builder().add_service(TraceServiceServer::new(service));
    let stop = group.token().cancelled_owned();
    group.spawn("server", async move {
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        router.serve_with_incoming_shutdown(incoming, stop).await.expect("served");
    });
    address
}

fn process(role: &str, receiver: SocketAddr) -> (Dispatch, TelemetryGuard) {
    let config = TelemetryConfig {
        role: role.to_owned(),
        name: format!("{role}-1"),
        otlp_endpoint: Some(format!("http://{receiver}")),
        log: LogConfig { filter: "off".to_owned(), ..LogConfig::default() },
        host_events: false,
    };
    telemetry::build(&config).expect("started")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_trace_follows_a_call_into_another_process() {
    let group = TaskGroup::new("test");
    // Far more room than the spans of this test need.
    let (sender, mut arrived) = mpsc::channel(64);
    let receiver = serve(Receiver { spans: sender }, &group).await;
    let (coordinator, coordinator_guard) = process("coordinator", receiver);
    let (storage, storage_guard) = process("storage", receiver);
    let worker = serve(Worker { dispatch: storage }, &group).await;

    let call = async {
        let span = tracing::info_span!(target: "outrider_test", "job.decide");
        async {
            let channel = tonic::transport::Channel::from_shared(format!("http://{worker}"))
                .expect("well formed")
                .connect()
                .await
                .expect("connected");
            TraceServiceClient::with_interceptor(channel, InjectTrace)
                .export(ExportTraceServiceRequest::default())
                .await
                .expect("called");
        }
        .instrument(span)
        .await;
    };
    let task = async {
        let task = tracing::debug_span!(target: "outrider_test", "a task that never ends");
        call.instrument(task).await;
    };
    task.with_subscriber(coordinator).await;
    coordinator_guard.shutdown().await;
    storage_guard.shutdown().await;

    let mut spans = Vec::new();
    while spans.len() < 2 {
        let span = tokio::time::timeout(DEADLINE, arrived.recv()).await.expect("a span in time");
        spans.push(span.expect("the receiver lives"));
    }
    let named = |name: &str| {
        spans
            .iter()
            .find(|(_, span)| span.name == name)
            .unwrap_or_else(|| panic!("{name}: {spans:?}"))
    };
    let (decided_by, decide) = named("job.decide");
    let (synced_by, fsync) = named("segment.fsync");
    assert!(decided_by.contains("outrider-coordinator"), "{decided_by}");
    assert!(synced_by.contains("outrider-storage"), "{synced_by}");
    assert_eq!(fsync.trace_id, decide.trace_id);
    assert_eq!(fsync.parent_span_id, decide.span_id);
    assert!(decide.parent_span_id.is_empty(), "the task it ran in is not part of the trace");
    assert!(group.shutdown(DEADLINE).await.is_clean());
}
