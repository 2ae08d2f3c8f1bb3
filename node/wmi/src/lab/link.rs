//! One connection to the lab with many calls in flight; made anew by the next call when it broke.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::wire::{self, Answer, Ask, Reply, Request, Role};
use crate::{EventStream, Object, WmiError};

/// Requests waiting for the socket; beyond that callers wait.
const OUTGOING: usize = 256;
/// Events waiting for their reader; beyond that they are lost, and the reader is told.
const EVENTS: usize = 1024;

/// A client's end of a lab connection.
pub struct LabLink {
    addr: String,
    role: Role,
    timeout: Option<Duration>,
    live: tokio::sync::Mutex<Option<Arc<Live>>>,
}

impl LabLink {
    /// Connects and says hello as `role`. `timeout` bounds every call; `None` waits for ever.
    ///
    /// # Errors
    /// [`WmiError::Unreachable`] when nobody listens or the lab refuses the role.
    pub async fn connect(
        addr: impl std::fmt::Display,
        role: Role,
        timeout: Option<Duration>,
    ) -> Result<Self, WmiError> {
        let link =
            Self { addr: addr.to_string(), role, timeout, live: tokio::sync::Mutex::new(None) };
        link.live().await?;
        Ok(link)
    }

    /// Asks and waits for the answer; refusals become errors.
    ///
    /// # Cancel safety
    /// Dropping the future forgets the answer; the lab may still have acted.
    pub async fn call(&self, body: Ask) -> Result<Answer, WmiError> {
        let live = self.live().await?;
        self.call_on(&live, body).await
    }

    /// Asks for a subscription.
    pub async fn subscribe(&self, namespace: &str, wql: &str) -> Result<EventStream, WmiError> {
        let live = self.live().await?;
        let id = live.next_id();
        let (sender, receiver) = mpsc::channel(EVENTS);
        live.pending().streams.insert(id, Subscriber { sender, lost: false });
        let body = Ask::Subscribe { namespace: namespace.to_owned(), wql: wql.to_owned() };
        match self.exchange(&live, id, body).await {
            Ok(_) => Ok(EventStream::new(receiver)),
            Err(e) => {
                live.pending().streams.remove(&id);
                Err(e)
            }
        }
    }

    async fn live(&self) -> Result<Arc<Live>, WmiError> {
        let mut slot = self.live.lock().await;
        if let Some(live) = slot.as_ref()
            && !live.pending().closed
        {
            return Ok(live.clone());
        }
        let started = Instant::now();
        let stream =
            TcpStream::connect(&self.addr).await.map_err(|e| self.unreachable(started, &e))?;
        stream.set_nodelay(true).map_err(|e| self.unreachable(started, &e))?;
        let live = Arc::new(Live::start(stream));
        self.call_on(&live, Ask::Hello(self.role.clone())).await?;
        *slot = Some(live.clone());
        Ok(live)
    }

    async fn call_on(&self, live: &Live, body: Ask) -> Result<Answer, WmiError> {
        self.exchange(live, live.next_id(), body).await
    }

    async fn exchange(&self, live: &Live, id: u64, body: Ask) -> Result<Answer, WmiError> {
        let started = Instant::now();
        let frame = wire::encode(&Request { id, body }).map_err(|e| WmiError::Invalid {
            what: "request to the lab".into(),
            reason: e.to_string(),
        })?;
        let (sender, receiver) = oneshot::channel();
        {
            let mut pending = live.pending();
            if pending.closed {
                return Err(self.unreachable(started, &"the connection is closed"));
            }
            pending.answers.insert(id, sender);
        }
        let _forget = Forget { live, id };
        live.outgoing
            .send(frame)
            .await
            .map_err(|_| self.unreachable(started, &"the connection is closed"))?;
        let answer = match self.timeout {
            Some(limit) => tokio::time::timeout(limit, receiver)
                .await
                .map_err(|_| self.unreachable(started, &"no answer in time"))?,
            None => receiver.await,
        };
        match answer {
            Ok(Answer::Failed(refusal)) => Err(refusal.into_wmi(&self.addr)),
            Ok(answer) => Ok(answer),
            Err(_) => Err(self.unreachable(started, &"the connection broke while waiting")),
        }
    }

