//! Files of a Windows host: shared with everybody, with backup semantics, virtual disks past the system's cache.
//!
//! Paths longer than 260 characters and volume paths (`\\?\Volume{...}\`) need nothing here: the standard library opens
//! both as they are.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::windows::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Once};

use windows::Win32::Foundation::{
    ERROR_CLUSTER_CSV_IO_PAUSE_TIMEOUT, ERROR_INVALID_PARAMETER, ERROR_LOCK_VIOLATION,
    ERROR_NETNAME_DELETED, ERROR_SEM_TIMEOUT, ERROR_SHARING_PAUSED, ERROR_SHARING_VIOLATION,
    ERROR_TIMEOUT, ERROR_UNEXP_NET_ERR,
};
use windows::Win32::Storage::FileSystem::{
    FILE_FLAG_BACKUP_SEMANTICS, FILE_FLAG_NO_BUFFERING, FILE_SHARE_DELETE, FILE_SHARE_READ,
    FILE_SHARE_WRITE,
};

use super::{Attached, HostFile, HostFiles, aligned, privilege};
use crate::virtdisk::VirtualDisk;

/// Source files of this Windows host.
#[derive(Debug, Clone, Copy, Default)]
pub struct WindowsFiles;

impl WindowsFiles {
    /// Files as a backup program opens them: with the privilege to read all of them, where the account holds it.
    #[must_use]
    pub fn new() -> Self {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| match privilege::enable_backup() {
            Ok(true) => tracing::debug!("files are read with the backup privilege"),
            Ok(false) => tracing::info!(
                "this account has no backup privilege: files are read with its own rights only"
            ),
            Err(e) => tracing::warn!(error = %e, "the backup privilege cannot be enabled"),
        });
        Self
    }
}

impl HostFiles for WindowsFiles {
    fn open_read(&self, path: &Path) -> io::Result<Arc<dyn HostFile>> {
        if is_disk(path) {
            match open(path, FILE_FLAG_BACKUP_SEMANTICS.0 | FILE_FLAG_NO_BUFFERING.0) {
                Ok(file) => return Ok(Arc::new(Uncached(file))),
                // Some file systems cannot.
                Err(e) if e.raw_os_error() == Some(ERROR_INVALID_PARAMETER.0.cast_signed()) => {}
                Err(e) => return Err(named(e)),
            }
        }
        let file = open(path, FILE_FLAG_BACKUP_SEMANTICS.0).map_err(named)?;
        Ok(Arc::new(Cached(file)))
    }

    fn attach(&self, path: &Path) -> io::Result<Option<Attached>> {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| match privilege::enable_attach() {
            Ok(true) => {}
            Ok(false) => tracing::warn!(
                "this account may not perform volume maintenance tasks: virtual disks cannot be attached"
            ),
            Err(e) => tracing::warn!(error = %e, "the privilege to attach virtual disks cannot be enabled"),
        });
        VirtualDisk::open(path)?.attach().map(Some)
    }

    fn changes(&self, path: &Path, id: &str, size: u64) -> io::Result<Option<Vec<(u64, u64)>>> {
        VirtualDisk::open(path)?.changes(id, size).map(Some)
    }
}

/// Virtual disks are read once and are large: they would only push better things out of the cache.
fn is_disk(path: &Path) -> bool {
    let extension = path.extension().and_then(OsStr::to_str).unwrap_or_default();
    ["vhdx", "avhdx", "vhd", "avhd", "vhds"].iter().any(|e| extension.eq_ignore_ascii_case(e))
}

fn open(path: &Path, flags: u32) -> io::Result<File> {
    let shared = FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE;
    OpenOptions::new().read(true).share_mode(shared.0).custom_flags(flags).open(path)
}

/// Sharing violations under the name that callers look for.
fn named(error: io::Error) -> io::Error {
    let busy = [ERROR_SHARING_VIOLATION, ERROR_LOCK_VIOLATION].map(|code| code.0.cast_signed());
    if error.raw_os_error().is_some_and(|code| busy.contains(&code)) {
        return io::Error::new(io::ErrorKind::ResourceBusy, error);
    }
    // A Cluster Shared Volume whose I/O was paused for too long, or that changes its way to the disk.
    let away = [
        ERROR_CLUSTER_CSV_IO_PAUSE_TIMEOUT,
        ERROR_SEM_TIMEOUT,
        ERROR_TIMEOUT,
        ERROR_SHARING_PAUSED,
        ERROR_NETNAME_DELETED,
        ERROR_UNEXP_NET_ERR,
    ]
    .map(|code| code.0.cast_signed());
    if error.raw_os_error().is_some_and(|code| away.contains(&code)) {
        return io::Error::new(io::ErrorKind::TimedOut, error);
    }
    error
}

struct Cached(File);

impl HostFile for Cached {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        at_end(self.0.seek_read(buf, offset))
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }
}

struct Uncached(File);

impl HostFile for Uncached {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        aligned::read_at(buf, offset, |buf, offset| at_end(self.0.seek_read(buf, offset)))
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }
}

/// Windows calls the end of a file an error.
fn at_end(read: io::Result<usize>) -> io::Result<usize> {
    match read {
        Err(e)
            if e.raw_os_error()
                == Some(windows::Win32::Foundation::ERROR_HANDLE_EOF.0.cast_signed()) =>
        {
            Ok(0)
        }
        other => other.map_err(named),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_others_write_rename_and_delete_is_read_at_any_offset() {
        let dir = tempfile::tempdir().expect("a folder");
        let deep = dir.path().join("x".repeat(120)).join("y".repeat(120));
        std::fs::create_dir_all(&deep).expect("long paths work");
        let path = deep.join("disk with a name of its own 디스크.vhdx");
        let bytes: Vec<u8> = (0..100_003_u32).map(|i| (i * 7 >> 3) as u8).collect();
        std::fs::write(&path, &bytes).expect("written");
        let file = WindowsFiles::new().open_read(&path).expect("open");
        assert_eq!(file.len().expect("a length"), bytes.len() as u64);
        let mut buf = vec![0; 5000];
        for offset in [0, 4096, 4097, 99_000] {
            let n = file.read_at(&mut buf, offset).expect("read");
            assert!(n > 0);
            assert_eq!(buf[..n], bytes[offset as usize..offset as usize + n]);
        }
        assert_eq!(file.read_at(&mut buf, 100_003).expect("the end"), 0);
        assert_eq!(file.read_at(&mut buf, 1 << 30).expect("beyond it"), 0);
        // Nobody is kept from anything.
        let writer = OpenOptions::new().write(true).open(&path).expect("others may write");
        drop(writer);
        std::fs::rename(&path, path.with_extension("moved")).expect("others may rename");
        std::fs::remove_file(path.with_extension("moved")).expect("others may delete");
    }

    #[test]
    fn a_file_that_somebody_holds_alone_is_busy() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("leaf.avhdx");
        let _held =
            OpenOptions::new().create(true).write(true).share_mode(0).open(&path).expect("made");
        let error = WindowsFiles::new().open_read(&path).map(drop).expect_err("it is held");
        assert_eq!(error.kind(), io::ErrorKind::ResourceBusy, "{error}");
        let missing = WindowsFiles::new().open_read(&dir.path().join("none.vhdx")).map(drop);
        assert_eq!(missing.expect_err("not there").kind(), io::ErrorKind::NotFound);
    }
}
