//! A frozen disk of a checkpoint, read through QEMU's NBD export. Several reads are under way at once, each on a connection of
//! its own, and no more than the configuration allows: the guest's own requests wait behind ours.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use outrider_disk::{DiskError, DiskInfo, DiskKind, RangeSet, ReadDisk};
use outrider_proto::ids::DiskId;

use super::nbd::{self, Nbd};
use crate::source::FrozenSource;

/// How much of a disk one question about its extents covers.
const STATUS_SPAN: u64 = 1 << 30;

/// What is known of an export before it is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Export {
    pub(super) socket: PathBuf,
    pub(super) name: String,
    pub(super) disk: DiskId,
    pub(super) size: u64,
    /// The image, named so that its extension tells its format.
    pub(super) file: PathBuf,
    /// Allocation unit, bytes.
    pub(super) cluster: u32,
}

/// How gently a VM's disks are read.
#[derive(Debug, Clone)]
pub(super) struct Pace {
    /// Reads of one disk at a time.
    pub(super) depth: usize,
    /// Shared by the disks of a VM.
    pub(super) rate: Option<Arc<Rate>>,
}

/// Bytes per second, all readers together.
#[derive(Debug)]
pub(super) struct Rate {
    bytes_per_second: u64,
    /// When all that was handed out is used up.
    free_at: Mutex<Instant>,
}

impl Rate {
    pub(super) fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), free_at: Mutex::new(Instant::now()) }
    }

    /// Takes `bytes` and says how long to wait before they are used.
    fn take(&self, bytes: u64) -> Duration {
        let mut free_at = locked(&self.free_at);
        let now = Instant::now();
        let start = (*free_at).max(now);
        let lasts = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        *free_at = start + Duration::from_nanos(u64::try_from(lasts).unwrap_or(u64::MAX));
        start.saturating_duration_since(now)
    }
}

/// Bytes that were waited for and not read yet.
#[derive(Debug, Default)]
struct Paid(AtomicU64);

impl Paid {
    /// Takes up to `wanted` bytes of what was waited for; gives how many.
    fn spend(&self, wanted: u64) -> u64 {
        let left = |paid: u64| Some(paid.saturating_sub(wanted));
        let before = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, left);
        before.unwrap_or_else(|paid| paid).min(wanted)
    }
}

/// An open export.
pub(super) struct FrozenDisk {
    export: Export,
    info: DiskInfo,
    pace: Pace,
    pool: Mutex<Connections>,
    returned: Condvar,
    paid: Paid,
    /// Told when a read failed.
    unreadable: Box<dyn Fn() + Send + Sync>,
}

struct Connections {
    idle: Vec<Nbd>,
    /// How many more may be opened.
    unopened: usize,
}

impl FrozenDisk {
    /// Opens the first connection.
    ///
    /// # Errors
    /// [`DiskError`].
    pub(super) fn open(
        export: Export,
        pace: Pace,
        unreadable: Box<dyn Fn() + Send + Sync>,
    ) -> Result<Self, DiskError> {
        let first = Nbd::connect(&export.socket, &export.name, Some(nbd::ALLOCATION))
            .map_err(|e| failed(&export.file, "open", e))?;
        if first.size() != export.size {
            return Err(failed(
                &export.file,
                "open",
                io::Error::other(format!(
                    "QEMU exports {} bytes of a disk of {}",
                    first.size(),
                    export.size
                )),
            ));
        }
        let info = DiskInfo {
            block_size: export.cluster,
            kind: DiskKind::Dynamic,
            disk_id: export.disk.0,
            ..DiskInfo::raw(export.size)
        };
        let unopened = pace.depth.saturating_sub(1);
        let pool = Mutex::new(Connections { idle: vec![first], unopened });
        let (returned, paid) = (Condvar::new(), Paid::default());
        Ok(Self { export, info, pace, pool, returned, paid, unreadable })
    }

