//! A client of QEMU's NBD server: fixed newstyle, structured replies, block status, over a Unix socket. Blocks.
//!
//! One connection carries one request at a time; several requests in flight are several connections
//! ([`super::frozen::FrozenDisk`]). Every length that comes from the server is checked before it is believed.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE: u32 = 0x6744_6698;
const STRUCTURED: u32 = 0x668e_33ef;
/// Fixed newstyle, no padding.
const CLIENT_FLAGS: u32 = 3;
/// Longest answer to an option, and longest chunk of a reply besides its data.
const LONGEST: u32 = 64 << 10;
/// Extents of one answer are at most this many.
const MOST_EXTENTS: u32 = 1 << 20;
/// How long the server may be silent: a disk that takes longer is as good as gone.
const SILENCE: Duration = Duration::from_secs(120);
/// Longest read or write in one request.
pub(super) const LONGEST_IO: usize = 32 << 20;

mod option {
    pub(super) const GO: u32 = 7;
    pub(super) const STRUCTURED_REPLY: u32 = 8;
    pub(super) const SET_META_CONTEXT: u32 = 10;
}
mod command {
    pub(super) const READ: u16 = 0;
    pub(super) const WRITE: u16 = 1;
    pub(super) const DISCONNECT: u16 = 2;
    pub(super) const FLUSH: u16 = 3;
    pub(super) const BLOCK_STATUS: u16 = 7;
}

/// The allocation of an export, as a name of its meta context.
pub(super) const ALLOCATION: &str = "base:allocation";
/// Flag of `base:allocation`: reads as zeros.
pub(super) const ZERO: u32 = 2;
/// Flag of a dirty bitmap's context.
pub(super) const DIRTY: u32 = 1;

/// A connection in transmission phase.
#[derive(Debug)]
pub(super) struct Nbd {
    stream: UnixStream,
    size: u64,
    /// Id of the meta context that was asked for.
    context: Option<u32>,
    handle: u64,
    /// How long the server may be silent.
    patience: Duration,
}

impl Nbd {
    /// Connects to an export. With `context`, that meta context must be there.
    pub(super) fn connect(socket: &Path, export: &str, context: Option<&str>) -> io::Result<Self> {
        Self::connect_with(socket, export, context, SILENCE)
    }

