//! VHD and AVHD (the format of Virtual PC and of Hyper-V before VHDX): reading single files and
//! writing them.
//!
//! All numbers are big-endian. A VHD has no log, so [`VhdWriter`] keeps an order of writes in which
//! every crash leaves a disk that was flushed before. Source: Microsoft, "Virtual Hard Disk Image Format
//! Specification", version 1.0.

mod create;
mod footer;
mod geometry;
mod header;
mod image;
mod layer;
mod locator;
mod table;
mod writer;

pub use create::{CreateOptions, set_parent};
pub use footer::Footer;
pub use geometry::Chs;
pub use header::DynamicHeader;
pub use layer::VhdLayer;
pub use locator::ParentPaths;
pub use writer::VhdWriter;

pub(crate) use footer::{Placed, find as find_footer};

/// The fields of a VHD's structures.
type Fields<'a> = crate::fields::Fields<'a, crate::fields::Big>;

/// Unit of everything in a VHD.
pub(crate) const SECTOR: u64 = 512;

/// Largest virtual disk: 2040 GiB.
pub(crate) const MAX_SIZE: u64 = 2040 << 30;

/// Block size of disks as Hyper-V makes them.
pub(crate) const DEFAULT_BLOCK: u32 = 2 << 20;

/// The time that VHDs count from, 2000-01-01 00:00 UTC, as seconds since the Unix epoch.
const EPOCH: u64 = 946_684_800;

/// A time as VHDs write it.
pub(crate) fn timestamp(time: std::time::SystemTime) -> u32 {
    let seconds = time.duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
    u32::try_from(seconds.saturating_sub(EPOCH)).unwrap_or(u32::MAX)
}

/// Checksum of a structure whose checksum field (four bytes at `field`) counts as zero.
pub(crate) fn checksum(bytes: &[u8], field: usize) -> u32 {
    let skipped = field..field + 4;
    let sum = |(i, byte): (usize, &u8)| if skipped.contains(&i) { 0 } else { u32::from(*byte) };
    !bytes.iter().enumerate().map(sum).fold(0_u32, u32::wrapping_add)
}
