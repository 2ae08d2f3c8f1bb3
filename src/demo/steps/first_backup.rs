//! first-backup: everything allocated of every VM is read, and one point of each exists.

use outrider_proto::rpc;
use serde_json::json;

use super::{Figures, stats_figures, sum};
use crate::demo::stage::Stage;
use crate::output::{bytes, ratio};
use crate::report::Failure;

pub(super) async fn run(stage: &mut Stage) -> Result<Figures, Failure> {
    let jobs = stage.start_backup(None, rpc::BackupKind::Incremental).await?;
    if jobs.len() != stage.vms.len() {
        return Err(Failure::new(format!(
            "the group has {} VMs, but {} jobs were started",
            stage.vms.len(),
            jobs.len()
        )));
    }
    let jobs = stage.finish(&jobs).await?;
    for vm in 0..stage.vms.len() {
        let point_id = stage.vms[vm].points.last().cloned().unwrap_or_default();
        let point = stage.point(vm, &point_id).await?;
        if point.kind() != rpc::BackupKind::Full {
            return Err(Failure::new(format!(
                "the first point of {:?} must be a full one and is {:?}",
                stage.vms[vm].name,
                point.kind()
            )));
        }
        let s = point.stats.unwrap_or_default();
        stage.tell.note(format!(
            "{}: read {}, sent {}, {} known, {} zeros",
            stage.vms[vm].name,
            bytes(s.read_bytes),
            bytes(s.sent_bytes),
            bytes(s.known_bytes),
            bytes(s.zero_bytes)
        ));
    }
    let total = sum(jobs.iter().map(|j| j.stats.as_ref()));
    // The smallest disks are proven here; the points of the later steps are proven in theirs.
    let smallest = stage.by_size(usize::MAX);
    let first = stage.vms[smallest].points[0].clone();
    let compared = stage.verify(smallest, &first).await?;
    stage.tell.note(format!(
        "read {}, sent {} ({} of what was read); {:?} read back from storage: identical",
        bytes(total.read_bytes),
        bytes(total.sent_bytes),
        ratio(total.read_bytes, total.sent_bytes),
        stage.vms[smallest].name
    ));
    let mut figures = stats_figures(&total);
    figures.insert("jobs".into(), json!(jobs.len()));
    figures.insert("compared_bytes".into(), json!(compared));
    Ok(figures)
}
