//! The lab's wire form: length-prefixed JSON frames over TCP, request ids, many calls in flight on one connection.
//!
//! A frame is a little-endian `u32` byte count and that many bytes of JSON, at most [`MAX_FRAME`]. Replies carry the id
//! of their request; the events of a subscription carry the id of the request that subscribed.

use std::io;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::{Object, Value, WmiError};

/// Longest frame either side accepts.
pub const MAX_FRAME: usize = 16 << 20;

/// A request of a client.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the client, unique on its connection.
    pub id: u64,
    /// What is asked.
    pub body: Ask,
}

/// What a client asks. The first request of a connection is [`Ask::Hello`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Ask {
    /// Says who speaks.
    Hello(Role),
    /// A WQL query.
    Query {
        /// Namespace.
        namespace: String,
        /// WQL text.
        wql: String,
    },
    /// One instance.
    Get {
        /// Namespace.
        namespace: String,
        /// Object path.
        path: String,
    },
    /// Associated instances.
    Associators {
        /// Namespace.
        namespace: String,
        /// Object path.
        path: String,
        /// Association class or empty.
        assoc_class: String,
        /// Result class or empty.
        result_class: String,
    },
    /// A method call.
    Exec {
        /// Namespace.
        namespace: String,
        /// Object path.
        path: String,
        /// Method name.
        method: String,
        /// Named arguments.
        args: Vec<(String, Value)>,
    },
    /// Writes properties of an instance.
    Put {
        /// Namespace.
        namespace: String,
        /// Object path.
        path: String,
        /// Properties.
        properties: Vec<(String, Value)>,
    },
    /// Gives a VM's account rights on a folder.
    Grant {
        /// The VM's GUID.
        vm: String,
        /// The folder.
        folder: String,
    },
    /// An event subscription.
    Subscribe {
        /// Namespace.
        namespace: String,
        /// WQL event query.
        wql: String,
    },
    /// Opens the one file of a [`Role::Files`] connection.
    OpenFile {
        /// Full path.
        path: String,
    },
    /// Asks how many of the next `length` bytes may be read; answered with [`Answer::Granted`], perhaps late.
    Read {
        /// Bytes wanted, not reaching past the end of the file.
        length: u64,
    },
    /// Closes the file of this connection.
    CloseFile,
    /// A command of the lab's control client.
    Control(serde_json::Value),
}

/// Who speaks on a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// The agent of a host, asking that host's WMI providers.
    Host(String),
    /// One open source file of a host.
    Files(String),
    /// Whoever steers the lab.
    Control,
}

/// An answer or event.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Reply {
    /// Id of the request.
    pub id: u64,
    /// The answer.
    pub body: Answer,
}

/// What the lab answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Answer {
    /// Nothing to say but yes.
    Done,
    /// Instances.
    Objects(Vec<Object>),
    /// One instance, or out parameters.
    Object(Object),
    /// Bytes that may be read now.
    Granted(u64),
    /// The answer to a control command.
    Value(serde_json::Value),
    /// An event of a subscription.
    Event(Object),
    /// The subscriber was too slow.
    EventsLost,
    /// A refusal.
    Failed(Refusal),
}

/// Why the lab refuses; a [`WmiError`] without the transport's own kinds.
#[derive(Debug, Clone, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// No such instance, file or VM.
    #[error("nothing found at {path:?} in {namespace:?}")]
    NotFound {
        /// Namespace asked.
        namespace: String,
        /// Object or file path.
        path: String,
    },
    /// No such namespace.
    #[error("no namespace {0:?}")]
    NoNamespace(String),
    /// Not understood, or refused with a reason.
    #[error("{what}: {reason}")]
    Invalid {
        /// Query, method or command.
        what: String,
        /// Why.
        reason: String,
    },
    /// A sharing violation on a file.
    #[error("the file {path:?} is in use by the hypervisor (0x80070020)")]
    Sharing {
        /// The file.
        path: String,
    },
    /// It passes by itself: a volume whose I/O is paused, a provider that is not there yet, a subscription given up.
    #[error("{what} cannot be answered now ({code})")]
    Paused {
        /// What.
        what: String,
        /// Windows' code.
        code: u32,
    },
    /// The host is down.
    #[error("host {0:?} is down")]
    HostDown(String),
}

impl Refusal {
    pub(crate) fn into_wmi(self, endpoint: &str) -> WmiError {
        match self {
            Self::NotFound { namespace, path } => WmiError::NotFound { namespace, path },
            Self::NoNamespace(namespace) => WmiError::NoNamespace { namespace },
            Self::Invalid { what, reason } => WmiError::Invalid { what, reason },
            Self::Sharing { ref path } => {
                WmiError::Invalid { what: path.clone(), reason: self.to_string() }
            }
            Self::HostDown(_) | Self::Paused { .. } => WmiError::Unreachable {
                endpoint: endpoint.to_owned(),
                waited: std::time::Duration::ZERO,
                reason: self.to_string(),
            },
        }
    }
}

/// Encodes one frame, prefix included.
///
/// # Errors
/// When the value has no JSON form or is longer than [`MAX_FRAME`].
pub fn encode<T: Serialize>(value: &T) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; 4];
    serde_json::to_writer(&mut frame, value).map_err(io::Error::other)?;
    let length = frame.len() - 4;
    if length > MAX_FRAME {
        return Err(io::Error::other(format!("a lab frame of {length} bytes exceeds {MAX_FRAME}")));
    }
    let prefix = u32::try_from(length).map_err(io::Error::other)?;
    frame[..4].copy_from_slice(&prefix.to_le_bytes());
    Ok(frame)
}

fn checked_length(prefix: [u8; 4]) -> io::Result<usize> {
    let length = u32::from_le_bytes(prefix) as usize;
    if length > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a lab frame announces {length} bytes, more than {MAX_FRAME}"),
        ));
    }
    Ok(length)
}

/// Reads one frame; `None` at a clean end of the stream.
///
/// # Errors
/// I/O errors, a frame that is too long, or JSON that is not a `T`.
pub async fn read<T: DeserializeOwned>(
    stream: &mut (impl AsyncRead + Unpin),
) -> io::Result<Option<T>> {
    let mut prefix = [0; 4];
    match stream.read_exact(&mut prefix).await {
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(e),
    }
    let mut body = vec![0; checked_length(prefix)?];
    stream.read_exact(&mut body).await?;
    serde_json::from_slice(&body).map(Some).map_err(io::Error::from)
}

/// Writes one encoded frame.
///
/// # Errors
/// I/O errors.
pub async fn write(stream: &mut (impl AsyncWrite + Unpin), frame: &[u8]) -> io::Result<()> {
    stream.write_all(frame).await
}

pub(crate) fn read_blocking<T: DeserializeOwned>(stream: &mut impl io::Read) -> io::Result<T> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix)?;
    let mut body = vec![0; checked_length(prefix)?];
    stream.read_exact(&mut body)?;
    serde_json::from_slice(&body).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_frame_too_long_is_refused_before_anything_is_allocated() {
        let bytes = u32::MAX.to_le_bytes();
        let error = read::<Request>(&mut &bytes[..]).await.expect_err("too long");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[tokio::test]
    async fn a_frame_reads_back_as_it_was_written() {
        let frame = encode(&Request { id: 7, body: Ask::Read { length: 9 } }).expect("encodes");
        let back: Request = read(&mut &frame[..]).await.expect("reads").expect("a frame");
        assert_eq!(back.id, 7);
        assert!(matches!(back.body, Ask::Read { length: 9 }));
    }
}
