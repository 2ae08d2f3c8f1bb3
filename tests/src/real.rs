//! The same fabric with real VMs: QEMU instead of the simulated cluster, the same agents, coordinators and storage nodes.

use std::path::{Path, PathBuf};

use outrider_proto::rpc::{self, BackupKind};
use outrider_qemulab::{
    Cluster, Disk, Format, Installation, Machine, Network, NewVm, Shape, Verdict, image,
};

use tokio::sync::{Semaphore, SemaphorePermit};

use crate::binary::Program;
use crate::config::RealHost;
use crate::eventually;
use crate::fabric::{Core, Folder, MIB, Plan, settled};
use crate::operator::Operator;
use crate::process::Process;

/// What real VMs need, or a loud word and `None`. In CI something that is missing is a failure.
#[must_use]
pub fn installation() -> Option<Installation> {
    match Installation::find(None) {
        Ok(found) => Some(found),
        Err(missing) => {
            assert!(std::env::var_os("OUTRIDER_CI").is_none(), "{missing}");
            println!("SKIPPED: {missing}");
            None
        }
    }
}

/// A fabric over real VMs.
pub struct RealFabric {
    /// Coordinators.
    pub coordinators: Vec<Process>,
    /// Storage nodes.
    pub storage: Vec<Process>,
    /// Agents, in the order of the plan's hosts.
    pub agents: Vec<Process>,
    /// The operator.
    pub operator: Operator,
    /// Hosts and VMs. Dropped after the agents: they see their VMs to the end.
    pub cluster: Cluster,
    /// What it was made of.
    pub plan: Plan,
    // Dropped last: the processes are gone by then.
    folder: Folder,
    _turn: SemaphorePermit<'static>,
}

/// Emulated machines need a processor each: so many fabrics of a test process run at the same time.
static TURNS: Semaphore = Semaphore::const_new(2);

/// Bytes of a VM's disks at one moment.
#[derive(Debug)]
pub struct Truth(Vec<PathBuf>);

impl RealFabric {
    /// Starts a backup and waits until it reads.
    pub async fn in_the_middle(&self, vm: &str, kind: BackupKind) -> rpc::Job {
        let job = self.operator.backup(vm, kind).await;
        eventually("the backup is in its middle", async || {
            let now = self.operator.job(&job.job_id).await.map_err(|e| e.to_string())?;
            assert_eq!(now.ended_unix_ms, 0, "it was to last: {now:?}");
            let read = now.stats.unwrap_or_default().read_bytes;
            if read >= 4 * MIB { Ok(now) } else { Err(format!("{read} bytes read: {now:?}")) }
        })
        .await
    }

    /// Starts everything with each host in a network namespace of its own, where that is permitted; else, loudly, on
    /// loopback.
    pub async fn start_apart(plan: Plan, installation: &Installation, more: &str) -> Self {
        let hosts: Vec<&str> = plan.hosts.iter().map(String::as_str).collect();
        let network = match Network::new(&hosts) {
            Ok(network) => Some(network),
            Err(reason) => {
                println!("ON LOOPBACK: hosts cannot have namespaces here: {reason}");
                None
            }
        };
        let address = network.as_ref().map_or(plan.address, |n| n.outside);
        Self::start_on(Plan { address, ..plan }, installation, more, network).await
    }

    /// Starts everything; `more` are further settings of `[qemu]` in every agent's configuration.
    pub async fn start(plan: Plan, installation: &Installation, more: &str) -> Self {
        Self::start_on(plan, installation, more, None).await
    }

    async fn start_on(
        plan: Plan,
        installation: &Installation,
        more: &str,
        network: Option<Network>,
    ) -> Self {
        let turn = TURNS.acquire().await.expect("never closed");
        let core = Core::start(&plan).await;
        let hosts: Vec<&str> = plan.hosts.iter().map(String::as_str).collect();
        let cluster =
            Cluster::joined(core.dir(), &hosts, installation, network).await.expect("a cluster");
        println!("{}, {}", installation.version, cluster.accelerator());
        let images = cluster.shared().join("restored");
        std::fs::create_dir_all(&images).expect("a folder");
        let ground = core.ground(&plan);
        let mut agents: Vec<Process> = hosts
            .iter()
            .map(|host| {
                let sockets = &cluster.places(host).expect("a host").sockets;
                let real = RealHost { sockets, images: &images, more };
                let config = ground.node_with_qemu(host, &real);
                let runner = cluster.network().map(|n| n.on(host).expect("a host"));
                let program = Program::native().behind(runner.unwrap_or_default());
                Process::start_with(program, "node", host, core.dir(), &config)
            })
            .collect();
        for agent in &mut agents {
            agent.ready().await;
        }
        let Core { coordinators, storage, operator, folder, .. } = core;
        settled(&operator, &plan).await;
        Self { coordinators, storage, agents, operator, cluster, plan, folder, _turn: turn }
    }

