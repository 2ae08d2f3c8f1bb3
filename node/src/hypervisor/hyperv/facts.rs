//! The facts of one VM (facts, sections 1.1 to 1.4 and 4.1): what the consistency plan and the prechecks decide on.
//!
//! What a host does not have (a class, a namespace, a property) is "not told"; that the provider does not answer is an
//! error.

use std::collections::HashMap;

use outrider_proto::ids::VmGuid;
use outrider_wmi::{NS_CIM, NS_CLUSTER, NS_VIRTUALIZATION, Object, Value, WmiError, embedded};

use super::HyperV;
use super::call::{Call, provider};
use super::cluster;
use super::inventory::{configured, role, seen};
use super::wql::{self, literal};
use crate::hypervisor::VmState;
use crate::hypervisor::error::HypervisorError;
use crate::hypervisor::facts::{
    Group, Guest, GuestKind, Host, Node, ReplicaSide, Replication, ReplicationHealth,
    ReplicationState, Service, UserSnapshots, VmFacts,
};

/// Requested information of GetSummaryInformation: the guest's operating system, the state of its integration services.
const SUMMARY: [u32; 3] = [0, 106, 121];
/// IntegrationServicesVersionState: another version than the host's.
const MISMATCH: u64 = 2;
/// StatusInformation of a node.
const ISOLATED: u64 = 1;
const QUARANTINED: u64 = 2;
const DRAINING: u64 = 4;
/// NodeDrainStatus: in progress.
const DRAIN_IN_PROGRESS: u64 = 1;
/// State of a node: paused.
const PAUSED: u64 = 2;
/// StatusInformation of groups and resources.
const LOCKED: u64 = 1;
const QUEUED: u64 = 4;
const UNMONITORED: u64 = 256;
/// OfflineAction: save.
const SAVE: u64 = 1;

/// Replications by VM; of a VM without any there is nothing.
pub(super) type Replications = HashMap<VmGuid, Vec<Replication>>;

impl HyperV {
    pub(super) async fn vm_state(&self, vm: VmGuid) -> Result<VmState, HypervisorError> {
        let system = self.system(vm).await?.ok_or(HypervisorError::NoSuchVm { vm })?;
        let view = self.cluster_view().await?;
        let mut replications = self.replications(std::slice::from_ref(&system)).await?;
        let mut seen = seen(&system, vm, &view);
        seen.replica = role(&seen, &replications);
        let status = |n: usize| {
            system.array("OperationalStatus").get(n).and_then(Value::as_u64).unwrap_or(0)
        };
        let mut facts = VmFacts {
            replication: replications.remove(&vm).unwrap_or_default(),
            host: self.host_facts().await?,
            ..VmFacts::default()
        };
        if seen.clustered {
            facts.group = self.group_facts(vm).await?;
        }
        if let Some(settings) = self.active_settings(vm).await? {
            configured(&mut seen, &settings);
            let parts = self.components(&settings).await?;
            seen.disks = self.disks(&parts, false).await;
            facts.scsi = Some(super::disks::has_scsi(&parts));
            facts.user_snapshots = UserSnapshots::of(settings.u64("UserSnapshotType"));
            facts.guest = self.guest(vm, &settings).await?;
            (facts.vtpm, facts.shielded) = self.security(&settings).await?;
            facts.user_checkpoints = self.user_checkpoints(vm).await?;
            facts.checkpoints_beside_disks = beside(&settings, &seen.disks);
        }
        let volumes = self.volumes_of(&seen.disks).await?;
        let (health, operation) = (status(0), status(1));
        Ok(VmState { vm: seen, health, operation, facts, volumes })
    }

    /// A query for what not every host has.
    async fn optional(
        &self,
        namespace: &str,
        doing: &str,
        wql: &str,
    ) -> Result<Vec<Object>, HypervisorError> {
        match self.wmi.query(namespace, wql).await {
            Err(
                WmiError::NoNamespace { .. }
                | WmiError::Invalid { .. }
                | WmiError::NotFound { .. }
                | WmiError::AccessDenied { .. },
            ) => Ok(Vec::new()),
            answer => answer.map_err(provider(doing)),
        }
    }

