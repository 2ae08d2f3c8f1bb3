//! One job's store: puts, questions, barriers, claims.

mod barrier;
mod named;
mod read;
mod sessions;
mod window;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use outrider_process::tasks::TaskGroup;
use outrider_proto::frame::Presence;
use outrider_proto::ids::{ChunkId, PgId};
use outrider_proto::layout::Layout;
use outrider_proto::record::Record;
use outrider_proto::rpc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::client::JobAccess;
use crate::error::{StoreError, TransportError};
use crate::limits::Limits;
use crate::put_queue::QueuedPut;
use crate::transport::{ChunkTransport, NumberedRecord};

use self::sessions::{NodeSession, Sessions};
use self::window::Claim;

/// What a job's store has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Records put.
    pub put_records: u64,
    /// Sealed bytes of these.
    pub put_bytes: u64,
    /// Ids asked for.
    pub asked: u64,
    /// Of these, answered with yes.
    pub known: u64,
    /// Of these, answered with unknown.
    pub unknown: u64,
    /// Records read.
    pub got_records: u64,
    /// Sealed bytes of these.
    pub got_bytes: u64,
    /// Sealed bytes times the replicas whose receipts cover them.
    pub stored_bytes: u64,
    /// Windows closed with enough receipts.
    pub windows: u64,
    /// Ids handed back by barriers to be sent again.
    pub lost: u64,
    /// Times another replica was used than the preferred one, since that failed.
    pub failovers: u64,
}

/// The store of one job. All methods may be called by many tasks at once; cheap to clone.
#[derive(Clone)]
pub struct JobStore {
    inner: Arc<Inner>,
}

struct Inner {
    access: JobAccess,
    layout: watch::Receiver<Layout>,
    limits: Limits,
    in_flight: Arc<Semaphore>,
    sessions: Sessions,
    state: Mutex<State>,
    barrier: Semaphore,
}

#[derive(Default)]
struct State {
    claims: Vec<Claim>,
    /// Ids whose receipts fell short and that nobody could be asked about yet.
    suspects: Vec<ChunkId>,
    stats: Stats,
}

impl JobStore {
    pub(crate) fn new(
        transport: Arc<dyn ChunkTransport>,
        layout: watch::Receiver<Layout>,
        limits: Limits,
        access: JobAccess,
        tasks: TaskGroup,
    ) -> Self {
        let in_flight = Arc::new(Semaphore::new(limits.in_flight.max(1)));
        let sessions = Sessions::new(transport, access.clone(), limits.clone(), tasks);
        let inner = Inner {
            access,
            layout,
            limits,
            in_flight,
            sessions,
            state: Mutex::default(),
            barrier: Semaphore::new(1),
        };
        Self { inner: Arc::new(inner) }
    }

    /// What the job shows to storage nodes.
    #[must_use]
    pub fn access(&self) -> &JobAccess {
        &self.inner.access
    }

    /// The PG of an id at the current layout; `None` while there is no layout.
    #[must_use]
    pub fn pg_of(&self, id: &ChunkId) -> Option<PgId> {
        self.inner.layout.borrow().pg_of(id)
    }

    /// Whether ids are durable, in the order asked. Every yes is counted in the open window, so that the next barrier
    /// gives a receipt for it. `No` and `Unknown` both mean: send it.
    ///
    /// # Errors
    /// [`StoreError::NoReplica`] when for some PG nobody can be asked.
    pub async fn have(&self, ids: &[ChunkId]) -> Result<Vec<Presence>, StoreError> {
        let layout = self.inner.layout()?;
        let mut by_pg: BTreeMap<PgId, Vec<usize>> = BTreeMap::new();
        for (index, id) in ids.iter().enumerate() {
            let pg = layout.pg_of(id).ok_or(StoreError::NoLayout)?;
            by_pg.entry(pg).or_default().push(index);
        }
        let mut answers = vec![Presence::Unknown; ids.len()];
        let mut rounds: HashMap<PgId, Vec<String>> = HashMap::new();
        let mut last = None;
        while !by_pg.is_empty() {
            // Group by the node that each PG would ask now.
            let mut by_node: HashMap<String, (Arc<NodeSession>, Vec<usize>)> = HashMap::new();
            for (&pg, indexes) in &by_pg {
                let tried = rounds.entry(pg).or_default();
                let session = self.inner.any_session(&layout, pg, tried, &mut last).await?;
                let (_, of_node) = by_node
                    .entry(session.node().to_owned())
                    .or_insert_with(|| (session, Vec::new()));
                of_node.extend_from_slice(indexes);
            }
            let mut questions = FuturesUnordered::new();
            for (session, indexes) in by_node.into_values() {
                for part in indexes.chunks(self.inner.limits.ids_per_have.max(1)) {
                    let part = part.to_vec();
                    let asked: Vec<_> =
                        part.iter().map(|&i| (layout.pg_of(&ids[i]), ids[i])).collect();
                    let session = Arc::clone(&session);
                    questions.push(async move { (session.have(asked).await, session, part) });
                }
            }
            let mut again: BTreeMap<PgId, Vec<usize>> = BTreeMap::new();
            while let Some((answer, session, part)) = questions.next().await {
                match answer {
                    Ok(given) => {
                        for (&index, presence) in part.iter().zip(given) {
                            answers[index] = presence;
                        }
                    }
                    Err(error) => {
                        self.inner.failed_over(&session, &error)?;
                        for index in part {
                            let pg = layout.pg_of(&ids[index]).ok_or(StoreError::NoLayout)?;
                            let tried = rounds.entry(pg).or_default();
                            if !tried.iter().any(|n| n == session.node()) {
                                tried.push(session.node().to_owned());
                            }
                            again.entry(pg).or_default().push(index);
                        }
                        last = Some(error);
                    }
                }
            }
            by_pg = again;
        }
        let mut state = self.inner.lock();
        let count = |p: Presence| answers.iter().filter(|&&a| a == p).count() as u64;
        state.stats.asked += ids.len() as u64;
        state.stats.known += count(Presence::Yes);
        state.stats.unknown += count(Presence::Unknown);
        Ok(answers)
    }

