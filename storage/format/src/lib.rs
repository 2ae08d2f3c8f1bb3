//! Bytes of segments: what a storage node keeps on disk, and what the offline tools read.
//!
//! No tokio and no sled: everything here is bytes, rules, and reads over [`ReadAt`]. `docs/formats/segments.md` describes
//! every byte; `tests/golden/` pins them.
//!
//! | module | what |
//! | --- | --- |
//! | [`segment`] | header of a segment file, its kinds and names |
//! | [`entry`] | one record in a segment: prefix, name, sealed record, padding |
//! | [`footer`] | sorted directory of a sealed segment |
//! | [`watermark`] | how far unsealed segments are known to be durable |
//! | [`scan`] | reading a segment that a crash or a bad disk has been at |
//! | [`inspect`] | what a person wants to know of one segment file |

pub mod entry;
pub mod error;
pub mod footer;
pub mod inspect;
pub mod read_at;
pub mod scan;
pub mod segment;
pub mod watermark;

pub use error::FormatError;
pub use read_at::ReadAt;
