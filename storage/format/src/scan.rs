//! Reading a segment front to back, whatever has happened to it.
//!
//! Below the watermark a bad record is *damage*: it is reported and the scan goes on at the next good record. From the
//! watermark on the first bad byte ends the segment: what follows was never acknowledged and may be cut.

use std::io;

use bytes::Bytes;
use outrider_proto::record::Record;
use outrider_proto::wire::DecodeError;

use crate::entry::{EntryHead, MAX_ENTRY, NAME_LEN, PREFIX_LEN};
use crate::read_at::ReadAt;
use crate::segment::{ALIGNMENT, HEADER_LEN};

/// A good record met by a scan.
#[derive(Debug)]
pub struct Found {
    /// Offset of its entry.
    pub offset: u64,
    /// Head of its entry.
    pub head: EntryHead,
    /// The record.
    pub record: Record,
}

/// A range below the watermark that holds no good record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Where it begins.
    pub offset: u64,
    /// Its length, bytes.
    pub len: u64,
    /// What is wrong at its beginning.
    pub why: String,
}

/// What a scan found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ScanReport {
    /// Good records.
    pub records: u64,
    /// Damaged ranges below the watermark.
    pub damage: Vec<Damage>,
    /// Where good bytes end: the segment's length after recovery. Never below the watermark, unless the file is shorter.
    pub verified_len: u64,
}

/// How a scan treats the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where the records end: the length of the file, or the footer's offset.
    pub len: u64,
    /// Bytes below this were durable. For a sealed segment, `len`.
    pub watermark: u64,
}

/// Scans the records of a segment in order; `visit` sees every good one.
///
/// # Errors
/// The system's answer: an unreadable disk is for the caller to judge, it is never taken for an empty one.
pub fn scan(
    file: &(impl ReadAt + ?Sized),
    extent: Extent,
    mut visit: impl FnMut(Found),
) -> io::Result<ScanReport> {
    let mut report = ScanReport { verified_len: HEADER_LEN.min(extent.len), ..Default::default() };
    let mut window = Window::new(file, extent.len);
    let mut at = HEADER_LEN;
    while at < extent.len {
        match window.entry(at)? {
            Ok((head, record)) => {
                let next = at + head.padded_len();
                visit(Found { offset: at, head, record });
                report.records += 1;
                at = next.min(extent.len);
                report.verified_len = at;
            }
            Err(_) if at >= extent.watermark => break,
            Err(why) => {
                let begin = at;
                at += ALIGNMENT;
                while at < extent.watermark && window.entry(at)?.is_err() {
                    at += ALIGNMENT;
                }
                let end = at.min(extent.len);
                let why = why.to_string();
                report.damage.push(Damage { offset: begin, len: end - begin, why });
                report.verified_len = end;
            }
        }
    }
    if extent.watermark > extent.len {
        report.damage.push(Damage {
            offset: extent.len,
            len: extent.watermark - extent.len,
            why: "the file is shorter than what was durable".to_owned(),
        });
    }
    Ok(report)
}

/// A sliding buffer over the file.
struct Window<'a, F: ?Sized> {
    file: &'a F,
    len: u64,
    start: u64,
    bytes: Bytes,
}

/// Why there is no entry at an offset.
#[derive(Debug, thiserror::Error)]
enum NoEntry {
    #[error(transparent)]
    Malformed(#[from] DecodeError),
    #[error("the record is cut short")]
    CutShort,
}

/// Bytes read at once.
const READ: usize = 4 << 20;

impl<'a, F: ReadAt + ?Sized> Window<'a, F> {
    fn new(file: &'a F, len: u64) -> Self {
        Self { file, len, start: 0, bytes: Bytes::new() }
    }

    /// Up to `want` bytes at an offset.
    fn at(&mut self, offset: u64, want: usize) -> io::Result<Bytes> {
        let left = usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX);
        let want = want.min(left);
        let end = offset + want as u64;
        if offset < self.start || end > self.start + self.bytes.len() as u64 {
            let mut buffer = vec![0; left.min(want.max(READ))];
            self.file.read_exact_at(&mut buffer, offset)?;
            self.start = offset;
            self.bytes = buffer.into();
        }
        let from = usize::try_from(offset - self.start).unwrap_or(usize::MAX);
        Ok(self.bytes.slice(from..from + want))
    }

    /// The entry at an offset, or why there is none.
    fn entry(&mut self, offset: u64) -> io::Result<Result<(EntryHead, Record), NoEntry>> {
        const HEAD: usize = PREFIX_LEN + NAME_LEN + outrider_proto::record::HEADER_LEN;
        let head = match EntryHead::decode(&self.at(offset, HEAD)?) {
            Ok(head) => head,
            Err(error) => return Ok(Err(error.into())),
        };
        debug_assert!(head.len() <= MAX_ENTRY);
        let bytes = self.at(offset, head.len())?;
        if bytes.len() < head.len() {
            return Ok(Err(NoEntry::CutShort));
        }
        match Record::decode(bytes.slice(head.record_offset()..)) {
            Ok(record) => Ok(Ok((head, record))),
            Err(error) => Ok(Err(error.into())),
        }
    }
}

/// Reads one entry whose place is known, and verifies it.
///
/// # Errors
/// The system's answer; `InvalidData` when the bytes are no good entry.
pub fn read_entry(
    file: &(impl ReadAt + ?Sized),
    offset: u64,
    len: u32,
) -> io::Result<(EntryHead, Record)> {
    let invalid =
        |e: &dyn std::fmt::Display| io::Error::new(io::ErrorKind::InvalidData, e.to_string());
    if len as usize > MAX_ENTRY {
        return Err(invalid(&"the entry is longer than any entry"));
    }
    let mut buffer = vec![0; len as usize];
    file.read_exact_at(&mut buffer, offset)?;
    let bytes = Bytes::from(buffer);
    let head = EntryHead::decode(&bytes).map_err(|e| invalid(&e))?;
    let record = Record::decode(bytes.slice(head.record_offset()..)).map_err(|e| invalid(&e))?;
    Ok((head, record))
}
