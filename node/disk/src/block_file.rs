//! Files read and written by position, without a cursor, so that threads share one handle.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use crate::{DiskError, RangeSet};

#[cfg(unix)]
#[path = "block_file/unix.rs"]
mod positional;
#[cfg(windows)]
#[path = "block_file/windows.rs"]
mod positional;

/// Bytes that can be read by position: a file, or memory in tests and fuzzing.
pub trait ByteSource: Send + Sync {
    /// Number of bytes.
    ///
    /// # Errors
    /// What asking the file system met.
    fn size(&self) -> io::Result<u64>;

    /// Fills `buf` from `offset` on.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] if there are not so many bytes; otherwise what reading met.
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// The ranges that are not holes, which read as zeros; `None` if that is not known.
    ///
    /// # Errors
    /// What asking the file system met.
    fn data_ranges(&self) -> io::Result<Option<RangeSet>> {
        Ok(None)
    }
}

/// A file handle for positional access.
#[derive(Debug)]
pub struct BlockFile {
    path: PathBuf,
    file: File,
}

impl BlockFile {
    /// Opens an existing file for reading only. Others may read, write, rename and delete it meanwhile.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn open(path: &Path) -> Result<Self, DiskError> {
        let file = File::open(path).map_err(DiskError::io(path, "open"))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Opens an existing file for reading and writing.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn open_writable(path: &Path) -> Result<Self, DiskError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(DiskError::io(path, "open for writing"))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Makes a new file; one that exists is left alone and refused.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn create_new(path: &Path) -> Result<Self, DiskError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(DiskError::io(path, "create"))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// The file's path as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn write_all_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        positional::write_all_at(&self.file, offset, bytes)
            .map_err(DiskError::io(&self.path, "write"))
    }

    /// Makes the file `len` bytes long; what is added reads as zeros and takes no space where the
    /// file system knows sparse files.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn set_len(&self, len: u64) -> Result<(), DiskError> {
        self.file.set_len(len).map_err(DiskError::io(&self.path, "change the length of"))
    }

    /// Waits until everything written, the length included, is on the medium.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn sync(&self) -> Result<(), DiskError> {
        self.file.sync_data().map_err(DiskError::io(&self.path, "flush"))
    }
}

impl ByteSource for BlockFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        positional::read_exact_at(&self.file, offset, buf)
    }

    fn data_ranges(&self) -> io::Result<Option<RangeSet>> {
        positional::data_ranges(&self.file, self.size()?)
    }
}

impl ByteSource for Vec<u8> {
    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let from = usize::try_from(offset).ok();
        let bytes = from
            .and_then(|from| self.get(from..from.checked_add(buf.len())?))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }
}
