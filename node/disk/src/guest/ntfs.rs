//! NTFS, read-only.
//!
//! | file | idea |
//! | --- | --- |
//! | `boot` | sizes, and where the MFT is |
//! | `record` | fixups, a record's attributes |
//! | `runs` | which clusters an attribute has |
//! | `file` | all attributes of a file, over its extension records |
//! | `index` | the names of a directory |
//! | `value` | the bytes of an attribute: resident, plain, sparse, compressed |
//! | `compress` | LZNT1 |
//! | `reparse` | where links lead |
//! | `health` | the volume's flags, and whether `$LogFile` would have to be replayed |
//!
//! Sources: the documentation of the Linux-NTFS project; [MS-FSCC] for attributes and reparse points; [MS-XCA] 2.5 for
//! LZNT1.

mod boot;
mod compress;
mod file;
mod health;
mod index;
mod record;
mod reparse;
mod runs;
mod value;

use boot::Boot;
use file::File;
use record::kind;
use runs::Run;

use super::file_system::{FileSystemFacts, Stream};
use super::window::Window;
use super::{
    Entry, Extent, FileId, FileKind, FileSystem, FileSystemKind, GuestError, GuestTime, Name, Stat,
};
use crate::ByteRange;

/// Record of the root directory.
const ROOT: u64 = 5;
/// Records below this are the file system's own files.
const FIRST_USER: u64 = 16;

/// Bits of FILE_ATTRIBUTE_*.
mod attribute {
    pub(super) const DIRECTORY: u32 = 0x1000_0000;
}

/// An NTFS volume.
pub struct Ntfs {
    window: Window,
    boot: Boot,
    /// Clusters of the MFT.
    mft: Vec<Run>,
    facts: FileSystemFacts,
}

impl Ntfs {
    pub(crate) fn open(window: Window) -> Result<Self, GuestError> {
        let boot = Boot::read(&window)?;
        let facts = FileSystemFacts {
            kind: FileSystemKind::Ntfs,
            label: Name::from(""),
            size: boot.size,
            cluster: boot.cluster,
            id: format!("{:016X}", boot.serial),
        };
        let mut ntfs = Self { window, boot, mft: Vec::new(), facts };
        ntfs.map_mft()?;
        let volume = ntfs.file(health::VOLUME)?;
        if let Some(label) = volume.resident(kind::VOLUME_NAME) {
            ntfs.facts.label = Name::from_utf16le(label);
        }
        Ok(ntfs)
    }

    /// A file's unnamed stream, refused where its bytes are not the file's content.
    fn content<'f>(&self, file: &'f File) -> Result<Option<&'f record::Attribute>, GuestError> {
        if let Some(reason) = reparse::why_unreadable(file) {
            return Err(GuestError::unsupported("the content of this file", reason));
        }
        Ok(file.stream(&[]))
    }

    fn opened(&self, id: FileId) -> Result<File, GuestError> {
        let (number, sequence) = (id.0 & 0xffff_ffff_ffff, (id.0 >> 48) as u16);
        let file = self.file(number)?;
        if sequence != 0 && file.sequence != sequence {
            return Err(GuestError::damaged(
                "a directory entry",
                format!(
                    "it names record {number} in its use {sequence}, which is in use {}",
                    file.sequence
                ),
            ));
        }
        Ok(file)
    }
}

impl FileSystem for Ntfs {
    fn facts(&self) -> &FileSystemFacts {
        &self.facts
    }

    fn root(&self) -> FileId {
        FileId(ROOT)
    }

    fn case_sensitive(&self) -> bool {
        false
    }

    fn doubt(&self) -> Result<Option<String>, GuestError> {
        self.health()
    }

    fn list(
        &self,
        directory: FileId,
        each: &mut dyn FnMut(Entry) -> Result<(), GuestError>,
    ) -> Result<(), GuestError> {
        let file = self.opened(directory)?;
        if !file.directory {
            return Err(GuestError::damaged("a directory", "its record is not one of a directory"));
        }
        self.index(&file, &mut |name| {
            let number = name.id & 0xffff_ffff_ffff;
            // A second, short name of the same file, and the file system's own files.
            if name.dos_only || number < FIRST_USER {
                return Ok(());
            }
            let kind = if reparse::is_link(name.attributes, name.reparse_tag) {
                FileKind::Symlink
            } else if name.attributes & attribute::DIRECTORY != 0 {
                FileKind::Directory
            } else {
                FileKind::File
            };
            each(Entry { name: name.name, id: FileId(name.id), kind })
        })
    }

    fn stat(&self, id: FileId) -> Result<Stat, GuestError> {
        let file = self.opened(id)?;
        let times = file.resident(kind::STANDARD_INFORMATION).unwrap_or_default();
        let time = |at| time(super::bytes::u64_at(times, at));
        let link = reparse::link(&file);
        let kind = match (&link, file.directory) {
            (Some(_), _) => FileKind::Symlink,
            (None, true) => FileKind::Directory,
            (None, false) => FileKind::File,
        };
        let data = file.stream(&[]);
        let attributes = super::bytes::u32_at(times, 32) | if file.directory { 0x10 } else { 0 };
        let mut streams: Vec<Stream> = file
            .streams()
            .map(|a| Stream { name: Name::from_utf16(&a.name), size: a.size() })
            .collect();
        streams.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Stat {
            kind,
            size: if kind == FileKind::File { data.map_or(0, record::Attribute::size) } else { 0 },
            created: time(0),
            modified: time(8),
            accessed: time(24),
            mode: None,
            owner: None,
            attributes: Some(attributes),
            links: file.links.into(),
            target: link,
            streams,
            unreadable: reparse::why_unreadable(&file)
                .or_else(|| data.and_then(record::Attribute::why_unreadable).map(str::to_owned)),
        })
    }

    fn read(&self, id: FileId, offset: u64, buf: &mut [u8]) -> Result<usize, GuestError> {
        let file = self.opened(id)?;
        match self.content(&file)? {
            Some(data) => self.read_content(data, offset, buf),
            None => Ok(0),
        }
    }

    fn extents(&self, id: FileId) -> Result<Vec<Extent>, GuestError> {
        let file = self.opened(id)?;
        let no = |reason| Err(GuestError::NoExtents { reason });
        let Some(data) = self.content(&file)? else { return no("is empty") };
        if data.is_encrypted() {
            return no("is encrypted (EFS)");
        }
        if data.is_compressed() {
            return no("is compressed");
        }
        let record::Body::NonResident(body) = &data.body else {
            return no("is kept in the file's record (resident)");
        };
        let runs = self.runs(body)?;
        let cluster = u64::from(self.boot.cluster);
        let mut extents = Vec::with_capacity(runs.len());
        for run in runs {
            let Some(lcn) = run.lcn else { return no("is sparse") };
            extents.push(Extent {
                file_offset: run.vcn * cluster,
                disk: ByteRange::new(self.window.on_disk(lcn * cluster), run.count * cluster),
            });
        }
        if extents.is_empty() {
            return no("is empty");
        }
        Ok(extents)
    }
}

/// 100 ns since 1601; zero means none.
fn time(ticks: u64) -> Option<GuestTime> {
    const EPOCH: i64 = 11_644_473_600;
    let seconds = i64::try_from(ticks / 10_000_000).ok()?.checked_sub(EPOCH)?;
    (ticks != 0).then(|| GuestTime::utc(seconds, (ticks % 10_000_000) as u32 * 100))
}