    /// Does something on a connection of its own. One that failed is not used again.
    fn with<T>(
        &self,
        op: &'static str,
        work: impl FnOnce(&mut Nbd) -> io::Result<T>,
    ) -> Result<T, DiskError> {
        let mut connection = self.connection().map_err(|e| failed(&self.export.file, op, e))?;
        let result = work(&mut connection);
        let mut pool = locked(&self.pool);
        match &result {
            Ok(_) => pool.idle.push(connection),
            Err(_) => pool.unopened += 1,
        }
        drop(pool);
        self.returned.notify_one();
        if result.is_err() {
            (self.unreadable)();
        }
        result.map_err(|e| failed(&self.export.file, op, explained(e)))
    }

    fn connection(&self) -> io::Result<Nbd> {
        let mut pool = locked(&self.pool);
        loop {
            if let Some(idle) = pool.idle.pop() {
                return Ok(idle);
            }
            if pool.unopened > 0 {
                pool.unopened -= 1;
                drop(pool);
                let opened =
                    Nbd::connect(&self.export.socket, &self.export.name, Some(nbd::ALLOCATION));
                if opened.is_err() {
                    locked(&self.pool).unopened += 1;
                    self.returned.notify_one();
                }
                return opened;
            }
            pool = self.returned.wait(pool).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl ReadDisk for FrozenDisk {
    fn info(&self) -> &DiskInfo {
        &self.info
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let len = buf.len() as u64;
        if offset.checked_add(len).is_none_or(|end| end > self.info.size) {
            let (path, size) = (self.export.file.clone(), self.info.size);
            return Err(DiskError::OutOfBounds { path, offset, len, size });
        }
        if let Some(rate) = &self.pace.rate {
            let unpaid = len - self.paid.spend(len);
            std::thread::sleep(rate.take(unpaid));
        }
        self.with("read", |nbd| nbd.read(offset, buf))
    }

    fn wait_before(&self, bytes: u64) -> Duration {
        let Some(rate) = &self.pace.rate else { return Duration::ZERO };
        self.paid.0.fetch_add(bytes, Ordering::AcqRel);
        rate.take(bytes)
    }

    fn allocated(&self) -> Result<RangeSet, DiskError> {
        self.with("ask for the allocation of", |nbd| extents(nbd, |flags| flags & nbd::ZERO == 0))
    }
}

impl FrozenSource for FrozenDisk {
    fn files(&self) -> Vec<PathBuf> {
        vec![self.export.file.clone()]
    }
}

/// The ranges of an export whose flags are wanted.
pub(super) fn extents(nbd: &mut Nbd, wanted: impl Fn(u32) -> bool) -> io::Result<RangeSet> {
    let size = nbd.size();
    let mut found = RangeSet::new();
    let mut offset = 0;
    while offset < size {
        for (len, flags) in nbd.block_status(offset, STATUS_SPAN.min(size - offset))? {
            let len = len.min(size - offset);
            if wanted(flags) && len > 0 {
                found.insert(offset, len);
            }
            offset += len;
        }
    }
    Ok(found)
}

/// A connection that ended says so in the words of sockets, which tell nobody what happened.
fn explained(e: io::Error) -> io::Error {
    use io::ErrorKind::{
        BrokenPipe, ConnectionAborted, ConnectionRefused, ConnectionReset, NotFound, UnexpectedEof,
    };
    match e.kind() {
        BrokenPipe | ConnectionAborted | ConnectionRefused | ConnectionReset | NotFound
        | UnexpectedEof => io::Error::new(
            e.kind(),
            format!("its QEMU closed the export: the VM ended, or the checkpoint gave way ({e})"),
        ),
        _ => e,
    }
}

fn failed(path: &Path, op: &'static str, source: io::Error) -> DiskError {
    DiskError::Io { path: path.to_owned(), op, source }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_waited_for_is_not_waited_for_again() {
        let paid = Paid(AtomicU64::new(100));
        assert_eq!((paid.spend(60), paid.spend(60), paid.spend(60)), (60, 40, 0));
    }

    #[test]
    fn a_rate_hands_out_no_more_than_it_has() {
        let rate = Rate::new(1000);
        let _ = rate.take(500);
        let second = rate.take(1000);
        let third = rate.take(1);
        assert!(second > Duration::from_millis(400), "{second:?}");
        assert!(third > Duration::from_millis(1400), "{third:?}");
    }
}
