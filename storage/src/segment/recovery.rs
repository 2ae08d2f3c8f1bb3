//! Opening the segments of a store after whatever ended the last process.
//!
//! Sealed segments are taken by their footers and never cut. Unsealed ones are scanned whole: damage below the watermark
//! is reported, torn bytes above it are cut, the rest is written once more and synced (see `write_again`), and only then
//! the tables are made to agree.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::path::Path;

use outrider_format::ReadAt;
use outrider_format::footer::{Footer, FooterLine};
use outrider_format::scan::{Damage, Extent, Found, scan};
use outrider_format::segment::{
    self, ALIGNMENT, HEADER_LEN, SegmentHeader, SegmentKind, SegmentNumber, node_hash,
};
use outrider_format::watermark::{self, Watermarks};

use crate::error::OpenError;
use crate::index::{ChunkIndex, IndexError, Location, WHOLE};
use crate::named::NamedTable;

use super::disk::DiskFile;
use super::writer::{OpenSegment, SegmentPlace, seal};

/// What recovery found.
#[derive(Debug, Default)]
pub struct Recovery {
    /// Damaged ranges, by segment.
    pub damage: Vec<(SegmentNumber, Damage)>,
    /// Bytes cut above watermarks.
    pub cut_bytes: u64,
    /// Bytes of all segments.
    pub stored_bytes: u64,
    /// Sealed segments.
    pub sealed: u64,
    /// Segments whose entries had to be indexed.
    pub indexed: u64,
}

/// The state to go on from.
pub struct Recovered {
    /// Unsealed segments.
    pub open: BTreeMap<SegmentKind, OpenSegment>,
    /// Generation of the last watermarks.
    pub generation: u64,
    /// Next free number.
    pub next: SegmentNumber,
    /// What was found.
    pub report: Recovery,
}

/// Brings segments and tables into one state.
///
/// # Errors
/// [`OpenError`].
pub fn recover(
    place: &SegmentPlace,
    index: &dyn ChunkIndex,
    named: &NamedTable,
) -> Result<Recovered, OpenError> {
    let read_error = |path: &Path| {
        let path = path.to_owned();
        move |source| OpenError::Segment { path, source }
    };
    let tables = |error: IndexError| OpenError::Segment {
        path: place.dir.clone(),
        source: io::Error::other(error.to_string()),
    };
    let marks_path = place.dir.join(watermark::FILE_NAME);
    let marks = match std::fs::read(&marks_path) {
        Ok(bytes) => Watermarks::decode(&bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(read_error(&marks_path)(error)),
    };
    let mut through: BTreeMap<SegmentNumber, u64> =
        index.through().map_err(tables)?.into_iter().collect();
    let mut recovered = Recovered {
        open: BTreeMap::new(),
        generation: marks.as_ref().map_or(0, |m| m.generation),
        next: SegmentNumber(1),
        report: Recovery::default(),
    };
    for (number, sealed) in segments_in(&place.dir).map_err(read_error(&place.dir))? {
        let path = segment::path(&place.dir, number, sealed);
        recovered.next = SegmentNumber(number.0 + 1);
        let mut one =
            One { place, index, named, number, path: &path, report: &mut recovered.report };
        let indexed = through.remove(&number).unwrap_or(0);
        if sealed {
            one.sealed(indexed)?;
            continue;
        }
        let known = marks.as_ref().map(|m| m.lengths.get(&number).copied().unwrap_or(0));
        if known.is_none() {
            tracing::error!(path = %marks_path.display(), segment = %number, "the watermarks cannot be read: this segment counts as durable to its end, nothing of it is cut");
        }
        if let Some((kind, open)) = one.unsealed(known)? {
            // Only the newest of a kind goes on growing.
            if let Some(mut older) = recovered.open.insert(kind, open) {
                let number = older.number;
                seal(place, &mut older).map_err(|e| read_error(&path)(e.into()))?;
                index.insert(&[], &[(number, WHOLE)]).map_err(tables)?;
                recovered.report.sealed += 1;
            }
        }
    }
    for (gone, _) in through {
        index.forget(gone).map_err(tables)?;
        named.cut(gone, 0, u64::MAX).map_err(tables)?;
    }
    Ok(recovered)
}

fn segments_in(dir: &Path) -> io::Result<BTreeSet<(SegmentNumber, bool)>> {
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(dir)? {
        found.extend(segment::parse_name(&entry?.path()));
    }
    Ok(found)
}

/// Bytes written again at once.
const AGAIN: u64 = 1 << 20;

/// Writes `from..to` of a file in place, as it is read. What the last process wrote and never synced, or failed to sync, is
/// read from the system's memory, whether or not it is on the disk: after a failed write-back the system keeps the bytes
/// but takes them for written, and a sync of a new process succeeds without them. Written once more they are to be
/// written, and the sync that follows speaks of them.
fn write_again(file: &File, writable: &mut dyn DiskFile, from: u64, to: u64) -> io::Result<()> {
    let mut buffer = Vec::new();
    let mut at = from;
    while at < to {
        let len = AGAIN.min(to - at);
        buffer.resize(usize::try_from(len).unwrap_or(usize::MAX), 0);
        file.read_exact_at(&mut buffer, at)?;
        writable.write_at(at, &[&buffer])?;
        at += len;
    }
    Ok(())
}

/// One segment on its way into the store.
struct One<'a> {
    place: &'a SegmentPlace,
    index: &'a dyn ChunkIndex,
    named: &'a NamedTable,
    number: SegmentNumber,
    path: &'a Path,
    report: &'a mut Recovery,
}

