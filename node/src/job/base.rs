//! The base rule (design 4.4): what an incremental may start from. A base is proven or it is not used. Pure.

use outrider_proto::ids::{ChunkId, DiskId, VmIncarnation};
use outrider_proto::manifest::Manifest;
use outrider_proto::model::Binding;
use outrider_proto::rpc::BackupKind;

use crate::hypervisor::ReferencePoint;

/// A disk of the checkpoint, as its own file tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskFacts {
    /// VirtualDiskId.
    pub disk: DiskId,
    /// Size, bytes.
    pub size: u64,
    /// Slot.
    pub slot: String,
}

/// What one disk is read against.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BaseDecision {
    /// Ask for the changes since this tracking id; the rest is the tree below `parent_root`.
    Changes {
        /// Change tracking id.
        tracking_id: String,
        /// The parent's tree of this disk.
        parent_root: ChunkId,
        /// What the parent left out of it, as (offset, length).
        parent_excluded: Vec<(u64, u64)>,
    },
    /// Read all that is allocated.
    Everything {
        /// Why.
        reason: String,
    },
}

/// The decision for a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BasePlan {
    /// What the run really is.
    pub kind: BackupKind,
    /// Per disk, in the order given.
    pub disks: Vec<BaseDecision>,
    /// Shown with the point.
    pub reasons: Vec<String>,
}

/// What is known when the decision is made.
#[derive(Debug, Clone, Copy)]
pub struct Known<'a> {
    /// Kind asked for.
    pub wanted: BackupKind,
    /// Why a consistency check or this run was asked for.
    pub why: &'a str,
    /// Why change tracking is not used for this VM at all.
    pub untracked: Option<&'a str>,
    /// Why the coordinator has no binding, where it knows more than that; else empty.
    pub no_base: &'a str,
    /// The coordinator's binding.
    pub binding: Option<&'a Binding>,
    /// Reference points that exist on this host.
    pub reference_points: &'a [ReferencePoint],
    /// The manifest of the bound point, when it could be read.
    pub parent: Option<&'a Manifest>,
    /// The VM's incarnation.
    pub incarnation: VmIncarnation,
    /// Chunk size of the domain.
    pub chunk_size: u32,
}

/// Decides.
#[must_use]
pub fn plan_base(known: Known<'_>, disks: &[DiskFacts]) -> BasePlan {
    let everything = |kind, reason: &str| BasePlan {
        kind,
        disks: disks
            .iter()
            .map(|_| BaseDecision::Everything { reason: reason.to_owned() })
            .collect(),
        reasons: vec![reason.to_owned()],
    };
    match known.wanted {
        BackupKind::Full => return everything(BackupKind::Full, "a full backup was asked for"),
        BackupKind::ConsistencyCheck => {
            let why = if known.why.is_empty() { "it was asked for" } else { known.why };
            return everything(
                BackupKind::ConsistencyCheck,
                &format!("consistency check of all disks: {why}"),
            );
        }
        BackupKind::Incremental | BackupKind::Unspecified => {}
    }
    if let Some(reason) = known.untracked {
        return everything(BackupKind::Full, reason);
    }
    let (binding, point, parent) = match base_of(known) {
        Ok(base) => base,
        Err(why) => return everything(BackupKind::Full, &why.to_string()),
    };
    let decisions: Vec<BaseDecision> =
        disks.iter().map(|disk| decide(disk, disks, binding, point, parent)).collect();
    let mut reasons: Vec<String> = Vec::new();
    for (disk, decision) in disks.iter().zip(&decisions) {
        if let BaseDecision::Everything { reason } = decision {
            reasons.push(format!("disk {} is read in full: {reason}", disk.slot));
        }
    }
    let any_changes = decisions.iter().any(|d| matches!(d, BaseDecision::Changes { .. }));
    let kind =
        if any_changes || disks.is_empty() { BackupKind::Incremental } else { BackupKind::Full };
    if binding.tracking_unproven {
        reasons.push("change tracking survived a host crash and is not proven yet".into());
    }
    BasePlan { kind, disks: decisions, reasons }
}

/// Why nothing may be started from. Shown with the point.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoBase {
    /// The first backup, or one after a hand-over that did not happen.
    #[error("no reference point is bound to a committed recovery point")]
    Unbound,
    /// The coordinator knows why there is none.
    #[error("there is no base to start from: {0}")]
    GivenUp(String),
    /// Removed by somebody, or lost.
    #[error("the bound reference point does not exist on this host (any more)")]
    NoReferencePoint,
    /// Storage does not give it, or it does not open.
    #[error("the manifest of the bound recovery point cannot be read")]
    NoManifest,
    /// Not the one that was bound.
    #[error("the manifest of the bound recovery point is another point's")]
    ForeignManifest,
    /// Written behind change tracking.
    #[error("the VM's disks were restored, reverted or replaced since the bound recovery point")]
    OtherIncarnation,
    /// Nothing of the old tree can be shared.
    #[error("the chunk size of the dedup domain changed")]
    ChunkSize,
}

