//! Layout-aware client of the storage tier.
//!
//! A [`StoreClient`] opens a [`JobStore`] for each job: it sends each record once, to one replica of its placement group,
//! asks what is there already, closes windows with barriers, keeps the receipts as claims for the commit, and reads from
//! whichever replica answers with the right bytes. Nodes die and restart underneath: what was sent to them since the last
//! barrier is asked for again, and only what is missing is handed back to be sent again.
//!
//! Everything goes through [`transport::ChunkTransport`], one method per kind of request: [`quic`] speaks QUIC,
//! [`memory`] is a storage tier inside the process for tests and simulation.

pub mod client;
pub mod error;
pub mod frame_io;
pub mod job;
pub mod limits;
pub mod memory;
pub mod put_queue;
pub mod quic;
pub mod transport;

pub use client::{JobAccess, StoreClient};
pub use error::{BarrierError, StoreError, TransportError};
pub use job::{JobStore, Stats};
pub use limits::Limits;
pub use transport::{ClientRole, NamedRecord};
