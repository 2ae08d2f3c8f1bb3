//! The failover cluster's database: who owns which VM, which hosts are up, where there is space.

use std::collections::HashMap;
use std::path::PathBuf;

use outrider_proto::ids::VmGuid;
use outrider_wmi::{Object, Value};

use super::HyperV;
use crate::hypervisor::error::HypervisorError;

/// Resource type of VMs; type names are not localized.
pub(super) const VM_RESOURCE: &str = "Virtual Machine";
/// Node states.
const UP: u64 = 0;
const DOWN: u64 = 1;
const PAUSED: u64 = 2;
/// StatusInformation of a node that lost the cluster and whose VMs run on.
const ISOLATED: u64 = 1;

/// VM and owner that a cluster resource names.
pub(super) fn owner_of(resource: &Object) -> Option<(VmGuid, String)> {
    if resource.str("Type") != Some(VM_RESOURCE) {
        return None;
    }
    let private = resource.object("PrivateProperties")?;
    let vm = private
        .str("VmID")
        .or_else(|| private.str("VmId"))?
        .trim_matches(['{', '}'])
        .parse()
        .ok()?;
    Some((vm, resource.str("OwnerNode")?.to_owned()))
}

/// Whether a node's state means that it works: up, or paused (drained, but running). An isolated one is neither: its VMs run
/// on, and the cluster restarts them elsewhere only when it stays away.
fn node_state(node: &Object) -> Option<(String, bool)> {
    let name = node.str("Name")?.to_owned();
    if isolated(node) {
        return None;
    }
    match node.u64("State") {
        Some(UP | PAUSED) => Some((name, true)),
        Some(DOWN) => Some((name, false)),
        _ => None,
    }
}

/// What this host reads in the cluster's database.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ClusterView {
    /// Owner by VM.
    pub(super) owners: HashMap<VmGuid, String>,
    /// Members, and whether each works; those that are neither up nor down are left out.
    pub(super) hosts: HashMap<String, bool>,
    /// This host, as Windows calls it.
    pub(super) this: String,
    /// Whether this host is part of the cluster now. One that is cut off may read what is long over, and calls others dead
    /// that live: only the cluster's view decides (facts, section 4.3).
    pub(super) speaks: bool,
    /// All members, whatever their state.
    pub(super) members: Vec<String>,
    /// VMs of the cluster that did not tell which they are.
    pub(super) nameless: usize,
}

impl ClusterView {
    /// Whether a VM has a cluster role, and who owns it as far as this host may say.
    pub(super) fn owner_of(&self, vm: VmGuid) -> (bool, Option<&str>) {
        let owner = self.owners.get(&vm).map(String::as_str);
        (owner.is_some(), owner.filter(|_| self.speaks))
    }
}

/// Whether the cluster's database counts as read by a host whose own node looks so.
fn speaks(own: Option<&Object>) -> bool {
    // A stand-alone host, or a name that we do not recognise: not held against it.
    let Some(own) = own else { return true };
    let told = !matches!(own.get("State"), Value::Null);
    (!told || matches!(own.u64("State"), Some(UP | PAUSED))) && !isolated(own)
}

fn isolated(node: &Object) -> bool {
    node.u64("StatusInformation").unwrap_or(0) & ISOLATED != 0
}

/// The folder of a shared volume by its partition. A partition names itself by a drive letter, by a folder or by its volume
/// (`\\\\?\\Volume{GUID}`); which of them, for a shared volume, is told nowhere. The volume itself has both names.
fn folder_of(partition: &Object, volumes: &[Object]) -> Option<PathBuf> {
    let plain = |name: &str| name.trim_end_matches('\\').to_ascii_lowercase();
    let volume_guid = |name: &str| {
        let (_, rest) = name.split_once('{')?;
        rest.split_once('}').map(|(guid, _)| guid.to_ascii_lowercase())
    };
    let mut names: Vec<&str> =
        ["Path", "VolumeGuid"].into_iter().filter_map(|name| partition.str(name)).collect();
    names.extend(partition.array("MountPoints").iter().filter_map(Value::as_str));
    names.retain(|name| !name.is_empty());
    let is = |volume: &&Object| {
        let own = |name| volume.str(name).unwrap_or_default();
        let guid = volume_guid(own("VolumeName"));
        names.iter().any(|name| {
            plain(name) == plain(own("Name"))
                || guid.is_some() && (volume_guid(name) == guid || Some(plain(name)) == guid)
        })
    };
    if let Some(volume) = volumes.iter().find(is) {
        return volume.str("Name").map(PathBuf::from);
    }
    // One with a drive letter, or a folder of ours.
    partition.str("Path").filter(|path| volume_guid(path).is_none()).map(PathBuf::from)
}

