//! What a hypervisor knows of a VM, its guest, its volumes and its host, in words: what the consistency plan and the
//! prechecks decide on. What was not told has its own value everywhere, and is never held against a VM.

use std::path::PathBuf;

/// The facts of one VM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VmFacts {
    /// The guest, as its integration services tell.
    pub guest: Guest,
    /// Replication relationships; a replica that is replicated on (extended) has two.
    pub replication: Vec<Replication>,
    /// Whether it has a SCSI controller.
    pub scsi: Option<bool>,
    /// Shielded: the host may not look inside.
    pub shielded: bool,
    /// Has a virtual TPM.
    pub vtpm: bool,
    /// What users' own checkpoints of it are.
    pub user_snapshots: UserSnapshots,
    /// Users' own checkpoints.
    pub user_checkpoints: usize,
    /// False where checkpoint files go to another volume than the disks (matters up to Server 2012 R2).
    pub checkpoints_beside_disks: Option<bool>,
    /// Its cluster group; `None` for a VM that is not highly available.
    pub group: Option<Group>,
    /// The host it runs on.
    pub host: Host,
}

/// A guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Guest {
    /// Its kind.
    pub kind: GuestKind,
    /// Name of its operating system, as it tells it.
    pub os: String,
    /// Version of its operating system.
    pub os_version: String,
    /// The backup (volume shadow copy) service.
    pub backup: Service,
    /// The data exchange service, which tells the operating system.
    pub exchange: Service,
    /// Whether the integration services are of another version than the host's.
    pub other_version: Option<bool>,
}

/// Kinds of guests that differ in what bringing them to rest means.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum GuestKind {
    /// Writers of the volume shadow copy service.
    Windows,
    /// Linux or BSD: a daemon freezes mounted file systems.
    Unix,
    /// Any, with the agent of QEMU: it freezes mounted file systems, and does not tell whether applications took part.
    OfQemu,
    /// Not told.
    #[default]
    Unknown,
}

impl GuestKind {
    /// By the name of the operating system.
    #[must_use]
    pub fn of(os: &str) -> Self {
        let os = os.to_ascii_lowercase();
        let is = |words: &[&str]| words.iter().any(|w| os.contains(w));
        if is(&["windows"]) {
            Self::Windows
        } else if is(&[
            "linux", "bsd", "ubuntu", "debian", "red hat", "rhel", "centos", "rocky", "alma",
            "suse", "oracle", "fedora", "photon",
        ]) {
            Self::Unix
        } else {
            Self::Unknown
        }
    }
}

/// State of an integration service (facts, section 1.4).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Service {
    /// Answers.
    Works,
    /// Answers in an older protocol that the host still accepts.
    WorksOlder,
    /// Speaks a protocol that the host does not accept.
    Incompatible,
    /// Never answered: not installed, or not running.
    Silent,
    /// Answered before, and does not now.
    Lost,
    /// Switched off for this VM.
    Off,
    /// Not told.
    #[default]
    Unknown,
}

impl Service {
    /// Of a component's EnabledState and its first OperationalStatus.
    #[must_use]
    pub fn of(enabled: Option<u64>, status: Option<u64>) -> Self {
        match (enabled, status) {
            (Some(3), _) => Self::Off,
            (_, Some(2)) => Self::Works,
            (_, Some(3)) => Self::WorksOlder,
            (_, Some(7)) => Self::Incompatible,
            (_, Some(12)) => Self::Silent,
            (_, Some(13)) => Self::Lost,
            _ => Self::Unknown,
        }
    }

    /// Whether it can be used.
    #[must_use]
    pub fn answers(self) -> bool {
        matches!(self, Self::Works | Self::WorksOlder)
    }
}

/// A replication relationship (facts, section 1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Replication {
    /// This VM's side of it.
    pub side: ReplicaSide,
    /// How it is.
    pub state: ReplicationState,
    /// Whether it is well.
    pub health: ReplicationHealth,
}

/// Sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplicaSide {
    /// Sends.
    Primary,
    /// Receives.
    Replica,
    /// A test failover of a replica.
    Test,
    /// Receives from a replica.
    Extended,
}

impl ReplicaSide {
    /// Of a ReplicationMode; `None` for a VM that is not replicated.
    #[must_use]
    pub fn of(mode: u64) -> Option<Self> {
        match mode {
            1 => Some(Self::Primary),
            2 => Some(Self::Replica),
            3 => Some(Self::Test),
            4 => Some(Self::Extended),
            _ => None,
        }
    }

    /// Whether it is off and written to by the host.
    #[must_use]
    pub fn receives(self) -> bool {
        matches!(self, Self::Replica | Self::Extended)
    }
}

