//! Listening sockets whose refusal says what to do, and the file that says where a process listens.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;

use crate::fs::{self, FsError};

/// Why a process cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody else listens there.
    #[error(
        "cannot listen on {address}: address already in use; stop the other process or set {setting}"
    )]
    InUse {
        /// The wanted address.
        address: SocketAddr,
        /// The configuration key to change.
        setting: String,
    },
    /// The address is not one of this machine's.
    #[error(
        "cannot listen on {address}: this machine has no such address; set {setting} to one it has, \
         or to 0.0.0.0"
    )]
    NoSuchAddress {
        /// The wanted address.
        address: SocketAddr,
        /// The configuration key to change.
        setting: String,
    },
    /// The port is reserved for privileged processes.
    #[error(
        "cannot listen on {address}: not permitted for this user; set {setting} to a port above 1023"
    )]
    NotPermitted {
        /// The wanted address.
        address: SocketAddr,
        /// The configuration key to change.
        setting: String,
    },
    /// Anything else.
    #[error("cannot listen on {address} ({setting})")]
    Other {
        /// The wanted address.
        address: SocketAddr,
        /// The configuration key to change.
        setting: String,
        /// The system's answer.
        source: io::Error,
    },
}

impl BindError {
    fn from_io(address: SocketAddr, setting: &str, source: io::Error) -> Self {
        let setting = setting.to_owned();
        match source.kind() {
            io::ErrorKind::AddrInUse => Self::InUse { address, setting },
            io::ErrorKind::AddrNotAvailable => Self::NoSuchAddress { address, setting },
            io::ErrorKind::PermissionDenied => Self::NotPermitted { address, setting },
            _ => Self::Other { address, setting, source },
        }
    }
}

/// Binds a TCP listener; `setting` names the configuration key, such as `[listen] api`.
///
/// # Errors
/// [`BindError`]; another try may succeed only once the operator acted.
pub async fn bind_tcp(address: SocketAddr, setting: &str) -> Result<TcpListener, BindError> {
    TcpListener::bind(address).await.map_err(|e| BindError::from_io(address, setting, e))
}

/// Binds a UDP socket for QUIC, non-blocking.
///
/// # Errors
/// As [`bind_tcp`].
pub fn bind_udp(address: SocketAddr, setting: &str) -> Result<UdpSocket, BindError> {
    let bound = UdpSocket::bind(address).and_then(|socket| {
        socket.set_nonblocking(true)?;
        Ok(socket)
    });
    bound.map_err(|e| BindError::from_io(address, setting, e))
}

/// What a process started with `--ready-file PATH` writes there once it serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// Role of the process, such as `storage`.
    pub role: String,
    /// Its name in the fabric.
    pub name: String,
    /// Its process id.
    pub pid: u32,
    /// Its bound addresses by purpose, such as `api`, `chunks`, `metrics`.
    pub addresses: BTreeMap<String, SocketAddr>,
}

impl Ready {
    /// A record of this process.
    pub fn this_process(role: impl Into<String>, name: impl Into<String>) -> Self {
        let (role, name) = (role.into(), name.into());
        Self { role, name, pid: std::process::id(), addresses: BTreeMap::new() }
    }

    /// Adds an address.
    #[must_use]
    pub fn with(mut self, purpose: &str, address: SocketAddr) -> Self {
        self.addresses.insert(purpose.to_owned(), address);
        self
    }

    /// Writes the file so that a reader sees it whole or not at all.
    ///
    /// # Errors
    /// The file's directory cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), FsError> {
        let json = serde_json::to_vec_pretty(self).expect("strings and numbers always serialise");
        fs::write_atomic(path, &json)
    }

    /// Waits until the file is there; `None` after `deadline`.
    ///
    /// A process that replaces an earlier one must be given another path, or the old file must be
    /// removed first.
    pub async fn wait(path: &Path, deadline: Duration) -> Option<Self> {
        let poll = async {
            loop {
                if let Some(ready) = Self::read(path) {
                    return ready;
                }
                // A file appears without an event that every system offers; looking is cheap.
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(deadline, poll).await.ok()
    }

    fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_taken_port_is_a_sentence_with_a_remedy() {
        let any: SocketAddr = "127.0.0.1:0".parse().expect("an address");
        let first = bind_tcp(any, "[listen] api").await.expect("any free port");
        let taken = first.local_addr().expect("bound");
        let error = bind_tcp(taken, "[listen] api").await.expect_err("taken");
        assert_eq!(
            error.to_string(),
            format!(
                "cannot listen on {taken}: address already in use; \
                 stop the other process or set [listen] api"
            )
        );
        let udp = bind_udp(any, "[listen] chunks").expect("any free port");
        let taken = udp.local_addr().expect("bound");
        assert!(matches!(bind_udp(taken, "[listen] chunks"), Err(BindError::InUse { .. })));
    }

    #[tokio::test]
    async fn the_ready_file_tells_the_bound_addresses() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("ready.json");
        assert_eq!(Ready::wait(&path, Duration::from_millis(30)).await, None);
        let ready = Ready::this_process("storage", "s-서울")
            .with("chunks", "127.0.0.1:9811".parse().expect("an address"));
        ready.write(&path).expect("written");
        assert_eq!(Ready::wait(&path, Duration::from_secs(20)).await, Some(ready));
    }
}
