//! Ending a checkpoint: what a child stores goes into its parent.

use std::path::Path;

use crate::layer::{Layer, Presence, ReadLayer};
use crate::vhdx::{self, VhdxWriter};
use crate::{ByteRange, DiskError, DiskWriter, RangeSet};

/// Bytes copied at a time.
const STEP: u64 = 4 << 20;

/// Copies everything that `child` stores or hides into `parent`, so that the parent alone reads as the
/// chain did. Gives the guest-visible ranges that it stored or made zeros. Neither file may be in use.
///
/// The child stays readable over the parent at every moment, and an interrupted merge can be run again.
/// Afterwards the caller deletes the child, or moves its children to the parent with [`set_parent`].
/// Other children of the parent become invalid; those of a VHDX are refused from then on, those of a VHD
/// cannot be told.
///
/// # Errors
/// [`DiskError::ParentMismatch`] if the two do not belong together or the child is bigger; what reading
/// and writing met.
pub fn merge_child_into_parent(
    child: impl AsRef<Path>,
    parent: impl AsRef<Path>,
) -> Result<RangeSet, DiskError> {
    let (child, parent) = (child.as_ref(), parent.as_ref());
    let (mut layer, below) = (Layer::open(child)?, Layer::open(parent)?);
    layer.check_parent(&below)?;
    if layer.info().size > below.info().size {
        return Err(DiskError::ParentMismatch {
            child: child.to_owned(),
            parent: parent.to_owned(),
            what: "size",
            expected: layer.info().size.to_string().into(),
            found: below.info().size.to_string().into(),
        });
    }
    drop(below);
    let mut writer = match &layer {
        Layer::Vhdx(_) => {
            let data_guid = vhdx::announce_parent_change(child)?;
            layer = Layer::open(child)?;
            let mut writer = VhdxWriter::open(parent)?;
            writer.set_next_data_guid(data_guid);
            DiskWriter::Vhdx(writer)
        }
        Layer::Vhd(_) => DiskWriter::open(parent)?,
    };
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

/// Makes `parent` the parent of the differencing disk `child`, from now on and as it is now. The caller
/// vouches that the child's view of the disk stays right, as it does after the old parent was merged
/// into the new one.
///
/// # Errors
/// [`DiskError::ParentMismatch`] if the two cannot be one disk; what opening the files met.
pub fn set_parent(child: impl AsRef<Path>, parent: impl AsRef<Path>) -> Result<(), DiskError> {
    match Layer::open(child.as_ref())? {
        Layer::Vhdx(_) => vhdx::set_parent(child, parent),
        Layer::Vhd(_) => crate::vhd::set_parent(child, parent),
    }
}
