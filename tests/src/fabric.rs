//! A whole fabric of real processes in a temporary folder.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use outrider_lab::{CreateVm, DiskSource, GuestWrite, LabControl, VmState};
use outrider_process::identity::Role;
use outrider_process::identity::ca::FabricCa;
use outrider_process::secret::kek::KeyEncryptionKey;
use tempfile::TempDir;

use crate::binary::Program;
use crate::config::{Ground, REALM};
use crate::eventually;
use crate::http;
use crate::operator::Operator;
use crate::process::Process;

/// Validity of the identities of a test.
pub const DAY: Duration = Duration::from_secs(24 * 3600);
/// Bytes.
pub const MIB: u64 = 1 << 20;

/// What a fabric is made of.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Members: 1 or 3.
    pub coordinators: usize,
    /// Storage nodes `s1`...
    pub storage: usize,
    /// Copies of each chunk.
    pub replicas: usize,
    /// Copies that make a chunk durable.
    pub min_durable: usize,
    /// Hosts of the simulated cluster, an agent on each.
    pub hosts: Vec<String>,
    /// Hosts of the simulated cluster without an agent.
    pub unmanned: Vec<String>,
    /// How long certificates of machines that joined are valid.
    pub enrolled_for: &'static str,
    /// Of these, the hosts whose agents are Windows programs ([`Program::windows`]).
    pub windows_hosts: Vec<String>,
    /// Duration, renewal and cutoff of leases.
    pub lease_ms: [u64; 3],
    /// How long jobs ask storage that does not answer.
    pub storage_patience: &'static str,
    /// Longest time between two barriers of a job.
    pub barrier_interval: &'static str,
    /// Below this much free space a storage node takes nothing new.
    pub min_free: &'static str,
    /// How long a job waits for a merge before it says that the host is not clean.
    pub merge_wait: &'static str,
    /// How long a job waits for its VM to be on its host again.
    pub vm_wait: &'static str,
    /// How often agents look at everything, for events that were lost without a word.
    pub inventory_interval: &'static str,
    /// What a storage node may keep.
    pub capacity: &'static str,
    /// More settings of agents on hosts of the lab (TOML tables).
    pub node_settings: String,
    /// More settings of coordinators (TOML tables).
    pub coordinator_settings: String,
    /// OTLP receiver.
    pub otlp: Option<String>,
    /// Where coordinators and storage nodes listen.
    pub address: IpAddr,
    /// Debug logs.
    pub verbose: bool,
}

impl Default for Plan {
    /// The smallest fabric with a migration in it.
    fn default() -> Self {
        Self {
            coordinators: 1,
            storage: 1,
            replicas: 1,
            min_durable: 1,
            hosts: vec!["alpha".to_owned(), "beta".to_owned()],
            unmanned: Vec::new(),
            enrolled_for: "1day",
            windows_hosts: Vec::new(),
            lease_ms: [1500, 300, 1000],
            storage_patience: "60s",
            barrier_interval: "200ms",
            min_free: "256 MiB",
            merge_wait: "60s",
            vm_wait: "60s",
            inventory_interval: "300s",
            capacity: "2 GiB",
            node_settings: String::new(),
            coordinator_settings: String::new(),
            otlp: None,
            address: Ipv4Addr::LOCALHOST.into(),
            verbose: std::env::var_os("OUTRIDER_TEST_DEBUG").is_some(),
        }
    }
}

/// Running processes, their folder, and two ways to steer them.
pub struct Fabric {
    /// Coordinators `c1`..., in the order of their ids.
    pub coordinators: Vec<Process>,
    /// Storage nodes `s1`...
    pub storage: Vec<Process>,
    /// Agents, in the order of the plan's hosts.
    pub agents: Vec<Process>,
    /// The simulated cluster's process.
    pub lab_process: Process,
    /// The simulated cluster.
    pub lab: LabControl,
    /// The operator.
    pub operator: Operator,
    /// Authority of the fabric.
    pub ca: FabricCa,
    /// The coordinators' addresses.
    pub addresses: Vec<String>,
    /// What it was made of.
    pub plan: Plan,
    // Dropped last: the processes are gone by then.
    folder: Folder,
}

/// A temporary folder; kept when the test fails and `OUTRIDER_TEST_KEEP` is set.
pub(crate) struct Folder(Option<TempDir>);

impl Folder {
    pub(crate) fn path(&self) -> &Path {
        self.0.as_ref().expect("gone only in drop").path()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let keep = std::thread::panicking() && std::env::var_os("OUTRIDER_TEST_KEEP").is_some();
        if let Some(dir) = self.0.take().filter(|_| keep) {
            eprintln!("kept {}", dir.keep().display());
        }
    }
}

/// Coordinators, storage nodes and an operator: what there is besides hosts.
pub(crate) struct Core {
    pub(crate) coordinators: Vec<Process>,
    pub(crate) storage: Vec<Process>,
    pub(crate) operator: Operator,
    pub(crate) ca: FabricCa,
    pub(crate) addresses: Vec<String>,
    // Dropped last: the processes are gone by then.
    pub(crate) folder: Folder,
}

