//! Hosts with shared storage, the VMs on them, and the hand of whoever manages them.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::sockopt::socket_peercred;
use serde_json::json;
use tokio::sync::OnceCell;
use uuid::Uuid;

use crate::error::Error;
use crate::guest::Guest;
use crate::image::{self, Format};
use crate::initramfs;
use crate::install::Installation;
use crate::machine::{Boot, Disk, Machine, Places, Shape};
use crate::network::Network;
use crate::process::Process;
use crate::qmp::Qmp;
use crate::wait::until;

/// QEMU ends within this when it is asked to.
pub(crate) const END: Duration = Duration::from_secs(30);
/// A guest without disks is up and gone within this under KVM, or KVM does not run guests here.
const KVM: Duration = Duration::from_secs(6);

/// What a new VM is made of.
#[derive(Debug, Clone)]
pub struct NewVm {
    /// Its name.
    pub name: String,
    /// The host that it starts on.
    pub host: String,
    /// Size and format of each disk.
    pub disks: Vec<(u64, Format)>,
    /// How disks are written on the command line.
    pub shape: Shape,
    /// Whether it has a port for the guest agent.
    pub agent: bool,
}

/// A VM that runs, and where.
#[derive(Debug)]
pub struct Vm {
    /// Its definition.
    pub machine: Machine,
    /// Its host.
    pub host: String,
    /// The QEMU process.
    pub process: Process,
    /// The cluster manager's monitor.
    pub qmp: Qmp,
    /// The guest.
    pub guest: Guest,
}

impl Vm {
    /// Writes out what QEMU itself holds back (tables of qcow2): others can read the images then.
    ///
    /// # Errors
    /// Of QEMU.
    pub async fn flush(&mut self) -> Result<(), Error> {
        for number in 0..self.machine.disks.len() {
            let line = format!("qemu-io disk{number} flush");
            let arguments = json!({ "command-line": line });
            self.qmp.execute("human-monitor-command", arguments).await?;
        }
        Ok(())
    }
}

/// Hosts, shared storage, VMs.
#[derive(Debug)]
pub struct Cluster {
    boot: Boot,
    shared: PathBuf,
    /// Hosts by name.
    hosts: BTreeMap<String, Places>,
    /// VMs by name. Dropped with the cluster, their processes too.
    vms: BTreeMap<String, Vm>,
    /// Seconds without a word after which a guest turns itself off; 0: never.
    pub idle: u64,
    /// How they are joined, when not by loopback. Dropped last.
    network: Option<Network>,
}

impl Cluster {
    /// Makes hosts below a folder; no VM runs yet.
    ///
    /// # Errors
    /// What goes wrong with files, and [`Error::Missing`] when no guest can be made.
    pub async fn new(
        dir: &Path,
        hosts: &[&str],
        installation: &Installation,
    ) -> Result<Self, Error> {
        Self::joined(dir, hosts, installation, None).await
    }

    /// The same with hosts on a network; without one they share loopback.
    ///
    /// # Errors
    /// The same.
    pub async fn joined(
        dir: &Path,
        hosts: &[&str],
        installation: &Installation,
        network: Option<Network>,
    ) -> Result<Self, Error> {
        let shared = dir.join("shared");
        make(&shared)?;
        let mut places = BTreeMap::new();
        for (number, host) in (2..).zip(hosts) {
            let folder = dir.join("hosts").join(host);
            let (sockets, control) = (folder.join("sockets"), folder.join("control"));
            // The whole of 127/8 is this machine: a host has an address of its own without any right.
            let address = match &network {
                Some(network) => network.address(host)?,
                None => Ipv4Addr::new(127, 0, 77, number).into(),
            };
            let place = Places { address, sockets, control };
            make(&place.sockets)?;
            make(&place.control)?;
            places.insert((*host).to_owned(), place);
        }
        let initramfs = dir.join("initramfs");
        let content = initramfs::build(installation)?;
        std::fs::write(&initramfs, content).map_err(Error::file("writing", &initramfs))?;
        let mut boot = Boot {
            qemu: installation.qemu.clone(),
            accel: "tcg",
            kernel: installation.kernel.clone(),
            initramfs,
        };
        boot.accel = accelerator(&boot, dir).await;
        Ok(Self { boot, shared, hosts: places, vms: BTreeMap::new(), idle: 1800, network })
    }

