//! The checkpoint's disks, opened, with what their own files tell of them.

use std::path::Path;
use std::sync::Arc;

use outrider_disk::{DiskFormat, DiskKind, ReadDisk};
use outrider_proto::ids::DiskId;
use outrider_proto::journal::JournalStart;
use outrider_proto::manifest::ImageFormat;

use crate::hypervisor::FrozenDisk;
use crate::job::base::DiskFacts;
use crate::job::{JobContext, JobError};
use crate::source::SourceDisk;

/// An open disk with its facts.
pub(in crate::job) struct SourceFacts {
    pub(in crate::job) facts: DiskFacts,
    pub(in crate::job) file_name: String,
    pub(in crate::job) logical_sector: u32,
    pub(in crate::job) physical_sector: u32,
    pub(in crate::job) block_size: u32,
    pub(in crate::job) fixed: bool,
    pub(in crate::job) format: ImageFormat,
    pub(in crate::job) path: std::path::PathBuf,
    pub(in crate::job) disk: Arc<SourceDisk>,
}

pub(in crate::job) async fn open_disks(
    context: &JobContext,
    frozen: Vec<FrozenDisk>,
) -> Result<Vec<SourceFacts>, JobError> {
    let mut disks = Vec::with_capacity(frozen.len());
    for disk in frozen {
        let (sources, path) = (context.sources.clone(), disk.path.clone());
        let source = context.pool.read(0, move || sources.open(&path)).await?.0?;
        let info = source.info().clone();
        // The base names the disk; a frozen leaf may be a user checkpoint's file.
        let base = source.files().last().cloned().unwrap_or_else(|| disk.path.clone());
        disks.push(SourceFacts {
            facts: DiskFacts { disk: DiskId(info.disk_id), size: info.size, slot: disk.slot },
            file_name: file_name(&base),
            logical_sector: info.logical_sector,
            physical_sector: info.physical_sector,
            block_size: info.block_size,
            fixed: info.kind == DiskKind::Fixed,
            format: match info.format {
                DiskFormat::Vhdx => ImageFormat::Vhdx,
                DiskFormat::Vhd => ImageFormat::Vhd,
                DiskFormat::Raw => ImageFormat::Raw,
            },
            path: disk.path,
            disk: Arc::new(source),
        });
    }
    Ok(disks)
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Whether a journal was begun on these disks.
pub(super) fn same_disks(start: &JournalStart, disks: &[SourceFacts]) -> bool {
    start.disks.len() == disks.len()
        && start
            .disks
            .iter()
            .zip(disks)
            .all(|(j, d)| j.disk_id == d.facts.disk && j.size == d.facts.size)
}
