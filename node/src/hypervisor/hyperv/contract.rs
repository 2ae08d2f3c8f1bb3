//! What this backend expects of WMI: classes and the properties that it reads, methods and how it calls them. `node doctor`
//! compares a host with it, `docs/hyperv.md` is generated from it, and a test keeps it in step with the code.

use outrider_wmi::{NS_CIM, NS_CLUSTER, NS_VIRTUALIZATION};

/// The kind of a property's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `string`, `datetime`, references.
    Text,
    /// Integers of any width.
    Number,
    /// `boolean`
    Truth,
    /// An array.
    List,
    /// An embedded object.
    Embedded,
}

/// Whether backups need a class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Without it nothing works.
    Always,
    /// In a failover cluster.
    Clustered,
    /// Without it less is known, and that is not held against a VM.
    Helps,
}

/// A class and what is read of it.
#[derive(Debug, Clone, Copy)]
pub struct Class {
    /// Namespace.
    pub namespace: &'static str,
    /// Class.
    pub name: &'static str,
    /// Need.
    pub need: Need,
    /// Properties and their kinds.
    pub properties: &'static [(&'static str, Kind)],
    /// What for; and what of it was never seen on a real host.
    pub remark: &'static str,
    /// Public sources that it was compared with: letters of [`SOURCES`].
    pub source: &'static str,
}

/// A method and how it is called.
#[derive(Debug, Clone, Copy)]
pub struct Method {
    /// Class.
    pub class: &'static str,
    /// Method.
    pub name: &'static str,
    /// Arguments.
    pub arguments: &'static str,
    /// What is expected as an answer.
    pub answer: &'static str,
    /// What of it was never seen on a real host.
    pub unsure: &'static str,
    /// Public sources that it was compared with: letters of [`SOURCES`].
    pub source: &'static str,
}

/// What the contract was compared with, by letter.
#[rustfmt::skip]
pub const SOURCES: &[(char, &str)] = &[
    ('R', "Microsoft's reference of the Hyper-V WMI provider (MicrosoftDocs/win32, `HyperV_v2`)"),
    ('C', "Microsoft's reference of the failover cluster WMI provider (learn.microsoft.com, `cluswmi`) and MS-CMRP"),
    ('B', "bindings that were generated on a Windows Server 2019 (microsoft/wmi, `server2019`): names and types as a host has them"),
    ('S', "Microsoft's samples (Windows-classic-samples `Hyper-V`; Virtualization-Documentation `xHyper-VBackup`)"),
    ('O', "OpenStack os-win"),
    ('A', "Bareos, `hyper-v.cc` (backup and restore with change tracking, in production)"),
    ('N', "nxmBackup (backup with change tracking)"),
];

use Kind::{Embedded, List, Number, Text, Truth};
use Need::{Always, Clustered, Helps};

