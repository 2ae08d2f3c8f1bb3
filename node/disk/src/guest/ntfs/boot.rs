//! The boot sector.

use super::super::GuestError;
use super::super::bytes::{u8_at, u16_at, u64_at};
use super::super::window::Window;

/// What the boot sector says.
#[derive(Debug, Clone)]
pub(super) struct Boot {
    /// Bytes of a cluster.
    pub(super) cluster: u32,
    /// Bytes of an MFT record.
    pub(super) record: u32,
    /// Bytes of the volume, without the copy of the boot sector.
    pub(super) size: u64,
    /// Clusters of the volume.
    pub(super) clusters: u64,
    /// First cluster of the MFT.
    pub(super) mft: u64,
    pub(super) serial: u64,
}

impl Boot {
    pub(super) fn read(window: &Window) -> Result<Self, GuestError> {
        let bad =
            |detail: String| GuestError::damaged("the boot sector of the NTFS volume", detail);
        let bytes = window.bytes(0, 512)?;
        let sector = u32::from(u16_at(&bytes, 11));
        if !matches!(sector, 512 | 1024 | 2048 | 4096) {
            return Err(bad(format!("it claims sectors of {sector} bytes")));
        }
        // Above 0x80 the count is a negated exponent, for clusters beyond 64 KiB.
        let per_cluster = match u8_at(&bytes, 13) {
            n @ 1..=0x80 if n.is_power_of_two() => u32::from(n),
            n @ 0xf4.. => 1 << (256 - u32::from(n)),
            n => return Err(bad(format!("it claims {n} sectors a cluster"))),
        };
        let cluster = sector * per_cluster;
        if cluster > 2 << 20 {
            return Err(bad(format!("it claims clusters of {cluster} bytes")));
        }
        let record = size(bytes.get(64).copied().unwrap_or(0), cluster)
            .filter(|r| (512..=65536).contains(r) && r % 512 == 0)
            .ok_or_else(|| bad("it claims an impossible size of MFT records".into()))?;
        let size = u64_at(&bytes, 40)
            .checked_mul(sector.into())
            .filter(|size| *size <= window.len())
            .ok_or_else(|| {
                bad(format!(
                    "it claims {} sectors, more than its partition has",
                    u64_at(&bytes, 40)
                ))
            })?;
        let (clusters, mft) = (size / u64::from(cluster), u64_at(&bytes, 48));
        if mft == 0 || mft >= clusters {
            return Err(bad(format!("it claims the MFT at cluster {mft} of {clusters}")));
        }
        Ok(Self { cluster, record, size, clusters, mft, serial: u64_at(&bytes, 72) })
    }
}

/// A positive number counts clusters, a negative one is a negated exponent.
fn size(code: u8, cluster: u32) -> Option<u32> {
    match code as i8 {
        n @ 1.. => cluster.checked_mul(n.unsigned_abs().into()),
        n => 1_u32.checked_shl(n.unsigned_abs().into()),
    }
}
