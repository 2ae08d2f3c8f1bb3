//! What changed on a disk since a reference point.

use std::path::Path;

use outrider_disk::RangeSet;
use outrider_wmi::Value;

use super::HyperV;
use super::call::Call;
use crate::hypervisor::error::HypervisorError;
use crate::hypervisor::error::codes::{self, Next};

impl HyperV {
    pub(super) async fn disk_changes(
        &self,
        disk: &Path,
        size: u64,
        tracking_id: &str,
    ) -> Result<RangeSet, HypervisorError> {
        let lost = |reason: String| HypervisorError::TrackingLost { disk: disk.to_owned(), reason };
        let mut changed = Vec::new();
        let mut offset = 0;
        while offset < size {
            let call = Call {
                doing: format!("tell what changed on {}", disk.display()),
                service: "Msvm_ImageManagementService",
                path: String::new(),
                method: "GetVirtualDiskChanges",
                args: vec![
                    ("Path", disk.display().to_string().into()),
                    ("LimitId", tracking_id.into()),
                    ("TargetSnapshotId", "".into()),
                    ("ByteOffset", offset.into()),
                    ("ByteLength", (size - offset).into()),
                ],
            };
            let out = match self.ask(&call).await {
                Ok(finished) => finished.out,
                Err(HypervisorError::Refused { code, reason, .. })
                    if codes::of(code, &reason).is_some_and(|k| k.next == Next::ReadAll) =>
                {
                    return Err(lost(reason));
                }
                Err(e) => return Err(e),
            };
            let numbers = |name: &str| -> Option<Vec<u64>> {
                out.array(name).iter().map(Value::as_u64).collect()
            };
            let (starts, lengths) = numbers("ChangedByteOffsets")
                .zip(numbers("ChangedByteLengths"))
                .filter(|(s, l)| s.len() == l.len())
                .ok_or_else(|| lost("the answer's offsets and lengths do not pair".into()))?;
            for (start, length) in starts.into_iter().zip(lengths) {
                changed.push(outrider_disk::ByteRange::new(start, length));
            }
            let processed = out.u64("ProcessedByteLength").unwrap_or(0);
            if processed == 0 {
                return Err(lost(format!("no progress at offset {offset}")));
            }
            offset = offset.saturating_add(processed);
        }
        let mut changed: RangeSet = changed.into_iter().collect();
        changed.clamp(size);
        Ok(changed)
    }
}
