//! Making checksums right again after bytes were changed, so that what lies behind them is reached.

use super::SparseFile;
use crate::DiskFormat;
use crate::vhd::checksum as vhd_checksum;
use crate::vhdx::checksum as vhdx_checksum;

/// Longest structure whose checksum is made right.
const MAX_LEN: usize = 1 << 20;

/// Writes right checksums into every header, region table and log entry of a VHDX, every footer and
/// dynamic header of a VHD.
pub fn reseal(file: &mut SparseFile, format: DiskFormat) {
    match format {
        DiskFormat::Vhd => reseal_vhd(file),
        DiskFormat::Vhdx | DiskFormat::Raw => reseal_vhdx(file),
    }
}

fn reseal_vhdx(file: &mut SparseFile) {
    for (at, len) in [(64 << 10, 4096), (128 << 10, 4096), (192 << 10, 65536), (256 << 10, 65536)] {
        seal(file, at, len, 4, |bytes| vhdx_checksum(bytes).to_le_bytes());
    }
    let mut entries = file.offsets();
    entries.retain(|at| at % 4096 == 0);
    entries.sort_unstable();
    entries.dedup();
    for at in entries {
        let head = file.get(at, 12);
        if let Some((b"loge", [_, _, _, _, len @ ..])) = head.split_first_chunk::<4>() {
            let len = len.iter().rev().fold(0_usize, |n, byte| (n << 8) | usize::from(*byte));
            seal(file, at, len, 4, |bytes| vhdx_checksum(bytes).to_le_bytes());
        }
    }
}

fn reseal_vhd(file: &mut SparseFile) {
    let footer = |bytes: &[u8]| vhd_checksum(bytes, 64).to_be_bytes();
    for at in [0, file.len().saturating_sub(512)] {
        seal(file, at, 512, 64, footer);
        let offset = file.get(at + 16, 8);
        let header = offset.iter().fold(0_u64, |n, byte| (n << 8) | u64::from(*byte));
        seal(file, header, 1024, 36, |bytes| vhd_checksum(bytes, 36).to_be_bytes());
    }
}

fn seal(file: &mut SparseFile, at: u64, len: usize, field: u64, sum: impl Fn(&[u8]) -> [u8; 4]) {
    let bytes = file.get(at, len.min(MAX_LEN));
    if bytes.len() == len && len as u64 >= field + 4 {
        file.put(at.saturating_add(field), &sum(&bytes));
    }
}
