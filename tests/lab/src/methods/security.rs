//! Key protectors: the hypervisor gives them as bytes, the guardian service reads them.

use std::sync::Arc;

use outrider_wmi::lab::wire::Refusal;
use outrider_wmi::{Object, Value};
use uuid::Uuid;

use super::{Call, DONE, INVALID, Outcome};
use crate::cluster::Cluster;
use crate::hardware::{Security, byte};

/// What a VM without a key protector has in its place.
const NONE: [u8; 4] = [0, 0, 0, 4];

pub(super) fn call(cluster: &Arc<Cluster>, call: &Call) -> Option<Result<Outcome, Refusal>> {
    Some(match call.method.as_str() {
        "GetKeyProtector" => key_protector(cluster, call),
        "ConvertToByRawBytes" => read(cluster, call),
        _ => return None,
    })
}

fn key_protector(cluster: &Arc<Cluster>, call: &Call) -> Result<Outcome, Refusal> {
    let settings = call.args.embedded("SecuritySettingData")?.unwrap_or_default();
    let config = settings
        .str("InstanceID")
        .and_then(|id| id.strip_prefix("Microsoft:")?.split('\\').next()?.parse::<Uuid>().ok());
    let Some(config) = config else { return Ok(Outcome::code(INVALID)) };
    let protector = cluster.read(|s| {
        let all = s.vms.values().chain(s.planned.values()).filter(|vm| vm.host == call.host);
        let mut found = all
            .filter(|vm| vm.id == config || vm.checkpoints.iter().any(|c| c.id == config))
            .map(|vm| vm.hardware.security.as_ref().map(Security::protector));
        found.next()
    });
    let Some(protector) = protector else { return Ok(Outcome::code(INVALID)) };
    let bytes = protector.unwrap_or_else(|| NONE.to_vec());
    let bytes = Value::Array(bytes.into_iter().map(byte).collect());
    Ok(Outcome::code(DONE).with("KeyProtector", bytes))
}

fn read(cluster: &Arc<Cluster>, call: &Call) -> Result<Outcome, Refusal> {
    let Some(guardians) = Security::read(&call.args.bytes("Bytes")) else {
        return Ok(Outcome::code(INVALID));
    };
    let held = cluster.read(|s| s.hosts.get(&call.host).map(|h| h.equipment.guardians.clone()));
    let held = held.unwrap_or_default();
    let objects: Vec<Object> = guardians.iter().map(|g| g.object(held.contains(g))).collect();
    let embedded = |o: &Object| Value::Object(Box::new(o.clone()));
    let Some(owner) = objects.first().map(embedded) else { return Ok(Outcome::code(INVALID)) };
    let output = Object::new("MSFT_HgsKeyProtector", "")
        .with("Owner", owner)
        .with("Guardians", Value::Array(objects.iter().map(embedded).collect()));
    Ok(Outcome::code(DONE).with("cmdletOutput", Value::Object(Box::new(output))))
}
