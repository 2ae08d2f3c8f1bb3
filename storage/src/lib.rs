//! The storage node: segments, index, QUIC server, forwarding, receipts.
//!
//! | module | what |
//! | --- | --- |
//! | [`node`], [`config`] | a node put together; [`run`] |
//! | [`server`] | sessions and requests over QUIC |
//! | [`windows`] | what receipts may say |
//! | [`peers`], [`catch_up`] | other replicas: forwarding to them, fetching from them |
//! | [`registry`] | the stream to the leading coordinator |
//! | [`store`] | takes records in, syncs them in groups, finds them again |
//! | [`segment`], [`index`], [`named`] | the files below it, and the tables that cache where things are |

pub mod catch_up;
pub mod config;
pub mod error;
pub mod index;
pub mod metrics;
pub mod named;
pub mod node;
pub mod peers;
pub mod registry;
pub mod segment;
pub mod server;
pub mod store;
pub mod windows;

pub use config::Config;
pub use error::{OpenError, StoreError};
pub use node::{StorageError, StorageServer, run};
pub use store::{Append, IndexKind, Store, StoreConfig, StoreStatus};
