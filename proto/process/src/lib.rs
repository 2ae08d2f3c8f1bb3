//! What every long-running process shares, and nothing else.
//!
//! | module | promise |
//! | --- | --- |
//! | [`tasks`], [`signals`] | every task has a name, an owner that joins it and a way to stop |
//! | [`identity`] | mutual TLS 1.3 inside one fabric; a certificate names a role and a host |
//! | [`join`], [`renewal`] | a machine becomes a member by a token, and its certificate stays fresh |
//! | [`leader`] | calls reach the coordinator that leads, wherever it is now |
//! | [`secret`] | keys that cannot be printed, and the key-encryption key that wraps them |
//! | [`telemetry`] | logs and OTLP traces; one trace crosses processes |
//! | [`metrics`], [`observability`] | Prometheus exposition, health and readiness |
//! | [`config`] | TOML that refuses what it does not know, and says where |
//! | [`fs`] | files that are either the old or the new ones after a crash; directory locks |
//! | [`network`] | connections leave from the networks that the operator wants, and from no other |
//! | [`ports`] | listening sockets whose refusal is a sentence; the ready file |
//! | [`clock`], [`backoff`] | time and retry as arguments, so that tests own them |
//!
//! The list is closed: what only some processes need lives with them. This crate knows nothing of
//! chunks, jobs or Raft.

pub mod backoff;
pub mod clock;
pub mod config;
pub mod fs;
pub mod identity;
pub mod join;
pub mod leader;
pub mod metrics;
pub mod network;
pub mod observability;
pub mod ports;
pub mod renewal;
pub mod secret;
pub mod signals;
pub mod tasks;
pub mod telemetry;