    async fn guest(&self, vm: VmGuid, settings: &Object) -> Result<Guest, HypervisorError> {
        let doing = "look at a VM's integration services";
        let guid = literal(&wql::guid(vm.0));
        let component = async |class: &str| {
            let wql = format!("SELECT * FROM {class} WHERE SystemName={guid}");
            let found = self.optional(NS_VIRTUALIZATION, doing, &wql).await?;
            Ok::<_, HypervisorError>(found.into_iter().next())
        };
        let backup = component("Msvm_VssComponent").await?;
        let exchange = component("Msvm_KvpExchangeComponent").await?;
        let mut guest = Guest {
            backup: backup.as_ref().map(service).unwrap_or_default(),
            exchange: exchange.as_ref().map(service).unwrap_or_default(),
            ..Guest::default()
        };
        for (key, text) in exchange.iter().flat_map(exchanged) {
            match key.as_str() {
                "OSName" => guest.os = text,
                "OSVersion" => guest.os_version = text,
                // The list of keys is not settled: what we do not know is no error.
                _ => {}
            }
        }
        if let Some(summary) = self.summary(settings).await {
            if guest.os.is_empty() {
                guest.os = summary.str("GuestOperatingSystem").unwrap_or_default().to_owned();
            }
            guest.other_version =
                summary.u64("IntegrationServicesVersionState").map(|s| s == MISMATCH);
        }
        guest.kind = GuestKind::of(&guest.os);
        Ok(guest)
    }

    /// GetSummaryInformation of one VM; nothing in it is needed, so that a host that refuses it is no error.
    async fn summary(&self, settings: &Object) -> Option<Object> {
        let call = Call {
            doing: "read the summary of a VM".into(),
            service: "Msvm_VirtualSystemManagementService",
            path: String::new(),
            method: "GetSummaryInformation",
            args: vec![
                ("SettingData", Value::Array(vec![Value::Ref(settings.path.clone())])),
                ("RequestedInformation", Value::Array(SUMMARY.map(Value::from).to_vec())),
            ],
        };
        let out = self.ask(&call).await.ok()?.out;
        match out.array("SummaryInformation").first()? {
            Value::Object(summary) => Some((**summary).clone()),
            value => embedded::from_text(value.as_str()?).ok(),
        }
    }

    /// The replications of these VMs.
    pub(super) async fn replications(
        &self,
        systems: &[Object],
    ) -> Result<Replications, HypervisorError> {
        let doing = "look at VMs' replications";
        let all = self
            .optional(NS_VIRTUALIZATION, doing, "SELECT * FROM Msvm_ReplicationRelationship")
            .await?;
        let of = |r: &Object| {
            let replication = Replication {
                side: side_in(r, systems)?,
                state: ReplicationState::of(r.u64("ReplicationState")?),
                health: ReplicationHealth::of(r.u64("ReplicationHealth").unwrap_or(0)),
            };
            let active = replication.state != ReplicationState::Disabled;
            active.then_some((VmGuid(wql::settings_guid(r)?), replication))
        };
        let mut out = Replications::new();
        for (vm, replication) in all.iter().filter_map(of) {
            out.entry(vm).or_default().push(replication);
        }
        Ok(out)
    }

    /// Whether it has a virtual TPM, and whether it is shielded.
    async fn security(&self, settings: &Object) -> Result<(bool, bool), HypervisorError> {
        let class = "Msvm_SecuritySettingData";
        let found = match self.wmi.associators(NS_VIRTUALIZATION, &settings.path, "", class).await {
            Ok(found) => found,
            // Hosts before Server 2016 have no such class.
            Err(WmiError::NotFound { .. } | WmiError::Invalid { .. }) => Vec::new(),
            Err(e) => return Err(provider("read a VM's security settings")(e)),
        };
        let says = |name: &str| found.iter().any(|o| o.bool(name) == Some(true));
        Ok((says("TpmEnabled"), says("ShieldingRequested")))
    }

