//! `virtdisk.dll`: what WMI and our own reader do not suffice for (facts 3).
//!
//! Disks are opened by version 2 of the call, read-only: the form that works on a disk of a running VM. A disk whose file
//! the system does not let us open is attached without becoming a disk of this host, and read through that handle.

pub mod changes;
pub mod tracking;

#[cfg(windows)]
mod attached;
#[cfg(windows)]
mod disk;
#[cfg(windows)]
pub use disk::VirtualDisk;
