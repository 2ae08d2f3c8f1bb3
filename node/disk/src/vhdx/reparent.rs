//! Which parent a differencing disk belongs to: checking it and changing it.

use std::path::Path;

use uuid::Uuid;

use super::create::locator_for;
use super::layer::read_metadata_table;
use super::locator::linkage_text;
use super::{ParentLocator, VhdxLayer, VhdxWriter};
use crate::DiskError;
use crate::error::FormatError;
use crate::layer::ReadLayer;

/// Most bytes of a locator that we write: it changes in one log entry.
const MAX_LOCATOR: usize = 64 << 10;

/// Makes `parent` the parent of the differencing disk `child`, from now on and as it is now. The caller
/// vouches that the child's view of the disk stays right, as it does after the old parent was merged
/// into the new one.
///
/// # Errors
/// [`DiskError::ParentMismatch`] if size, sectors or VirtualDiskId differ; what opening the files met.
pub fn set_parent(child: impl AsRef<Path>, parent: impl AsRef<Path>) -> Result<(), DiskError> {
    let (child, parent) = (child.as_ref(), parent.as_ref());
    let parent_layer = VhdxLayer::open(parent)?;
    let mut writer = VhdxWriter::open_alone(child)?;
    if writer.layer.parent().is_none() {
        return Err(no_parent(child));
    }
    check_same_disk(&writer.layer, &parent_layer)?;
    let locator = locator_for(child, parent, parent_layer.header.data_write_guid)?;
    writer.set_locator(locator)?;
    writer.close()
}

/// Writes into `child` the DataWriteGuid that its parent is about to get from a merge, next to the one
/// it has, so that an interrupted merge can be repeated. Gives the GUID, which is the one announced
/// before if there was an earlier attempt.
pub(crate) fn announce_parent_change(child: &Path) -> Result<Uuid, DiskError> {
    let mut writer = VhdxWriter::open_alone(child)?;
    let mut locator = writer.layer.parent().cloned().ok_or_else(|| no_parent(child))?;
    if let [_, announced] = locator.linkages()[..] {
        return writer.close().map(|()| announced);
    }
    let next = Uuid::new_v4();
    locator.set("parent_linkage2", Some(linkage_text(next)));
    writer.set_locator(locator)?;
    writer.close()?;
    Ok(next)
}

/// Refuses a parent that is not the disk, or not in the state, that the child was made from.
pub(crate) fn check_linkage(child: &VhdxLayer, parent: &VhdxLayer) -> Result<(), DiskError> {
    let linkages = child.parent().map(ParentLocator::linkages).unwrap_or_default();
    let found = parent.header.data_write_guid;
    if !linkages.contains(&found) {
        let expected = linkages.iter().map(Uuid::to_string).collect::<Vec<_>>().join(" or ");
        return Err(mismatch(child, parent, "DataWriteGuid", expected, found.to_string()));
    }
    // The ids of the disks may differ: an administrator can give a child a new one. The parent may be
    // smaller, since the child can be made bigger.
    let [_, _, sector] = facts(child);
    let [_, _, found] = facts(parent);
    match sector.1 == found.1 {
        true => Ok(()),
        false => Err(mismatch(child, parent, sector.0, sector.1, found.1)),
    }
}

fn facts(layer: &VhdxLayer) -> [(&'static str, String); 3] {
    let info = &layer.info;
    [
        ("VirtualDiskId", info.disk_id.to_string()),
        ("size", info.size.to_string()),
        ("logical sector size", info.logical_sector.to_string()),
    ]
}

fn check_same_disk(child: &VhdxLayer, parent: &VhdxLayer) -> Result<(), DiskError> {
    for ((what, expected), (_, found)) in facts(child).into_iter().zip(facts(parent)) {
        if expected != found {
            return Err(mismatch(child, parent, what, expected, found));
        }
    }
    Ok(())
}

fn mismatch(
    child: &VhdxLayer,
    parent: &VhdxLayer,
    what: &'static str,
    expected: String,
    found: String,
) -> DiskError {
    DiskError::ParentMismatch {
        child: child.path().to_owned(),
        parent: parent.path().to_owned(),
        what,
        expected: expected.into(),
        found: found.into(),
    }
}

fn no_parent(child: &Path) -> DiskError {
    FormatError::unsupported("kind", "is not differencing, so it has no parent to change")
        .in_file(child)
}

impl VhdxWriter {
    /// Replaces the parent locator, in one step.
    fn set_locator(&mut self, locator: ParentLocator) -> Result<(), DiskError> {
        let bytes = locator.encode();
        let region = self.layer.regions.metadata;
        let table = read_metadata_table(&self.layer.image, &self.layer.regions)?;
        let place = table
            .place_locator(region.length, bytes.len() as u64)
            .filter(|_| bytes.len() <= MAX_LOCATOR)
            .ok_or_else(|| {
                let detail = format!("has no room for a parent locator of {} bytes", bytes.len());
                FormatError::unsupported("metadata", detail).in_file(self.layer.path())
            })?;
        self.begin(false)?;
        self.fail_on_error(|writer| {
            writer.update(region.offset + u64::from(place.offset), &bytes)?;
            let entry = [place.offset.to_le_bytes(), (bytes.len() as u32).to_le_bytes()].concat();
            writer.update(region.offset + place.entry as u64 + 16, &entry)?;
            writer.layer.metadata.parent = Some(locator);
            writer.commit(None)
        })
    }
}
