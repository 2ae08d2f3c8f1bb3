//! What an earlier attempt stored of a checkpoint that was lost, carried over to a new one.
//!
//! Where the hypervisor's change tracking begins with the checkpoint itself and survives its loss (a dirty bitmap of QEMU that
//! travels with a live migration), it says what differs between the lost moment and the new one. A finished leaf page without
//! such a change is, byte for byte, also the page of the new moment: as sure as any incremental, and by the same proof. What
//! changed joins what is still to be read. Every byte of the point is a byte of the new checkpoint, so two checkpoints are
//! still never mixed (docs/decisions/0009-carry-over.md).
//!
//! Any doubt (tracking gone or inconsistent, other disks, another base) means starting over.

use std::collections::HashMap;

use outrider_disk::RangeSet;
use outrider_proto::ids::{CheckpointId, ChunkId};
use outrider_proto::journal::{JournalDisk, JournalStart};
use outrider_proto::model::Binding;
use outrider_proto::page::FANOUT;

use super::base::DiskFacts;
use super::exclude::Exclusion;
use super::{JobContext, JobError};
use crate::hypervisor::{HypervisorError, ReferencePoint};
use crate::journal::{Adopted, Journal};
use crate::pipeline::plan::to_look_at;

/// What may be carried over.
#[derive(Debug)]
pub(super) struct Carry {
    adopted: Adopted,
    point: ReferencePoint,
}

impl Carry {
    /// The reference point that must stay until the carrying is done.
    pub(super) fn point(&self) -> &str {
        &self.point.id
    }
}

/// What a new checkpoint starts with.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Carried {
    pub(super) start: JournalStart,
    pub(super) leaves: HashMap<(usize, u64), ChunkId>,
}

/// A new checkpoint, as the journal is told of it.
pub(super) struct Onto<'a> {
    pub(super) checkpoint: CheckpointId,
    pub(super) taken_unix_ms: u64,
    pub(super) consistency: String,
    /// Why it was taken in this way.
    pub(super) way: String,
    pub(super) chunk_size: u32,
    pub(super) binding: Option<&'a Binding>,
    /// Its disks with the paths that changes are asked for by.
    pub(super) disks: Vec<(&'a DiskFacts, &'a std::path::Path)>,
    /// What is left out of them: the guest may have moved its page files since the lost checkpoint.
    pub(super) excluded: &'a Exclusion,
}

/// Looks whether change tracking goes on from the checkpoint that the journal was begun on last, though that is lost.
pub(super) async fn find(
    context: &JobContext,
    vm: outrider_proto::ids::VmGuid,
    journal: &Journal,
) -> Result<Option<Carry>, JobError> {
    let Some(adopted) = journal.latest() else { return Ok(None) };
    let Some(id) = context.hypervisor.point_of(adopted.start.checkpoint) else { return Ok(None) };
    let points = context.hypervisor.reference_points(vm).await?;
    let point = points.into_iter().find(|p| p.id.eq_ignore_ascii_case(&id));
    Ok(point.map(|point| Carry { adopted, point }))
}

/// Why nothing is carried over: the run starts over from its base.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoCarry {
    /// It has no bitmap.
    #[error("disk {0} was not tracked")]
    Untracked(String),
    /// The changes since the lost checkpoint are not to be had.
    #[error(transparent)]
    Changes(HypervisorError),
    #[error("its disks are others now")]
    OtherDisks,
    #[error("the chunk size of the dedup domain changed")]
    ChunkSize,
    #[error("its base is not the bound one any more")]
    OtherBase,
}

/// Carries over, or says why not.
pub(super) async fn onto(
    context: &JobContext,
    carry: &Carry,
    onto: &Onto<'_>,
) -> Result<Result<Carried, NoCarry>, JobError> {
    let mut changed = Vec::with_capacity(onto.disks.len());
    for (facts, path) in &onto.disks {
        let Some(tracking) = carry.point.tracking_of(&facts.slot) else {
            return Ok(Err(NoCarry::Untracked(facts.slot.clone())));
        };
        match context.hypervisor.changes(path, facts.size, tracking).await {
            Ok(ranges) => changed.push(ranges.align_out(onto.chunk_size.into(), facts.size)),
            Err(HypervisorError::Lease(lost)) => return Err(lost.into()),
            Err(e) => return Ok(Err(NoCarry::Changes(e))),
        }
    }
    Ok(merge(&carry.adopted, &changed, onto))
}

