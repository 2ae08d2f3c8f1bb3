//! The failover cluster's database: who owns which VM, which hosts are up, where there is space.

use std::collections::HashMap;
use std::path::PathBuf;

use outrider_proto::ids::VmGuid;
use outrider_wmi::Object;

use super::HyperV;
use crate::hypervisor::error::HypervisorError;

/// Resource type of VMs; type names are not localized.
pub(super) const VM_RESOURCE: &str = "Virtual Machine";
/// Node states.
const UP: u64 = 0;
const DOWN: u64 = 1;
const PAUSED: u64 = 2;

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

/// Whether a node's state means that it works: up, or paused (drained, but running).
pub(super) fn node_state(node: &Object) -> Option<(String, bool)> {
    let name = node.str("Name")?.to_owned();
    match node.u64("State") {
        Some(UP | PAUSED) => Some((name, true)),
        Some(DOWN) => Some((name, false)),
        _ => None,
    }
}

impl HyperV {
    /// Owner by VM.
    pub(super) async fn cluster_owners(&self) -> Result<HashMap<VmGuid, String>, HypervisorError> {
        let wql = format!("SELECT * FROM MSCluster_Resource WHERE Type='{VM_RESOURCE}'");
        let resources = self.cluster_query("list the cluster's VMs", &wql).await?;
        Ok(resources.iter().filter_map(owner_of).collect())
    }

    /// Members that are up, and that are down.
    pub(super) async fn cluster_nodes(
        &self,
    ) -> Result<(Vec<String>, Vec<String>), HypervisorError> {
        let nodes =
            self.cluster_query("list the cluster's hosts", "SELECT * FROM MSCluster_Node").await?;
        let (up, down): (Vec<_>, Vec<_>) =
            nodes.iter().filter_map(node_state).partition(|(_, up)| *up);
        let names = |list: Vec<(String, bool)>| list.into_iter().map(|(name, _)| name).collect();
        Ok((names(up), names(down)))
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
