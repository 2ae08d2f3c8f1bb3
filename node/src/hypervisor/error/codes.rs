//! What the numbers mean that Hyper-V, its jobs, guests' writers, the failover cluster and WMI answer with; what causes
//! them, what to do, and whether asking again makes sense. One table: facts sections 1.5, 1.11, 2.3, 3, 4.3, 7 and 11.2;
//! the writers' codes are those of `vss.h` and `vswriter.h`.
//!
//! Two code sets answer for the same methods (the ones above 32767 of the virtualization provider and the CIM ones below
//! 10), so both are here. HRESULTs arrive as negative numbers where a transport has signed ones; [`from_signed`] turns
//! them round. A Windows error may come bare (5908) or in an HRESULT (0x80071714): one entry serves both. A job that failed
//! says 32768 and tells more in its text only: [`in_text`] finds the codes there, whatever language the words are in.

use super::Retry;

/// Where a code comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Return value of a method, or error code of its job.
    Method,
    /// Windows error, bare or in an HRESULT.
    Windows,
    /// Failover cluster.
    Cluster,
    /// Virtual disks and their change tracking.
    Disk,
    /// The volume shadow copy service or a writer in the guest.
    Guest,
    /// WMI itself.
    Wmi,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Busy: wait and ask again, with growing pauses and within the job's patience.
    Wait,
    /// The outcome is unknown: look at what is there, then ask again.
    Inspect,
    /// The VM is elsewhere now: whoever has it goes on.
    Follow,
    /// The guest failed, not the host: once more, then another way of taking the checkpoint if the policy allows one.
    OtherWay,
    /// Change tracking cannot be used: read the disk in full.
    ReadAll,
    /// Somebody has to act.
    Act,
}

impl Next {
    /// What it means for the caller of one method.
    #[must_use]
    pub fn retry(self) -> Retry {
        match self {
            Self::Wait => Retry::Later,
            Self::Inspect | Self::Follow => Retry::Inspect,
            Self::OtherWay | Self::ReadAll | Self::Act => Retry::No,
        }
    }

    /// For the document.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Wait => "waits and asks again",
            Self::Inspect => "looks at what is there, then asks again",
            Self::Follow => "leaves it to the VM's present host",
            Self::OtherWay => "once more, then the next way that the policy allows",
            Self::ReadAll => "reads the disk in full",
            Self::Act => "fails; somebody has to act",
        }
    }
}

/// An entry.
#[derive(Debug, Clone, Copy)]
pub struct Known {
    /// The number.
    pub code: u32,
    /// Where it comes from.
    pub origin: Origin,
    /// What it means.
    pub meaning: &'static str,
    /// What usually causes it.
    pub cause: &'static str,
    /// What to do.
    pub remedy: &'static str,
    /// What Outrider does.
    pub next: Next,
}

macro_rules! table {
    ($($origin:ident { $($code:literal $next:ident $meaning:literal, $cause:literal, $remedy:literal;)* })*) => {
        &[$($(Known {
            code: $code, origin: Origin::$origin, next: Next::$next,
            meaning: $meaning, cause: $cause, remedy: $remedy,
        },)*)*]
    };
}