    async fn user_checkpoints(&self, vm: VmGuid) -> Result<usize, HypervisorError> {
        let wql = format!(
            "SELECT * FROM {} WHERE VirtualSystemIdentifier={} AND VirtualSystemType={}",
            wql::SETTINGS,
            literal(&wql::guid(vm.0)),
            literal("Microsoft:Hyper-V:Snapshot:Realized")
        );
        Ok(self.query("count the checkpoints of a VM", &wql).await?.len())
    }

    /// When Windows was started.
    pub(super) async fn started(&self) -> Result<Option<u64>, HypervisorError> {
        let wql = "SELECT LastBootUpTime FROM Win32_OperatingSystem";
        let found = self.optional(NS_CIM, "ask when the host was started", wql).await?;
        Ok(found.first().and_then(|system| system.unix_ms("LastBootUpTime")))
    }

    /// The name that Windows and its cluster have for this host; asked for until it was told once.
    pub(super) async fn this_host(&self) -> String {
        let wql = "SELECT CSName FROM Win32_OperatingSystem";
        let ask = async || {
            let found = self.wmi.query(NS_CIM, wql).await.map_err(drop)?;
            found.first().and_then(|o| o.str("CSName")).map(str::to_owned).ok_or(())
        };
        self.this.get_or_try_init(ask).await.cloned().unwrap_or_default()
    }

    /// Build of this host; `None` when it is not told.
    pub(super) async fn build(&self) -> Result<Option<u32>, HypervisorError> {
        let wql = "SELECT BuildNumber FROM Win32_OperatingSystem";
        let found = self.optional(NS_CIM, "ask for the host's release", wql).await?;
        Ok(found.first().and_then(|system| system.u64("BuildNumber")).and_then(small))
    }

    /// Build of this host, level of its cluster, and what the cluster says of it.
    pub(super) async fn host_facts(&self) -> Result<Host, HypervisorError> {
        let build = self.build().await?;
        let name = self.this_host().await;
        let doing = "look at the cluster";
        let cluster = self.optional(NS_CLUSTER, doing, "SELECT * FROM MSCluster_Cluster").await?;
        let nodes = self.optional(NS_CLUSTER, doing, "SELECT * FROM MSCluster_Node").await?;
        let this = |n: &&Object| n.str("Name").is_some_and(|n| n.eq_ignore_ascii_case(&name));
        Ok(Host {
            build,
            functional_level: cluster
                .first()
                .and_then(|c| c.u64("ClusterFunctionalLevel"))
                .and_then(small),
            node: nodes.iter().find(this).map(node).unwrap_or_default(),
        })
    }

    /// What the cluster says of the VM's group and resource; `None` when it has none.
    async fn group_facts(&self, vm: VmGuid) -> Result<Option<Group>, HypervisorError> {
        let Some(resource) = self.vm_resource(vm).await? else { return Ok(None) };
        let doing = "look at a VM's cluster group";
        let group = resource.str("OwnerGroup").unwrap_or_default();
        let wql = format!("SELECT * FROM MSCluster_ResourceGroup WHERE Name={}", literal(group));
        let group = self.optional(NS_CLUSTER, doing, &wql).await?.into_iter().next();
        Ok(Some(group_of(&resource, group.as_ref())))
    }

    /// The cluster resource that is the VM (not its configuration).
    pub(super) async fn vm_resource(&self, vm: VmGuid) -> Result<Option<Object>, HypervisorError> {
        let wql = format!("SELECT * FROM MSCluster_Resource WHERE Type='{}'", cluster::VM_RESOURCE);
        let all = self.cluster_query("look for a VM's cluster resource", &wql).await?;
        Ok(all.into_iter().find(|r| cluster::owner_of(r).is_some_and(|(found, _)| found == vm)))
    }
}