impl HyperV {
    /// The cluster as this host reads it now.
    pub(super) async fn cluster_view(&self) -> Result<ClusterView, HypervisorError> {
        let nodes =
            self.cluster_query("list the cluster's hosts", "SELECT * FROM MSCluster_Node").await?;
        let wql = format!("SELECT * FROM MSCluster_Resource WHERE Type='{VM_RESOURCE}'");
        let resources = self.cluster_query("list the cluster's VMs", &wql).await?;
        let this = self.this_host().await;
        let own =
            nodes.iter().find(|n| n.str("Name").is_some_and(|n| n.eq_ignore_ascii_case(&this)));
        let owners: Vec<_> = resources.iter().filter_map(owner_of).collect();
        Ok(ClusterView {
            members: nodes.iter().filter_map(|n| n.str("Name")).map(str::to_owned).collect(),
            nameless: resources.len().saturating_sub(owners.len()),
            owners: owners.into_iter().collect(),
            hosts: nodes.iter().filter_map(node_state).collect(),
            speaks: speaks(own),
            this,
        })
    }

    /// Cluster Shared Volumes and their free bytes.
    pub(super) async fn shared_volumes(&self) -> Result<Vec<(PathBuf, u64)>, HypervisorError> {
        let doing = "ask for the free space of volumes";
        let partitions = self.cluster_query(doing, "SELECT * FROM MSCluster_DiskPartition").await?;
        let volumes =
            self.cluster_query(doing, "SELECT * FROM MSCluster_ClusterSharedVolume").await?;
        // In MiB.
        let volume = |p: &Object| Some((folder_of(p, &volumes)?, p.u64("FreeSpace")? << 20));
        Ok(partitions.iter().filter_map(volume).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(state: i64, status: u32) -> Object {
        Object::new("MSCluster_Node", "p")
            .with("Name", "hv1")
            .with("State", Value::Int(state))
            .with("StatusInformation", status)
    }

    /// Facts 4.1 and 4.3: states of nodes, and the bits beside them.
    #[test]
    fn a_node_works_or_is_down_or_is_neither() {
        let table = [
            (0, 0, Some(true), true),
            (2, 0, Some(true), true),
            (2, 4, Some(true), true),
            (0, 32, Some(true), true),
            (1, 0, Some(false), false),
            (1, 2, Some(false), false),
            (1, 1, None, false),
            (0, 1, None, false),
            (3, 0, None, false),
            (-1, 0, None, false),
        ];
        for (state, status, works, may_speak) in table {
            let node = node(state, status);
            assert_eq!(node_state(&node).map(|(_, up)| up), works, "{state} {status}");
            assert_eq!(speaks(Some(&node)), may_speak, "{state} {status}");
        }
        assert!(speaks(None), "a stand-alone host");
    }

    #[test]
    fn a_shared_volume_is_told_by_any_name_of_its_partition() {
        let guid = "4d2bb1b3-0000-11ee-8000-806e6f6e6963";
        let volumes = [
            Object::new("MSCluster_ClusterSharedVolume", "a")
                .with("Name", r"C:\ClusterStorage\Volume1")
                .with("VolumeName", format!(r"\\?\Volume{{{guid}}}\")),
            Object::new("MSCluster_ClusterSharedVolume", "b").with("Name", r"C:\ClusterStorage\b"),
        ];
        let partition = || Object::new("MSCluster_DiskPartition", "p");
        let told = |p: Object| folder_of(&p, &volumes).map(|f| f.display().to_string());
        let shared = Some(r"C:\ClusterStorage\Volume1".to_owned());
        let upper = guid.to_uppercase();
        assert_eq!(told(partition().with("Path", format!(r"\\?\Volume{{{upper}}}"))), shared);
        assert_eq!(told(partition().with("Path", "").with("VolumeGuid", guid)), shared);
        assert_eq!(told(partition().with("Path", r"c:\clusterstorage\volume1\")), shared);
        let mounted = partition().with("MountPoints", vec![r"C:\ClusterStorage\Volume1\"]);
        assert_eq!(told(mounted), shared);
        assert_eq!(told(partition().with("Path", "Q:")), Some("Q:".to_owned()));
        let other = r"\\?\Volume{00000000-0000-11ee-8000-806e6f6e6963}";
        assert_eq!(told(partition().with("Path", other)), None);
    }

    #[test]
    fn a_host_that_does_not_speak_for_the_cluster_names_no_owners() {
        let vm = VmGuid(uuid::Uuid::from_u128(1));
        let mut view = ClusterView { speaks: true, ..ClusterView::default() };
        assert_eq!(view.owner_of(vm), (false, None));
        view.owners.insert(vm, "hv1".into());
        assert_eq!(view.owner_of(vm), (true, Some("hv1")));
        view.speaks = false;
        assert_eq!(view.owner_of(vm), (true, None));
    }
}
