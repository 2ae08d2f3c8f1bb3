//! The node agent's configuration file (TOML).

mod qemu;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use outrider_process::network::NetworkConfig;
use outrider_process::telemetry::{LogConfig, TraceConfig};

pub use qemu::QemuConfig;

/// The whole file. Unknown keys are refused.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The host's name: must be the name in its certificate and the hypervisor's name of this host.
    pub name: String,
    /// Folder with `ca.pem`, `cert.pem`, `key.pem`, `sign.pk8`.
    pub identity_dir: PathBuf,
    /// The fabric's id.
    pub fabric: String,
    /// The failover cluster, or this host's own name when it stands alone.
    pub realm: String,
    /// "ip:port" of the coordinators' API.
    pub coordinators: Vec<String>,
    /// A folder of ours for files that a restore has in hand.
    pub scratch_dir: PathBuf,
    /// Which hypervisor runs here.
    #[serde(default)]
    pub hypervisor: HypervisorKind,
    /// Where the simulated cluster listens; only with `hypervisor = "lab"`.
    #[serde(default)]
    pub lab: Option<LabConfig>,
    /// Where QEMU's sockets are; only with `hypervisor = "qemu"`.
    #[serde(default)]
    pub qemu: Option<QemuConfig>,
    /// Bounds.
    #[serde(default)]
    pub limits: Limits,
    /// Durations of jobs.
    #[serde(default)]
    pub jobs: JobTimes,
    /// Commands around jobs that policies may name; nothing else is ever run for them.
    #[serde(default)]
    pub commands: crate::commands::Table,
    /// Metrics and health over plain HTTP; absent: none.
    #[serde(default)]
    pub observability: Option<SocketAddr>,
    /// Which of this host's networks are used.
    #[serde(default)]
    pub network: NetworkConfig,
    /// Where the agent says how it is, for `outrider node status`; absent: nowhere.
    #[serde(default)]
    pub status_file: Option<PathBuf>,
    /// Traces.
    #[serde(default)]
    pub telemetry: TraceConfig,
    /// The log.
    #[serde(default)]
    pub log: LogConfig,
}

/// Kinds of hypervisors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HypervisorKind {
    /// Hyper-V of this machine, through WMI (Windows only).
    #[default]
    Hyperv,
    /// Hyper-V of a simulated host: the same logic over the lab's transport.
    Lab,
    /// QEMU and KVM of this machine, through QMP (Unix only).
    Qemu,
}

/// `[lab]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LabConfig {
    /// "ip:port" of the simulated cluster.
    pub address: String,
}

/// `[limits]`: what bounds the agent's memory and appetite.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Size of one read of a source disk.
    pub read_size: ByteCount,
    /// Plain bytes in flight between source and storage, all jobs together.
    pub in_flight: ByteCount,
    /// Threads that read, hash, compress and encrypt; 0 takes the number of processors.
    pub workers: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { read_size: ByteCount(4 << 20), in_flight: ByteCount(32 << 20), workers: 0 }
    }
}

impl Limits {
    /// The number of worker threads.
    #[must_use]
    pub fn worker_count(&self) -> usize {
        match self.workers {
            0 => std::thread::available_parallelism().map_or(2, std::num::NonZero::get),
            n => n,
        }
    }
}

/// `[jobs]`: how patient jobs are.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JobTimes {
    /// Longest time between two barriers.
    #[serde(with = "humantime_serde")]
    pub barrier_interval: Duration,
    /// Sealed bytes between two barriers.
    pub barrier_bytes: ByteCount,
    /// First pause before a hypervisor that is busy is asked again; doubles up to `busy_ceiling`.
    #[serde(with = "humantime_serde")]
    pub busy_first: Duration,
    /// Longest pause before a busy hypervisor is asked again.
    #[serde(with = "humantime_serde")]
    pub busy_ceiling: Duration,
    /// How long a job goes on asking a busy hypervisor.
    #[serde(with = "humantime_serde")]
    pub busy_patience: Duration,
    /// How long a volume in redirected mode, which is not its usual one, is waited for before the job goes on.
    #[serde(with = "humantime_serde")]
    pub redirected_patience: Duration,
    /// How often the hypervisor is looked at as a whole, for events that were lost without a word.
    #[serde(with = "humantime_serde")]
    pub inventory_interval: Duration,
    /// How long a volume whose I/O stands still, or a disk that somebody else holds, is waited for.
    #[serde(with = "humantime_serde")]
    pub volume_patience: Duration,
    /// How long one WMI job may take.
    #[serde(with = "humantime_serde")]
    pub hypervisor_job: Duration,
    /// How long a merge is waited for before the job says that the host is not clean.
    #[serde(with = "humantime_serde")]
    pub merge_wait: Duration,
    /// How long a VM that is not on this host is waited for: a move is followed by the end of the lease.
    #[serde(with = "humantime_serde")]
    pub vm_wait: Duration,
    /// How long a coordinator is sought before a job gives up (its lease usually ends first).
    #[serde(with = "humantime_serde")]
    pub coordinator_wait: Duration,
    /// How long storage that refuses or does not answer is asked again.
    #[serde(with = "humantime_serde")]
    pub storage_patience: Duration,
}