    fn connect_with(
        socket: &Path,
        export: &str,
        context: Option<&str>,
        patience: Duration,
    ) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        let mut nbd = Self { stream, size: 0, context: None, handle: 0, patience };
        nbd.negotiate(export, context).map_err(|e| {
            io::Error::new(e.kind(), format!("NBD export {export:?} at {}: {e}", socket.display()))
        })?;
        Ok(nbd)
    }

    /// Bytes of the export.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Fills `buf` from `offset` on.
    pub(super) fn read(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        for part in buf.chunks_mut(LONGEST_IO) {
            self.read_part(offset + done, part)?;
            done += part.len() as u64;
        }
        Ok(())
    }

    fn read_part(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.request(command::READ, offset, length(buf.len())?)?;
        let mut filled = 0;
        let mut failure = None;
        loop {
            let chunk = self.chunk()?;
            match chunk.kind {
                Chunk::SIMPLE => {
                    self.stream.read_exact(buf)?;
                    filled = buf.len();
                }
                Chunk::NONE => {}
                Chunk::DATA => {
                    let start = self.offset_within(offset, buf.len())?;
                    let len = (chunk.length as usize)
                        .checked_sub(8)
                        .filter(|len| *len <= buf.len() - start)
                        .ok_or_else(|| odd("a data chunk goes beyond the request"))?;
                    self.stream.read_exact(&mut buf[start..start + len])?;
                    filled += len;
                }
                Chunk::HOLE => {
                    let start = self.offset_within(offset, buf.len())?;
                    let len = self.u32()? as usize;
                    if chunk.length != 12 || len > buf.len() - start {
                        return Err(odd("a hole goes beyond the request"));
                    }
                    buf[start..start + len].fill(0);
                    filled += len;
                }
                kind if kind & Chunk::ERROR != 0 => failure = Some(self.error(chunk.length)?),
                kind => return Err(odd(&format!("a reply of unknown type {kind}"))),
            }
            if chunk.done {
                break;
            }
        }
        match failure {
            Some(failure) => Err(failure),
            None if filled == buf.len() => Ok(()),
            None => Err(odd("the reply does not cover the request")),
        }
    }

    /// Extents from `offset` on, as (length, flags); at least one, together perhaps less than `len`.
    pub(super) fn block_status(&mut self, offset: u64, len: u64) -> io::Result<Vec<(u64, u32)>> {
        let wanted = self.context.ok_or_else(|| odd("no meta context was chosen"))?;
        let asked = u32::try_from(len).unwrap_or(!0xffff);
        self.request(command::BLOCK_STATUS, offset, asked)?;
        let mut extents = Vec::new();
        let mut failure = None;
        loop {
            let chunk = self.chunk()?;
            match chunk.kind {
                Chunk::SIMPLE | Chunk::NONE => {}
                Chunk::STATUS => {
                    let count = chunk.length.saturating_sub(4) / 8;
                    if chunk.length % 8 != 4 || count > MOST_EXTENTS {
                        return Err(odd("a block status of an odd length"));
                    }
                    let context = self.u32()?;
                    for _ in 0..count {
                        let extent = (u64::from(self.u32()?), self.u32()?);
                        if context == wanted {
                            extents.push(extent);
                        }
                    }
                }
                kind if kind & Chunk::ERROR != 0 => failure = Some(self.error(chunk.length)?),
                kind => return Err(odd(&format!("a reply of unknown type {kind}"))),
            }
            if chunk.done {
                break;
            }
        }
        match failure {
            Some(failure) => Err(failure),
            None if extents.iter().any(|(len, _)| *len > 0) => Ok(extents),
            None => Err(odd("the block status is empty")),
        }
    }

    /// Writes bytes.
    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut done = 0;
        for part in bytes.chunks(LONGEST_IO) {
            self.request(command::WRITE, offset + done, length(part.len())?)?;
            self.stream.write_all(part)?;
            self.acknowledged()?;
            done += part.len() as u64;
        }
        Ok(())
    }

    /// Makes what was written durable, however long the storage takes; a server that ends is noticed.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.request(command::FLUSH, 0, 0)?;
        self.stream.set_read_timeout(None)?;
        let flushed = self.acknowledged();
        self.stream.set_read_timeout(Some(self.patience))?;
        flushed
    }

    /// Says good-bye.
    pub(super) fn disconnect(mut self) -> io::Result<()> {
        self.request(command::DISCONNECT, 0, 0)
    }

    fn acknowledged(&mut self) -> io::Result<()> {
        let mut failure = None;
        loop {
            let chunk = self.chunk()?;
            match chunk.kind {
                Chunk::SIMPLE | Chunk::NONE => {}
                kind if kind & Chunk::ERROR != 0 => failure = Some(self.error(chunk.length)?),
                kind => return Err(odd(&format!("a reply of unknown type {kind}"))),
            }
            if chunk.done {
                return failure.map_or(Ok(()), Err);
            }
        }
    }

    fn request(&mut self, command: u16, offset: u64, length: u32) -> io::Result<()> {
        self.handle += 1;
        let mut bytes = Vec::with_capacity(28);
        bytes.extend_from_slice(&REQUEST.to_be_bytes());
        bytes.extend_from_slice(&0_u16.to_be_bytes());
        bytes.extend_from_slice(&command.to_be_bytes());
        bytes.extend_from_slice(&self.handle.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&length.to_be_bytes());
        self.stream.write_all(&bytes)
    }

    fn chunk(&mut self) -> io::Result<Chunk> {
        let magic = self.u32()?;
        let chunk = match magic {
            SIMPLE => {
                let error = self.u32()?;
                self.check_handle()?;
                if error != 0 {
                    return Err(refused(error, ""));
                }
                return Ok(Chunk { kind: Chunk::SIMPLE, length: 0, done: true });
            }
            STRUCTURED => {
                let (flags, kind) = (self.u16()?, self.u16()?);
                self.check_handle()?;
                Chunk { kind, length: self.u32()?, done: flags & 1 != 0 }
            }
            _ => return Err(odd(&format!("a reply that begins with {magic:#x}"))),
        };
        Ok(chunk)
    }

    fn check_handle(&mut self) -> io::Result<()> {
        let handle = self.u64()?;
        if handle == self.handle { Ok(()) } else { Err(odd("an answer to another request")) }
    }

    /// Reads a chunk's offset and makes it relative to the request.
    fn offset_within(&mut self, base: u64, len: usize) -> io::Result<usize> {
        let offset = self.u64()?;
        offset
            .checked_sub(base)
            .and_then(|o| usize::try_from(o).ok())
            .filter(|o| *o <= len)
            .ok_or_else(|| odd("a chunk outside of the request"))
    }

    fn error(&mut self, length: u32) -> io::Result<io::Error> {
        if !(6..=LONGEST).contains(&length) {
            return Err(odd("an error of an odd length"));
        }
        let (code, text_len) = (self.u32()?, u32::from(self.u16()?));
        let rest = self.bytes(length - 6)?;
        let text = rest.get(..text_len as usize).unwrap_or_default();
        Ok(refused(code, &String::from_utf8_lossy(text)))
    }

    fn negotiate(&mut self, export: &str, context: Option<&str>) -> io::Result<()> {
        if self.u64()? != MAGIC || self.u64()? != OPTION {
            return Err(odd("it is no NBD server of the newstyle"));
        }
        let flags = self.u16()?;
        if flags & 1 == 0 {
            return Err(odd("it does not speak fixed newstyle"));
        }
        // Without the second bit the server would pad; QEMU always has it.
        let ours = CLIENT_FLAGS & u32::from(flags);
        self.stream.write_all(&ours.to_be_bytes())?;
        self.option(option::STRUCTURED_REPLY, &[], |_, _| Ok(()))?;
        if let Some(context) = context {
            let mut data = named(export);
            data.extend_from_slice(&1_u32.to_be_bytes());
            data.extend_from_slice(&named(context));
            let mut found = None;
            self.option(option::SET_META_CONTEXT, &data, |kind, data| {
                if kind == 4 && data.get(4..) == Some(context.as_bytes()) {
                    found = data.first_chunk::<4>().map(|id| u32::from_be_bytes(*id));
                }
                Ok(())
            })?;
            if found.is_none() {
                return Err(odd(&format!("it has no meta context {context:?}")));
            }
            self.context = found;
        }
        let mut data = named(export);
        data.extend_from_slice(&0_u16.to_be_bytes());
        let mut size = None;
        self.option(option::GO, &data, |kind, data| {
            if kind == 3 && data.first_chunk::<2>() == Some(&[0, 0]) {
                size = data
                    .get(2..10)
                    .and_then(|b| b.first_chunk::<8>())
                    .map(|b| u64::from_be_bytes(*b));
            }
            Ok(())
        })?;
        self.size = size.ok_or_else(|| odd("it does not tell the export's size"))?;
        Ok(())
    }

    /// Asks for an option and hands each reply but the last to `take`.
    fn option(
        &mut self,
        option: u32,
        data: &[u8],
        mut take: impl FnMut(u32, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut bytes = OPTION.to_be_bytes().to_vec();
        bytes.extend_from_slice(&option.to_be_bytes());
        bytes.extend_from_slice(&length(data.len())?.to_be_bytes());
        bytes.extend_from_slice(data);
        self.stream.write_all(&bytes)?;
        loop {
            if self.u64()? != OPTION_REPLY || self.u32()? != option {
                return Err(odd("an answer to another option"));
            }
            let (kind, length) = (self.u32()?, self.u32()?);
            if length > LONGEST {
                return Err(odd("an answer that is too long"));
            }
            let data = self.bytes(length)?;
            match kind {
                1 => return Ok(()),
                _ if kind & 0x8000_0000 != 0 => {
                    let text = String::from_utf8_lossy(&data).into_owned();
                    let code = kind & 0x7fff_ffff;
                    return Err(odd(&format!("option {option} was refused ({code}) {text}")));
                }
                _ => take(kind, &data)?,
            }
        }
    }

    fn bytes(&mut self, length: u32) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length as usize];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn u16(&mut self) -> io::Result<u16> {
        let mut bytes = [0; 2];
        self.stream.read_exact(&mut bytes)?;
        Ok(u16::from_be_bytes(bytes))
    }

    fn u32(&mut self) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.stream.read_exact(&mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }

    fn u64(&mut self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.stream.read_exact(&mut bytes)?;
        Ok(u64::from_be_bytes(bytes))
    }
}

