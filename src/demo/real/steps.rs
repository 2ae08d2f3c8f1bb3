//! The steps on real VMs. Each does one thing to them, checks what really came of it, and gives its figures.

use std::time::{Duration, UNIX_EPOCH};

use futures::future::LocalBoxFuture;
use outrider_proto::rpc::{self, BackupKind};
use outrider_qemulab::{Disk, Machine, Shape, image};
use serde_json::json;

use super::{MIB, RealStage, TRICKLE};
use crate::demo::configs::{HOSTS, coordinator_name};
use crate::demo::stage::{PATIENCE, until};
use crate::demo::steps::{Figures, figures, stats_figures, sum};
use crate::output::bytes;
use crate::report::Failure;

/// A step: its name in the JSON, its line in the story, what it does.
pub(super) struct Step {
    pub(super) name: &'static str,
    pub(super) title: &'static str,
    pub(super) run: for<'a> fn(&'a mut RealStage) -> LocalBoxFuture<'a, Result<Figures, Failure>>,
}

/// The story, in order.
pub(super) const STORY: &[Step] = &[
    Step {
        name: "first-backup",
        title: "First backup of the whole group, while its guests write",
        run: |s| Box::pin(first_backup(s)),
    },
    Step {
        name: "incremental",
        title: "An incremental moves only what the guests wrote",
        run: |s| Box::pin(incremental(s)),
    },
    Step {
        name: "migrate-mid-backup",
        title: "A VM is live-migrated in the middle of its backup; the new host finishes it",
        run: |s| Box::pin(migrate(s)),
    },
    Step {
        name: "leader-killed",
        title: "The Raft leader is killed with SIGKILL during a job",
        run: |s| Box::pin(leader_killed(s)),
    },
    Step {
        name: "host-killed",
        title: "A host dies with its VM, which is started on another host",
        run: |s| Box::pin(host_killed(s)),
    },
    Step {
        name: "restore",
        title: "A VM is restored on another host, boots, and checks its own journal",
        run: |s| Box::pin(restore(s)),
    },
    Step { name: "hosts-clean", title: "The hosts are clean", run: |s| Box::pin(clean(s)) },
];

async fn first_backup(stage: &mut RealStage) -> Result<Figures, Failure> {
    let jobs = stage.start_backup(None, BackupKind::Full).await?;
    let jobs = stage.finish(&jobs).await?;
    let total = sum(jobs.iter().map(|j| j.stats.as_ref()));
    stage.tell.note(format!(
        "{} jobs: read {}, sent {}",
        jobs.len(),
        bytes(total.read_bytes),
        bytes(total.sent_bytes)
    ));
    Ok(stats_figures(&total))
}

async fn incremental(stage: &mut RealStage) -> Result<Figures, Failure> {
    let mut written = 0;
    for (salt, name) in (10..).zip(stage.cluster.names()) {
        let guest = &mut stage.cluster.vm(&name)?.guest;
        written += guest.write(stage.seed.wrapping_add(salt), 2 * MIB).await?;
        guest.write_at(stage.seed.wrapping_add(salt), TRICKLE).await?;
    }
    let jobs = stage.start_backup(None, BackupKind::Incremental).await?;
    let jobs = stage.finish(&jobs).await?;
    for job in &jobs {
        if job.backup_kind() != BackupKind::Incremental {
            return Err(Failure::new(format!(
                "the second point of {:?} must be an incremental one and is {:?}",
                job.vm_name,
                job.backup_kind()
            )));
        }
    }
    let total = sum(jobs.iter().map(|j| j.stats.as_ref()));
    stage.tell.note(format!(
        "guests wrote {} and then some; {} were named as changed, {} sent",
        bytes(written),
        bytes(total.changed_bytes),
        bytes(total.sent_bytes)
    ));
    if total.changed_bytes * 2 > total.disk_bytes {
        return Err(Failure::new(format!(
            "{} of {} were called changed",
            bytes(total.changed_bytes),
            bytes(total.disk_bytes)
        )));
    }
    let mut figures = stats_figures(&total);
    figures.insert("written_bytes".into(), json!(written));
    Ok(figures)
}

