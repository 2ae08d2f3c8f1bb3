//! What a person wants to know of one segment file.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

use outrider_proto::ids::PgId;

use crate::error::FormatError;
use crate::footer::Footer;
use crate::read_at::ReadAt;
use crate::scan::{Extent, ScanReport, scan};
use crate::segment::{self, HEADER_LEN, SegmentHeader};
use crate::watermark::{self, Watermarks};

/// Everything that can be said of a segment without any key.
#[derive(Debug)]
pub struct Inspection {
    /// The file.
    pub path: PathBuf,
    /// Bytes of the file.
    pub file_len: u64,
    /// Its header.
    pub header: SegmentHeader,
    /// Whether its name says that it is sealed.
    pub sealed: bool,
    /// What is wrong with the footer of a sealed segment.
    pub footer_problem: Option<String>,
    /// Durable length, if known: of a sealed segment all records.
    pub watermark: Option<u64>,
    /// Records and damage.
    pub scan: ScanReport,
    /// Bytes of good records.
    pub record_bytes: u64,
    /// Good records by PG.
    pub by_pg: BTreeMap<PgId, u64>,
    /// Good records with a name.
    pub named: u64,
}

/// Reads a whole segment file and verifies every record in it.
///
/// The watermark of an unsealed segment is read from `WATERMARKS` beside it; without one, nothing is called damage.
///
/// # Errors
/// [`FormatError`] when the file cannot be read or has no segment header.
pub fn inspect(path: &Path) -> Result<Inspection, FormatError> {
    let io = |source| FormatError::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(io)?;
    let file_len = file.metadata().map_err(io)?.len();
    let mut head = vec![0; usize::try_from(HEADER_LEN.min(file_len)).unwrap_or(0)];
    file.read_exact_at(&mut head, 0).map_err(io)?;
    let header = SegmentHeader::decode(&head)
        .map_err(|source| FormatError::Malformed { path: path.to_owned(), source })?;
    let sealed = segment::parse_name(path).is_some_and(|(_, sealed)| sealed);
    let (mut footer_problem, mut extent) = (None, Extent { len: file_len, watermark: 0 });
    let mut known = None;
    if sealed {
        match Footer::read(&file, file_len) {
            Ok(footer) => extent.len = footer.records_end,
            Err(error) => footer_problem = Some(error.to_string()),
        }
        known = Some(extent.len);
    } else {
        let beside = path.parent().unwrap_or(Path::new(".")).join(watermark::FILE_NAME);
        if let Some(marks) = std::fs::read(beside).ok().and_then(|b| Watermarks::decode(&b)) {
            known = marks.lengths.get(&header.number).copied();
        }
    }
    extent.watermark = known.unwrap_or(0);
    let (mut record_bytes, mut named, mut by_pg) = (0, 0, BTreeMap::new());
    let scan = scan(&file, extent, |found| {
        record_bytes += found.record.bytes().len() as u64;
        if found.head.name.is_some() {
            named += 1;
        } else {
            *by_pg.entry(found.head.provenance.pg).or_insert(0) += 1;
        }
    })
    .map_err(io)?;
    Ok(Inspection {
        path: path.to_owned(),
        file_len,
        header,
        sealed,
        footer_problem,
        watermark: known,
        scan,
        record_bytes,
        by_pg,
        named,
    })
}

impl Inspection {
    /// Whether nothing is wrong with the segment. Bytes above the watermark that are no record are normal after a crash.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.scan.damage.is_empty() && self.footer_problem.is_none()
    }
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let header = &self.header;
        writeln!(f, "segment     {} ({:?}), {}", header.number, header.kind, self.path.display())?;
        writeln!(f, "fabric      {}, made in incarnation {}", header.fabric, header.created)?;
        let state = if self.sealed { "sealed" } else { "open" };
        writeln!(f, "state       {state}, {} bytes", self.file_len)?;
        match self.watermark {
            Some(mark) => writeln!(f, "durable     {mark} bytes")?,
            None => writeln!(f, "durable     not known: no watermark beside the file")?,
        }
        writeln!(
            f,
            "records     {} good ({} named), {} bytes, {} placement groups",
            self.scan.records,
            self.named,
            self.record_bytes,
            self.by_pg.len()
        )?;
        if !self.sealed && self.scan.verified_len < self.file_len {
            let tail = self.file_len - self.scan.verified_len;
            writeln!(f, "tail        {tail} bytes after the last good record, never acknowledged")?;
        }
        if let Some(problem) = &self.footer_problem {
            writeln!(f, "footer      {problem}")?;
        }
        for damage in &self.scan.damage {
            writeln!(f, "damage      {} bytes at {}: {}", damage.len, damage.offset, damage.why)?;
        }
        write!(f, "verdict     {}", if self.is_sound() { "sound" } else { "DAMAGED" })
    }
}
