//! What speaks against a checkpoint now: sentences that say what to do (requirements J9, J12, P5, P9). Pure.
//!
//! An obstacle either passes by itself, and is waited out with growing pauses before it is an error, or somebody has to
//! act. What only makes a recovery point poorer is a warning that is stored with the run.

pub(crate) mod replica;

use std::path::Path;

use outrider_proto::error_code::{self, ErrorCode};

use crate::hypervisor::facts::{Access, Format, Release, UserSnapshots};
use crate::hypervisor::{Checkpoint, VmState};

/// Free space that a checkpoint needs at least, whatever the disks' size.
const LEAST_FREE: u64 = 1 << 30;
/// Share of a disk's size that a guest may write while the checkpoint is open (churn x window), as a divisor.
const CHURN_DIVISOR: u64 = 20;
/// ClusterFunctionalLevel of a cluster whose nodes are all on Server 2016 or later, and that was raised to it.
const LEVEL_2016: u32 = 9;
/// Longest path that Windows' own tools handle.
const LONGEST_PATH: usize = 259;

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
    /// A redirected volume was waited for long enough: go on, with a warning.
    pub redirected_waited: bool,
}

/// The first obstacle, and the warnings that come with a run that goes on.
#[must_use]
pub fn check(state: &VmState, situation: Situation<'_>) -> (Option<Obstacle>, Vec<String>) {
    let mut warnings = Vec::new();
    let obstacle = host(state)
        .or_else(|| movement(state))
        .or_else(|| foreign(state, situation.foreign))
        .or_else(|| replica::obstacle(state))
        .or_else(|| busy(state))
        .or_else(|| volumes(state, situation.redirected_waited, &mut warnings))
        .or_else(|| disks(state, situation.require_all_disks, &mut warnings));
    if obstacle.is_some() {
        return (obstacle, Vec::new());
    }
    warnings.extend(replica::warning(state));
    warnings.extend(remarks(state));
    (None, warnings)
}

/// Why changes of this VM cannot be asked for, so that each run reads everything and keeps no reference point (facts,
/// section 2.2); `None` where they can.
#[must_use]
pub fn untracked(state: &VmState) -> Option<String> {
    let vm = &state.vm;
    if vm.replica != crate::hypervisor::ReplicaRole::None {
        return Some(
            "everything is read: no source says that change tracking sees what replication writes to a replica's disks"
                .into(),
        );
    }
    if !crate::hypervisor::tracks_changes(&vm.version) {
        return Some(format!(
            "everything is read: configuration version {} has no change tracking (6.2 or later has); upgrade the VM with \
             Update-VMVersion while it is off",
            vm.version
        ));
    }
    let level = state.facts.host.functional_level?;
    (level < LEVEL_2016).then(|| {
        format!(
            "everything is read: the cluster's functional level is {level}, change tracking needs {LEVEL_2016}; finish the \
             rolling upgrade with Update-ClusterFunctionalLevel"
        )
    })
}

/// What speaks against a folder or file of Hyper-V as the target of a restore (J9); `None` when nothing does.
#[must_use]
pub fn target_path(path: &Path) -> Option<String> {
    let text = path.display().to_string();
    if let Some(server) = server_of(&text)
        && server.parse::<std::net::IpAddr>().is_ok()
    {
        return Some(format!(
            "{text:?} names its file server by address: Hyper-V reaches a share by its server's name only; write \
             \\\\server\\share\\folder"
        ));
    }
    // Windows counts in UTF-16.
    let length = text.encode_utf16().count();
    (length > LONGEST_PATH).then(|| {
        format!(
            "{text:?} has {length} characters, Hyper-V's tools handle {LONGEST_PATH}: restore to a shorter folder \
             (--folder)"
        )
    })
}

/// What has to be so on a file server that a VM is restored to, and that is seen only when the VM starts (J9).
#[must_use]
pub fn target_remark(folder: &Path) -> Option<String> {
    let text = folder.display().to_string();
    server_of(&text).map(|server| {
        format!(
            "the VM lies on the file server {server:?}: the computer accounts of all hosts that may run it, and of their \
             cluster, need full control of {text:?}, in the share's rights as in the folder's"
        )
    })
}

