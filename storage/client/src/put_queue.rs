//! A bounded line of records to one storage node: batches them, keeps several put requests in flight, and stops at the
//! first failure.

use std::sync::{Arc, OnceLock};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use outrider_process::tasks::TaskSpawner;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::error::TransportError;
use crate::transport::{ChunkSession, NumberedRecord, WindowHead};

/// A record in line. Its permit and token are released when the node has taken it in, or never will.
#[derive(Debug)]
pub struct QueuedPut {
    /// Window.
    pub head: WindowHead,
    /// Record and number.
    pub numbered: NumberedRecord,
    /// Bytes of the sender's budget.
    pub permit: OwnedSemaphorePermit,
    /// The window waits for this before it is closed.
    pub token: TaskTrackerToken,
}

/// Sizes of a line.
#[derive(Debug, Clone, Copy)]
pub struct QueueLimits {
    /// Records in line; their bytes are bounded by the permits.
    pub records: usize,
    /// Bytes of one put request.
    pub batch: usize,
    /// Put requests in flight.
    pub lanes: usize,
}

/// The sending end of a line.
#[derive(Debug, Clone)]
pub struct PutQueue {
    sender: mpsc::Sender<QueuedPut>,
    failure: Arc<OnceLock<TransportError>>,
}

/// The line has failed; what was in it may or may not have arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueFailed;

impl PutQueue {
    /// Starts a line over a session. It ends when the last handle is dropped, at the first failure, or with the group.
    pub fn start(session: Arc<dyn ChunkSession>, limits: QueueLimits, tasks: &TaskSpawner) -> Self {
        let (sender, receiver) = mpsc::channel(limits.records.max(1));
        let failure = Arc::new(OnceLock::new());
        let (outcome, token) = (Arc::clone(&failure), tasks.token());
        let node = session.opened().node.clone();
        tasks.spawn("put-queue", async move {
            let worked = tokio::select! {
                worked = drive(&*session, receiver, limits) => worked,
                () = token.cancelled() => Err(TransportError::Lost {
                    node,
                    why: "this process closed it".to_owned(),
                }),
            };
            if let Err(error) = worked {
                let _ = outcome.set(error);
            }
        });
        Self { sender, failure }
    }

    /// Puts a record in line; waits while the line is full.
    ///
    /// # Errors
    /// [`QueueFailed`]: see [`PutQueue::failure`].
    pub async fn send(&self, put: QueuedPut) -> Result<(), QueueFailed> {
        self.sender.send(put).await.map_err(|_| QueueFailed)
    }

    /// As [`PutQueue::send`], but gives the record back at once when the line is full or has failed.
    ///
    /// # Errors
    /// The record.
    pub fn try_send(&self, put: QueuedPut) -> Result<(), Box<QueuedPut>> {
        self.sender.try_send(put).map_err(|e| Box::new(e.into_inner()))
    }

    /// Why the line has failed; `None` while it works.
    #[must_use]
    pub fn failure(&self) -> Option<&TransportError> {
        self.failure.get()
    }

    /// Whether nothing more is taken.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.sender.is_closed()
    }
}

async fn drive(
    session: &dyn ChunkSession,
    mut receiver: mpsc::Receiver<QueuedPut>,
    limits: QueueLimits,
) -> Result<(), TransportError> {
    let mut in_flight = FuturesUnordered::new();
    let mut ahead: Option<QueuedPut> = None;
    let mut open = true;
    while open || ahead.is_some() || !in_flight.is_empty() {
        let may_send = in_flight.len() < limits.lanes.max(1);
        let first = match ahead.take_if(|_| may_send) {
            Some(put) => put,
            None => tokio::select! {
                biased;
                Some(sent) = in_flight.next(), if !in_flight.is_empty() => {
                    sent?;
                    continue;
                }
                next = receiver.recv(), if open && may_send && ahead.is_none() => match next {
                    Some(put) => put,
                    None => {
                        open = false;
                        continue;
                    }
                },
            },
        };
        let mut bytes = first.numbered.record.bytes().len();
        let mut batch = vec![first];
        while bytes < limits.batch {
            match receiver.try_recv() {
                Ok(put) if put.head == batch[0].head => {
                    bytes += put.numbered.record.bytes().len();
                    batch.push(put);
                }
                Ok(put) => {
                    ahead = Some(put);
                    break;
                }
                Err(_) => break,
            }
        }
        in_flight.push(send(session, batch));
    }
    Ok(())
}

async fn send(session: &dyn ChunkSession, batch: Vec<QueuedPut>) -> Result<(), TransportError> {
    let head = batch[0].head;
    let mut held = Vec::with_capacity(batch.len());
    let mut records = Vec::with_capacity(batch.len());
    for put in batch {
        records.push(put.numbered);
        held.push((put.permit, put.token));
    }
    let sent = records.len();
    let taken = session.put(head, records).await?;
    drop(held);
    if taken as usize == sent {
        Ok(())
    } else {
        Err(TransportError::Protocol {
            node: session.opened().node.clone(),
            what: format!("took {taken} of {sent} records without a refusal"),
        })
    }
}
