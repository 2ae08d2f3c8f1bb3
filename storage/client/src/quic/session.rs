//! The requests of a session, each on a stream of its own.

use std::future::Future;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use outrider_process::telemetry::current_traceparent;
use outrider_proto::frame::{Frame, Presence, Space, close};
use outrider_proto::ids::{ChunkId, PgId};
use outrider_proto::record::Record;
use quinn::{Connection, SendStream};

use crate::error::TransportError;
use crate::frame_io::{FrameIoError, FrameReader, finish, finish_with, write_frame};
use crate::limits::Limits;
use crate::transport::{
    ChunkSession, NamedRecord, NamedStream, NumberedRecord, Opened, WindowHead,
};

/// A session over one connection.
#[derive(Debug)]
pub(super) struct QuicSession {
    connection: Connection,
    opened: Opened,
    limits: Limits,
}

impl QuicSession {
    pub(super) fn new(connection: Connection, opened: Opened, limits: Limits) -> Self {
        Self { connection, opened, limits }
    }

    async fn stream(&self) -> Result<(SendStream, FrameReader), TransportError> {
        let (send, recv) = self.connection.open_bi().await.map_err(|e| TransportError::Lost {
            node: self.opened.node.clone(),
            why: e.to_string(),
        })?;
        Ok((send, FrameReader::new(recv)))
    }

    /// A request of one frame, and a reader of its answer.
    async fn ask(&self, frame: &Frame) -> Result<FrameReader, TransportError> {
        let (mut send, recv) = self.stream().await?;
        finish_with(&mut send, frame).await.map_err(|e| self.failure(&e))?;
        Ok(recv)
    }

    /// The next frame of an answer; a refusal is an error.
    async fn answer(
        &self,
        recv: &mut FrameReader,
        expected: &'static str,
    ) -> Result<Frame, TransportError> {
        match recv.expect(expected).await.map_err(|e| self.failure(&e))? {
            Frame::Refused { refusal, message } => {
                Err(TransportError::Refused { node: self.opened.node.clone(), refusal, message })
            }
            frame => Ok(frame),
        }
    }

    async fn within<T>(
        &self,
        limit: Duration,
        request: impl Future<Output = Result<T, TransportError>> + Send,
    ) -> Result<T, TransportError> {
        tokio::time::timeout(limit, request).await.unwrap_or_else(|_| {
            Err(TransportError::Lost {
                node: self.opened.node.clone(),
                why: format!("no answer within {limit:?}"),
            })
        })
    }

    fn failure(&self, error: &FrameIoError) -> TransportError {
        failure(&self.opened.node, &self.connection, error)
    }

    fn unexpected(&self, expected: &'static str, found: Frame) -> TransportError {
        unexpected(&self.opened.node, expected, found)
    }

    async fn answers(&self, question: Frame) -> Result<Vec<Presence>, TransportError> {
        self.within(self.limits.request, async {
            let mut recv = self.ask(&question).await?;
            match self.answer(&mut recv, "HaveAnswer").await? {
                Frame::HaveAnswer { answers } => Ok(answers),
                other => Err(self.unexpected("HaveAnswer", other)),
            }
        })
        .await
    }
}

/// A list of named records on its way.
enum Listing {
    Asking(Frame),
    Answered(FrameReader),
}

/// What a broken stream means.
pub(super) fn failure(node: &str, connection: &Connection, error: &FrameIoError) -> TransportError {
    let node = node.to_owned();
    if error.is_protocol() && connection.close_reason().is_none() {
        return TransportError::Protocol { node, what: error.to_string() };
    }
    let why = connection.close_reason().map_or_else(|| error.to_string(), |r| r.to_string());
    TransportError::Lost { node, why }
}

pub(super) fn unexpected(node: &str, expected: &'static str, found: Frame) -> TransportError {
    match found {
        Frame::Refused { refusal, message } => {
            TransportError::Refused { node: node.to_owned(), refusal, message }
        }
        found => TransportError::Protocol {
            node: node.to_owned(),
            what: format!("it answered {} where {expected} was expected", found.name()),
        },
    }
}

#[async_trait]
impl ChunkSession for QuicSession {
    fn opened(&self) -> &Opened {
        &self.opened
    }

    async fn put(
        &self,
        head: WindowHead,
        records: Vec<NumberedRecord>,
    ) -> Result<u32, TransportError> {
        let WindowHead { job, session, window, layout_epoch } = head;
        let (mut send, mut recv) = self.stream().await?;
        let sending = async {
            write_frame(&mut send, &Frame::Put { job, session, window, layout_epoch }).await?;
            for NumberedRecord { pg, sequence, record } in records {
                let record = record.bytes().clone();
                write_frame(&mut send, &Frame::Chunk { pg, sequence, record }).await?;
            }
            finish(&mut send);
            Ok::<_, FrameIoError>(())
        };
        let sent = self.within(self.limits.request, async { Ok(sending.await) }).await?;
        if let Err(error) = sent
            && error.is_connection()
        {
            return Err(self.failure(&error));
        }
        // A node that stopped reading says why in its answer.
        self.within(self.limits.request, async {
            match self.answer(&mut recv, "PutDone").await? {
                Frame::PutDone { taken } => Ok(taken),
                other => Err(self.unexpected("PutDone", other)),
            }
        })
        .await
    }

