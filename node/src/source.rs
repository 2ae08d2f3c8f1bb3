//! The disks that a job has open: read through the host's files, and provably closed.
//!
//! The hypervisor cannot merge what somebody holds open (facts, rule 6), and a host that lost its lease must be able to
//! say that it closed everything. So open disks are counted: [`Sources::close`] returns when the last handle, also one
//! in a read that was under way on another thread, is gone.

mod patience;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use outrider_disk::block_file::ByteSource;
use outrider_disk::{DiskChain, DiskError, DiskInfo, Layer, RangeSet, ReadDisk, ReadLayer};
use outrider_proto::journal::FileStamp;
use outrider_wmi::files::{HostFile, HostFiles};
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use uuid::Uuid;

use self::patience::{Patience, Try};
use crate::hypervisor::Hypervisor;

/// A disk of a checkpoint, open for reading.
pub trait FrozenSource: ReadDisk {
    /// The files that it is made of, leaf first; the last one names the disk.
    fn files(&self) -> Vec<PathBuf>;

    /// What tells whether each of [`FrozenSource::files`] was written to, in their order.
    fn stamps(&self) -> Vec<FileStamp> {
        let silent =
            |file: PathBuf| FileStamp { name: name_of(&file), written: Uuid::nil(), sequence: 0 };
        self.files().into_iter().map(silent).collect()
    }

    /// The ranges that the first `count` files decide; outside of them the disk is what the other files show. All of it
    /// where that cannot be told.
    ///
    /// # Errors
    /// [`DiskError`].
    fn decided(&self, _count: usize) -> Result<RangeSet, DiskError> {
        Ok(RangeSet::single(0, self.info().size))
    }
}

impl FrozenSource for DiskChain {
    fn files(&self) -> Vec<PathBuf> {
        DiskChain::files(self)
    }

    fn stamps(&self) -> Vec<FileStamp> {
        let stamp = |layer: &Layer| FileStamp {
            name: name_of(layer.path()),
            written: layer.info().data_write_guid,
            sequence: layer.header_sequence().unwrap_or(0),
        };
        self.layers().map(stamp).collect()
    }

    fn decided(&self, count: usize) -> Result<RangeSet, DiskError> {
        DiskChain::decided(self, count)
    }
}