/// Which side of a replication its VM is: a relationship does not tell, only the VM does. The second relationship of a
/// replica is the one in which it sends on.
fn side_in(relationship: &Object, systems: &[Object]) -> Option<ReplicaSide> {
    let vm = VmGuid(wql::settings_guid(relationship)?);
    let system = systems.iter().find(|o| wql::named_guid(o) == Some(vm))?;
    let side = ReplicaSide::of(system.u64("ReplicationMode")?)?;
    let second = relationship.str("InstanceID").is_some_and(|id| id.ends_with(r"\HVR\1"));
    Some(if second && side == ReplicaSide::Replica { ReplicaSide::Primary } else { side })
}

fn small(number: u64) -> Option<u32> {
    u32::try_from(number).ok()
}

fn service(component: &Object) -> Service {
    let status = component.array("OperationalStatus").first().and_then(Value::as_u64);
    Service::of(component.u64("EnabledState"), status)
}

/// Keys and texts that the guest sends by itself.
fn exchanged(component: &Object) -> Vec<(String, String)> {
    let pair = |item: &Value| {
        let item = match item {
            Value::Object(o) => (**o).clone(),
            value => embedded::from_text(value.as_str()?).ok()?,
        };
        Some((item.str("Name")?.to_owned(), item.str("Data").unwrap_or_default().to_owned()))
    };
    component.array("GuestIntrinsicExchangeItems").iter().filter_map(pair).collect()
}

fn node(object: &Object) -> Node {
    let bits = object.u64("StatusInformation").unwrap_or(0);
    Node {
        paused: object.u64("State") == Some(PAUSED),
        draining: bits & DRAINING != 0 || object.u64("NodeDrainStatus") == Some(DRAIN_IN_PROGRESS),
        isolated: bits & ISOLATED != 0,
        quarantined: bits & QUARANTINED != 0,
    }
}

fn group_of(resource: &Object, group: Option<&Object>) -> Group {
    let of = |o: &Object| o.u64("StatusInformation").unwrap_or(0);
    let group_bits = group.map_or(0, of);
    Group {
        locked: (of(resource) | group_bits) & LOCKED != 0,
        queued: group_bits & QUEUED != 0,
        unmonitored: group_bits & UNMONITORED != 0,
        offline_saves: resource
            .object("PrivateProperties")
            .and_then(|p| p.u64("OfflineAction"))
            .map(|action| action == SAVE),
    }
}