/// All classes, in the order of the document.
#[rustfmt::skip]
pub const CLASSES: &[Class] = &[
    Class { namespace: NS_VIRTUALIZATION, name: "Msvm_ComputerSystem", need: Always,
        properties: &[("Name", Text), ("ElementName", Text), ("EnabledState", Number), ("OperationalStatus", List), ("ReplicationMode", Number)],
        remark: "VMs and the host; VMs are told by a Name that is a GUID, never by their caption", source: "R B S" },
    Class { namespace: NS_VIRTUALIZATION, name: "Msvm_PlannedComputerSystem", need: Always,
        properties: &[("Name", Text), ("ElementName", Text)], remark: "VMs on their way here, and restores in the making", source: "R B S" },
    Class { namespace: NS_VIRTUALIZATION, name: "Msvm_VirtualSystemSettingData", need: Always,
        properties: &[("InstanceID", Text), ("VirtualSystemIdentifier", Text), ("VirtualSystemType", Text), ("VirtualSystemSubType", Text), ("ElementName", Text),
            ("Version", Text), ("UserSnapshotType", Number), ("ConfigurationDataRoot", Text), ("ConfigurationFile", Text), ("SnapshotDataRoot", Text), ("Parent", Text), ("CreationTime", Text),
            ("IsSaved", Truth), ("Notes", List)],
        remark: "active settings and checkpoints; whether a disabled UserSnapshotType keeps backup checkpoints from being made is not known: it is a warning; that Parent is the path of the checkpoint that is followed is what the documentation says", source: "R B A N" },
    Class { namespace: NS_VIRTUALIZATION, name: "Msvm_StorageAllocationSettingData", need: Always,
        properties: &[("InstanceID", Text), ("ResourceType", Number), ("ResourceSubType", Text), ("HostResource", List), ("Parent", Text), ("PersistentReservationsSupported", Truth)],
        remark: "disks; that the tail of InstanceID is the same in a VM and in its checkpoints is our reading", source: "R B A" },
    Class { namespace: NS_VIRTUALIZATION, name: "Msvm_ResourceAllocationSettingData", need: Always,
        properties: &[("InstanceID", Text), ("ResourceType", Number), ("ResourceSubType", Text), ("Parent", Text)],
        remark: "drives, controllers, pass-through disks", source: "R B" },
    Class { namespace: NS_VIRTUALIZATION, name: "Msvm_VirtualSystemReferencePoint", need: Always,
        properties: &[("InstanceID", Text), ("VirtualSystemIdentifier", Text), ("VirtualDiskIdentifiers", List), ("ResilientChangeTrackingIdentifiers", List)],
        remark: "change tracking; the form of InstanceID on Server 2025 was seen by one project only: it is used as it comes", source: "R B A N" },
    Class { namespace: NS_VIRTUALIZATION, name: "Msvm_VirtualSystemManagementService", need: Always, properties: &[("Name", Text)], remark: "", source: "R B S" },
    Class { namespace: NS_VIRTUALIZATION, name: "Msvm_VirtualSystemSnapshotService", need: Always, properties: &[("Name", Text)], remark: "", source: "R B S" },
    Class { namespace: NS_VIRTUALIZATION, name: "Msvm_VirtualSystemReferencePointService", need: Always, properties: &[("Name", Text)], remark: "absent before Server 2016", source: "R B A" },
    Class { namespace: NS_VIRTUALIZATION, name: "Msvm_ImageManagementService", need: Always, properties: &[("Name", Text)], remark: "", source: "R B S" },
    Class { namespace: NS_VIRTUALIZATION, name: "Msvm_VssComponent", need: Helps,
        properties: &[("SystemName", Text), ("EnabledState", Number), ("OperationalStatus", List)], remark: "whether the guest can bring its data to rest", source: "R B" },
    Class { namespace: NS_VIRTUALIZATION, name: "Msvm_HeartbeatComponent", need: Helps,
        properties: &[("SystemName", Text), ("EnabledState", Number), ("OperationalStatus", List)], remark: "whether a restored VM boots: 2 is taken for yes", source: "R B" },
    Class { namespace: NS_VIRTUALIZATION, name: "Msvm_KvpExchangeComponent", need: Helps,
        properties: &[("SystemName", Text), ("EnabledState", Number), ("OperationalStatus", List), ("GuestIntrinsicExchangeItems", List)],
        remark: "the guest's operating system; the list of keys is not settled: OSName and OSVersion are read, the rest is left", source: "R B" },
    Class { namespace: NS_VIRTUALIZATION, name: "Msvm_ReplicationRelationship", need: Helps,
        properties: &[("InstanceID", Text), ("ReplicationState", Number), ("ReplicationHealth", Number)],
        remark: "Hyper-V Replica; which side a VM is, its own ReplicationMode tells; that a log is being applied is in no state that is known: a refusal on the receiving side is taken for it", source: "R B" },
    Class { namespace: NS_CIM, name: "Win32_OperatingSystem", need: Helps, properties: &[("BuildNumber", Text), ("CSName", Text), ("LastBootUpTime", Text)], remark: "release of the host, its name, and whether it was started anew", source: "B" },
    Class { namespace: NS_CLUSTER, name: "MSCluster_Cluster", need: Clustered, properties: &[("Name", Text), ("ClusterFunctionalLevel", Number)], remark: "", source: "C B O" },
    Class { namespace: NS_CLUSTER, name: "MSCluster_Node", need: Clustered,
        properties: &[("Name", Text), ("State", Number), ("StatusInformation", Number), ("NodeDrainStatus", Number)], remark: "up, paused, draining, isolated, quarantined", source: "B" },
    Class { namespace: NS_CLUSTER, name: "MSCluster_Resource", need: Clustered,
        properties: &[("Name", Text), ("Type", Text), ("OwnerNode", Text), ("OwnerGroup", Text), ("StatusInformation", Number), ("PrivateProperties", Embedded)],
        remark: "who owns which VM, by VmID in PrivateProperties; OfflineAction there", source: "C B O" },
    Class { namespace: NS_CLUSTER, name: "MSCluster_ResourceGroup", need: Clustered,
        properties: &[("Name", Text), ("OwnerNode", Text), ("StatusInformation", Number)], remark: "locked, queued, unmonitored", source: "B O" },
    Class { namespace: NS_CLUSTER, name: "MSCluster_Network", need: Helps,
        properties: &[("Name", Text), ("Role", Number), ("IPv4Addresses", List), ("IPv4PrefixLengths", List), ("IPv6Addresses", List), ("IPv6PrefixLengths", List), ("Address", Text), ("AddressMask", Text)],
        remark: "networks of role 1 (cluster only) are not used; which ones live migration prefers is not read", source: "B" },
    Class { namespace: NS_CLUSTER, name: "MSCluster_ClusterSharedVolume", need: Helps,
        properties: &[("Name", Text), ("VolumeName", Text), ("FaultState", Number)], remark: "redirected or not; FaultState speaks of the whole cluster and not of block redirection: a volume that only another node cannot reach counts as away here, too, and is waited for", source: "C B" },
    Class { namespace: NS_CLUSTER, name: "MSCluster_DiskPartition", need: Helps, properties: &[("Path", Text), ("FreeSpace", Number)], remark: "free space, in MiB; Path, VolumeGuid or MountPoints are matched with the names of shared volumes, for which of them such a volume has is told nowhere", source: "C B" },
];

