//! The segment files of a store.

pub mod disk;
pub mod reader;
pub mod recovery;
pub mod writer;
