//! Virtual disks: VHDX and VHD with their checkpoint chains, and raw images, read and written by our own
//! code. Nothing of Windows is needed.
//!
//! * [`ReadDisk`] is what a backup reads: positional, immutable, any number of threads.
//!   [`open_disk`] finds the right reader for a path; [`DiskChain`] reads a disk with its parents.
//! * [`DiskWriter`] creates and writes disks (restores, the lab's guests);
//!   [`VhdxWriter`](vhdx::VhdxWriter) and [`VhdWriter`](vhd::VhdWriter) are what is behind it.
//! * [`RangeSet`] is the arithmetic of "which bytes" (allocation maps, change lists).
//! * [`merge`], [`compare`] and [`export`] work on whole disks.
//! * [`Layer`] is one file of a chain: where each byte is ([`ReadLayer::runs`]), and whether the file's
//!   tables are sound ([`ReadLayer::check`]).
//!
//! A source is never written to: a dirty log is replayed in memory. Every malformed file is a typed
//! [`DiskError`]; no input makes this crate panic, and no length read from a file is allocated before
//! it was checked against the file. What a reader keeps in memory is bounded, whatever the disk's size:
//! tables up to 16 MiB a file, maps up to some hundred thousand ranges.
//!
//! # Examples
//!
//! What a checkpoint chain shows a guest, as a raw file:
//! ```
//! use outrider_disk::{DiskFormat, DiskKind, DiskWriter, NewDisk, export, open_disk};
//! # fn main() -> Result<(), outrider_disk::DiskError> {
//! # let dir = tempfile::tempdir().unwrap();
//! # let [base, child, raw] = ["disk.vhdx", "child.avhdx", "disk.raw"].map(|n| dir.path().join(n));
//! let new = NewDisk::of(DiskFormat::Vhdx, DiskKind::Dynamic, 64 << 20);
//! DiskWriter::create(&base, &new)?.close()?;
//! let mut disk = DiskWriter::create_child(&child, &base, None)?;
//! disk.write_at(8 << 20, &[7; 4096])?;
//! disk.close()?;
//!
//! let written = export::to_raw(&open_disk(&child)?, &raw)?;
//! assert_eq!(written, 4096); // the rest are holes
//! # Ok(())
//! # }
//! ```

mod bits;
pub mod block_file;
pub mod chain;
pub mod compare;
mod detect;
pub mod disk;
pub mod error;
pub mod export;
mod fields;
pub mod guest;
pub mod inspect;
pub mod layer;
pub mod masked;
pub mod merge;
mod parent_paths;
mod places;
pub mod ranges;
pub mod raw;
pub mod vhd;
pub mod vhdx;
mod writer;

pub use chain::{DiskChain, Origin};
pub use detect::open_disk;
pub use disk::{DiskFormat, DiskInfo, DiskKind, ReadDisk};
pub use error::DiskError;
pub use layer::{Layer, LayerMap, Presence, ReadLayer, Run};
pub use masked::MaskedDisk;
pub use ranges::{ByteRange, RangeSet};
pub use raw::RawDisk;
pub use writer::{DiskWriter, NewDisk};
