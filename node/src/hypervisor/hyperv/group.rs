//! A VM's cluster group: found by the VM's GUID and never by name, its settings, stopping and starting it, making and
//! removing it (facts, sections 4.1 and 4.3).
//!
//! Only the resource of type "Virtual Machine" is taken offline. The group has another one, the configuration; taken
//! offline, too, it would unregister the VM from its host.

use std::time::Duration;

use outrider_process::backoff::Backoff;
use outrider_proto::ids::VmGuid;
use outrider_proto::manifest::ClusterGroup;
use outrider_wmi::{NS_CLUSTER, Object, Value, WmiError};
use tokio::time::Instant;

use super::HyperV;
use super::call::provider;
use super::cluster::{VM_RESOURCE, owner_of};
use super::wql::{self, literal};
use crate::hypervisor::error::{HypervisorError, Retry, meaning};
use crate::lease::Lease;

const GROUP: &str = "MSCluster_ResourceGroup";
const CONFIGURATION_RESOURCE: &str = "Virtual Machine Configuration";
/// ERROR_OBJECT_ALREADY_EXISTS, ERROR_GROUP_NOT_FOUND.
const EXISTS: u32 = 5010;
const NO_GROUP: u32 = 5013;
/// No hour: failback at once.
const NO_HOUR: u32 = u32::MAX;
/// How long the cluster's own call may wait for a VM that stops or starts, seconds: less than a call of ours, so that a VM
/// with much memory is no call without an answer. What becomes of it is looked for in the VM's own state.
pub(super) const RESOURCE_WAIT: u32 = 60;
/// WAIT_TIMEOUT, ERROR_IO_PENDING, ERROR_TIMEOUT: the resource is on its way.
const PENDING: [u32; 3] = [258, 997, 1460];

impl HyperV {
    /// The cluster's resource of a VM; `None` when it is not clustered.
    async fn resource_of(&self, vm: VmGuid, kind: &str) -> Result<Option<Object>, HypervisorError> {
        let doing = "look for a VM in the cluster";
        let of_kind = format!("SELECT * FROM MSCluster_Resource WHERE Type={}", literal(kind));
        let by_vm = format!("{of_kind} AND PrivateProperties.VmID={}", literal(&vm.to_string()));
        let is_ours = |o: &Object| vm_in(o) == Some(vm);
        if let Ok(found) = self.cluster_query(doing, &by_vm).await
            && let Some(resource) = found.into_iter().find(is_ours)
        {
            return Ok(Some(resource));
        }
        // Not every provider compares GUIDs as we write them.
        Ok(self.cluster_query(doing, &of_kind).await?.into_iter().find(is_ours))
    }

    /// The group of a VM, and what an administrator has set at it.
    pub(super) async fn group_of(
        &self,
        vm: VmGuid,
    ) -> Result<Option<(Object, ClusterGroup)>, HypervisorError> {
        let doing = "read a VM's cluster group";
        let Some(resource) = self.resource_of(vm, VM_RESOURCE).await? else { return Ok(None) };
        let groups = self
            .wmi
            .associators(NS_CLUSTER, &resource.path, "MSCluster_ResourceGroupToResource", GROUP)
            .await
            .map_err(provider(doing))?;
        let Some(group) = groups.into_iter().next() else { return Ok(None) };
        let owners =
            self.wmi.exec_method(NS_CLUSTER, &group.path, "GetPreferredOwners", vec![]).await;
        let owners = match &owners {
            Ok(out) => texts(out.array("NodeNames")),
            Err(e) => {
                tracing::warn!(error = %e, "the preferred owners of a group are not told");
                Vec::new()
            }
        };
        let settings = settings_of(&group, owners);
        Ok(Some((group, settings)))
    }

    /// The host that runs a VM, as the cluster knows.
    pub(super) async fn cluster_owner(
        &self,
        vm: VmGuid,
    ) -> Result<Option<String>, HypervisorError> {
        let resource = self.resource_of(vm, VM_RESOURCE).await?;
        Ok(resource.as_ref().and_then(owner_of).map(|(_, owner)| owner))
    }

