//! Manifest, root record, the proposal; and again what receipts lacked.

use std::sync::Arc;

use futures::FutureExt;
use outrider_proto::frame::Space;
use outrider_proto::ids::{ChunkId, PgId, PointId, VmIncarnation, VmKey};
use outrider_proto::journal::JournalEntry;
use outrider_proto::manifest::{DiskManifest, Layer, Manifest, Tree};
use outrider_proto::root::Root;
use outrider_proto::rpc::{self, CommitOutcome, job_lease::Work};

use super::backup::Open;
use super::capture::{self, Captured};
use super::layers::Roots;
use super::{JobContext, JobError};
use crate::consistency;
use crate::pipeline::{Stats, TreeRoot};

/// Rounds of sending again before the commit is given up.
const ROUNDS: u32 = 20;

/// A point that the coordinator has acknowledged.
pub(super) struct Committed {
    pub(super) point: PointId,
    pub(super) manifest_id: ChunkId,
    pub(super) manifest: Manifest,
    pub(super) journal: crate::pipeline::SharedJournal,
}

pub(super) async fn run(
    context: &JobContext,
    message: &rpc::JobLease,
    vm: &VmKey,
    open: &Open,
    captured: Captured,
    stats: &Arc<Stats>,
) -> Result<Committed, JobError> {
    let Some(Work::Backup(work)) = &message.work else {
        return Err(JobError::Unrestorable("a commit without backup work".into()));
    };
    let point = capture::point_of(work)?;
    let mut lacking = String::new();
    for _ in 0..ROUNDS {
        context.phase("committing");
        let roots = captured.pipeline.capture().boxed().await?;
        captured.sets.capture().boxed().await?;
        let of_layers = match &captured.layers {
            Some(layers) => layers.capture().boxed().await?,
            None => Roots::default(),
        };
        let manifest = manifest(context, message, vm, open, &captured, point, (&roots, &of_layers));
        let record = manifest.seal(&context.sealer)?;
        let manifest_id = record.id();
        captured.pipeline.put_small(record).await?;
        if !captured.pipeline.flush().await? {
            continue;
        }
        let root_receipts = put_root(context, vm, message, &manifest, manifest_id).await?;
        captured
            .journal
            .lock()
            .await
            .append(&JournalEntry::Committing { manifest: manifest_id })
            .await?;
        context.lease.check()?;
        Stats::set(&stats.stored_bytes, context.store.stored_bytes());
        let request = rpc::CommitRequest {
            job_id: context.lease.job().to_string(),
            lease_epoch: context.lease.epoch().0,
            placement_epoch: message.placement_epoch,
            point_id: point.to_string(),
            manifest_id: manifest_id.to_string(),
            windows: context.store.claims(),
            root_receipts,
            stats: Some(stats.snapshot().into()),
            achieved: consistency::from_text(&captured.start.consistency).into(),
            reasons: manifest.reasons.clone(),
            kind: captured.start.kind,
            taken_unix_ms: captured.start.taken_unix_ms,
            checkpoint_id: open.checkpoint.id.to_string(),
            tracking_unproven: captured.tracking_unproven,
            disks: captured
                .disks
                .iter()
                .map(|d| rpc::DiskIdentity {
                    disk_id: d.facts.disk.to_string(),
                    size_bytes: d.facts.size,
                    slot: d.facts.slot.clone(),
                })
                .collect(),
            parent_point_id: captured.start.parent.map(|(p, _)| p.to_string()).unwrap_or_default(),
        };
        let reply = context.coordinator.commit(request).await?;
        match reply.outcome() {
            CommitOutcome::Committed => {
                let Captured { journal, .. } = captured;
                return Ok(Committed { point, manifest_id, manifest, journal });
            }
            CommitOutcome::Superseded => return Err(JobError::Superseded { reason: reply.reason }),
            CommitOutcome::ReceiptsLacking | CommitOutcome::Unspecified => {
                let pgs: Vec<PgId> = reply
                    .lacking_pgs
                    .iter()
                    .filter_map(|pg| u16::try_from(*pg).ok())
                    .map(PgId)
                    .collect();
                tracing::warn!(
                    pgs = pgs.len(),
                    reason = reply.reason,
                    "receipts are lacking: asking storage again"
                );
                lacking = reply.reason;
                context.store.drop_claims(&pgs);
                captured.pipeline.recheck(&pgs).boxed().await?;
                // Each pipeline sends again what it has put itself: nothing is left open for the next one.
                captured.pipeline.capture().boxed().await?;
                captured.sets.recheck(&pgs).boxed().await?;
                if let Some(layers) = &captured.layers {
                    layers.recheck(&pgs).boxed().await?;
                }
            }
        }
    }
    Err(JobError::ReceiptsLacking { rounds: ROUNDS, reason: lacking })
}

fn manifest(
    context: &JobContext,
    message: &rpc::JobLease,
    vm: &VmKey,
    open: &Open,
    captured: &Captured,
    point: PointId,
    (roots, of_layers): (&[TreeRoot], &Roots),
) -> Manifest {
    let excluded = |i: usize| captured.start.excluded.get(i).cloned().unwrap_or_default();
    let disks =
        captured.disks.iter().zip(roots).enumerate().map(|(i, (disk, root))| DiskManifest {
            layers: vec![Layer { root_level: root.level, root: root.id }],
            excluded: excluded(i),
            ..disk.described()
        });
    let mut disks: Vec<DiskManifest> = disks.collect();
    let tree = match &captured.layers {
        Some(layers) => layers.describe(of_layers, &mut disks),
        None => Tree::default(),
    };
    let mut reasons = captured.start.reasons.clone();
    reasons.extend(captured.said.iter().cloned());
    Manifest {
        point,
        job: context.lease.job(),
        vm: vm.clone(),
        vm_name: message.vm_name.clone(),
        incarnation: VmIncarnation(message.incarnation),
        checkpoint: open.checkpoint.id,
        taken_unix_ms: captured.start.taken_unix_ms,
        chunk_size: captured.start.chunk_size,
        consistency: captured.start.consistency.clone(),
        reasons,
        tracking_unproven: captured.tracking_unproven,
        config: captured.config.clone(),
        disks,
        machine: captured.machine.clone(),
        tree,
    }
}

async fn put_root(
    context: &JobContext,
    vm: &VmKey,
    message: &rpc::JobLease,
    manifest: &Manifest,
    manifest_id: ChunkId,
) -> Result<Vec<Vec<u8>>, JobError> {
    let root = Root {
        point: manifest.point,
        job: context.lease.job(),
        vm_hash: Root::vm_hash(vm),
        vm_guid: vm.guid,
        incarnation: VmIncarnation(message.incarnation),
        manifest: manifest_id,
        taken_unix_ms: manifest.taken_unix_ms,
        lock_until_unix_ms: 0,
        lease_epoch: context.lease.epoch(),
    };
    let record = root.seal(&context.sealer)?;
    let key = manifest.point.to_bytes().to_vec();
    let receipts =
        context.store.put_named(Space::Root, key, context.lease.epoch().0, record).await?;
    Ok(receipts.into_iter().map(|r| r.to_vec()).collect())
}
