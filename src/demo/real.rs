//! The story on real VMs: QEMU instead of the simulated cluster, and guests that keep a journal of what they write.

mod steps;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use outrider_proto::rpc;
use outrider_qemulab::{Cluster, Format, Installation, NewVm, Shape};

use super::configs::{self, HOSTS, Hosts, REALM, RealHost, STORAGE};
use super::outcome::{self, Outcome};
use super::processes::Processes;
use super::stage::{PATIENCE, operator, until};
use super::steps::Figures;
use super::tell::Tell;
use super::{GROUP, gone, note};
use crate::cli::job::failure_of;
use crate::operator::{Follow, Operator, has_succeeded};
use crate::output::bytes;
use crate::report::Failure;

const MIB: u64 = 1 << 20;
/// What guests write before their first backup.
const FIRST: u64 = 24 * MIB;
/// What guests go on writing all the time, bytes a second.
const TRICKLE: u64 = 128 << 10;
/// Reads are slowed, so that there is a middle of a backup for things to happen in.
const READ_RATE: &str = "8 MiB";
/// No job of the story takes longer, emulated guests on a busy machine included.
const JOB: Duration = Duration::from_secs(300);

/// The VMs: name and disks. The sizes are no multiple of anything that a format likes.
const VMS: [(&str, &[(u64, Format)]); 2] = [
    ("web", &[(96 * MIB + 1536, Format::Qcow2)]),
    ("database", &[(80 * MIB + 512, Format::Qcow2), (48 * MIB + 2560, Format::Raw)]),
];

/// Everything that runs.
#[derive(Debug)]
pub(super) struct RealStage {
    pub(super) seed: u64,
    pub(super) tell: Tell,
    pub(super) processes: Processes,
    pub(super) operator: Operator,
    pub(super) cluster: Cluster,
    /// The last recovery point of each VM, and the last sequence that its guest had on disk before that backup began.
    pub(super) points: BTreeMap<String, (String, u64)>,
}

/// Looks for everything that real VMs need; the failure says what to install.
pub(super) fn installation(kernel: Option<&Path>) -> Result<Installation, Failure> {
    Installation::find(kernel).map_err(|missing| {
        Failure::refused(missing.to_string())
            .hint("Without it, `outrider demo` plays the story on a simulated cluster.")
    })
}

/// Plays it. What was started stays in `slot`, however this ends.
pub(super) async fn story(
    dir: &Path,
    seed: u64,
    tell: Tell,
    installation: &Installation,
    outcome: &mut Outcome,
    slot: &mut Option<RealStage>,
) -> Result<(), Failure> {
    let began = Instant::now();
    let set = Box::pin(raise(dir, seed, tell, installation, slot)).await;
    let stage = note(outcome, "setup", began, set.map(|stage| (stage, Figures::new())))?;
    let mut fatal = stage.processes.fatal();
    for step in steps::STORY {
        tell.step(step.title);
        let began = Instant::now();
        let result = tokio::select! {
            result = (step.run)(stage) => result,
            dead = gone(&mut fatal) => Err(dead),
        };
        note(outcome, step.name, began, result.map(|figures| ((), figures)))?;
    }
    for name in stage.cluster.names() {
        let host = stage.cluster.vm(&name)?.host.clone();
        let key = stage.key(&name)?;
        outcome.vms.push(outcome::vm_row(&stage.operator, &key, name, host).await?);
    }
    outcome.storage = outcome::storage_rows(&stage.operator).await?;
    outcome.processes = stage.processes.all();
    Ok(())
}

async fn raise<'a>(
    dir: &Path,
    seed: u64,
    tell: Tell,
    installation: &Installation,
    slot: &'a mut Option<RealStage>,
) -> Result<&'a mut RealStage, Failure> {
    let mut cluster = Cluster::new(dir, &HOSTS, installation).await?;
    let emulated = match cluster.accelerator() {
        "kvm" => "with KVM",
        _ => "by software emulation, since no guest gets anywhere with KVM here",
    };
    tell.note(format!("{} runs guests {emulated}", installation.version));
    if installation.agent.is_none() {
        tell.note("no qemu-ga was found for the guests: recovery points will be crash-consistent");
    }
    let images = cluster.shared().join("restored");
    std::fs::create_dir_all(&images)?;
    let mut hosts: BTreeMap<&str, RealHost> = BTreeMap::new();
    for host in HOSTS {
        let sockets = cluster.places(host)?.sockets.clone();
        let images: PathBuf = images.clone();
        hosts.insert(host, RealHost { sockets, images, max_read_rate: READ_RATE });
    }
    let configs = configs::write(dir, seed, &Hosts::Real(hosts))?;
    let mut processes = Processes::new(dir, false, tell)?;
    let mut specs = configs.coordinator_specs.clone();
    specs.extend(configs.storage_specs.clone());
    specs.extend(configs.node_specs.clone());
    let started = processes.start(specs).await;
    for (index, (name, disks)) in VMS.iter().enumerate() {
        let new = NewVm {
            name: (*name).to_owned(),
            host: HOSTS[index % HOSTS.len()].to_owned(),
            disks: disks.to_vec(),
            shape: if index == 0 { Shape::Blockdev } else { Shape::Json },
            agent: installation.agent.is_some(),
        };
        let vm = cluster.create(new).await?;
        vm.guest.write(seed.wrapping_add(index as u64), FIRST).await?;
        vm.guest.write_at(seed.wrapping_add(index as u64), TRICKLE).await?;
        tell.note(format!(
            "VM {name:?} with {} disks booted on {}; its guest wrote {} and goes on writing",
            disks.len(),
            vm.host,
            bytes(FIRST)
        ));
    }
    let operator = operator(&configs)?;
    let points = BTreeMap::new();
    let stage = slot.insert(RealStage { seed, tell, processes, operator, cluster, points });
    started?;
    stage.settle().await?;
    Ok(stage)
}