/// The server of a UNC path.
fn server_of(path: &str) -> Option<&str> {
    let rest = path.strip_prefix(r"\\?\UNC\").or_else(|| path.strip_prefix(r"\\"))?;
    rest.split('\\').next().filter(|s| !s.is_empty() && *s != "?" && *s != ".")
}

fn waits(code: ErrorCode, sentence: String) -> Option<Obstacle> {
    Some(Obstacle { code, sentence, passes: true })
}

fn refused(code: ErrorCode, sentence: String) -> Option<Obstacle> {
    Some(Obstacle { code, sentence, passes: false })
}

fn host(state: &VmState) -> Option<Obstacle> {
    let (vm, host) = (&state.vm.name, &state.facts.host);
    if host.release() < Release::Server2016 {
        return refused(
            error_code::HOST_TOO_OLD,
            format!(
                "VM {vm:?} runs on {}: Outrider protects VMs of Windows Server 2016 and later, older hosts have no change \
                 tracking that survives a move; upgrade the host, move the VM to a newer one, or protect it from inside the \
                 guest",
                host.release_name()
            ),
        );
    }
    let node = host.node;
    if node.quarantined {
        return waits(
            error_code::HOST_UNUSABLE,
            format!(
                "the host of VM {vm:?} is in quarantine: it lost the cluster too often; find out why and bring it back with \
                 Start-ClusterNode -ClearQuarantine; the run goes on where the cluster moves the VM"
            ),
        );
    }
    if node.isolated || state.facts.group.is_some_and(|g| g.unmonitored) {
        return waits(
            error_code::HOST_UNUSABLE,
            format!(
                "the host of VM {vm:?} is isolated from the cluster: check the cluster's networks; the run goes on when the \
                 host is back, or where the cluster restarts the VM"
            ),
        );
    }
    if node.draining {
        return waits(
            error_code::VM_BUSY,
            format!(
                "the host of VM {vm:?} is being drained: no new checkpoint is made on it; the run goes on at the VM's new host"
            ),
        );
    }
    None
}

fn movement(state: &VmState) -> Option<Obstacle> {
    let vm = &state.vm.name;
    if !state.vm.realized {
        return waits(
            error_code::VM_BUSY,
            format!(
                "VM {vm:?} is only planned on this host: a migration is under way; the run is repeated after it"
            ),
        );
    }
    if state.is_migrating() {
        return waits(
            error_code::VM_BUSY,
            format!("VM {vm:?} is being migrated; the run goes on at its new host"),
        );
    }
    if state.is_moving_storage() {
        return waits(
            error_code::VM_BUSY,
            format!("the storage of VM {vm:?} is being moved; the run goes on after it"),
        );
    }
    let group = state.facts.group.unwrap_or_default();
    if group.queued {
        return waits(
            error_code::VM_BUSY,
            format!("VM {vm:?} waits in the cluster's queue for a move; the run goes on after it"),
        );
    }
    if group.locked {
        return waits(
            error_code::VM_BUSY,
            format!(
                "the cluster role of VM {vm:?} is locked by an operation (migration, backup or storage move); the run goes on \
                 after it; if it stays locked, look at the role in Failover Cluster Manager"
            ),
        );
    }
    None
}

fn foreign(state: &VmState, foreign: &[Checkpoint]) -> Option<Obstacle> {
    let first = foreign.first()?;
    waits(
        error_code::CHECKPOINT_FAILED,
        format!(
            "VM {:?} has a recovery checkpoint {:?} of another backup product: two at a time make both fail; wait until that \
             backup has ended, or remove its leftover",
            state.vm.name, first.name
        ),
    )
}

/// OperationalStatus says that a request is being worked on (facts, section 1.1).
fn busy(state: &VmState) -> Option<Obstacle> {
    if !state.is_busy() {
        return None;
    }
    let what = match state.operation {
        32768 => "a checkpoint of it is being made",
        32769 => "a checkpoint is being applied to it",
        32770 => "a checkpoint of it is being deleted",
        32772 => "its disks are being merged",
        32773 => "it is being exported",
        32776 => "another backup of it is running",
        32777 => "its settings are being changed",
        32781 => "its compatibility is being checked",
        _ => "the hypervisor is busy with it",
    };
    waits(
        error_code::VM_BUSY,
        format!("VM {:?} has to wait: {what}; the run goes on after it", state.vm.name),
    )
}

fn volumes(
    state: &VmState,
    redirected_waited: bool,
    warnings: &mut Vec<String>,
) -> Option<Obstacle> {
    let vm = &state.vm.name;
    for volume in &state.volumes {
        let folder = volume.folder.display();
        if volume.access == Access::None {
            return waits(
                error_code::HOST_UNUSABLE,
                format!(
                    "{folder}, where disks of VM {vm:?} lie, cannot be reached from this host now; check the volume"
                ),
            );
        }
        // A volume that is always redirected (ReFS, Storage Spaces Direct) is as it should be.
        if volume.access == Access::Redirected && volume.usual == Access::Direct {
            let sentence = format!(
                "{folder}, where disks of VM {vm:?} lie, is in redirected mode, although this host usually reaches it \
                 directly: reads go over the cluster's network; look at Get-ClusterSharedVolumeState"
            );
            if !redirected_waited {
                return waits(error_code::HOST_UNUSABLE, sentence);
            }
            warnings.push(sentence);
        }
        let needed = LEAST_FREE.max(volume.disk_bytes / CHURN_DIVISOR);
        if volume.free < needed {
            return refused(
                error_code::LOW_SPACE,
                format!(
                    "{folder} has {} MiB free, a checkpoint of VM {vm:?} may need {} MiB; free space there or move the VM's \
                     disks",
                    volume.free >> 20,
                    needed >> 20
                ),
            );
        }
    }
    None
}

fn disks(state: &VmState, require_all: bool, warnings: &mut Vec<String>) -> Option<Obstacle> {
    let vm = &state.vm.name;
    for disk in &state.vm.disks {
        if disk.format == Format::VhdSet {
            return refused(
                error_code::DISK_UNSUPPORTED,
                format!(
                    "disk {} ({}) of VM {vm:?} is a VHD set, which can be captured only together with all VMs that share it; \
                     protect the guest cluster from inside its guests",
                    disk.slot, disk.path
                ),
            );
        }
        if let Some(server) = server_of(&disk.path)
            && server.parse::<std::net::IpAddr>().is_ok()
        {
            warnings.push(format!(
                "disk {} ({}) of VM {vm:?} is on a file server named by address; Hyper-V and the agent need its name to prove \
                 who they are: correct the path",
                disk.slot, disk.path
            ));
        }
        let Some(why) = disk.uncapturable else { continue };
        let sentence = format!(
            "disk {} ({}) of VM {vm:?} cannot be captured from the host: {why}; protect it from inside the guest",
            disk.slot, disk.path
        );
        if require_all {
            return refused(
                error_code::DISK_UNSUPPORTED,
                format!("{sentence}, or allow the group to leave it out"),
            );
        }
        warnings.push(format!("{sentence}; it is not part of this recovery point"));
    }
    None
}

/// What an operator should know of a run that goes on.
fn remarks(state: &VmState) -> Vec<String> {
    let vm = &state.vm.name;
    let mut out = Vec::new();
    if state.facts.user_snapshots == UserSnapshots::Disabled {
        out.push(format!(
            "checkpoints are disabled for VM {vm:?} (Set-VM -CheckpointType Disabled): no source says whether that keeps \
             Hyper-V from making backup checkpoints, too; if the run fails, enable them"
        ));
    }
    if state.facts.shielded {
        out.push(format!(
            "VM {vm:?} is shielded: its disks are captured as they are, encrypted; only a host of the same guarded fabric can \
             start a restored copy"
        ));
    }
    if state.is_critical() {
        out.push(format!(
            "Hyper-V calls VM {vm:?} critical (its storage or worker process fails); look at the VM on its host"
        ));
    }
    out
}

#[cfg(test)]
mod tests;
