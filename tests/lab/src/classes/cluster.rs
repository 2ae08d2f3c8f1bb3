//! `root\MSCluster`.

use std::path::Path;

use outrider_wmi::{Object, Value};
use uuid::Uuid;

use crate::model::{Host, Power, State, Vm, guid};
use crate::wql::path_of;

/// The hosts as the cluster database shows them.
pub(crate) fn nodes(state: &State) -> Vec<Object> {
    let numbered = (1_u32..).zip(&state.hosts);
    let node = |(id, (name, host)): (u32, (&String, &Host))| {
        let up_down_paused = match (host.up, host.paused) {
            (false, _) => 1_u32,
            (true, true) => 2,
            (true, false) => 0,
        };
        keyed("MSCluster_Node", name)
            .with("Id", id.to_string())
            .with("State", up_down_paused)
            .with("StatusInformation", state.around.node_status(name))
            .with(
                "NodeDrainStatus",
                state.around.drain_status(name).unwrap_or(if host.paused { 2 } else { 0 }),
            )
            .with("BuildNumber", state.around.build(name))
    };
    numbered.map(node).collect()
}

/// The path of a shared volume's volume, by which its partition goes: it has no drive letter.
fn volume_path(csv: &str) -> String {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&blake3::hash(csv.as_bytes()).as_bytes()[..16]);
    format!(r"\\?\Volume{{{}}}", Uuid::from_bytes(bytes))
}

pub(super) fn instances(state: &State, class: &str) -> Option<Vec<Object>> {
    let groups = || state.vms.values().filter(|vm| vm.owner.is_some());
    let as_read = |object: Object, vm: &Vm| match state.shown_owner(vm) {
        Some(owner) => object.with("OwnerNode", owner),
        None => object,
    };
    Some(match class.to_ascii_lowercase().as_str() {
        "mscluster_cluster" => vec![cluster(state)],
        "mscluster_node" => nodes(state),
        "mscluster_resourcegroup" => groups().map(|vm| as_read(group(state, vm), vm)).collect(),
        "mscluster_resource" => groups()
            .flat_map(|vm| resources(state, vm).map(|resource| as_read(resource, vm)))
            .collect(),
        "mscluster_clustersharedvolume" => state
            .csvs
            .iter()
            .map(|csv| {
                let path = csv.path.display().to_string();
                keyed("MSCluster_ClusterSharedVolume", &path)
                    .with("VolumeName", format!("{}\\", volume_path(&csv.name)))
                    .with("FaultState", state.around.csvs.get(&csv.name).copied().unwrap_or(0))
                    .with("BackupState", 0_u32)
                    .with("VolumeOffset", 0_u64)
            })
            .collect(),
        "mscluster_network" => state
            .around
            .networks
            .iter()
            .map(|network| {
                keyed("MSCluster_Network", &network.name)
                    .with("Role", network.role)
                    .with("Address", network.address.to_string())
                    .with("IPv4Addresses", vec![network.address.to_string()])
                    .with("IPv4PrefixLengths", vec![network.prefix.to_string()])
                    .with("State", 3_u32)
            })
            .collect(),
        "mscluster_diskpartition" => state
            .csvs
            .iter()
            .map(|csv| {
                let (free, total) = space(state, &csv.name, &csv.path);
                let path = volume_path(&csv.name);
                Object::new(
                    "MSCluster_DiskPartition",
                    path_of("MSCluster_DiskPartition", &[("Path", &path)]),
                )
                .with("Path", path)
                .with("VolumeLabel", csv.name.as_str())
                .with("FileSystem", "CSVFS")
                .with("FreeSpace", free >> 20)
                .with("TotalSize", total >> 20)
            })
            .collect(),
        _ => return None,
    })
}

pub(super) fn associated(state: &State, source: &Object, assoc: &str) -> Vec<Object> {
    let is = |name: &str| assoc.is_empty() || assoc.eq_ignore_ascii_case(name);
    let clustered = || state.vms.values().filter(|vm| vm.owner.is_some());
    match source.class.as_str() {
        "MSCluster_ResourceGroup" if is("MSCluster_ResourceGroupToResource") => clustered()
            .filter(|vm| source.str("Id") == Some(&derived(vm.id, 1)))
            .flat_map(|vm| resources(state, vm))
            .collect(),
        "MSCluster_Resource" if is("MSCluster_ResourceGroupToResource") => clustered()
            .filter(|vm| resources(state, vm).iter().any(|r| r.str("Id") == source.str("Id")))
            .map(|vm| group(state, vm))
            .collect(),
        "MSCluster_Node" if is("MSCluster_NodeToActiveGroup") => clustered()
            .filter(|vm| vm.owner.as_deref() == source.str("Name"))
            .map(|vm| group(state, vm))
            .collect(),
        _ => Vec::new(),
    }
}

