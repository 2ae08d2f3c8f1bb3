//! The base rule's memory: which reference point a committed point is bound to.

use outrider_proto::ids::{JobId, LeaseEpoch, VmIncarnation, VmKey};
use outrider_proto::model::Binding;
use serde::{Deserialize, Serialize};

use super::{Outcome, Refusal, State};

/// What the next incremental of a VM may start from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Base {
    pub(crate) binding: Binding,
    /// Incarnation of VM and point.
    pub(crate) incarnation: VmIncarnation,
    /// Who bound it.
    pub(crate) job: JobId,
    /// Since when its change tracking is in doubt, Unix milliseconds; the first host crash counts.
    #[serde(default)]
    pub(crate) unproven_since_ms: Option<u64>,
}

impl State {
    pub(super) fn bind(
        &mut self,
        id: JobId,
        epoch: LeaseEpoch,
        binding: Binding,
        now: u64,
    ) -> Outcome {
        let Some(job) = self.jobs.get(id) else { return Refusal::UnknownJob(id).into() };
        let bound = self.bases.get(&job.vm);
        if bound.is_some_and(|b| b.job == id && same_base(&b.binding, &binding)) {
            return Outcome::Bound;
        }
        if job.current(epoch).is_none() {
            return Outcome::Superseded(job.superseded(epoch));
        }
        if job.committed != Some(binding.point) {
            return Refusal::NotBindable(format!(
                "job {id} has not committed recovery point {}: commit it first",
                binding.point
            ))
            .into();
        }
        let (Some(point), Some(vm)) = (self.points.get(&binding.point), self.vms.get(&job.vm))
        else {
            return Refusal::UnknownPoint(binding.point).into();
        };
        if point.incarnation != vm.incarnation {
            return Refusal::NotBindable(format!(
                "recovery point {} is of incarnation {}, the VM's disks are of incarnation {}: destroy the reference \
                 point, the next backup reads everything",
                binding.point, point.incarnation, vm.incarnation
            ))
            .into();
        }
        if point.manifest != binding.manifest {
            return Refusal::NotBindable(format!(
                "recovery point {} has manifest {}, the binding names {}",
                binding.point, point.manifest, binding.manifest
            ))
            .into();
        }
        // A point that may lack a change hands the doubt on: what is built on it may lack the same. Only a point that
        // was read as a whole ends it.
        let unproven = job.unproven || binding.tracking_unproven || point.tracking_unproven;
        let since = bound.and_then(|b| b.unproven_since_ms).unwrap_or(now);
        let base = Base {
            binding: Binding { tracking_unproven: unproven, ..binding },
            incarnation: vm.incarnation,
            job: id,
            unproven_since_ms: unproven.then_some(since),
        };
        let vm = job.vm.clone();
        self.unbased.remove(&vm);
        self.bases.insert(vm, base);
        Outcome::Bound
    }

    /// The VM's host crashed. A job under way may have made its checkpoint before: its point and what it binds later are
    /// as unproven as the base is now.
    pub(super) fn tracking_unproven(&mut self, vm: &VmKey, now: u64) -> Outcome {
        self.jobs.mark_unproven(vm);
        if let Some(base) = self.bases.get_mut(vm) {
            base.binding.tracking_unproven = true;
            base.unproven_since_ms.get_or_insert(now);
        }
        Outcome::Done
    }
}

/// The same, but for what a host crash may have marked since.
fn same_base(a: &Binding, b: &Binding) -> bool {
    (a.point, a.manifest, &a.reference_point, &a.disks)
        == (b.point, b.manifest, &b.reference_point, &b.disks)
}
