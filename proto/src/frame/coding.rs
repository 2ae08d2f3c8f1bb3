//! Frames as bytes. `docs/protocol.md` has the layout of each; golden bytes pin it.

use bytes::Bytes;

use super::{Frame, FrameError, MAX_IDS, MAX_KEY_LEN, MAX_NAMES, Presence, Refusal, Space};
use crate::ids::{ChunkId, FabricId, JobId, LayoutEpoch, NodeIncarnation, PgId, SessionId, Window};
use crate::wire::{DecodeError, Put as _, Reader};

impl Frame {
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
                put_key(&mut out, key);
                out.put_u64(*fence);
                tail = record.clone();
            }
            Self::Named { receipt } => out.extend_from_slice(receipt),
            Self::ListNamed { space, prefix } => {
                out.push(*space as u8);
                out.extend_from_slice(&prefix[..prefix.len().min(MAX_KEY_LEN)]);
            }
            Self::NamedRecord { key, fence, record } => {
                put_key(&mut out, key);
                out.put_u64(*fence);
                tail = record.clone();
            }
            Self::End => {}
            Self::ListPg { pg, after } => {
                out.put_u16(pg.0);
                out.extend_from_slice(&after.0);
            }
            Self::ListNames { space, after } => {
                out.push(*space as u8);
                put_key(&mut out, after);
            }
            Self::Names { names } => {
                out.put_u32(names.len() as u32);
                for (key, fence) in names {
                    put_key(&mut out, key);
                    out.put_u64(*fence);
                }
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
            22 => Self::ListNames { space: Space::try_from(r.u8()?)?, after: read_key(&mut r)? },
            23 => {
                // The shortest name: a key of no bytes.
                let count = r.count(9)?;
                if count > MAX_NAMES {
                    return Err(value("name count", count, "at most 8192"));
                }
                let names = (0..count)
                    .map(|_| Ok((read_key(&mut r)?, r.u64()?)))
                    .collect::<Result<_, DecodeError>>()?;
                Self::Names { names }
            }
            n => return Err(value("frame type", n, "1 to 23")),
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
            Self::ListNames { .. } => 22,
            Self::Names { .. } => 23,
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

fn put_key(out: &mut Vec<u8>, key: &[u8]) {
    let key = &key[..key.len().min(MAX_KEY_LEN)];
    out.push(key.len() as u8);
    out.extend_from_slice(key);
}

fn read_key(r: &mut Reader<'_>) -> Result<Vec<u8>, DecodeError> {
    let len = usize::from(r.u8()?);
    if len > MAX_KEY_LEN {
        return Err(value("key length", len, "at most 64"));
    }
    Ok(r.bytes(len)?.to_vec())
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
