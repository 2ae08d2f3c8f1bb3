//! Files that survive a crash as the old or the new ones, never as something between.
//!
//! A rename is durable only after its directory was synced, and a file's bytes only after the file
//! itself was (POSIX `fsync`, rationale). Windows syncs directories by itself.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

/// A file operation that failed; names the path.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The system refused.
    #[error("cannot {doing} {path}")]
    Io {
        /// What was tried: "write", "sync", "rename".
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Another process uses the directory.
    #[error(
        "{path} is in use by process {holder}; two processes on one directory would destroy it: \
         stop that process or give this one another directory"
    )]
    Locked {
        /// The directory.
        path: PathBuf,
        /// Process id written by the holder, "unknown" if it could not be read.
        holder: String,
    },
}

impl FsError {
    /// Wraps an I/O error with what was done to which path.
    pub fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { doing, path, source }
    }
}

/// Replaces the whole content of a file.
///
/// # Durability
/// When it returns, the new content is on disk under its name. After a crash the file holds either
/// the old or the new content; a left-over `.tmp` file next to it may be removed.
///
/// # Errors
/// [`FsError::Io`]. After a failed sync the caller must not assume either content.
pub fn write_atomic(path: &Path, content: &[u8]) -> Result<(), FsError> {
    replace(path, content, None)
}

/// As [`write_atomic`]; on Unix only the owner can read the file (mode 0600).
///
/// # Errors
/// As [`write_atomic`].
pub fn write_private(path: &Path, content: &[u8]) -> Result<(), FsError> {
    replace(path, content, Some(0o600))
}

fn replace(path: &Path, content: &[u8], mode: Option<u32>) -> Result<(), FsError> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let temporary = PathBuf::from(temporary);
    // A left-over of a crash may have other permissions.
    match std::fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(FsError::io("remove", &temporary)(error));
        }
        _ => {}
    }
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    platform::set_mode(&mut options, mode);
    let mut file = options.open(&temporary).map_err(FsError::io("create", &temporary))?;
    file.write_all(content).map_err(FsError::io("write", &temporary))?;
    file.sync_all().map_err(FsError::io("sync", &temporary))?;
    drop(file);
    std::fs::rename(&temporary, path).map_err(FsError::io("replace", path))?;
    sync_dir(parent_of(path))
}

/// Makes created, renamed and removed names of a directory durable.
///
/// # Errors
/// [`FsError::Io`]; a failed sync must not be retried into success.
pub fn sync_dir(dir: &Path) -> Result<(), FsError> {
    platform::sync_dir(dir).map_err(FsError::io("sync directory", dir))
}

/// Creates a directory with its parents, each made durable in the one above.
///
/// # Errors
/// [`FsError::Io`].
pub fn create_dir_durable(dir: &Path) -> Result<(), FsError> {
    if dir.is_dir() {
        return Ok(());
    }
    let parent = parent_of(dir);
    create_dir_durable(parent)?;
    match std::fs::create_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(FsError::io("create directory", dir)(error))
        }
        _ => sync_dir(parent),
    }
}

/// Bytes that an unprivileged process can still write to the file system of `path`.
///
/// # Errors
/// [`FsError::Io`]; on systems without an answer its source is `Unsupported`.
pub fn free_space(path: &Path) -> Result<u64, FsError> {
    platform::free_space(path).map_err(FsError::io("read the free space of", path))
}

/// Whether a path lies in memory, where an fsync proves nothing. `false` where that cannot be told.
///
/// # Errors
/// [`FsError::Io`].
pub fn is_tmpfs(path: &Path) -> Result<bool, FsError> {
    platform::is_tmpfs(path).map_err(FsError::io("read the file system of", path))
}

/// A directory used by this process alone; ends with the value, and with the process.
#[derive(Debug)]
pub struct DirLock {
    _file: File,
}

