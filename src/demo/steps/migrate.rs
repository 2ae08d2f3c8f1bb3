//! migrate-mid-backup: held at half by the lab, migrated with its checkpoint, finished by the new host.

use outrider_lab::{MigrationKind, WaitFor};
use outrider_proto::rpc;
use serde_json::json;

use super::{Figures, stats_figures};
use crate::demo::configs::HOSTS;
use crate::demo::stage::{PATIENCE, Stage};
use crate::output::bytes;
use crate::report::Failure;

const MIB: u64 = 1 << 20;
/// New data, so that there is something to send a second time, if anything were.
const WRITES: u64 = 384 * MIB;
/// With so much to read, leaf pages are finished at half, and the new host must take them over.
const ADOPTED_FROM: u64 = 320 * MIB;
/// Promise 3 in figures.
const MOST_RESENT: u64 = 64 * MIB;
const MOST_REREAD: u64 = 256 * MIB;

pub(super) async fn run(stage: &mut Stage) -> Result<Figures, Failure> {
    let vm = stage.by_size(0);
    let name = stage.vms[vm].name.clone();
    let written = stage.guest_writes(vm, WRITES, true, 100).await?;
    let from = stage.lab_vm(vm).await?.host;
    let to = HOSTS.iter().find(|h| **h != from).copied().unwrap_or(HOSTS[0]);
    let counted_before = stage.bytes_read(vm).await?;

    let gate = stage.gate(vm, written / 2).await?;
    let jobs = stage.start_backup(Some(vm), rpc::BackupKind::Incremental).await?;
    stage.held(gate, &jobs).await?;
    stage
        .tell
        .note(format!("{name} wrote {}; its backup on {from} is held at half", bytes(written)));
    let checkpoints = stage.lab_vm(vm).await?.recovery_checkpoints().count();
    if checkpoints != 1 {
        return Err(Failure::new(format!(
            "{name:?} has {checkpoints} recovery checkpoints in mid-backup, not one"
        )));
    }

    stage.lab.migrate(&stage.vms[vm].id(), to, MigrationKind::Live).await?;
    stage.lab.wait(WaitFor::VmOnHost { vm: stage.vms[vm].id(), host: to.into() }, PATIENCE).await?;
    stage.tell.note(format!("live migration {from} -> {to} done; the checkpoint went along"));
    // Readers are let go only now: whatever the old host still reads, it reads as the old host.
    let job_id = jobs[0].job_id.clone();
    let taken = stage
        .until("the new host has the job", PATIENCE, async || {
            let request = rpc::ListJobsRequest { job_id: job_id.clone(), ..Default::default() };
            let job = stage.operator.jobs(request).await?.into_iter().find(|j| j.job_id == job_id);
            Ok(match job {
                Some(job) if job.host == to => Ok(()),
                Some(job) => {
                    Err(format!("the job is {} on {:?}: {}", job.state, job.host, job.reason))
                }
                None => Err("the job is not listed".to_owned()),
            })
        })
        .await;
    stage.lab.release_gate(gate).await?;
    taken?;
    let jobs = stage.finish(&jobs).await?;
    let job = &jobs[0];
    let stats = job.stats.unwrap_or_default();
    let counted = stage.bytes_read(vm).await? - counted_before;
    let counted_again = counted.saturating_sub(stats.changed_bytes);
    stage.tell.note(format!(
        "{to} finished it: {} pages adopted, {} sent again, {} read again (the lab counted {} read for {} changed)",
        stats.adopted_pages,
        bytes(stats.resent_bytes),
        bytes(stats.reread_bytes),
        bytes(counted),
        bytes(stats.changed_bytes)
    ));
    let hosts: Vec<_> = job.attempts.iter().map(|a| a.host.as_str()).collect();
    if !(hosts.contains(&from.as_str()) && job.host == to) {
        return Err(Failure::new(format!(
            "the job was to go from {from} to {to}, but ran on {}",
            hosts.join(", ")
        )));
    }
    let measures = [
        ("sent again", stats.resent_bytes, MOST_RESENT),
        ("read again, by the job's account,", stats.reread_bytes, MOST_REREAD),
        ("read again, by the lab's account,", counted_again, MOST_REREAD),
    ];
    for (what, found, most) in measures {
        if found >= most {
            return Err(Failure::new(format!(
                "{} were {what} after the migration; the bound is {}",
                bytes(found),
                bytes(most)
            )));
        }
    }
    if written >= ADOPTED_FROM && stats.adopted_pages == 0 {
        return Err(Failure::new(format!(
            "half of {} were read before the migration, but the new host took over no page of it",
            bytes(written)
        )));
    }
    let compared = stage.verify(vm, &job.point_id).await?;
    stage.tell.note("the point, read back from storage, is the checkpoint byte for byte");
    let mut figures = stats_figures(&stats);
    figures.extend(super::figures([
        ("vm", json!(name)),
        ("from", json!(from)),
        ("to", json!(to)),
        ("written_bytes", json!(written)),
        ("lab_read_bytes", json!(counted)),
        ("lab_reread_bytes", json!(counted_again)),
        ("attempts", json!(job.attempts.len())),
        ("compared_bytes", json!(compared)),
    ]));
    Ok(figures)
}
