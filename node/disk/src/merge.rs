//! Ending a checkpoint: what a child stores goes into its parent.

use std::path::Path;

use crate::vhdx::{Presence, VhdxLayer, VhdxWriter, announce_parent_change, check_linkage};
use crate::{ByteRange, DiskError, RangeSet};

/// Bytes copied at a time.
const STEP: u64 = 4 << 20;

/// Copies everything that `child` stores or hides into `parent`, so that the parent alone reads as the
/// chain did. Gives the guest-visible ranges that it stored or made zeros. Neither file may be in use.
///
/// The child stays readable over the parent at every moment, and an interrupted merge can be run again.
/// Afterwards the caller deletes the child, or moves its children to the parent with
/// [`set_parent`](crate::vhdx::set_parent). Other children of the parent become invalid and are refused.
///
/// # Errors
/// [`DiskError::ParentMismatch`] if the two do not belong together; what reading and writing met.
pub fn merge_child_into_parent(
    child: impl AsRef<Path>,
    parent: impl AsRef<Path>,
) -> Result<RangeSet, DiskError> {
    let (child, parent) = (child.as_ref(), parent.as_ref());
    check_linkage(&VhdxLayer::open(child)?, &VhdxLayer::open(parent)?)?;
    let data_guid = announce_parent_change(child)?;
    let layer = VhdxLayer::open(child)?;
    let mut writer = VhdxWriter::open(parent)?;
    writer.set_next_data_guid(data_guid);
    let mut changed = Vec::new();
    let mut buf = vec![0; STEP as usize];
    layer.runs(0, layer.info().size, &mut |run| {
        match run.presence {
            Presence::Parent => return Ok(()),
            Presence::Zero => writer.write_zeroes(run.offset, run.len)?,
            Presence::Here { file_offset } => {
                for done in (0..run.len).step_by(STEP as usize) {
                    let part = &mut buf[..STEP.min(run.len - done) as usize];
                    layer.read_stored(file_offset + done, part)?;
                    writer.write_at(run.offset + done, part)?;
                }
            }
        }
        changed.push(ByteRange::new(run.offset, run.len));
        Ok(())
    })?;
    writer.close()?;
    Ok(changed.into_iter().collect())
}
