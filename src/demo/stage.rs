//! The stage that the story plays on: the running fabric, the lab, and what the steps ask of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use outrider_lab::{Comparison, GateSpec, GuestWrite, LabControl, VmState, WaitFor};
use outrider_process::identity::Identity;
use outrider_proto::rpc;
use tokio::time::Instant;
use uuid::Uuid;

use super::configs::Configs;
use super::processes::Processes;
use super::tell::Tell;
use crate::cli::job::failure_of;
use crate::operator::{Follow, Operator, has_ended, has_succeeded};
use crate::report::Failure;
use crate::roles::{What, export_disks};

/// How long anything may take that does not depend on the size of disks.
pub(super) const PATIENCE: Duration = Duration::from_secs(90);
/// What a job must move per second at least before it is called stuck.
const SLOWEST: u64 = 2 << 20;

/// A VM of the story.
#[derive(Debug, Clone)]
pub(super) struct Vm {
    /// Its name.
    pub(super) name: String,
    /// Its GUID, which survives everything.
    pub(super) guid: Uuid,
    /// Its disks, in the order of their slots.
    pub(super) disks: Vec<Disk>,
    /// Files in each disk's chain at the start.
    pub(super) chains: Vec<usize>,
    /// Recovery points in the order they were made.
    pub(super) points: Vec<String>,
}

/// A disk of a VM.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    /// Stem of its restored files.
    pub(super) name: String,
    /// The file that it is a copy of.
    pub(super) source: PathBuf,
    /// Guest-visible bytes.
    pub(super) size: u64,
    /// Where guests write.
    pub(super) window: (u64, u64),
}

impl Vm {
    /// How the lab and the coordinators find it.
    pub(super) fn id(&self) -> String {
        self.guid.to_string()
    }

    /// Bytes of all its disks.
    pub(super) fn size(&self) -> u64 {
        self.disks.iter().map(|d| d.size).sum()
    }
}

/// Everything that runs.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) dir: PathBuf,
    pub(super) seed: u64,
    pub(super) tell: Tell,
    pub(super) processes: Processes,
    pub(super) configs: Configs,
    pub(super) operator: Operator,
    pub(super) lab: Lab,
    pub(super) vms: Vec<Vm>,
}

/// The lab's control client, which has no `Debug` of its own.
pub(super) struct Lab(pub(super) LabControl);

impl std::fmt::Debug for Lab {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Lab")
    }
}

impl std::ops::Deref for Lab {
    type Target = LabControl;
    fn deref(&self) -> &LabControl {
        &self.0
    }
}

/// An operator of the demo's fabric.
pub(super) fn operator(configs: &Configs) -> Result<Operator, Failure> {
    let identity = Arc::new(Identity::load(&configs.operator)?);
    Ok(Operator::new(configs.coordinators.clone(), identity, Duration::from_secs(30)))
}

impl Stage {
    /// A wait that grows with the bytes that are moved.
    pub(super) fn patience(&self, bytes: u64) -> Duration {
        PATIENCE + Duration::from_secs(bytes / SLOWEST)
    }

    /// Asks for a backup of a VM, or of the group.
    pub(super) async fn start_backup(
        &self,
        vm: Option<usize>,
        kind: rpc::BackupKind,
    ) -> Result<Vec<rpc::Job>, Failure> {
        let request = rpc::RunBackupRequest {
            vm: vm.map(|i| self.key(i)).unwrap_or_default(),
            group: if vm.is_none() { super::GROUP.to_owned() } else { String::new() },
            kind: kind.into(),
        };
        Ok(self.operator.run_backup(request).await?)
    }

    /// The VM's key as the coordinators know it.
    pub(super) fn key(&self, vm: usize) -> String {
        let guid = self.vms[vm].id();
        let key = rpc::VmKey {
            realm: super::configs::REALM.into(),
            guid,
            role: rpc::VmRole::Primary.into(),
        };
        crate::cli::view::vm_key(Some(&key))
    }