impl Default for JobTimes {
    fn default() -> Self {
        Self {
            barrier_interval: Duration::from_secs(5),
            barrier_bytes: ByteCount(256 << 20),
            busy_first: Duration::from_millis(250),
            busy_ceiling: Duration::from_secs(60),
            busy_patience: Duration::from_secs(600),
            redirected_patience: Duration::from_secs(300),
            inventory_interval: Duration::from_secs(300),
            volume_patience: Duration::from_secs(300),
            hypervisor_job: Duration::from_secs(1800),
            merge_wait: Duration::from_secs(600),
            vm_wait: Duration::from_secs(60),
            coordinator_wait: Duration::from_secs(120),
            storage_patience: Duration::from_secs(600),
        }
    }
}

/// A number of bytes: a plain number, or text such as "4 MiB".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteCount(pub u64);

impl ByteCount {
    /// The number as a length in memory.
    #[must_use]
    pub fn as_usize(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl<'de> Deserialize<'de> for ByteCount {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Number(u64),
            Text(String),
        }
        match Form::deserialize(deserializer)? {
            Form::Number(n) => Ok(Self(n)),
            Form::Text(text) => parse_bytes(&text).map(Self).ok_or_else(|| {
                serde::de::Error::custom(format!(
                    "{text:?} is no size: write for example \"4 MiB\""
                ))
            }),
        }
    }
}

fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().ok()?;
    let factor: u64 = match text[digits..].trim() {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        _ => return None,
    };
    number.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_file_is_enough_and_an_unknown_key_is_refused() {
        let text = r#"
            name = "h1"
            identity_dir = "id"
            fabric = "f"
            realm = "c1"
            coordinators = ["127.0.0.1:1"]
            scratch_dir = "s"
            hypervisor = "lab"
            [lab]
            address = "127.0.0.1:2"
            [limits]
            read_size = "1 MiB"
            [jobs]
            merge_wait = "5s"
        "#;
        let parse = |text: &str| {
            outrider_process::config::parse::<Config>(
                std::path::Path::new("node.toml"),
                text,
                |_| None,
            )
        };
        let config = parse(text).expect("a valid file");
        assert_eq!(config.limits.read_size, ByteCount(1 << 20));
        assert_eq!(config.limits.in_flight, ByteCount(32 << 20));
        assert_eq!(config.jobs.merge_wait, Duration::from_secs(5));
        assert!(parse(&format!("{text}\n colour = 1")).is_err());
    }

    #[test]
    fn a_qemu_host_needs_its_sockets_folder_and_nothing_else() {
        let head = r#"
            name = "h1"
            identity_dir = "id"
            fabric = "f"
            realm = "kvm"
            coordinators = ["127.0.0.1:1"]
            scratch_dir = "s"
            hypervisor = "qemu"
        "#;
        let parse = |tail: &str| {
            outrider_process::config::parse::<Config>(
                std::path::Path::new("node.toml"),
                &format!("{head}\n[qemu]\n{tail}"),
                |_| None,
            )
        };
        let qemu = parse("sockets = \"v\"").expect("enough").qemu.expect("a section");
        assert_eq!((qemu.read_depth, qemu.freeze), (2, Duration::from_secs(10)));
        assert!(parse("images = []").is_err(), "no sockets");
        assert!(parse("sockets = \"v\"\nsocket = 1").is_err(), "an unknown key");
    }
}
