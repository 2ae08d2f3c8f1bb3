//! Logs, and traces that cross processes.
//!
//! Every process calls [`init`] once. Spans of our own crates go to an OTLP receiver if one is
//! configured; spans of libraries do not, or the exporter's own calls would be traced for ever.
//! The trace goes from process to process as a W3C `traceparent` ([`propagate`]).

#[cfg(windows)]
pub mod event_log;
pub mod host_events;
pub mod propagate;

use std::fs::OpenOptions;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
pub use propagate::{current_traceparent, set_parent};
use serde::Deserialize;
use tracing::Dispatch;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, filter};

/// How long a shutdown waits for the last spans to leave.
const FLUSH: Duration = Duration::from_secs(3);

/// What a process tells about itself, and to whom.
#[derive(Debug, Clone)]
pub struct TelemetryConfig {
    /// Its role, part of the service name.
    pub role: String,
    /// Its name in the fabric.
    pub name: String,
    /// The OTLP receiver, such as `http://127.0.0.1:4317` (gRPC in plain text: keep it on this
    /// machine or inside the cluster); none: no traces.
    pub otlp_endpoint: Option<String>,
    /// The log.
    pub log: LogConfig,
    /// Whether events with a number go to the machine's event log, too (Windows).
    pub host_events: bool,
}

/// `[telemetry]` of a configuration.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TraceConfig {
    /// The OTLP receiver (gRPC), such as `http://127.0.0.1:4317`; absent: traces go nowhere.
    pub otlp_endpoint: Option<String>,
}

/// `[log]` of a configuration.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// Text for people or JSON for machines.
    pub format: LogFormat,
    /// A filter such as `info,outrider_storage=debug`; the variable OUTRIDER_LOG goes first.
    pub filter: String,
    /// A file to append to; none: standard error.
    pub file: Option<PathBuf>,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { format: LogFormat::Text, filter: "info".to_owned(), file: None }
    }
}

/// The form of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One line for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Telemetry that cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter is malformed.
    #[error(
        "[log] filter {filter:?} is no log filter; write for example info,outrider_storage=debug"
    )]
    Filter {
        /// As configured.
        filter: String,
        /// Why.
        source: filter::ParseError,
    },
    /// The log file cannot be opened.
    #[error("cannot open the log file {path}; set [log] file to a place that this user may write")]
    LogFile {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The exporter refuses its endpoint.
    #[error("cannot export traces to {endpoint}; write for example http://127.0.0.1:4317")]
    Exporter {
        /// As configured.
        endpoint: String,
        /// Why.
        source: opentelemetry_otlp::ExporterBuildError,
    },
    /// Called twice.
    #[error("telemetry was started twice in one process; this is a bug, please report it")]
    Twice,
}

/// Keeps telemetry alive; flushes what is left when it goes.
#[must_use = "dropping the guard ends the export of traces"]
#[derive(Debug)]
pub struct TelemetryGuard {
    provider: Option<SdkTracerProvider>,
}

impl TelemetryGuard {
    /// Exports all finished spans.
    ///
    /// The exporter needs the runtime to make progress, so this waits on a thread of its own.
    pub async fn flush(&self) {
        if let Some(provider) = self.provider.clone() {
            let flushed = tokio::task::spawn_blocking(move || provider.force_flush()).await;
            if !matches!(flushed, Ok(Ok(()))) {
                tracing::debug!("traces were not exported in time");
            }
        }
    }

    /// Exports all finished spans and ends.
    pub async fn shutdown(mut self) {
        if let Some(provider) = self.provider.take() {
            // A receiver that is gone must not fail the process that leaves.
            let _ =
                tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(FLUSH)).await;
        }
    }
}

impl Drop for TelemetryGuard {
    fn drop(&mut self) {
        if let Some(provider) = self.provider.take() {
            let _ = provider.shutdown_with_timeout(FLUSH);
        }
    }
}

/// Starts logs and traces of this process; call it inside the tokio runtime, once.
///
/// # Errors
/// [`TelemetryError`].
pub fn init(config: &TelemetryConfig) -> Result<TelemetryGuard, TelemetryError> {
    let (dispatch, guard) = build(config)?;
    tracing::dispatcher::set_global_default(dispatch).map_err(|_| TelemetryError::Twice)?;
    Ok(guard)
}

