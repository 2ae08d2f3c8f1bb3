//! Are two disks the same to a guest?

use crate::{DiskError, ReadDisk};

/// Bytes compared at a time.
const STEP: u64 = 1 << 20;

/// The first byte in which two disks of one size differ. Ranges that neither has allocated are zeros in
/// both and are not read.
///
/// # Errors
/// [`DiskError::SizesDiffer`], or what reading met.
pub fn first_difference(a: &dyn ReadDisk, b: &dyn ReadDisk) -> Result<Option<u64>, DiskError> {
    let (left, right) = (a.info().size, b.info().size);
    if left != right {
        return Err(DiskError::SizesDiffer { left, right });
    }
    let (mut x, mut y) = (vec![0; STEP as usize], vec![0; STEP as usize]);
    for range in &a.allocated()?.union(&b.allocated()?) {
        for done in (0..range.len).step_by(STEP as usize) {
            let (at, len) = (range.start + done, STEP.min(range.len - done) as usize);
            a.read_at(at, &mut x[..len])?;
            b.read_at(at, &mut y[..len])?;
            if x[..len] != y[..len] {
                let differing = x[..len].iter().zip(&y[..len]).position(|(p, q)| p != q);
                return Ok(differing.map(|i| at + i as u64));
            }
        }
    }
    Ok(None)
}