    fn unreachable(&self, started: Instant, reason: &dyn std::fmt::Display) -> WmiError {
        WmiError::Unreachable {
            endpoint: self.addr.clone(),
            waited: started.elapsed(),
            reason: reason.to_string(),
        }
    }
}

/// Removes the entry of a call whose future was dropped.
struct Forget<'a> {
    live: &'a Live,
    id: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.live.pending().answers.remove(&self.id);
    }
}

struct Live {
    outgoing: mpsc::Sender<Vec<u8>>,
    pending: Arc<Mutex<Pending>>,
    ids: AtomicU64,
    reader: JoinHandle<()>,
    writer: JoinHandle<()>,
}

#[derive(Default)]
struct Pending {
    answers: HashMap<u64, oneshot::Sender<Answer>>,
    streams: HashMap<u64, Subscriber>,
    closed: bool,
}

struct Subscriber {
    sender: mpsc::Sender<Result<Object, WmiError>>,
    lost: bool,
}

impl Live {
    fn start(stream: TcpStream) -> Self {
        let (read, write) = stream.into_split();
        let pending = Arc::new(Mutex::new(Pending::default()));
        let (outgoing, frames) = mpsc::channel(OUTGOING);
        let reader = tokio::spawn(read_replies(read, pending.clone()));
        let writer = tokio::spawn(write_frames(write, frames));
        Self { outgoing, pending, ids: AtomicU64::new(0), reader, writer }
    }

    fn next_id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        locked(&self.pending)
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.reader.abort();
        self.writer.abort();
    }
}

fn locked(pending: &Mutex<Pending>) -> MutexGuard<'_, Pending> {
    // Nothing in here can panic half way through a change.
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn write_frames(mut socket: OwnedWriteHalf, mut frames: mpsc::Receiver<Vec<u8>>) {
    while let Some(frame) = frames.recv().await {
        if let Err(e) = wire::write(&mut socket, &frame).await {
            tracing::debug!(error = %e, "lab connection broke while writing");
            return;
        }
    }
}

async fn read_replies(mut socket: OwnedReadHalf, pending: Arc<Mutex<Pending>>) {
    loop {
        match wire::read::<Reply>(&mut socket).await {
            Ok(Some(reply)) => locked(&pending).deliver(reply),
            Ok(None) => break,
            Err(e) => {
                tracing::debug!(error = %e, "lab connection broke");
                break;
            }
        }
    }
    let mut pending = locked(&pending);
    // Dropping the senders wakes every caller and ends every stream.
    pending.closed = true;
    pending.answers.clear();
    pending.streams.clear();
}

impl Pending {
    fn deliver(&mut self, reply: Reply) {
        match reply.body {
            Answer::Event(event) => self.push(reply.id, Ok(event)),
            Answer::EventsLost => self.push(reply.id, Err(WmiError::EventsLost)),
            // A subscription that was given up: its stream ends.
            Answer::Failed(_)
                if self.streams.contains_key(&reply.id)
                    && !self.answers.contains_key(&reply.id) =>
            {
                self.streams.remove(&reply.id);
            }
            answer => {
                if let Some(sender) = self.answers.remove(&reply.id) {
                    // A caller that stopped waiting is no fault.
                    let _ = sender.send(answer);
                }
            }
        }
    }

    fn push(&mut self, id: u64, event: Result<Object, WmiError>) {
        let Some(subscriber) = self.streams.get_mut(&id) else { return };
        if subscriber.lost {
            match subscriber.sender.try_send(Err(WmiError::EventsLost)) {
                Ok(()) => subscriber.lost = false,
                Err(mpsc::error::TrySendError::Full(_)) => return,
                Err(mpsc::error::TrySendError::Closed(_)) => {
                    self.streams.remove(&id);
                    return;
                }
            }
        }
        match subscriber.sender.try_send(event) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => subscriber.lost = true,
            Err(mpsc::error::TrySendError::Closed(_)) => {
                self.streams.remove(&id);
            }
        }
    }
}
