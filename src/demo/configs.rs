//! The configuration files of the demo's processes: what an operator would write, with short leases.

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use outrider_lab::{CsvConfig, Delays, LabConfig, TruthConfig};
use outrider_process::fs;
use outrider_process::identity::Role;
use serde::Serialize;
use toml::{Table, Value};

use super::processes::Spec;
use crate::fabric::Fabric;
use crate::report::Failure;

/// Hosts of the simulated cluster.
pub(super) const HOSTS: [&str; 3] = ["hv-1", "hv-2", "hv-3"];
/// The simulated failover cluster.
pub(super) const REALM: &str = "demo-cluster";
/// The folder that all hosts share.
pub(super) const CSV: &str = "Volume1";
/// Storage nodes, each a zone of its own.
pub(super) const STORAGE: [&str; 3] = ["s1", "s2", "s3"];
/// Raw copies of checkpoints that the lab keeps per VM; of older ones it keeps hashes.
pub(super) const TRUTHS: usize = 2;

/// Leases of the demo: short, so that what waits for their end does not wait long, and longer than an election.
const LEASE: [&str; 3] = ["6s", "1s", "4s"];

/// How long the demo's certificates are valid.
const VALID: Duration = Duration::from_secs(30 * 24 * 3600);

/// All configuration files, written.
#[derive(Debug)]
pub(super) struct Configs {
    /// Addresses of the coordinators' API.
    pub(super) coordinators: Vec<String>,
    /// Identity of the operator who tells the story.
    pub(super) operator: PathBuf,
    pub(super) lab: Spec,
    pub(super) lab_address: SocketAddr,
    pub(super) coordinator_specs: Vec<Spec>,
    pub(super) storage_specs: Vec<Spec>,
    pub(super) node_specs: Vec<Spec>,
    /// Metrics and health of each process.
    pub(super) watch: Vec<(String, SocketAddr)>,
}

/// Name of a coordinator's process.
pub(super) fn coordinator_name(id: u64) -> String {
    format!("coordinator-{id}")
}

/// Name of a storage node's process.
pub(super) fn storage_name(node: &str) -> String {
    format!("storage-{node}")
}

/// What the agents' hosts are.
#[derive(Debug)]
pub(super) enum Hosts {
    /// Of the simulated cluster.
    Lab,
    /// With real VMs, by name.
    #[cfg(unix)]
    Real(std::collections::BTreeMap<&'static str, RealHost>),
}

/// A host with real VMs.
#[cfg(unix)]
#[derive(Debug)]
pub(super) struct RealHost {
    /// Folder of its VMs' sockets.
    pub(super) sockets: PathBuf,
    /// Folder that restores may use.
    pub(super) images: PathBuf,
    /// Bytes a second, as text.
    pub(super) max_read_rate: &'static str,
}

impl Hosts {
    /// What a host's agent has to know of its hypervisor.
    #[cfg_attr(
        not(unix),
        expect(unused_variables, reason = "only real hosts differ from each other")
    )]
    fn settings(&self, host: &str, lab: SocketAddr) -> [(&'static str, Value); 2] {
        match self {
            Self::Lab => [("hypervisor", text("lab")), ("lab", table([("address", text(lab))]))],
            #[cfg(unix)]
            Self::Real(hosts) => {
                let of = hosts.get(host).map(|h| {
                    table([
                        ("sockets", path(&h.sockets)),
                        ("images", Value::Array(vec![path(&h.images)])),
                        ("max_read_rate", text(h.max_read_rate)),
                    ])
                });
                let empty = || Value::Table(Table::new());
                [("hypervisor", text("qemu")), ("qemu", of.unwrap_or_else(empty))]
            }
        }
    }
}

