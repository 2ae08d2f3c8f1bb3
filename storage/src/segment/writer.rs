//! Writing segments: one unsealed file a kind, group commits, sealing.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use outrider_format::entry::{Name, Provenance, encode_head, padded};
use outrider_format::footer::{Footer, FooterLine};
use outrider_format::segment::{
    self, HEADER_LEN, SegmentHeader, SegmentKind, SegmentNumber, node_hash,
};
use outrider_format::watermark::{self, Watermarks};
use outrider_proto::ids::{FabricId, NodeIncarnation};
use outrider_proto::record::Record;

use crate::index::Location;

use super::disk::{Disk, DiskFile};

/// Where and for whom segments are written.
#[derive(Clone)]
pub struct SegmentPlace {
    /// Folder of the segments.
    pub dir: PathBuf,
    /// Fabric.
    pub fabric: FabricId,
    /// Node.
    pub node: String,
    /// Incarnation that writes.
    pub incarnation: NodeIncarnation,
    /// A segment is sealed before it would grow beyond this.
    pub segment_size: u64,
    /// The disk.
    pub disk: Arc<dyn Disk>,
}

/// A segment that still grows.
pub struct OpenSegment {
    /// Number.
    pub number: SegmentNumber,
    /// Length of header and records.
    pub len: u64,
    /// Its directory so far.
    pub lines: Vec<FooterLine>,
    /// Whether bytes were written since its last sync.
    pub dirty: bool,
    /// The file.
    pub file: Box<dyn DiskFile>,
}

/// Why a record was not appended.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// The write itself found no space: the segments are as they were before.
    #[error("no space: {0}")]
    Full(io::Error),
    /// Anything else. Lack of space that a *sync* reports belongs here, too: then the system has dropped bytes that it had
    /// taken, says so once, and the next sync would succeed without them. The set must not be used any more.
    #[error(transparent)]
    Failed(#[from] io::Error),
}

impl AppendError {
    /// What a failed write means, after what it left was cut off.
    fn of_write(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full(error),
            _ => Self::Failed(error),
        }
    }
}

impl From<AppendError> for io::Error {
    fn from(error: AppendError) -> Self {
        match error {
            AppendError::Full(error) | AppendError::Failed(error) => error,
        }
    }
}

/// The unsealed segments of a store.
pub struct SegmentSet {
    place: SegmentPlace,
    next: SegmentNumber,
    open: BTreeMap<SegmentKind, OpenSegment>,
    marks: Watermarks,
    marks_file: Box<dyn DiskFile>,
    sealed: u64,
}

impl SegmentSet {
    /// Goes on with what recovery left: the unsealed segments, the last watermarks, the next free number.
    ///
    /// # Errors
    /// The system's answer.
    pub fn new(
        place: SegmentPlace,
        open: BTreeMap<SegmentKind, OpenSegment>,
        generation: u64,
        next: SegmentNumber,
        sealed: u64,
    ) -> io::Result<Self> {
        let mut marks_file = place.disk.open(&place.dir.join(watermark::FILE_NAME))?;
        marks_file.set_len(watermark::FILE_LEN as u64)?;
        marks_file.sync()?;
        place.disk.sync_dir(&place.dir)?;
        let marks = Watermarks { generation, lengths: BTreeMap::new() };
        let mut set = Self { place, next, open, marks, marks_file, sealed };
        // What recovery verified and synced is durable from here on.
        // Both slots, so that their blocks are there when the disk is full.
        set.write_marks()?;
        set.write_marks()?;
        Ok(set)
    }

