//! What hosts and VMs have besides disks: switches and adapters, images in drives, guardians and virtual TPMs, folders,
//! and what an administrator has set at a cluster group.

use std::path::{Path, PathBuf};

use outrider_wmi::{Object, Value};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::control::{HostSetup, VmSetup};
use crate::error::LabError;
use crate::model::{Host, State, Vm};

/// Versions of a host of Windows Server 2022, oldest first.
const VERSIONS: [&str; 11] =
    ["8.0", "8.1", "8.2", "8.3", "9.0", "9.1", "9.2", "9.3", "10.0", "254.0", "255.0"];

/// A virtual switch of a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Switch {
    pub(crate) id: Uuid,
    pub(crate) name: String,
}

/// A guardian whose private keys a host has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Guardian {
    pub(crate) name: String,
    /// Where it was made; stands for its certificates.
    pub(crate) made_on: String,
}

impl Guardian {
    /// Bytes in the place of a certificate: nobody here looks into it.
    pub(crate) fn certificate(&self, kind: &str) -> Vec<u8> {
        format!("{kind} certificate of {} made on {}", self.name, self.made_on).into_bytes()
    }

    pub(crate) fn object(&self, private_keys: bool) -> Object {
        let bytes = |kind| Value::Array(self.certificate(kind).into_iter().map(byte).collect());
        Object::new("MSFT_HgsGuardian", format!("MSFT_HgsGuardian.Name=\"{}\"", self.name))
            .with("Name", self.name.as_str())
            .with("SigningCertificate", bytes("signing"))
            .with("EncryptionCertificate", bytes("encryption"))
            .with("HasPrivateSigningKey", private_keys)
    }
}

pub(crate) fn byte(byte: u8) -> Value {
    Value::UInt(byte.into())
}

/// What a host has for VMs.
#[derive(Debug, Clone)]
pub(crate) struct Equipment {
    pub(crate) switches: Vec<Switch>,
    pub(crate) versions: Vec<String>,
    pub(crate) guardians: Vec<Guardian>,
}

impl Equipment {
    /// A switch that has the same name on all hosts and another GUID on each, and the host's own guardian.
    pub(crate) fn of(host: &str) -> Self {
        Self {
            switches: vec![switch(host, "External")],
            versions: VERSIONS.map(str::to_owned).to_vec(),
            guardians: vec![Guardian {
                name: "UntrustedGuardian".into(),
                made_on: host.to_owned(),
            }],
        }
    }

    pub(crate) fn switch(&self, name: &str) -> Option<&Switch> {
        self.switches.iter().find(|s| s.name == name)
    }
}

/// A switch's GUID follows from host and name.
fn switch(host: &str, name: &str) -> Switch {
    let text = format!("switch {name} of {host}");
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u128, |h, b| {
        (h ^ u128::from(b)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013B)
    });
    Switch { id: Uuid::from_u128(hash), name: name.to_owned() }
}

/// What a VM has besides disks; a part of its definition file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Hardware {
    pub(crate) nics: Vec<Nic>,
    pub(crate) drives: Vec<Drive>,
    pub(crate) security: Option<Security>,
    /// Host whose processor a saved state is of.
    pub(crate) saved_on: Option<String>,
    /// Folders that are not the VM's own.
    pub(crate) snapshot_root: Option<PathBuf>,
    pub(crate) swap_root: Option<PathBuf>,
    pub(crate) suspend_root: Option<PathBuf>,
}

/// A network adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Nic {
    pub(crate) id: Uuid,
    pub(crate) name: String,
    pub(crate) mac: String,
    pub(crate) static_mac: bool,
    /// The switch port that is asked for; `None` when it was taken away.
    pub(crate) port: Option<Port>,
}

/// What an adapter is connected to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Port {
    pub(crate) switch: Uuid,
    pub(crate) name: String,
    pub(crate) enabled: bool,
}

/// A DVD drive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Drive {
    pub(crate) id: Uuid,
    pub(crate) location: u32,
    pub(crate) image: Option<PathBuf>,
}

/// A virtual TPM and its key protector.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Security {
    pub(crate) tpm: bool,
    pub(crate) shielded: bool,
    /// Any of these can open it; the first is the owner.
    pub(crate) guardians: Vec<Guardian>,
}

impl Security {
    /// The key protector: opaque to the caller.
    pub(crate) fn protector(&self) -> Vec<u8> {
        let text = serde_json::to_vec(&self.guardians).unwrap_or_default();
        [b"lab key protector ".as_slice(), &text].concat()
    }

