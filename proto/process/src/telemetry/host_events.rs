//! What a machine's own log of events is told: few things, with numbers that never change, so that the monitoring of a
//! Windows host can act on them. On other systems the numbers stand in the log as the field `event_id`.

use std::fmt::Write as _;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// The agent started.
pub const STARTED: u32 = 100;
/// The agent ended in order.
pub const STOPPED: u32 = 101;
/// The agent could not run.
pub const FAILED: u32 = 102;
/// The coordinators welcomed the agent.
pub const CONNECTED: u32 = 110;
/// No coordinator has been reached for a while.
pub const DISCONNECTED: u32 = 111;
/// An attempt of a job failed.
pub const JOB_FAILED: u32 = 120;
/// Something of ours is left on the host.
pub const HOST_UNCLEAN: u32 = 121;
/// The certificate was not renewed.
pub const NOT_RENEWED: u32 = 130;

/// All of them: number, kind as Windows calls it, meaning. `docs/operations/hosts.md` lists them.
pub const ALL: [(u32, Kind, &str); 8] = [
    (STARTED, Kind::Information, "The agent started."),
    (STOPPED, Kind::Information, "The agent ended in order."),
    (FAILED, Kind::Error, "The agent could not run; the text says why."),
    (CONNECTED, Kind::Information, "The coordinators welcomed the agent."),
    (DISCONNECTED, Kind::Warning, "No coordinator has been reached for 30 seconds."),
    (JOB_FAILED, Kind::Warning, "An attempt of a job on this host failed."),
    (
        HOST_UNCLEAN,
        Kind::Warning,
        "A checkpoint or reference point of ours could not be removed yet.",
    ),
    (NOT_RENEWED, Kind::Warning, "The host's certificate was not renewed."),
];

/// Kinds of events, as Windows has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Everything is well.
    Information,
    /// We cope.
    Warning,
    /// Somebody must act.
    Error,
}

/// Where events go.
pub trait EventSink: Send + Sync + 'static {
    /// Writes one event. It cannot fail for the caller: a log that is full is no reason to stop.
    fn write(&self, kind: Kind, id: u32, text: &str);
}

/// Hands events with an `event_id` on.
#[derive(Debug)]
pub struct HostEvents<S>(pub S);

impl<S: EventSink, C: Subscriber> Layer<C> for HostEvents<S> {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, C>) {
        let mut seen = Seen::default();
        event.record(&mut seen);
        let Some(id) = seen.id else { return };
        let kind = match *event.metadata().level() {
            Level::ERROR => Kind::Error,
            Level::WARN => Kind::Warning,
            _ => Kind::Information,
        };
        self.0.write(kind, id, &format!("{}{}", seen.message, seen.fields));
    }
}

#[derive(Default)]
struct Seen {
    id: Option<u32>,
    message: String,
    fields: String,
}

impl Visit for Seen {
    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "event_id" {
            self.id = u32::try_from(value).ok();
        } else {
            self.record_debug(field, &value);
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
        } else {
            let _ = write!(self.fields, "\r\n{}: {value:?}", field.name());
        }
    }
}

/// The event log of Windows, under the source that an installation registered.
#[cfg(windows)]
#[derive(Debug)]
pub struct WindowsLog;

#[cfg(windows)]
impl EventSink for WindowsLog {
    fn write(&self, kind: Kind, id: u32, text: &str) {
        super::event_log::report(kind, id, text);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<(Kind, u32, String)>>>);

    impl EventSink for Kept {
        fn write(&self, kind: Kind, id: u32, text: &str) {
            self.0.lock().expect("no panic").push((kind, id, text.to_owned()));
        }
    }

    #[test]
    fn only_events_with_a_number_are_told_with_their_facts() {
        let kept = Kept::default();
        let subscriber = tracing_subscriber::registry().with(HostEvents(kept.clone()));
        tracing::subscriber::with_default(subscriber, || {
            tracing::error!("no number");
            tracing::warn!(event_id = JOB_FAILED, vm = "서울", error = %"no space", "a job failed");
        });
        let kept = kept.0.lock().expect("no panic");
        let text = "a job failed\r\nvm: 서울\r\nerror: no space".to_owned();
        assert_eq!(*kept, [(Kind::Warning, JOB_FAILED, text)]);
    }

    #[test]
    fn numbers_are_unique_and_such_that_every_windows_has_a_text_for_them() {
        for (at, (id, _, meaning)) in ALL.iter().enumerate() {
            assert!(ALL[..at].iter().all(|(other, ..)| other != id), "{id} twice");
            // The message file of an installation, EventCreate.exe, knows 1 to 1000.
            assert!((1..=1000).contains(id) && !meaning.is_empty());
        }
    }
}
