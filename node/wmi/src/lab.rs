//! The `lab` transport: WMI requests over a socket to the simulated cluster.

mod files;
mod link;
pub mod wire;

use std::time::Duration;

use async_trait::async_trait;

pub use files::LabFiles;
pub use link::LabLink;

use crate::{EventStream, Object, Value, Wmi, WmiError};
use wire::{Answer, Ask, Role};

/// How long one WMI call may take before its outcome counts as unknown.
const CALL_TIMEOUT: Duration = Duration::from_secs(120);

/// The WMI providers of one simulated host.
pub struct LabWmi {
    link: LabLink,
}

impl LabWmi {
    /// Connects to the lab at `addr` and speaks as the agent of `host`. A connection that breaks later is made anew by
    /// the next call; subscriptions end and have to be made again.
    ///
    /// # Errors
    /// [`WmiError::Unreachable`] when the lab does not listen there, or has no such host, or the host is down.
    pub async fn connect(addr: impl std::fmt::Display, host: &str) -> Result<Self, WmiError> {
        Self::connect_with(addr, host, CALL_TIMEOUT).await
    }

    /// As [`LabWmi::connect`], with another bound on each call.
    ///
    /// # Errors
    /// As [`LabWmi::connect`].
    pub async fn connect_with(
        addr: impl std::fmt::Display,
        host: &str,
        call_timeout: Duration,
    ) -> Result<Self, WmiError> {
        let role = Role::Host(host.to_owned());
        Ok(Self { link: LabLink::connect(addr, role, Some(call_timeout)).await? })
    }

    fn odd(what: &str) -> WmiError {
        WmiError::Invalid {
            what: what.to_owned(),
            reason: "the lab gave an answer of another kind".into(),
        }
    }
}

#[async_trait]
impl Wmi for LabWmi {
    async fn query(&self, namespace: &str, wql: &str) -> Result<Vec<Object>, WmiError> {
        let ask = Ask::Query { namespace: namespace.to_owned(), wql: wql.to_owned() };
        match self.link.call(ask).await? {
            Answer::Objects(objects) => Ok(objects),
            _ => Err(Self::odd(wql)),
        }
    }

    async fn get(&self, namespace: &str, path: &str) -> Result<Object, WmiError> {
        let ask = Ask::Get { namespace: namespace.to_owned(), path: path.to_owned() };
        match self.link.call(ask).await? {
            Answer::Object(object) => Ok(object),
            _ => Err(Self::odd(path)),
        }
    }

    async fn associators(
        &self,
        namespace: &str,
        path: &str,
        assoc_class: &str,
        result_class: &str,
    ) -> Result<Vec<Object>, WmiError> {
        let ask = Ask::Associators {
            namespace: namespace.to_owned(),
            path: path.to_owned(),
            assoc_class: assoc_class.to_owned(),
            result_class: result_class.to_owned(),
        };
        match self.link.call(ask).await? {
            Answer::Objects(objects) => Ok(objects),
            _ => Err(Self::odd(path)),
        }
    }

    async fn exec_method(
        &self,
        namespace: &str,
        path: &str,
        method: &str,
        args: Vec<(String, Value)>,
    ) -> Result<Object, WmiError> {
        let ask = Ask::Exec {
            namespace: namespace.to_owned(),
            path: path.to_owned(),
            method: method.to_owned(),
            args,
        };
        match self.link.call(ask).await? {
            Answer::Object(object) => Ok(object),
            _ => Err(Self::odd(method)),
        }
    }

    async fn put(
        &self,
        namespace: &str,
        path: &str,
        properties: Vec<(String, Value)>,
    ) -> Result<(), WmiError> {
        let (namespace, path) = (namespace.to_owned(), path.to_owned());
        match self.link.call(Ask::Put { namespace, path: path.clone(), properties }).await? {
            Answer::Done => Ok(()),
            _ => Err(Self::odd(&path)),
        }
    }

    async fn subscribe(&self, namespace: &str, wql: &str) -> Result<EventStream, WmiError> {
        self.link.subscribe(namespace, wql).await
    }
}
