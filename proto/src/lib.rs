//! Contracts: ids, sealed chunks, pages, manifests, frames, tickets and gRPC services; no I/O.