    /// What a key protector names.
    pub(crate) fn read(protector: &[u8]) -> Option<Vec<Guardian>> {
        serde_json::from_slice(protector.strip_prefix(b"lab key protector ")?).ok()
    }
}

/// What an administrator sets at a cluster group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct GroupSettings {
    pub(crate) values: Vec<(String, u64)>,
    pub(crate) anti_affinity: Vec<String>,
    pub(crate) preferred_owners: Vec<String>,
    /// Stopped by the cluster itself, so that a VM that is off is no failure.
    pub(crate) offline: bool,
}

/// Numbers of a group, as AddVirtualMachine makes it.
const GROUP_DEFAULTS: [(&str, u64); 7] = [
    ("Priority", 2000),
    ("FailoverThreshold", 0xFFFF_FFFF),
    ("FailoverPeriod", 6),
    ("AutoFailbackType", 0),
    ("FailbackWindowStart", 0xFFFF_FFFF),
    ("FailbackWindowEnd", 0xFFFF_FFFF),
    ("PersistentState", 1),
];

impl Default for GroupSettings {
    fn default() -> Self {
        Self {
            values: GROUP_DEFAULTS.map(|(name, value)| (name.to_owned(), value)).to_vec(),
            anti_affinity: Vec::new(),
            preferred_owners: Vec::new(),
            offline: false,
        }
    }
}

impl GroupSettings {
    /// Sets a property that a group has and that may be written.
    pub(crate) fn set(&mut self, name: &str, value: &Value) -> Result<(), String> {
        if name.eq_ignore_ascii_case("AntiAffinityClassNames") {
            let Value::Array(items) = value else { return Err(format!("{name} is an array")) };
            self.anti_affinity =
                items.iter().filter_map(Value::as_str).map(str::to_owned).collect();
            return Ok(());
        }
        let found = self.values.iter_mut().find(|(n, _)| n.eq_ignore_ascii_case(name));
        let number = match value {
            Value::Bool(b) => Some(u64::from(*b)),
            value => value.as_u64(),
        };
        match (found, number) {
            (Some((_, slot)), Some(number)) => {
                *slot = number;
                Ok(())
            }
            (None, _) => Err(format!("no property {name} that can be written")),
            (_, None) => Err(format!("{name} is a number")),
        }
    }
}

impl Vm {
    /// What keeps it from starting on its host, as the hypervisor says it.
    pub(crate) fn start_obstacle(&self, host: &Host) -> Option<String> {
        let hardware = &self.hardware;
        if let Some(saved_on) = hardware.saved_on.as_ref().filter(|s| **s != self.host) {
            return Some(format!(
                "'{}' could not be restored: the virtual machine is using processor-specific features of {saved_on} that \
                 are not supported on this physical computer. Delete the saved state to start it",
                self.name
            ));
        }
        if !self.rights {
            let file = self.disks.iter().find_map(|d| d.leaf());
            let file = file.map(|p| p.display().to_string()).unwrap_or_default();
            return Some(format!(
                "'{}' failed to start: Attachment '{file}' failed to open because of error: 'General access denied \
                 error' (0x80070005). The file does not have the required security settings",
                self.name
            ));
        }
        if let Some(image) = hardware.missing_image() {
            return Some(format!(
                "'{}' failed to start: Attachment '{}' failed to open because of error: 'The system cannot find the \
                 file specified.' (0x80070002)",
                self.name,
                image.display()
            ));
        }
        let tpm = hardware.security.as_ref().filter(|s| s.tpm)?;
        let opens = |g: &Guardian| host.equipment.guardians.contains(g);
        (!tpm.guardians.iter().any(opens)).then(|| {
            format!(
                "'{}' failed to start: The key protector for the virtual machine could not be unwrapped. Details are \
                 included in the HostGuardianService-Client event log (0x80070057)",
                self.name
            )
        })
    }

    /// What keeps a planned VM of `host` from being realized, besides its disks: (object path of the device, sentence).
    /// What the VM, or a checkpoint of it, has besides disks.
    pub(crate) fn hardware_of(&mut self, config: Uuid) -> Option<&mut Hardware> {
        if self.id == config {
            return Some(&mut self.hardware);
        }
        let checkpoint = self.checkpoints.iter_mut().find(|c| c.id == config);
        checkpoint.map(|c| &mut c.hardware)
    }