fn name_of(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Opens a disk with its parents through the files of a host. Blocks.
///
/// # Errors
/// [`DiskError`].
pub fn open_chain(
    files: &Arc<dyn HostFiles>,
    leaf: &Path,
) -> Result<Box<dyn FrozenSource>, DiskError> {
    let chain = DiskChain::open_with(leaf, &|path: &Path| {
        let file = files.open_read(path)?;
        Ok(Arc::new(HostSource { path: path.to_owned(), file }) as Arc<dyn ByteSource>)
    })?;
    Ok(Box::new(chain))
}

/// Opens disks for one job and knows when all are closed.
#[derive(Clone)]
pub struct Sources {
    hypervisor: Arc<dyn Hypervisor>,
    open: TaskTracker,
    patience: Patience,
}

/// An open source disk. Dropping the last clone closes its files.
pub struct SourceDisk {
    leaf: PathBuf,
    hypervisor: Arc<dyn Hypervisor>,
    info: DiskInfo,
    /// Replaced when its volume was away; read by many at once.
    disk: RwLock<Arc<dyn FrozenSource>>,
    patience: Patience,
    // After `disk`, so that its files are closed when it is dropped.
    _open: TaskTrackerToken,
}

impl Sources {
    /// No disk is open. A volume whose I/O stands still, and a file that somebody else holds, are waited for as long as
    /// `patience` says.
    #[must_use]
    pub fn new(hypervisor: Arc<dyn Hypervisor>, patience: Duration) -> Self {
        let open = TaskTracker::new();
        Self { hypervisor, patience: Patience::new(patience, open.clone()), open }
    }

    /// Opens a disk of a checkpoint, in its hypervisor's way. Blocks.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn open(&self, leaf: &Path) -> Result<SourceDisk, DiskError> {
        let open = self.open.token();
        let disk = self.patience.keep(|_| self.hypervisor.open_disk(leaf))?;
        Ok(SourceDisk {
            leaf: leaf.to_owned(),
            hypervisor: self.hypervisor.clone(),
            info: disk.info().clone(),
            disk: RwLock::new(disk.into()),
            patience: self.patience.clone(),
            _open: open,
        })
    }

    /// Reads a whole small file (configuration). Blocks.
    ///
    /// # Errors
    /// I/O errors; [`io::ErrorKind::FileTooLarge`] beyond `limit` bytes.
    pub fn read_file(&self, path: &Path, limit: u64) -> io::Result<Vec<u8>> {
        let _open = self.open.token();
        let read = self.patience.keep(|_| {
            self.read_file_once(path, limit).map_err(|source| DiskError::Io {
                path: path.to_owned(),
                op: "read",
                source,
            })
        });
        read.map_err(|e| match e {
            DiskError::Io { source, .. } => source,
            other => io::Error::other(other),
        })
    }

    fn read_file_once(&self, path: &Path, limit: u64) -> io::Result<Vec<u8>> {
        let file = self.hypervisor.files().open_read(path)?;
        let length = file.len()?;
        if length > limit {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("{} has {length} bytes, more than the {limit} expected", path.display()),
            ));
        }
        let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        read_exact(&*file, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads a part of a file. Blocks.
    ///
    /// # Errors
    /// I/O errors; [`io::ErrorKind::UnexpectedEof`] behind its end.
    pub fn read_part(&self, path: &Path, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let _open = self.open.token();
        read_exact(&*self.hypervisor.files().open_read(path)?, offset, buf)
    }

    /// Waits until everything opened here is closed. The holders have to let go by themselves.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn close(&self) {
        self.open.close();
        self.open.wait().await;
    }
}

impl ReadDisk for SourceDisk {
    fn info(&self) -> &DiskInfo {
        &self.info
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        self.patience.keep(|how| self.handle(how)?.read_at(offset, buf))
    }
    fn wait_before(&self, bytes: u64) -> Duration {
        self.disk().wait_before(bytes)
    }
    fn allocated(&self) -> Result<RangeSet, DiskError> {
        self.patience.keep(|how| self.handle(how)?.allocated())
    }
}

impl SourceDisk {
    /// The files of the chain, leaf first.
    #[must_use]
    pub fn files(&self) -> Vec<PathBuf> {
        self.disk().files()
    }

    fn disk(&self) -> Arc<dyn FrozenSource> {
        self.disk.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn handle(&self, how: Try) -> Result<Arc<dyn FrozenSource>, DiskError> {
        if how == Try::Anew {
            let disk: Arc<dyn FrozenSource> = self.hypervisor.open_disk(&self.leaf)?.into();
            // The disk of a checkpoint does not change; one that is another now is not read on.
            if disk.info() != &self.info {
                return Err(DiskError::Io {
                    path: self.leaf.clone(),
                    op: "open again",
                    source: io::Error::other("the file is another disk now"),
                });
            }
            *self.disk.write().unwrap_or_else(PoisonError::into_inner) = disk;
        }
        Ok(self.disk())
    }

    /// As [`FrozenSource::stamps`].
    #[must_use]
    pub fn stamps(&self) -> Vec<FileStamp> {
        self.disk().stamps()
    }

    /// As [`FrozenSource::decided`].
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn decided(&self, count: usize) -> Result<RangeSet, DiskError> {
        self.patience.keep(|how| self.handle(how)?.decided(count))
    }
}

struct HostSource {
    path: PathBuf,
    file: Arc<dyn HostFile>,
}

impl ByteSource for HostSource {
    fn size(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        read_exact(&*self.file, offset, buf).map_err(|e| {
            io::Error::new(e.kind(), format!("reading {} at {offset}: {e}", self.path.display()))
        })
    }
}

fn read_exact(file: &dyn HostFile, offset: u64, buf: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], offset + done as u64) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
