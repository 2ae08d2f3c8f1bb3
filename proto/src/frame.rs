//! QUIC frames between agents, storage nodes and operators' restores. ALPN `outrider-chunk/1`.
//!
//! A frame is `length u32 (of what follows) · type u8 · body`. The first bidirectional stream of a connection carries
//! [`Frame::Hello`] both ways (frozen for ever), then [`Frame::Open`] and [`Frame::Opened`]. After that each request has a
//! bidirectional stream of its own: the client sends its request frames and finishes the stream; the server answers and
//! finishes. Many requests may be in flight. See `docs/protocol.md` for the order of frames of each request.
//!
//! | request | frames up | frames down |
//! | --- | --- | --- |
//! | put | `Put`, then `Chunk`... | `PutDone` |
//! | have | `Have` | `HaveAnswer` |
//! | get | `Get` | `Chunk` or `Missing` for each id, in order |
//! | barrier | `Barrier` | `Receipts` |
//! | put named | `PutNamed` | `Named` |
//! | list named | `ListNamed` | `NamedRecord`... then `End` |
//! | list PG (storage nodes only) | `ListPg` | `PgIds`... then `End` |
//! | any | | `Refused` instead of the answer |

use bytes::Bytes;

use crate::ids::{ChunkId, FabricId, JobId, LayoutEpoch, NodeIncarnation, PgId, SessionId, Window};
use crate::record::{HEADER_LEN, MAX_PAYLOAD};
use crate::wire::{DecodeError, Put as _, Reader};

/// ALPN protocol id.
pub const ALPN: &[u8] = b"outrider-chunk/1";
/// Protocol version spoken by this release.
pub const PROTOCOL_VERSION: u16 = 1;
/// Largest frame: the largest record with its prefix, rounded up. Checked before anything is allocated.
pub const MAX_FRAME_LEN: usize = HEADER_LEN + MAX_PAYLOAD + 1024;
/// Most ids in one `Have`, `Get` or `PgIds`: 1 MiB of ids.
pub const MAX_IDS: usize = 32_768;
/// Longest key of a named record.
pub const MAX_KEY_LEN: usize = 64;

/// Close codes of connections and reset codes of streams, one an error class.
pub mod close {
    /// Normal end.
    pub const DONE: u32 = 0;
    /// The peer broke the protocol.
    pub const PROTOCOL: u32 = 1;
    /// Certificate or ticket refused.
    pub const DENIED: u32 = 2;
    /// The node is shutting down: use another replica.
    pub const GOING_AWAY: u32 = 3;
}

/// Where named records live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Space {
    /// Root records, key = point id.
    Root = 1,
    /// Journal entries, key = job id, then sequence as big-endian u32.
    Journal = 2,
    /// Copies of the coordinator's state, key = chosen by the coordinator.
    State = 3,
}

impl TryFrom<u8> for Space {
    type Error = DecodeError;
    fn try_from(n: u8) -> Result<Self, DecodeError> {
        match n {
            1 => Ok(Self::Root),
            2 => Ok(Self::Journal),
            3 => Ok(Self::State),
            _ => Err(value("space", n, "1 to 3")),
        }
    }
}

/// Answer of `Have` for one id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Presence {
    /// Not known here, or condemned: send it.
    No = 0,
    /// Durable on `min_durable` replicas at this layout epoch.
    Yes = 1,
    /// Cannot tell (index being rebuilt, replicas not reachable): send it.
    Unknown = 2,
}

/// Why a request was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Refusal {
    /// The request was malformed or out of order.
    Protocol = 1,
    /// Ticket or certificate does not allow it.
    Denied = 2,
    /// The layout epoch of the request is not the node's: fetch the layout.
    StaleLayout = 3,
    /// This node keeps no replica of the PG.
    NotAReplica = 4,
    /// A newer lease wrote here: the caller is superseded.
    Fenced = 5,
    /// No space, or read-only.
    Full = 6,
    /// Too few replicas answered: wait and try again.
    TooFewReplicas = 7,
    /// The node cannot serve right now: use another replica.
    Unavailable = 8,
    /// A disk error at the node.
    Io = 9,
    /// The session or window is not known (the node restarted): ask for what was sent and send what is missing.
    UnknownSession = 10,
}

