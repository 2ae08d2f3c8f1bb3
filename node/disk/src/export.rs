//! Writing a disk out in another form.

use std::path::Path;

use crate::block_file::BlockFile;
use crate::{DiskError, ReadDisk};

/// Bytes copied at a time, and the unit in which zeros become holes.
const STEP: u64 = 1 << 20;

/// Writes a disk as a new raw image, leaving holes where it is zeros, and waits until it is on the
/// medium. Gives the number of bytes written.
///
/// # Errors
/// [`DiskError::Io`], also if the file exists; what reading met.
pub fn to_raw(disk: &dyn ReadDisk, out_path: impl AsRef<Path>) -> Result<u64, DiskError> {
    let out = BlockFile::create_new(out_path.as_ref())?;
    out.set_len(disk.info().size)?;
    let mut buf = vec![0; STEP as usize];
    let mut written = 0;
    for range in &disk.allocated()? {
        for done in (0..range.len).step_by(STEP as usize) {
            let (at, part) = (range.start + done, &mut buf[..STEP.min(range.len - done) as usize]);
            disk.read_at(at, part)?;
            if part.iter().any(|byte| *byte != 0) {
                out.write_all_at(at, part)?;
                written += part.len() as u64;
            }
        }
    }
    out.sync()?;
    Ok(written)
}
