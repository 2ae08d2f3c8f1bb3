//! Reading a host's source files (virtual disks, configuration files): the second seam beside [`crate::Wmi`].
//!
//! On a real host a file is a file ([`PlainFiles`]). In the lab every read asks the simulated cluster first
//! ([`crate::lab::LabFiles`]), which counts it and can pause it, as a Cluster Shared Volume may pause I/O.
//! Calls block: use them on threads that may block.

pub(crate) mod aligned;
#[cfg(windows)]
mod privilege;
mod rights;
#[cfg(windows)]
mod windows;

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

#[cfg(windows)]
pub use self::windows::WindowsFiles;

/// Opens source files for reading. Sources are never written to.
pub trait HostFiles: Send + Sync {
    /// Opens `path` with sharing that never gets in the hypervisor's way.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] is a sharing violation: the hypervisor is writing to that very file.
    fn open_read(&self, path: &Path) -> io::Result<Arc<dyn HostFile>>;

    /// Opens a virtual disk as a whole, parents included, by the system's own means: for a disk whose files cannot be
    /// opened. `None` where the system has no such means.
    ///
    /// # Errors
    /// The system's refusal.
    fn attach(&self, _path: &Path) -> io::Result<Option<Attached>> {
        Ok(None)
    }

    /// What changed on a virtual disk of `size` bytes since a change tracking id, as offsets and lengths, by the system's own
    /// means: where the provider's answer is of no use. `None` where the system has no such means.
    ///
    /// # Errors
    /// The system's refusal.
    fn changes(&self, _path: &Path, _id: &str, _size: u64) -> io::Result<Option<Vec<(u64, u64)>>> {
        Ok(None)
    }

    /// Gives the account of a virtual machine ("NT VIRTUAL MACHINE\\GUID") full control of a folder and all in it: a
    /// restored VM does not start without. Where hypervisors know no such accounts there is nothing to do.
    ///
    /// # Errors
    /// The system's refusal.
    fn grant(&self, vm: uuid::Uuid, folder: &Path) -> io::Result<()> {
        rights::grant(vm, folder)
    }
}

/// A virtual disk opened by the system: its bytes are those that the guest sees.
pub struct Attached {
    /// The guest's bytes. Dropping it detaches the disk.
    pub bytes: Arc<dyn HostFile>,
    /// Its facts.
    pub facts: DiskFacts,
}

/// What the system tells of a virtual disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskFacts {
    /// Size that the guest sees, in bytes.
    pub size: u64,
    /// Allocation unit, in bytes; 0 of a fixed disk.
    pub block_size: u32,
    /// Logical sector size, in bytes.
    pub logical_sector: u32,
    /// Physical sector size, in bytes.
    pub physical_sector: u32,
    /// VirtualDiskId, as its 16 bytes lie in memory (mixed endian).
    pub disk_id: [u8; 16],
    /// Whether all blocks have their place from the start.
    pub fixed: bool,
    /// Whether it is VHDX; VHD otherwise.
    pub vhdx: bool,
}

/// One open source file. Dropping it closes it at once: the hypervisor cannot merge what is held open.
pub trait HostFile: Send + Sync {
    /// Reads at `offset`. [`io::ErrorKind::TimedOut`] says that the volume's I/O is paused or its storage away, which
    /// passes. Like `pread` it may return less than asked, and 0 only at the end of the file.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// The file's length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// Whether the file has no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
}

/// The operating system's own files.
#[derive(Debug, Clone, Copy, Default)]
pub struct PlainFiles;

impl HostFiles for PlainFiles {
    fn open_read(&self, path: &Path) -> io::Result<Arc<dyn HostFile>> {
        Ok(Arc::new(PlainFile(File::open(path)?)))
    }
}

struct PlainFile(File);

impl HostFile for PlainFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        positional_read(&self.0, buf, offset)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }
}

#[cfg(unix)]
pub(crate) fn positional_read(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, buf, offset)
}

#[cfg(windows)]
pub(crate) fn positional_read(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, buf, offset)
}
