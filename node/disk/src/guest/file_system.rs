//! What every file system that we read can do.

use super::{FileSystemKind, GuestError, Name};
use crate::ByteRange;

/// A file or directory of one file system. Stable as long as the disk does not change; which file it is follows from
/// the number alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId(pub u64);

/// A time of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct GuestTime {
    /// Seconds since the Unix epoch.
    pub seconds: i64,
    /// Nanoseconds of that second.
    pub nanos: u32,
    /// Whether it is the guest's local time, of an unknown zone (FAT).
    pub local: bool,
}

impl GuestTime {
    pub(crate) fn utc(seconds: i64, nanos: u32) -> Self {
        Self { seconds, nanos: nanos.min(999_999_999), local: false }
    }
}

/// What a directory entry or file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// A file with content.
    File,
    /// A directory.
    Directory,
    /// A symbolic link, also a junction of Windows.
    Symlink,
    /// A device, pipe, socket or another thing without content.
    Other,
}

impl FileKind {
    /// "a file", "a directory", ...
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::File => "a file",
            Self::Directory => "a directory",
            Self::Symlink => "a symbolic link",
            Self::Other => "a device, pipe or socket",
        }
    }
}

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name.
    pub name: Name,
    /// What it names.
    pub id: FileId,
    /// What that is, as the directory tells.
    pub kind: FileKind,
}

/// The facts of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// What it is.
    pub kind: FileKind,
    /// Length of the content, bytes.
    pub size: u64,
    /// When the content changed last.
    pub modified: Option<GuestTime>,
    /// When it was made.
    pub created: Option<GuestTime>,
    /// When it was read last.
    pub accessed: Option<GuestTime>,
    /// Permission bits of Unix.
    pub mode: Option<u16>,
    /// User and group of Unix.
    pub owner: Option<(u32, u32)>,
    /// Attribute bits of Windows (FILE_ATTRIBUTE_*).
    pub attributes: Option<u32>,
    /// Number of names.
    pub links: u32,
    /// Where a symbolic link leads.
    pub target: Option<Name>,
    /// Alternate data streams: named, their content is not read.
    pub streams: Vec<Stream>,
    /// Why the content cannot be read, if so.
    pub unreadable: Option<String>,
}

/// An alternate data stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stream {
    /// Its name, without colons.
    pub name: Name,
    /// Its length, bytes.
    pub size: u64,
}

/// A piece of a file's content on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where it is in the file, bytes.
    pub file_offset: u64,
    /// Where it is on the disk (not the volume), bytes.
    pub disk: ByteRange,
}

/// The facts of a file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSystemFacts {
    /// Which one.
    pub kind: FileSystemKind,
    /// Its label, may be empty.
    pub label: Name,
    /// Its size by its own account, bytes.
    pub size: u64,
    /// Allocation unit, bytes.
    pub cluster: u32,
    /// UUID or serial number.
    pub id: String,
}

/// A file system that can be read. All calls may block on the disk.
pub trait FileSystem: Send + Sync {
    /// Its facts.
    fn facts(&self) -> &FileSystemFacts;

    /// The root directory.
    fn root(&self) -> FileId;

    /// Whether names differ by case alone.
    fn case_sensitive(&self) -> bool;

    /// Why what is read might not be what the guest's own driver would show: a log or journal that was not replayed,
    /// errors that the guest recorded. `None`: there is no doubt.
    ///
    /// # Errors
    /// [`GuestError`].
    fn doubt(&self) -> Result<Option<String>, GuestError>;

    /// Gives every name of a directory, without `.` and `..`, in no order.
    ///
    /// # Errors
    /// [`GuestError`]; those of `each` end it.
    fn list(
        &self,
        directory: FileId,
        each: &mut dyn FnMut(Entry) -> Result<(), GuestError>,
    ) -> Result<(), GuestError>;

    /// The facts of a file.
    ///
    /// # Errors
    /// [`GuestError`].
    fn stat(&self, file: FileId) -> Result<Stat, GuestError>;

    /// Reads content from `offset`; gives the number of bytes read, less than `buf` has only at the end of the file.
    ///
    /// # Errors
    /// [`GuestError`].
    fn read(&self, file: FileId, offset: u64, buf: &mut [u8]) -> Result<usize, GuestError>;

    /// Where the content is on the disk, in file order, whole allocation units, unwritten tails included.
    ///
    /// # Errors
    /// [`GuestError::NoExtents`] for a file that is resident, compressed, encrypted, sparse or empty.
    fn extents(&self, file: FileId) -> Result<Vec<Extent>, GuestError>;
}

/// Fills a buffer from pieces: `(file offset, length, where on the volume; None: zeros)`, sorted, and `read` for the
/// bytes. Whatever no piece covers is zeros.
pub(crate) fn fill(
    offset: u64,
    buf: &mut [u8],
    pieces: &[(u64, u64, Option<u64>)],
    mut read: impl FnMut(u64, &mut [u8]) -> Result<(), GuestError>,
) -> Result<(), GuestError> {
    buf.fill(0);
    let end = offset.saturating_add(buf.len() as u64);
    let first = pieces.partition_point(|(start, len, _)| start.saturating_add(*len) <= offset);
    for (start, len, place) in pieces[first..].iter().take_while(|(start, ..)| *start < end) {
        let Some(place) = place else { continue };
        let (from, to) = ((*start).max(offset), start.saturating_add(*len).min(end));
        if from >= to {
            continue;
        }
        let part = &mut buf[(from - offset) as usize..(to - offset) as usize];
        read(place.saturating_add(from - start), part)?;
    }
    Ok(())
}
