//! How far a restore is, in a file beside what it writes: whoever continues after a crash reads it, and so can a person.
//!
//! It is there from before the first byte until the VM is made. A folder without it is nobody's business of ours.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use outrider_proto::ids::{JobId, PointId, VmGuid};
use outrider_proto::manifest::ClusterGroup;
use serde::{Deserialize, Serialize};

use crate::hypervisor::NewVm;
use crate::job::JobError;

/// Name of the file in the folder of the restored VM.
pub(crate) const TRAIL: &str = "outrider-restore.json";
/// Folder, below the restored VM's, for the definition of a VM that it replaces.
pub(super) const REPLACED: &str = "Replaced VM";

/// The content of the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Trail {
    /// The job: another one never touches this folder.
    pub(super) job: JobId,
    /// The recovery point.
    pub(super) point: PointId,
    /// Disk files that are whole.
    pub(super) disks: Vec<String>,
    /// Set before the VM that is replaced is turned off.
    #[serde(default)]
    pub(super) stopped: Option<Stopped>,
    /// Set before the VM that is replaced is removed.
    pub(super) replaced: Option<Replaced>,
    /// The restored VM, once it is real.
    pub(super) made: Option<VmGuid>,
}

/// A VM that is turned off to be replaced, as it was before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stopped {
    pub(super) vm: VmGuid,
    /// It ran.
    pub(super) ran: bool,
}

/// A VM that a restored one takes the place of: enough to bring it back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Replaced {
    pub(super) vm: VmGuid,
    pub(super) name: String,
    /// Copy of its definition.
    pub(super) definition: Option<PathBuf>,
    /// Folder that its definition was in.
    pub(super) folder: PathBuf,
    /// Its disks by slot.
    pub(super) disks: Vec<(String, PathBuf)>,
    /// Those of its files whose very disk the recovery point holds, too. Only they go once the restored VM is there.
    #[serde(default)]
    pub(super) restored: Vec<PathBuf>,
    pub(super) group: Option<ClusterGroup>,
    /// It ran before.
    pub(super) ran: bool,
}

impl Replaced {
    /// The new VM, clustered as the one that it replaces was.
    pub(super) fn successor(&self, new: NewVm) -> NewVm {
        NewVm {
            clustered: new.clustered || self.group.is_some(),
            group: self.group.clone().or(new.group.clone()),
            ..new
        }
    }
}

impl Trail {
    pub(super) fn new(job: JobId, point: PointId) -> Self {
        Self { job, point, disks: Vec::new(), stopped: None, replaced: None, made: None }
    }

    /// The trail in a folder, if it is of this job.
    ///
    /// # Errors
    /// A file that is there and cannot be read: it may be the one that says which VM was removed.
    pub(super) fn find(folder: &Path, job: JobId) -> Result<Option<Self>, JobError> {
        let path = folder.join(TRAIL);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            Err(e) => return Err(JobError::file("read", &path)(e)),
        };
        // Of another version of the product, perhaps; then of another job.
        let trail: Option<Self> = serde_json::from_slice(&text).ok();
        Ok(trail.filter(|trail| trail.job == job))
    }

    /// As [`Trail::save`], elsewhere.
    pub(super) async fn keep(&self, folder: &Path) -> Result<(), JobError> {
        let (trail, folder) = (self.clone(), folder.to_owned());
        super::blocking(move || trail.save(&folder)).await?
    }

    /// Writes it, durably. Blocks.
    pub(super) fn save(&self, folder: &Path) -> Result<(), JobError> {
        let path = folder.join(TRAIL);
        let failed = |e: std::io::Error| JobError::file("write", &path)(e);
        let text = serde_json::to_vec_pretty(self).map_err(|e| failed(e.into()))?;
        outrider_process::fs::write_atomic(&path, &text)
            .map_err(|e| failed(std::io::Error::other(e)))
    }

    /// The restore is over.
    pub(super) async fn remove(folder: &Path) {
        let file = folder.join(TRAIL);
        super::blocking(move || super::remove_file(&file)).await.ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_trail_reads_back_and_is_of_one_job_only() {
        let dir = tempfile::tempdir().expect("a folder");
        let job = JobId::random();
        let mut trail = Trail::new(job, PointId::random());
        trail.disks.push("os.vhdx".into());
        trail.stopped = Some(Stopped { vm: VmGuid::random(), ran: true });
        trail.replaced = Some(Replaced {
            vm: VmGuid::random(),
            name: "웹".into(),
            definition: Some("a.vmcx".into()),
            folder: "old".into(),
            disks: vec![("0/0".into(), "old/os.vhdx".into())],
            restored: vec!["old/os.vhdx".into()],
            group: Some(ClusterGroup::default()),
            ran: true,
        });
        trail.save(dir.path()).expect("written");
        let found = |job| Trail::find(dir.path(), job).expect("readable");
        assert_eq!(found(job), Some(trail));
        assert_eq!(found(JobId::random()), None);
        Trail::remove(dir.path()).await;
        assert_eq!(found(job), None);
    }
}
