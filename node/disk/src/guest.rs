//! Guest file systems, read-only: what a disk's guest keeps on it, as far as it can be told with certainty.
//!
//! ```text
//! ReadDisk -> GuestDisk (partition table, volumes) -> FileSystem (list, stat, read, extents)
//! ```
//!
//! | module | idea |
//! | --- | --- |
//! | [`partition`] | MBR with logical partitions, GPT with both copies, disks without a table |
//! | [`recognise`] | which file system (or other content) a volume holds, told by its signatures |
//! | [`ntfs`], [`fat`], [`ext`] | the file systems that are read |
//! | [`swap`] | the header of a Linux swap area |
//! | [`page_files`] | the bytes of page and swap files, or why they are not certain |
//!
//! A disk's content is the guest's, so everything here takes it for hostile: every offset and count is checked before it
//! is used, metadata reads are metered ([`Limits`]), no walk is longer than what the structure allows, and nothing
//! panics. What cannot be read is named with its reason; nothing is guessed. Journals and logs are not replayed: a file
//! system that needs it says so ([`FileSystem::doubt`]).

mod bytes;
pub mod disk;
pub mod error;
pub mod ext;
pub mod fat;
pub mod file_system;
pub mod name;
pub mod ntfs;
pub mod page_files;
pub mod partition;
pub mod path;
pub mod recognise;
pub mod swap;
mod window;

pub use disk::{GuestDisk, Volume};
pub use error::GuestError;
pub use file_system::{
    Entry, Extent, FileId, FileKind, FileSystem, FileSystemFacts, GuestTime, Stat, Stream,
};
pub use name::Name;
pub use recognise::{Content, FileSystemKind};
pub use window::Limits;