/// All methods, in the order of the document.
#[rustfmt::skip]
pub const METHODS: &[Method] = &[
    Method { class: "Msvm_VirtualSystemSnapshotService", name: "CreateSnapshot",
        arguments: "AffectedSystem: reference; SnapshotSettings: text of a Msvm_VirtualSystemSnapshotSettingData with ConsistencyLevel 1 or 2, GuestBackupType 1 or 2 (not before build 15063: Server 2016 has none), IgnoreNonSnapshottableDisks true; SnapshotType 32768",
        answer: "0 or 4096 with a job; the new checkpoint is the one that was not there before", unsure: "the code when a migration runs; AutoRecovery disks in application-consistent checkpoints", source: "R S A N" },
    Method { class: "Msvm_VirtualSystemSnapshotService", name: "DestroySnapshot", arguments: "AffectedSnapshot: reference", answer: "4096 with a job; a merge follows", unsure: "", source: "R A" },
    Method { class: "Msvm_VirtualSystemSnapshotService", name: "ConvertToReferencePoint", arguments: "AffectedSnapshot: reference",
        answer: "4096 with a job that names the reference point", unsure: "Server 2025 is said to name none: it is found by difference", source: "R S A N" },
    Method { class: "Msvm_VirtualSystemReferencePointService", name: "DestroyReferencePoint", arguments: "AffectedReferencePoint: reference", answer: "4096 with a job", unsure: "", source: "R A" },
    Method { class: "Msvm_ImageManagementService", name: "GetVirtualDiskChanges",
        arguments: "Path; LimitId: the change tracking id; ByteOffset, ByteLength: all of it, in halves where that is refused", answer: "ProcessedByteLength, ChangedByteOffsets[], ChangedByteLengths[]; repeated until all is processed; QueryChangesVirtualDisk is asked where the answer is of no use",
        unsure: "whether ids survive storage migration and applied checkpoints: the disk's identity and size are compared, and 0xC03A0029 and its kin read the disk in full", source: "R B N" },
    Method { class: "Msvm_ImageManagementService", name: "GetVirtualHardDiskSettingData", arguments: "Path", answer: "SettingData: text or object with VirtualDiskId, MaxInternalSize; ParentPath of a child file", unsure: "whether it answers for the file that a running VM writes to: where it does not, `host orphans` shows that file alone", source: "R S" },
    Method { class: "Msvm_VirtualSystemManagementService", name: "ModifySystemSettings", arguments: "SystemSettings: the whole text of the settings with one value changed", answer: "0 or 4096", unsure: "", source: "R S A O" },
    Method { class: "Msvm_VirtualSystemManagementService", name: "GetSummaryInformation", arguments: "SettingData[]: references; RequestedInformation[]: 0, 106, 121", answer: "SummaryInformation[]", unsure: "whether its elements come as objects or as texts: both are read", source: "R" },
    Method { class: "Msvm_VirtualSystemManagementService", name: "ImportSystemDefinition", arguments: "SystemDefinitionFile; SnapshotFolder, for a VM with checkpoints; GenerateNewSystemIdentifier", answer: "4096 with a job that names the planned VM", unsure: "whether checkpoints of a VM that gets a new GUID get new ones, too: they are found by GUID, else by name", source: "R A" },
    Method { class: "Msvm_VirtualSystemManagementService", name: "ImportSnapshotDefinitions", arguments: "PlannedSystem: reference; SnapshotFolder", answer: "4096 with a job", unsure: "that a definition captured with a backup checkpoint lists the user checkpoints", source: "R" },
    Method { class: "Msvm_VirtualSystemManagementService", name: "ModifyResourceSettings", arguments: "ResourceSettings[]: texts", answer: "0 or 4096", unsure: "that it takes adapters of a planned VM's checkpoint: where it does not, that is told and the VM comes back", source: "R S A O" },
    Method { class: "Msvm_VirtualSystemManagementService", name: "ValidatePlannedSystem", arguments: "PlannedSystem: reference", answer: "4096 with a job", unsure: "", source: "R S A" },
    Method { class: "Msvm_VirtualSystemManagementService", name: "RealizePlannedSystem", arguments: "PlannedSystem: reference", answer: "4096 with a job", unsure: "", source: "R S A" },
    Method { class: "Msvm_VirtualSystemManagementService", name: "DestroySystem", arguments: "AffectedSystem: reference", answer: "0 or 4096", unsure: "", source: "R A O" },
    Method { class: "Msvm_ComputerSystem", name: "RequestStateChange", arguments: "RequestedState: 2 run, 3 off, 6 save", answer: "0 or 4096", unsure: "", source: "R O" },
    Method { class: "MSCluster_Cluster", name: "AddVirtualMachine", arguments: "VirtualMachine: the VM's GUID; where that is refused, its name if no other VM of the host has it", answer: "none, or an error of the provider", unsure: "which of the two it wants", source: "C B O" },
    Method { class: "MSCluster_ResourceGroup", name: "DestroyGroup", arguments: "Options: 1", answer: "none, or an error of the provider", unsure: "", source: "B O" },
    Method { class: "MSCluster_Resource", name: "TakeOffline", arguments: "TimeOut: seconds", answer: "none, or an error that says that it is on its way (258, 997, 1460); the VM is saved when its OfflineAction is 1", unsure: "that leaving Parameters and Flags out is accepted", source: "B" },
    Method { class: "MSCluster_Resource", name: "BringOnline", arguments: "TimeOut: seconds", answer: "none; the VM runs", unsure: "", source: "B" },
];

