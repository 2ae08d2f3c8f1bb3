//! What backups left on hosts, compared with what is known: which checkpoints, reference points and child files no duty and
//! no base explains, whose they seem to be, and what to do. Pure; nothing here changes anything.

mod lasting;
mod message;
mod watch;

use std::collections::BTreeSet;

use outrider_proto::ids::VmKey;

use crate::state::State;

pub(crate) use lasting::Lasting;
pub(crate) use message::from_message;
pub(crate) use watch::{Bounds, Watch};

/// What one host shows of one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VmTraces {
    pub(crate) vm: VmKey,
    pub(crate) name: String,
    pub(crate) checkpoints: Vec<Checkpoint>,
    pub(crate) points: Vec<ReferencePoint>,
    pub(crate) chains: Vec<Chain>,
    pub(crate) merging: bool,
}

/// Who makes checkpoints of a kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Recovery,
    User,
    Replica,
}

/// A checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Checkpoint {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) kind: Kind,
    /// 0: not told.
    pub(crate) created_ms: u64,
    /// It carries a name of ours.
    pub(crate) ours: bool,
}

/// A reference point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ReferencePoint {
    pub(crate) id: String,
    pub(crate) name: String,
    /// None: nothing about it tells whose it is.
    pub(crate) ours: Option<bool>,
}

/// A disk that writes to a child file, this file first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chain {
    pub(crate) slot: String,
    pub(crate) files: Vec<String>,
    pub(crate) broken: String,
}

impl Chain {
    /// Files that are children of another.
    fn children(&self) -> usize {
        self.files.len().saturating_sub(1)
    }
}

/// What is known of a VM that may explain what its host shows.
#[derive(Debug, Clone, Default)]
pub(crate) struct Known {
    pub(crate) duties: Vec<KnownDuty>,
    /// Id of the bound reference point.
    pub(crate) bound: Option<String>,
}

/// An open duty.
#[derive(Debug, Clone, Default)]
pub(crate) struct KnownDuty {
    pub(crate) checkpoint: String,
    pub(crate) checkpoint_name: String,
    pub(crate) reference_point: String,
    /// Its checkpoint may exist without its name.
    pub(crate) unnamed: bool,
    /// Its conversion has begun, and what it made was not reported.
    pub(crate) converting: bool,
}

impl Known {
    /// What the state knows of a VM.
    pub(crate) fn of(state: &State, vm: &VmKey) -> Self {
        let duty = |duty: &crate::state::duties::Duty| KnownDuty {
            checkpoint: duty.checkpoint.clone(),
            checkpoint_name: duty.checkpoint_name.clone(),
            reference_point: duty.reference_point.clone(),
            unnamed: duty.state == crate::state::duties::DutyState::Recorded,
            converting: duty.converting.is_some() && duty.reference_point.is_empty(),
        };
        Self {
            duties: state.open_duties(vm).map(duty).collect(),
            bound: state.bases.get(vm).map(|base| base.binding.reference_point.clone()),
        }
    }

    fn explains_checkpoint(&self, c: &Checkpoint) -> bool {
        self.duties.iter().any(|d| {
            (!d.checkpoint.is_empty() && same(&d.checkpoint, &c.id))
                || (!d.checkpoint_name.is_empty() && d.checkpoint_name == c.name)
        })
    }

    fn explains_point(&self, p: &ReferencePoint) -> bool {
        self.bound.as_deref().is_some_and(|bound| same(bound, &p.id))
            || self
                .duties
                .iter()
                .any(|d| !d.reference_point.is_empty() && same(&d.reference_point, &p.id))
    }
}

/// Whose something seems to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    Ours,
    AnotherProduct,
    User,
    Replica,
    Unknown,
}

impl Owner {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::AnotherProduct => "another product",
            Self::User => "user",
            Self::Replica => "replica",
            Self::Unknown => "unknown",
        }
    }
}

/// What kind of thing was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    Checkpoint,
    ReferencePoint,
    Chain,
}

impl What {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Checkpoint => "checkpoint",
            Self::ReferencePoint => "reference point",
            Self::Chain => "chain",
        }
    }
}

/// Something that nothing known explains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Orphan {
    pub(crate) what: What,
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) owner: Owner,
    pub(crate) created_ms: u64,
    pub(crate) chain: Vec<String>,
    pub(crate) why: String,
    pub(crate) next: &'static str,
}

