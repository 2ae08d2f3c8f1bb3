//! The guest's own account of what it wrote: a file of fixed records on the first disk.
//!
//! A batch is: intents, fsync; data on all disks, fsync of each; one commit, fsync. So a commit that can be read means
//! that everything up to its sequence is on all disks, and that holds for any point in time at which all disks are
//! stopped together. What is intended but not committed may be there in part.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::pattern::{Place, check};

/// Bytes of a record on disk.
pub(crate) const LENGTH: usize = 64;
const MAGIC: u32 = 0x314a_474f;
const INTENT: u32 = 1;
const COMMIT: u32 = 2;

/// One record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) commit: bool,
    pub(crate) sequence: u64,
    pub(crate) seed: u64,
    pub(crate) place: Place,
    /// Bytes written since the disks were made, data and journal.
    pub(crate) bytes: u64,
}

impl Record {
    fn encode(&self) -> [u8; LENGTH] {
        let mut out = [0; LENGTH];
        let kind = if self.commit { COMMIT } else { INTENT };
        let words = [MAGIC, kind, self.place.disk, self.place.slot, self.place.blocks];
        for (at, word) in words.iter().enumerate() {
            out[at * 4..at * 4 + 4].copy_from_slice(&word.to_le_bytes());
        }
        for (at, word) in [self.sequence, self.seed, self.bytes].iter().enumerate() {
            out[24 + at * 8..32 + at * 8].copy_from_slice(&word.to_le_bytes());
        }
        let sum = check(&out[..LENGTH - 8]);
        out[LENGTH - 8..].copy_from_slice(&sum.to_le_bytes());
        out
    }

    fn decode(raw: &[u8; LENGTH]) -> Option<Self> {
        let small =
            |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        let large = |at: usize| u64::from(small(at)) | u64::from(small(at + 4)) << 32;
        let valid = small(0) == MAGIC && large(LENGTH - 8) == check(&raw[..LENGTH - 8]);
        valid.then(|| Self {
            commit: small(4) == COMMIT,
            place: Place { disk: small(8), slot: small(12), blocks: small(16) },
            sequence: large(24),
            seed: large(32),
            bytes: large(40),
        })
    }
}

/// The open journal.
pub(crate) struct Journal {
    file: File,
    end: u64,
    /// All records, in order.
    pub(crate) records: Vec<Record>,
}

impl Journal {
    /// Opens or makes it, and reads up to the first record that is not whole.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file =
            File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        let mut journal = Self { file, end: 0, records: Vec::new() };
        let mut raw = [0; LENGTH];
        while journal.file.read_exact_at(&mut raw, journal.end).is_ok() {
            let Some(record) = Record::decode(&raw) else { break };
            journal.records.push(record);
            journal.end += LENGTH as u64;
        }
        Ok(journal)
    }

    /// Appends, and waits until it is on disk.
    pub(crate) fn append(&mut self, records: &[Record]) -> io::Result<()> {
        let bytes: Vec<u8> = records.iter().flat_map(Record::encode).collect();
        self.file.write_all_at(&bytes, self.end)?;
        self.file.sync_data()?;
        self.end += bytes.len() as u64;
        self.records.extend_from_slice(records);
        Ok(())
    }

    /// Up to which sequence everything is there; 0: nothing was ever committed.
    pub(crate) fn committed(&self) -> u64 {
        self.records.iter().rev().find(|r| r.commit).map_or(0, |r| r.sequence)
    }

    /// Bytes written in all, as far as committed.
    pub(crate) fn bytes(&self) -> u64 {
        self.records.iter().rev().find(|r| r.commit).map_or(0, |r| r.bytes)
    }

    /// Intents that no commit followed.
    pub(crate) fn pending(&self) -> Vec<Record> {
        let committed = self.committed();
        self.records.iter().filter(|r| !r.commit && r.sequence > committed).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(sequence: u64, commit: bool) -> Record {
        let place = Place { disk: 1, slot: 9, blocks: 3 };
        Record { commit, sequence, seed: 5, place, bytes: 77 }
    }

    #[test]
    fn a_torn_tail_ends_the_journal_and_is_overwritten() {
        let path = std::env::temp_dir().join(format!("outrider-journal-{}", std::process::id()));
        let mut journal = Journal::open(&path).expect("a file");
        journal.append(&[record(1, false), record(2, false), record(2, true)]).expect("written");
        journal.append(&[record(3, false)]).expect("written");
        journal.file.write_all_at(&[0xff; 40], journal.end).expect("written");

        let mut again = Journal::open(&path).expect("a file");
        assert_eq!(again.records, journal.records);
        assert_eq!((again.committed(), again.bytes()), (2, 77));
        assert_eq!(again.pending(), [record(3, false)]);
        again.append(&[record(3, true)]).expect("written");
        assert_eq!(Journal::open(&path).expect("a file").committed(), 3);
        std::fs::remove_file(path).expect("removed");
    }
}
