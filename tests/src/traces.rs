//! An OTLP receiver as an operator runs one; it keeps what arrives.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;

/// Listens until dropped.
#[derive(Debug)]
pub struct Receiver {
    /// Where.
    pub address: SocketAddr,
    spans: Arc<Mutex<Vec<Arrived>>>,
    server: JoinHandle<()>,
}

/// A span and the process that sent it.
#[derive(Debug, Clone)]
pub struct Arrived {
    /// `service.name`.
    pub service: String,
    /// The span.
    pub span: Span,
}

impl Receiver {
    /// Starts listening.
    pub async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let spans = Arc::new(Mutex::new(Vec::new()));
        let service = TraceServiceServer::new(Keeper { spans: Arc::clone(&spans) });
        let server = tokio::spawn(async move {
            let served = Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpListenerStream::new(listener));
            served.await.expect("the receiver serves");
        });
        Self { address, spans, server }
    }

    /// What arrived so far.
    #[must_use]
    pub fn spans(&self) -> Vec<Arrived> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.server.abort();
    }
}

struct Keeper {
    spans: Arc<Mutex<Vec<Arrived>>>,
}

#[tonic::async_trait]
impl TraceService for Keeper {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        let mut arrived = Vec::new();
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.map(|r| r.attributes).unwrap_or_default();
            let named = attributes.into_iter().find(|a| a.key == "service.name");
            let service = match named.and_then(|a| a.value).and_then(|v| v.value) {
                Some(Value::StringValue(name)) => name,
                other => format!("{other:?}"),
            };
            let spans = resource.scope_spans.into_iter().flat_map(|s| s.spans);
            arrived.extend(spans.map(|span| Arrived { service: service.clone(), span }));
        }
        self.spans.lock().unwrap_or_else(PoisonError::into_inner).extend(arrived);
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}