impl DirLock {
    /// Takes the directory (which must exist) or says who has it.
    ///
    /// # Errors
    /// [`FsError::Locked`], [`FsError::Io`].
    pub fn acquire(dir: &Path) -> Result<Self, FsError> {
        let path = dir.join("LOCK");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(FsError::io("open", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                let known = file.read_to_string(&mut holder).is_ok() && !holder.trim().is_empty();
                let holder = if known { holder.trim() } else { "unknown" }.to_owned();
                return Err(FsError::Locked { path: dir.to_owned(), holder });
            }
            Err(TryLockError::Error(error)) => return Err(FsError::io("lock", &path)(error)),
        }
        // The lock is the kernel's; the pid is for people only, so it need not be durable.
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(FsError::io("write", &path))?;
        Ok(Self { _file: file })
    }
}

fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(unix)]
mod platform {
    use std::fs::{File, OpenOptions};
    use std::io;
    use std::os::unix::fs::OpenOptionsExt;
    use std::path::Path;

    pub(super) fn set_mode(options: &mut OpenOptions, mode: Option<u32>) {
        if let Some(mode) = mode {
            options.mode(mode);
        }
    }

    pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }

    pub(super) fn free_space(path: &Path) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(path)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    #[cfg(target_os = "linux")]
    pub(super) fn is_tmpfs(path: &Path) -> io::Result<bool> {
        // linux/magic.h: TMPFS_MAGIC, RAMFS_MAGIC.
        const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];
        let kind = rustix::fs::statfs(path)?.f_type;
        // The type is signed on some architectures; only the low 32 bits carry the magic.
        #[expect(clippy::cast_sign_loss, reason = "masked to the magic number")]
        Ok(IN_MEMORY.contains(&(kind as u64 & 0xffff_ffff)))
    }

    #[cfg(not(target_os = "linux"))]
    pub(super) fn is_tmpfs(_path: &Path) -> io::Result<bool> {
        Ok(false)
    }
}

#[cfg(not(unix))]
mod platform {
    use std::fs::OpenOptions;
    use std::io;
    use std::path::Path;

    pub(super) fn set_mode(_options: &mut OpenOptions, _mode: Option<u32>) {}

    pub(super) fn sync_dir(_dir: &Path) -> io::Result<()> {
        Ok(())
    }

    pub(super) fn free_space(_path: &Path) -> io::Result<u64> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(super) fn is_tmpfs(_path: &Path) -> io::Result<bool> {
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_a_crash_leftover_does_not_hinder() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("state");
        std::fs::write(dir.path().join("state.tmp"), b"half").expect("written");
        write_atomic(&path, b"one").expect("written");
        write_atomic(&path, b"two").expect("replaced");
        assert_eq!(std::fs::read(&path).expect("there"), b"two");
        assert!(!dir.path().join("state.tmp").exists());
    }

    #[cfg(unix)]
    #[test]
    fn a_private_file_is_its_owners_alone() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("key");
        write_private(&path, b"secret").expect("written");
        let mode = std::fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn an_error_names_the_path() {
        let error = write_atomic(Path::new("/nowhere/at/all"), b"").expect_err("no directory");
        assert!(error.to_string().contains("/nowhere/at/all.tmp"), "{error}");
    }

    #[test]
    fn a_second_holder_is_refused_and_told_who_holds() {
        let dir = tempfile::tempdir().expect("a directory");
        let lock = DirLock::acquire(dir.path()).expect("free");
        let error = DirLock::acquire(dir.path()).expect_err("taken");
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
        drop(lock);
        DirLock::acquire(dir.path()).expect("free again");
    }

    #[test]
    fn directories_are_made_with_their_parents() {
        let dir = tempfile::tempdir().expect("a directory");
        let deep = dir.path().join("a/b/c");
        create_dir_durable(&deep).expect("made");
        create_dir_durable(&deep).expect("there already");
        assert!(deep.is_dir());
        // Windows, where no storage node runs, has no answer.
        #[cfg(unix)]
        assert!(free_space(&deep).is_ok_and(|free| free > 0));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn memory_is_not_taken_for_a_disk() {
        assert!(is_tmpfs(Path::new("/dev/shm")).expect("readable"));
        assert!(!is_tmpfs(Path::new("/proc")).expect("readable"));
    }
}
