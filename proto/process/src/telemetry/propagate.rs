//! W3C Trace Context (Recommendation of 2021-11-23, section 3.2) between our processes.

use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState};
use tonic::metadata::MetadataMap;
use tonic::service::Interceptor;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// The header's name, in gRPC metadata and in our own frames.
pub const TRACEPARENT: &str = "traceparent";

/// The current span as a `traceparent`; `None` when it is not traced.
pub fn current_traceparent() -> Option<String> {
    let context = tracing::Span::current().context();
    let span = context.span();
    let span = span.span_context();
    span.is_valid().then(|| {
        format!("00-{}-{}-{:02x}", span.trace_id(), span.span_id(), span.trace_flags().to_u8())
    })
}

/// Makes a span the child of a remote one; call it before the span is entered.
///
/// A malformed `traceparent` is ignored: traces must never fail the work they follow.
pub fn set_parent(span: &tracing::Span, traceparent: &str) {
    if let Some(remote) = parse(traceparent) {
        let parent = opentelemetry::Context::new().with_remote_span_context(remote);
        // Refused only for spans that no trace layer records.
        let _ = span.set_parent(parent);
    }
}

/// Adds the current span to outgoing metadata.
pub fn inject(metadata: &mut MetadataMap) {
    if let Some(value) = current_traceparent().and_then(|text| text.parse().ok()) {
        metadata.insert(TRACEPARENT, value);
    }
}

/// Makes a span the child of the one in incoming metadata, if there is one.
pub fn extract(metadata: &MetadataMap, span: &tracing::Span) {
    if let Some(value) = metadata.get(TRACEPARENT).and_then(|value| value.to_str().ok()) {
        set_parent(span, value);
    }
}

/// Sends the current span with every request of a tonic client.
#[derive(Debug, Clone, Copy, Default)]
pub struct InjectTrace;

impl Interceptor for InjectTrace {
    fn call(
        &mut self,
        mut request: tonic::Request<()>,
    ) -> Result<tonic::Request<()>, tonic::Status> {
        inject(request.metadata_mut());
        Ok(request)
    }
}

fn parse(traceparent: &str) -> Option<SpanContext> {
    let mut parts = traceparent.split('-');
    let (version, trace, span, flags) =
        (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    // Later versions may append parts; version 00 has exactly four, and ff is forbidden.
    let lengths = (version.len(), trace.len(), span.len(), flags.len());
    if lengths != (2, 32, 16, 2) || version == "ff" || version == "00" && parts.next().is_some() {
        return None;
    }
    let context = SpanContext::new(
        TraceId::from_hex(trace).ok()?,
        SpanId::from_hex(span).ok()?,
        TraceFlags::new(u8::from_str_radix(flags, 16).ok()?),
        true,
        TraceState::default(),
    );
    context.is_valid().then_some(context)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_traceparent_is_read_as_the_recommendation_says() {
        let trace = "0af7651916cd43dd8448eb211c80319c";
        let good = parse(&format!("00-{trace}-b7ad6b7169203331-01")).expect("good");
        assert_eq!(good.trace_id().to_string(), trace);
        assert!(good.is_sampled() && good.is_remote());
        assert!(parse(&format!("01-{trace}-b7ad6b7169203331-01-more")).is_some());
        for bad in [
            String::new(),
            format!("00-{trace}-b7ad6b7169203331"),
            format!("00-{trace}-b7ad6b7169203331-01-more"),
            format!("ff-{trace}-b7ad6b7169203331-01"),
            format!("00-{trace}-0000000000000000-01"),
            "00-00000000000000000000000000000000-b7ad6b7169203331-01".to_owned(),
            format!("00-{trace}-b7ad6b716920333x-01"),
        ] {
            assert!(parse(&bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn without_traces_there_is_no_traceparent() {
        assert_eq!(current_traceparent(), None);
    }
}