    /// Waits for jobs, notes their points, and fails unless all succeeded and left their hosts clean.
    pub(super) async fn finish(&mut self, jobs: &[rpc::Job]) -> Result<Vec<rpc::Job>, Failure> {
        let ids: Vec<_> = jobs.iter().map(|j| j.job_id.clone()).collect();
        let patience = self.patience(self.vms.iter().map(Vm::size).sum());
        let watch = self.operator.watch(&ids, |_| Follow::On);
        let Ok(ended) = tokio::time::timeout(patience, watch).await else {
            let now = self
                .operator
                .jobs(rpc::ListJobsRequest { limit: 20, ..Default::default() })
                .await?;
            let stuck = now.into_iter().filter(|j| ids.contains(&j.job_id) && !has_ended(j));
            let failure = Failure::new(format!("jobs did not end within {} s", patience.as_secs()));
            return Err(stuck.fold(failure, |f, j| {
                f.because(format!(
                    "{}: {} {} on {:?} {}",
                    j.vm_name, j.state, j.phase, j.host, j.reason
                ))
            }));
        };
        let ended = ended?;
        for job in &ended {
            if !has_succeeded(job) {
                return Err(failure_of(job));
            }
            if job.kind == "backup" && !(job.data_safe && job.host_clean) {
                return Err(failure_of(job).because(format!(
                    "data safe: {}, host clean: {}",
                    job.data_safe, job.host_clean
                )));
            }
            let guid = job.vm.as_ref().and_then(|v| v.guid.parse::<Uuid>().ok());
            if let Some(vm) = self.vms.iter_mut().find(|v| Some(v.guid) == guid)
                && job.kind == "backup"
            {
                vm.points.push(job.point_id.clone());
            }
        }
        Ok(ended)
    }

    /// A recovery point that must exist.
    pub(super) async fn point(&self, vm: usize, point_id: &str) -> Result<rpc::Point, Failure> {
        let points = self.operator.points(&self.key(vm)).await?;
        points.into_iter().find(|p| p.point_id == point_id).ok_or_else(|| {
            Failure::new(format!(
                "the job reported point {point_id}, but the coordinators do not list it"
            ))
        })
    }

    /// Exports a point from the storage nodes alone and compares every disk with what the lab froze, byte by byte.
    /// Gives the guest bytes compared.
    pub(super) async fn verify(&self, vm: usize, point_id: &str) -> Result<u64, Failure> {
        let to = self.dir.join("exports").join(point_id);
        let files = self.export(vm, point_id, &to).await?;
        let point = self.point(vm, point_id).await?;
        self.compare(vm, &point, &files).await?;
        std::fs::remove_dir_all(&to)?;
        Ok(self.vms[vm].size())
    }

    /// Exports a point's disks, in the order of their slots.
    pub(super) async fn export(
        &self,
        vm: usize,
        point_id: &str,
        to: &Path,
    ) -> Result<Vec<PathBuf>, Failure> {
        let patience = self.patience(self.vms[vm].size());
        let files = tokio::time::timeout(
            patience,
            Box::pin(export_disks(&self.operator, point_id, What::Point, to)),
        )
        .await
        .map_err(|_| {
            Failure::new(format!("the export took longer than {} s", patience.as_secs()))
        })??;
        let wanted = self.vms[vm].disks.len();
        if files.len() != wanted {
            return Err(Failure::new(format!(
                "the point holds {} disks, the VM has {wanted}",
                files.len()
            )));
        }
        Ok(files)
    }

    /// Compares disk files with the truth of a point's checkpoint.
    pub(super) async fn compare(
        &self,
        vm: usize,
        point: &rpc::Point,
        files: &[PathBuf],
    ) -> Result<(), Failure> {
        let checkpoint: Uuid = point.checkpoint_id.parse()?;
        for (place, file) in files.iter().enumerate() {
            let name = &self.vms[vm].name;
            match self.lab.compare_disk(file, checkpoint, place).await? {
                Comparison::Identical => {}
                Comparison::SizeDiffers { expected, found } => {
                    return Err(Failure::new(format!(
                        "disk {place} of {name:?} was {expected} bytes at its checkpoint and came back with {found}"
                    )));
                }
                Comparison::DiffersAt { offset } => {
                    return Err(Failure::new(format!(
                        "disk {place} of {name:?} differs from its checkpoint at byte {offset}"
                    ))
                    .hint(format!("The file compared is {}.", file.display())));
                }
            }
        }
        Ok(())
    }

