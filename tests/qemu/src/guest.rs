//! Steering a guest over its serial port, and reading all that it ever said.
//!
//! What the guest says is read from the log that QEMU keeps of the port, so nothing is lost while nobody listens, and a
//! VM that somebody else started can be asked as well.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::task::JoinHandle;

use crate::error::Error;
use crate::wait::until;

/// A guest answers within this, software emulation on a busy machine included.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// What a guest found when it compared its disks with its journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Everything up to this sequence was to be there.
    pub committed: u64,
    /// Records read from the journal.
    pub records: u64,
    /// Blocks compared.
    pub blocks: u64,
    /// Records that were intended and not committed.
    pub pending: u64,
    /// Blocks that hold something else.
    pub bad: u64,
    /// Errors that the file systems counted.
    pub errors: u64,
    /// The guest's own words.
    pub line: String,
}

/// Latencies of the guest's fsync calls, microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Latency {
    /// How many.
    pub count: u64,
    /// Median.
    pub p50: u64,
    /// 99th percentile.
    pub p99: u64,
    /// Longest.
    pub max: u64,
}

/// How a guest came up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ready {
    /// State of each disk's file system before it was mounted: `clean`, `replay`, `errors` or `none`.
    pub file_systems: Vec<String>,
    /// Whether the guest agent runs.
    pub agent: bool,
}

/// One guest's serial port on one host.
#[derive(Debug)]
pub struct Guest {
    vm: String,
    socket: PathBuf,
    said: PathBuf,
    /// Lines up to here were there before this VM was started.
    from: usize,
    port: Option<Port>,
}

/// A connection to the port. What comes back is thrown away (the log has it): an unread socket would make the guest
/// wait.
#[derive(Debug)]
struct Port {
    write: OwnedWriteHalf,
    drain: JoinHandle<()>,
}

impl Port {
    async fn connect(socket: &Path) -> std::io::Result<Self> {
        let (mut read, write) = UnixStream::connect(socket).await?.into_split();
        let drain = tokio::spawn(async move {
            // It ends when QEMU hangs up.
            let _ = tokio::io::copy(&mut read, &mut tokio::io::sink()).await;
        });
        Ok(Self { write, drain })
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.drain.abort();
    }
}

impl Guest {
    /// Over the port's socket and log; what the log holds by now is somebody else's.
    #[must_use]
    pub fn new(vm: &str, socket: &Path, said: &Path) -> Self {
        let mut guest = Self::everything(vm, socket, said);
        guest.from = guest.lines().len();
        guest
    }

    /// The same, with all that was said so far.
    #[must_use]
    pub fn everything(vm: &str, socket: &Path, said: &Path) -> Self {
        let (socket, said) = (socket.to_owned(), said.to_owned());
        Self { vm: vm.to_owned(), socket, said, from: 0, port: None }
    }

