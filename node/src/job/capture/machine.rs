//! What the VM is besides its disks, as the point keeps it.

use outrider_proto::manifest::Machine;

use crate::hypervisor::HypervisorError;
use crate::job::backup::Open;
use crate::job::{JobContext, JobError};

/// What the VM is besides its disks. That it cannot be told spoils no backup: the point then lacks what restores plan
/// with, and says so.
pub(super) async fn machine(
    context: &JobContext,
    open: &Open,
    warnings: &mut Vec<String>,
) -> Result<Machine, JobError> {
    match context.hypervisor.machine(&open.checkpoint).await {
        Ok(mut machine) => {
            machine.host.clone_from(&context.host);
            warnings.extend(exportable(&machine));
            Ok(machine)
        }
        Err(HypervisorError::Lease(lost)) => Err(lost.into()),
        Err(e) => {
            tracing::warn!(error = %e, "the point holds no facts about adapters, images and security");
            warnings.push(format!(
                "what the VM has besides disks could not be told ({e}): a restore cannot check switches, images and \
                 guardian certificates before it writes"
            ));
            Ok(Machine::default())
        }
    }
}

/// A virtual TPM starts only where a guardian's private keys are; this host can still give them away (P12).
fn exportable(machine: &Machine) -> Option<String> {
    let security = machine.security.as_ref().filter(|s| s.tpm)?;
    let here: Vec<&str> =
        security.guardians.iter().filter(|g| g.private_keys).map(|g| g.name.as_str()).collect();
    (!here.is_empty()).then(|| {
        format!(
            "the VM has a virtual TPM whose keys are guarded by {} on host {}: without these certificates no other host \
             can start it. Export them from \"Shielded VM Local Certificates\" with their private keys, and keep them apart",
            here.join(", "),
            machine.host
        )
    })
}
