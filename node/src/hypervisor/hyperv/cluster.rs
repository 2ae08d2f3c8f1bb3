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
        Ok(ClusterView {
            owners: resources.iter().filter_map(owner_of).collect(),
            hosts: nodes.iter().filter_map(node_state).collect(),
            speaks: speaks(own),
            this,
        })
    }

    /// Cluster Shared Volumes and their free bytes.
    pub(super) async fn shared_volumes(&self) -> Result<Vec<(PathBuf, u64)>, HypervisorError> {
        let doing = "ask for the free space of volumes";
        let partitions = self.cluster_query(doing, "SELECT * FROM MSCluster_DiskPartition").await?;
        // In MiB.
        let volume = |p: &Object| Some((PathBuf::from(p.str("Path")?), p.u64("FreeSpace")? << 20));
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