/// A frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// First frame both ways; its bytes are frozen.
    Hello {
        /// Protocol version wanted.
        version: u16,
        /// Oldest version that is understood.
        oldest: u16,
        /// 1 agent, 2 storage node, 3 operator, 4 coordinator.
        role: u8,
    },
    /// Opens the session of this connection. The ticket is empty for storage nodes.
    Open {
        /// Session chosen by the client.
        session: SessionId,
        /// Layout that the client works under.
        layout_epoch: LayoutEpoch,
        /// Ticket, see [`crate::ticket`].
        ticket: Bytes,
    },
    /// The session is open.
    Opened {
        /// Fabric.
        fabric: FabricId,
        /// Node's name.
        node: String,
        /// Node's incarnation: when it changes, receipts are void.
        incarnation: NodeIncarnation,
        /// Layout that the node works under.
        layout_epoch: LayoutEpoch,
    },
    /// Announces chunks of a window. `origin` is set by a storage node that forwards.
    Put {
        /// Job.
        job: JobId,
        /// Session that numbered the chunks.
        session: SessionId,
        /// Window.
        window: Window,
        /// Layout epoch of the numbering.
        layout_epoch: LayoutEpoch,
    },
    /// One record. In a put: its PG and number within the window; in an answer both are zero.
    Chunk {
        /// PG.
        pg: PgId,
        /// 1.. within (session, window, PG).
        sequence: u32,
        /// The sealed record.
        record: Bytes,
    },
    /// The put was taken in (not yet durable: see `Barrier`).
    PutDone {
        /// Chunks taken.
        taken: u32,
    },
    /// Asks whether ids are durable. Counted as `haves` of the window where the answer is yes.
    Have {
        /// Job.
        job: JobId,
        /// Session.
        session: SessionId,
        /// Window.
        window: Window,
        /// Layout epoch.
        layout_epoch: LayoutEpoch,
        /// Ids, all of PGs that the node keeps.
        ids: Vec<ChunkId>,
    },
    /// One answer for each id, in order.
    HaveAnswer {
        /// Answers.
        answers: Vec<Presence>,
    },
    /// Asks for records.
    Get {
        /// Ids.
        ids: Vec<ChunkId>,
    },
    /// This id is not (or not readable) here.
    Missing {
        /// Id.
        id: ChunkId,
    },
    /// Makes a window durable: answered when `min_durable` replicas of every PG have synced it.
    Barrier {
        /// Job.
        job: JobId,
        /// Session.
        session: SessionId,
        /// Window, closed by this.
        window: Window,
        /// Layout epoch.
        layout_epoch: LayoutEpoch,
        /// Per PG: puts sent (numbers 1..=puts).
        pgs: Vec<(PgId, u32)>,
        /// W3C trace context of the job, so that one trace reaches the fsync; empty: none.
        traceparent: String,
    },
    /// Signed receipts, one a replica, this node's first.
    Receipts {
        /// Encoded [`crate::receipt::Receipt`]s.
        receipts: Vec<Bytes>,
    },
    /// Keeps a record under a name, durable when answered.
    PutNamed {
        /// Space.
        space: Space,
        /// Key.
        key: Vec<u8>,
        /// A lower fence than the highest seen for the key's first 16 bytes is refused.
        fence: u64,
        /// Record.
        record: Bytes,
    },
    /// Signed receipt of a named record.
    Named {
        /// Encoded [`crate::receipt::NamedReceipt`].
        receipt: Bytes,
    },
    /// Asks for the named records whose key starts with `prefix`, in key order.
    ListNamed {
        /// Space.
        space: Space,
        /// Prefix.
        prefix: Vec<u8>,
    },
    /// A named record.
    NamedRecord {
        /// Key.
        key: Vec<u8>,
        /// Fence it was written under.
        fence: u64,
        /// Record.
        record: Bytes,
    },
    /// End of a list.
    End,
    /// Storage nodes only: ids of a PG, from `after` (exclusive) in id order.
    ListPg {
        /// PG.
        pg: PgId,
        /// Where to go on; the hole id to start.
        after: ChunkId,
    },
    /// Some ids of a PG.
    PgIds {
        /// Ids in order.
        ids: Vec<ChunkId>,
    },
    /// Storage nodes only: whether ids are fsynced on this node alone. Answered with `HaveAnswer`.
    HaveLocal {
        /// Ids.
        ids: Vec<ChunkId>,
    },
    /// The request was refused.
    Refused {
        /// Class.
        refusal: Refusal,
        /// One sentence: what, why, what to do.
        message: String,
    },
}