    /// Whole lines that it said since it was started.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let text = std::fs::read(&self.said).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().skip(self.from).map(|l| l.trim().to_owned()).collect()
    }

    /// Waits for a line that begins with a word, from line `from` on; gives the line.
    ///
    /// # Errors
    /// [`Error::Late`].
    pub async fn says(&self, word: &str, from: usize) -> Result<String, Error> {
        until(&format!("{}'s word {word:?}", self.vm), PATIENCE, async || {
            let lines = self.lines();
            let found = lines.iter().skip(from).find(|l| l.split(' ').next() == Some(word));
            Ok(found.cloned().ok_or_else(|| lines.last().cloned().unwrap_or_default()))
        })
        .await
    }

    /// Says a command, without waiting for what comes of it.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub async fn tell(&mut self, command: &str) -> Result<(), Error> {
        let gone = |e: std::io::Error| Error::Gone { vm: self.vm.clone(), reason: e.to_string() };
        let mut port = match self.port.take() {
            Some(port) => port,
            None => Port::connect(&self.socket).await.map_err(gone)?,
        };
        port.write.write_all(format!("{command}\n").as_bytes()).await.map_err(gone)?;
        self.port = Some(port);
        Ok(())
    }

    /// Says a command and waits for its answer.
    ///
    /// # Errors
    /// [`Error::Gone`], [`Error::Late`].
    pub async fn ask(&mut self, command: &str) -> Result<String, Error> {
        let from = self.lines().len();
        self.tell(command).await?;
        let word = match command.split(' ').next().unwrap_or_default() {
            "verify" => "verified",
            word => word,
        };
        self.says(word, from).await
    }

    /// How it came up.
    ///
    /// # Errors
    /// [`Error::Late`].
    pub async fn ready(&self) -> Result<Ready, Error> {
        let line = self.says("ready", 0).await?;
        let states = text(&line, "fs").unwrap_or_default();
        Ok(Ready {
            file_systems: states.split(',').map(str::to_owned).collect(),
            agent: text(&line, "agent") == Some("yes"),
        })
    }

    /// What it found about its journal when it came up.
    ///
    /// # Errors
    /// [`Error::Late`].
    pub async fn verified(&self) -> Result<Verdict, Error> {
        Ok(verdict(&self.says("verified", 0).await?))
    }

    /// Lets it compare its disks with its journal now; no writer may run.
    ///
    /// # Errors
    /// [`Error::Gone`], [`Error::Late`].
    pub async fn verify(&mut self) -> Result<Verdict, Error> {
        Ok(verdict(&self.ask("verify").await?))
    }

    /// Starts a writer of so many bytes a second that runs until it is stopped.
    ///
    /// # Errors
    /// [`Error::Gone`], [`Error::Late`].
    pub async fn write_at(&mut self, seed: u64, rate: u64) -> Result<(), Error> {
        self.ask(&format!("write seed={seed} rate={rate}")).await.map(drop)
    }

    /// Writes so many bytes as fast as it goes, and everything is on disk afterwards. Gives the bytes really written.
    ///
    /// # Errors
    /// [`Error::Gone`], [`Error::Late`].
    pub async fn write(&mut self, seed: u64, bytes: u64) -> Result<u64, Error> {
        let before = self.bytes().await?;
        let from = self.lines().len();
        self.ask(&format!("write seed={seed} bytes={bytes}")).await?;
        self.says("written", from).await?;
        Ok(self.bytes().await? - before)
    }

    /// Stops a writer, if one runs; gives the last sequence that is on disk.
    ///
    /// # Errors
    /// [`Error::Gone`], [`Error::Late`].
    pub async fn stop(&mut self) -> Result<u64, Error> {
        Ok(number(&self.ask("stop").await?, "committed"))
    }

    /// Bytes that it wrote since its disks were made; stops a writer.
    async fn bytes(&mut self) -> Result<u64, Error> {
        Ok(number(&self.ask("stop").await?, "bytes"))
    }

    /// The last sequence that it said to be on disk.
    #[must_use]
    pub fn last_committed(&self) -> u64 {
        let lines = self.lines();
        let said = |line: &String| match line.split(' ').next() {
            Some("committed") => Some(number(line, "sequence")),
            Some("verified" | "stop") => Some(number(line, "committed")),
            _ => None,
        };
        lines.iter().rev().find_map(said).unwrap_or(0)
    }

    /// Bytes that it said to have written, data and journal, since its disks were made.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        let lines = self.lines();
        let said = lines.iter().rev().find_map(|line| text(line, "bytes"));
        said.and_then(|v| v.parse().ok()).unwrap_or(0)
    }

    /// Waits until it has committed more than that.
    ///
    /// # Errors
    /// [`Error::Late`].
    pub async fn commits_beyond(&self, sequence: u64) -> Result<u64, Error> {
        until(&format!("{} writing beyond {sequence}", self.vm), PATIENCE, async || {
            let now = self.last_committed();
            Ok(if now > sequence { Ok(now) } else { Err(now.to_string()) })
        })
        .await
    }

    /// Latencies since they were last asked for.
    ///
    /// # Errors
    /// [`Error::Gone`], [`Error::Late`].
    pub async fn latency(&mut self) -> Result<Latency, Error> {
        let line = self.ask("latency").await?;
        let get = |key| number(&line, key);
        Ok(Latency { count: get("count"), p50: get("p50"), p99: get("p99"), max: get("max") })
    }

    /// Stops its guest agent (the process is there and answers nothing), or lets it go on.
    ///
    /// # Errors
    /// [`Error::Gone`], [`Error::Late`], [`Error::Missing`] when it has none.
    pub async fn hang_agent(&mut self, hang: bool) -> Result<(), Error> {
        let command = if hang { "agent hang" } else { "agent resume" };
        if number(&self.ask(command).await?, "done") == 1 {
            return Ok(());
        }
        Err(Error::Missing {
            what: format!("the guest agent of {}", self.vm),
            remedy: "install qemu-guest-agent".to_owned(),
        })
    }
}

fn text<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    line.split(' ').filter_map(|w| w.split_once('=')).find(|(k, _)| *k == key).map(|(_, v)| v)
}

fn number(line: &str, key: &str) -> u64 {
    text(line, key).and_then(|v| v.parse().ok()).unwrap_or(0)
}

fn verdict(line: &str) -> Verdict {
    let get = |key| number(line, key);
    Verdict {
        committed: get("committed"),
        records: get("records"),
        blocks: get("blocks"),
        pending: get("pending"),
        bad: get("bad"),
        errors: get("errors"),
        line: line.to_owned(),
    }
}
