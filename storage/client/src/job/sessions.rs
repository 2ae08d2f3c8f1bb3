//! One session per storage node, made when needed and again after a loss, with a pause that grows.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use outrider_process::backoff::Backoff;
use outrider_process::tasks::{TaskGroup, TaskSpawner};
use outrider_proto::frame::Presence;
use outrider_proto::ids::{ChunkId, LayoutEpoch, PgId, SessionId, Window};
use outrider_proto::layout::StorageNode;
use tokio::time::Instant;

use crate::client::JobAccess;
use crate::error::TransportError;
use crate::limits::Limits;
use crate::put_queue::{PutQueue, QueueLimits};
use crate::transport::{ChunkSession, ChunkTransport, Opening, WindowHead};

use super::window::{Number, OpenWindow};

/// A live session with one node and the window that is open in it.
pub(super) struct NodeSession {
    link: Arc<dyn ChunkSession>,
    queue: PutQueue,
    epoch: LayoutEpoch,
    window: Mutex<Arc<OpenWindow>>,
    given_up: OnceLock<TransportError>,
}

impl NodeSession {
    fn new(
        link: Arc<dyn ChunkSession>,
        access: &JobAccess,
        session: SessionId,
        epoch: LayoutEpoch,
        limits: &Limits,
        tasks: &TaskSpawner,
    ) -> Self {
        let queue_limits = QueueLimits { records: 1024, batch: limits.batch, lanes: limits.lanes };
        let head = WindowHead { job: access.job, session, window: Window(1), layout_epoch: epoch };
        Self {
            queue: PutQueue::start(Arc::clone(&link), queue_limits, tasks),
            link,
            epoch,
            window: Mutex::new(Arc::new(OpenWindow::new(head))),
            given_up: OnceLock::new(),
        }
    }

    pub(super) fn node(&self) -> &str {
        &self.link.opened().node
    }

    pub(super) fn link(&self) -> &dyn ChunkSession {
        &*self.link
    }

    pub(super) fn queue(&self) -> &PutQueue {
        &self.queue
    }

    /// Gives a put its number in the open window; `None` once the session was given up, since nobody would look at its
    /// window again.
    pub(super) fn number(&self, pg: PgId, id: ChunkId, sealed_bytes: u64) -> Option<Number> {
        let window = self.lock();
        self.given_up.get().is_none().then(|| window.number(pg, id, sealed_bytes))
    }

    /// Asks for ids; every yes is counted in the window that was open when the question was asked.
    pub(super) async fn have(
        &self,
        asked: Vec<(Option<PgId>, ChunkId)>,
    ) -> Result<Vec<Presence>, TransportError> {
        let (window, _token) = {
            let window = self.lock();
            (Arc::clone(&window), window.requests.token())
        };
        let answers =
            self.link.have(window.head, asked.iter().map(|&(_, id)| id).collect()).await?;
        if answers.len() != asked.len() {
            return Err(TransportError::Protocol {
                node: self.node().to_owned(),
                what: format!("{} answers to {} ids", answers.len(), asked.len()),
            });
        }
        for (&(pg, id), answer) in asked.iter().zip(&answers) {
            if let (Presence::Yes, Some(pg)) = (answer, pg) {
                window.add_have(pg, id);
            }
        }
        Ok(answers)
    }

    /// Closes the open window and opens the next one.
    pub(super) fn close_window(&self) -> Arc<OpenWindow> {
        let mut window = self.lock();
        let mut head = window.head;
        head.window = head.window.next();
        std::mem::replace(&mut *window, Arc::new(OpenWindow::new(head)))
    }

    /// Whether anything was put or confirmed since the last barrier, or is on its way.
    pub(super) fn has_work(&self) -> bool {
        let window = self.lock();
        !window.is_empty() || !window.requests.is_empty()
    }

    /// Nothing more is sent over this session; its open window will be asked for elsewhere.
    pub(super) fn give_up(&self, error: &TransportError) {
        {
            // Under the window's lock: whatever got a number got it before.
            let _window = self.lock();
            let _ = self.given_up.set(error.clone());
        }
        self.link.close();
    }

    pub(super) fn is_usable(&self) -> bool {
        self.given_up.get().is_none() && !self.link.is_closed() && !self.queue.has_failed()
    }