/// All of them.
#[rustfmt::skip]
pub const ALL: &[Known] = table! {
    Method {
        1 Act "not supported", "the host or the VM's configuration version lacks the feature", "check that host and VM support it";
        2 OtherWay "it failed", "mostly the guest's writers; the job's text says more", "look at the host's Hyper-V-VMMS event log and at the guest's writers (vssadmin list writers)";
        3 Inspect "it timed out", "the Virtual Machine Management service restarts or is overloaded", "check that the Virtual Machine Management service runs";
        4 Act "a parameter is wrong", "an agent that does not fit this host's Hyper-V", "report this with the agent's log";
        5 Wait "the VM is in a state that does not allow it", "a migration, merge, replication or another checkpoint", "wait until migrations, merges and replication are done";
        6 Act "a parameter has a wrong type", "an agent that does not fit this host's Hyper-V", "report this with the agent's log";
        32768 OtherWay "it failed", "mostly the guest's writers; the job's text says more", "look at the host's Hyper-V-VMMS event log and at the guest's writers (vssadmin list writers)";
        32769 Act "access denied", "the agent's account, or an account without rights on the VM's files", "run the agent as LocalSystem or as a Hyper-V administrator";
        32770 Act "not supported", "the host or the VM's configuration version lacks the feature", "check that host and VM support it";
        32771 Act "its status is unknown", "the provider lost track of the VM", "look at the VM in Hyper-V Manager; restart the Virtual Machine Management service if it shows no state";
        32772 Inspect "it timed out", "the Virtual Machine Management service restarts or is overloaded", "check that the Virtual Machine Management service runs";
        32773 Act "a parameter is wrong", "an agent that does not fit this host's Hyper-V", "report this with the agent's log";
        32774 Wait "the VM or a file of it is in use", "another backup, a merge, a virus scanner, or a handle that somebody left open", "wait for it, or exclude the VM's folders from the scanner";
        32775 Wait "the VM is in a state that does not allow it", "a migration, merge, replication or another checkpoint", "wait until migrations, merges and replication are done";
        32776 Act "a parameter has a wrong type", "an agent that does not fit this host's Hyper-V", "report this with the agent's log";
        32777 Wait "the VM is not available", "it is being moved, or its storage is away", "wait until it is, and check its storage";
        32778 Wait "the host is out of memory", "too many VMs for its memory", "free memory on the host";
        32779 Act "a file is in use or not there", "a definition file held open, or a disk that was moved away", "check the file named";
        32780 Wait "the guest is not ready", "it is starting or shutting down", "wait until it runs";
        32781 Act "the guest's screen is locked", "a shut-down without force", "shut it down by hand, or force it";
        32782 Wait "a shut-down is running already", "somebody else shuts it down", "wait until it is off";
    }
    Windows {
        0x8007_0002 Act "a file is not there", "a disk or configuration file was moved or deleted", "put the file named back, or remove it from the VM";
        0x8007_0003 Act "a folder is not there", "a path of the VM's settings does not exist on this host", "correct the path in the VM's settings";
        0x8007_0005 Act "access denied", "the VM's own account lacks rights on its files, or the agent's account on the VM", "grant \"NT VIRTUAL MACHINE\\<VM id>\" full control of the VM's files; run the agent as LocalSystem";
        0x8007_000E Wait "the host is out of memory", "too many VMs for its memory", "free memory on the host";
        0x8007_0013 Act "the media is write-protected", "the volume is read-only, or a snapshot of it is mounted", "make the volume writable (diskpart: attributes disk clear readonly)";
        0x8007_0015 Wait "the device is not ready", "storage paths are failing over", "check the volume's storage";
        0x8007_0020 Wait "a file is in use", "a merge, a virus scanner, or a handle that somebody left open", "wait for it, or exclude the VM's folders from the scanner";
        0x8007_0021 Wait "a part of a file is locked", "a merge, a virus scanner, or a handle that somebody left open", "wait for it, or exclude the VM's folders from the scanner";
        0x8007_0027 Act "the volume is full", "differencing files have nowhere to grow", "free space on the volume of the VM's disks, or move them";
        0x8007_0046 Wait "sharing is paused", "the host has just started", "wait until the host's services are up";
        0x8007_0070 Act "the volume is full", "differencing files have nowhere to grow", "free space on the volume of the VM's disks, or move them";
        0x8007_0079 Inspect "it timed out", "storage or a service does not answer", "check the volume's storage and the Virtual Machine Management service";
        0x8007_00AA Wait "it is in use", "another operation on the same object", "wait for it";
        0x8007_026A Act "the file is compressed", "NTFS compression on the folder of the disk", "switch compression off for the folder of the disks";
        0x8007_0299 Act "a file-system limitation", "a share of this host opened by the host itself", "use the local path instead of the share's";
        0x8007_052F Act "the account \"NT VIRTUAL MACHINE\\Virtual Machines\" may not log on as a service", "a group policy that took the right away", "give it the right \"Log on as a service\" in the group policy";
        0x8007_0534 Act "an account name could not be resolved", "the domain controller cannot be reached, or a host without its account (Azure Local 24H2)", "check the host's domain membership and name resolution";
        0x8007_0569 Act "the account \"NT VIRTUAL MACHINE\\Virtual Machines\" may not log on as a service", "a group policy that took the right away", "give it the right \"Log on as a service\" in the group policy";
        0x8007_06BA Inspect "a service does not answer", "the Virtual Machine Management service or the cluster service restarts", "check that the service runs";
        0x8007_06D9 Inspect "a service has not registered yet", "the host has just started", "wait until the host's services are up";
        0x8007_1772 Act "the file is encrypted", "EFS on the folder of the disk", "switch encryption off for the folder of the disks";
    }
    Cluster {
        5007 Inspect "the cluster does not know the resource", "it was removed or made again", "look at the VM's role in Failover Cluster Manager";
        5013 Inspect "the cluster does not know the group", "it was removed or made again", "look at the VM's role in Failover Cluster Manager";
        5015 Follow "another node owns it", "the VM moved", "nothing: its present host goes on";
        5016 Follow "another node owns the group", "the VM moved", "nothing: its present host goes on";
        5023 Wait "the group or resource is in a state that does not allow it", "it is going online or offline", "wait for it";
        5010 Act "it exists already", "the VM is highly available already", "nothing";
        5908 Wait "the group is being moved", "a live migration", "wait for it";
        5944 Wait "the group is busy", "it is going online, offline, or moving", "wait for it";
        5949 Wait "a backup of the cluster is running", "another backup product", "wait for it";
        5951 Follow "the volume is not on this node", "the Cluster Shared Volume is coordinated elsewhere", "nothing: it is asked for elsewhere";
        5955 Act "a node vetoed it", "a resource that may not run on the target", "look at the cluster's events for the reason";
        5957 Act "the node has too few resources", "memory or processors of the target", "free some, or choose another node";
        5958 Act "no node has enough resources", "memory or processors of all targets", "free some";
        5959 Wait "the move waits in the queue", "more moves than the hosts do at once", "wait for it";
        5960 Wait "a resource is locked by an operation", "a migration, backup or storage move of the VM", "wait for it";
        5961 Act "the volume may not fail over now", "redirected or maintenance mode", "end the maintenance of the Cluster Shared Volume";
        5962 Wait "the node is being drained", "maintenance", "wait for it: the VM moves away";
        5979 Wait "pausing the volume's I/O timed out", "a Cluster Shared Volume under load or losing paths (event 5120)", "check the volume's storage paths";
        5984 Wait "the node is isolated from the cluster", "it lost the cluster's network", "check the cluster's networks; its VMs move when it stays away";
        5985 Wait "the node is in quarantine", "it lost the cluster too often in an hour", "find out why; Start-ClusterNode -ClearQuarantine brings it back";
        5990 Follow "only the volume's coordinator may do that", "the Cluster Shared Volume is coordinated elsewhere", "nothing: it is asked for elsewhere";
    }
    Disk {
        0xC03A_000D Act "the parent disk was not found", "a differencing disk whose parent was moved or deleted", "put the parent back at its path";
        0xC03A_000E Act "the parent disk is another one", "the parent was changed or replaced after the child was made", "put the right parent back; do not mount parents writable";
        0xC03A_000F Act "the parent disk was changed", "the parent was mounted writable after the child was made", "restore the parent, or set the child's parent anew knowing that data may not fit";
        0xC03A_0014 Act "the disk has no provider", "a lost ISO, or a file of another type", "eject the ISO, or remove the file named from the VM";
        0xC03A_001B Act "the disk is of another type", "an operation that this format does not know", "convert the disk to VHDX";
        0xC03A_001C Wait "the disk is in a state that does not allow it", "a merge or another operation on it", "wait for it";
        0xC03A_001E Wait "the disk is owned by somebody else", "it is attached on a host", "detach it there";
        0xC03A_001F Act "the disk is online and writable", "it is mounted on a host", "take it offline there";
        0xC03A_0020 ReadAll "change tracking of replication fails", "Hyper-V Replica's log", "nothing: the disk is read in full";
        0xC03A_0021 ReadAll "change tracking of replication fails", "Hyper-V Replica's log", "nothing: the disk is read in full";
        0xC03A_0022 ReadAll "change tracking of replication fails", "Hyper-V Replica's log", "nothing: the disk is read in full";
        0xC03A_0023 ReadAll "change tracking of replication fails", "Hyper-V Replica's log", "nothing: the disk is read in full";
        0xC03A_0024 ReadAll "change tracking of replication fails", "Hyper-V Replica's log", "nothing: the disk is read in full";
        0xC03A_0029 ReadAll "the change tracking id is not valid", "tracking was reset: resize, storage move, applied checkpoint", "nothing: the disk is read in full";
        0xC03A_002A ReadAll "change tracking is switched off", "a host or tool switched it off", "nothing: the disk is read in full";
        0xC03A_0030 ReadAll "change tracking information is missing", "its .rct or .mrt file was lost", "exclude .rct and .mrt files from virus scanners; the disk is read in full";
        0xC03A_0034 ReadAll "another change tracking id was expected", "tracking was reset", "nothing: the disk is read in full";
        0xC05C_FF0A Act "the disk is shared between VMs", "a shared VHDX", "protect it from inside the guest cluster";
        0xC05C_FF0C Act "the VHD set's backing file is missing", "a VHD set that was copied without its .avhdx", "put the backing file back";
    }
    Guest {
        0x8004_2301 OtherWay "the shadow copy service is in a wrong state", "an earlier snapshot of the guest did not end", "restart the Volume Shadow Copy service in the guest";
        0x8004_2302 OtherWay "the shadow copy service failed unexpectedly", "the guest's event log names the component", "look at the guest's application event log (VSS)";
        0x8004_2304 OtherWay "the snapshot provider is not registered", "integration services were removed or are damaged", "reinstall the guest's integration services";
        0x8004_2306 OtherWay "a snapshot provider refused", "a provider of another product, or no space", "look at the guest's event log (VSS, volsnap); remove other products' providers";
        0x8004_2307 OtherWay "the snapshot provider is in use", "another snapshot of the guest is running", "wait for it";
        0x8004_2308 OtherWay "the shadow copy service does not find a volume", "a volume without a letter or mount point, or one just removed", "look at the guest's volumes (mountvol)";
        0x8004_230C OtherWay "a guest volume cannot be snapshotted", "FAT, FAT32 or exFAT, a dynamic disk, or a volume above 64 TB", "convert the volume to NTFS or ReFS on a basic disk, or accept crash consistency";
        0x8004_230E OtherWay "a guest volume cannot be snapshotted by the provider", "FAT, FAT32 or exFAT, or a dynamic disk", "convert the volume to NTFS or ReFS on a basic disk, or accept crash consistency";
        0x8004_230F OtherWay "the snapshot provider failed", "the guest's event log names the reason (volsnap)", "look at the guest's system event log (volsnap)";
        0x8004_2312 OtherWay "too many volumes in one snapshot", "more than 64 volumes in the guest", "protect some of them from inside the guest";
        0x8004_2313 OtherWay "the snapshot set failed: flushing took too long", "guest disks under heavy load", "run the backup when the guest is less busy";
        0x8004_2314 OtherWay "the snapshot set failed: writes could not be held", "guest disks under heavy load", "run the backup when the guest is less busy";
        0x8004_2316 OtherWay "the snapshot set failed: another one is in progress", "another backup inside the guest", "move one of the two to another time";
        0x8004_2317 OtherWay "the guest has its highest number of snapshots", "old shadow copies in the guest", "delete old shadow copies in the guest (vssadmin delete shadows)";
        0x8004_2318 OtherWay "the writers' infrastructure failed", "the COM+ event system or VSS service in the guest", "restart the COM+ Event System and Volume Shadow Copy services in the guest";
        0x8004_2319 OtherWay "a writer does not respond", "a writer that hangs", "restart the service of the writer that `vssadmin list writers` shows as failed";
        0x8004_231B OtherWay "the snapshot's context is not supported", "a provider of another product", "remove other products' providers from the guest";
        0x8004_231D OtherWay "a guest volume is in use", "it is being checked or dismounted", "wait for it";
        0x8004_231F OtherWay "the guest has no space for a snapshot", "a full volume in the guest", "free space on the guest's volumes, or enlarge their shadow storage";
        0x8004_23F0 OtherWay "a writer says that the snapshot is not consistent", "volumes of one application in different snapshots", "look at the writer that `vssadmin list writers` shows as failed";
        0x8004_23F1 OtherWay "a writer is out of resources", "memory of the guest", "free memory in the guest";
        0x8004_23F2 OtherWay "a writer timed out", "an application that is too busy to flush within its time", "run the backup when the guest is less busy";
        0x8004_23F3 OtherWay "a writer failed for the moment", "an application that was busy", "nothing at first; if it lasts, restart the writer's service";
        0x8004_23F4 OtherWay "a writer failed for good", "an application that has an error of its own", "look at the writer that `vssadmin list writers` shows as failed, and at its service's log";
        0x8004_23F5 OtherWay "a writer failed to recover in the snapshot", "auto-recovery of the checkpoint's disk failed", "look at the guest's application event log (VSS)";
    }
    Wmi {
        0x8004_1002 Inspect "no such object", "it was removed, or its VM moved", "nothing: what is there is looked at";
        0x8004_1003 Act "access denied", "a token without administrator rights", "run the agent as LocalSystem or as a Hyper-V administrator";
        0x8004_1004 Inspect "the provider failed", "the Virtual Machine Management service restarts", "check that the service runs";
        0x8004_1008 Act "a parameter is wrong", "an agent that does not fit this host's Hyper-V", "report this with the agent's log";
        0x8004_100E Act "no such namespace", "the Hyper-V role or the failover clustering feature is not installed", "install it, or run the agent on a host that has it";
        0x8004_1010 Act "no such class", "a host older than Windows Server 2016", "upgrade the host";
        0x8004_1015 Inspect "the transport failed", "WMI or its service restarts", "check the Windows Management Instrumentation service";
        0x8004_1032 Inspect "the call was cancelled", "WMI or its service restarts", "check the Windows Management Instrumentation service";
        0x8004_1033 Inspect "WMI is shutting down", "the host shuts down or its service restarts", "check the Windows Management Instrumentation service";
        0x8004_1069 Inspect "the call timed out", "an overloaded provider", "check the host's load";
        0x8004_106C Wait "WMI's quota is used up", "too many clients of WMI on the host", "look for the program that uses WMI so much, or raise the quota";
    }
};

