//! `[qemu]` of the agent's configuration.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::ByteCount;

/// How the QEMU processes of this host are found and treated.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QemuConfig {
    /// Folder with `NAME.qmp` and `NAME.qga`.
    pub sockets: PathBuf,
    /// Folders that VMs may be restored to.
    #[serde(default)]
    pub images: Vec<PathBuf>,
    /// Folder for what a guest overwrites while it is backed up; the agent's `scratch_dir` when absent.
    #[serde(default)]
    pub scratch: Option<PathBuf>,
    /// Most bytes of one checkpoint's scratch files.
    #[serde(default = "scratch_limit")]
    pub scratch_limit: ByteCount,
    /// Longest time that a guest stays frozen.
    #[serde(default = "freeze", with = "humantime_serde")]
    pub freeze: Duration,
    /// How long the guest agent may take to answer.
    #[serde(default = "guest_agent", with = "humantime_serde")]
    pub guest_agent: Duration,
    /// Most bytes per second read from one VM.
    #[serde(default)]
    pub max_read_rate: Option<ByteCount>,
    /// Reads of one disk under way at the same time.
    #[serde(default = "read_depth")]
    pub read_depth: usize,
}

fn scratch_limit() -> ByteCount {
    ByteCount(64 << 30)
}

fn freeze() -> Duration {
    Duration::from_secs(10)
}

fn guest_agent() -> Duration {
    Duration::from_secs(5)
}

fn read_depth() -> usize {
    2
}
