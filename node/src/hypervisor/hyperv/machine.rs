//! What a VM has besides disks, and what a host has for it: adapters and switches, images, vTPM and guardians, versions
//! (facts, sections 1.2, 1.3, 9.2, 9.3).
//!
//! Configuration versions of a host: the settings that Msvm_VirtualSystemManagementCapabilities is associated with through
//! Msvm_SettingsDefineCapabilities, each with a Version; told by code of others, never seen on a real host by us.

use outrider_proto::manifest::{Guardian, Image, Machine, Nic, Security, Switch};
use outrider_wmi::{NS_HGS, NS_VIRTUALIZATION, Object, Value, WmiError, embedded};

use super::HyperV;
use super::call::{Call, provider};
use super::wql::{self, SETTINGS, STORAGE};
use crate::hypervisor::error::HypervisorError;
use crate::hypervisor::{Checkpoint, HostFacts};

const COMPONENT: &str = "Msvm_VirtualSystemSettingDataComponent";
pub(super) const PORT: &str = "Msvm_SyntheticEthernetPortSettingData";
const OLD_PORT: &str = "Msvm_EmulatedEthernetPortSettingData";
pub(super) const CONNECTION: &str = "Msvm_EthernetPortAllocationSettingData";
const SWITCH: &str = "Msvm_VirtualEthernetSwitch";
const SECURITY: &str = "Msvm_SecuritySettingData";
const IMAGE: &str = "Microsoft:Hyper-V:Virtual CD/DVD Disk";
/// EnabledState of a connection that is not made.
pub(super) const DISABLED: u64 = 3;
/// A key protector is longer; without one the hypervisor gives a few bytes.
const SHORTEST_PROTECTOR: usize = 16;
/// A key protector with many guardians has some ten kilobytes.
const LONGEST_PROTECTOR: usize = 1 << 20;

impl HyperV {
    /// What a VM is at a checkpoint besides its disks.
    pub(super) async fn machine_at(
        &self,
        checkpoint: &Checkpoint,
    ) -> Result<Machine, HypervisorError> {
        let doing = "read what a checkpoint holds besides disks";
        let settings =
            self.wmi.get(NS_VIRTUALIZATION, &checkpoint.path).await.map_err(provider(doing))?;
        let parts = self.associated(doing, &settings.path, COMPONENT, "").await?;
        let vm = settings.str("VirtualSystemIdentifier").and_then(|id| id.parse().ok());
        Ok(Machine {
            host: String::new(),
            version: settings.str("Version").unwrap_or_default().to_owned(),
            generation: match settings.str("VirtualSystemSubType") {
                Some(kind) if kind.ends_with(":1") => 1,
                Some(_) => 2,
                None => 0,
            },
            saved_state: settings.bool("IsSaved").unwrap_or(false),
            nics: adapters(&parts, &self.switches().await?),
            images: images(&parts),
            security: self.security_at(&parts).await?,
            group: match vm {
                Some(vm) => self.group_of(vm).await?.map(|(_, group)| group),
                None => None,
            },
        })
    }

    /// The switches of this host.
    pub(super) async fn switches(&self) -> Result<Vec<Switch>, HypervisorError> {
        let found = self
            .query("list the virtual switches of this host", &format!("SELECT * FROM {SWITCH}"))
            .await?;
        let switch = |o: &Object| {
            Some(Switch {
                id: o.str("Name")?.to_owned(),
                name: o.str("ElementName").unwrap_or_default().to_owned(),
            })
        };
        Ok(found.iter().filter_map(switch).collect())
    }

    pub(super) async fn security_at(
        &self,
        parts: &[Object],
    ) -> Result<Option<Security>, HypervisorError> {
        let Some(settings) = parts.iter().find(|o| o.class == SECURITY) else { return Ok(None) };
        let on = |name| settings.bool(name).unwrap_or(false);
        if !(on("TpmEnabled") || on("ShieldingRequested") || on("KsdEnabled")) {
            return Ok(None);
        }
        let call = Call {
            doing: "read the key protector of a VM".into(),
            service: "Msvm_SecurityService",
            path: String::new(),
            method: "GetKeyProtector",
            args: vec![("SecuritySettingData", Value::Object(Box::new(settings.clone())))],
        };
        let key_protector = bytes(self.ask(&call).await?.out.array("KeyProtector"));
        let usable = (SHORTEST_PROTECTOR..=LONGEST_PROTECTOR).contains(&key_protector.len());
        let guardians = if usable { self.guardians_in(&key_protector).await } else { Vec::new() };
        Ok(Some(Security {
            tpm: on("TpmEnabled") || on("KsdEnabled"),
            shielded: on("ShieldingRequested"),
            key_protector: if usable { key_protector } else { Vec::new() },
            guardians,
        }))
    }