    /// Stops a clustered VM in the cluster's eyes; its resource saves or turns off as it is set. Not clustered: nothing.
    pub(super) async fn take_offline(
        &self,
        lease: &Lease,
        vm: VmGuid,
    ) -> Result<(), HypervisorError> {
        let Some(resource) = self.resource_of(vm, VM_RESOURCE).await? else { return Ok(()) };
        let doing = format!("take VM {vm} offline in its cluster");
        let args = vec![("TimeOut".to_owned(), RESOURCE_WAIT.into())];
        self.cluster_change(lease, &doing, &resource.path, "TakeOffline", args).await
    }

    /// Starts a clustered VM through its cluster; gives whether it is clustered.
    pub(super) async fn bring_online(
        &self,
        lease: &Lease,
        vm: VmGuid,
    ) -> Result<bool, HypervisorError> {
        let Some(resource) = self.resource_of(vm, VM_RESOURCE).await? else { return Ok(false) };
        let doing = format!("start VM {vm} in its cluster");
        let args = vec![("TimeOut".to_owned(), RESOURCE_WAIT.into())];
        self.cluster_change(lease, &doing, &resource.path, "BringOnline", args).await?;
        Ok(true)
    }

    /// Makes a VM a clustered role with these settings; gives what could not be set.
    pub(super) async fn make_highly_available(
        &self,
        lease: &Lease,
        vm: VmGuid,
        settings: Option<&ClusterGroup>,
    ) -> Result<Vec<String>, HypervisorError> {
        let doing = format!("make VM {vm} highly available");
        let clusters = self.cluster_query(&doing, "SELECT * FROM MSCluster_Cluster").await?;
        let cluster = clusters.first().ok_or_else(|| HypervisorError::Odd {
            doing: doing.clone(),
            detail: "this host is in no failover cluster".into(),
        })?;
        self.add_to_cluster(lease, &doing, &cluster.path, vm).await?;
        let mut notes = Vec::new();
        if let Some(settings) = settings
            && let Err(e) = self.set_group(lease, vm, settings).await
        {
            if let HypervisorError::Lease(lost) = e {
                return Err(lost.into());
            }
            notes.push(format!(
                "the settings of its cluster group could not be set again ({e}); they were: {}",
                described(settings)
            ));
        }
        if let Some(resource) = self.resource_of(vm, CONFIGURATION_RESOURCE).await? {
            let doing = format!("tell the cluster where the files of VM {vm} are");
            let path = &resource.path;
            if let Err(e) =
                self.cluster_change(lease, &doing, path, "UpdateVirtualMachine", vec![]).await
            {
                if let HypervisorError::Lease(lost) = e {
                    return Err(lost.into());
                }
                notes.push(format!("{e}; run Update-ClusterVirtualMachineConfiguration"));
            }
        }
        Ok(notes)
    }

    /// The documentation says "the virtual machine to add" and not whether by GUID or by name; PowerShell takes either, one
    /// program that is known gives the name. So the GUID is tried first, then a name that no other VM of this host has.
    async fn add_to_cluster(
        &self,
        lease: &Lease,
        doing: &str,
        cluster: &str,
        vm: VmGuid,
    ) -> Result<(), HypervisorError> {
        let add = async |name: String| {
            let args = vec![("VirtualMachine".to_owned(), name.into())];
            match self.cluster_change(lease, doing, cluster, "AddVirtualMachine", args).await {
                // It is.
                Ok(()) | Err(HypervisorError::Refused { code: EXISTS, .. }) => Ok(()),
                Err(e) => Err(e),
            }
        };
        let failure = match add(wql::guid(vm.0)).await {
            Ok(()) => return Ok(()),
            Err(e @ HypervisorError::Lease(_)) => return Err(e),
            Err(e) => e,
        };
        let systems = self.query(doing, &format!("SELECT * FROM {}", wql::SYSTEM)).await?;
        let named = |system: &Object| system.str("ElementName").map(str::to_owned);
        let own = systems.iter().find(|o| wql::named_guid(o) == Some(vm)).and_then(named);
        let own = own
            .filter(|own| systems.iter().filter(|o| named(o).as_ref() == Some(own)).count() == 1);
        let Some(own) = own else { return Err(failure) };
        tracing::info!(%vm, error = %failure, "the cluster does not take the VM by its GUID; by its name");
        // What was said of the GUID tells more than what is said of a name that was a guess.
        add(own).await.map_err(|e| if let HypervisorError::Lease(_) = e { e } else { failure })
    }

