//! The `Wmi` transport: what the Hyper-V backend needs of Windows Management Instrumentation, and nothing more.
//!
//! One trait, [`Wmi`], stands between the whole Hyper-V logic of the node agent and the machine. Behind it is either
//! `com` (Windows, COM; issue "Virtual disks and Hyper-V") or [`lab`] (a socket to the simulated failover cluster). The
//! backend cannot tell which one it talks to: names of classes, methods and properties, return codes and job objects are
//! those of the real thing.
//!
//! This crate knows nothing of backups, jobs of ours, leases or storage.

pub mod com;
mod datetime;
pub mod embedded;
pub mod files;
pub mod lab;
mod object;
pub mod virtdisk;

pub use object::{Object, Value};

use std::time::Duration;

use async_trait::async_trait;

/// The namespace of the Hyper-V provider (Windows Server 2012 and later).
pub const NS_VIRTUALIZATION: &str = r"root\virtualization\v2";
/// The namespace of the failover cluster provider.
pub const NS_CLUSTER: &str = r"root\MSCluster";
/// The namespace of Windows itself: release, services.
pub const NS_CIM: &str = r"root\cimv2";
/// The namespace of guardians and key protectors (vTPM, shielded VMs; Windows Server 2016 and later).
pub const NS_HGS: &str = r"root\Microsoft\Windows\Hgs";

/// Something that answers WMI requests for one host.
///
/// Every call is a single request and answer; nothing here retries. Calls may be made from several tasks at once.
///
/// # Cancel safety
/// Dropping the future of [`Wmi::exec_method`] does not undo the method: the outcome is unknown and has to be asked for.
#[async_trait]
pub trait Wmi: Send + Sync + 'static {
    /// Runs a WQL `SELECT` and returns the matching instances.
    async fn query(&self, namespace: &str, wql: &str) -> Result<Vec<Object>, WmiError>;

    /// Reads one instance by its object path (`Class.Key="value",...`).
    ///
    /// # Errors
    /// [`WmiError::NotFound`] when no such instance exists (any more).
    async fn get(&self, namespace: &str, path: &str) -> Result<Object, WmiError>;

    /// `ASSOCIATORS OF {path} WHERE AssocClass = .. ResultClass = ..`; an empty class name means "any".
    async fn associators(
        &self,
        namespace: &str,
        path: &str,
        assoc_class: &str,
        result_class: &str,
    ) -> Result<Vec<Object>, WmiError>;

    /// Calls `method` on the instance at `path` with named arguments and returns its out parameters,
    /// `ReturnValue` among them. A return value other than zero is not an error here: the caller knows what
    /// 4096 means for its method (facts, rule 5).
    async fn exec_method(
        &self,
        namespace: &str,
        path: &str,
        method: &str,
        args: Vec<(String, Value)>,
    ) -> Result<Object, WmiError>;

    /// Writes properties of the instance at `path` (`PutInstance`), as settings of cluster groups are changed. A transport
    /// that cannot do it says so; callers go on without.
    async fn put(
        &self,
        _namespace: &str,
        path: &str,
        _properties: Vec<(String, Value)>,
    ) -> Result<(), WmiError> {
        Err(WmiError::Invalid {
            what: path.to_owned(),
            reason: "this transport cannot change instances".into(),
        })
    }

    /// Subscribes to an event query (`SELECT * FROM __InstanceOperationEvent ...`). Events that happen before
    /// the reader asks wait in a bounded queue; when it overflows the stream yields [`WmiError::EventsLost`]
    /// once and the subscriber has to take a full inventory.
    async fn subscribe(&self, namespace: &str, wql: &str) -> Result<EventStream, WmiError>;
}

/// Events of a subscription: each an instance of the event's class, with `TargetInstance` embedded.
pub struct EventStream {
    receiver: tokio::sync::mpsc::Receiver<Result<Object, WmiError>>,
}

impl EventStream {
    /// Wraps the receiving end of a transport's event queue.
    #[must_use]
    pub fn new(receiver: tokio::sync::mpsc::Receiver<Result<Object, WmiError>>) -> Self {
        Self { receiver }
    }

    /// The next event, or `None` when the transport is gone (reconnect and take a full inventory).
    ///
    /// # Cancel safety
    /// Cancel safe: an event is either returned or stays in the queue.
    pub async fn next(&mut self) -> Option<Result<Object, WmiError>> {
        self.receiver.recv().await
    }
}

/// Why a WMI request got no answer, or a refusal of the provider itself (not a method's return code).
#[derive(Debug, Clone, thiserror::Error)]
pub enum WmiError {
    /// `WBEM_E_NOT_FOUND`: the instance does not exist (any more).
    #[error("no WMI object {path:?} in namespace {namespace:?}")]
    NotFound {
        /// Namespace asked.
        namespace: String,
        /// Object path or class asked for.
        path: String,
    },
    /// `WBEM_E_INVALID_NAMESPACE`: this host has no such provider.
    #[error(
        "namespace {namespace:?} does not exist on this host: install the Hyper-V role (or the failover clustering \
         feature), or run the agent on a host that has it"
    )]
    NoNamespace {
        /// Namespace asked.
        namespace: String,
    },
    /// The provider could not understand the query or the arguments.
    #[error("the WMI provider refused {what:?}: {reason}")]
    Invalid {
        /// Query or method.
        what: String,
        /// What it said.
        reason: String,
    },
    /// The connection to the provider broke, or it did not answer in time. The outcome of a method call is unknown.
    #[error("no answer from the WMI provider at {endpoint} within {waited:?}: {reason}")]
    Unreachable {
        /// Where the provider was sought.
        endpoint: String,
        /// How long the caller waited.
        waited: Duration,
        /// The transport's own words.
        reason: String,
    },
    /// Access denied by the provider.
    #[error(
        "access to {what:?} denied: run the agent as LocalSystem or as a Hyper-V administrator"
    )]
    AccessDenied {
        /// What was asked for.
        what: String,
    },
    /// Events were dropped because the subscriber was too slow.
    #[error("events were lost because the reader was too slow; a full inventory is needed")]
    EventsLost,
}

impl WmiError {
    /// Whether the same request may succeed later without anybody changing anything (facts 1.11).
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unreachable { .. })
    }
}
