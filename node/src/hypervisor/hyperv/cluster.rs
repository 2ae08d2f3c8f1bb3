//! The failover cluster's database: who owns which VM, which hosts are up, making a VM highly available.

use std::collections::HashMap;
use std::path::PathBuf;

use outrider_proto::ids::VmGuid;
use outrider_wmi::{NS_CLUSTER, Object};

use super::HyperV;
use super::call::provider;
use super::wql;
use crate::hypervisor::error::HypervisorError;
use crate::lease::Lease;

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

    pub(super) async fn make_highly_available(
        &self,
        lease: &Lease,
        vm: VmGuid,
    ) -> Result<(), HypervisorError> {
        let doing = format!("make VM {vm} highly available");
        let clusters = self.cluster_query(&doing, "SELECT * FROM MSCluster_Cluster").await?;
        let cluster = clusters.first().ok_or_else(|| HypervisorError::Odd {
            doing: doing.clone(),
            detail: "this host is in no failover cluster".into(),
        })?;
        lease.may_mutate()?;
        let args = vec![("VirtualMachine".to_owned(), wql::guid(vm.0).into())];
        let out = self
            .wmi
            .exec_method(NS_CLUSTER, &cluster.path, "AddVirtualMachine", args)
            .await
            .map_err(provider(&doing))?;
        match out.u64("ReturnValue").unwrap_or(0) {
            // ERROR_OBJECT_ALREADY_EXISTS: it is.
            0 | 5010 => Ok(()),
            code => Err(HypervisorError::Refused {
                doing,
                code: u32::try_from(code).unwrap_or(u32::MAX),
                reason: "the cluster refused".into(),
                remedy: "look at the cluster's events; the VM itself was restored",
            }),
        }
    }

    /// Takes a VM's group out of the cluster (before the VM is removed).
    pub(super) async fn remove_from_cluster(
        &self,
        lease: &Lease,
        vm: VmGuid,
    ) -> Result<(), HypervisorError> {
        let doing = format!("take VM {vm} out of the cluster");
        let wql = format!("SELECT * FROM MSCluster_Resource WHERE Type='{VM_RESOURCE}'");
        let resources = self.cluster_query(&doing, &wql).await?;
        for resource in resources.iter().filter(|r| owner_of(r).is_some_and(|(v, _)| v == vm)) {
            let groups = self
                .wmi
                .associators(
                    NS_CLUSTER,
                    &resource.path,
                    "MSCluster_ResourceGroupToResource",
                    "MSCluster_ResourceGroup",
                )
                .await
                .map_err(provider(&doing))?;
            for group in groups {
                lease.may_mutate()?;
                let args = vec![("Options".to_owned(), 1_u32.into())];
                self.wmi
                    .exec_method(NS_CLUSTER, &group.path, "DestroyGroup", args)
                    .await
                    .map_err(provider(&doing))?;
            }
        }
        Ok(())
    }
}
