//! Everything that a reader does with what a guest keeps on its disk.

use std::sync::Arc;

use crate::block_file::ByteSource;
use crate::guest::{FileId, FileKind, FileSystem, GuestDisk, GuestError, Limits, page_files};
use crate::{RangeSet, RawDisk};

/// Names of a directory that are followed, and how deep.
const NAMES: usize = 60;
const DEPTH: u32 = 3;

/// Bytes read of a file, from places of which one is past any file's end.
const PART: usize = 40_000;
const PLACES: [u64; 3] = [0, 39_999, u64::MAX / 2];

/// Looks for page files on a disk, then lists and reads what its file systems hold. Gives every range of
/// the disk that was named; whoever inspects checks that they lie on it.
pub fn inspect_guest(source: Arc<dyn ByteSource>, limits: Limits) -> RangeSet {
    let Ok(disk) = RawDisk::from_source("memory.raw".into(), source) else {
        return RangeSet::new();
    };
    let disk = Arc::new(disk);
    let mut named = page_files::search(disk.clone(), limits).ranges();
    let Ok(disk) = GuestDisk::open(disk, limits) else { return named };
    for volume in &disk.volumes {
        named.insert(volume.range.start, volume.range.len);
        if let Ok(fs) = disk.file_system(volume) {
            fs.doubt().ok();
            descend(&*fs, fs.root(), 0, &mut named).ok();
        }
    }
    named
}

fn descend(
    fs: &dyn FileSystem,
    directory: FileId,
    depth: u32,
    named: &mut RangeSet,
) -> Result<(), GuestError> {
    let mut entries = Vec::new();
    let listed = fs.list(directory, &mut |entry| {
        entries.push(entry);
        Ok(())
    });
    for entry in entries.iter().take(NAMES) {
        let _shown = entry.name.to_string();
        fs.stat(entry.id).ok();
        let mut part = vec![0; PART];
        for offset in PLACES {
            fs.read(entry.id, offset, &mut part).ok();
        }
        for extent in fs.extents(entry.id).unwrap_or_default() {
            named.insert(extent.disk.start, extent.disk.len);
        }
        if entry.kind == FileKind::Directory && depth < DEPTH {
            descend(fs, entry.id, depth + 1, named)?;
        }
    }
    listed
}