/// Whether checkpoint files go to the volume of the disks, as far as two paths tell.
fn beside(settings: &Object, disks: &[crate::hypervisor::DiskSeen]) -> Option<bool> {
    let root = settings.str("SnapshotDataRoot").filter(|r| !r.is_empty())?;
    let volume = |path: &str| {
        let parts: Vec<String> = path
            .split(['\\', '/'])
            .map(str::to_ascii_lowercase)
            .filter(|p| !p.is_empty())
            .collect();
        // Cluster Shared Volumes are mounted below one folder of the system's drive.
        let depth = if parts.get(1).is_some_and(|p| p == "clusterstorage") { 3 } else { 1 };
        parts.into_iter().take(depth).collect::<Vec<_>>()
    };
    let files = disks.iter().filter(|d| d.uncapturable.is_none());
    let all: Vec<bool> = files.map(|d| volume(&d.path) == volume(root)).collect();
    (!all.is_empty()).then(|| all.iter().all(|same| *same))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::DiskSeen;

    /// Facts 1.4 and 14.9: the keys are not settled; unknown and damaged items are no error.
    #[test]
    fn what_a_guest_tells_is_read_and_what_is_unknown_is_left() {
        let item = |name: &str, data: &str| {
            let object = Object::new("Msvm_KvpExchangeDataItem", "")
                .with("Name", name)
                .with("Data", data)
                .with("Source", 2_u16);
            embedded::to_text(&object)
        };
        let items = vec![
            item("OSName", "Windows Server 2022 Datacenter"),
            "<INSTANCE".to_owned(),
            item("SomethingOfTheFuture", "1 & 2 < 3"),
            item("OSVersion", "10.0.20348"),
        ];
        let component = Object::new("Msvm_KvpExchangeComponent", "p")
            .with("GuestIntrinsicExchangeItems", items);
        let found = exchanged(&component);
        let of = |key: &str| found.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str());
        assert_eq!(of("OSName"), Some("Windows Server 2022 Datacenter"));
        assert_eq!(of("SomethingOfTheFuture"), Some("1 & 2 < 3"));
        assert_eq!(found.len(), 3, "the damaged one is left out");
    }

    /// Server 2012 R2 to 2025: relationships have no ReplicationMode.
    #[test]
    fn the_side_of_a_replication_is_told_by_its_vm() {
        let guid = "11111111-2222-3333-4444-555555555555";
        let side = |mode: u32, number: u32| {
            let system =
                Object::new(wql::SYSTEM, "p").with("Name", guid).with("ReplicationMode", mode);
            let id = format!(r"Microsoft:{guid}\HVR\{number}");
            side_in(
                &Object::new("Msvm_ReplicationRelationship", "r").with("InstanceID", id),
                &[system],
            )
        };
        assert_eq!(side(0, 0), None);
        assert_eq!(side(1, 0), Some(ReplicaSide::Primary));
        assert_eq!(side(2, 0), Some(ReplicaSide::Replica));
        assert_eq!(side(2, 1), Some(ReplicaSide::Primary), "it sends on");
        assert_eq!(side(3, 0), Some(ReplicaSide::Test));
        assert_eq!(side(4, 1), Some(ReplicaSide::Extended));
        let other = Object::new(wql::SYSTEM, "p").with("Name", "HV1");
        let alone = Object::new("r", "").with("InstanceID", format!(r"Microsoft:{guid}\HVR\0"));
        assert_eq!(side_in(&alone, &[other]), None);
    }

    /// Facts 4.1: bits of nodes, groups and resources.
    #[test]
    fn the_clusters_bits_are_told_apart() {
        let of = |bits: u32, drain: u32, state: u32| {
            node(
                &Object::new("MSCluster_Node", "p")
                    .with("StatusInformation", bits)
                    .with("NodeDrainStatus", drain)
                    .with("State", state),
            )
        };
        assert_eq!(of(0, 0, 0), Node::default());
        assert_eq!(
            of(0, 2, 2),
            Node { paused: true, ..Node::default() },
            "drained is not draining"
        );
        assert!(of(4, 0, 2).draining && of(0, 1, 2).draining);
        assert!(of(1, 0, 0).isolated && of(2, 0, 1).quarantined);
        let resource = |bits: u32, action: u32| {
            Object::new("MSCluster_Resource", "p").with("StatusInformation", bits).with(
                "PrivateProperties",
                Value::Object(Box::new(Object::new("", "").with("OfflineAction", action))),
            )
        };
        let group =
            Object::new("MSCluster_ResourceGroup", "p").with("StatusInformation", 4_u32 | 256);
        let found = group_of(&resource(1, 1), Some(&group));
        let expected =
            Group { locked: true, queued: true, unmonitored: true, offline_saves: Some(true) };
        assert_eq!(found, expected);
        assert_eq!(group_of(&resource(0, 2), None).offline_saves, Some(false));
    }

    #[test]
    fn checkpoints_are_beside_their_disks_when_drive_or_shared_volume_are_the_same() {
        let disk = |path: &str| DiskSeen {
            disk_id: None,
            size: 0,
            slot: String::new(),
            path: path.into(),
            format: crate::hypervisor::facts::Format::Vhdx,
            uncapturable: None,
        };
        let table = [
            (r"C:\ClusterStorage\Volume1\vm", r"c:\clusterstorage\volume1\vm\a.vhdx", true),
            (r"C:\ClusterStorage\Volume2\vm", r"C:\ClusterStorage\Volume1\vm\a.vhdx", false),
            (r"D:\checkpoints", r"D:\disks\a.vhdx", true),
            (r"D:\checkpoints", r"E:\disks\a.vhdx", false),
        ];
        for (root, path, expected) in table {
            let settings = Object::new(wql::SETTINGS, "p").with("SnapshotDataRoot", root);
            assert_eq!(beside(&settings, &[disk(path)]), Some(expected), "{root} {path}");
            assert_eq!(beside(&settings, &[]), None);
        }
    }
}
