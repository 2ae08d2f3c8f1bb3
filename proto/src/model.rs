//! Checked twins of the gRPC messages that carry decisions: the *receiver* converts, and a bad field is named.
//!
//! Messages that are shown only (lists for operators) have no twin.

use std::collections::BTreeMap;
use std::str::FromStr;

use crate::ids::{
    ChunkId, DiskId, DomainId, KeyEpoch, LayoutEpoch, NodeIncarnation, PointId, VmKey, VmRole,
};
use crate::layout::{Layout, StorageNode};
use crate::rpc;
use crate::seal::{DomainKeys, Key32};

/// A message field that does not hold what it must.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("field {field} of {message} is wrong: {reason}")]
pub struct FieldError {
    /// Message.
    pub message: &'static str,
    /// Field.
    pub field: &'static str,
    /// What was expected and found.
    pub reason: String,
}

impl From<FieldError> for tonic::Status {
    fn from(e: FieldError) -> Self {
        Self::invalid_argument(e.to_string())
    }
}

/// Parses an id out of a text field.
///
/// # Errors
/// [`FieldError`] naming message and field.
pub fn parse<T>(message: &'static str, field: &'static str, text: &str) -> Result<T, FieldError>
where
    T: FromStr,
    T::Err: std::fmt::Display,
{
    text.parse().map_err(|e: T::Err| FieldError { message, field, reason: e.to_string() })
}

/// As [`parse`], with the empty text for "none".
///
/// # Errors
/// [`FieldError`].
pub fn parse_optional<T>(
    message: &'static str,
    field: &'static str,
    text: &str,
) -> Result<Option<T>, FieldError>
where
    T: FromStr,
    T::Err: std::fmt::Display,
{
    if text.is_empty() { Ok(None) } else { parse(message, field, text).map(Some) }
}

/// A field that must be present.
///
/// # Errors
/// [`FieldError`].
pub fn required<T>(
    message: &'static str,
    field: &'static str,
    value: Option<T>,
) -> Result<T, FieldError> {
    value.ok_or(FieldError { message, field, reason: "is missing".into() })
}

impl From<&VmKey> for rpc::VmKey {
    fn from(vm: &VmKey) -> Self {
        let role = match vm.role {
            VmRole::Primary => rpc::VmRole::Primary,
            VmRole::Replica => rpc::VmRole::Replica,
            VmRole::TestReplica => rpc::VmRole::TestReplica,
        };
        Self { realm: vm.realm.clone(), guid: vm.guid.to_string(), role: role.into() }
    }
}

impl TryFrom<&rpc::VmKey> for VmKey {
    type Error = FieldError;
    fn try_from(vm: &rpc::VmKey) -> Result<Self, FieldError> {
        let role = match vm.role() {
            rpc::VmRole::Unspecified | rpc::VmRole::Primary => VmRole::Primary,
            rpc::VmRole::Replica => VmRole::Replica,
            rpc::VmRole::TestReplica => VmRole::TestReplica,
        };
        if vm.realm.is_empty() || vm.realm.contains('/') {
            return Err(FieldError {
                message: "VmKey",
                field: "realm",
                reason: format!("{:?} is empty or holds a slash", vm.realm),
            });
        }
        Ok(Self { realm: vm.realm.clone(), guid: parse("VmKey", "guid", &vm.guid)?, role })
    }
}

/// Converts a VM key that must be present.
///
/// # Errors
/// [`FieldError`].
pub fn vm_key(message: &'static str, vm: Option<&rpc::VmKey>) -> Result<VmKey, FieldError> {
    VmKey::try_from(required(message, "vm", vm)?)
}

impl From<&Layout> for rpc::Layout {
    fn from(l: &Layout) -> Self {
        Self {
            epoch: l.epoch.0,
            pg_count: u32::try_from(l.pgs.len()).unwrap_or(u32::MAX),
            replicas: l.replicas.into(),
            min_durable: l.min_durable.into(),
            nodes: l.nodes.iter().map(Into::into).collect(),
            pgs: l
                .pgs
                .iter()
                .map(|p| rpc::PgReplicas { node: p.iter().map(|&n| n.into()).collect() })
                .collect(),
        }
    }
}

impl TryFrom<&rpc::Layout> for Layout {
    type Error = FieldError;
    fn try_from(l: &rpc::Layout) -> Result<Self, FieldError> {
        let bad = |field, reason: String| FieldError { message: "Layout", field, reason };
        let nodes: Vec<StorageNode> =
            l.nodes.iter().map(TryInto::try_into).collect::<Result<_, _>>()?;
        if l.pgs.len() != l.pg_count as usize || l.pgs.len() > 1 << 16 {
            return Err(bad("pgs", format!("{} entries for {} PGs", l.pgs.len(), l.pg_count)));
        }
        let mut pgs = Vec::with_capacity(l.pgs.len());
        for pg in &l.pgs {
            let replicas: Vec<u16> = pg
                .node
                .iter()
                .map(|&n| u16::try_from(n).ok().filter(|&n| usize::from(n) < nodes.len()))
                .collect::<Option<_>>()
                .ok_or_else(|| bad("pgs", "a replica that is no node of the layout".into()))?;
            pgs.push(replicas);
        }
        Ok(Self {
            epoch: LayoutEpoch(l.epoch),
            replicas: u8::try_from(l.replicas).map_err(|e| bad("replicas", e.to_string()))?,
            min_durable: u8::try_from(l.min_durable)
                .map_err(|e| bad("min_durable", e.to_string()))?,
            nodes,
            pgs,
        })
    }
}