    /// Why it is not usable.
    pub(super) fn failure(&self) -> TransportError {
        let known = self.queue.failure().or_else(|| self.given_up.get());
        known.cloned().unwrap_or_else(|| TransportError::Lost {
            node: self.node().to_owned(),
            why: "the connection was closed".to_owned(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Arc<OpenWindow>> {
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Connecting = Shared<BoxFuture<'static, Result<Arc<NodeSession>, TransportError>>>;

enum Slot {
    /// The error is that of the last attempt: nobody waits for a node that did not answer before.
    Connecting(Connecting, Option<TransportError>),
    Up(Arc<NodeSession>),
    Down {
        until: Instant,
        error: TransportError,
    },
}

struct Place {
    slot: Slot,
    backoff: Backoff,
}

impl Place {
    /// An attempt to connect has ended.
    fn settle(&mut self, connected: Result<Arc<NodeSession>, TransportError>) {
        self.slot = match connected {
            Ok(session) => {
                self.backoff.reset();
                Slot::Up(session)
            }
            Err(error) => Slot::Down { until: Instant::now() + self.backoff.next_wait(), error },
        };
    }
}

/// The sessions of a job.
pub(super) struct Sessions {
    transport: Arc<dyn ChunkTransport>,
    access: JobAccess,
    limits: Limits,
    tasks: TaskGroup,
    places: Mutex<HashMap<String, Place>>,
    /// Sessions that failed with a window open.
    retired: Mutex<Vec<Arc<NodeSession>>>,
}

impl Sessions {
    pub(super) fn new(
        transport: Arc<dyn ChunkTransport>,
        access: JobAccess,
        limits: Limits,
        tasks: TaskGroup,
    ) -> Self {
        Self {
            transport,
            access,
            limits,
            tasks,
            places: Mutex::default(),
            retired: Mutex::default(),
        }
    }

    /// The session with a node at a layout epoch; connects if there is none. While a lost node rests, the error that
    /// lost it.
    pub(super) async fn with(
        &self,
        node: &StorageNode,
        epoch: LayoutEpoch,
    ) -> Result<Arc<NodeSession>, TransportError> {
        let connecting = {
            let mut places = self.lock();
            let place = places.entry(node.name.clone()).or_insert_with(|| Place {
                slot: Slot::Connecting(self.connect(node, epoch), None),
                backoff: Backoff::new(
                    self.limits.first_pause,
                    self.limits.longest_pause,
                    Backoff::any_seed(),
                ),
            });
            if let Slot::Connecting(connecting, _) = &place.slot
                && let Some(connected) = connecting.peek().cloned()
            {
                place.settle(connected);
            }
            match &place.slot {
                Slot::Up(session) if session.is_usable() && session.epoch == epoch => {
                    return Ok(Arc::clone(session));
                }
                Slot::Up(session) => {
                    let error = session.failure();
                    session.give_up(&error);
                    self.retire(session);
                    if error.refusal().is_some() {
                        // Full, read-only, behind: it would refuse again at once.
                        let until = Instant::now() + self.limits.longest_pause;
                        place.slot = Slot::Down { until, error: error.clone() };
                        return Err(error);
                    }
                    // Else connect again at once: a pause is for nodes that do not answer.
                    let connecting = self.connect(node, epoch);
                    place.slot = Slot::Connecting(connecting.clone(), None);
                    connecting
                }
                Slot::Down { until, error } => {
                    let error = error.clone();
                    if Instant::now() >= *until {
                        let connecting = self.connect(node, epoch);
                        place.slot = Slot::Connecting(connecting.clone(), Some(error.clone()));
                        self.tasks.spawn("reconnect", connecting.map(drop));
                    }
                    return Err(error);
                }
                Slot::Connecting(_, Some(error)) => return Err(error.clone()),
                Slot::Connecting(connecting, None) => connecting.clone(),
            }
        };
        let connected = connecting.clone().await;
        let mut places = self.lock();
        if let Some(place) = places.get_mut(&node.name)
            && matches!(&place.slot, Slot::Connecting(now, _) if now.ptr_eq(&connecting))
        {
            place.settle(connected.clone());
        }
        connected
    }

    /// All sessions with something to close: the live ones, and those that failed since the last call.
    pub(super) fn take_work(&self) -> Vec<Arc<NodeSession>> {
        let mut work = std::mem::take(&mut *self.lock_retired());
        let places = self.lock();
        work.extend(places.values().filter_map(|place| match &place.slot {
            Slot::Up(session) if session.has_work() => Some(Arc::clone(session)),
            _ => None,
        }));
        work
    }

    pub(super) fn close(&self) {
        self.tasks.token().cancel();
        for place in self.lock().values() {
            if let Slot::Up(session) = &place.slot {
                session.link.close();
            }
        }
    }

    fn retire(&self, session: &Arc<NodeSession>) {
        if session.has_work() {
            self.lock_retired().push(Arc::clone(session));
        }
    }

    fn connect(&self, node: &StorageNode, epoch: LayoutEpoch) -> Connecting {
        let (transport, access) = (Arc::clone(&self.transport), self.access.clone());
        let (limits, spawner, node) = (self.limits.clone(), self.tasks.spawner(), node.clone());
        async move {
            let session = SessionId::random();
            let opening = Opening { session, layout_epoch: epoch, ticket: access.ticket.clone() };
            let link = transport.open(&node, opening).await?;
            let made = NodeSession::new(link, &access, session, epoch, &limits, &spawner);
            Ok(Arc::new(made))
        }
        .boxed()
        .shared()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_retired(&self) -> MutexGuard<'_, Vec<Arc<NodeSession>>> {
        self.retired.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Sessions {
    fn drop(&mut self) {
        self.close();
    }
}
