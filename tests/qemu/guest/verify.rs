//! Do the disks hold what the journal says?

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::journal::{Journal, Record};
use crate::pattern::{BLOCK, SLOT, block};

/// What was found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Everything up to here was to be there.
    pub(crate) committed: u64,
    /// Records read from the journal.
    pub(crate) records: usize,
    /// Blocks compared.
    pub(crate) blocks: usize,
    /// Records that were intended and not committed.
    pub(crate) pending: usize,
    /// Blocks that hold something else.
    pub(crate) bad: usize,
    /// The first of them.
    pub(crate) first_bad: Option<String>,
}

/// A disk's number and a block of its data file.
type At = (u32, u64);

/// Compares every block that a committed record wrote last.
pub(crate) fn verify(journal: &Journal, data: &[File]) -> io::Result<Verdict> {
    let pending = journal.pending();
    let mut verdict = Verdict {
        committed: journal.committed(),
        records: journal.records.len(),
        pending: pending.len(),
        ..Verdict::default()
    };
    let mut last: HashMap<At, (Record, u32)> = HashMap::new();
    for record in journal.records.iter().filter(|r| !r.commit && r.sequence <= verdict.committed) {
        for index in 0..record.place.blocks {
            last.insert(position(record, index), (*record, index));
        }
    }
    // Such a block may hold the new content already, or still the old one.
    let mut maybe: HashMap<At, Vec<(Record, u32)>> = HashMap::new();
    for record in &pending {
        for index in 0..record.place.blocks {
            maybe.entry(position(record, index)).or_default().push((*record, index));
        }
    }
    let mut places: Vec<_> = last.iter().collect();
    places.sort_unstable_by_key(|(place, _)| **place);
    for (place, (record, index)) in places {
        let (disk, at) = *place;
        let mut found = [0; BLOCK];
        let read = match data.get(disk as usize) {
            Some(file) => file.read_exact_at(&mut found, at * BLOCK as u64),
            None => Err(io::Error::other("there is no such disk")),
        };
        verdict.blocks += 1;
        let is = |r: &Record, i: u32| found == block(r.seed, r.sequence, i);
        let allowed = maybe.get(place).is_some_and(|m| m.iter().any(|(r, i)| is(r, *i)));
        if read.is_err() || !(is(record, *index) || allowed) {
            verdict.bad += 1;
            verdict.first_bad.get_or_insert_with(|| {
                let holds = u64::from_le_bytes(found[..8].try_into().unwrap_or_default());
                format!("disk{disk}/block{at}/expected{}/holds{holds}", record.sequence)
            });
        }
    }
    Ok(verdict)
}

fn position(record: &Record, index: u32) -> At {
    (record.place.disk, u64::from(record.place.slot) * u64::from(SLOT) + u64::from(index))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pattern::Place;

    #[test]
    fn a_lost_block_is_found_and_one_that_was_on_its_way_is_not() {
        let dir = std::env::temp_dir().join(format!("outrider-verify-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a folder");
        let mut journal = Journal::open(&dir.join("journal")).expect("a journal");
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(true);
        let data = [options.open(dir.join("data")).expect("a file")];
        let record = |sequence, slot, commit| Record {
            commit,
            sequence,
            seed: 3,
            place: Place { disk: 0, slot, blocks: 2 },
            bytes: 0,
        };
        let write = |sequence, at: u64, index| {
            data[0].write_all_at(&block(3, sequence, index), at * BLOCK as u64).expect("written");
        };
        journal
            .append(&[record(1, 0, false), record(2, 1, false), record(2, 1, true)])
            .expect("written");
        for (sequence, at, index) in [(1, 0, 0), (1, 1, 1), (2, 16, 0), (2, 17, 1)] {
            write(sequence, at, index);
        }
        let bad = |journal: &Journal| verify(journal, &data).expect("readable").bad;
        assert_eq!(bad(&journal), 0);
        write(9, 17, 1);
        assert_eq!(bad(&journal), 1, "foreign content");
        // The next write of that block was intended and came half-way.
        journal.append(&[record(9, 1, false)]).expect("written");
        assert_eq!(bad(&journal), 0);
        data[0].set_len(16 * BLOCK as u64).expect("cut");
        assert_eq!(bad(&journal), 2, "cut off");
        std::fs::remove_dir_all(&dir).expect("removed");
    }
}