impl Core {
    /// Starts them, with identities for the plan's hosts.
    pub(crate) async fn start(plan: &Plan) -> Self {
        let dir = tempfile::Builder::new().prefix("outrider-").tempdir().expect("a folder");
        let ca = FabricCa::create(&uuid::Uuid::new_v4().to_string()).expect("a fabric");
        let kek = KeyEncryptionKey::generate();
        outrider_process::fs::write_private(&dir.path().join("kek"), kek.to_text().expose())
            .expect("the folder is writable");
        let names = |prefix: &str, count: usize| -> Vec<String> {
            (1..=count).map(|i| format!("{prefix}{i}")).collect()
        };
        let members = [
            (Role::Coordinator, names("c", plan.coordinators)),
            (Role::Storage, names("s", plan.storage)),
            (Role::Node, plan.hosts.clone()),
            (Role::Operator, vec!["op".to_owned()]),
        ];
        for (role, names) in members {
            for name in names {
                let place = identity_dir(dir.path(), role, &name);
                ca.issue(role, &name, DAY).expect("issued").save(&place).expect("saved");
            }
        }
        let enrolment = ca.enrolment(&kek).expect("an enrolment authority");
        for name in names("c", plan.coordinators) {
            let place = identity_dir(dir.path(), Role::Coordinator, &name);
            enrolment.save(&place).expect("saved");
        }
        let (coordinators, addresses) = start_coordinators(plan, ca.fabric(), dir.path()).await;
        let ground = Ground {
            plan,
            fabric: ca.fabric(),
            dir: dir.path(),
            coordinators: &addresses,
            realm: REALM,
        };
        let mut storage: Vec<Process> = names("s", plan.storage)
            .iter()
            .map(|name| Process::start("storage", name, dir.path(), &ground.storage(name)))
            .collect();
        for process in &mut storage {
            process.ready().await;
        }
        let identity = identity_dir(dir.path(), Role::Operator, "op");
        let operator = Operator::new(addresses.clone(), identity);
        Self { coordinators, storage, operator, ca, addresses, folder: Folder(Some(dir)) }
    }

    /// What configuration files are made of.
    pub(crate) fn ground<'a>(&'a self, plan: &'a Plan) -> Ground<'a> {
        let fabric = self.ca.fabric();
        Ground { plan, fabric, dir: self.dir(), coordinators: &self.addresses, realm: REALM }
    }

    /// The fabric's folder.
    pub(crate) fn dir(&self) -> &Path {
        self.folder.path()
    }
}

/// Waits until every host and every storage node is up, and the layout is made.
pub(crate) async fn settled(operator: &Operator, plan: &Plan) {
    let hosts = plan.hosts.len();
    eventually("all hosts and storage nodes are up", async || {
        let status = operator.status().await.map_err(|e| e.to_string())?;
        let online = status.storage.iter().filter(|s| s.node.as_ref().is_some_and(|n| n.online));
        let (up, online) = (status.hosts_up as usize, online.count());
        let layout = status.layout.is_some_and(|l| !l.pgs.is_empty());
        if up == hosts && online == plan.storage && layout {
            return Ok(());
        }
        Err(format!(
            "{up} of {hosts} hosts, {online} of {} storage nodes, layout: {layout}",
            plan.storage
        ))
    })
    .await;
}

impl Fabric {
    /// Starts everything, and waits until hosts and layout are known.
    pub async fn start(plan: Plan) -> Self {
        let core = Core::start(&plan).await;
        let ground = core.ground(&plan);
        let mut lab_process = Process::start("lab", "cluster", core.dir(), &ground.lab());
        let lab_address = only_address(&mut lab_process).await;
        let lab = LabControl::connect(lab_address).await.expect("the lab answers");
        let mut agents: Vec<Process> = plan
            .hosts
            .iter()
            .map(|h| {
                let windows = plan.windows_hosts.contains(h);
                let program = if windows { Program::windows() } else { Some(Program::native()) };
                let program = program.expect("OUTRIDER_WINDOWS_EXE names it");
                Process::start_with(program, "node", h, core.dir(), &ground.node(h, lab_address))
            })
            .collect();
        for process in &mut agents {
            process.ready().await;
        }
        let Core { coordinators, storage, operator, ca, addresses, folder } = core;
        let fabric = Self {
            coordinators,
            storage,
            agents,
            lab_process,
            lab,
            operator,
            ca,
            addresses,
            plan,
            folder,
        };
        fabric.settled().await;
        fabric
    }

    /// Starts the agent of an unmanned host, with whatever identity lies in its place.
    pub async fn man(&mut self, host: &str) {
        let lab = only_address(&mut self.lab_process).await;
        let dir = self.folder.path();
        let ground = Ground {
            plan: &self.plan,
            fabric: self.ca.fabric(),
            dir,
            coordinators: &self.addresses,
            realm: REALM,
        };
        let agent = Process::start("node", host, dir, &ground.node(host, lab));
        self.agents.push(agent);
        self.plan.unmanned.retain(|name| name != host);
        self.plan.hosts.push(host.to_owned());
        self.settled().await;
    }