/// ReplicationState.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplicationState {
    /// 0
    Disabled,
    /// 1
    ReadyForInitial,
    /// 2
    InitialRunning,
    /// 3
    Replicating,
    /// 4
    Synced,
    /// 5
    Recovered,
    /// 6
    Committed,
    /// 7
    Suspended,
    /// 8
    Critical,
    /// 9
    ResyncRequired,
    /// 10
    Resynchronizing,
    /// 11
    ResyncSuspended,
    /// 12
    FailoverRunning,
    /// 13
    FailbackRunning,
    /// 14
    FailbackComplete,
    /// 15
    DiskUpdate,
    /// 16
    DiskUpdateCritical,
    /// 17 and whatever comes later.
    Other(u64),
}

impl ReplicationState {
    /// Of the number.
    #[must_use]
    pub fn of(number: u64) -> Self {
        match number {
            0 => Self::Disabled,
            1 => Self::ReadyForInitial,
            2 => Self::InitialRunning,
            3 => Self::Replicating,
            4 => Self::Synced,
            5 => Self::Recovered,
            6 => Self::Committed,
            7 => Self::Suspended,
            8 => Self::Critical,
            9 => Self::ResyncRequired,
            10 => Self::Resynchronizing,
            11 => Self::ResyncSuspended,
            12 => Self::FailoverRunning,
            13 => Self::FailbackRunning,
            14 => Self::FailbackComplete,
            15 => Self::DiskUpdate,
            16 => Self::DiskUpdateCritical,
            other => Self::Other(other),
        }
    }
}

/// ReplicationHealth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplicationHealth {
    /// 1
    Ok,
    /// 2
    Warning,
    /// 3
    Critical,
    /// 0 and whatever comes later.
    NotTold,
}

impl ReplicationHealth {
    /// Of the number.
    #[must_use]
    pub fn of(number: u64) -> Self {
        match number {
            1 => Self::Ok,
            2 => Self::Warning,
            3 => Self::Critical,
            _ => Self::NotTold,
        }
    }
}

/// UserSnapshotType: what a user's own checkpoint of the VM is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum UserSnapshots {
    /// 2: none are made.
    Disabled,
    /// 3: production, else standard.
    Production,
    /// 4: production or none.
    ProductionOnly,
    /// 5: with memory.
    Standard,
    /// Not told.
    #[default]
    Unknown,
}

impl UserSnapshots {
    /// Of the number.
    #[must_use]
    pub fn of(number: Option<u64>) -> Self {
        match number {
            Some(2) => Self::Disabled,
            Some(3) => Self::Production,
            Some(4) => Self::ProductionOnly,
            Some(5) => Self::Standard,
            _ => Self::Unknown,
        }
    }
}

/// What the failover cluster says of a VM's group (facts, section 4.1).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Group {
    /// A resource or the group is locked by an operation.
    pub locked: bool,
    /// Waits in the queue for a move.
    pub queued: bool,
    /// Runs on a node that lost the cluster.
    pub unmonitored: bool,
    /// Whether taking the group offline saves the VM (OfflineAction 1); `None` when not told.
    pub offline_saves: Option<bool>,
}

/// A host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Host {
    /// Windows build, e.g. 20348; `None` when not told.
    pub build: Option<u32>,
    /// ClusterFunctionalLevel; `None` outside a cluster or when not told.
    pub functional_level: Option<u32>,
    /// What the cluster says of it.
    pub node: Node,
}

/// Releases of Hyper-V that differ in how a VM is captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Release {
    /// Server 2008 R2 and 2012: the writer takes a child snapshot or saves the VM.
    Server2012,
    /// Server 2012 R2: the writer takes a child snapshot or a checkpoint.
    Server2012R2,
    /// Server 2016 and later: checkpoints and change tracking.
    Server2016,
}

impl Host {
    /// The release. A host that does not tell its build is believed to be new enough: an old one lacks the services that
    /// are called next, and says so.
    #[must_use]
    pub fn release(&self) -> Release {
        match self.build {
            Some(build) if build < 9600 => Release::Server2012,
            Some(build) if build < 14393 => Release::Server2012R2,
            _ => Release::Server2016,
        }
    }

    /// What people call it.
    #[must_use]
    pub fn release_name(&self) -> String {
        match self.build {
            None => "an unknown release of Windows Server".into(),
            Some(0..=7600) => "Windows Server 2008 or older".into(),
            Some(7601) => "Windows Server 2008 R2".into(),
            Some(9200) => "Windows Server 2012".into(),
            Some(9600) => "Windows Server 2012 R2".into(),
            Some(14393) => "Windows Server 2016".into(),
            Some(17763) => "Windows Server 2019".into(),
            Some(20348) => "Windows Server 2022".into(),
            Some(26100) => "Windows Server 2025".into(),
            Some(other) => format!("Windows build {other}"),
        }
    }
}