    /// Sends a record to one replica of its PG. Returns when it is in line; waits while too many bytes are in flight.
    /// Whether it arrived is known after [`JobStore::barrier`].
    ///
    /// # Errors
    /// [`StoreError::NoReplica`] when no replica takes it.
    pub async fn put(&self, record: Record) -> Result<(), StoreError> {
        let bytes = record.bytes().len();
        let mut permit = Some(self.permit(bytes).await?);
        let layout = self.inner.layout()?;
        let pg = layout.pg_of(&record.id()).ok_or(StoreError::NoLayout)?;
        let mut tried = Vec::new();
        let mut last = None;
        loop {
            let session = self.inner.any_session(&layout, pg, &mut tried, &mut last).await?;
            if let Some(number) = session.number(pg, record.id(), record.bytes().len() as u64) {
                let permit = match permit.take() {
                    Some(permit) => permit,
                    None => self.permit(bytes).await?,
                };
                let record = record.clone();
                let numbered = NumberedRecord { pg, sequence: number.sequence, record };
                let (head, token) = (number.head, number.token);
                let queued = QueuedPut { head, numbered, permit, token };
                if session.queue().send(queued).await.is_ok() {
                    let mut state = self.inner.lock();
                    state.stats.put_records += 1;
                    state.stats.put_bytes += bytes as u64;
                    return Ok(());
                }
            }
            // The record stays in the failed session's window: the barrier will ask for it, and finds what the next
            // replica was given.
            let error = session.failure();
            self.inner.failed_over(&session, &error)?;
            tried.push(session.node().to_owned());
            last = Some(error);
        }
    }

    /// Waits until so many bytes may be in flight.
    async fn permit(&self, bytes: usize) -> Result<OwnedSemaphorePermit, StoreError> {
        let wanted = bytes.clamp(1, self.inner.limits.in_flight.max(1));
        let wanted = u32::try_from(wanted).unwrap_or(u32::MAX);
        let permits = Arc::clone(&self.inner.in_flight);
        permits.acquire_many_owned(wanted).await.map_err(|_| StoreError::Closed)
    }

    /// What a commit has to show: every window closed so far, with its receipts.
    #[must_use]
    pub fn claims(&self) -> Vec<rpc::WindowClaim> {
        self.inner.lock().claims.iter().map(Claim::to_rpc).collect()
    }

    /// Forgets the claims of these PGs: their ids have been asked for again.
    pub fn drop_claims(&self, pgs: &[PgId]) {
        let mut state = self.inner.lock();
        for claim in &mut state.claims {
            claim.pgs.retain(|c| !pgs.contains(&c.pg));
        }
        state.claims.retain(|claim| !claim.pgs.is_empty());
    }

    /// Figures so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.inner.lock().stats
    }

    /// Ends the sessions. What was not closed by a barrier is void.
    pub fn close(&self) {
        self.inner.in_flight.close();
        self.inner.sessions.close();
    }
}

impl std::fmt::Debug for JobStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JobStore").field("job", &self.inner.access.job).finish_non_exhaustive()
    }
}

impl Inner {
    fn layout(&self) -> Result<Layout, StoreError> {
        let layout = self.layout.borrow().clone();
        if layout.pgs.is_empty() { Err(StoreError::NoLayout) } else { Ok(layout) }
    }

    /// A session with the most preferred replica of a PG that has not been tried.
    async fn any_session(
        &self,
        layout: &Layout,
        pg: PgId,
        tried: &mut Vec<String>,
        last: &mut Option<TransportError>,
    ) -> Result<Arc<NodeSession>, StoreError> {
        let online = layout.replicas_of(pg).filter(|n| n.online);
        // `online` is a hint: a node that the leader does not see may still answer us.
        let offline = layout.replicas_of(pg).filter(|n| !n.online);
        for node in online.chain(offline) {
            if tried.contains(&node.name) {
                continue;
            }
            match self.sessions.with(node, layout.epoch).await {
                Ok(session) => return Ok(session),
                Err(error) => {
                    if let Some(refused) = StoreError::final_refusal(&error) {
                        return Err(refused);
                    }
                    tracing::debug!(%error, node = %node.name, "storage node passed over");
                    tried.push(node.name.clone());
                    *last = Some(error);
                }
            }
        }
        Err(StoreError::NoReplica { pg, last: last.take() })
    }

    /// Judges a failed request: gives up the session, or the whole request when no other replica would take it.
    fn failed_over(&self, session: &NodeSession, error: &TransportError) -> Result<(), StoreError> {
        if let Some(refused) = StoreError::final_refusal(error) {
            return Err(refused);
        }
        tracing::info!(%error, node = session.node(), "another replica is used");
        if error.ends_session() {
            session.give_up(error);
        }
        self.lock().stats.failovers += 1;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
