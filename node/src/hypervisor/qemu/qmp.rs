//! A client of one QMP monitor: JSON lines over a Unix socket, answers matched by id, events beside them.
//!
//! One task owns the socket. Whoever asks waits with a deadline; an answer that comes after it is dropped. When the socket
//! closes, everybody who waits hears so, and the events end.

use std::collections::HashMap;
use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt;
use outrider_process::tasks::TaskSpawner;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio_util::codec::{FramedRead, LinesCodec};
use tokio_util::sync::CancellationToken;

/// Longest line that is taken from QEMU.
const LONGEST_LINE: usize = 32 << 20;
/// Questions waiting to be sent.
const WAITING: usize = 64;
/// Events waiting to be looked at; a monitor whose owner does not keep up is closed.
const EVENTS: usize = 1024;
/// How long the greeting may take.
const GREETING: Duration = Duration::from_secs(2);
/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(30);

/// Why QEMU could not be asked, or what it answered instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QmpError {
    /// Nobody listens.
    #[error("no QEMU listens at {}: {reason}", socket.display())]
    Connect {
        /// Socket.
        socket: PathBuf,
        /// The system's reason.
        reason: String,
    },
    /// It listens, and does not greet.
    #[error(
        "the monitor at {} does not greet: another program holds it (a QMP socket has one client at a time), or QEMU hangs; \
         give Outrider a monitor of its own, see docs/qemu.md",
        socket.display()
    )]
    NoGreeting {
        /// Socket.
        socket: PathBuf,
    },
    /// The socket closed.
    #[error("the monitor at {} closed: its QEMU has ended or dropped it", socket.display())]
    Closed {
        /// Socket.
        socket: PathBuf,
    },
    /// No answer.
    #[error(
        "QEMU at {} did not answer {command} within {waited:?}; look at the VM's process, it may hang on its storage",
        socket.display()
    )]
    TimedOut {
        /// Socket.
        socket: PathBuf,
        /// Command.
        command: String,
        /// Bound.
        waited: Duration,
    },
    /// A refusal.
    #[error("QEMU refused {command}: {desc} ({class})")]
    Refused {
        /// Command.
        command: String,
        /// Error class.
        class: String,
        /// Its words.
        desc: String,
    },
    /// Something that is no QMP.
    #[error("the answer of {} to {command} makes no sense: {detail}", socket.display())]
    Odd {
        /// Socket.
        socket: PathBuf,
        /// Command.
        command: String,
        /// What is wrong.
        detail: String,
    },
}

impl QmpError {
    /// Whether the VM itself may be gone.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Connect { .. } | Self::Closed { .. })
    }

    /// Whether QEMU answered, and said no.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }
}

/// Something that happened in QEMU.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct QmpEvent {
    /// Its name, such as `MIGRATION`.
    pub(super) name: String,
    /// Its data; null when it has none.
    pub(super) data: Value,
}

/// A version of QEMU: major, minor, micro.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32, pub u32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// A connected monitor. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Qmp {
    socket: Arc<Path>,
    requests: mpsc::Sender<Request>,
    next: Arc<AtomicU64>,
    version: Version,
    peer: Option<i32>,
}

#[derive(Debug)]
struct Request {
    id: u64,
    line: Vec<u8>,
    file: Option<OwnedFd>,
    answer: oneshot::Sender<Value>,
}

impl Qmp {
    /// Connects, takes the greeting and leaves negotiation mode. The events end when the socket closes.
    ///
    /// # Errors
    /// [`QmpError`].
    pub(super) async fn connect(
        socket: &Path,
        tasks: &TaskSpawner,
    ) -> Result<(Self, mpsc::Receiver<QmpEvent>), QmpError> {
        let stream = UnixStream::connect(socket)
            .await
            .map_err(|e| QmpError::Connect { socket: socket.to_owned(), reason: e.to_string() })?;
        let peer = stream.peer_cred().ok().and_then(|c| c.pid());
        let (read, write) = stream.into_split();
        let mut lines = FramedRead::new(read, LinesCodec::new_with_max_length(LONGEST_LINE));
        let greeting = match tokio::time::timeout(GREETING, lines.next()).await {
            Err(_) => return Err(QmpError::NoGreeting { socket: socket.to_owned() }),
            Ok(Some(Ok(line))) => line,
            Ok(_) => return Err(QmpError::Closed { socket: socket.to_owned() }),
        };
        let version = version_of(&greeting).ok_or_else(|| QmpError::Odd {
            socket: socket.to_owned(),
            command: "connecting".into(),
            detail: format!("the greeting is {:?}", greeting.chars().take(200).collect::<String>()),
        })?;
        let (requests, asked) = mpsc::channel(WAITING);
        let (events, happened) = mpsc::channel(EVENTS);
        let owner = serve(lines, write, asked, events, tasks.token());
        tasks.spawn(&format!("monitor {}", socket.display()), owner);
        let qmp = Self { socket: socket.into(), requests, next: Arc::default(), version, peer };
        qmp.execute("qmp_capabilities", Value::Null).await?;
        Ok((qmp, happened))
    }

    /// QEMU's version.
    #[must_use]
    pub(super) fn version(&self) -> Version {
        self.version
    }