impl From<&StorageNode> for rpc::StorageNode {
    fn from(n: &StorageNode) -> Self {
        Self {
            name: n.name.clone(),
            addresses: n.addresses.clone(),
            zone: n.zone.clone(),
            capacity_bytes: n.capacity_bytes,
            receipt_key: n.receipt_key.clone(),
            incarnation: n.incarnation.0,
            online: n.online,
        }
    }
}

impl TryFrom<&rpc::StorageNode> for StorageNode {
    type Error = FieldError;
    fn try_from(n: &rpc::StorageNode) -> Result<Self, FieldError> {
        let bad = |field, reason: &str| FieldError {
            message: "StorageNode",
            field,
            reason: reason.to_owned(),
        };
        if n.name.is_empty() {
            return Err(bad("name", "is empty"));
        }
        if n.receipt_key.len() != 32 {
            return Err(bad("receipt_key", "is not an Ed25519 public key of 32 bytes"));
        }
        if n.addresses.is_empty() {
            return Err(bad("addresses", "is empty: the node must advertise an address"));
        }
        Ok(Self {
            name: n.name.clone(),
            addresses: n.addresses.clone(),
            zone: n.zone.clone(),
            capacity_bytes: n.capacity_bytes,
            receipt_key: n.receipt_key.clone(),
            incarnation: NodeIncarnation(n.incarnation),
            online: n.online,
        })
    }
}

impl From<&DomainKeys> for rpc::DomainKeys {
    fn from(k: &DomainKeys) -> Self {
        Self {
            domain: k.domain.to_string(),
            id_key: k.id_key.0.to_vec(),
            data_keys: k
                .data_keys
                .iter()
                .map(|(e, key)| rpc::DataKey { epoch: e.0, key: key.0.to_vec() })
                .collect(),
            current_epoch: k.current.0,
        }
    }
}

impl TryFrom<&rpc::DomainKeys> for DomainKeys {
    type Error = FieldError;
    fn try_from(k: &rpc::DomainKeys) -> Result<Self, FieldError> {
        let key = |bytes: &[u8], field| {
            <[u8; 32]>::try_from(bytes).map(Key32).map_err(|_| FieldError {
                message: "DomainKeys",
                field,
                reason: "is not a key of 32 bytes".into(),
            })
        };
        let data_keys = k
            .data_keys
            .iter()
            .map(|d| Ok((KeyEpoch(d.epoch), key(&d.key, "data_keys")?)))
            .collect::<Result<BTreeMap<_, _>, FieldError>>()?;
        if !data_keys.contains_key(&KeyEpoch(k.current_epoch)) {
            return Err(FieldError {
                message: "DomainKeys",
                field: "current_epoch",
                reason: format!("no data key of epoch {}", k.current_epoch),
            });
        }
        Ok(Self {
            domain: parse::<DomainId>("DomainKeys", "domain", &k.domain)?,
            id_key: key(&k.id_key, "id_key")?,
            data_keys,
            current: KeyEpoch(k.current_epoch),
        })
    }
}

/// What an incremental backup starts from (base rule).
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Binding {
    /// Committed recovery point.
    pub point: PointId,
    /// Its manifest.
    pub manifest: ChunkId,
    /// Reference point at the hypervisor.
    pub reference_point: String,
    /// Disks with their change tracking ids.
    pub disks: Vec<BoundDisk>,
    /// A host crash happened since: take the coarse map, mark the point.
    pub tracking_unproven: bool,
}

/// A disk of a binding.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct BoundDisk {
    /// VirtualDiskId.
    pub disk: DiskId,
    /// Size when bound, bytes.
    pub size: u64,
    /// Slot.
    pub slot: String,
    /// Change tracking id; empty when the disk has none.
    pub rct_id: String,
}

impl From<&Binding> for rpc::Binding {
    fn from(b: &Binding) -> Self {
        Self {
            point_id: b.point.to_string(),
            manifest_id: b.manifest.to_string(),
            reference_point_id: b.reference_point.clone(),
            tracking_unproven: b.tracking_unproven,
            disks: b
                .disks
                .iter()
                .map(|d| rpc::DiskBinding {
                    disk: Some(rpc::DiskIdentity {
                        disk_id: d.disk.to_string(),
                        size_bytes: d.size,
                        slot: d.slot.clone(),
                    }),
                    rct_id: d.rct_id.clone(),
                })
                .collect(),
        }
    }
}

impl TryFrom<&rpc::Binding> for Binding {
    type Error = FieldError;
    fn try_from(b: &rpc::Binding) -> Result<Self, FieldError> {
        let disks = b
            .disks
            .iter()
            .map(|d| {
                let disk = required("Binding", "disks.disk", d.disk.as_ref())?;
                Ok(BoundDisk {
                    disk: parse("Binding", "disks.disk_id", &disk.disk_id)?,
                    size: disk.size_bytes,
                    slot: disk.slot.clone(),
                    rct_id: d.rct_id.clone(),
                })
            })
            .collect::<Result<_, FieldError>>()?;
        if b.reference_point_id.is_empty() {
            return Err(FieldError {
                message: "Binding",
                field: "reference_point_id",
                reason: "is empty".into(),
            });
        }
        Ok(Self {
            point: parse("Binding", "point_id", &b.point_id)?,
            manifest: parse("Binding", "manifest_id", &b.manifest_id)?,
            reference_point: b.reference_point_id.clone(),
            disks,
            tracking_unproven: b.tracking_unproven,
        })
    }
}