/// A frame that cannot be decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length field exceeds [`MAX_FRAME_LEN`]: nothing was allocated.
    #[error("frame of {len} bytes announced, at most {MAX_FRAME_LEN} allowed")]
    TooLong {
        /// Announced length.
        len: usize,
    },
    /// The body is malformed.
    #[error("frame of type {kind} is malformed")]
    Malformed {
        /// Frame type.
        kind: u8,
        /// Why.
        #[source]
        source: DecodeError,
    },
}

impl Frame {
    /// Name for logs.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Hello { .. } => "Hello",
            Self::Open { .. } => "Open",
            Self::Opened { .. } => "Opened",
            Self::Put { .. } => "Put",
            Self::Chunk { .. } => "Chunk",
            Self::PutDone { .. } => "PutDone",
            Self::Have { .. } => "Have",
            Self::HaveAnswer { .. } => "HaveAnswer",
            Self::Get { .. } => "Get",
            Self::Missing { .. } => "Missing",
            Self::Barrier { .. } => "Barrier",
            Self::Receipts { .. } => "Receipts",
            Self::PutNamed { .. } => "PutNamed",
            Self::Named { .. } => "Named",
            Self::ListNamed { .. } => "ListNamed",
            Self::NamedRecord { .. } => "NamedRecord",
            Self::End => "End",
            Self::ListPg { .. } => "ListPg",
            Self::PgIds { .. } => "PgIds",
            Self::HaveLocal { .. } => "HaveLocal",
            Self::Refused { .. } => "Refused",
        }
    }

    /// Encodes everything but a record's own bytes: `(head, record)`; the record (empty for most frames) follows the
    /// head on the wire and is never copied.
    #[must_use]
    pub fn encode(&self) -> (Bytes, Bytes) {
        let mut out = vec![0, 0, 0, 0, self.kind()];
        let mut tail = Bytes::new();
        match self {
            Self::Hello { version, oldest, role } => {
                out.put_u16(*version);
                out.put_u16(*oldest);
                out.push(*role);
                out.extend_from_slice(&[0; 11]);
            }
            Self::Open { session, layout_epoch, ticket } => {
                out.extend_from_slice(&session.to_bytes());
                out.put_u64(layout_epoch.0);
                out.extend_from_slice(ticket);
            }
            Self::Opened { fabric, node, incarnation, layout_epoch } => {
                out.extend_from_slice(&fabric.to_bytes());
                out.put_u64(incarnation.0);
                out.put_u64(layout_epoch.0);
                out.put_text(node);
            }
            Self::Put { job, session, window, layout_epoch } => {
                window_head(&mut out, *job, *session, *window, *layout_epoch);
            }
            Self::Chunk { pg, sequence, record } => {
                out.put_u16(pg.0);
                out.put_u32(*sequence);
                tail = record.clone();
            }
            Self::PutDone { taken } => out.put_u32(*taken),
            Self::Have { job, session, window, layout_epoch, ids } => {
                window_head(&mut out, *job, *session, *window, *layout_epoch);
                put_ids(&mut out, ids);
            }
            Self::HaveAnswer { answers } => {
                out.put_u32(answers.len() as u32);
                out.extend(answers.iter().map(|&a| a as u8));
            }
            Self::Get { ids } | Self::PgIds { ids } | Self::HaveLocal { ids } => {
                put_ids(&mut out, ids);
            }
            Self::Missing { id } => out.extend_from_slice(&id.0),
            Self::Barrier { job, session, window, layout_epoch, pgs, traceparent } => {
                window_head(&mut out, *job, *session, *window, *layout_epoch);
                out.put_u32(pgs.len() as u32);
                for (pg, puts) in pgs {
                    out.put_u16(pg.0);
                    out.put_u32(*puts);
                }
                out.put_text(traceparent);
            }
            Self::Receipts { receipts } => {
                out.put_u32(receipts.len() as u32);
                for r in receipts {
                    out.put_u32(r.len() as u32);
                    out.extend_from_slice(r);
                }
            }
            Self::PutNamed { space, key, fence, record } => {
                out.push(*space as u8);
                out.push(key.len().min(MAX_KEY_LEN) as u8);
                out.extend_from_slice(&key[..key.len().min(MAX_KEY_LEN)]);
                out.put_u64(*fence);
                tail = record.clone();
            }
            Self::Named { receipt } => out.extend_from_slice(receipt),
            Self::ListNamed { space, prefix } => {
                out.push(*space as u8);
                out.extend_from_slice(&prefix[..prefix.len().min(MAX_KEY_LEN)]);
            }
            Self::NamedRecord { key, fence, record } => {
                out.push(key.len().min(MAX_KEY_LEN) as u8);
                out.extend_from_slice(&key[..key.len().min(MAX_KEY_LEN)]);
                out.put_u64(*fence);
                tail = record.clone();
            }
            Self::End => {}
            Self::ListPg { pg, after } => {
                out.put_u16(pg.0);
                out.extend_from_slice(&after.0);
            }
            Self::Refused { refusal, message } => {
                out.put_u16(*refusal as u16);
                out.put_text(message);
            }
        }
        let len = (out.len() - 4 + tail.len()) as u32;
        out[..4].copy_from_slice(&len.to_le_bytes());
        (Bytes::from(out), tail)
    }

    /// Checks an announced length.
    ///
    /// # Errors
    /// [`FrameError::TooLong`].
    pub fn check_len(len: u32) -> Result<usize, FrameError> {
        let len = len as usize;
        if len == 0 || len > MAX_FRAME_LEN {
            return Err(FrameError::TooLong { len });
        }
        Ok(len)
    }

    /// Decodes type and body (the bytes after the length). Records are slices of `bytes`, not copies.
    ///
    /// # Errors
    /// [`FrameError::Malformed`].
    pub fn decode(bytes: &Bytes) -> Result<Self, FrameError> {
        let kind = bytes.first().copied().unwrap_or(0);
        Self::body(kind, bytes).map_err(|source| FrameError::Malformed { kind, source })
    }

    fn body(kind: u8, bytes: &Bytes) -> Result<Self, DecodeError> {
        let mut r = Reader::new("frame", bytes);
        r.u8()?;
        let tail = |r: Reader<'_>| bytes.slice(bytes.len() - r.remaining()..);
        let frame = match kind {
            1 => {
                let hello = Self::Hello { version: r.u16()?, oldest: r.u16()?, role: r.u8()? };
                r.bytes(11)?;
                hello
            }
            2 => {
                let session = SessionId::from_bytes(r.array()?);
                let layout_epoch = LayoutEpoch(r.u64()?);
                return Ok(Self::Open { session, layout_epoch, ticket: tail(r) });
            }
            3 => Self::Opened {
                fabric: FabricId::from_bytes(r.array()?),
                incarnation: NodeIncarnation(r.u64()?),
                layout_epoch: LayoutEpoch(r.u64()?),
                node: r.text()?,
            },
            4 => {
                let (job, session, window, layout_epoch) = read_window_head(&mut r)?;
                Self::Put { job, session, window, layout_epoch }
            }
            5 => {
                let pg = PgId(r.u16()?);
                let sequence = r.u32()?;
                return Ok(Self::Chunk { pg, sequence, record: tail(r) });
            }
            6 => Self::PutDone { taken: r.u32()? },
            7 => {
                let (job, session, window, layout_epoch) = read_window_head(&mut r)?;
                Self::Have { job, session, window, layout_epoch, ids: read_ids(&mut r)? }
            }
            8 => {
                let count = r.count(1)?;
                let answers = r
                    .bytes(count)?
                    .iter()
                    .map(|&a| match a {
                        0 => Ok(Presence::No),
                        1 => Ok(Presence::Yes),
                        2 => Ok(Presence::Unknown),
                        n => Err(value("presence", n, "0 to 2")),
                    })
                    .collect::<Result<_, _>>()?;
                Self::HaveAnswer { answers }
            }
            9 => Self::Get { ids: read_ids(&mut r)? },
            10 => Self::Missing { id: ChunkId(r.array()?) },
            11 => {
                let (job, session, window, layout_epoch) = read_window_head(&mut r)?;
                let count = r.count(6)?;
                let pgs = (0..count)
                    .map(|_| Ok((PgId(r.u16()?), r.u32()?)))
                    .collect::<Result<_, DecodeError>>()?;
                Self::Barrier { job, session, window, layout_epoch, pgs, traceparent: r.text()? }
            }
            12 => {
                let count = r.count(4)?;
                let mut receipts = Vec::with_capacity(count.min(64));
                for _ in 0..count {
                    let len = r.count(1)?;
                    let at = bytes.len() - r.remaining();
                    r.bytes(len)?;
                    receipts.push(bytes.slice(at..at + len));
                }
                Self::Receipts { receipts }
            }
            13 => {
                let space = Space::try_from(r.u8()?)?;
                let key = read_key(&mut r)?;
                let fence = r.u64()?;
                return Ok(Self::PutNamed { space, key, fence, record: tail(r) });
            }
            14 => return Ok(Self::Named { receipt: tail(r) }),
            15 => {
                let space = Space::try_from(r.u8()?)?;
                let prefix = r.rest();
                if prefix.len() > MAX_KEY_LEN {
                    return Err(value("prefix length", prefix.len(), "at most 64"));
                }
                return Ok(Self::ListNamed { space, prefix: prefix.to_vec() });
            }
            16 => {
                let key = read_key(&mut r)?;
                let fence = r.u64()?;
                return Ok(Self::NamedRecord { key, fence, record: tail(r) });
            }
            17 => Self::End,
            18 => Self::ListPg { pg: PgId(r.u16()?), after: ChunkId(r.array()?) },
            19 => Self::PgIds { ids: read_ids(&mut r)? },
            20 => Self::HaveLocal { ids: read_ids(&mut r)? },
            21 => Self::Refused { refusal: refusal(r.u16()?)?, message: r.text()? },
            n => return Err(value("frame type", n, "1 to 21")),
        };
        r.finish()?;
        Ok(frame)
    }

    const fn kind(&self) -> u8 {
        match self {
            Self::Hello { .. } => 1,
            Self::Open { .. } => 2,
            Self::Opened { .. } => 3,
            Self::Put { .. } => 4,
            Self::Chunk { .. } => 5,
            Self::PutDone { .. } => 6,
            Self::Have { .. } => 7,
            Self::HaveAnswer { .. } => 8,
            Self::Get { .. } => 9,
            Self::Missing { .. } => 10,
            Self::Barrier { .. } => 11,
            Self::Receipts { .. } => 12,
            Self::PutNamed { .. } => 13,
            Self::Named { .. } => 14,
            Self::ListNamed { .. } => 15,
            Self::NamedRecord { .. } => 16,
            Self::End => 17,
            Self::ListPg { .. } => 18,
            Self::PgIds { .. } => 19,
            Self::HaveLocal { .. } => 20,
            Self::Refused { .. } => 21,
        }
    }
}