#[cfg(test)]
mod tests {
    use super::*;

    /// Text between quotation marks that looks like a name of WMI, in this backend's own sources.
    fn names_in_sources() -> Vec<(String, String)> {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/hypervisor/hyperv");
        let mut names = Vec::new();
        for entry in std::fs::read_dir(dir).expect("the sources are there") {
            let path = entry.expect("an entry").path();
            if path.extension().is_none_or(|e| e != "rs") || path.ends_with("contract.rs") {
                continue;
            }
            let text = std::fs::read_to_string(&path).expect("readable");
            // Tests may name what the code does not.
            let code = text.split("#[cfg(test)]").next().unwrap_or_default();
            let file = path.file_name().expect("a name").to_string_lossy().into_owned();
            let words = code.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            let names_of_wmi = words.filter(|w| {
                ["Msvm_", "MSCluster_", "Win32_"]
                    .iter()
                    .any(|p| w.starts_with(p) && w.len() > p.len())
            });
            names.extend(names_of_wmi.map(|w| (file.clone(), w.to_owned())));
        }
        names
    }

    /// Classes that are only associations, settings that are only written, or are read of another class's answer.
    const NOT_QUERIED: [&str; 9] = [
        "Msvm_VirtualSystemSettingDataComponent",
        "Msvm_SettingsDefineState",
        "Msvm_AffectedJobElement",
        "Msvm_VirtualSystemSnapshotSettingData",
        "Msvm_SecuritySettingData",
        "Msvm_SyntheticFcPortSettingData",
        "Msvm_ConcreteJob",
        "MSCluster_ResourceGroupToResource",
        "Msvm_KvpExchangeDataItem",
    ];

