//! Writing a disk out in another form.

use std::path::Path;

use crate::block_file::BlockFile;
use crate::{DiskError, ReadDisk};

/// Bytes copied at a time, and the unit in which zeros become holes.
const STEP: u64 = 1 << 20;

/// Told how many of the allocated bytes were copied, and of how many; says whether to go on.
pub type Progress<'a> = dyn FnMut(u64, u64) -> bool + 'a;

/// Writes a disk as a new raw image, leaving holes where it is zeros, and waits until it is on the
/// medium. Gives the number of bytes written. What was begun is removed if it cannot be finished.
///
/// # Errors
/// [`DiskError::Io`], also if the file exists; what reading met.
pub fn to_raw(disk: &dyn ReadDisk, out_path: impl AsRef<Path>) -> Result<u64, DiskError> {
    to_raw_told(disk, out_path, &mut |_, _| true)
}

/// As [`to_raw`], telling how far it is.
///
/// # Errors
/// As [`to_raw`]; [`DiskError::Stopped`] if `progress` said so.
pub fn to_raw_told(
    disk: &dyn ReadDisk,
    out_path: impl AsRef<Path>,
    progress: &mut Progress<'_>,
) -> Result<u64, DiskError> {
    let path = out_path.as_ref();
    let out = BlockFile::create_new(path)?;
    copy(disk, &out, progress).inspect_err(|_| {
        // The error that matters is the one that stopped the writing.
        std::fs::remove_file(path).ok();
    })
}

fn copy(
    disk: &dyn ReadDisk,
    out: &BlockFile,
    progress: &mut Progress<'_>,
) -> Result<u64, DiskError> {
    out.set_len(disk.info().size)?;
    let allocated = disk.allocated()?;
    let total = allocated.total_len();
    let mut buf = vec![0; STEP as usize];
    let (mut written, mut copied) = (0, 0);
    for range in &allocated {
        for done in (0..range.len).step_by(STEP as usize) {
            let (at, part) = (range.start + done, &mut buf[..STEP.min(range.len - done) as usize]);
            disk.read_at(at, part)?;
            if part.iter().any(|byte| *byte != 0) {
                out.write_all_at(at, part)?;
                written += part.len() as u64;
            }
            copied += part.len() as u64;
            if !progress(copied, total) {
                return Err(DiskError::Stopped { path: out.path().to_owned() });
            }
        }
    }
    out.sync()?;
    Ok(written)
}
