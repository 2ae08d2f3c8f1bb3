//! Reference points: list, make out of a checkpoint, remove.

use outrider_proto::ids::VmGuid;
use outrider_wmi::{Object, Value};

use super::HyperV;
use super::call::Call;
use super::wql::{self, REFERENCE_POINT, literal};
use crate::hypervisor::error::{HypervisorError, Retry};
use crate::hypervisor::{Checkpoint, ReferencePoint};
use crate::lease::Lease;

impl HyperV {
    pub(super) async fn list_reference_points(
        &self,
        vm: VmGuid,
    ) -> Result<Vec<ReferencePoint>, HypervisorError> {
        let wql = format!(
            "SELECT * FROM {REFERENCE_POINT} WHERE VirtualSystemIdentifier={}",
            literal(&wql::guid(vm.0))
        );
        let found = self.query("list the reference points of a VM", &wql).await?;
        if found.is_empty() {
            self.is_here(vm).await?;
        }
        Ok(found.iter().filter_map(reference_point).collect())
    }

    /// The new point is the one that the job names, else (Server 2025 names none) the one that was not there before.
    pub(super) async fn convert_checkpoint(
        &self,
        lease: &Lease,
        vm: VmGuid,
        checkpoint: &Checkpoint,
    ) -> Result<ReferencePoint, HypervisorError> {
        let doing =
            format!("convert the checkpoint {:?} of VM {vm} to a reference point", checkpoint.name);
        let before = self.list_reference_points(vm).await?;
        let call = Call {
            doing: doing.clone(),
            service: "Msvm_VirtualSystemSnapshotService",
            path: String::new(),
            method: "ConvertToReferencePoint",
            // Nobody else gives ReferencePointSettings, and the documentation does not say that they may be empty.
            args: vec![("AffectedSnapshot", Value::Ref(checkpoint.path.clone()))],
        };
        let finished = self.change(lease, &call).await;
        let failure = match finished {
            Ok(finished) => {
                if let Some(point) = finished.affected(REFERENCE_POINT).and_then(reference_point) {
                    return Ok(point);
                }
                None
            }
            Err(e) if e.retry() == Retry::Inspect => Some(e),
            Err(e) => {
                let gone =
                    !self.recovery_checkpoints(vm).await?.iter().any(|c| c.id == checkpoint.id);
                return Err(if gone {
                    HypervisorError::CheckpointGone { checkpoint: checkpoint.name.clone() }
                } else {
                    e
                });
            }
        };
        let mut new = self.list_reference_points(vm).await?;
        new.retain(|p| before.iter().all(|b| b.id != p.id));
        match (new.pop(), new.is_empty(), failure) {
            (Some(point), true, None) => Ok(point),
            // The outcome of the call is unknown and something appeared: it is not known to be this checkpoint's.
            (_, _, Some(failure)) => Err(failure),
            (found, _, None) => Err(HypervisorError::Odd {
                doing,
                detail: match found {
                    None => "it reports success, but there is no new reference point".into(),
                    Some(_) => {
                        "several reference points appeared at once, none is known to be ours".into()
                    }
                },
            }),
        }
    }

    pub(super) async fn remove_reference_point(
        &self,
        lease: &Lease,
        vm: VmGuid,
        point: &ReferencePoint,
    ) -> Result<(), HypervisorError> {
        let call = Call {
            doing: format!("remove the reference point {} of VM {vm}", point.id),
            service: "Msvm_VirtualSystemReferencePointService",
            path: String::new(),
            method: "DestroyReferencePoint",
            args: vec![("AffectedReferencePoint", Value::Ref(point.path.clone()))],
        };
        let failure = match self.change(lease, &call).await {
            Ok(_) => return Ok(()),
            Err(HypervisorError::Lease(lost)) => return Err(lost.into()),
            Err(failure) => failure,
        };
        let left = self.list_reference_points(vm).await?;
        if left.iter().any(|p| p.id == point.id) { Err(failure) } else { Ok(()) }
    }
}

/// Disks and change tracking ids are parallel arrays; where they do not fit, no disk has tracking.
fn reference_point(object: &Object) -> Option<ReferencePoint> {
    let id = object.str("InstanceID")?.to_owned();
    let disks = object.array("VirtualDiskIdentifiers");
    let ids = object.array("ResilientChangeTrackingIdentifiers");
    let tracking = if disks.len() == ids.len() {
        let pair = |(disk, id): (&Value, &Value)| {
            let id = id.as_str().filter(|id| !id.is_empty())?;
            Some((wql::slot(disk.as_str()?)?.to_owned(), id.to_owned()))
        };
        disks.iter().zip(ids).filter_map(pair).collect()
    } else {
        tracing::warn!(
            reference_point = id,
            "disks and change tracking ids do not pair: no disk has tracking"
        );
        Vec::new()
    };
    Some(ReferencePoint { id, path: object.path.clone(), tracking })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_paired_by_identifier_and_an_odd_list_means_no_tracking() {
        let object = Object::new(REFERENCE_POINT, "p")
            .with("InstanceID", r"Microsoft:VM\RP")
            .with("VirtualDiskIdentifiers", vec![r"Microsoft:VM\B\0\1\L", r"Microsoft:VM\A\0\0\L"])
            .with("ResilientChangeTrackingIdentifiers", vec!["rct-b", ""]);
        let point = reference_point(&object).expect("a point");
        assert_eq!(point.tracking_of(r"B\0\1\L"), Some("rct-b"));
        assert_eq!(point.tracking_of(r"A\0\0\L"), None, "an empty id is no id");
        let odd = object.with("ResilientChangeTrackingIdentifiers", vec!["rct-b"]);
        assert!(reference_point(&odd).expect("a point").tracking.is_empty());
    }
}
