//! The plain-HTTP port for machines that watch: `/metrics`, `/healthz`, `/readyz`.
//!
//! It shows no secrets and changes nothing; keep it on a network of the operators.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::sync::watch;

use crate::metrics::Metrics;
use crate::ports::{self, BindError};
use crate::tasks::TaskGroup;

/// Whether work should be sent to this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    /// It serves.
    Ready,
    /// It does not, for this reason.
    NotReady(String),
}

impl Readiness {
    /// The state of a process that has just begun.
    pub fn starting() -> Self {
        Self::NotReady("starting".to_owned())
    }
}

#[derive(Clone)]
struct Watched {
    metrics: Arc<Metrics>,
    readiness: watch::Receiver<Readiness>,
}

/// Serves until the group is asked to stop; returns the bound address.
///
/// # Errors
/// [`BindError`].
pub async fn serve(
    address: SocketAddr,
    metrics: Arc<Metrics>,
    readiness: watch::Receiver<Readiness>,
    group: &TaskGroup,
) -> Result<SocketAddr, BindError> {
    const SETTING: &str = "observability";
    let listener = ports::bind_tcp(address, SETTING).await?;
    let bound = listener.local_addr().map_err(|source| BindError::Other {
        address,
        setting: SETTING.to_owned(),
        source,
    })?;
    let app = Router::new()
        .route("/metrics", get(show_metrics))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(show_readiness))
        .with_state(Watched { metrics, readiness });
    let token = group.token();
    group.spawn("observability", async move {
        let stop = token.clone().cancelled_owned();
        // A client that keeps its connection open must not hold up the shutdown.
        tokio::select! {
            served = axum::serve(listener, app).with_graceful_shutdown(stop) => {
                if let Err(error) = served {
                    tracing::error!(%error, "the observability port failed");
                }
            }
            () = token.cancelled() => {}
        }
    });
    Ok(bound)
}

/// OpenMetrics for those that ask for it (Prometheus does), the older text for all others.
async fn show_metrics(State(watched): State<Watched>, headers: HeaderMap) -> impl IntoResponse {
    const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    const CLASSIC: &str = "text/plain; version=0.0.4; charset=utf-8";
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
    if accept.is_some_and(|accept| accept.contains("application/openmetrics-text")) {
        ([(header::CONTENT_TYPE, OPEN_METRICS)], watched.metrics.render())
    } else {
        ([(header::CONTENT_TYPE, CLASSIC)], watched.metrics.render_classic())
    }
}

async fn show_readiness(State(watched): State<Watched>) -> (StatusCode, String) {
    let readiness = watched.readiness.borrow().clone();
    match readiness {
        Readiness::Ready => (StatusCode::OK, "ready\n".to_owned()),
        Readiness::NotReady(reason) => {
            (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {reason}\n"))
        }
    }
}