fn window_head(
    out: &mut Vec<u8>,
    job: JobId,
    session: SessionId,
    window: Window,
    layout_epoch: LayoutEpoch,
) {
    out.extend_from_slice(&job.to_bytes());
    out.extend_from_slice(&session.to_bytes());
    out.put_u32(window.0);
    out.put_u64(layout_epoch.0);
}

fn read_window_head(
    r: &mut Reader<'_>,
) -> Result<(JobId, SessionId, Window, LayoutEpoch), DecodeError> {
    Ok((
        JobId::from_bytes(r.array()?),
        SessionId::from_bytes(r.array()?),
        Window(r.u32()?),
        LayoutEpoch(r.u64()?),
    ))
}

fn put_ids(out: &mut Vec<u8>, ids: &[ChunkId]) {
    out.put_u32(ids.len() as u32);
    for id in ids {
        out.extend_from_slice(&id.0);
    }
}

fn read_ids(r: &mut Reader<'_>) -> Result<Vec<ChunkId>, DecodeError> {
    let count = r.count(ChunkId::LEN)?;
    if count > MAX_IDS {
        return Err(value("id count", count, "at most 32768"));
    }
    (0..count).map(|_| Ok(ChunkId(r.array()?))).collect()
}

fn read_key(r: &mut Reader<'_>) -> Result<Vec<u8>, DecodeError> {
    let len = usize::from(r.u8()?);
    if len > MAX_KEY_LEN {
        return Err(value("key length", len, "at most 64"));
    }
    Ok(r.bytes(len)?.to_vec())
}

fn refusal(n: u16) -> Result<Refusal, DecodeError> {
    Ok(match n {
        1 => Refusal::Protocol,
        2 => Refusal::Denied,
        3 => Refusal::StaleLayout,
        4 => Refusal::NotAReplica,
        5 => Refusal::Fenced,
        6 => Refusal::Full,
        7 => Refusal::TooFewReplicas,
        8 => Refusal::Unavailable,
        9 => Refusal::Io,
        10 => Refusal::UnknownSession,
        _ => return Err(value("refusal", n, "1 to 10")),
    })
}

fn value(what: &'static str, found: impl ToString, expected: &'static str) -> DecodeError {
    DecodeError::Value { what, found: found.to_string(), expected }
}

#[cfg(test)]
mod tests;