/// The decision, and the new beginning. Pure.
fn merge(old: &Adopted, changed: &[RangeSet], onto: &Onto<'_>) -> Result<Carried, NoCarry> {
    let start = &old.start;
    let same_disk = |(was, (now, _)): (&JournalDisk, &(&DiskFacts, _))| {
        was.disk_id == now.disk && was.size == now.size
    };
    if start.disks.len() != onto.disks.len() || !start.disks.iter().zip(&onto.disks).all(same_disk)
    {
        return Err(NoCarry::OtherDisks);
    }
    if start.chunk_size != onto.chunk_size {
        return Err(NoCarry::ChunkSize);
    }
    if let Some((point, manifest)) = &start.parent
        && onto.binding.is_none_or(|b| b.point != *point || b.manifest != *manifest)
    {
        return Err(NoCarry::OtherBase);
    }
    // What was left out of the lost checkpoint and what is left out of this one may differ, and then bytes do, too.
    let changed: Vec<RangeSet> = changed
        .iter()
        .zip(&onto.excluded.ranges)
        .enumerate()
        .map(|(i, (changed, now))| {
            let before = super::capture::ranges(start.excluded.get(i).map_or(&[], Vec::as_slice));
            let size = start.disks.get(i).map_or(0, |d| d.size);
            to_look_at(changed, &before, now).align_out(start.chunk_size.into(), size)
        })
        .collect();
    let leaf_bytes = FANOUT as u64 * u64::from(start.chunk_size);
    let mut leaves = old.leaves.clone();
    leaves.retain(|(disk, leaf), _| {
        let begin = leaf.saturating_mul(leaf_bytes);
        changed.get(*disk).is_some_and(|c| !c.overlaps(begin, leaf_bytes))
    });
    let disks = start.disks.iter().zip(&changed).map(|(disk, changed)| {
        let before: RangeSet = super::capture::ranges(&disk.to_read);
        let to_read = super::capture::pairs(&before.union(changed));
        JournalDisk { to_read, ..disk.clone() }
    });
    let mut reasons = vec![onto.way.clone()];
    reasons.extend(start.reasons.iter().skip(1).cloned());
    let fresh = onto.excluded.reasons.iter().filter(|r| !start.reasons.contains(r));
    reasons.extend(fresh.cloned());
    reasons.push(format!(
        "an earlier checkpoint was lost in a move; {} of {} pages stored of it are the same at this one, as change tracking proves",
        leaves.len(),
        old.leaves.len()
    ));
    let start = JournalStart {
        checkpoint: onto.checkpoint,
        taken_unix_ms: onto.taken_unix_ms,
        consistency: onto.consistency.clone(),
        reasons,
        disks: disks.collect(),
        excluded: onto.excluded.journalled(),
        ..start.clone()
    };
    Ok(Carried { start, leaves })
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrider_disk::ByteRange;
    use outrider_proto::ids::{DiskId, PointId};
    use std::path::Path;

    const CHUNK: u32 = 64 << 10;
    const LEAF: u64 = FANOUT as u64 * CHUNK as u64;

    fn old(disk: DiskId, parent: Option<(PointId, ChunkId)>) -> Adopted {
        let page = |n| ChunkId([n; 32]);
        Adopted {
            start: JournalStart {
                checkpoint: CheckpointId::random(),
                chunk_size: CHUNK,
                taken_unix_ms: 1,
                consistency: "CRASH".into(),
                kind: 1,
                reasons: vec!["old way".into(), "why".into()],
                parent,
                disks: vec![JournalDisk {
                    disk_id: disk,
                    size: 4 * LEAF,
                    to_read: vec![(0, 3 * LEAF)],
                    incremental: parent.is_some(),
                }],
                excluded: vec![],
            },
            layers: vec![],
            leaves: [((0, 0), page(1)), ((0, 1), page(2)), ((0, 2), page(3))].into(),
            manifest: None,
            before_conversion: None,
        }
    }

    fn with<T>(
        disk: &DiskFacts,
        binding: Option<&Binding>,
        work: impl FnOnce(&Onto<'_>) -> T,
    ) -> T {
        let excluded = Exclusion::nothing(1);
        work(&Onto {
            excluded: &excluded,
            checkpoint: CheckpointId::random(),
            taken_unix_ms: 2,
            consistency: "CRASH".into(),
            way: "new way".into(),
            chunk_size: CHUNK,
            binding,
            disks: vec![(disk, Path::new("d"))],
        })
    }

    #[test]
    fn only_pages_without_a_change_are_carried_and_every_change_is_read() {
        let disk = DiskFacts { disk: DiskId::random(), size: 4 * LEAF, slot: "d".into() };
        let old = old(disk.disk, None);
        let mut changed = RangeSet::single(LEAF + 5 * u64::from(CHUNK), CHUNK.into());
        changed.insert(3 * LEAF, CHUNK.into());
        let carried = with(&disk, None, |onto| merge(&old, &[changed], onto)).expect("carried");
        let mut kept: Vec<u64> = carried.leaves.keys().map(|(_, leaf)| *leaf).collect();
        kept.sort_unstable();
        assert_eq!(kept, [0, 2]);
        assert_eq!(carried.start.disks[0].to_read, [(0, 3 * LEAF + u64::from(CHUNK))]);
        assert_eq!(
            (carried.start.taken_unix_ms, carried.start.reasons[0].as_str()),
            (2, "new way")
        );
        assert!(carried.start.reasons[2].contains("2 of 3"), "{:?}", carried.start.reasons);
    }

    #[test]
    fn pages_of_what_only_one_of_the_checkpoints_leaves_out_are_read_again() {
        let disk = DiskFacts { disk: DiskId::random(), size: 4 * LEAF, slot: "d".into() };
        let chunk = u64::from(CHUNK);
        let mut old = old(disk.disk, None);
        // Left out at the lost checkpoint: something of page 0, and of page 1. Now: page 1 the same, and page 2.
        old.start.excluded = vec![vec![(chunk, chunk), (LEAF, chunk)]];
        let now = [ByteRange::new(LEAF, chunk), ByteRange::new(2 * LEAF, 100)];
        let excluded =
            Exclusion { ranges: vec![now.into_iter().collect()], reasons: vec!["moved".into()] };
        // The guest has paged in between.
        let changed = [RangeSet::single(LEAF, chunk)];
        let carried = with(&disk, None, |onto| {
            merge(
                &old,
                &changed,
                &Onto {
                    excluded: &excluded,
                    disks: onto.disks.clone(),
                    way: "new".into(),
                    consistency: "CRASH".into(),
                    ..*onto
                },
            )
        })
        .expect("carried");
        assert_eq!(carried.leaves.keys().collect::<Vec<_>>(), [&(0, 1)], "page 1 is zeros in both");
        assert_eq!(carried.start.excluded, [vec![(LEAF, chunk), (2 * LEAF, 100)]]);
        assert!(carried.start.reasons.contains(&"moved".to_owned()));
    }

    #[test]
    fn any_doubt_means_starting_over() {
        let disk = DiskFacts { disk: DiskId::random(), size: 4 * LEAF, slot: "d".into() };
        let nothing = [RangeSet::new()];
        let other = DiskFacts { disk: DiskId::random(), ..disk.clone() };
        let grown = DiskFacts { size: 5 * LEAF, ..disk.clone() };
        let whole = old(disk.disk, None);
        for now in [other, grown] {
            let refused =
                with(&now, None, |onto| merge(&whole, &nothing, onto)).expect_err("doubt");
            assert!(matches!(refused, NoCarry::OtherDisks), "{refused}");
        }
        let based = old(disk.disk, Some((PointId::random(), ChunkId([9; 32]))));
        let refused = with(&disk, None, |onto| merge(&based, &nothing, onto)).expect_err("doubt");
        assert!(matches!(refused, NoCarry::OtherBase), "{refused}");
        let mut chunks = old(disk.disk, None);
        chunks.start.chunk_size = 2 * CHUNK;
        let refused = with(&disk, None, |onto| merge(&chunks, &nothing, onto)).expect_err("doubt");
        assert!(matches!(refused, NoCarry::ChunkSize), "{refused}");
    }
}
