//! The node agent: it knows the VMs of its host, reads them when it is given a lease, and leaves the host clean.
//!
//! | module | idea |
//! | --- | --- |
//! | [`agent`] | the stream to the leader: inventory up, leases down, one task per job |
//! | [`lease`] | may this job still touch the hypervisor? by our own monotonic clock |
//! | [`job`] | a backup as explicit phases, each of which survives being killed; cleanup; hand-over of the base |
//! | [`journal`] | what of a checkpoint is stored already, so that whoever continues reads only what is missing |
//! | [`pipeline`] | read, zero-detect, hash, ask, seal, send: a disk into a tree of chunks |
//! | [`restore`] | a tree of chunks into a disk, and disks into a VM |
//! | [`hypervisor`] | what is asked of a hypervisor; `hyperv` answers over WMI |
//! | [`consistency`], [`precheck`] | pure: how a checkpoint is taken, and what speaks against it |
//! | [`commands`] | programs around a job that the host's owner permits |
//! | [`doctor`] | a host compared with what backups need of it |
//! | [`store`], [`coordinator_client`] | the two seams to the rest of the fabric |

pub mod agent;
pub mod commands;
pub mod config;
pub mod consistency;
pub mod coordinator_client;
pub mod doctor;
pub mod error;
#[cfg(any(test, feature = "fakes"))]
pub mod fakes;
pub mod hypervisor;
pub mod job;
pub mod journal;
pub mod lease;
pub mod metrics;
pub mod pipeline;
pub mod precheck;
pub mod restore;
pub mod source;
pub mod status;
pub mod store;

pub use agent::run;
pub use config::Config;
pub use error::NodeError;