/// The group and resource objects of a clustered VM, for events.
pub(crate) fn group_objects(state: &State, id: Uuid) -> Vec<Object> {
    match state.vms.get(&id) {
        Some(vm) if vm.owner.is_some() => {
            let mut all = vec![group(state, vm)];
            all.extend(resources(state, vm));
            all
        }
        _ => Vec::new(),
    }
}

fn keyed(class: &str, name: &str) -> Object {
    Object::new(class, path_of(class, &[("Name", name)])).with("Name", name)
}

fn cluster(state: &State) -> Object {
    keyed("MSCluster_Cluster", &state.realm)
        .with("ClusterFunctionalLevel", state.around.functional_level)
        .with("ClusterUpgradeVersion", 8_u32)
        .with("BackupInProgress", 0_u32)
}

/// Ids of a VM's cluster objects follow from the VM's, so that they survive everything the VM survives.
fn derived(vm: Uuid, salt: u128) -> String {
    Uuid::from_u128(vm.as_u128() ^ salt).hyphenated().to_string()
}

/// Group names are unique in a cluster: the second VM of a name gets a number.
fn group_name(state: &State, vm: &Vm) -> String {
    let earlier = state
        .vms
        .values()
        .filter(|v| v.owner.is_some() && v.name == vm.name && v.id < vm.id)
        .count();
    if earlier == 0 { vm.name.clone() } else { format!("{} ({earlier})", vm.name) }
}

fn group(state: &State, vm: &Vm) -> Object {
    let queued = vm.migration.as_ref().is_some_and(|m| !m.planned);
    keyed("MSCluster_ResourceGroup", &group_name(state, vm))
        .with("Id", derived(vm.id, 1))
        .with("GroupType", 111_u32)
        .with("State", u32::from(vm.power == Power::Off || vm.power == Power::Saved))
        .with("AntiAffinityClassNames", vm.group.anti_affinity.clone())
        .with("OwnerNode", vm.owner.as_deref().unwrap_or_default())
        .with("StatusInformation", vm.shape.group_status | if queued { 4 } else { 0 })
        .with_settings(vm)
}

trait WithSettings {
    fn with_settings(self, vm: &Vm) -> Self;
}

impl WithSettings for Object {
    /// The numbers that an administrator may set.
    fn with_settings(mut self, vm: &Vm) -> Self {
        for (name, value) in &vm.group.values {
            match name.as_str() {
                "PersistentState" => self.set(name, *value != 0),
                _ => self.set(name, *value),
            }
        }
        self
    }
}

fn resources(state: &State, vm: &Vm) -> [Object; 2] {
    let group = group_name(state, vm);
    let locked = vm.busy.is_some() || vm.migration.is_some();
    let state_number = match vm.power {
        Power::Running | Power::Paused => 2_u32,
        Power::Off | Power::Saved => 3,
    };
    let resource = |kind: &str, salt: u128, private: Object| {
        keyed("MSCluster_Resource", &format!("{kind} {group}"))
            .with("Id", derived(vm.id, salt))
            .with("Type", kind)
            .with("State", state_number)
            .with("OwnerGroup", group.as_str())
            .with("OwnerNode", vm.owner.as_deref().unwrap_or_default())
            .with("StatusInformation", vm.shape.resource_status | u64::from(locked))
            .with("PrivateProperties", Value::Object(Box::new(private)))
    };
    let private = || Object::new("MSCluster_Property", "").with("VmID", guid(vm.id).to_lowercase());
    [
        resource("Virtual Machine", 2, private().with("OfflineAction", vm.shape.offline_action)),
        resource(
            "Virtual Machine Configuration",
            3,
            private().with("VmStoreRootPath", vm.folder.display().to_string()),
        ),
    ]
}

/// Free and total bytes of a CSV.
fn space(state: &State, name: &str, path: &Path) -> (u64, u64) {
    let (free, total) = file_system_space(path);
    (state.pretended_space(name).unwrap_or(free), total)
}

#[cfg(unix)]
fn file_system_space(path: &Path) -> (u64, u64) {
    match rustix::fs::statvfs(path) {
        Ok(fs) => {
            (fs.f_bavail.saturating_mul(fs.f_frsize), fs.f_blocks.saturating_mul(fs.f_frsize))
        }
        Err(e) => {
            tracing::warn!(path = %path.display(), error = %e, "no figures of this volume");
            (0, 0)
        }
    }
}

/// Where the file system is not asked, a CSV has one tebibyte, half of it free.
#[cfg(not(unix))]
fn file_system_space(_: &Path) -> (u64, u64) {
    (1 << 39, 1 << 40)
}
