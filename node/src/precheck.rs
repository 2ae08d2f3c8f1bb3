//! What speaks against a checkpoint now: sentences that say what to do. Pure.

use outrider_proto::error_code::{self, ErrorCode};

use crate::hypervisor::{Checkpoint, VmState};

/// Free space that a checkpoint needs at least, whatever the disks' size.
const LEAST_FREE: u64 = 1 << 30;
/// Share of a disk's size that a guest may write while the checkpoint is open (churn x window), as a divisor.
const CHURN_DIVISOR: u64 = 20;

/// Why no checkpoint is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    /// Stable code.
    pub code: ErrorCode,
    /// What, why, what to do.
    pub sentence: String,
    /// Whether it may pass by itself.
    pub passes: bool,
}

/// What to look at besides the VM's own state.
#[derive(Debug, Clone, Copy)]
pub struct Situation<'a> {
    /// Recovery checkpoints that exist and are not ours.
    pub foreign: &'a [Checkpoint],
    /// Fail when a disk cannot be captured, instead of leaving it out with a warning.
    pub require_all_disks: bool,
    /// Bytes of all disks that will be frozen, per volume folder index unknown: the whole VM.
    pub disk_bytes: u64,
}

/// The first obstacle, and the warnings that come with a run that goes on.
#[must_use]
pub fn check(state: &VmState, situation: Situation<'_>) -> (Option<Obstacle>, Vec<String>) {
    let vm = &state.vm;
    let mut warnings = Vec::new();
    let obstacle =
        |code, passes, sentence: String| (Some(Obstacle { code, sentence, passes }), Vec::new());
    if !vm.realized {
        return obstacle(
            error_code::CHECKPOINT_FAILED,
            true,
            format!(
                "VM {:?} is only planned on this host: a migration is under way; the run is repeated after it",
                vm.name
            ),
        );
    }
    if state.is_migrating() {
        return obstacle(
            error_code::CHECKPOINT_FAILED,
            true,
            format!("VM {:?} is being migrated; the run goes on at its new host", vm.name),
        );
    }
    if !supports_recovery_checkpoints(&vm.version) {
        return obstacle(
            error_code::DISK_UNSUPPORTED,
            false,
            format!(
                "VM {:?} has configuration version {}: recovery checkpoints with change tracking need 6.2 or later; \
                 upgrade it with Update-VMVersion while it is off",
                vm.name, vm.version
            ),
        );
    }
    if let Some(foreign) = situation.foreign.first() {
        return obstacle(
            error_code::CHECKPOINT_FAILED,
            true,
            format!(
                "VM {:?} has a recovery checkpoint {:?} of another backup product: two at a time make both fail; wait \
                 until that backup has ended, or remove its leftover",
                vm.name, foreign.name
            ),
        );
    }
    if let Some((replication, health)) = state.replication
        && (health == 3 || matches!(replication, 2 | 8..=13 | 15 | 16))
    {
        return obstacle(
            error_code::CHECKPOINT_FAILED,
            true,
            format!(
                "the replication of VM {:?} does not allow a checkpoint now (state {replication}, health {health}); wait \
                 until it is in step again, or resume it",
                vm.name
            ),
        );
    }
    let needed = LEAST_FREE.max(situation.disk_bytes / CHURN_DIVISOR);
    if let Some((folder, free)) = state.volumes.iter().find(|(_, free)| *free < needed) {
        return obstacle(
            error_code::LOW_SPACE,
            false,
            format!(
                "{} has {} MiB free, a checkpoint of VM {:?} may need {} MiB; free space there or move the VM's disks",
                folder.display(),
                free >> 20,
                vm.name,
                needed >> 20
            ),
        );
    }
    for disk in &vm.disks {
        let Some(why) = disk.uncapturable else { continue };
        let sentence = format!(
            "disk {} ({}) of VM {:?} cannot be captured from the host: {why}; protect it from inside the guest",
            disk.slot, disk.path, vm.name
        );
        if situation.require_all_disks {
            let sentence = format!("{sentence}, or allow the group to leave it out");
            return obstacle(error_code::DISK_UNSUPPORTED, false, sentence);
        }
        warnings.push(format!("{sentence}; it is not part of this recovery point"));
    }
    (None, warnings)
}

fn supports_recovery_checkpoints(version: &str) -> bool {
    let mut parts = version.split('.').map(|p| p.parse::<u32>().unwrap_or(0));
    let found = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    // A version that is not told is not held against the VM: the hypervisor itself will refuse.
    version.is_empty() || found >= (6, 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consistency::tests::state;
    use crate::hypervisor::{DiskSeen, Power, VmState};
    use outrider_proto::ids::CheckpointId;

    fn obstacle(
        state: &VmState,
        require_all_disks: bool,
        foreign: &[Checkpoint],
    ) -> Option<Obstacle> {
        check(state, Situation { foreign, require_all_disks, disk_bytes: 100 << 30 }).0
    }

    #[test]
    fn a_healthy_vm_has_no_obstacle() {
        assert_eq!(obstacle(&state(Power::Running, true), true, &[]), None);
    }

    #[test]
    fn too_little_space_names_the_volume_and_the_need() {
        let mut vm = state(Power::Running, true);
        vm.volumes = vec![("/csv/v1".into(), 4 << 30)];
        let found = obstacle(&vm, false, &[]).expect("too little for 100 GiB of disks");
        assert_eq!(found.code, error_code::LOW_SPACE);
        assert!(
            found.sentence.contains("/csv/v1") && found.sentence.contains("5120 MiB"),
            "{}",
            found.sentence
        );
    }

    #[test]
    fn a_pass_through_disk_is_a_warning_unless_the_group_insists() {
        let mut vm = state(Power::Running, true);
        vm.vm.disks = vec![DiskSeen {
            disk_id: None,
            size: 0,
            slot: "0\\1".into(),
            path: "PhysicalDrive2".into(),
            uncapturable: Some("it is a pass-through disk"),
        }];
        assert!(obstacle(&vm, true, &[]).is_some());
        let (none, warnings) =
            check(&vm, Situation { foreign: &[], require_all_disks: false, disk_bytes: 0 });
        assert_eq!(none, None);
        assert!(warnings[0].contains("pass-through"));
    }

    #[test]
    fn another_products_checkpoint_is_waited_for_and_never_touched() {
        let foreign = [Checkpoint {
            id: CheckpointId::random(),
            name: "Other 7".into(),
            path: String::new(),
        }];
        let found = obstacle(&state(Power::Running, true), false, &foreign).expect("an obstacle");
        assert!(found.passes && found.sentence.contains("Other 7"));
    }
}
