//! Contracts of the fabric: ids, the sealed chunk, pages, manifests, QUIC frames, receipts, tickets, the layout and the
//! gRPC services.
//!
//! Bytes and rules only. This crate opens no file and no socket, starts no task and reads no clock. `docs/formats.md`
//! and `docs/protocol.md` describe what is encoded here byte by byte; `tests/golden/` pins it.

pub mod error_code;
pub mod frame;
pub mod ids;
pub mod journal;
pub mod layout;
pub mod manifest;
pub mod model;
pub mod page;
pub mod receipt;
pub mod record;
pub mod root;
pub mod rpc;
pub mod seal;
pub mod status;
pub mod ticket;
pub mod wire;

#[cfg(test)]
mod golden;
