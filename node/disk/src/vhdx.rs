//! VHDX and AVHDX (MS-VHDX): reading single files and writing them.
//!
//! The parsers ([`Header`], [`RegionTable`], [`Metadata`], [`ParentLocator`], the log) take plain
//! bytes and know no files. [`VhdxLayer`] is one file read-only, [`VhdxWriter`] one opened for writing.
//! A chain of layers is [`DiskChain`](crate::DiskChain).

mod bat;
mod checksum;
mod commit;
mod create;
mod header;
mod image;
mod layer;
mod locator;
mod log;
mod metadata;
mod overlay;
mod region;
mod reparent;
mod writer;

pub use commit::CrashPoint;
pub use create::CreateOptions;
pub use header::Header;
pub use layer::VhdxLayer;
pub use locator::ParentLocator;
pub use metadata::Metadata;
pub use region::{Region, RegionTable};
pub use reparent::set_parent;
pub use writer::VhdxWriter;

pub(crate) use checksum::checksum;
pub(crate) use log::replay_bytes;
pub(crate) use reparent::{announce_parent_change, check_linkage};

/// The fields of a VHDX's structures.
type Fields<'a> = crate::fields::Fields<'a, crate::fields::Little>;

/// The first eight bytes of every VHDX file.
pub(crate) const SIGNATURE: &[u8; 8] = b"vhdxfile";

/// Structures inside the file start at multiples of this.
pub(crate) const MIB: u64 = 1 << 20;

/// Unit of the log and of metadata updates.
pub(crate) const LOG_SECTOR: usize = 4096;

/// Largest virtual disk.
pub(crate) const MAX_SIZE: u64 = 64 << 40;

/// No file is larger on any system; offsets up to here can be added without overflow.
pub(crate) const MAX_FILE: u64 = i64::MAX as u64;
