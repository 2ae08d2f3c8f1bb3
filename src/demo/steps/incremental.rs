//! incremental: sends at most 1.2 times the chunks that really changed, counted from the lab's own copies.

use std::path::PathBuf;

use outrider_disk::{RawDisk, ReadDisk};
use outrider_proto::rpc;
use serde_json::json;

use super::{Figures, stats_figures, sum};
use crate::demo::stage::Stage;
use crate::output::bytes;
use crate::report::Failure;

/// What each guest writes, scattered over its disk.
const WRITES: u64 = 8 << 20;
/// Chunks of the default dedup domain.
const CHUNK: u64 = 256 << 10;
/// Pages and manifest of a point, per disk: they are sent, too, and weigh on very small disks.
const STRUCTURE: u64 = 64 << 10;

pub(super) async fn run(stage: &mut Stage) -> Result<Figures, Failure> {
    let mut written = 0;
    for vm in 0..stage.vms.len() {
        written += stage.guest_writes(vm, WRITES, false, 1 + vm as u64).await?;
    }
    let jobs = stage.start_backup(None, rpc::BackupKind::Incremental).await?;
    let jobs = stage.finish(&jobs).await?;
    let mut changed = 0;
    let mut disks = 0;
    for vm in 0..stage.vms.len() {
        let point_id = stage.vms[vm].points.last().cloned().unwrap_or_default();
        let point = stage.point(vm, &point_id).await?;
        if point.kind() != rpc::BackupKind::Incremental {
            return Err(Failure::new(format!(
                "the second point of {:?} must be an incremental one and is {:?}",
                stage.vms[vm].name,
                point.kind()
            ))
            .because(point.reasons.join("; ")));
        }
        changed += changed_chunks(stage, vm).await?;
        disks += stage.vms[vm].disks.len() as u64;
    }
    let total = sum(jobs.iter().map(|j| j.stats.as_ref()));
    let allowed = changed * CHUNK * 12 / 10 + disks * STRUCTURE;
    stage.tell.note(format!(
        "guests wrote {} in {changed} chunks ({}); read {}, sent {}, {} pages taken from the parent",
        bytes(written),
        bytes(changed * CHUNK),
        bytes(total.read_bytes),
        bytes(total.sent_bytes),
        total.reused_pages
    ));
    if total.sent_bytes > allowed {
        return Err(Failure::new(format!(
            "the incremental sent {}, more than 1.2 x the {changed} chunks that changed",
            bytes(total.sent_bytes)
        )));
    }
    let mut figures = stats_figures(&total);
    figures.insert("written_bytes".into(), json!(written));
    figures.insert("changed_chunks".into(), json!(changed));
    Ok(figures)
}

/// Chunks in which the last two checkpoints of a VM differ, by the lab's copies.
async fn changed_chunks(stage: &Stage, vm: usize) -> Result<u64, Failure> {
    let truths = stage.lab.truth_list(&stage.vms[vm].id()).await?;
    let [.., before, after] = truths.as_slice() else {
        return Err(Failure::new("the lab recorded fewer than two checkpoints"));
    };
    let mut pairs = Vec::new();
    for (a, b) in before.disks.iter().zip(&after.disks) {
        if let (Some(a), Some(b)) = (a.clone(), b.clone()) {
            pairs.push((a, b));
        }
    }
    if pairs.len() != stage.vms[vm].disks.len() {
        return Err(Failure::new("the lab no longer has its copies of the last two checkpoints"));
    }
    tokio::task::spawn_blocking(move || pairs.into_iter().map(differing).sum()).await?
}

fn differing((a, b): (PathBuf, PathBuf)) -> Result<u64, Failure> {
    let (a, b) = (RawDisk::open(&a)?, RawDisk::open(&b)?);
    let size = a.info().size.min(b.info().size);
    let (mut x, mut y) = (vec![0; CHUNK as usize], vec![0; CHUNK as usize]);
    let mut count = 0;
    for range in &a.allocated()?.union(&b.allocated()?).align_out(CHUNK, size) {
        for at in (range.start..range.end()).step_by(CHUNK as usize) {
            let len = CHUNK.min(size - at) as usize;
            a.read_at(at, &mut x[..len])?;
            b.read_at(at, &mut y[..len])?;
            count += u64::from(x[..len] != y[..len]);
        }
    }
    Ok(count)
}