/// Makes the fabric and writes a file for every process below `dir`.
pub(super) fn write(dir: &Path, seed: u64, hosts: &Hosts) -> Result<Configs, Failure> {
    let fabric = Fabric::create(&dir.join("fabric"))?;
    let mut ports = Ports::new();
    let mut watch = Vec::new();
    let conf = dir.join("conf");
    std::fs::create_dir_all(&conf)?;

    let lab_address = ports.next()?;
    let lab = LabConfig {
        listen: lab_address,
        address_file: None,
        realm: REALM.into(),
        hosts: HOSTS.map(str::to_owned).into(),
        csvs: vec![CsvConfig { name: CSV.into(), path: dir.join("csv").join(CSV) }],
        seed,
        delays: Delays::default(),
        checkpoint_on_migration: outrider_lab::CheckpointOnMigration::Travels,
        truth: TruthConfig { dir: dir.join("truth"), keep: TRUTHS },
    };
    let lab = spec(&conf, "lab".into(), "lab", &lab)?;

    let members: Vec<(u64, SocketAddr)> =
        (1..=3).map(|id| Ok((id, ports.next()?))).collect::<Result<_, Failure>>()?;
    let coordinators: Vec<String> = members.iter().map(|(_, a)| a.to_string()).collect();
    let member_list: Vec<Value> =
        members.iter().map(|(id, a)| table([("id", int(*id)), ("address", text(a))])).collect();
    let mut coordinator_specs = Vec::new();
    for (id, address) in &members {
        let name = coordinator_name(*id);
        let metrics = ports.next()?;
        watch.push((name.clone(), metrics));
        let config = table([
            ("name", text(&name)),
            ("id", int(*id)),
            ("fabric", text(fabric.id())),
            ("identity_dir", path(&fabric.issue(Role::Coordinator, &name, VALID)?)),
            ("data_dir", path(&data(dir, &name)?)),
            ("kek_file", path(&fabric.kek_file())),
            ("listen", text(address)),
            ("members", Value::Array(member_list.clone())),
            ("observability", text(metrics)),
            (
                "lease",
                table([
                    ("duration", text(LEASE[0])),
                    ("renew", text(LEASE[1])),
                    ("cutoff", text(LEASE[2])),
                ]),
            ),
            (
                "storage",
                table([
                    ("nodes", int(3)),
                    ("pg_count", int(64)),
                    ("replicas", int(3)),
                    ("min_durable", int(2)),
                ]),
            ),
            (
                "limits",
                table([
                    ("back_off", text("500ms")),
                    ("back_off_max", text("5s")),
                    ("runs", int(10)),
                ]),
            ),
        ]);
        coordinator_specs.push(spec(&conf, name, "coordinator", &config)?);
    }
    let addresses = Value::Array(coordinators.iter().map(text).collect());

    let mut storage_specs = Vec::new();
    for node in STORAGE {
        let name = storage_name(node);
        let metrics = ports.next()?;
        watch.push((name.clone(), metrics));
        let config = table([
            ("name", text(node)),
            ("fabric", text(fabric.id())),
            ("identity_dir", path(&fabric.issue(Role::Storage, node, VALID)?)),
            ("data_dir", path(&data(dir, &name)?)),
            ("listen", text(ports.next()?)),
            ("coordinators", addresses.clone()),
            ("zone", text(format!("zone-{node}"))),
            ("observability", text(metrics)),
            // The story waits for a node that comes back to have caught up.
            ("limits", table([("catch_up_every", text("2s")), ("status_every", text("1s"))])),
        ]);
        storage_specs.push(spec(&conf, name, "storage", &config)?);
    }

    let mut node_specs = Vec::new();
    for host in HOSTS {
        let name = format!("node-{host}");
        let metrics = ports.next()?;
        let [hypervisor, settings] = hosts.settings(host, lab_address);
        watch.push((name.clone(), metrics));
        let config = table([
            ("name", text(host)),
            ("fabric", text(fabric.id())),
            ("realm", text(REALM)),
            ("identity_dir", path(&fabric.issue(Role::Node, host, VALID)?)),
            ("scratch_dir", path(&data(dir, &name)?)),
            ("coordinators", addresses.clone()),
            ("observability", text(metrics)),
            hypervisor,
            settings,
        ]);
        node_specs.push(spec(&conf, name, "node", &config)?);
    }
    let operator = fabric.issue(Role::Operator, "demo", VALID)?;
    Ok(Configs {
        coordinators,
        operator,
        lab,
        lab_address,
        coordinator_specs,
        storage_specs,
        node_specs,
        watch,
    })
}

fn spec(
    folder: &Path,
    name: String,
    role: &'static str,
    config: &impl Serialize,
) -> Result<Spec, Failure> {
    let file = folder.join(format!("{name}.toml"));
    fs::write_atomic(&file, toml::to_string(config)?.as_bytes())?;
    Ok(Spec { name, role, config: file })
}

fn data(dir: &Path, name: &str) -> Result<PathBuf, Failure> {
    let folder = dir.join("data").join(name);
    std::fs::create_dir_all(&folder)?;
    Ok(folder)
}

fn table<const N: usize>(entries: [(&str, Value); N]) -> Value {
    Value::Table(entries.into_iter().map(|(k, v)| (k.to_owned(), v)).collect::<Table>())
}

fn text(value: impl ToString) -> Value {
    Value::String(value.to_string())
}

fn path(value: &Path) -> Value {
    text(value.display())
}

fn int(value: u64) -> Value {
    Value::Integer(i64::try_from(value).unwrap_or(i64::MAX))
}

/// Free ports of the loopback, below the range that systems hand out by themselves, so that a process that is started
/// again finds its port still free.
struct Ports {
    next: u16,
}

impl Ports {
    const RANGE: std::ops::Range<u16> = 20_000..30_000;

    fn new() -> Self {
        // Two demos side by side begin at different places.
        let spread = u16::try_from(std::process::id().wrapping_mul(37) % 9_900).unwrap_or(0);
        Self { next: Self::RANGE.start + spread }
    }

    fn next(&mut self) -> Result<SocketAddr, Failure> {
        for _ in Self::RANGE {
            let address = SocketAddr::from(([127, 0, 0, 1], self.next));
            self.next =
                if self.next + 1 < Self::RANGE.end { self.next + 1 } else { Self::RANGE.start };
            if TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok() {
                return Ok(address);
            }
        }
        Err(Failure::new("no port between 20000 and 29999 of 127.0.0.1 is free"))
    }
}
