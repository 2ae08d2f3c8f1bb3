//! Surveys as agents send them.

use outrider_proto::model::{FieldError, vm_key};
use outrider_proto::rpc;

use super::{Chain, Checkpoint, Kind, ReferencePoint, VmTraces};

/// One VM of a survey.
///
/// # Errors
/// [`FieldError`]: it names no VM.
pub(crate) fn from_message(m: rpc::VmTraces) -> Result<VmTraces, FieldError> {
    let vm = vm_key("VmTraces", m.vm.as_ref())?;
    let checkpoint = |c: rpc::FoundCheckpoint| {
        let kind = match c.kind() {
            rpc::CheckpointKind::User => Kind::User,
            rpc::CheckpointKind::Replica => Kind::Replica,
            // What a later agent may tell apart is litter until somebody looked.
            rpc::CheckpointKind::Recovery | rpc::CheckpointKind::Unspecified => Kind::Recovery,
        };
        Checkpoint { id: c.id, name: c.name, kind, created_ms: c.created_unix_ms, ours: c.ours }
    };
    let point =
        |p: rpc::FoundReferencePoint| ReferencePoint { id: p.id, name: p.name, ours: p.ours };
    let chain = |c: rpc::FoundChain| Chain { slot: c.slot, files: c.files, broken: c.broken };
    Ok(VmTraces {
        vm,
        name: m.vm_name,
        checkpoints: m.checkpoints.into_iter().map(checkpoint).collect(),
        points: m.reference_points.into_iter().map(point).collect(),
        chains: m.chains.into_iter().map(chain).collect(),
        merging: m.merging,
    })
}