    async fn set_group(
        &self,
        lease: &Lease,
        vm: VmGuid,
        settings: &ClusterGroup,
    ) -> Result<(), HypervisorError> {
        let doing = format!("set up the cluster group of VM {vm}");
        let (group, _) = self.group_of(vm).await?.ok_or_else(|| HypervisorError::Odd {
            doing: doing.clone(),
            detail: "the VM has no group although it was just made".into(),
        })?;
        let properties = properties_of(settings)
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect();
        lease.may_mutate()?;
        self.wmi.put(NS_CLUSTER, &group.path, properties).await.map_err(provider(&doing))?;
        if settings.preferred_owners.is_empty() {
            return Ok(());
        }
        let owners = Value::from(settings.preferred_owners.clone());
        let args = vec![("NodeNames".to_owned(), owners)];
        self.cluster_change(lease, &doing, &group.path, "SetPreferredOwners", args).await
    }

    /// Takes a VM's group out of the cluster (before the VM is removed).
    pub(super) async fn remove_from_cluster(
        &self,
        lease: &Lease,
        vm: VmGuid,
    ) -> Result<(), HypervisorError> {
        let doing = format!("take VM {vm} out of the cluster");
        let Some((group, _)) = self.group_of(vm).await? else { return Ok(()) };
        let args = vec![("Options".to_owned(), 1_u32.into())];
        match self.cluster_change(lease, &doing, &group.path, "DestroyGroup", args).await {
            Err(HypervisorError::Refused { code: NO_GROUP, .. }) => Ok(()),
            done => done,
        }
    }

    /// Calls a method of the cluster that changes something. A busy cluster is asked again with growing pauses. These
    /// methods give no value on a real cluster, they fail or do not; a value is understood, too.
    pub(super) async fn cluster_change(
        &self,
        lease: &Lease,
        doing: &str,
        path: &str,
        method: &str,
        args: Vec<(String, Value)>,
    ) -> Result<(), HypervisorError> {
        let until = Instant::now() + self.times.busy_patience;
        let mut backoff =
            Backoff::new(self.times.busy_first, self.times.busy_ceiling, Backoff::any_seed());
        loop {
            lease.wait_to_mutate().await?;
            let answer = self.wmi.exec_method(NS_CLUSTER, path, method, args.clone()).await;
            let code = match &answer {
                Ok(out) => out.u64("ReturnValue").and_then(|c| u32::try_from(c).ok()).unwrap_or(0),
                Err(WmiError::Invalid { reason, .. }) => win32_in(reason).unwrap_or(0),
                Err(_) => 0,
            };
            let failure = match (answer, code) {
                (Ok(_), 0) => return Ok(()),
                (_, code) if PENDING.contains(&code) => return Ok(()),
                (Err(e), 0) => return Err(provider(doing)(e)),
                (answer, code) => {
                    let told = answer.err().map(|e| e.to_string());
                    let (meant, remedy) = meaning(code, told.as_deref().unwrap_or_default());
                    HypervisorError::Refused {
                        doing: doing.to_owned(),
                        code,
                        reason: told.unwrap_or_else(|| meant.to_owned()),
                        remedy,
                    }
                }
            };
            let pause: Duration = backoff.next_wait();
            if failure.retry() != Retry::Later || Instant::now() + pause >= until {
                return Err(failure);
            }
            tracing::info!(doing, error = %failure, ?pause, "the cluster is busy, asking again");
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                lost = lease.lost() => return Err(lost.into()),
            }
        }
    }
}