    /// Those of restores are in another part's documents as it grows; see `docs/hyperv.md`.
    #[test]
    fn every_class_that_the_code_names_is_in_the_contract() {
        let restores = ["import.rs", "machine.rs", "planned.rs", "security.rs", "network.rs"];
        let missing: Vec<(String, String)> = names_in_sources()
            .into_iter()
            .filter(|(file, _)| !restores.contains(&file.as_str()))
            .filter(|(_, name)| {
                !NOT_QUERIED.contains(&name.as_str()) && CLASSES.iter().all(|c| c.name != name)
            })
            .collect();
        assert!(missing.is_empty(), "not in the contract: {missing:?}");
    }

    #[test]
    fn every_class_and_method_of_the_contract_is_named_by_the_code() {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/hypervisor/hyperv");
        let mut all = String::new();
        let mut folders = vec![dir];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).expect("the sources are there") {
                let path = entry.expect("an entry").path();
                if path.is_dir() {
                    folders.push(path);
                } else if !path.ends_with("contract.rs") {
                    all += &std::fs::read_to_string(path).expect("readable");
                }
            }
        }
        for class in CLASSES {
            assert!(all.contains(class.name), "{} is not used", class.name);
        }
        for method in METHODS {
            assert!(all.contains(&format!("\"{}\"", method.name)), "{} is not called", method.name);
            let known = CLASSES.iter().any(|c| c.name == method.class);
            assert!(known, "{} is of no known class", method.name);
        }
    }

    /// Nothing is expected of a host on our word alone.
    #[test]
    fn everything_was_compared_with_something() {
        let sources = CLASSES.iter().map(|c| c.source).chain(METHODS.iter().map(|m| m.source));
        for letters in sources {
            assert!(!letters.is_empty());
            let known = |letter: &str| {
                letter.chars().count() == 1 && SOURCES.iter().any(|(l, _)| letter.starts_with(*l))
            };
            assert!(letters.split(' ').all(known), "{letters:?}");
        }
    }

    fn tables() -> String {
        let mut out = String::new();
        for (namespace, title) in
            [(NS_VIRTUALIZATION, "Hyper-V"), (NS_CLUSTER, "failover cluster"), (NS_CIM, "Windows")]
        {
            out += &format!(
                "\n### Classes of `{namespace}` ({title})\n\n| class | needed | properties | remarks | compared with |\n| --- | --- | --- | --- | --- |\n"
            );
            for c in CLASSES.iter().filter(|c| c.namespace == namespace) {
                let need = match c.need {
                    Always => "always",
                    Clustered => "in a cluster",
                    Helps => "no",
                };
                let kind = |k: Kind| match k {
                    Text => "text",
                    Number => "number",
                    Truth => "boolean",
                    List => "array",
                    Embedded => "object",
                };
                let properties: Vec<String> =
                    c.properties.iter().map(|(n, k)| format!("{n} ({})", kind(*k))).collect();
                out += &format!(
                    "| `{}` | {need} | {} | {} | {} |\n",
                    c.name,
                    properties.join(", "),
                    c.remark,
                    c.source
                );
            }
        }
        out += "\n### Methods\n\n| method | arguments | answer | never seen | compared with |\n| --- | --- | --- | --- | --- |\n";
        for m in METHODS {
            out += &format!(
                "| `{}.{}` | {} | {} | {} | {} |\n",
                m.class, m.name, m.arguments, m.answer, m.unsure, m.source
            );
        }
        out += "\n### Sources\n\n| letter | source |\n| --- | --- |\n";
        for (letter, source) in SOURCES {
            out += &format!("| {letter} | {source} |\n");
        }
        out
    }

    /// `docs/hyperv.md` holds the tables between two marks: run this test with `OUTRIDER_DOCS=write` after a change.
    #[test]
    fn the_document_holds_the_contract() {
        const BEGIN: &str = "<!-- contract -->\n";
        const END: &str = "<!-- end of contract -->";
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/hyperv.md");
        let text = std::fs::read_to_string(&path).expect("docs/hyperv.md is in the repository");
        let (before, rest) = text.split_once(BEGIN).expect("the mark of the contract");
        let (found, after) = rest.split_once(END).expect("the mark of its end");
        if std::env::var("OUTRIDER_DOCS").as_deref() == Ok("write") {
            let page = format!("{before}{BEGIN}{}\n{END}{after}", tables());
            std::fs::write(&path, page).expect("docs folder is writable");
            return;
        }
        assert_eq!(
            found.trim(),
            tables().trim(),
            "docs/hyperv.md is out of date: OUTRIDER_DOCS=write"
        );
    }

    /// `docs/hyperv-errors.md`, the same way.
    #[test]
    fn the_document_of_codes_is_up_to_date() {
        use crate::hypervisor::error::codes::{ALL, Origin};
        let mut page = String::from(
            "# Codes of Hyper-V, guests, cluster and WMI\n\nGenerated from `node/src/hypervisor/error/codes.rs`; a test fails \
             when it is out of date. Outrider's own codes are in [errors](errors.md). A job that failed says 32768 and names \
             the cause in its text only: a code that stands there is looked up here, too.\n",
        );
        let parts = [
            (Origin::Method, "Return values of methods, error codes of jobs"),
            (Origin::Windows, "Windows"),
            (Origin::Cluster, "Failover cluster"),
            (Origin::Disk, "Virtual disks and change tracking"),
            (Origin::Guest, "Volume shadow copies and writers in the guest"),
            (Origin::Wmi, "WMI"),
        ];
        for (origin, title) in parts {
            page += &format!(
                "\n## {title}\n\n| code | meaning | usual cause | what to do | what Outrider does |\n| --- | --- | --- | --- | --- |\n"
            );
            for k in ALL.iter().filter(|k| k.origin == origin) {
                let code =
                    if k.code > 0xFFFF { format!("0x{:08X}", k.code) } else { k.code.to_string() };
                page += &format!(
                    "| `{code}` | {} | {} | {} | {} |\n",
                    k.meaning,
                    k.cause,
                    k.remedy,
                    k.next.as_str()
                );
            }
        }
        let path =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/hyperv-errors.md");
        if std::env::var("OUTRIDER_DOCS").as_deref() == Ok("write") {
            std::fs::write(&path, &page).expect("docs folder is writable");
        }
        let found =
            std::fs::read_to_string(&path).expect("docs/hyperv-errors.md is in the repository");
        assert_eq!(found, page, "docs/hyperv-errors.md is out of date: OUTRIDER_DOCS=write");
    }
}