    /// "kvm" or "tcg".
    #[must_use]
    pub fn accelerator(&self) -> &'static str {
        self.boot.accel
    }

    /// The folder that all hosts see.
    #[must_use]
    pub fn shared(&self) -> &Path {
        &self.shared
    }

    /// Where a host keeps its sockets.
    ///
    /// # Errors
    /// [`Error::Unknown`].
    pub fn places(&self, host: &str) -> Result<&Places, Error> {
        let unknown = || Error::Unknown { kind: "host", name: host.to_owned() };
        self.hosts.get(host).ok_or_else(unknown)
    }

    /// The network that joins the hosts; `None`: loopback.
    #[must_use]
    pub fn network(&self) -> Option<&Network> {
        self.network.as_ref()
    }

    /// A VM that runs.
    ///
    /// # Errors
    /// [`Error::Unknown`].
    pub fn vm(&mut self, name: &str) -> Result<&mut Vm, Error> {
        let unknown = || Error::Unknown { kind: "VM", name: name.to_owned() };
        self.vms.get_mut(name).ok_or_else(unknown)
    }

    /// Names of the VMs that run.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.vms.keys().cloned().collect()
    }

    pub(crate) fn put(&mut self, vm: Vm) {
        self.vms.insert(vm.machine.name.clone(), vm);
    }

    /// Makes the disks of a VM, starts it, and waits until its guest is up.
    ///
    /// # Errors
    /// Of the tools, of QEMU, of the guest.
    pub async fn create(&mut self, new: NewVm) -> Result<&mut Vm, Error> {
        let folder = self.shared.join(&new.name);
        make(&folder)?;
        let mut disks = Vec::new();
        for (number, (size, format)) in new.disks.into_iter().enumerate() {
            let path = folder.join(format!("disk{number}.{}", format.as_str()));
            image::create(&path, format, size)?;
            disks.push(Disk { path, format });
        }
        let machine = Machine {
            name: new.name,
            guid: Uuid::new_v4(),
            disks,
            shape: new.shape,
            agent: new.agent,
            memory: 192,
            idle: self.idle,
        };
        self.start(machine, &new.host).await
    }

    /// Starts a VM on a host, and waits until its guest is up.
    ///
    /// # Errors
    /// Of QEMU, of the guest.
    pub async fn start(&mut self, machine: Machine, host: &str) -> Result<&mut Vm, Error> {
        let name = machine.name.clone();
        let vm = self.launch(machine, host, false).await?;
        let ready = vm.guest.verified().await;
        if let Err(error) = ready {
            return Err(self.explained(&vm, error));
        }
        self.put(vm);
        self.vm(&name)
    }

    /// Starts the process of a VM.
    pub(crate) async fn launch(
        &self,
        machine: Machine,
        host: &str,
        incoming: bool,
    ) -> Result<Vm, Error> {
        let places = self.places(host)?;
        let name = machine.name.clone();
        let mut line = match &self.network {
            Some(network) => network.on(host)?,
            None => Vec::new(),
        };
        line.extend(machine.command_line(&self.boot, places, incoming));
        let guest = Guest::new(&name, &places.steering(&name), &places.said(&name));
        let mut process = Process::start(&line, &places.log(&name))?;
        let monitor = places.monitor(&name);
        let qmp = tokio::select! {
            qmp = Qmp::connect(&name, &monitor) => qmp?,
            ended = process.ended(&name, Duration::from_secs(3600)) => {
                ended?;
                let said = std::fs::read_to_string(places.log(&name)).unwrap_or_default();
                return Err(Error::Gone { vm: name, reason: said.trim().to_owned() });
            }
        };
        Ok(Vm { machine, host: host.to_owned(), process, qmp, guest })
    }

    /// An error of a guest, with the last lines of its console.
    fn explained(&self, vm: &Vm, error: Error) -> Error {
        let Ok(places) = self.places(&vm.host) else { return error };
        let name = &vm.machine.name;
        let console = std::fs::read(places.console(name)).unwrap_or_default();
        let console = String::from_utf8_lossy(&console).into_owned();
        let lines: Vec<&str> = console.lines().collect();
        let tail = lines[lines.len().saturating_sub(20)..].join("\n");
        Error::Gone { vm: name.clone(), reason: format!("{error}; its console ends with:\n{tail}") }
    }

    /// Takes over a VM that an agent started on a host (a restore), with the definition as it should be. Its sockets are
    /// where those of the original were, under its own name.
    ///
    /// # Errors
    /// [`Error::Late`] when it is not there, [`Error::Gone`].
    pub async fn adopt(&mut self, machine: Machine, host: &str) -> Result<&mut Vm, Error> {
        let name = machine.name.clone();
        let places = until(&format!("{name}'s monitor"), END, async || {
            let listens = |p: &&Places| UnixStream::connect(p.monitor(&name)).is_ok();
            Ok(self.hosts.values().find(listens).cloned().ok_or_else(|| "no socket".to_owned()))
        })
        .await?;
        let qmp = Qmp::connect(&name, &places.monitor(&name)).await?;
        let gone = || Error::Gone { vm: name.clone(), reason: "nobody is at its socket".into() };
        let process = Process::adopt(qmp.pid().ok_or_else(gone)?);
        let guest = Guest::everything(&name, &places.steering(&name), &places.said(&name));
        self.put(Vm { machine, host: host.to_owned(), process, qmp, guest });
        self.vm(&name)
    }

    /// SIGKILL to a VM's process; gives its definition, to start it elsewhere.
    ///
    /// # Errors
    /// [`Error::Unknown`].
    pub fn kill(&mut self, name: &str) -> Result<Machine, Error> {
        let unknown = || Error::Unknown { kind: "VM", name: name.to_owned() };
        let mut vm = self.vms.remove(name).ok_or_else(unknown)?;
        vm.process.kill();
        Ok(vm.machine)
    }

    /// SIGKILL to every VM of a host, as when the host loses power; gives their definitions.
    ///
    /// # Errors
    /// [`Error::Unknown`].
    pub fn kill_host(&mut self, host: &str) -> Result<Vec<Machine>, Error> {
        self.places(host)?;
        let here: Vec<String> =
            self.vms.iter().filter(|(_, v)| v.host == host).map(|(n, _)| n.clone()).collect();
        here.iter().map(|name| self.kill(name)).collect()
    }

    /// Lets a VM's guest turn it off; gives its definition.
    ///
    /// # Errors
    /// Of QEMU, of the guest.
    pub async fn shut_down(&mut self, name: &str) -> Result<Machine, Error> {
        let vm = self.vm(name)?;
        vm.guest.stop().await?;
        vm.guest.tell("poweroff").await?;
        vm.process.ended(name, END).await?;
        self.kill(name)
    }

    /// Resets a running VM, as its reset button does, and waits until its guest is up again.
    ///
    /// # Errors
    /// Of QEMU, of the guest.
    pub async fn reset(&mut self, name: &str) -> Result<(), Error> {
        let vm = self.vm(name)?;
        let from = vm.guest.lines().len();
        vm.qmp.execute("system_reset", json!({})).await?;
        vm.guest.says("verified", from).await.map(drop)
    }

    /// What a backup could have left in a VM's QEMU (see [`Qmp::leftovers`]), without bitmaps whose names begin so.
    ///
    /// # Errors
    /// Of QEMU.
    pub async fn leftovers(&mut self, name: &str, bitmaps: &str) -> Result<Vec<String>, Error> {
        let vm = self.vm(name)?;
        let disks: Vec<String> = (0..vm.machine.disks.len()).map(|n| format!("disk{n}")).collect();
        let mut found = vm.qmp.leftovers(&disks).await?;
        let wanted = format!("bitmap {bitmaps}");
        found.retain(|line| bitmaps.is_empty() || !line.starts_with(&wanted));
        Ok(found)
    }
}

