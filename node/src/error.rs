//! Why the node agent cannot run at all. What ends a single job is [`crate::job::JobError`].

use std::net::SocketAddr;

use outrider_process::identity::IdentityError;
use outrider_process::ports::BindError;
use outrider_wmi::WmiError;

/// A failure of the process.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The identity cannot be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The identity is somebody else's.
    #[error(
        "the certificate in {dir} was issued to {found}, but this agent is configured as agent/{expected}; set `name` to \
         the certificate's name, or issue a certificate for this host"
    )]
    WrongIdentity {
        /// Folder.
        dir: String,
        /// Role and name in the certificate.
        found: String,
        /// Configured name.
        expected: String,
    },
    /// A configuration value is unusable.
    #[error("{key} = {value:?} in the configuration is wrong: {reason}")]
    Config {
        /// Key.
        key: &'static str,
        /// Value.
        value: String,
        /// What would be right.
        reason: String,
    },
    /// The metrics port cannot be opened.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The hypervisor cannot be reached.
    #[error("the hypervisor of this host cannot be used: {0}")]
    Hypervisor(#[source] WmiError),
    /// No transport to Hyper-V in this build.
    #[error(
        "hypervisor = \"hyperv\" needs Windows with the Hyper-V role; on another system use hypervisor = \"lab\""
    )]
    NoHyperV,
    /// No QEMU in this build, or not as configured.
    #[error("the QEMU of this host cannot be used: {0}")]
    Qemu(String),
    /// What backups left cannot be listed.
    #[error("what backups left on this host cannot be listed: {0}")]
    Traces(String),
    /// The client of the storage tier cannot be started.
    #[error("the client of the storage tier cannot be started: {0}")]
    Storage(String),
}

/// Where a started agent can be reached.
#[derive(Debug, Clone, Default)]
pub struct Bound {
    /// Metrics and health.
    pub observability: Option<SocketAddr>,
}