/// An unsigned code out of a signed number.
#[must_use]
pub fn from_signed(number: i64) -> Option<u32> {
    u32::try_from(number).ok().or_else(|| i32::try_from(number).ok().map(i32::cast_unsigned))
}

/// The entry of a code.
#[must_use]
pub fn find(code: u32) -> Option<&'static Known> {
    let exact = |code: u32| ALL.iter().find(|k| k.code == code);
    // A Windows error in an HRESULT, where the table has it bare.
    exact(code).or_else(|| (code >> 16 == 0x8007).then(|| exact(code & 0xFFFF)).flatten())
}

/// The most telling entry whose code stands in a text as eight hexadecimal digits after "0x".
#[must_use]
pub fn in_text(text: &str) -> Option<&'static Known> {
    let mut rest = text;
    let mut found: Option<&'static Known> = None;
    while let Some(at) = rest.find("0x").or_else(|| rest.find("0X")) {
        rest = &rest[at + 2..];
        let digits: String = rest.chars().take_while(char::is_ascii_hexdigit).collect();
        let known = (digits.len() == 8)
            .then(|| u32::from_str_radix(&digits, 16).ok())
            .flatten()
            .and_then(find);
        // What the guest or the disk says is nearer to the cause than what Windows made of it.
        match (known, found) {
            (Some(known), None) => found = Some(known),
            (Some(known), Some(before))
                if matches!(known.origin, Origin::Guest | Origin::Disk)
                    && before.origin == Origin::Windows =>
            {
                found = Some(known);
            }
            _ => {}
        }
    }
    found
}