    /// Lets the guest of a VM write about `bytes`, less on small disks; gives the bytes written.
    pub(super) async fn guest_writes(
        &self,
        vm: usize,
        bytes: u64,
        sequential: bool,
        salt: u64,
    ) -> Result<u64, Failure> {
        let vm = &self.vms[vm];
        let largest = (0..vm.disks.len()).max_by_key(|i| vm.disks[*i].window.1).unwrap_or(0);
        let (start, length) = vm.disks[largest].window;
        let bytes = bytes.min(length / 2).max(4096.min(length));
        let window = Some((start, length));
        let seed = self.seed.wrapping_mul(1_000_003).wrapping_add(salt);
        let write =
            GuestWrite { vm: vm.id(), bytes, seed, disk: Some(largest), window, sequential };
        Ok(self.lab.guest_write(write).await?)
    }

    /// Lets a VM's readers go on for `budget` more bytes and then holds them.
    pub(super) async fn gate(&self, vm: usize, budget: u64) -> Result<u64, Failure> {
        Ok(self.lab.set_gate(GateSpec { vm: self.vms[vm].id(), host: None, budget }).await?)
    }

    /// Waits until a reader is held at the gate, or the jobs ended without ever getting there.
    pub(super) async fn held(&self, gate: u64, jobs: &[rpc::Job]) -> Result<(), Failure> {
        let ids: Vec<_> = jobs.iter().map(|j| j.job_id.clone()).collect();
        tokio::select! {
            held = self.lab.wait(WaitFor::GateBlocked { gate }, PATIENCE) => Ok(held?),
            ended = self.operator.watch(&ids, |_| Follow::On) => {
                let ended = ended?;
                let failed = ended.iter().find(|j| !has_succeeded(j));
                Err(failed.map_or_else(
                    || Failure::new("the job ended before it had read what it was to be held at"),
                    failure_of,
                ))
            }
        }
    }

    /// Bytes that a VM's files were read for, by host, as the lab counted them.
    pub(super) async fn bytes_read(&self, vm: usize) -> Result<u64, Failure> {
        let files = self.lab.bytes_read(Some(&self.vms[vm].id()), None).await?;
        Ok(files.iter().map(|f| f.bytes).sum())
    }

    /// The VM as the lab sees it.
    pub(super) async fn lab_vm(&self, vm: usize) -> Result<VmState, Failure> {
        Ok(self.lab.vm(&self.vms[vm].id()).await?)
    }

    /// A VM by its rank in size, the largest first; the last one stands in where there are fewer.
    pub(super) fn by_size(&self, rank: usize) -> usize {
        let mut order: Vec<usize> = (0..self.vms.len()).collect();
        order.sort_by_key(|i| {
            std::cmp::Reverse(self.vms[*i].disks.iter().map(|d| d.window.1).max())
        });
        order[rank.min(order.len() - 1)]
    }

    /// Asks again until it holds. Coordinators have no event for everything that a story waits for.
    pub(super) async fn until<T, F>(
        &self,
        what: &str,
        patience: Duration,
        ask: F,
    ) -> Result<T, Failure>
    where
        F: AsyncFn() -> Result<Result<T, String>, Failure>,
    {
        until(what, patience, ask).await
    }
}

/// Asks again until it holds. Coordinators have no event for everything that a story waits for.
pub(super) async fn until<T, F>(what: &str, patience: Duration, ask: F) -> Result<T, Failure>
where
    F: AsyncFn() -> Result<Result<T, String>, Failure>,
{
    let deadline = Instant::now() + patience;
    loop {
        let now = match ask().await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(instead)) => instead,
            Err(failure) => failure.to_string(),
        };
        if Instant::now() >= deadline {
            return Err(Failure::new(format!("waited {} s in vain: {what}", patience.as_secs()))
                .because(now));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
