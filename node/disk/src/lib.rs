//! Virtual disks: VHDX, AVHDX chains and raw images, read and written by our own code.
//!
//! * [`ReadDisk`] is what a backup reads: positional, immutable, any number of threads.
//!   [`open_disk`] finds the right reader for a path; [`DiskChain`] reads a VHDX with its parents.
//! * [`VhdxWriter`](vhdx::VhdxWriter) creates and writes VHDX files (restores, the lab's guests).
//! * [`RangeSet`] is the arithmetic of "which bytes" (allocation maps, change lists).
//! * [`merge`], [`compare`] and [`export`] work on whole disks.
//!
//! A source is never written to: a dirty log is replayed in memory. Every malformed file is a typed
//! [`DiskError`]; no input makes this crate panic, and no length read from a file is allocated before
//! it was checked against the file.

pub mod block_file;
pub mod chain;
pub mod compare;
mod detect;
pub mod disk;
pub mod error;
pub mod export;
pub mod merge;
pub mod ranges;
pub mod raw;
pub mod vhdx;

pub use chain::DiskChain;
pub use detect::open_disk;
pub use disk::{DiskFormat, DiskInfo, DiskKind, ReadDisk};
pub use error::DiskError;
pub use ranges::{ByteRange, RangeSet};
pub use raw::RawDisk;