/// The VM that a resource of any kind is of.
fn vm_in(resource: &Object) -> Option<VmGuid> {
    let private = resource.object("PrivateProperties")?;
    let id = private.str("VmID").or_else(|| private.str("VmId"))?;
    id.trim_matches(['{', '}']).parse().ok()
}

fn texts(values: &[Value]) -> Vec<String> {
    values.iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

fn settings_of(group: &Object, preferred_owners: Vec<String>) -> ClusterGroup {
    let number = |name| group.u64(name).and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
    let hour = |name| group.u64(name).and_then(|n| u32::try_from(n).ok()).filter(|h| *h < 24);
    ClusterGroup {
        name: group.str("Name").unwrap_or_default().to_owned(),
        priority: number("Priority"),
        failover_threshold: number("FailoverThreshold"),
        failover_period: number("FailoverPeriod"),
        auto_failback: number("AutoFailbackType"),
        failback_start: hour("FailbackWindowStart"),
        failback_end: hour("FailbackWindowEnd"),
        persistent: group.bool("PersistentState").unwrap_or(true),
        anti_affinity: texts(group.array("AntiAffinityClassNames")),
        preferred_owners,
    }
}

fn properties_of(settings: &ClusterGroup) -> Vec<(&'static str, Value)> {
    vec![
        ("Priority", settings.priority.into()),
        ("FailoverThreshold", settings.failover_threshold.into()),
        ("FailoverPeriod", settings.failover_period.into()),
        ("AutoFailbackType", settings.auto_failback.into()),
        ("FailbackWindowStart", settings.failback_start.unwrap_or(NO_HOUR).into()),
        ("FailbackWindowEnd", settings.failback_end.unwrap_or(NO_HOUR).into()),
        ("PersistentState", settings.persistent.into()),
        ("AntiAffinityClassNames", settings.anti_affinity.clone().into()),
    ]
}

fn described(settings: &ClusterGroup) -> String {
    format!(
        "priority {}, failover threshold {} in {} hours, anti-affinity {:?}, preferred owners {:?}",
        settings.priority,
        settings.failover_threshold,
        settings.failover_period,
        settings.anti_affinity,
        settings.preferred_owners
    )
}

/// The Win32 error in a provider's words: `0x8007` and four digits.
fn win32_in(text: &str) -> Option<u32> {
    let at = text.to_ascii_lowercase().find("0x8007")?;
    u32::from_str_radix(text.get(at + 6..at + 10)?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_a_group_survive_being_read_and_set_again() {
        let settings = ClusterGroup {
            name: "db".into(),
            priority: 3000,
            failover_threshold: 2,
            failover_period: 12,
            auto_failback: 1,
            failback_start: Some(1),
            failback_end: None,
            persistent: false,
            anti_affinity: vec!["db".into()],
            preferred_owners: vec!["hv2".into(), "hv1".into()],
        };
        let group = properties_of(&settings)
            .into_iter()
            .fold(Object::new(GROUP, "g").with("Name", "db"), |o, (name, value)| {
                o.with(name, value)
            });
        assert_eq!(settings_of(&group, settings.preferred_owners.clone()), settings);
    }

    #[test]
    fn a_busy_cluster_is_told_from_its_words() {
        assert_eq!(win32_in("group is locked (0x80071748)"), Some(5960));
        let refused = |code| HypervisorError::Refused {
            doing: String::new(),
            code,
            reason: String::new(),
            remedy: "",
        };
        for busy in [5023, 5908, 5944, 5949, 5959, 5960, 5962] {
            assert_eq!(refused(busy).retry(), Retry::Later, "{busy}");
        }
        assert_ne!(refused(EXISTS).retry(), Retry::Later);
        assert_eq!(win32_in("no code"), None);
        assert_eq!(win32_in("0x8007"), None);
    }
}