/// A cluster node as the cluster sees it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Node {
    /// Paused: takes no new VMs.
    pub paused: bool,
    /// Its VMs are being moved away.
    pub draining: bool,
    /// Lost the cluster a moment ago; its VMs run on unwatched.
    pub isolated: bool,
    /// Lost the cluster too often.
    pub quarantined: bool,
}

/// A volume that disks of a VM lie on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Where it is mounted, or the folder of the disks.
    pub folder: PathBuf,
    /// Free bytes.
    pub free: u64,
    /// Bytes of the VM's disks on it that a checkpoint freezes.
    pub disk_bytes: u64,
    /// How this host reaches it now.
    pub access: Access,
    /// How it usually does.
    pub usual: Access,
}

/// How a Cluster Shared Volume is reached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Access {
    /// Directly.
    Direct,
    /// Over the network through another node.
    Redirected,
    /// Not at all now.
    None,
    /// No Cluster Shared Volume, or not told.
    #[default]
    Unknown,
}

impl Access {
    /// Of a FaultState: bits 1 redirected, 2 no access, 8 dismounted; 4, maintenance, says nothing of this host.
    #[must_use]
    pub fn of(fault_state: Option<u64>) -> Self {
        match fault_state {
            None => Self::Unknown,
            Some(bits) if bits & (2 | 8) != 0 => Self::None,
            Some(bits) if bits & 1 != 0 => Self::Redirected,
            Some(_) => Self::Direct,
        }
    }
}

/// What a disk's file is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Format {
    /// VHDX or its child.
    #[default]
    Vhdx,
    /// VHD or its child: no change tracking.
    Vhd,
    /// A VHD set, shared between VMs.
    VhdSet,
    /// No file: a device.
    Device,
    /// An image of another hypervisor.
    Image,
}

impl Format {
    /// By the file's name.
    #[must_use]
    pub fn of(path: &str) -> Self {
        let name = path.to_ascii_lowercase();
        if name.ends_with(".vhds") {
            Self::VhdSet
        } else if name.ends_with(".vhd") || name.ends_with(".avhd") {
            Self::Vhd
        } else {
            Self::Vhdx
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Facts 1.4: both numbers of a component.
    #[test]
    fn an_integration_service_is_told_by_its_two_states() {
        let table = [
            (Some(2), Some(2), Service::Works, true),
            (Some(2), Some(3), Service::WorksOlder, true),
            (Some(2), Some(7), Service::Incompatible, false),
            (Some(2), Some(12), Service::Silent, false),
            (Some(2), Some(13), Service::Lost, false),
            (Some(3), Some(2), Service::Off, false),
            (None, None, Service::Unknown, false),
        ];
        for (enabled, status, expected, answers) in table {
            let found = Service::of(enabled, status);
            assert_eq!((found, found.answers()), (expected, answers), "{enabled:?} {status:?}");
        }
    }

    #[test]
    fn guests_are_told_by_the_name_of_their_system() {
        let table = [
            ("Windows Server 2022 Datacenter", GuestKind::Windows),
            ("Ubuntu 22.04.3 LTS", GuestKind::Unix),
            ("Red Hat Enterprise Linux", GuestKind::Unix),
            ("FreeBSD 14.1", GuestKind::Unix),
            ("", GuestKind::Unknown),
            ("TempleOS", GuestKind::Unknown),
        ];
        for (os, expected) in table {
            assert_eq!(GuestKind::of(os), expected, "{os}");
        }
    }

    #[test]
    fn releases_are_told_by_their_build_and_an_unknown_one_is_not_held_against_the_host() {
        let release = |build| Host { build, ..Host::default() }.release();
        assert_eq!(release(Some(7601)), Release::Server2012);
        assert_eq!(release(Some(9200)), Release::Server2012);
        assert_eq!(release(Some(9600)), Release::Server2012R2);
        assert_eq!(release(Some(14393)), Release::Server2016);
        assert_eq!(release(Some(26100)), Release::Server2016);
        assert_eq!(release(None), Release::Server2016);
    }

    #[test]
    fn formats_and_redirection_are_told_by_names_and_bits() {
        assert_eq!(Format::of(r"C:\a\B.VHDX"), Format::Vhdx);
        assert_eq!(Format::of(r"C:\a\b.vhd"), Format::Vhd);
        assert_eq!(Format::of(r"C:\a\b.avhd"), Format::Vhd);
        assert_eq!(Format::of(r"C:\a\b.vhds"), Format::VhdSet);
        assert_eq!(Access::of(Some(0)), Access::Direct);
        assert_eq!(Access::of(Some(1)), Access::Redirected);
        assert_eq!(Access::of(Some(3)), Access::None);
        assert_eq!(Access::of(Some(8)), Access::None);
        assert_eq!(Access::of(None), Access::Unknown);
    }
}
