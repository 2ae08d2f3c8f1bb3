//! Stable error codes: what an operator can look up and a script can match on.
//!
//! Codes travel in gRPC status details and JSON; `docs/errors.md` lists them. Each has a class (may the caller retry?), a
//! meaning and a remedy.

/// What a caller may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The same request may succeed later.
    Retry,
    /// Somebody else has taken over: stop.
    Superseded,
    /// Refused on purpose; something has to change first.
    Refused,
    /// Data or a disk is damaged.
    Broken,
    /// A bug of ours.
    Bug,
}

/// A stable code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ErrorCode {
    /// `OUT-<area>-<number>`; areas: C coordinator, S storage, N node agent, D disk, O operator.
    pub code: &'static str,
    /// Class.
    pub class: Class,
    /// What it means.
    pub meaning: &'static str,
    /// What to do.
    pub remedy: &'static str,
}

macro_rules! codes {
    ($($name:ident = $code:literal, $class:ident, $meaning:literal, $remedy:literal;)*) => {
        $(
            #[doc = $meaning]
            pub const $name: ErrorCode = ErrorCode {
                code: $code, class: Class::$class, meaning: $meaning, remedy: $remedy,
            };
        )*
        /// All codes.
        pub const ALL: &[ErrorCode] = &[$($name),*];
    };
}

