//! Disk files: facts and changes.

use std::path::Path;
use std::sync::Arc;

use outrider_disk::{DiskChain, DiskKind, RangeSet, ReadDisk};
use outrider_wmi::lab::wire::Refusal;
use outrider_wmi::{Object, embedded};
use uuid::Uuid;

use super::{Call, FILE_NOT_FOUND, IN_USE, INVALID, Outcome, invalid};
use crate::cluster::Cluster;
use crate::control::FaultKind;
use crate::disks::locked;
use crate::host_path::host_path;
use crate::jobs::JobError;
use crate::model::guid;

/// Ranges answered by one call; the caller asks again for the rest.
const RANGES_PER_CALL: usize = 64;
/// ERROR_VHD_INVALID_CHANGE_TRACKING_ID.
const INVALID_TRACKING_ID: u32 = 0xC03A_0029;

pub(super) async fn call(cluster: &Arc<Cluster>, call: &Call) -> Option<Result<Outcome, Refusal>> {
    Some(match call.method.as_str() {
        "GetVirtualDiskChanges" => changes(cluster, call).await,
        "GetVirtualHardDiskSettingData" => settings(cluster, call).await,
        _ => return None,
    })
}

struct Frozen {
    vm: Uuid,
    disk: Uuid,
    size: u64,
    mark: String,
}

async fn changes(cluster: &Arc<Cluster>, call: &Call) -> Result<Outcome, Refusal> {
    let path = host_path(call.args.str("Path"));
    let (Some(offset), Some(length)) = (call.args.u64("ByteOffset"), call.args.u64("ByteLength"))
    else {
        return Ok(Outcome::code(INVALID));
    };
    // Only valid for VHD sets.
    if !call.args.str("TargetSnapshotId").is_empty() {
        return Ok(Outcome::code(INVALID));
    }
    let found = cluster.read(|s| {
        let mut here = s.vms.values().filter(|vm| vm.host == call.host);
        let frozen = here.find_map(|vm| {
            let checkpoints = vm.checkpoints.iter().rev();
            let frozen = checkpoints.flat_map(|c| &c.disks).find(|f| f.path == path)?;
            let mark = frozen.mark.clone()?;
            let size = vm.disk(frozen.disk)?.size;
            Some(Frozen { vm: vm.id, disk: frozen.disk, size, mark })
        });
        frozen.ok_or_else(|| {
            let live = s.vm_of_file(&path).is_some_and(|vm| vm.writes(&path) || vm.merging(&path));
            if live { IN_USE } else { FILE_NOT_FOUND }
        })
    });
    let frozen = match found {
        Ok(frozen) => frozen,
        Err(code) => return Ok(Outcome::code(code)),
    };
    let rejected = cluster.change(|s| {
        s.strike(Some(frozen.vm), Some(&call.host), |k| match k {
            FaultKind::RejectIds { as_job } => Some(*as_job),
            _ => None,
        })
    });
    if rejected == Some(true) {
        let job =
            cluster.change(|s| s.begin_job(&call.host, Some(frozen.vm), &call.method, 0, None));
        let text =
            format!("'{}': the change tracking identifier is invalid (0xC03A0029)", path.display());
        return Ok(Outcome::job(cluster.run_job(job, move |_| Err(JobError::new(32768, text)))));
    }
    let changed = if rejected.is_some() {
        None
    } else {
        tracked(cluster, &frozen, call.args.str("LimitId")).await?
    };
    Ok(match changed {
        Some(changed) => answer(&changed, offset, length.min(frozen.size.saturating_sub(offset))),
        None => Outcome::code(INVALID_TRACKING_ID),
    })
}

async fn tracked(
    cluster: &Arc<Cluster>,
    frozen: &Frozen,
    limit: &str,
) -> Result<Option<RangeSet>, Refusal> {
    let io = cluster.read(|s| s.vm(frozen.vm).map(|vm| vm.io.clone()));
    let io = io.map_err(|e| invalid("GetVirtualDiskChanges", &e.to_string()))?;
    let (disk, size) = (frozen.disk, frozen.size);
    let (mark, limit) = (frozen.mark.clone(), limit.to_owned());
    cluster
        .blocking(move || locked(&io).tracker(disk).and_then(|t| t.changes(&limit, &mark, size)))
        .await
        .map_err(|e| invalid("GetVirtualDiskChanges", &e.to_string()))
}

/// As many ranges as fit, and how far they cover what was asked.
fn answer(changed: &RangeSet, offset: u64, length: u64) -> Outcome {
    let within = changed.intersect(&RangeSet::single(offset, length));
    let mut ranges: Vec<_> = within.iter().collect();
    let processed = match ranges.get(RANGES_PER_CALL) {
        Some(next) => next.start - offset,
        None => length,
    };
    ranges.truncate(RANGES_PER_CALL);
    let text = |n: u64| n.to_string();
    Outcome::code(super::DONE)
        .with("ProcessedByteLength", text(processed))
        .with("ChangedByteOffsets", ranges.iter().map(|r| text(r.start)).collect::<Vec<_>>())
        .with("ChangedByteLengths", ranges.iter().map(|r| text(r.len)).collect::<Vec<_>>())
}

async fn settings(cluster: &Arc<Cluster>, call: &Call) -> Result<Outcome, Refusal> {
    let path = host_path(call.args.str("Path"));
    if !path.exists() {
        return Ok(Outcome::code(FILE_NOT_FOUND));
    }
    // A live leaf is looked at between two writes.
    let io = cluster.read(|s| {
        s.vm_of_file(&path)
            .filter(|vm| vm.writes(&path) || vm.merging(&path))
            .map(|vm| vm.io.clone())
    });
    let read = cluster
        .blocking(move || {
            let _still = io.as_deref().map(locked);
            describe(&path)
        })
        .await;
    match read.map_err(|e| invalid(&call.method, &e.to_string()))? {
        Ok(object) => {
            Ok(Outcome::code(super::DONE).with("SettingData", embedded::to_text(&object)))
        }
        Err(e) => {
            tracing::debug!(error = %e, "no facts of a disk");
            Ok(Outcome::code(super::FAILED))
        }
    }
}

fn describe(path: &Path) -> Result<Object, outrider_disk::DiskError> {
    let chain = DiskChain::open(path)?;
    let info = chain.info();
    let kind = match info.kind {
        DiskKind::Fixed => 2_u16,
        DiskKind::Dynamic => 3,
        DiskKind::Differencing => 4,
    };
    let parent = chain.files().get(1).map(|p| p.display().to_string()).unwrap_or_default();
    Ok(Object::new("Msvm_VirtualHardDiskSettingData", "")
        .with("Path", path.display().to_string())
        .with("ParentPath", parent)
        .with("Type", kind)
        .with("Format", 3_u16)
        .with("MaxInternalSize", info.size)
        .with("BlockSize", info.block_size)
        .with("LogicalSectorSize", info.logical_sector)
        .with("PhysicalSectorSize", info.physical_sector)
        .with("VirtualDiskId", guid(info.disk_id)))
}
