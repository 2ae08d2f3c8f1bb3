//! The bytes of one volume, with bounds, and a meter for what reading its structures may cost.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::GuestError;
use crate::{ByteRange, ReadDisk};

/// Unit of reads of structures, bytes.
const BLOCK: u64 = 64 << 10;
/// Blocks kept.
const KEPT: usize = 32;
/// Least that a read of a structure is charged, so that work without reading ends, too.
const LEAST: u64 = 64;

/// How much work reading a guest's structures may be. Contents of files are not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of structures read or looked at again.
    pub bytes: u64,
    /// Time from the opening of the disk; `None`: as long as it takes.
    pub time: Option<Duration>,
}

impl Default for Limits {
    /// 1 GiB of structures, no limit of time: a person waits and can stop it.
    fn default() -> Self {
        Self { bytes: 1 << 30, time: None }
    }
}

struct Meter {
    limits: Limits,
    left: AtomicU64,
    end: Option<Instant>,
    cache: Mutex<VecDeque<(u64, Arc<[u8]>)>>,
}

/// A part of a disk.
#[derive(Clone)]
pub(crate) struct Window {
    disk: Arc<dyn ReadDisk>,
    range: ByteRange,
    meter: Arc<Meter>,
}

impl Window {
    /// The whole disk.
    pub(crate) fn new(disk: Arc<dyn ReadDisk>, limits: Limits) -> Self {
        let range = ByteRange::new(0, disk.info().size);
        let end = limits.time.map(|time| Instant::now() + time);
        let left = AtomicU64::new(limits.bytes);
        let meter = Arc::new(Meter { limits, left, end, cache: Mutex::default() });
        Self { disk, range, meter }
    }

    /// A part of this window, sharing its meter; cut at its end.
    pub(crate) fn part(&self, range: ByteRange) -> Self {
        let start = range.start.min(self.range.len);
        let len = range.len.min(self.range.len - start);
        Self { range: ByteRange::new(self.range.start + start, len), ..self.clone() }
    }

    pub(crate) fn len(&self) -> u64 {
        self.range.len
    }

    /// Where an offset of this window is on the disk.
    pub(crate) fn on_disk(&self, offset: u64) -> u64 {
        self.range.start.saturating_add(offset)
    }

    pub(crate) fn logical_sector(&self) -> u32 {
        self.disk.info().logical_sector
    }

    /// Fills `buf` with bytes of a structure.
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), GuestError> {
        let at = self.check(offset, buf.len())?;
        self.charge(buf.len() as u64)?;
        if buf.len() as u64 > BLOCK {
            return Ok(self.disk.read_at(at, buf)?);
        }
        let mut done = 0;
        while done < buf.len() {
            let position = at + done as u64;
            let (block, within) = (position / BLOCK, (position % BLOCK) as usize);
            let bytes = self.block(block)?;
            let part = bytes.get(within..).unwrap_or_default();
            let len = part.len().min(buf.len() - done);
            if len == 0 {
                return Err(GuestError::damaged("the disk", "it ends within a structure"));
            }
            buf[done..done + len].copy_from_slice(&part[..len]);
            done += len;
        }
        Ok(())
    }

    /// As [`Window::read`], into new memory. `len` was checked by the caller against what the format allows.
    pub(crate) fn bytes(&self, offset: u64, len: usize) -> Result<Vec<u8>, GuestError> {
        self.check(offset, len)?;
        let mut buf = vec![0; len];
        self.read(offset, &mut buf)?;
        Ok(buf)
    }

    /// Fills `buf` with content of a file: not metered, not kept.
    pub(crate) fn content(&self, offset: u64, buf: &mut [u8]) -> Result<(), GuestError> {
        let at = self.check(offset, buf.len())?;
        self.in_time()?;
        Ok(self.disk.read_at(at, buf)?)
    }

    fn check(&self, offset: u64, len: usize) -> Result<u64, GuestError> {
        match offset.checked_add(len as u64) {
            Some(end) if end <= self.range.len => Ok(self.range.start + offset),
            _ => Err(GuestError::damaged(
                "the file system",
                format!(
                    "it refers to byte {offset} (and {len} more), but the volume has {} bytes",
                    self.range.len
                ),
            )),
        }
    }

    /// Counts work that was done without reading, too.
    pub(crate) fn charge(&self, bytes: u64) -> Result<(), GuestError> {
        self.in_time()?;
        let cost = bytes.max(LEAST);
        let taken = self
            .meter
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(cost));
        match taken {
            Ok(_) => Ok(()),
            Err(_) => Err(GuestError::Limit {
                what: format!("{} bytes of its structures", self.meter.limits.bytes),
            }),
        }
    }

    fn in_time(&self) -> Result<(), GuestError> {
        match (self.meter.end, self.meter.limits.time) {
            (Some(end), Some(time)) if Instant::now() > end => {
                Err(GuestError::Limit { what: format!("{} seconds", time.as_secs()) })
            }
            _ => Ok(()),
        }
    }

    fn block(&self, number: u64) -> Result<Arc<[u8]>, GuestError> {
        // Plain moves happen while it is held.
        let lock = || self.meter.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, bytes)) = lock().iter().find(|(n, _)| *n == number) {
            return Ok(bytes.clone());
        }
        let start = number * BLOCK;
        let len = BLOCK.min(self.disk.info().size.saturating_sub(start));
        let mut bytes = vec![0; len as usize];
        self.disk.read_at(start, &mut bytes)?;
        let bytes: Arc<[u8]> = bytes.into();
        let mut cache = lock();
        if cache.len() >= KEPT {
            cache.pop_front();
        }
        cache.push_back((number, bytes.clone()));
        Ok(bytes)
    }
}
