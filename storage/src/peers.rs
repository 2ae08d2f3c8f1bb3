//! The other storage nodes: sessions with them, and the lines of records on their way there.
//!
//! Each has a line of its own with its own budget: a dead or slow one is waited for once and a moment only, then left
//! behind; its receipts will fall short and it fetches what it missed (see [`crate::catch_up`]).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use outrider_process::backoff::Backoff;
use outrider_process::tasks::{TaskGroup, TaskSpawner};
use outrider_proto::ids::SessionId;
use outrider_proto::layout::{Layout, StorageNode};
use outrider_storage_client::TransportError;
use outrider_storage_client::put_queue::{PutQueue, QueueLimits, QueuedPut};
use outrider_storage_client::transport::{
    ChunkSession, ChunkTransport, NumberedRecord, Opening, WindowHead,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// Sizes of the lines.
#[derive(Debug, Clone)]
pub struct PeerLimits {
    /// Bytes in line for each node.
    pub queue_bytes: usize,
    /// How long a full line is waited for.
    pub patience: Duration,
    /// Pauses between attempts to reach a node.
    pub pauses: (Duration, Duration),
}

/// All other storage nodes.
pub struct Peers {
    transport: Arc<dyn ChunkTransport>,
    layout: watch::Receiver<Layout>,
    limits: PeerLimits,
    links: Mutex<HashMap<String, Arc<Link>>>,
    tasks: TaskGroup,
}

impl Peers {
    /// No connection is made before it is needed.
    #[must_use]
    pub fn new(
        transport: Arc<dyn ChunkTransport>,
        layout: watch::Receiver<Layout>,
        limits: PeerLimits,
        tasks: TaskGroup,
    ) -> Self {
        Self { transport, layout, limits, links: Mutex::default(), tasks }
    }

    /// A session with a node of the layout.
    ///
    /// # Errors
    /// [`TransportError`]; at once while a node that did not answer rests.
    pub async fn session(
        &self,
        node: &StorageNode,
    ) -> Result<Arc<dyn ChunkSession>, TransportError> {
        Ok(Arc::clone(&self.link(&node.name).up(node).await?.session))
    }

    /// Puts a record in line for a node. False: it was left behind.
    pub async fn forward(
        &self,
        node: &StorageNode,
        head: WindowHead,
        numbered: NumberedRecord,
        tracker: &TaskTracker,
    ) -> bool {
        let link = self.link(&node.name);
        let token = tracker.token();
        let bytes = numbered.record.bytes().len().clamp(1, self.limits.queue_bytes.max(1));
        let wanted = u32::try_from(bytes).unwrap_or(u32::MAX);
        let acquire = Arc::clone(&link.budget).acquire_many_owned(wanted);
        let patience = if link.is_slow() { Duration::ZERO } else { self.limits.patience };
        let Ok(Ok(permit)) = tokio::time::timeout(patience, acquire).await else {
            link.call_slow();
            return false;
        };
        let item = Item { node: node.clone(), head, numbered, permit, token };
        link.sender.try_send(item).is_ok()
    }

    fn link(&self, name: &str) -> Arc<Link> {
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(link) = links.get(name) {
            return Arc::clone(link);
        }
        let (sender, receiver) = mpsc::channel(4096);
        let link = Arc::new(Link {
            sender,
            budget: Arc::new(Semaphore::new(self.limits.queue_bytes.max(1))),
            transport: Arc::clone(&self.transport),
            layout: self.layout.clone(),
            tasks: self.tasks.spawner(),
            slow_until: Mutex::new(Instant::now()),
            slot: Mutex::new(Slot::New),
            backoff: Mutex::new(Backoff::new(
                self.limits.pauses.0,
                self.limits.pauses.1,
                Backoff::any_seed(),
            )),
        });
        links.insert(name.to_owned(), Arc::clone(&link));
        let (working, token) = (Arc::clone(&link), self.tasks.token());
        self.tasks.spawn("forward", async move {
            tokio::select! {
                () = working.work(receiver) => {}
                () = token.cancelled() => {}
            }
        });
        link
    }
}

struct Item {
    node: StorageNode,
    head: WindowHead,
    numbered: NumberedRecord,
    permit: OwnedSemaphorePermit,
    token: TaskTrackerToken,
}

#[derive(Clone)]
struct Up {
    session: Arc<dyn ChunkSession>,
    queue: PutQueue,
}

type Connecting = Shared<BoxFuture<'static, Result<Up, TransportError>>>;

enum Slot {
    New,
    /// The error is that of the last attempt: nobody waits for a node that did not answer before.
    Connecting(Connecting, Option<TransportError>),
    Up(Up),
    Down {
        until: Instant,
        error: TransportError,
    },
}

/// How long a node that was too slow is not waited for.
const SLOW: Duration = Duration::from_secs(5);

struct Link {
    sender: mpsc::Sender<Item>,
    budget: Arc<Semaphore>,
    transport: Arc<dyn ChunkTransport>,
    layout: watch::Receiver<Layout>,
    tasks: TaskSpawner,
    slow_until: Mutex<Instant>,
    slot: Mutex<Slot>,
    backoff: Mutex<Backoff>,
}

impl Link {
    async fn work(&self, mut receiver: mpsc::Receiver<Item>) {
        while let Some(item) = receiver.recv().await {
            // A record that cannot be sent is dropped with its token: the barrier sees it missing.
            if let Ok(up) = self.up(&item.node).await {
                let Item { head, numbered, permit, token, .. } = item;
                let _ = up.queue.send(QueuedPut { head, numbered, permit, token }).await;
            }
        }
    }

    async fn up(&self, node: &StorageNode) -> Result<Up, TransportError> {
        let connecting = {
            let mut slot = self.lock();
            if let Slot::Connecting(connecting, _) = &*slot
                && let Some(connected) = connecting.peek().cloned()
            {
                *slot = self.settled(connected);
            }
            match &*slot {
                Slot::Up(up) if !up.session.is_closed() && !up.queue.has_failed() => {
                    return Ok(up.clone());
                }
                Slot::Down { until, error } => {
                    let error = error.clone();
                    if Instant::now() >= *until {
                        let connecting = self.connect(node.clone());
                        *slot = Slot::Connecting(connecting.clone(), Some(error.clone()));
                        self.tasks.spawn("reconnect", connecting.map(drop));
                    }
                    return Err(error);
                }
                Slot::Connecting(_, Some(error)) => return Err(error.clone()),
                Slot::Connecting(connecting, None) => connecting.clone(),
                Slot::New | Slot::Up(_) => {
                    if let Slot::Up(up) = &*slot {
                        up.session.close();
                    }
                    let connecting = self.connect(node.clone());
                    *slot = Slot::Connecting(connecting.clone(), None);
                    connecting
                }
            }
        };
        let connected = connecting.clone().await;
        let mut slot = self.lock();
        if matches!(&*slot, Slot::Connecting(now, _) if now.ptr_eq(&connecting)) {
            *slot = self.settled(connected.clone());
        }
        connected
    }

    /// What an attempt to connect leaves.
    fn settled(&self, connected: Result<Up, TransportError>) -> Slot {
        let mut backoff = self.backoff.lock().unwrap_or_else(PoisonError::into_inner);
        match connected {
            Ok(up) => {
                backoff.reset();
                Slot::Up(up)
            }
            Err(error) => Slot::Down { until: Instant::now() + backoff.next_wait(), error },
        }
    }

    fn connect(&self, node: StorageNode) -> Connecting {
        let (transport, tasks) = (Arc::clone(&self.transport), self.tasks.clone());
        let layout_epoch = self.layout.borrow().epoch;
        async move {
            let opening =
                Opening { session: SessionId::random(), layout_epoch, ticket: bytes::Bytes::new() };
            let session = transport.open(&node, opening).await?;
            let limits = QueueLimits { records: 1024, batch: 4 << 20, lanes: 4 };
            let queue = PutQueue::start(Arc::clone(&session), limits, &tasks);
            Ok(Up { session, queue })
        }
        .boxed()
        .shared()
    }

    fn is_slow(&self) -> bool {
        *self.slow_until.lock().unwrap_or_else(PoisonError::into_inner) > Instant::now()
    }

    fn call_slow(&self) {
        *self.slow_until.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now() + SLOW;
    }

    fn lock(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