/// Nothing outlives a cluster: also VMs that an agent started and nobody adopted.
impl Drop for Cluster {
    fn drop(&mut self) {
        self.vms.clear();
        for places in self.hosts.values() {
            let files = std::fs::read_dir(&places.control).into_iter().flatten().flatten();
            let sockets = files.map(|f| f.path()).filter(|p| p.extension() == Some("qmp".as_ref()));
            for stream in sockets.filter_map(|s| UnixStream::connect(s).ok()) {
                if let Ok(peer) = socket_peercred(&stream) {
                    drop(Process::adopt(peer.pid));
                }
            }
        }
    }
}

fn make(folder: &Path) -> Result<(), Error> {
    std::fs::create_dir_all(folder).map_err(Error::file("making", folder))
}

/// KVM where it runs guests, else software emulation; tried once a process. A device file alone says nothing: there are
/// machines where a guest under KVM never gets anywhere. `OUTRIDER_QEMU_ACCEL` decides instead.
async fn accelerator(boot: &Boot, dir: &Path) -> &'static str {
    static FOUND: OnceCell<&'static str> = OnceCell::const_new();
    match std::env::var("OUTRIDER_QEMU_ACCEL").as_deref() {
        Ok("tcg") => return "tcg",
        Ok("kvm") => return "kvm",
        _ => {}
    }
    *FOUND.get_or_init(|| async { if kvm_works(boot, dir).await { "kvm" } else { "tcg" } }).await
}

async fn kvm_works(boot: &Boot, dir: &Path) -> bool {
    if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        return false;
    }
    let trial = dir.join("trial");
    let address = Ipv4Addr::LOCALHOST.into();
    let places = Places { address, sockets: trial.clone(), control: trial };
    if make(&places.control).is_err() {
        return false;
    }
    let machine = Machine {
        name: "trial".to_owned(),
        guid: Uuid::new_v4(),
        disks: Vec::new(),
        shape: Shape::Blockdev,
        agent: false,
        memory: 192,
        idle: 0,
    };
    let boot = Boot { accel: "kvm", ..boot.clone() };
    let line = machine.command_line(&boot, &places, false);
    let Ok(mut process) = Process::start(&line, &places.log("trial")) else { return false };
    let console = places.console("trial");
    let up = until("a guest under KVM", KVM, async || {
        let said = std::fs::read(&console).unwrap_or_default();
        let up = String::from_utf8_lossy(&said).contains("guest: ready");
        Ok(match (up, process.runs()) {
            (true, _) => Ok(true),
            (false, false) => Ok(false),
            _ => Err("nothing yet".to_owned()),
        })
    });
    matches!(up.await, Ok(true))
}
