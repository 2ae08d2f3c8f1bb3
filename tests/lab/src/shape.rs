//! What WMI shows of VMs, hosts and volumes besides what the lab itself keeps: guests, integration services, replication,
//! cluster status. A test sets it; the class model shows it, and methods refuse by it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Changes of a VM's shape; what is `None` stays as it is.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct VmShape {
    /// Name and version of the guest's operating system, as its Data Exchange service tells them.
    pub guest_os: Option<(String, String)>,
    /// EnabledState and OperationalStatus of the backup component.
    pub backup_service: Option<(u16, [u16; 2])>,
    /// EnabledState and OperationalStatus of the heartbeat component.
    pub heartbeat_service: Option<(u16, [u16; 2])>,
    /// EnabledState and OperationalStatus of the Data Exchange component.
    pub exchange_service: Option<(u16, [u16; 2])>,
    /// IntegrationServicesVersionState.
    pub services_version: Option<u16>,
    /// Configuration version.
    pub version: Option<String>,
    /// UserSnapshotType.
    pub user_snapshot_type: Option<u16>,
    /// Replication relationships.
    pub replication: Option<Vec<Relation>>,
    /// The host applies the replication log: checkpoints are refused.
    pub applying_log: Option<bool>,
    /// Whether the VM has a SCSI controller.
    pub scsi: Option<bool>,
    /// An EnabledState to be shown instead of the true one; 0 shows the true one.
    pub enabled_state: Option<u16>,
    /// OfflineAction of its cluster resource.
    pub offline_action: Option<u32>,
    /// Bits of its group's StatusInformation besides those that the lab sets.
    pub group_status: Option<u64>,
    /// Bits of its resource's StatusInformation besides those that the lab sets.
    pub resource_status: Option<u64>,
}

/// A replication relationship, in numbers as WMI shows them.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Relation {
    /// ReplicationMode: 1 primary, 2 replica, 3 test replica, 4 extended replica.
    pub mode: u16,
    /// ReplicationState.
    pub state: u16,
    /// ReplicationHealth.
    pub health: u16,
}

/// Changes of a host's shape; what is `None` stays as it is.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct HostShape {
    /// Build of Windows.
    pub build: Option<u32>,
    /// StatusInformation of its node: 1 isolated, 2 quarantined, 4 draining.
    pub status: Option<u32>,
    /// NodeDrainStatus.
    pub drain_status: Option<u32>,
}

/// A network of the cluster.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NetworkShape {
    /// Name, e.g. "Cluster Network 2".
    pub name: String,
    /// 0 none, 1 cluster only, 2 clients only, 3 both.
    pub role: u32,
    /// Address of the network.
    pub address: std::net::Ipv4Addr,
    /// Its leading bits.
    pub prefix: u8,
}

/// The shape of a VM as it is.
#[derive(Debug, Clone)]
pub(crate) struct Shape {
    pub(crate) guest_os: (String, String),
    pub(crate) backup_service: Option<(u16, [u16; 2])>,
    pub(crate) heartbeat_service: Option<(u16, [u16; 2])>,
    pub(crate) exchange_service: Option<(u16, [u16; 2])>,
    pub(crate) services_version: u16,
    pub(crate) user_snapshot_type: u16,
    pub(crate) replication: Vec<Relation>,
    pub(crate) applying_log: bool,
    pub(crate) scsi: bool,
    pub(crate) enabled_state: u16,
    pub(crate) offline_action: u32,
    pub(crate) group_status: u64,
    pub(crate) resource_status: u64,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            guest_os: ("Windows Server 2022 Datacenter".into(), "10.0.20348".into()),
            backup_service: None,
            heartbeat_service: None,
            exchange_service: None,
            services_version: 1,
            user_snapshot_type: 3,
            replication: Vec::new(),
            applying_log: false,
            scsi: true,
            enabled_state: 0,
            offline_action: 1,
            group_status: 0,
            resource_status: 0,
        }
    }
}

impl Shape {
    pub(crate) fn change(&mut self, to: VmShape) {
        let VmShape {
            guest_os,
            backup_service,
            heartbeat_service,
            exchange_service,
            services_version,
            // The VM itself keeps it.
            version: _,
            user_snapshot_type,
            replication,
            applying_log,
            scsi,
            enabled_state,
            offline_action,
            group_status,
            resource_status,
        } = to;
        fn set<T>(field: &mut T, to: Option<T>) {
            if let Some(to) = to {
                *field = to;
            }
        }
        set(&mut self.guest_os, guest_os);
        self.backup_service = backup_service.or(self.backup_service);
        self.heartbeat_service = heartbeat_service.or(self.heartbeat_service);
        self.exchange_service = exchange_service.or(self.exchange_service);
        set(&mut self.services_version, services_version);
        set(&mut self.user_snapshot_type, user_snapshot_type);
        set(&mut self.replication, replication);
        set(&mut self.applying_log, applying_log);
        set(&mut self.scsi, scsi);
        set(&mut self.enabled_state, enabled_state);
        set(&mut self.offline_action, offline_action);
        set(&mut self.group_status, group_status);
        set(&mut self.resource_status, resource_status);
    }
}

/// The shapes of everything that is no VM.
#[derive(Debug, Clone)]
pub(crate) struct Surroundings {
    /// By host; a host that is missing has the default.
    hosts: BTreeMap<String, HostShape>,
    /// FaultState by CSV.
    pub(crate) csvs: BTreeMap<String, u32>,
    pub(crate) functional_level: u32,
    pub(crate) networks: Vec<NetworkShape>,
}

impl Default for Surroundings {
    fn default() -> Self {
        Self {
            hosts: BTreeMap::new(),
            csvs: BTreeMap::new(),
            functional_level: 11,
            networks: Vec::new(),
        }
    }
}

impl Surroundings {
    pub(crate) fn change_host(&mut self, host: &str, to: &HostShape) {
        let shape = self.hosts.entry(host.to_owned()).or_default();
        shape.build = to.build.or(shape.build);
        shape.status = to.status.or(shape.status);
        shape.drain_status = to.drain_status.or(shape.drain_status);
    }

    pub(crate) fn build(&self, host: &str) -> u32 {
        self.hosts.get(host).and_then(|h| h.build).unwrap_or(20348)
    }

    pub(crate) fn node_status(&self, host: &str) -> u32 {
        self.hosts.get(host).and_then(|h| h.status).unwrap_or(0)
    }

    pub(crate) fn drain_status(&self, host: &str) -> Option<u32> {
        self.hosts.get(host).and_then(|h| h.drain_status)
    }
}

/// A disk that no checkpoint holds, and the file that its settings name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Device {
    FibreChannel,
    Shared(PathBuf),
    PersistentMemory(PathBuf),
    VhdSet(PathBuf),
}