codes! {
    NOT_LEADER = "OUT-C-0001", Retry, "This coordinator is not the leader.", "Ask the leader named in the answer; clients do so by themselves.";
    NO_LEADER = "OUT-C-0002", Retry, "No coordinator is leader right now.", "Wait a few seconds; if it lasts, a majority of the coordinators is down: start them.";
    SUPERSEDED = "OUT-C-0003", Superseded, "The job was leased to another host, or the VM moved.", "Nothing: the VM's current host goes on with the job.";
    RECEIPTS_LACKING = "OUT-C-0004", Retry, "The commit lacks receipts of enough current replicas.", "Nothing: the agent asks storage again and sends what is missing.";
    UNKNOWN_VM = "OUT-C-0005", Refused, "No VM of that name or id is known.", "List the VMs with `outrider vm list`; an agent must run on the VM's host.";
    AMBIGUOUS_NAME = "OUT-C-0006", Refused, "Several objects have this name.", "Use the id that the list shows instead of the name.";
    UNKNOWN_GROUP = "OUT-C-0007", Refused, "No protection group of that name or id is known.", "List the groups with `outrider group list`.";
    UNKNOWN_POINT = "OUT-C-0008", Refused, "No such recovery point.", "List the points with `outrider point list --vm NAME`.";
    UNKNOWN_JOB = "OUT-C-0009", Refused, "No such job.", "List the jobs with `outrider job list`.";
    BAD_NAME = "OUT-C-0010", Refused, "A name is empty, longer than 100 characters, or holds control characters.", "Choose a name of 1 to 100 characters without control characters.";
    VM_TAKEN = "OUT-C-0011", Refused, "The VM is in a protection group already.", "Remove it from its group first, or leave it out.";
    HOST_SILENT = "OUT-C-0012", Retry, "The host's agent has not been heard from.", "Start the agent on the host named, and check the network between it and the coordinators.";
    NO_LAYOUT = "OUT-C-0013", Retry, "Too few storage nodes have joined to keep the copies asked for.", "Start more storage nodes, or lower the number of copies.";
    UNKNOWN_HOST = "OUT-C-0014", Refused, "No host of that name is known.", "List the hosts with `outrider host list`.";
    BUSY = "OUT-C-0015", Retry, "Another job works on this VM.", "Wait for it, or cancel it with `outrider job cancel`.";
    KEK_WRONG = "OUT-C-0016", Refused, "The key-encryption key does not open this fabric's keys.", "Start the coordinator with the key file made by `outrider fabric init`, or with the recovery kit.";
    TOKEN_REFUSED = "OUT-C-0017", Refused, "The join token is unknown, expired, used up, revoked, or for another name.", "Make a new one with `outrider fabric token create`, and copy the whole line.";
    NAME_HELD = "OUT-C-0018", Refused, "A member of this role and name exists already, with another key.", "Join under another name, or make a token for this name with --replace.";
    NO_ENROLMENT = "OUT-C-0019", Refused, "The coordinators have no enrolment authority.", "Put enrol.pem and enrol.key, made by `outrider fabric init`, into a coordinator's identity folder and start it again; or issue the identity with `outrider fabric issue`.";
    REVOKED = "OUT-C-0020", Refused, "The certificate of this member is not accepted any more: it was removed from the fabric.", "To bring the machine back, remove the folder of its identity and join with a new token.";
    HOST_NOT_LEFT = "OUT-C-0021", Retry, "The host is not clean yet, so it cannot be forgotten.", "Wait until `outrider host retire` says that it is clean; --force forgets a host whose machine is gone.";
    STORAGE_FULL = "OUT-S-0001", Refused, "A storage node has no space left.", "Add storage, or let retention remove points.";
    STORAGE_UNREACHABLE = "OUT-S-0002", Retry, "Too few storage nodes can be reached.", "Start the storage nodes named; check that UDP to their port is not blocked.";
    CHUNK_LOST = "OUT-S-0003", Broken, "No replica has a readable copy of a chunk.", "Start the storage nodes that are down; if none has it, back the VM up again and restore another point.";
    DENIED = "OUT-S-0004", Refused, "Certificate or ticket does not allow this.", "Check that the certificate was issued by this fabric for this role and host.";
    CHECKPOINT_FAILED = "OUT-N-0001", Retry, "The hypervisor could not create the checkpoint.", "Look at the reason given; check the guest's integration services and the free space of the volume.";
    CHECKPOINT_GONE = "OUT-N-0002", Retry, "The checkpoint that the job read from is gone.", "Nothing: the job starts over; what was stored is not sent again.";
    LOW_SPACE = "OUT-N-0003", Refused, "Too little free space for a checkpoint.", "Free the space named on the volume, or move the VM's disks.";
    HOST_UNCLEAN = "OUT-N-0004", Retry, "A checkpoint or reference point of ours could not be removed yet.", "Outrider goes on trying; look for a stuck merge on the host named.";
    VM_EXISTS = "OUT-N-0005", Refused, "A VM with this identity or name exists on the target.", "Restore under a new name, or with --overwrite.";
    NO_HYPERVISOR = "OUT-N-0006", Refused, "This host has no Hyper-V.", "Install the Hyper-V role, or run the agent on a Hyper-V host.";
    HOST_UNFIT = "OUT-N-0008", Refused, "The host cannot run the VM that is to be restored.", "Restore on a host that supports it, or with the option that the reason names.";
    DISK_BROKEN = "OUT-D-0001", Broken, "A virtual disk is damaged or no virtual disk.", "Check the file named with its hypervisor; restore it if it is damaged.";
    PARENT_MISSING = "OUT-D-0002", Broken, "The parent of a differencing disk is missing or was changed.", "Put the parent back at the path named.";
    DISK_UNSUPPORTED = "OUT-N-0007", Refused, "A disk cannot be captured from the host.", "Protect it from inside the guest, or allow the group to leave it out.";
    CONSISTENCY_UNREACHABLE = "OUT-N-0020", Refused, "The consistency that the group insists on cannot be reached.", "Meet one of the conditions named, or lower the group's minimum with `outrider group edit`.";
    HOST_TOO_OLD = "OUT-N-0021", Refused, "The host is older than Windows Server 2016.", "Upgrade the host, move the VM to a newer one, or protect it from inside the guest.";
    HOST_UNUSABLE = "OUT-N-0022", Retry, "The host cannot work on the VM now: isolated, in quarantine, or without its volume.", "Look at the node and its volumes in Failover Cluster Manager; the run is repeated.";
    VM_BUSY = "OUT-N-0023", Retry, "Another operation on the VM is under way.", "Nothing: it is waited for, and the run is repeated after it.";
    REPLICA_STATE = "OUT-N-0024", Retry, "Hyper-V Replica does not allow a backup of this VM now.", "Do what the sentence says for the state that it names; the run is repeated.";
    NOT_BOOTED = "OUT-N-0025", Refused, "The VM was restored and started, and was not seen to boot in time.", "Look at what the reason says of its console and screen; the restored VM is there and runs as far as it got.";
    COMMAND_FAILED = "OUT-N-0032", Retry, "A command that the group wants to run before its backups failed.", "Look at the command's output in the job (`outrider job list --json`); repair it on the host, or let the group go on without it (`--before-must-succeed=false`).";
    INTERNAL = "OUT-C-9999", Bug, "Something happened that must not.", "Report it with the log of the process named.";
}

/// Looks a code up by its text.
#[must_use]
pub fn find(code: &str) -> Option<&'static ErrorCode> {
    ALL.iter().find(|c| c.code == code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_and_each_has_a_remedy() {
        for (i, code) in ALL.iter().enumerate() {
            assert!(!code.remedy.is_empty() && !code.meaning.is_empty(), "{}", code.code);
            assert!(ALL[..i].iter().all(|c| c.code != code.code), "{} twice", code.code);
        }
    }
}