/// The one base that may be used, or why there is none.
fn base_of<'a>(
    known: Known<'a>,
) -> Result<(&'a Binding, &'a ReferencePoint, &'a Manifest), NoBase> {
    let unbound = || match known.no_base {
        "" => NoBase::Unbound,
        why => NoBase::GivenUp(why.to_owned()),
    };
    let binding = known.binding.ok_or_else(unbound)?;
    let point = known
        .reference_points
        .iter()
        .find(|p| p.id.eq_ignore_ascii_case(&binding.reference_point))
        .ok_or(NoBase::NoReferencePoint)?;
    let parent = known.parent.ok_or(NoBase::NoManifest)?;
    if parent.point != binding.point {
        return Err(NoBase::ForeignManifest);
    }
    if parent.incarnation != known.incarnation {
        return Err(NoBase::OtherIncarnation);
    }
    if parent.chunk_size != known.chunk_size {
        return Err(NoBase::ChunkSize);
    }
    Ok((binding, point, parent))
}

fn decide(
    disk: &DiskFacts,
    all: &[DiskFacts],
    binding: &Binding,
    point: &ReferencePoint,
    parent: &Manifest,
) -> BaseDecision {
    let everything = |reason: &str| BaseDecision::Everything { reason: reason.to_owned() };
    // Equal disk ids in one VM (a copied disk, an exported one that was attached) cannot be told apart, whether they were equal
    // at the bound point or are now.
    if all.iter().filter(|other| other.disk == disk.disk).count() > 1 {
        return everything("another disk of the VM has the same id (VirtualDiskId)");
    }
    let mut bound_disks = binding.disks.iter().filter(|b| b.disk == disk.disk);
    let (Some(bound), None) = (bound_disks.next(), bound_disks.next()) else {
        return everything("it is not a disk of the bound recovery point");
    };
    if bound.size != disk.size {
        return everything("its size changed");
    }
    if bound.rct_id.is_empty() {
        return everything("it had no change tracking at the bound recovery point");
    }
    if point.tracking_of(&bound.slot) != Some(bound.rct_id.as_str()) {
        return everything("its change tracking id is not the bound one any more");
    }
    let mut trees = parent.disks.iter().filter(|d| d.disk_id == disk.disk);
    let (Some(tree), None) = (trees.next(), trees.next()) else {
        return everything("it is not a disk of the bound recovery point");
    };
    // The last layer is the disk at the point itself; those before are of user checkpoints.
    match tree.layers.last() {
        Some(layer) if tree.size == disk.size => BaseDecision::Changes {
            tracking_id: bound.rct_id.clone(),
            parent_root: layer.root,
            parent_excluded: tree.excluded.clone(),
        },
        _ => everything("the bound recovery point does not hold it as one whole tree"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrider_proto::ids::{CheckpointId, JobId, PointId, VmGuid, VmKey, VmRole};
    use outrider_proto::manifest::{DiskManifest, ImageFormat, Layer, Machine, Tree};
    use outrider_proto::model::BoundDisk;

    const SIZE: u64 = 1 << 30;
    const CHUNK: u32 = 256 << 10;

    struct World {
        binding: Option<Binding>,
        points: Vec<ReferencePoint>,
        parent: Option<Manifest>,
        disks: Vec<DiskFacts>,
        wanted: BackupKind,
        incarnation: VmIncarnation,
        chunk_size: u32,
        untracked: Option<&'static str>,
    }

    fn world() -> World {
        let (point, disk) = (PointId::random(), DiskId::random());
        let root = ChunkId([7; 32]);
        World {
            binding: Some(Binding {
                point,
                manifest: ChunkId([1; 32]),
                reference_point: "RP1".into(),
                disks: vec![BoundDisk {
                    disk,
                    size: SIZE,
                    slot: "a\\0\\0\\D".into(),
                    rct_id: "rct1".into(),
                }],
                tracking_unproven: false,
            }),
            points: vec![ReferencePoint {
                id: "RP1".into(),
                path: String::new(),
                tracking: vec![("a\\0\\0\\D".into(), "rct1".into())],
            }],
            parent: Some(Manifest {
                point,
                job: JobId::random(),
                vm: VmKey { realm: "c".into(), guid: VmGuid::random(), role: VmRole::Primary },
                vm_name: "vm".into(),
                incarnation: VmIncarnation(2),
                checkpoint: CheckpointId::random(),
                taken_unix_ms: 0,
                chunk_size: CHUNK,
                consistency: "CRASH".into(),
                reasons: vec![],
                tracking_unproven: false,
                config: vec![],
                disks: vec![DiskManifest {
                    disk_id: disk,
                    slot: "a\\0\\0\\D".into(),
                    file_name: "a.vhdx".into(),
                    size: SIZE,
                    logical_sector: 512,
                    physical_sector: 4096,
                    block_size: 32 << 20,
                    fixed: false,
                    layers: vec![Layer { root_level: 2, root }],
                    excluded: vec![],
                    format: ImageFormat::default(),
                }],
                machine: Machine::default(),
                tree: Tree::default(),
            }),
            disks: vec![DiskFacts { disk, size: SIZE, slot: "a\\0\\0\\D".into() }],
            wanted: BackupKind::Incremental,
            incarnation: VmIncarnation(2),
            chunk_size: CHUNK,
            untracked: None,
        }
    }

    impl World {
        fn plan(&self) -> BasePlan {
            let known = Known {
                wanted: self.wanted,
                why: "",
                untracked: self.untracked,
                no_base: "its host left",
                binding: self.binding.as_ref(),
                reference_points: &self.points,
                parent: self.parent.as_ref(),
                incarnation: self.incarnation,
                chunk_size: self.chunk_size,
            };
            plan_base(known, &self.disks)
        }
    }

    #[test]
    fn a_proven_base_is_used() {
        let plan = world().plan();
        assert_eq!(plan.kind, BackupKind::Incremental);
        assert_eq!(
            plan.disks,
            [BaseDecision::Changes {
                tracking_id: "rct1".into(),
                parent_root: ChunkId([7; 32]),
                parent_excluded: vec![],
            }]
        );
    }

    #[test]
    fn a_base_that_left_page_files_out_is_used_with_what_it_left_out() {
        let mut world = world();
        let left_out = vec![(4096, 1 << 20)];
        world.parent.as_mut().expect("there is one").disks[0].excluded = left_out.clone();
        let BaseDecision::Changes { parent_excluded, .. } = &world.plan().disks[0] else {
            panic!("it is an incremental");
        };
        assert_eq!(*parent_excluded, left_out);
    }

    #[test]
    fn any_doubt_about_the_base_reads_everything_and_says_why() {
        type Spoil = fn(&mut World);
        let doubts: [(&str, Spoil); 11] = [
            ("tracking not to be used", |w| w.untracked = Some("switched off")),
            ("not bound", |w| w.binding = None),
            ("reference point gone", |w| w.points.clear()),
            ("another reference point", |w| w.points[0].id = "RP2".into()),
            ("manifest unreadable", |w| w.parent = None),
            ("incarnation raised", |w| w.incarnation = VmIncarnation(3)),
            ("chunk size changed", |w| w.chunk_size = 64 << 10),
            ("resized", |w| w.disks[0].size += 4096),
            ("disk replaced", |w| w.disks[0].disk = DiskId::random()),
            ("a copy of it is attached, too", |w| {
                w.disks.push(DiskFacts { slot: "b".into(), ..w.disks[0].clone() });
            }),
            ("tracking id differs", |w| w.points[0].tracking[0].1 = "rct9".into()),
        ];
        for (name, spoil) in doubts {
            let mut world = world();
            spoil(&mut world);
            let plan = world.plan();
            assert_eq!(plan.kind, BackupKind::Full, "{name}");
            assert!(matches!(plan.disks[0], BaseDecision::Everything { .. }), "{name}");
            assert!(!plan.reasons.is_empty(), "{name}: no reason given");
            let told = plan.reasons[0].contains("its host left");
            assert_eq!(told, name == "not bound", "{name}: {:?}", plan.reasons);
        }
    }

    #[test]
    fn a_new_disk_is_read_in_full_beside_an_incremental_one() {
        let mut world = world();
        world.disks.push(DiskFacts { disk: DiskId::random(), size: 1, slot: "b".into() });
        let plan = world.plan();
        assert_eq!(plan.kind, BackupKind::Incremental);
        assert!(matches!(plan.disks[0], BaseDecision::Changes { .. }));
        assert!(matches!(plan.disks[1], BaseDecision::Everything { .. }));
        assert!(plan.reasons[0].contains('b'));
    }

    #[test]
    fn a_full_or_a_check_never_asks_for_changes() {
        for kind in [BackupKind::Full, BackupKind::ConsistencyCheck] {
            let plan = World { wanted: kind, ..world() }.plan();
            assert_eq!(plan.kind, kind);
            assert!(matches!(plan.disks[0], BaseDecision::Everything { .. }));
        }
    }

    #[test]
    fn after_a_host_crash_the_coarse_map_is_used_and_said_to_be_unproven() {
        let mut world = world();
        world.binding.as_mut().expect("bound").tracking_unproven = true;
        let plan = world.plan();
        assert_eq!(plan.kind, BackupKind::Incremental);
        assert!(plan.reasons[0].contains("not proven"));
    }
}