async fn migrate(stage: &mut RealStage) -> Result<Figures, Failure> {
    let name = "web";
    let guest = &mut stage.cluster.vm(name)?.guest;
    let written = guest.write(stage.seed.wrapping_add(20), 24 * MIB).await?;
    guest.write_at(stage.seed.wrapping_add(20), TRICKLE).await?;
    let from = stage.cluster.vm(name)?.host.clone();
    let to = other(&from);
    let jobs = stage.start_backup(Some(name), BackupKind::Incremental).await?;
    stage.has_read(&jobs[0], 8 * MIB).await?;
    let moved = stage.cluster.migrate(name, to).await?;
    stage.tell.note(format!(
        "live migration {from} -> {to} in mid-backup: {} ms, the guest stood still for {} ms",
        moved.took.as_millis(),
        moved.downtime.as_millis()
    ));
    let job = stage.finish(&jobs).await?.remove(0);
    let hosts: Vec<_> = job.attempts.iter().map(|a| a.host.as_str()).collect();
    if !(hosts.contains(&from.as_str()) && job.host == to) {
        return Err(Failure::new(format!(
            "the job was to go from {from} to {to}, but ran on {}",
            hosts.join(", ")
        )));
    }
    let resumed = job.attempts.iter().rev().find(|a| a.host == to).map_or(0, |a| a.started_unix_ms);
    let ended = moved.ended.duration_since(UNIX_EPOCH).unwrap_or_default();
    let resumed = Duration::from_millis(resumed).saturating_sub(ended);
    let stats = job.stats.unwrap_or_default();
    stage.tell.note(format!(
        "{to} had the job {} ms after the move and finished it; {} sent again",
        resumed.as_millis(),
        bytes(stats.resent_bytes)
    ));
    let after = stage.cluster.vm(name)?.guest.last_committed();
    stage.cluster.vm(name)?.guest.commits_beyond(after).await?;
    let mut result = stats_figures(&stats);
    result.extend(figures([
        ("vm", json!(name)),
        ("from", json!(from)),
        ("to", json!(to)),
        ("written_bytes", json!(written)),
        ("migration_ms", json!(moved.took.as_millis() as u64)),
        ("downtime_ms", json!(moved.downtime.as_millis() as u64)),
        ("resumed_ms", json!(resumed.as_millis() as u64)),
        ("attempts", json!(job.attempts.len())),
    ]));
    Ok(result)
}

async fn leader_killed(stage: &mut RealStage) -> Result<Figures, Failure> {
    let name = "database";
    let guest = &mut stage.cluster.vm(name)?.guest;
    guest.write(stage.seed.wrapping_add(30), 24 * MIB).await?;
    guest.write_at(stage.seed.wrapping_add(30), TRICKLE).await?;
    let jobs = stage.start_backup(Some(name), BackupKind::Incremental).await?;
    stage.has_read(&jobs[0], 4 * MIB).await?;
    let old = stage.operator.status().await?.leader_id;
    let pid = stage.processes.kill(&coordinator_name(old)).await?;
    stage.tell.note(format!("coordinator {old} led and is killed in mid-backup (pid {pid})"));
    let new = until("the coordinators elect another leader", PATIENCE, async || {
        let s = stage.operator.status().await?;
        let elected = s.leader_id != old && s.leader_id != 0 && !s.stale;
        Ok(if elected { Ok(s.leader_id) } else { Err(format!("leader {}", s.leader_id)) })
    })
    .await?;
    let job = stage.finish(&jobs).await?.remove(0);
    stage.processes.restart(&coordinator_name(old)).await?;
    stage.tell.note(format!("coordinator {new} leads; the job completed"));
    let mut result = stats_figures(&job.stats.unwrap_or_default());
    result.extend(figures([("killed_leader", json!(old)), ("new_leader", json!(new))]));
    Ok(result)
}

async fn host_killed(stage: &mut RealStage) -> Result<Figures, Failure> {
    let name = "database";
    let host = stage.cluster.vm(name)?.host.clone();
    let to = HOSTS.iter().find(|h| **h != host && free(stage, h)).copied().unwrap_or(other(&host));
    let on_disk = stage.cluster.vm(name)?.guest.last_committed();
    stage.processes.kill(&format!("node-{host}")).await?;
    let mut lost = None;
    for machine in stage.cluster.kill_host(&host)? {
        if machine.name == name {
            lost = Some(machine);
        } else {
            stage.cluster.start(machine, to).await?;
        }
    }
    let lost = lost.ok_or_else(|| Failure::new(format!("{name} was not on {host}")))?;
    let vm = stage.cluster.start(lost, to).await?;
    let verdict = vm.guest.verified().await?;
    vm.guest.write_at(stage.seed.wrapping_add(40), TRICKLE).await?;
    stage.tell.note(format!(
        "{host} is dead with its agent and VM; {name} was started on {to}: {} records, {} wrong blocks",
        verdict.records, verdict.bad
    ));
    if verdict.bad != 0 || verdict.committed < on_disk {
        return Err(Failure::new(format!("the guest lost writes by itself: {}", verdict.line)));
    }
    until("the coordinators know where it runs", PATIENCE, async || {
        let vms = stage.operator.vms(name).await?;
        let now = vms.first().map(|v| v.host.clone()).unwrap_or_default();
        Ok(if now == to { Ok(()) } else { Err(format!("it is on {now:?}")) })
    })
    .await?;
    let jobs = stage.start_backup(Some(name), BackupKind::Incremental).await?;
    let job = stage.finish(&jobs).await?.remove(0);
    let key = stage.key(name)?;
    let points = stage.operator.points(&key).await?;
    let point = points.iter().find(|p| p.point_id == job.point_id);
    let reasons = point.map(|p| p.reasons.join("; ")).unwrap_or_default();
    stage.tell.note(format!("its next point says: {reasons}"));
    stage.processes.restart(&format!("node-{host}")).await?;
    let mut result = stats_figures(&job.stats.unwrap_or_default());
    result.extend(figures([("host", json!(host)), ("to", json!(to)), ("reasons", json!(reasons))]));
    Ok(result)
}