/// As [`init`], for a part of a process; the caller decides where the dispatch holds.
///
/// # Errors
/// [`TelemetryError`].
pub fn build(config: &TelemetryConfig) -> Result<(Dispatch, TelemetryGuard), TelemetryError> {
    let provider =
        config.otlp_endpoint.as_deref().map(|endpoint| exporter(config, endpoint)).transpose()?;
    let traces = provider.as_ref().map(|provider| {
        tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("outrider"))
            .with_filter(filter::filter_fn(is_traced))
    });
    #[cfg(windows)]
    let host = config.host_events.then_some(host_events::HostEvents(host_events::WindowsLog));
    // The journal of other systems keeps what the process writes.
    #[cfg(not(windows))]
    let host: Option<filter::LevelFilter> = None;
    let subscriber = Registry::default().with(log_layer(&config.log)?).with(traces).with(host);
    Ok((Dispatch::new(subscriber), TelemetryGuard { provider }))
}

/// Our own spans of INFO and above. The spans of long-lived tasks are DEBUG: as parents they would
/// make one endless trace of everything a process ever did.
fn is_traced(metadata: &tracing::Metadata<'_>) -> bool {
    *metadata.level() <= tracing::Level::INFO && metadata.target().starts_with("outrider")
}

fn exporter(config: &TelemetryConfig, endpoint: &str) -> Result<SdkTracerProvider, TelemetryError> {
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .with_timeout(FLUSH)
        .build()
        .map_err(|source| TelemetryError::Exporter { endpoint: endpoint.to_owned(), source })?;
    let resource = Resource::builder()
        .with_service_name(format!("outrider-{}", config.role))
        .with_attribute(KeyValue::new("service.instance.id", config.name.clone()))
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .build();
    Ok(SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build())
}

fn log_layer<S>(config: &LogConfig) -> Result<Box<dyn Layer<S> + Send + Sync>, TelemetryError>
where
    S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
{
    let directives = std::env::var("OUTRIDER_LOG").unwrap_or_else(|_| config.filter.clone());
    let filter = EnvFilter::try_new(&directives)
        .map_err(|source| TelemetryError::Filter { filter: directives, source })?;
    let layer = match &config.file {
        Some(path) => {
            let file = OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .map_err(|source| TelemetryError::LogFile { path: path.clone(), source })?;
            written_to(config.format, Arc::new(file))
        }
        None => written_to(config.format, std::io::stderr),
    };
    Ok(layer.with_filter(filter).boxed())
}

fn written_to<S, W>(format: LogFormat, writer: W) -> Box<dyn Layer<S> + Send + Sync>
where
    S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let layer = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(false);
    match format {
        LogFormat::Text => layer.boxed(),
        LogFormat::Json => layer.json().flatten_event(true).boxed(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(log: LogConfig) -> TelemetryConfig {
        TelemetryConfig {
            role: "storage".to_owned(),
            name: "s-1".to_owned(),
            otlp_endpoint: None,
            log,
            host_events: false,
        }
    }

    #[test]
    fn json_lines_go_to_the_file_and_the_filter_holds() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("log");
        let log =
            LogConfig { format: LogFormat::Json, file: Some(path.clone()), ..LogConfig::default() };
        let (dispatch, _guard) = build(&config(log)).expect("started");
        tracing::dispatcher::with_default(&dispatch, || {
            tracing::info!(host = "호스트", "shown");
            tracing::debug!("hidden");
        });
        let text = std::fs::read_to_string(&path).expect("written");
        let line: serde_json::Value = serde_json::from_str(text.trim()).expect("one JSON line");
        assert_eq!(line["message"], "shown");
        assert_eq!(line["host"], "호스트");
    }

    #[test]
    fn a_bad_filter_or_file_is_named() {
        let log = LogConfig { filter: "a=b=c".to_owned(), ..LogConfig::default() };
        assert!(matches!(build(&config(log)), Err(TelemetryError::Filter { .. })));
        let log = LogConfig { file: Some("/nowhere/log".into()), ..LogConfig::default() };
        assert!(matches!(build(&config(log)), Err(TelemetryError::LogFile { .. })));
    }
}
