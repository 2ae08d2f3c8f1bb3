//! The seam below the segments: the few file operations whose order durability rests on. Tests put a disk here that
//! forgets what was not synced.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::path::Path;

use outrider_process::fs;

/// File operations of a store.
pub trait Disk: Send + Sync + 'static {
    /// Opens a file for writing, creating it if needed.
    ///
    /// # Errors
    /// The system's answer.
    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;

    /// Renames a file and makes the name durable.
    ///
    /// # Errors
    /// The system's answer.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Makes the names in a folder durable.
    ///
    /// # Errors
    /// The system's answer.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;

    /// Bytes that can still be written.
    ///
    /// # Errors
    /// The system's answer.
    fn free_space(&self, dir: &Path) -> io::Result<u64>;
}

/// A file that is written by one thread.
pub trait DiskFile: Send {
    /// Writes all parts, one after the other, from `offset`.
    ///
    /// # Errors
    /// The system's answer; some of the bytes may have been written.
    fn write_at(&mut self, offset: u64, parts: &[&[u8]]) -> io::Result<()>;

    /// Makes all bytes and the length durable.
    ///
    /// # Errors
    /// The system's answer. After a failure the caller must not try again and believe the outcome.
    fn sync(&mut self) -> io::Result<()>;

    /// Cuts or extends the file.
    ///
    /// # Errors
    /// The system's answer.
    fn set_len(&mut self, len: u64) -> io::Result<()>;
}

/// The machine's disk.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemDisk;

impl Disk for SystemDisk {
    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
        Ok(Box::new(SystemFile { file }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)?;
        self.sync_dir(to.parent().unwrap_or(Path::new(".")))
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        fs::sync_dir(dir).map_err(io::Error::other)
    }

    fn free_space(&self, dir: &Path) -> io::Result<u64> {
        match fs::free_space(dir) {
            Ok(free) => Ok(free),
            // A system without an answer still has an honest "disk full".
            Err(_) => Ok(u64::MAX),
        }
    }
}

struct SystemFile {
    file: File,
}

impl DiskFile for SystemFile {
    fn write_at(&mut self, offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        use std::io::{Seek, SeekFrom, Write};
        self.file.seek(SeekFrom::Start(offset))?;
        let mut slices: Vec<IoSlice<'_>> = parts.iter().map(|p| IoSlice::new(p)).collect();
        let mut slices = slices.as_mut_slice();
        while !slices.is_empty() {
            match self.file.write_vectored(slices) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => IoSlice::advance_slices(&mut slices, n),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn set_len(&mut self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }
}