/// What of a VM nothing explains, and how many checkpoints and reference points are explained.
pub(crate) fn orphans(found: &VmTraces, known: &Known) -> (Vec<Orphan>, u32) {
    let mut orphans = Vec::new();
    let mut explained = 0;
    let files = |chains: &[Chain]| -> Vec<String> {
        chains.iter().max_by_key(|c| c.files.len()).map(|c| c.files.clone()).unwrap_or_default()
    };
    let recovery = || found.checkpoints.iter().filter(|c| c.kind == Kind::Recovery);
    let nameless: BTreeSet<&str> = recovery()
        .filter(|c| !c.ours && !known.explains_checkpoint(c))
        .map(|c| c.id.as_str())
        .collect();
    for checkpoint in &found.checkpoints {
        if known.explains_checkpoint(checkpoint) {
            explained += 1;
            continue;
        }
        let (owner, why, next) = match checkpoint.kind {
            Kind::User => (
                Owner::User,
                "an administrator's checkpoint; every write goes to its child file".to_owned(),
                "delete it in Hyper-V Manager when nobody needs it any more; backups go on meanwhile",
            ),
            Kind::Replica => (
                Owner::Replica,
                "a recovery point of Hyper-V Replica".to_owned(),
                "nothing: Hyper-V Replica removes it by its own rules",
            ),
            Kind::Recovery if checkpoint.ours => (
                Owner::Ours,
                "it carries a name of ours, and no open duty names it".to_owned(),
                "run a backup of the VM (`outrider backup run --vm`): it removes what earlier ones left before it begins",
            ),
            Kind::Recovery if nameless.len() == 1 && known.duties.iter().any(|d| d.unnamed) => {
                // A checkpoint of ours between its making and its naming.
                explained += 1;
                continue;
            }
            Kind::Recovery => (
                Owner::AnotherProduct,
                "a backup checkpoint that is not ours: another product's, or of another fabric"
                    .to_owned(),
                "ask who else backs this VM up; if nobody's backup runs, remove it with Get-VMSnapshot -SnapshotType Recovery | \
                 Remove-VMSnapshot (QEMU: block-export-del). Outrider never touches it, and waits with the VM's backup",
            ),
        };
        orphans.push(Orphan {
            what: What::Checkpoint,
            id: checkpoint.id.clone(),
            name: checkpoint.name.clone(),
            owner,
            created_ms: checkpoint.created_ms,
            chain: files(&found.chains),
            why,
            next,
        });
    }
    for point in &found.points {
        if known.explains_point(point) {
            explained += 1;
            continue;
        }
        let (owner, why, next) = match point.ours {
            Some(true) => (
                Owner::Ours,
                "made by this fabric, and neither bound nor named by a duty",
                "run a backup of the VM (`outrider backup run --vm`): it removes those that are not bound",
            ),
            Some(false) => (
                Owner::AnotherProduct,
                "another program's",
                "leave it to the program that made it; changed blocks are recorded for it as long as it exists",
            ),
            None if known.duties.iter().any(|d| d.converting) => (
                Owner::Unknown,
                "a conversion of ours was not reported; this may be what it made",
                "nothing: the next job of the VM finds out. If it stays, its duty says `outrider vm list --json`",
            ),
            None => (
                Owner::Unknown,
                "not bound and not named by a duty; reference points have no name, so it is another product's or of a fabric \
                 that was removed without --clean",
                "if no other backup product protects the VM, remove it with the method DestroyReferencePoint of \
                 Msvm_VirtualSystemReferencePointService; Outrider never touches it",
            ),
        };
        orphans.push(Orphan {
            what: What::ReferencePoint,
            id: point.id.clone(),
            name: point.name.clone(),
            owner,
            created_ms: 0,
            chain: Vec::new(),
            why: why.to_owned(),
            next,
        });
    }
    orphans.extend(found.chains.iter().filter_map(|chain| unexplained_chain(found, chain)));
    (orphans, explained)
}

/// Each checkpoint has one child file on each disk; what is more, nothing explains but a merge.
fn unexplained_chain(found: &VmTraces, chain: &Chain) -> Option<Orphan> {
    let checkpoints = found.checkpoints.len();
    let children = chain.children();
    let broken = !chain.broken.is_empty();
    if found.merging || (children <= checkpoints && !broken) {
        return None;
    }
    let (why, next) = if broken {
        (
            format!("its parents cannot be followed: {}", chain.broken),
            "do not start, move or merge the VM before the missing file is back; look for it beside the file named last",
        )
    } else {
        (
            format!(
                "{children} child file(s), {checkpoints} checkpoint(s), and no merge under way: a merge that did not happen"
            ),
            "shut the VM down when that is possible: Hyper-V merges then. If the files stay, merge them in Hyper-V Manager (Edit \
             Disk) from the file that is written to",
        )
    };
    Some(Orphan {
        what: What::Chain,
        id: chain.slot.clone(),
        name: chain.files.first().cloned().unwrap_or_default(),
        owner: Owner::Unknown,
        created_ms: 0,
        chain: chain.files.clone(),
        why,
        next,
    })
}

fn same(a: &str, b: &str) -> bool {
    a.eq_ignore_ascii_case(b)
}

#[cfg(test)]
mod tests;