    /// Who can open a key protector; nobody when this host cannot tell.
    async fn guardians_in(&self, protector: &[u8]) -> Vec<Guardian> {
        let value = Value::Array(protector.iter().map(|b| Value::UInt((*b).into())).collect());
        let args = vec![("Bytes".to_owned(), value)];
        let answer =
            self.wmi.exec_method(NS_HGS, "MSFT_HgsKeyProtector", "ConvertToByRawBytes", args).await;
        let out = match answer {
            Ok(out) => out,
            Err(e) => {
                tracing::warn!(error = %e, "this host cannot tell who guards a key protector");
                return Vec::new();
            }
        };
        let Some(protector) = object_in(out.get("cmdletOutput")) else { return Vec::new() };
        let mut guardians: Vec<Guardian> = Vec::new();
        let named = std::iter::once(protector.get("Owner")).chain(protector.array("Guardians"));
        for found in named.filter_map(object_in).map(|o| guardian(&o)) {
            if guardians.iter().all(|g| g.signing != found.signing) {
                guardians.push(found);
            }
        }
        guardians
    }

    /// What a restore has to know of this host.
    pub(super) async fn facts_of_host(&self) -> Result<HostFacts, HypervisorError> {
        Ok(HostFacts {
            host: String::new(),
            versions: self.versions().await,
            switches: self.switches().await?,
            guardians: match self.wmi.query(NS_HGS, "SELECT * FROM MSFT_HgsGuardian").await {
                Ok(found) => Some(found.iter().map(guardian).collect()),
                Err(WmiError::NoNamespace { .. }) => None,
                Err(e) => {
                    tracing::warn!(error = %e, "this host does not tell its guardians");
                    None
                }
            },
        })
    }

    /// Configuration versions of this host; empty when it does not tell.
    async fn versions(&self) -> Vec<String> {
        let doing = "ask for the configuration versions of this host";
        let capabilities = "SELECT * FROM Msvm_VirtualSystemManagementCapabilities";
        let found = match self.query(doing, capabilities).await {
            Ok(found) => found,
            Err(e) => {
                tracing::warn!(error = %e, "this host does not tell its configuration versions");
                return Vec::new();
            }
        };
        let mut versions: Vec<String> = Vec::new();
        for object in found {
            let association = "Msvm_SettingsDefineCapabilities";
            match self.associated(doing, &object.path, association, SETTINGS).await {
                Ok(settings) => {
                    for version in settings.iter().filter_map(|s| s.str("Version")) {
                        if !version.is_empty() && versions.iter().all(|v| v != version) {
                            versions.push(version.to_owned());
                        }
                    }
                }
                Err(e) => tracing::warn!(error = %e, "this host does not tell its versions"),
            }
        }
        versions
    }
}

/// Adapters with the switches that they ask for.
fn adapters(parts: &[Object], switches: &[Switch]) -> Vec<Nic> {
    let ports = parts.iter().filter(|o| o.class == PORT || o.class == OLD_PORT);
    let nic = |port: &Object| {
        let slot = port.str("InstanceID").and_then(wql::slot)?.to_owned();
        let connection = parts.iter().find(|o| {
            // Its Parent is the port's path; its InstanceID begins with the port's.
            o.class == CONNECTION
                && o.str("InstanceID").and_then(wql::slot).is_some_and(|s| s.starts_with(&slot))
        });
        Some(Nic {
            name: port.str("ElementName").unwrap_or_default().to_owned(),
            mac: port.str("Address").unwrap_or_default().to_owned(),
            static_mac: port.bool("StaticMacAddress").unwrap_or(false),
            switch: connection.and_then(|c| asked_switch(c, switches)),
            slot,
        })
    };
    ports.filter_map(nic).collect()
}