    pub(crate) fn device_problems(&self, host: &Host) -> Vec<(String, String)> {
        let mut problems = Vec::new();
        for nic in &self.hardware.nics {
            let Some(port) = nic.port.as_ref().filter(|p| p.enabled) else { continue };
            if !host.equipment.switches.iter().any(|s| s.id == port.switch) {
                problems.push((
                    crate::classes::port_path(self.id, nic),
                    format!("Could not find Ethernet switch '{}'.", port.name),
                ));
            }
        }
        if let Some(image) = self.hardware.missing_image() {
            problems.push((
                crate::classes::image_path(self.id, &self.hardware),
                format!(
                    "Virtual CD/DVD disk '{}': the system cannot find the file specified.",
                    image.display()
                ),
            ));
        }
        for (what, root) in [
            ("checkpoint folder", &self.hardware.snapshot_root),
            ("Smart Paging folder", &self.hardware.swap_root),
            ("saved state folder", &self.hardware.suspend_root),
        ] {
            if let Some(root) = root.as_ref().filter(|r| !r.exists()) {
                problems.push((
                    crate::classes::checkpoint_path(self.id),
                    format!("The {what} '{}' does not exist or cannot be reached.", root.display()),
                ));
            }
        }
        for missing in self.checkpoints.iter().filter(|c| c.missing) {
            problems.push((
                crate::classes::checkpoint_path(missing.id),
                format!("The checkpoint '{}' is missing its configuration file.", missing.name),
            ));
        }
        problems
    }
}

impl Hardware {
    fn missing_image(&self) -> Option<&Path> {
        self.drives.iter().filter_map(|d| d.image.as_deref()).find(|image| !image.exists())
    }
}

/// Gives a VM what a test wants it to have.
pub(crate) fn set_up_vm(s: &mut State, id: Uuid, setup: &VmSetup) -> Result<(), LabError> {
    let host = s.vm(id)?.host.clone();
    let equipment = s.host_mut(&host)?.equipment.clone();
    let mut nics = Vec::new();
    for (at, nic) in setup.nics.iter().enumerate() {
        let port = match &nic.switch {
            Some(name) => {
                let found = equipment.switch(name);
                let found = found.ok_or_else(|| LabError::unknown("switch", name))?;
                Some(Port { switch: found.id, name: found.name.clone(), enabled: true })
            }
            None => None,
        };
        nics.push(Nic {
            id: s.new_guid(),
            name: nic.name.clone(),
            mac: nic.static_mac.clone().unwrap_or_else(|| format!("00155D0000{at:02X}")),
            static_mac: nic.static_mac.is_some(),
            port,
        });
    }
    let drive = s.new_guid();
    let vm = s.vm_mut(id)?;
    vm.hardware.nics = nics;
    if let Some(image) = &setup.image {
        let location = u32::try_from(vm.disks.len()).unwrap_or(u32::MAX);
        vm.hardware.drives = vec![Drive { id: drive, location, image: Some(image.clone()) }];
    }
    if setup.tpm {
        let guardians = equipment.guardians.iter().take(1).cloned().collect();
        vm.hardware.security = Some(Security { tpm: true, shielded: false, guardians });
    }
    vm.hardware.snapshot_root.clone_from(&setup.snapshot_root);
    vm.hardware.swap_root.clone_from(&setup.swap_root);
    if let Some(version) = &setup.version {
        vm.version.clone_from(version);
    }
    if let Some(group) = &setup.group {
        for (name, value) in &group.values {
            vm.group.set(name, &Value::UInt(*value)).map_err(LabError::Config)?;
        }
        vm.group.anti_affinity.clone_from(&group.anti_affinity);
        vm.group.preferred_owners.clone_from(&group.preferred_owners);
    }
    crate::import::write_vm_files(vm)?;
    s.announce_vm(id);
    Ok(())
}

/// Gives a host what a test wants it to have.
pub(crate) fn set_up_host(s: &mut State, name: &str, setup: &HostSetup) -> Result<(), LabError> {
    let mut guardians = Vec::new();
    for from in &setup.guardians_of {
        guardians.extend(s.host_mut(from)?.equipment.guardians.iter().cloned());
    }
    let host = s.host_mut(name)?;
    if let Some(switches) = &setup.switches {
        host.equipment.switches = switches.iter().map(|s| switch(name, s)).collect();
    }
    if let Some(versions) = &setup.versions {
        host.equipment.versions.clone_from(versions);
    }
    for guardian in guardians {
        if !host.equipment.guardians.contains(&guardian) {
            host.equipment.guardians.push(guardian);
        }
    }
    Ok(())
}
