//! Seeing whether the restored VM boots. What it replaces is kept when it does not.

use std::time::Duration;

use outrider_proto::ids::VmGuid;
use outrider_proto::rpc::RestoreWork;

use super::make::Restore;
use super::trail::REPLACED;
use crate::hypervisor::{BootCheck, Hypervisor};
use crate::job::JobError;

/// When nothing is said, and the most that is waited.
const PATIENCE: Duration = Duration::from_secs(300);
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// The check that a restore asks for.
pub(super) fn asked(work: &RestoreWork) -> Option<BootCheck> {
    let check = work.boot_check.as_ref()?;
    let patience = match check.patience_ms {
        0 => PATIENCE,
        ms => Duration::from_millis(ms).min(LONGEST),
    };
    let text = Some(check.text.trim().to_owned()).filter(|t| !t.is_empty());
    Some(BootCheck { patience, text, screen: check.screen })
}

/// Refuses a check that this hypervisor can never answer, before anything is written.
pub(super) fn refuse_in_vain(
    hypervisor: &dyn Hypervisor,
    work: &RestoreWork,
) -> Result<(), JobError> {
    match asked(work).and_then(|check| hypervisor.boot_obstacle(&check)) {
        Some(obstacle) => {
            Err(JobError::Unfit(format!("the boot check cannot be made on this host: {obstacle}")))
        }
        None => Ok(()),
    }
}

impl Restore<'_> {
    /// Starts the VM and watches it.
    pub(super) async fn boot(&mut self, vm: VmGuid, check: &BootCheck) -> Result<(), JobError> {
        self.context.phase("waiting for the VM to boot");
        let booting = self.context.hypervisor.boot_vm(&self.context.lease, vm, check).await?;
        let sentence = booting.sentence(&self.target.name);
        if booting.sign.is_some() {
            tracing::info!(%vm, sentence, "boot check");
            self.notes.push(sentence);
            return Ok(());
        }
        if let Some(replaced) = &self.trail.replaced {
            let copy = self.target.folder.join(REPLACED);
            self.notes.push(format!(
                "the files of VM {:?}, which was replaced, are kept, since the restored one was not seen to boot: {}; its \
                 definition is in {}",
                replaced.name,
                super::swap::listed(&replaced.disks),
                copy.display()
            ));
        }
        Err(JobError::NotBooted(sentence))
    }
}

#[cfg(test)]
mod tests {
    use outrider_proto::rpc;

    use super::*;

    #[test]
    fn a_check_has_a_bound_and_an_empty_text_is_none() {
        let work = |check| RestoreWork { boot_check: check, ..RestoreWork::default() };
        assert_eq!(asked(&work(None)), None);
        let check = rpc::BootCheck { patience_ms: 0, text: " ".into(), screen: true };
        let check = asked(&work(Some(check))).expect("asked");
        assert_eq!(check, BootCheck { patience: PATIENCE, text: None, screen: true });
        let check = rpc::BootCheck { patience_ms: u64::MAX, text: "up".into(), screen: false };
        let check = asked(&work(Some(check))).expect("asked");
        assert_eq!((check.patience, check.text.as_deref()), (LONGEST, Some("up")));
    }
}
