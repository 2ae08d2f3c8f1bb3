//! Writes batches at a rate, and measures each fsync.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::journal::{Journal, LENGTH, Record};
use crate::pattern::{BLOCK, SLOT, block, place};
use crate::verify::{Verdict, verify};

/// Records of a batch.
const BATCH: u64 = 8;

/// What to write.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Order {
    pub(crate) seed: u64,
    /// Bytes a second; 0: as fast as it goes.
    pub(crate) rate: u64,
    /// Stop after so many bytes; 0: when told.
    pub(crate) bytes: u64,
}

/// Microseconds of each fsync since they were last asked for.
pub(crate) static LATENCIES: Mutex<Vec<u32>> = Mutex::new(Vec::new());

/// The disks with their journal.
pub(crate) struct Disks {
    pub(crate) journal: Journal,
    data: Vec<File>,
    slots: Vec<u32>,
}

impl Disks {
    /// Over the data file of each disk and how much it may hold.
    pub(crate) fn new(journal: Journal, files: Vec<(File, u64)>) -> Self {
        let slots = files.iter().map(|(_, room)| (room / (BLOCK as u64 * u64::from(SLOT))) as u32);
        let slots = slots.map(|n| n.max(1)).collect();
        let data = files.into_iter().map(|(file, _)| file).collect();
        Self { journal, data, slots }
    }

    pub(crate) fn verify(&self) -> io::Result<Verdict> {
        verify(&self.journal, &self.data)
    }

    /// Writes again what was intended and not committed, and commits it.
    pub(crate) fn redo(&mut self) -> io::Result<()> {
        let pending = self.journal.pending();
        self.commit(&pending)
    }

    /// Writes until the order is fulfilled or `stop` is set; `committed` hears of every commit.
    pub(crate) fn write(
        &mut self,
        order: Order,
        stop: &AtomicBool,
        mut committed: impl FnMut(u64, u64),
    ) -> io::Result<()> {
        let (began, first) = (Instant::now(), self.journal.bytes());
        loop {
            let done = self.journal.bytes() - first;
            if stop.load(Ordering::Acquire) || (order.bytes > 0 && done >= order.bytes) {
                return Ok(());
            }
            if order.rate > 0 {
                let due = Duration::from_secs_f64(done as f64 / order.rate as f64);
                // In short steps: a stop is heard soon.
                let early = due.saturating_sub(began.elapsed()).min(Duration::from_millis(50));
                if !early.is_zero() {
                    std::thread::sleep(early);
                    continue;
                }
            }
            let next = self.journal.committed() + 1;
            let bytes = self.journal.bytes();
            let batch: Vec<Record> = (next..next + BATCH)
                .map(|sequence| {
                    let place = place(order.seed, sequence, &self.slots);
                    Record { commit: false, sequence, seed: order.seed, place, bytes }
                })
                .collect();
            let began = Instant::now();
            self.journal.append(&batch)?;
            took(began);
            self.commit(&batch)?;
            committed(self.journal.committed(), self.journal.bytes());
        }
    }

    /// Data to all disks, then the commit.
    fn commit(&mut self, batch: &[Record]) -> io::Result<()> {
        let Some(last) = batch.last() else { return Ok(()) };
        let mut bytes = (LENGTH * (batch.len() + 1)) as u64;
        let mut touched = vec![false; self.data.len()];
        for record in batch {
            let place = record.place;
            let Some(file) = self.data.get(place.disk as usize) else {
                return Err(io::Error::other("the journal names a disk that is not there"));
            };
            let mut content = Vec::with_capacity(place.blocks as usize * BLOCK);
            for index in 0..place.blocks {
                content.extend_from_slice(&block(record.seed, record.sequence, index));
            }
            file.write_all_at(&content, u64::from(place.slot) * u64::from(SLOT) * BLOCK as u64)?;
            bytes += content.len() as u64;
            touched[place.disk as usize] = true;
        }
        for disk in (0..touched.len()).filter(|d| touched[*d]) {
            let began = Instant::now();
            self.data[disk].sync_data()?;
            took(began);
        }
        let began = Instant::now();
        self.journal.append(&[Record { commit: true, bytes: last.bytes + bytes, ..*last }])?;
        took(began);
        Ok(())
    }
}

fn took(began: Instant) {
    let micros = began.elapsed().as_micros().try_into().unwrap_or(u32::MAX);
    LATENCIES.lock().unwrap_or_else(PoisonError::into_inner).push(micros);
}