    /// The socket.
    #[must_use]
    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Process id of the QEMU behind the socket.
    #[must_use]
    pub(super) fn peer(&self) -> Option<i32> {
        self.peer
    }

    /// Whether the socket has closed.
    #[must_use]
    pub(super) fn is_closed(&self) -> bool {
        self.requests.is_closed()
    }

    /// Executes a command.
    ///
    /// # Errors
    /// [`QmpError`].
    pub(super) async fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.ask(command, arguments, None).await
    }

    /// Executes a command that a file is passed with.
    ///
    /// # Errors
    /// [`QmpError`].
    pub(super) async fn execute_with(
        &self,
        command: &str,
        arguments: Value,
        file: OwnedFd,
    ) -> Result<Value, QmpError> {
        self.ask(command, arguments, Some(file)).await
    }

    /// Executes commands one after another without waiting in between; gives all answers.
    pub(super) async fn execute_all(
        &self,
        commands: Vec<(&str, Value)>,
    ) -> Vec<Result<Value, QmpError>> {
        // Polled in order for the first time, so sent in order.
        futures::future::join_all(commands.into_iter().map(|(c, a)| self.ask(c, a, None))).await
    }

    async fn ask(
        &self,
        command: &str,
        arguments: Value,
        file: Option<OwnedFd>,
    ) -> Result<Value, QmpError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut message = json!({ "execute": command, "id": id });
        if !arguments.is_null() {
            message["arguments"] = arguments;
        }
        let mut line = message.to_string().into_bytes();
        line.push(b'\n');
        let closed = || QmpError::Closed { socket: self.socket.to_path_buf() };
        let (answer, answered) = oneshot::channel();
        let asking = async {
            let request = Request { id, line, file, answer };
            self.requests.send(request).await.map_err(|_| closed())?;
            answered.await.map_err(|_| closed())
        };
        let mut answer = match tokio::time::timeout(ANSWER, asking).await {
            Ok(answer) => answer?,
            Err(_) => {
                return Err(QmpError::TimedOut {
                    socket: self.socket.to_path_buf(),
                    command: command.to_owned(),
                    waited: ANSWER,
                });
            }
        };
        if let Some(error) = answer.get("error") {
            let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
            return Err(QmpError::Refused {
                command: command.to_owned(),
                class: text("class"),
                desc: text("desc"),
            });
        }
        match answer.get_mut("return") {
            Some(value) => Ok(value.take()),
            None => Err(QmpError::Odd {
                socket: self.socket.to_path_buf(),
                command: command.to_owned(),
                detail: "it holds neither \"return\" nor \"error\"".into(),
            }),
        }
    }
}

fn version_of(greeting: &str) -> Option<Version> {
    let greeting: Value = serde_json::from_str(greeting).ok()?;
    let qemu = &greeting["QMP"]["version"]["qemu"];
    let number = |key: &str| qemu[key].as_u64().and_then(|n| u32::try_from(n).ok());
    Some(Version(number("major")?, number("minor")?, number("micro")?))
}

/// Owns the socket until it closes or nobody asks any more.
async fn serve(
    mut lines: FramedRead<OwnedReadHalf, LinesCodec>,
    mut write: OwnedWriteHalf,
    mut asked: mpsc::Receiver<Request>,
    events: mpsc::Sender<QmpEvent>,
    stop: CancellationToken,
) {
    let mut open: HashMap<u64, oneshot::Sender<Value>> = HashMap::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            request = asked.recv() => {
                let Some(request) = request else { return };
                open.insert(request.id, request.answer);
                if send(&mut write, &request.line, request.file).await.is_err() {
                    return;
                }
            }
            line = lines.next() => {
                let Some(Ok(line)) = line else { return };
                let Ok(message) = serde_json::from_str::<Value>(&line) else {
                    tracing::warn!("a line from QEMU's monitor is no JSON; the monitor is closed");
                    return;
                };
                if let Some(name) = message["event"].as_str() {
                    let event = QmpEvent { name: name.to_owned(), data: message["data"].clone() };
                    if let Err(mpsc::error::TrySendError::Full(_)) = events.try_send(event) {
                        tracing::warn!("events of a VM are not looked at; its monitor is opened anew");
                        return;
                    }
                } else if let Some(answer) = message["id"].as_u64().and_then(|id| open.remove(&id)) {
                    // Who asked may have gone.
                    let _ = answer.send(message);
                }
            }
        }
    }
}

/// Sends a line; a file goes with its first bytes.
async fn send(
    write: &mut OwnedWriteHalf,
    line: &[u8],
    file: Option<OwnedFd>,
) -> std::io::Result<()> {
    let Some(file) = file else { return write.write_all(line).await };
    let stream: &UnixStream = write.as_ref();
    let sent = stream
        .async_io(Interest::WRITABLE, || {
            let files = [file.as_fd()];
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut extra = SendAncillaryBuffer::new(&mut space);
            extra.push(SendAncillaryMessage::ScmRights(&files));
            Ok(sendmsg(stream, &[IoSlice::new(line)], &mut extra, SendFlags::empty())?)
        })
        .await?;
    write.write_all(&line[sent..]).await
}
