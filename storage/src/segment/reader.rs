//! Reading records back, with a bounded number of open files.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outrider_format::entry::EntryHead;
use outrider_format::scan::read_entry;
use outrider_format::segment::{self, SegmentNumber};
use outrider_proto::record::Record;

use crate::index::Location;

/// Files kept open.
const OPEN_FILES: usize = 128;

/// Reads entries of a store's segments.
#[derive(Debug)]
pub struct SegmentReader {
    dir: PathBuf,
    files: Mutex<HashMap<SegmentNumber, Arc<File>>>,
}

impl SegmentReader {
    /// A reader over a segment folder.
    #[must_use]
    pub fn new(dir: PathBuf) -> Self {
        Self { dir, files: Mutex::default() }
    }

    /// Reads and verifies one entry. Blocks.
    ///
    /// # Errors
    /// The system's answer; `InvalidData` when the bytes are damaged.
    pub fn read(&self, at: Location) -> io::Result<(EntryHead, Record)> {
        let file = self.file(at.segment)?;
        read_entry(&*file, at.offset, at.len)
    }

    fn file(&self, number: SegmentNumber) -> io::Result<Arc<File>> {
        if let Some(file) = self.lock().get(&number) {
            return Ok(Arc::clone(file));
        }
        // A segment may be sealed between the two looks; then the second look at the sealed name finds it.
        let open = |sealed| File::open(segment::path(&self.dir, number, sealed));
        let file = Arc::new(open(true).or_else(|_| open(false)).or_else(|_| open(true))?);
        let mut files = self.lock();
        if files.len() >= OPEN_FILES {
            files.clear();
        }
        files.insert(number, Arc::clone(&file));
        Ok(file)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SegmentNumber, Arc<File>>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