/// The switch that a connection asks for, whether this host has it or not.
pub(super) fn asked_switch(connection: &Object, switches: &[Switch]) -> Option<Switch> {
    if connection.u64("EnabledState") == Some(DISABLED) {
        return None;
    }
    let path = connection.array("HostResource").first().and_then(Value::as_str)?;
    let id = switch_id(path)?;
    let known = switches.iter().find(|s| s.id.eq_ignore_ascii_case(&id));
    let name = known.map(|s| s.name.clone()).or_else(|| {
        let last = connection.str("LastKnownSwitchName").filter(|n| !n.is_empty());
        last.map(str::to_owned)
    });
    Some(Switch { id, name: name.unwrap_or_default() })
}

/// The GUID in the object path of a switch: the key `Name`, which `CreationClassName` ends with, too.
fn switch_id(path: &str) -> Option<String> {
    let (_, keys) = path.rsplit_once(",Name=\"").or_else(|| path.rsplit_once(".Name=\""))?;
    Some(keys.split('"').next()?.to_owned()).filter(|id| !id.is_empty())
}

/// The object path of a switch.
pub(super) fn switch_path(id: &str) -> String {
    format!("{SWITCH}.CreationClassName=\"{SWITCH}\",Name=\"{id}\"")
}

/// Whether settings are of an image in a DVD drive.
pub(super) fn is_image(settings: &Object) -> bool {
    settings.class == STORAGE && settings.str("ResourceSubType") == Some(IMAGE)
}

fn images(parts: &[Object]) -> Vec<Image> {
    let image = |o: &Object| {
        Some(Image {
            slot: wql::slot(o.str("InstanceID")?)?.to_owned(),
            path: o.array("HostResource").first()?.as_str()?.to_owned(),
        })
    };
    parts.iter().filter(|o| is_image(o)).filter_map(image).collect()
}

fn guardian(object: &Object) -> Guardian {
    let thumbprint = |name| {
        let certificate = bytes(object.array(name));
        let digest = ring::digest::digest(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY, &certificate);
        hex::encode_upper(digest.as_ref())
    };
    Guardian {
        name: object.str("Name").unwrap_or_default().to_owned(),
        signing: thumbprint("SigningCertificate"),
        encryption: thumbprint("EncryptionCertificate"),
        private_keys: object.bool("HasPrivateSigningKey").unwrap_or(false),
    }
}

/// An embedded object, as an object or as text.
fn object_in(value: &Value) -> Option<Object> {
    match value {
        Value::Object(object) => Some((**object).clone()),
        value => embedded::from_text(value.as_str()?).ok(),
    }
}

fn bytes(values: &[Value]) -> Vec<u8> {
    values.iter().filter_map(Value::as_u64).filter_map(|b| u8::try_from(b).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_of_a_switch_is_the_last_key_of_its_path() {
        let path = switch_path("0B1C");
        assert_eq!(switch_id(&path).as_deref(), Some("0B1C"));
        let full = format!(r"\\HV1\root\virtualization\v2:{path}");
        assert_eq!(switch_id(&full).as_deref(), Some("0B1C"));
        assert_eq!(switch_id("no path"), None);
    }

    #[test]
    fn an_adapter_without_a_connection_has_no_switch_and_an_unknown_switch_keeps_its_last_name() {
        let port = Object::new(PORT, "p")
            .with("InstanceID", r"Microsoft:VM\NIC1")
            .with("ElementName", "Network Adapter")
            .with("Address", "00155D010203")
            .with("StaticMacAddress", true);
        let parts = [port.clone()];
        assert_eq!(adapters(&parts, &[])[0].switch, None);
        let connection = Object::new(CONNECTION, "c")
            .with("InstanceID", r"Microsoft:VM\NIC1\C")
            .with("EnabledState", 2_u16)
            .with("LastKnownSwitchName", "LAN")
            .with("HostResource", vec![switch_path("ABC")]);
        let nics = adapters(&[port.clone(), connection.clone()], &[]);
        let switch = Switch { id: "ABC".into(), name: "LAN".into() };
        assert_eq!(nics[0].switch, Some(switch));
        let off = connection.with("EnabledState", 3_u16);
        assert_eq!(adapters(&[port, off], &[])[0].switch, None);
    }
}