    /// The fabric's folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.folder.path()
    }

    /// The agent on a host.
    pub fn agent(&mut self, host: &str) -> &mut Process {
        self.agents.iter_mut().find(|a| a.name() == host).expect("a host of the plan")
    }

    /// A running VM with a qcow2 and a raw disk of odd sizes, known to the coordinators. It has no guest agent: freezing
    /// a file system writes to it, so only the disks of a guest that is left alone can be compared byte by byte.
    pub async fn vm(&mut self, name: &str, host: &str, shape: Shape) {
        self.vm_with(NewVm {
            name: name.to_owned(),
            host: host.to_owned(),
            disks: vec![(48 * MIB + 1536, Format::Qcow2), (33 * MIB + 512, Format::Raw)],
            shape,
            agent: false,
        })
        .await;
    }

    /// A running VM, known to the coordinators.
    pub async fn vm_with(&mut self, new: NewVm) {
        let (name, host) = (new.name.clone(), new.host.clone());
        self.cluster.create(new).await.expect("it boots");
        self.known(&name, &host).await;
    }

    /// Waits until the coordinators know where a VM is.
    pub async fn known(&self, name: &str, host: &str) {
        eventually(&format!("{name} is known on {host}"), async || {
            let vm = self.operator.vm(name).await.map_err(|e| e.to_string())?;
            if vm.host == host { Ok(()) } else { Err(format!("{vm:?}")) }
        })
        .await;
    }

    /// Copies a VM's disks as they are now; its guest must not be writing.
    pub async fn truth(&mut self, name: &str) -> Truth {
        let folder = self.dir().join("truth");
        std::fs::create_dir_all(&folder).expect("a folder");
        let taken = std::fs::read_dir(&folder).expect("a folder").count();
        let vm = self.cluster.vm(name).expect("it runs");
        vm.flush().await.expect("flushed");
        let machine = vm.machine.clone();
        let copy = |(number, disk): (usize, &Disk)| {
            let to = folder.join(format!("{name}-{taken}-{number}"));
            image::snapshot(&disk.path, disk.format, &to).expect("copied");
            to
        };
        Truth(machine.disks.iter().enumerate().map(copy).collect())
    }

    /// Backs a VM up whose guest does not write, and gives the point with the bytes of its checkpoint.
    pub async fn backed_up_at_rest(&mut self, name: &str, kind: BackupKind) -> (rpc::Point, Truth) {
        // Writes out what a boot left in memory, too.
        self.cluster.vm(name).expect("it runs").guest.stop().await.expect("it stops");
        let before = self.truth(name).await;
        let point = self.operator.backed_up(name, kind).await;
        let after = self.truth(name).await;
        // If nobody wrote meanwhile, both are the checkpoint.
        for (a, b) in before.0.iter().zip(&after.0) {
            let differs = image::compare((a, Format::Raw), (b, Format::Raw)).expect("compared");
            assert_eq!(differs, None, "the guest was to be at rest");
        }
        (point, after)
    }

    /// Restores a point as a new VM on a host and gives it as it is defined; it is started when asked.
    pub async fn restored(&self, point: &rpc::Point, host: &str, start: bool) -> Machine {
        let name = format!("restored-{}", &point.point_id[..8]);
        let request = rpc::RestoreRequest {
            point_id: point.point_id.clone(),
            to_host: host.to_owned(),
            new_name: name.clone(),
            power_on: start,
            ..Default::default()
        };
        let job = self.operator.restore(request).await.expect("the restore starts");
        let job = self.operator.ended(&job.job_id).await;
        assert!(job.state.starts_with("completed") && job.error_code.is_empty(), "{job:?}");
        let sockets = &self.cluster.places(host).expect("a host").sockets;
        let definition = std::fs::read(sockets.join(format!("{name}.json"))).expect("defined");
        let definition: serde_json::Value = serde_json::from_slice(&definition).expect("JSON");
        let disk = |d: &serde_json::Value| Disk {
            path: d["path"].as_str().expect("a path").into(),
            format: if d["format"] == "qcow2" { Format::Qcow2 } else { Format::Raw },
        };
        let disks = definition["disks"].as_array().expect("disks").iter().map(disk).collect();
        let guid = definition["uuid"].as_str().and_then(|u| u.parse().ok()).expect("a UUID");
        let (shape, agent) = (Shape::Blockdev, true);
        Machine { name, guid, disks, shape, agent, memory: 192, idle: 0 }
    }

    /// Restores a point as a VM that stays off, and compares its disks with the bytes of the checkpoint.
    pub async fn assert_restores_exactly(&self, point: &rpc::Point, truth: &Truth, host: &str) {
        let machine = self.restored(point, host, false).await;
        assert_eq!(machine.disks.len(), truth.0.len(), "{machine:?}");
        for (disk, truth) in machine.disks.iter().zip(&truth.0) {
            let pair = ((disk.path.as_path(), disk.format), (truth.as_path(), Format::Raw));
            let differs = image::compare(pair.0, pair.1).expect("compared");
            assert_eq!(differs, None, "{}", disk.path.display());
            std::fs::remove_file(&disk.path).expect("removed");
        }
        let sockets = &self.cluster.places(host).expect("a host").sockets;
        std::fs::remove_file(sockets.join(format!("{}.json", machine.name))).expect("removed");
    }

    /// Restores a point as a new VM, boots it, and gives what its guest says about its journal. Its file systems are
    /// sound by `e2fsck` before. The VM is gone afterwards.
    pub async fn boots(&mut self, point: &rpc::Point, host: &str) -> (Vec<String>, Verdict) {
        let sound = self.restored(point, host, false).await;
        for disk in &sound.disks {
            let scratch = self.dir().join("fsck");
            let unsound = image::check_file_system(&disk.path, disk.format, &scratch);
            assert_eq!(unsound.expect("checked"), None, "{}", disk.path.display());
        }
        // Through the product: the agent starts what it has defined, by the definition that it has written.
        self.forget(&sound, host);
        let machine = self.restored(point, host, true).await;
        let vm = self.cluster.adopt(machine.clone(), host).await.expect("it runs");
        let ready = vm.guest.ready().await.expect("it boots");
        let verdict = vm.guest.verified().await.expect("it checks its journal");
        self.cluster.kill(&machine.name).expect("it runs");
        self.forget(&machine, host);
        (ready.file_systems, verdict)
    }

    fn forget(&self, machine: &Machine, host: &str) {
        let sockets = &self.cluster.places(host).expect("a host").sockets;
        std::fs::remove_file(sockets.join(format!("{}.json", machine.name))).expect("removed");
        for disk in &machine.disks {
            std::fs::remove_file(&disk.path).expect("removed");
        }
    }

    /// Nothing of a backup is left in a VM's QEMU but one recording bitmap a disk, that of the bound reference point; no
    /// duty is open, no scratch file is left.
    pub async fn assert_clean(&mut self, name: &str) {
        let known = self.operator.vm(name).await.expect("the VM is known");
        let bound = known.bound_reference_point.to_lowercase().replace('-', "");
        let disks = self.cluster.vm(name).expect("it runs").machine.disks.len();
        let left = self.cluster.leftovers(name, "").await.expect("asked");
        assert_eq!(left.len(), disks, "one bitmap a disk and nothing else: {left:?}");
        for line in &left {
            let good = line.starts_with("bitmap outrider-") && !line.ends_with("inconsistent");
            assert!(good, "{left:?}");
            let id = line.split(' ').nth(1).and_then(|n| n.rsplit('-').next()).unwrap_or_default();
            assert!(bound.contains(id), "bound is {bound:?}, QEMU has {left:?}");
        }
        eventually("no duty is open", async || {
            let status = self.operator.status().await.map_err(|e| e.to_string())?;
            match status.open_duties {
                0 => Ok(()),
                n => Err(format!("{n} open duties")),
            }
        })
        .await;
    }
}