/// What a refusal means: the code in its text where the code itself says only that it failed.
#[must_use]
pub fn of(code: u32, text: &str) -> Option<&'static Known> {
    match code {
        2 | 32768 | 0 => in_text(text).or_else(|| find(code)),
        code => find(code),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_says_what_it_means_and_what_to_do_and_no_code_comes_twice() {
        for (i, known) in ALL.iter().enumerate() {
            let what = format!("{:#010X}", known.code);
            for text in [known.meaning, known.cause, known.remedy] {
                assert!(text.len() > 5, "{what}: {text:?}");
                assert!(!text.ends_with('.'), "{what}: it is a part of a sentence");
            }
            assert!(ALL[..i].iter().all(|k| k.code != known.code), "{what} twice");
        }
    }

    /// Facts 1.5: both sets of the methods' codes; 1.11 and 4.3: the classes.
    #[test]
    fn both_code_sets_are_told_and_sorted_alike() {
        for (cim, vmms) in [(1, 32770), (2, 32768), (3, 32772), (4, 32773), (5, 32775), (6, 32776)]
        {
            let [a, b] = [cim, vmms].map(|c| find(c).expect("in the table"));
            assert_eq!((a.meaning, a.next), (b.meaning, b.next), "{cim} {vmms}");
        }
        let classes = [
            (32774, Next::Wait),
            (32778, Next::Wait),
            (32772, Next::Inspect),
            (32769, Next::Act),
            (5960, Next::Wait),
            (5959, Next::Wait),
            (5016, Next::Follow),
            (0x8007_1398, Next::Follow),
            (0x8007_1748, Next::Wait),
            (0x8007_0020, Next::Wait),
            (0xC03A_0029, Next::ReadAll),
            (0x8004_23F3, Next::OtherWay),
            (0x8007_06BA, Next::Inspect),
        ];
        for (code, next) in classes {
            assert_eq!(find(code).map(|k| k.next), Some(next), "{code:#X}");
        }
        assert!(find(0xDEAD_BEEF).is_none());
    }

    #[test]
    fn hresults_come_signed() {
        assert_eq!(from_signed(-2_147_024_864), Some(0x8007_0020));
        assert_eq!(from_signed(32774), Some(32774));
        assert_eq!(from_signed(0x8007_0020), Some(0x8007_0020));
        assert_eq!(from_signed(-1 << 40), None);
    }

    #[test]
    fn a_jobs_text_tells_more_than_its_code() {
        let text =
            "'web' could not create auto virtual hard disk: writer failed 0x800423F4 (0x80070005)";
        assert_eq!(of(32768, text).map(|k| k.code), Some(0x8004_23F4));
        let text = "Zugriff verweigert (0x80070005), VSS meldet 0x8004231F.";
        assert_eq!(of(2, text).map(|k| k.code), Some(0x8004_231F), "nearer to the cause");
        assert_eq!(of(32774, text).map(|k| k.code), Some(32774), "a code that speaks is believed");
        for odd in ["", "0x", "0xZZ", "0x80", "0x800423F", "0x800423F40", "é0x800423F4"] {
            let _ = in_text(odd);
        }
        assert!(in_text("0x800423F40").is_none(), "nine digits are no code");
    }
}