impl One<'_> {
    fn sealed(&mut self, indexed: u64) -> Result<(), OpenError> {
        let file = File::open(self.path).map_err(|e| self.failed(e))?;
        let len = file.metadata().map_err(|e| self.failed(e))?.len();
        self.report.stored_bytes += len;
        self.report.sealed += 1;
        if indexed == WHOLE {
            return Ok(());
        }
        self.report.indexed += 1;
        let Some(header) = self.header(&file, len)? else {
            return Ok(());
        };
        let chunks = matches!(header.kind, SegmentKind::Data | SegmentKind::Pages);
        match Footer::read(&file, len) {
            Ok(footer) if chunks => {
                let entries: Vec<_> =
                    footer.lines.iter().map(|l| (l.id, self.location(l.offset, l.len))).collect();
                self.insert(&entries, WHOLE)
            }
            // Names are not in the footer.
            Ok(footer) => {
                let extent = Extent { len: footer.records_end, watermark: footer.records_end };
                self.scan(&file, extent, WHOLE).map(drop)
            }
            Err(error) => {
                let why = error.to_string();
                self.damaged(vec![Damage { offset: 0, len, why }]);
                // The footer itself is no record: it shows as one more damaged range at the end.
                self.scan(&file, Extent { len, watermark: len }, WHOLE).map(drop)
            }
        }
    }

    /// `known`: its watermark, 0 when the watermarks do not speak of it; `None` when they cannot be read.
    fn unsealed(
        &mut self,
        known: Option<u64>,
    ) -> Result<Option<(SegmentKind, OpenSegment)>, OpenError> {
        let file = File::open(self.path).map_err(|e| self.failed(e))?;
        let len = file.metadata().map_err(|e| self.failed(e))?.len();
        // Without a watermark a bad record must not cost what was durable behind it: the scan goes on to the end, but for
        // the odd bytes in which no record begins.
        let watermark = known.unwrap_or(len - len % ALIGNMENT);
        let synced = known.unwrap_or(0);
        if len < HEADER_LEN && synced == 0 {
            // Killed while it was made: nothing was ever in it.
            std::fs::remove_file(self.path).map_err(|e| self.failed(e))?;
            self.index.forget(self.number).map_err(|e| self.tables(&e))?;
            return Ok(None);
        }
        let Some(header) = self.header(&file, len)? else {
            self.index.forget(self.number).map_err(|e| self.tables(&e))?;
            return Ok(None);
        };
        if Footer::read(&file, len).is_ok() {
            // Killed between footer and name.
            let disk = &self.place.disk;
            let name = segment::path(&self.place.dir, self.number, true);
            let mut writable = disk.open(self.path).map_err(|e| self.failed(e))?;
            write_again(&file, &mut *writable, synced, len).map_err(|e| self.failed(e))?;
            writable.sync().map_err(|e| self.failed(e))?;
            disk.rename(self.path, &name).map_err(|e| self.failed(e))?;
            let mut one = One {
                place: self.place,
                index: self.index,
                named: self.named,
                number: self.number,
                path: &name,
                report: &mut *self.report,
            };
            return one.sealed(0).map(|()| None);
        }
        let mut writable = self.place.disk.open(self.path).map_err(|e| self.failed(e))?;
        let (lines, verified) = self.scan(&file, Extent { len, watermark }, 0)?;
        let end = verified.max(HEADER_LEN);
        if end < len {
            tracing::info!(segment = %self.number, bytes = len - end, "torn bytes after the last record are cut; they were never acknowledged");
            writable.set_len(end).map_err(|e| self.failed(e))?;
            self.report.cut_bytes += len - end;
        }
        write_again(&file, &mut *writable, synced, end).map_err(|e| self.failed(e))?;
        writable.sync().map_err(|e| self.failed(e))?;
        let entries: Vec<_> =
            lines.iter().map(|l| (l.id, self.location(l.offset, l.len))).collect();
        self.index.cut(self.number, 0, u64::MAX).map_err(|e| self.tables(&e))?;
        let chunks = matches!(header.kind, SegmentKind::Data | SegmentKind::Pages);
        self.insert(if chunks { &entries } else { &[] }, end)?;
        self.report.stored_bytes += end;
        self.report.indexed += 1;
        let open =
            OpenSegment { number: self.number, len: end, lines, dirty: false, file: writable };
        Ok(Some((header.kind, open)))
    }

    /// Checks whose segment it is. `None`: the header is damaged, the file is left alone.
    fn header(&mut self, file: &File, len: u64) -> Result<Option<SegmentHeader>, OpenError> {
        let mut bytes = [0; HEADER_LEN as usize];
        let read = file.read_exact_at(&mut bytes, 0).map_err(|e| e.to_string());
        match read.and_then(|()| SegmentHeader::decode(&bytes).map_err(|e| e.to_string())) {
            Ok(header)
                if header.fabric == self.place.fabric
                    && header.node == node_hash(&self.place.node) =>
            {
                Ok(Some(header))
            }
            Ok(_) => Err(OpenError::Foreign { path: self.path.to_owned() }),
            Err(why) => {
                self.damaged(vec![Damage { offset: 0, len, why }]);
                Ok(None)
            }
        }
    }

    /// Scans the records; names go into their table, and for sealed segments chunks into the index.
    fn scan(
        &mut self,
        file: &File,
        extent: Extent,
        through: u64,
    ) -> Result<(Vec<FooterLine>, u64), OpenError> {
        let mut lines = Vec::new();
        let mut names = Vec::new();
        let report = scan(file, extent, |Found { offset, head, record }| {
            let len = u32::try_from(head.len()).unwrap_or(u32::MAX);
            let pg = head.provenance.pg;
            lines.push(FooterLine { id: record.id(), offset, len, pg });
            if let Some(name) = head.name {
                names.push((name, record.id(), offset, len));
            }
        })
        .map_err(|e| self.failed(e))?;
        for damage in &report.damage {
            let (from, to) = (damage.offset, damage.offset.saturating_add(damage.len));
            self.index.cut(self.number, from, to).map_err(|e| self.tables(&e))?;
            self.named.cut(self.number, from, to).map_err(|e| self.tables(&e))?;
        }
        if report.verified_len < extent.len {
            self.named
                .cut(self.number, report.verified_len, u64::MAX)
                .map_err(|e| self.tables(&e))?;
        }
        self.damaged(report.damage);
        for (name, id, offset, len) in &names {
            let at = self.location(*offset, *len);
            self.named.insert(name, *id, at).map_err(|e| self.tables(&e))?;
        }
        if through == WHOLE {
            let entries: Vec<_> = if names.is_empty() {
                lines.iter().map(|l| (l.id, self.location(l.offset, l.len))).collect()
            } else {
                Vec::new()
            };
            self.insert(&entries, WHOLE)?;
        }
        Ok((lines, report.verified_len))
    }

    fn insert(
        &self,
        entries: &[(outrider_proto::ids::ChunkId, Location)],
        through: u64,
    ) -> Result<(), OpenError> {
        self.index.insert(entries, &[(self.number, through)]).map_err(|e| self.tables(&e))
    }

    fn location(&self, offset: u64, len: u32) -> Location {
        Location { segment: self.number, offset, len }
    }

    fn damaged(&mut self, damage: Vec<Damage>) {
        for one in damage {
            tracing::error!(path = %self.path.display(), offset = one.offset, bytes = one.len, why = one.why, "damage in a segment: these bytes were durable and are not readable; replicas have copies");
            self.report.damage.push((self.number, one));
        }
    }

    fn failed(&self, source: io::Error) -> OpenError {
        OpenError::Segment { path: self.path.to_owned(), source }
    }

    fn tables(&self, error: &IndexError) -> OpenError {
        self.failed(io::Error::other(error.to_string()))
    }
}