fn free(stage: &mut RealStage, host: &str) -> bool {
    let names = stage.cluster.names();
    names.iter().all(|n| stage.cluster.vm(n).is_ok_and(|v| v.host != host))
}

async fn restore(stage: &mut RealStage) -> Result<Figures, Failure> {
    let name = "web";
    let (point_id, least) = stage.points.get(name).cloned().unwrap_or_default();
    let from = stage.cluster.vm(name)?.host.clone();
    let to = HOSTS.iter().rev().find(|h| **h != from).copied().unwrap_or(HOSTS[0]);
    let new_name = format!("{name}-restored");
    let request = rpc::RestoreRequest {
        point_id,
        to_host: to.into(),
        new_name: new_name.clone(),
        power_on: true,
        ..Default::default()
    };
    let job = stage.operator.restore(request).await?;
    let job = stage.finish(&[job]).await?.remove(0);
    let guid = job.restored_vm.as_ref().map(|v| v.guid.clone()).unwrap_or_default();
    let machine = Machine {
        name: new_name.clone(),
        guid: guid.parse()?,
        disks: Vec::<Disk>::new(),
        shape: Shape::Blockdev,
        agent: false,
        memory: 0,
        idle: 0,
    };
    let vm = stage.cluster.adopt(machine, to).await?;
    let states = vm.guest.ready().await?.file_systems;
    let verdict = vm.guest.verified().await?;
    stage.cluster.kill(&new_name)?;
    stage.tell.note(format!(
        "{new_name:?} booted on {to}, file systems {}: {} blocks compared with its journal, {} wrong; everything up to \
         record {} is there, {least} were on disk when the backup began",
        states.join(" and "),
        verdict.blocks,
        verdict.bad,
        verdict.committed
    ));
    if verdict.bad != 0 || verdict.errors != 0 || verdict.committed < least || verdict.blocks == 0 {
        return Err(Failure::new(format!("the restored guest misses something: {}", verdict.line)));
    }
    let took = job.ended_unix_ms.saturating_sub(job.created_unix_ms);
    Ok(figures([
        ("vm", json!(name)),
        ("restored_as", json!(new_name)),
        ("host", json!(to)),
        ("compared_blocks", json!(verdict.blocks)),
        ("duration_ms", json!(took)),
    ]))
}

async fn clean(stage: &mut RealStage) -> Result<Figures, Failure> {
    let mut bitmaps = 0;
    for name in stage.cluster.names() {
        let left = stage.cluster.leftovers(&name, "").await?;
        let disks = stage.cluster.vm(&name)?.machine.disks.len();
        let good = left.iter().all(|l| l.starts_with("bitmap outrider-"));
        if !good || left.len() != disks {
            return Err(Failure::new(format!(
                "in the QEMU of {name:?} is left: {}; one bitmap for each of {disks} disks should be",
                left.join(", ")
            )));
        }
        bitmaps += left.len();
        let machine = stage.cluster.shut_down(&name).await?;
        for disk in &machine.disks {
            let scratch = disk.path.with_extension("fsck");
            if let Some(unsound) = image::check_file_system(&disk.path, disk.format, &scratch)? {
                return Err(Failure::new(format!("a disk of {name:?} is not sound: {unsound}")));
            }
        }
        stage.cluster.start(machine, HOSTS[0]).await?;
    }
    let duties = stage.operator.status().await?.open_duties;
    if duties != 0 {
        return Err(Failure::new(format!("{duties} duties are open")));
    }
    stage.tell.note(format!(
        "no export, no job, no node of ours in any QEMU; {bitmaps} dirty bitmaps, one a disk; e2fsck finds every disk \
         sound; no duty open"
    ));
    Ok(figures([("bitmaps", json!(bitmaps)), ("open_duties", json!(duties))]))
}

fn other(host: &str) -> &'static str {
    HOSTS.iter().rev().find(|h| **h != host).copied().unwrap_or(HOSTS[0])
}