impl RealStage {
    /// Waits until the fabric is whole, and makes the protection group.
    async fn settle(&mut self) -> Result<(), Failure> {
        until("three storage nodes, three hosts and all VMs in sight", PATIENCE, async || {
            let s = self.operator.status().await?;
            let serving =
                s.storage.iter().filter(|n| n.node.as_ref().is_some_and(|n| n.online)).count();
            let (hosts, vms) = (s.hosts_up as usize, s.vms as usize);
            let layout = s.layout.as_ref().is_some_and(|l| l.epoch > 0);
            let whole = serving == STORAGE.len() && hosts == HOSTS.len() && vms >= VMS.len();
            let seen =
                format!("{serving} storage nodes, {hosts} hosts, {vms} VMs, layout {layout}");
            Ok(if layout && whole { Ok(()) } else { Err(seen) })
        })
        .await?;
        let request = rpc::CreateGroupRequest {
            name: GROUP.into(),
            vms: self.cluster.names().iter().map(|n| self.key(n)).collect::<Result<_, _>>()?,
            name_patterns: vec![],
            policy: Some(rpc::Policy::default()),
        };
        self.operator.create_group(request).await?;
        Ok(())
    }

    /// The VM's key as the coordinators know it.
    fn key(&mut self, vm: &str) -> Result<String, Failure> {
        let guid = self.cluster.vm(vm)?.machine.guid.to_string();
        let role = rpc::VmRole::Primary.into();
        Ok(crate::cli::view::vm_key(Some(&rpc::VmKey { realm: REALM.into(), guid, role })))
    }

    /// Asks for a backup of a VM, or of the group.
    async fn start_backup(
        &mut self,
        vm: Option<&str>,
        kind: rpc::BackupKind,
    ) -> Result<Vec<rpc::Job>, Failure> {
        let names = match vm {
            Some(name) => vec![name.to_owned()],
            None => self.cluster.names(),
        };
        let (vm, group) = match vm {
            Some(name) => (self.key(name)?, String::new()),
            None => (String::new(), GROUP.to_owned()),
        };
        for name in names {
            let on_disk = self.cluster.vm(&name)?.guest.last_committed();
            self.points.entry(name).or_default().1 = on_disk;
        }
        let request = rpc::RunBackupRequest { vm, group, kind: kind.into() };
        Ok(self.operator.run_backup(request).await?)
    }

    /// Waits for jobs, notes their points, and fails unless all succeeded and left their hosts clean.
    async fn finish(&mut self, jobs: &[rpc::Job]) -> Result<Vec<rpc::Job>, Failure> {
        let ids: Vec<_> = jobs.iter().map(|j| j.job_id.clone()).collect();
        let watch = self.operator.watch(&ids, |_| Follow::On);
        let ended = tokio::time::timeout(JOB, watch)
            .await
            .map_err(|_| Failure::new(format!("jobs did not end within {} s", JOB.as_secs())))??;
        for job in &ended {
            let clean = job.kind != "backup" || (job.data_safe && job.host_clean);
            if !has_succeeded(job) || !clean {
                return Err(failure_of(job).because(format!(
                    "data safe: {}, host clean: {}",
                    job.data_safe, job.host_clean
                )));
            }
            if job.kind == "backup" {
                self.points.entry(job.vm_name.clone()).or_default().0.clone_from(&job.point_id);
            }
        }
        Ok(ended)
    }

    /// Waits until a running job has read so much.
    async fn has_read(&self, job: &rpc::Job, least: u64) -> Result<(), Failure> {
        let request = rpc::ListJobsRequest { job_id: job.job_id.clone(), ..Default::default() };
        until("the backup is in its middle", PATIENCE, async || {
            let now = self.operator.jobs(request.clone()).await?.into_iter().next();
            let now = now.ok_or_else(|| Failure::new("the job is not listed"))?;
            let read = now.stats.unwrap_or_default().read_bytes;
            Ok(if read >= least || now.ended_unix_ms != 0 {
                Ok(())
            } else {
                Err(format!("{} read, {} {}", bytes(read), now.state, now.reason))
            })
        })
        .await
    }
}
