//! A subscription: one thread that waits for events, and a bounded queue to its reader.

use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use super::apartment::Com;
use super::failure::Failure;
use super::overflow::Overflow;
use super::session::Session;
use super::status;
use crate::{EventStream, Object, WmiError};

/// Events waiting for their reader; beyond that they are lost, and the reader is told.
const EVENTS: usize = 1024;

/// Starts the thread and waits until the subscription stands, or is refused. The thread ends within a slice after the
/// stream was dropped, and when the provider is gone (then the stream ends).
pub(super) async fn subscribe(namespace: &str, wql: &str) -> Result<EventStream, WmiError> {
    let started = Instant::now();
    let doing = || status::Doing {
        namespace: namespace.to_owned(),
        what: wql.to_owned(),
        waited: started.elapsed(),
    };
    let (stands, standing) = oneshot::channel();
    let (sender, receiver) = mpsc::channel(EVENTS);
    let (space, query) = (namespace.to_owned(), wql.to_owned());
    std::thread::Builder::new()
        .name("wmi-events".into())
        .spawn(move || listen(&space, &query, stands, &sender))
        .map_err(|e| status::unreachable(format!("no thread: {e}"), doing()))?;
    match standing.await {
        Ok(Ok(())) => Ok(EventStream::new(receiver)),
        Ok(Err(Failure::Com { code, message })) => Err(status::error(code, &message, doing())),
        Ok(Err(_)) | Err(_) => Err(status::unreachable("the thread ended".into(), doing())),
    }
}

type Event = Result<Object, WmiError>;

fn listen(
    namespace: &str,
    wql: &str,
    stands: oneshot::Sender<Result<(), Failure>>,
    sender: &mpsc::Sender<Event>,
) {
    let opened = Com::enter().map_err(Failure::from).and_then(|com| {
        let session = Session::open(namespace)?;
        let events = session.listen(wql)?;
        Ok((events, session, com))
    });
    let (events, session, _com) = match opened {
        Ok(opened) => opened,
        Err(e) => {
            // The subscriber may have gone.
            let _ = stands.send(Err(e));
            return;
        }
    };
    if stands.send(Ok(())).is_err() {
        return;
    }
    let mut queue = Queue { sender, lost: false };
    let mut overflow = Overflow::default();
    while !sender.is_closed() {
        match session.next_event(&events) {
            Ok(Some(event)) => {
                overflow.works();
                queue.push(Ok(event));
            }
            Ok(None) => {
                overflow.works();
                queue.tell_lost();
            }
            // One event could not be read: the subscription goes on.
            Err(Failure::Arguments(_)) => queue.lose(),
            Err(Failure::Com { code: QUOTA, message }) => {
                queue.lose();
                match overflow.failed() {
                    Some(pause) => rest(pause, sender),
                    None => {
                        return end(Failure::Com { code: QUOTA, message }, namespace, wql, sender);
                    }
                }
            }
            Err(e) => return end(e, namespace, wql, sender),
        }
    }
}

/// `WBEM_E_QUOTA_VIOLATION`: WMI's own queue overflowed.
const QUOTA: u32 = 0x8004_106C;
/// How soon a pause notices that its reader has gone.
const SLICE: Duration = Duration::from_millis(200);

fn rest(pause: Duration, sender: &mpsc::Sender<Event>) {
    let until = Instant::now() + pause;
    while !sender.is_closed() && Instant::now() < until {
        std::thread::sleep(SLICE.min(until.saturating_duration_since(Instant::now())));
    }
}

/// The last thing that the reader is told. Waits for room in its queue, which it makes or drops.
fn end(failure: Failure, namespace: &str, wql: &str, sender: &mpsc::Sender<Event>) {
    tracing::warn!(%namespace, error = ?failure, "the subscription to WMI events ended");
    let doing = status::Doing {
        namespace: namespace.to_owned(),
        what: wql.to_owned(),
        waited: Duration::ZERO,
    };
    let error = match failure {
        Failure::Com { code, message } => status::error(code, &message, doing),
        other => status::unreachable(format!("the subscription ended: {other:?}"), doing),
    };
    // A reader that has gone does not want to know.
    let _ = sender.blocking_send(Err(error));
}

/// The reader's end, and whether it missed something.
struct Queue<'a> {
    sender: &'a mpsc::Sender<Event>,
    lost: bool,
}

impl Queue<'_> {
    fn lose(&mut self) {
        self.lost = true;
        self.tell_lost();
    }

    fn push(&mut self, event: Event) {
        self.tell_lost();
        if !self.lost && self.sender.try_send(event).is_err() {
            self.lost = true;
        }
    }

    fn tell_lost(&mut self) {
        if self.lost && self.sender.try_send(Err(WmiError::EventsLost)).is_ok() {
            self.lost = false;
        }
    }
}