    async fn have(
        &self,
        head: WindowHead,
        ids: Vec<ChunkId>,
    ) -> Result<Vec<Presence>, TransportError> {
        let WindowHead { job, session, window, layout_epoch } = head;
        self.answers(Frame::Have { job, session, window, layout_epoch, ids }).await
    }

    async fn have_local(&self, ids: Vec<ChunkId>) -> Result<Vec<Presence>, TransportError> {
        self.answers(Frame::HaveLocal { ids }).await
    }

    async fn get(&self, ids: Vec<ChunkId>) -> Result<Vec<Option<Record>>, TransportError> {
        self.within(self.limits.request, async {
            let count = ids.len();
            let mut recv = self.ask(&Frame::Get { ids }).await?;
            let mut records = Vec::with_capacity(count);
            for _ in 0..count {
                match self.answer(&mut recv, "Chunk or Missing").await? {
                    // Bytes that are no record count as missing: another replica may have better ones.
                    Frame::Chunk { record, .. } => {
                        records.push(Record::decode_unverified(record).ok());
                    }
                    Frame::Missing { .. } => records.push(None),
                    other => return Err(self.unexpected("Chunk or Missing", other)),
                }
            }
            Ok(records)
        })
        .await
    }

    async fn barrier(
        &self,
        head: WindowHead,
        pgs: Vec<(PgId, u32)>,
    ) -> Result<Vec<Bytes>, TransportError> {
        let WindowHead { job, session, window, layout_epoch } = head;
        self.within(self.limits.barrier, async {
            let traceparent = current_traceparent().unwrap_or_default();
            let barrier = Frame::Barrier { job, session, window, layout_epoch, pgs, traceparent };
            let mut recv = self.ask(&barrier).await?;
            match self.answer(&mut recv, "Receipts").await? {
                Frame::Receipts { receipts } => Ok(receipts),
                other => Err(self.unexpected("Receipts", other)),
            }
        })
        .await
    }

    async fn put_named(
        &self,
        space: Space,
        key: Vec<u8>,
        fence: u64,
        record: Record,
    ) -> Result<Bytes, TransportError> {
        self.within(self.limits.request, async {
            let record = record.bytes().clone();
            let mut recv = self.ask(&Frame::PutNamed { space, key, fence, record }).await?;
            match self.answer(&mut recv, "Named").await? {
                Frame::Named { receipt } => Ok(receipt),
                other => Err(self.unexpected("Named", other)),
            }
        })
        .await
    }

    fn stream_named(&self, space: Space, prefix: Vec<u8>) -> NamedStream<'_> {
        let question = Listing::Asking(Frame::ListNamed { space, prefix });
        futures::stream::try_unfold(question, move |listing| async move {
            let mut recv = match listing {
                Listing::Asking(question) => self.ask(&question).await?,
                Listing::Answered(recv) => recv,
            };
            loop {
                // A long list is fine as long as it moves on.
                let next = self.answer(&mut recv, "NamedRecord or End");
                match self.within(self.limits.request, next).await? {
                    Frame::NamedRecord { key, fence, record } => {
                        if let Ok(record) = Record::decode_unverified(record) {
                            let named = NamedRecord { key, fence, record };
                            return Ok(Some((named, Listing::Answered(recv))));
                        }
                    }
                    Frame::End => return Ok(None),
                    other => return Err(self.unexpected("NamedRecord or End", other)),
                }
            }
        })
        .boxed()
    }

    async fn list_names(
        &self,
        space: Space,
        after: Vec<u8>,
    ) -> Result<Vec<(Vec<u8>, u64)>, TransportError> {
        self.within(self.limits.request, async {
            let mut recv = self.ask(&Frame::ListNames { space, after }).await?;
            match self.answer(&mut recv, "Names").await? {
                Frame::Names { names } => Ok(names),
                other => Err(self.unexpected("Names", other)),
            }
        })
        .await
    }

    async fn list_pg(&self, pg: PgId, after: ChunkId) -> Result<Vec<ChunkId>, TransportError> {
        self.within(self.limits.request, async {
            let mut recv = self.ask(&Frame::ListPg { pg, after }).await?;
            let mut ids = Vec::new();
            loop {
                match self.answer(&mut recv, "PgIds or End").await? {
                    Frame::PgIds { ids: more } => ids.extend(more),
                    Frame::End => return Ok(ids),
                    other => return Err(self.unexpected("PgIds or End", other)),
                }
            }
        })
        .await
    }

    fn is_closed(&self) -> bool {
        self.connection.close_reason().is_some()
    }

    fn close(&self) {
        self.connection.close(close::DONE.into(), b"");
    }
}