    /// Waits until every host and every storage node is up, and the layout is made.
    pub async fn settled(&self) {
        settled(&self.operator, &self.plan).await;
    }

    /// The fabric's folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.folder.path()
    }

    /// Where a storage node keeps its data.
    #[must_use]
    pub fn storage_dir(&self, place: usize) -> PathBuf {
        self.dir().join(format!("storage-{}", self.storage[place].name()))
    }

    /// An identity's folder.
    #[must_use]
    pub fn identity(&self, role: Role, name: &str) -> PathBuf {
        identity_dir(self.dir(), role, name)
    }

    /// The agent on a host.
    pub fn agent(&mut self, host: &str) -> &mut Process {
        self.agents.iter_mut().find(|a| a.name() == host).expect("a host of the plan")
    }

    /// The first host that is another one.
    #[must_use]
    pub fn other_host(&self, host: &str) -> String {
        self.plan.hosts.iter().find(|h| *h != host).expect("two hosts").clone()
    }

    /// A running VM with one dynamic disk, half of it written, known to the coordinator.
    pub async fn vm(&self, name: &str, host: &str, size: u64) -> VmState {
        self.vm_with(name, host, vec![DiskSource::Empty { size, block_size: 1 << 20 }]).await
    }

    /// A running VM with these disks, half of the first one written, known to the coordinator.
    pub async fn vm_with(&self, name: &str, host: &str, disks: Vec<DiskSource>) -> VmState {
        let made = self.lab.create_vm(CreateVm::new(name, host, "Volume1", disks)).await;
        let made = made.expect("the VM is made");
        let half = made.disks[0].size / 2;
        self.lab.guest_write(GuestWrite::at(name, 0, 0, half, 1)).await.expect("written");
        eventually("the VM is known", async || {
            self.operator.vm(name).await.map(|_| ()).map_err(|e| e.to_string())
        })
        .await;
        made
    }

    /// The VM as the simulated cluster sees it.
    pub async fn seen(&self, vm: &str) -> VmState {
        self.lab.vm(vm).await.expect("the VM is there")
    }

    /// The guest writes here and there.
    pub async fn write(&self, vm: &str, bytes: u64, seed: u64) {
        self.lab.guest_write(GuestWrite::scattered(vm, bytes, seed)).await.expect("written");
    }
}

/// Where a member's identity lies in a fabric's folder.
#[must_use]
pub fn identity_dir(dir: &Path, role: Role, name: &str) -> PathBuf {
    dir.join("identities").join(format!("{}-{name}", role.as_str()))
}

/// Waits for a process with one address and gives it.
pub(crate) async fn only_address(process: &mut Process) -> SocketAddr {
    let ready = process.ready().await;
    *ready.addresses.values().next().expect("it listens")
}

/// Waits until each has heard the others: from then on one of them may go.
async fn take_part(coordinators: &mut [Process]) {
    for process in coordinators {
        let address = process.observability().await;
        eventually("the coordinator takes part", async || match http::ask(address, "/readyz") {
            (200, _) => Ok(()),
            (_, why) => Err(why),
        })
        .await;
    }
}

/// Members must know each other's ports before they start: ports are reserved, released, and taken. Somebody else may
/// be quicker; then all begin again with other ports.
async fn start_coordinators(plan: &Plan, fabric: &str, dir: &Path) -> (Vec<Process>, Vec<String>) {
    let mut reason = String::new();
    for _ in 0..5 {
        let addresses = free_ports_at(plan.address, plan.coordinators);
        let ground = Ground { plan, fabric, dir, coordinators: &addresses, realm: REALM };
        let mut started: Vec<Process> = (0..plan.coordinators)
            .map(|place| {
                let config = ground.coordinator(place);
                Process::start("coordinator", &format!("c{}", place + 1), dir, &config)
            })
            .collect();
        let mut failed = None;
        for process in &mut started {
            failed = failed.or(process.try_ready().await.err());
        }
        match failed {
            None => {
                take_part(&mut started).await;
                return (started, addresses);
            }
            Some(why) if why.contains("already in use") => reason = why,
            Some(why) => panic!("{why}"),
        }
        drop(started);
        for place in 1..=plan.coordinators {
            let _ = std::fs::remove_dir_all(dir.join(format!("coordinator-c{place}")));
        }
    }
    panic!("no free ports for coordinators: {reason}")
}

/// Addresses that nobody listens on now.
#[must_use]
pub fn free_ports(count: usize) -> Vec<String> {
    free_ports_at(Ipv4Addr::LOCALHOST.into(), count)
}

fn free_ports_at(address: IpAddr, count: usize) -> Vec<String> {
    let held: Vec<TcpListener> =
        (0..count).map(|_| TcpListener::bind((address, 0)).expect("a port")).collect();
    held.iter().map(|l| l.local_addr().expect("bound").to_string()).collect()
}
