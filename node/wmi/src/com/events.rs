//! A subscription: one thread that waits for events, and a bounded queue to its reader.

use tokio::sync::{mpsc, oneshot};

use super::apartment::Com;
use super::session::{Failure, Session};
use super::status;
use crate::{EventStream, Object, WmiError};

/// Events waiting for their reader; beyond that they are lost, and the reader is told.
const EVENTS: usize = 1024;

/// Starts the thread and waits until the subscription stands, or is refused. The thread ends within a slice after the
/// stream was dropped, and when the provider is gone (then the stream ends).
pub(super) async fn subscribe(namespace: &str, wql: &str) -> Result<EventStream, WmiError> {
    let started = std::time::Instant::now();
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
    while !sender.is_closed() {
        match session.next_event(&events) {
            Ok(Some(event)) => queue.push(Ok(event)),
            Ok(None) => queue.tell_lost(),
            // WMI's own queue overflowed, or one event could not be read: the subscription goes on.
            Err(Failure::Com { code: 0x8004_106C, .. } | Failure::Arguments(_)) => {
                queue.lost = true;
                queue.tell_lost();
            }
            Err(e) => {
                tracing::warn!(%namespace, error = ?e, "the subscription to WMI events ended");
                return;
            }
        }
    }
}

/// The reader's end, and whether it missed something.
struct Queue<'a> {
    sender: &'a mpsc::Sender<Event>,
    lost: bool,
}

impl Queue<'_> {
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
