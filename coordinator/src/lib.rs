//! The coordinator: Raft, the replicated state, follow, leases, commit, API.
//!
//! | module | promise |
//! | --- | --- |
//! | `state` | what all members agree on; pure, refuses instead of panicking |
//! | `follow` | from what agents see to where each VM runs; pure |
//! | `schedule` | what to start now; pure |
//! | `receipts`, `commit` | a recovery point is committed only when all of it is durable |
//! | `lease` | until when a holder may act, by the leader's clock |
//! | `leader` | what only the leader knows and does |
//! | `raft` | the log on sled, the network, proofs of leadership |
//! | `keys` | keys replicated wrapped, open in memory only |
//! | `enrolment` | machines that join and renew are signed by an authority that can make nothing else |
//! | `doors` | one port: members behind mutual TLS, joining machines apart |
//! | `layout` | the first layout |
//! | `traces` | what backups left on hosts: whose it is, and what lasts too long; pure |
//! | `api` | the services, and who may call them |
//!
//! This crate knows no hypervisor, no disk and no chunk: it never talks to storage nodes but to tell them the layout.

mod api;
mod commit;
pub mod config;
mod doors;
mod enrolment;
mod follow;
mod keys;
mod layout;
mod leader;
mod lease;
mod metrics;
mod raft;
mod receipts;
mod run;
mod schedule;
mod state;
mod traces;

pub use config::Config;
pub use keys::KeysError;
pub use raft::{StartError, StoreError};
pub use run::{CoordinatorError, run};
