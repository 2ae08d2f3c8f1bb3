//! The QEMU guest agent: JSON lines over its own socket, each conversation begun by a delimited sync, so that a late answer to
//! somebody else's question is never taken for ours.

use std::io;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Longest answer that is taken.
const LONGEST: usize = 1 << 20;
/// What the agent puts before the answer to a delimited sync.
const DELIMITER: u8 = 0xff;

/// A conversation with a guest agent.
#[derive(Debug)]
pub(super) struct GuestAgent {
    stream: UnixStream,
    read: Vec<u8>,
}

impl GuestAgent {
    /// Connects and finds a common beginning.
    pub(super) async fn connect(socket: &Path, patience: Duration) -> Result<Self, String> {
        within(patience, async {
            let stream = UnixStream::connect(socket).await?;
            let mut agent = Self { stream, read: Vec::new() };
            let id: u32 = rand::random();
            let mut line = vec![DELIMITER];
            line.extend_from_slice(
                json!({ "execute": "guest-sync-delimited", "arguments": { "id": id } }).to_string().as_bytes(),
            );
            line.push(b'\n');
            agent.stream.write_all(&line).await?;
            loop {
                let line = agent.line(Some(DELIMITER)).await?;
                let answer: Value = serde_json::from_slice(&line).unwrap_or_default();
                if answer["return"].as_u64() == Some(id.into()) {
                    return Ok(agent);
                }
            }
        })
        .await
        .map_err(|e| match e.kind() {
            io::ErrorKind::TimedOut => {
                format!("did not answer within {patience:?}; check that qemu-guest-agent runs in the guest")
            }
            _ => format!("cannot be reached: {e}; check that qemu-guest-agent runs in the guest"),
        })
    }

    /// Executes a command.
    pub(super) async fn execute(
        &mut self,
        command: &str,
        patience: Duration,
    ) -> Result<Value, String> {
        let mut line = json!({ "execute": command }).to_string().into_bytes();
        line.push(b'\n');
        let answer = within(patience, async {
            self.stream.write_all(&line).await?;
            self.line(None).await
        })
        .await
        .map_err(|e| match e.kind() {
            io::ErrorKind::TimedOut => format!("did not finish {command} within {patience:?}"),
            _ => format!("was lost during {command}: {e}"),
        })?;
        let answer: Value = serde_json::from_slice(&answer)
            .map_err(|e| format!("answered {command} with something that is no JSON: {e}"))?;
        match answer.get("error") {
            Some(error) => Err(format!(
                "refused {command}: {}",
                error["desc"].as_str().unwrap_or("no reason given")
            )),
            None => Ok(answer["return"].clone()),
        }
    }

    /// The next line; with `after`, of what follows this byte.
    async fn line(&mut self, after: Option<u8>) -> io::Result<Vec<u8>> {
        loop {
            if let Some(end) = self.read.iter().position(|b| *b == b'\n') {
                let mut line: Vec<u8> = self.read.drain(..=end).collect();
                match after {
                    None => return Ok(line),
                    Some(byte) => {
                        if let Some(at) = line.iter().position(|b| *b == byte) {
                            return Ok(line.split_off(at + 1));
                        }
                        continue;
                    }
                }
            }
            if self.read.len() > LONGEST {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "its answer is too long"));
            }
            if self.stream.read_buf(&mut self.read).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

async fn within<T>(patience: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(patience, work)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
