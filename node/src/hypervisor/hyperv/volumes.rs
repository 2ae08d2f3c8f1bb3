//! The volumes of disks: free space, and how this host reaches them (facts, section 6).

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::HyperV;
use crate::hypervisor::DiskSeen;
use crate::hypervisor::error::HypervisorError;
use crate::hypervisor::facts::{Access, Format, Volume};

/// How each Cluster Shared Volume is usually reached from here. Volumes on ReFS and Storage Spaces Direct are always
/// redirected; one that was reached directly since this process began is not one of them.
#[derive(Default)]
pub(super) struct UsualAccess(Mutex<HashMap<PathBuf, Access>>);

impl UsualAccess {
    /// Notes how a volume is reached now; gives how it usually is.
    fn observe(&self, volume: &Path, now: Access) -> Access {
        let mut usual = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = usual.get(volume).copied();
        match (known, now) {
            (_, Access::Direct) | (None, Access::Redirected) => {
                usual.insert(volume.to_owned(), now);
                now
            }
            (known, _) => known.unwrap_or_default(),
        }
    }
}

/// A Cluster Shared Volume.
pub(super) struct Csv {
    pub(super) folder: PathBuf,
    access: Access,
    usual: Access,
}

impl HyperV {
    /// The Cluster Shared Volumes, each noted in [`UsualAccess`].
    pub(super) async fn csvs(&self) -> Result<Vec<Csv>, HypervisorError> {
        let doing = "look at the cluster's shared volumes";
        let all = self.cluster_query(doing, "SELECT * FROM MSCluster_ClusterSharedVolume").await?;
        let csv = |o: &outrider_wmi::Object| {
            let folder = PathBuf::from(o.str("Name")?);
            let access = Access::of(o.u64("FaultState"));
            let usual = self.usual.observe(&folder, access);
            Some(Csv { folder, access, usual })
        };
        Ok(all.iter().filter_map(csv).collect())
    }

    /// The volumes of a VM's disks, each with the bytes of those disks that a checkpoint freezes. A volume whose free
    /// space is not told is left out: it is not held against the VM.
    pub(super) async fn volumes_of(
        &self,
        disks: &[DiskSeen],
    ) -> Result<Vec<Volume>, HypervisorError> {
        let free = self.shared_volumes().await.unwrap_or_default();
        let csvs = self.csvs().await?;
        let mut found: Vec<Volume> = Vec::new();
        for disk in disks.iter().filter(|d| d.uncapturable.is_none() && d.format != Format::Device)
        {
            let Some(folder) = Path::new(&disk.path).parent() else { continue };
            let on = |root: &Path| folder.starts_with(root);
            let csv = csvs.iter().filter(|c| on(&c.folder)).max_by_key(|c| depth(&c.folder));
            let shared = free.iter().filter(|(root, _)| on(root)).max_by_key(|(r, _)| depth(r));
            let (place, bytes) = match shared {
                Some((root, free)) => (root.clone(), *free),
                None => match free_at(folder.to_owned()).await {
                    Some(free) => (folder.to_owned(), free),
                    None => continue,
                },
            };
            let place = csv.map_or(place, |c| c.folder.clone());
            match found.iter_mut().find(|v| v.folder == place) {
                Some(volume) => volume.disk_bytes = volume.disk_bytes.saturating_add(disk.size),
                None => found.push(Volume {
                    folder: place,
                    free: bytes,
                    disk_bytes: disk.size,
                    access: csv.map(|c| c.access).unwrap_or_default(),
                    usual: csv.map(|c| c.usual).unwrap_or_default(),
                }),
            }
        }
        Ok(found)
    }
}

fn depth(path: &Path) -> usize {
    path.as_os_str().len()
}

/// Free bytes on the volume of a folder. Asked elsewhere: it may be away.
async fn free_at(folder: PathBuf) -> Option<u64> {
    let ask = move || outrider_process::fs::free_space(existing(&folder)).ok();
    tokio::task::spawn_blocking(ask).await.ok().flatten()
}

/// The nearest folder that exists.
fn existing(folder: &Path) -> &Path {
    folder.ancestors().find(|f| f.exists()).unwrap_or(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Facts 6: what counts is a change from direct to redirected.
    #[test]
    fn a_volume_that_was_never_direct_is_redirected_by_nature() {
        let usual = UsualAccess::default();
        let (a, b) = (Path::new("/a"), Path::new("/b"));
        assert_eq!(usual.observe(a, Access::Redirected), Access::Redirected);
        assert_eq!(usual.observe(a, Access::None), Access::Redirected);
        assert_eq!(usual.observe(b, Access::Direct), Access::Direct);
        assert_eq!(usual.observe(b, Access::Redirected), Access::Direct);
        assert_eq!(usual.observe(a, Access::Direct), Access::Direct, "learnt anew");
        assert_eq!(usual.observe(a, Access::Redirected), Access::Direct);
    }
}