    /// Appends a record to the segment of its kind. Not durable before [`SegmentSet::sync`].
    ///
    /// # Errors
    /// [`AppendError`].
    pub fn append(
        &mut self,
        provenance: &Provenance,
        name: Option<&Name>,
        record: &Record,
    ) -> Result<Location, AppendError> {
        const ZEROS: [u8; 8] = [0; 8];
        let kind = SegmentKind::of(record.header().kind);
        let head = encode_head(provenance, name, record);
        let entry_len = head.len() + record.bytes().len();
        let grown = padded(entry_len);
        let full = self.open.get(&kind).is_some_and(|open| {
            !open.lines.is_empty() && open.len + grown > self.place.segment_size
        });
        if full {
            self.seal(kind)?;
        }
        if !self.open.contains_key(&kind) {
            let created = self.create(kind)?;
            self.open.insert(kind, created);
        }
        let open = self.open.get_mut(&kind).expect("created above");
        let padding = &ZEROS[..usize::try_from(grown).unwrap_or(entry_len) - entry_len];
        let written = open.file.write_at(open.len, &[&head, record.bytes(), padding]);
        if let Err(error) = written {
            // Whatever part of it is there must not stand between two records.
            open.file.set_len(open.len)?;
            return Err(AppendError::of_write(error));
        }
        let len = u32::try_from(entry_len).unwrap_or(u32::MAX);
        let location = Location { segment: open.number, offset: open.len, len };
        let (id, offset, pg) = (record.id(), open.len, provenance.pg);
        open.lines.push(FooterLine { id, offset, len, pg });
        open.len += grown;
        open.dirty = true;
        Ok(location)
    }

    /// Makes everything appended durable, and the watermark that says so.
    ///
    /// # Errors
    /// The system's answer; the set must not be used any more.
    pub fn sync(&mut self) -> io::Result<()> {
        for open in self.open.values_mut().filter(|open| open.dirty) {
            open.file.sync()?;
            open.dirty = false;
        }
        self.write_marks()
    }

    /// Segments sealed so far, unsealed ones included.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.sealed + self.open.len() as u64
    }

    /// Durable length of each unsealed segment, after [`SegmentSet::sync`].
    pub fn lengths(&self) -> impl Iterator<Item = (SegmentNumber, u64)> + '_ {
        self.open.values().map(|open| (open.number, open.len))
    }

    /// Bytes that can still be written to the disk.
    ///
    /// # Errors
    /// The system's answer.
    pub fn free_space(&self) -> io::Result<u64> {
        self.place.disk.free_space(&self.place.dir)
    }

    fn write_marks(&mut self) -> io::Result<()> {
        self.marks.generation += 1;
        self.marks.lengths = self.open.values().map(|o| (o.number, o.len)).collect();
        self.marks_file.write_at(self.marks.slot_offset(), &[&self.marks.encode_slot()])?;
        self.marks_file.sync()
    }

    fn create(&mut self, kind: SegmentKind) -> Result<OpenSegment, AppendError> {
        let number = self.next;
        let path = segment::path(&self.place.dir, number, false);
        let header = SegmentHeader {
            kind,
            fabric: self.place.fabric,
            node: node_hash(&self.place.node),
            number,
            created: self.place.incarnation,
        };
        let mut file = self.place.disk.open(&path).map_err(AppendError::of_write)?;
        // What a refused header leaves is written over by the next attempt: the number is used only by then.
        file.write_at(0, &[&header.encode()]).map_err(AppendError::of_write)?;
        file.sync()?;
        self.place.disk.sync_dir(&self.place.dir)?;
        self.next = SegmentNumber(number.0 + 1);
        Ok(OpenSegment { number, len: HEADER_LEN, lines: Vec::new(), dirty: false, file })
    }

    /// Seals the segment of a kind: footer, sync, name. Its records are durable afterwards.
    fn seal(&mut self, kind: SegmentKind) -> Result<(), AppendError> {
        if let Some(open) = self.open.get_mut(&kind) {
            // A segment that could not be sealed stays: its records still have to be synced.
            seal(&self.place, open)?;
            self.open.remove(&kind);
            self.sealed += 1;
        }
        Ok(())
    }
}

/// Writes the footer of a segment and gives it its sealed name.
///
/// # Errors
/// [`AppendError`].
pub fn seal(place: &SegmentPlace, open: &mut OpenSegment) -> Result<(), AppendError> {
    let footer = Footer::new(open.lines.clone(), open.len).encode();
    if let Err(error) = open.file.write_at(open.len, &[&footer]) {
        open.file.set_len(open.len)?;
        return Err(AppendError::of_write(error));
    }
    open.file.sync()?;
    let name = |sealed| segment::path(&place.dir, open.number, sealed);
    Ok(place.disk.rename(&name(false), &name(true))?)
}
