//! [`Wmi`] of this machine.

use std::time::Duration;

use async_trait::async_trait;

use super::apartment::{Again, Apartment};
use super::events;
use crate::{EventStream, Object, Value, Wmi, WmiError};

/// How long one WMI call may take before its outcome counts as unknown.
const CALL_TIMEOUT: Duration = Duration::from_secs(120);
/// Threads that read.
const READERS: usize = 2;
/// Threads that call methods: a slow one must not hold up those of other VMs.
const CALLERS: usize = 4;

/// WMI of this machine, through COM.
pub struct ComWmi {
    readers: Apartment,
    callers: Apartment,
    timeout: Duration,
}

impl ComWmi {
    /// Starts the threads. Whether a namespace exists is known at its first use.
    ///
    /// # Errors
    /// [`WmiError::Unreachable`] when the system gives no threads.
    pub fn start() -> Result<Self, WmiError> {
        Self::start_with(CALL_TIMEOUT)
    }

    /// As [`ComWmi::start`], with another bound on each call.
    ///
    /// # Errors
    /// As [`ComWmi::start`].
    pub fn start_with(call_timeout: Duration) -> Result<Self, WmiError> {
        let no_thread = |e: std::io::Error| WmiError::Unreachable {
            endpoint: "COM".into(),
            waited: Duration::ZERO,
            reason: format!("no thread: {e}"),
        };
        Ok(Self {
            readers: Apartment::start("read", READERS).map_err(no_thread)?,
            callers: Apartment::start("call", CALLERS).map_err(no_thread)?,
            timeout: call_timeout,
        })
    }
}

#[async_trait]
impl Wmi for ComWmi {
    async fn query(&self, namespace: &str, wql: &str) -> Result<Vec<Object>, WmiError> {
        let query = wql.to_owned();
        self.readers
            .run(namespace, wql, self.timeout, Again::Once, move |session, patience| {
                session.query(&query, patience)
            })
            .await
    }

    async fn get(&self, namespace: &str, path: &str) -> Result<Object, WmiError> {
        let wanted = path.to_owned();
        self.readers
            .run(namespace, path, self.timeout, Again::Once, move |session, _| session.get(&wanted))
            .await
    }

    async fn associators(
        &self,
        namespace: &str,
        path: &str,
        assoc_class: &str,
        result_class: &str,
    ) -> Result<Vec<Object>, WmiError> {
        self.query(namespace, &super::path::associators(path, assoc_class, result_class)).await
    }

    async fn exec_method(
        &self,
        namespace: &str,
        path: &str,
        method: &str,
        args: Vec<(String, Value)>,
    ) -> Result<Object, WmiError> {
        let what = format!("{method} of {path}");
        let (path, method) = (path.to_owned(), method.to_owned());
        self.callers
            .run(namespace, &what, self.timeout, Again::Never, move |session, patience| {
                session.exec_method(&path, &method, args.clone(), patience)
            })
            .await
    }

    async fn put(
        &self,
        namespace: &str,
        path: &str,
        properties: Vec<(String, Value)>,
    ) -> Result<(), WmiError> {
        let (what, path) = (format!("properties of {path}"), path.to_owned());
        // What was written although the answer was lost would only be written again; the caller decides.
        self.callers
            .run(namespace, &what, self.timeout, Again::Never, move |session, patience| {
                session.put(&path, &properties, patience)
            })
            .await
    }

    async fn subscribe(&self, namespace: &str, wql: &str) -> Result<EventStream, WmiError> {
        events::subscribe(namespace, wql).await
    }
}
