//! What a VM was besides its disks: a restore plans with it before it writes a byte.

use serde::{Deserialize, Serialize};

/// A VM at its checkpoint, as far as the hypervisor told. Everything empty: nothing was told.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Host that the checkpoint was made on.
    pub host: String,
    /// Configuration version, e.g. "10.0".
    pub version: String,
    /// 1 or 2; 0: not told.
    pub generation: u32,
    /// The checkpoint holds a saved state, which another host's processor may not be able to resume.
    pub saved_state: bool,
    /// Network adapters.
    pub nics: Vec<Nic>,
    /// Images in DVD drives.
    pub images: Vec<Image>,
    /// vTPM and shielding, where the VM has any of it.
    pub security: Option<Security>,
    /// Its cluster group, where it had one.
    pub group: Option<ClusterGroup>,
}

/// A network adapter.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// Stable tail of the settings' InstanceID.
    pub slot: String,
    /// Display name.
    pub name: String,
    /// Address, twelve hexadecimal digits.
    pub mac: String,
    /// Whether the address is fixed; another one is given to a restored VM otherwise.
    pub static_mac: bool,
    /// The switch that it was connected to.
    pub switch: Option<Switch>,
}

/// A virtual switch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Switch {
    /// GUID, which differs from host to host.
    pub id: String,
    /// Display name, which administrators keep the same on all hosts of a cluster.
    pub name: String,
}

/// An image file in a DVD drive.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Stable tail of the settings' InstanceID.
    pub slot: String,
    /// File.
    pub path: String,
}

/// vTPM and shielding.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Security {
    /// Has a virtual TPM, whose state is in the VM's configuration files.
    pub tpm: bool,
    /// Shielded: only hosts that its guardian attests can start it.
    pub shielded: bool,
    /// The key protector of the same checkpoint, as the hypervisor gave it; empty when it gave none.
    pub key_protector: Vec<u8>,
    /// Who can open the key protector. A host with the private keys of one of them can start the VM.
    pub guardians: Vec<Guardian>,
}

/// A guardian that a key protector names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guardian {
    /// Its name on the host that was asked.
    pub name: String,
    /// SHA-1 thumbprint of its signing certificate, hexadecimal, as Windows shows it.
    pub signing: String,
    /// SHA-1 thumbprint of its encryption certificate.
    pub encryption: String,
    /// Whether that host held its private keys: they can be exported there, and nowhere else.
    pub private_keys: bool,
}

/// What an administrator has set at a cluster group.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterGroup {
    /// Name.
    pub name: String,
    /// 0 no auto start, 1000 low, 2000 medium, 3000 high.
    pub priority: u32,
    /// Failures within the period after which the group stays failed.
    pub failover_threshold: u32,
    /// Period, hours.
    pub failover_period: u32,
    /// 0 prevent, 1 allow failback.
    pub auto_failback: u32,
    /// First hour of the failback window; none: at once.
    pub failback_start: Option<u32>,
    /// Last hour of the failback window.
    pub failback_end: Option<u32>,
    /// Whether the cluster starts it again.
    pub persistent: bool,
    /// Groups that share one of these are kept apart.
    pub anti_affinity: Vec<String>,
    /// Hosts, most preferred first.
    pub preferred_owners: Vec<String>,
}