/// The head of a reply.
struct Chunk {
    kind: u16,
    length: u32,
    done: bool,
}

impl Chunk {
    const NONE: u16 = 0;
    const DATA: u16 = 1;
    const HOLE: u16 = 2;
    const STATUS: u16 = 5;
    const ERROR: u16 = 1 << 15;
    /// Not of the protocol: a simple reply, whose data follows.
    const SIMPLE: u16 = 0x7fff;
}

fn named(text: &str) -> Vec<u8> {
    // Names of exports and contexts are ours and short.
    let mut bytes = u32::try_from(text.len()).unwrap_or(0).to_be_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

fn length(len: usize) -> io::Result<u32> {
    u32::try_from(len).map_err(|_| odd("a request that is too long"))
}

fn odd(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

fn refused(code: u32, text: &str) -> io::Error {
    let meaning = io::Error::from_raw_os_error(i32::try_from(code).unwrap_or(5));
    let text = if text.is_empty() { "the NBD server gave no reason" } else { text };
    io::Error::new(meaning.kind(), format!("{text} ({meaning})"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::sync::mpsc;

    /// A server that acknowledges a request when it is told to.
    fn slow(socket: &Path, go: mpsc::Receiver<()>) {
        let listener = UnixListener::bind(socket).expect("listens");
        std::thread::spawn(move || {
            let (mut peer, _) = listener.accept().expect("a client");
            peer.write_all(&MAGIC.to_be_bytes()).expect("sent");
            peer.write_all(&OPTION.to_be_bytes()).expect("sent");
            peer.write_all(&1_u16.to_be_bytes()).expect("sent");
            let mut flags = [0; 4];
            peer.read_exact(&mut flags).expect("read");
            loop {
                let mut head = [0; 16];
                peer.read_exact(&mut head).expect("an option");
                let option = u32::from_be_bytes(head[8..12].try_into().expect("four"));
                let length = u32::from_be_bytes(head[12..].try_into().expect("four"));
                let mut data = vec![0; length as usize];
                peer.read_exact(&mut data).expect("read");
                let mut reply = |kind: u32, data: &[u8]| {
                    let mut bytes = OPTION_REPLY.to_be_bytes().to_vec();
                    bytes.extend(option.to_be_bytes());
                    bytes.extend(kind.to_be_bytes());
                    bytes.extend((u32::try_from(data.len()).expect("short")).to_be_bytes());
                    bytes.extend(data);
                    peer.write_all(&bytes).expect("sent");
                };
                if option == option::GO {
                    // The export's size and flags.
                    reply(3, &[0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 1]);
                    reply(1, &[]);
                    break;
                }
                reply(1, &[]);
            }
            while go.recv().is_ok() {
                let mut request = [0; 28];
                if peer.read_exact(&mut request).is_err() {
                    return;
                }
                let mut answer = SIMPLE.to_be_bytes().to_vec();
                answer.extend([0; 4]);
                answer.extend(&request[8..16]);
                peer.write_all(&answer).expect("sent");
            }
        });
    }

    #[test]
    fn a_flush_may_take_longer_than_anything_else() {
        let dir = tempfile::tempdir().expect("a folder");
        let socket = dir.path().join("s");
        let (go, may_go) = mpsc::sync_channel(1);
        slow(&socket, may_go);
        let patience = Duration::from_millis(50);
        let mut nbd = Nbd::connect_with(&socket, "", None, patience).expect("connected");
        let answering = std::thread::spawn(move || {
            std::thread::sleep(10 * patience);
            go.send(()).expect("it waits");
            go
        });
        nbd.flush().expect("flushed, late");
        // Everything else may not.
        let _go = answering.join().expect("no panic");
        let late = nbd.write(0, b"x").expect_err("nobody answers");
        assert!(
            matches!(late.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut),
            "{late}"
        );
    }
}
