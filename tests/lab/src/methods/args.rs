//! Named arguments, and the VM that a call is about.

use outrider_wmi::{Object, Value, embedded};
use uuid::Uuid;

use super::{Call, invalid};
use crate::host_path::host_path;
use crate::model::{Checkpoint, State, Vm};
use crate::wql::ObjectPath;
use outrider_wmi::lab::wire::Refusal;

/// In parameters.
#[derive(Debug, Clone)]
pub(crate) struct Args(Object);

impl Args {
    pub(crate) fn new(args: Vec<(String, Value)>) -> Self {
        Self(args.into_iter().fold(Object::new("__PARAMETERS", ""), |o, (k, v)| o.with(&k, v)))
    }

    pub(crate) fn str(&self, name: &str) -> &str {
        self.0.str(name).unwrap_or_default()
    }

    pub(crate) fn u64(&self, name: &str) -> Option<u64> {
        self.0.u64(name)
    }

    pub(crate) fn bool(&self, name: &str) -> bool {
        self.0.bool(name).unwrap_or_default()
    }

    /// An array of bytes.
    pub(crate) fn bytes(&self, name: &str) -> Vec<u8> {
        let bytes = self.0.array(name).iter().filter_map(Value::as_u64);
        bytes.filter_map(|b| u8::try_from(b).ok()).collect()
    }

    /// Texts in an array, references included.
    pub(crate) fn text_array(&self, name: &str) -> Vec<String> {
        self.0.array(name).iter().filter_map(Value::as_str).map(str::to_owned).collect()
    }

    /// Whether an argument was given, an empty one included.
    pub(crate) fn has(&self, name: &str) -> bool {
        !matches!(self.0.get(name), Value::Null)
    }

    /// An embedded instance; `None` when the argument is absent or empty.
    pub(crate) fn embedded(&self, name: &str) -> Result<Option<Object>, Refusal> {
        if let Value::Object(o) = self.0.get(name) {
            return Ok(Some((**o).clone()));
        }
        match self.str(name) {
            "" => Ok(None),
            text => embedded::from_text(text).map(Some).map_err(|e| invalid(name, &e.to_string())),
        }
    }

    /// An array of embedded instances.
    pub(crate) fn embedded_array(&self, name: &str) -> Result<Vec<Object>, Refusal> {
        let each = |value: &Value| match value {
            Value::Object(object) => Ok((**object).clone()),
            value => embedded::from_text(value.as_str().unwrap_or_default())
                .map_err(|e| invalid(name, &e.to_string())),
        };
        self.0.array(name).iter().map(each).collect()
    }

    /// The texts and references of an array.
    pub(crate) fn text_list(&self, name: &str) -> Vec<String> {
        self.0.array(name).iter().filter_map(Value::as_str).map(str::to_owned).collect()
    }

    /// The numbers of an array.
    pub(crate) fn number_list(&self, name: &str) -> Vec<u64> {
        self.0.array(name).iter().filter_map(Value::as_u64).collect()
    }

    pub(crate) fn texts(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|(_, v)| v.as_str())
    }
}

/// The GUID in an InstanceID or Name key.
fn key_guid(reference: &str, last: bool) -> Option<Uuid> {
    let path = ObjectPath::parse(reference)?;
    let text = path.key("InstanceID").or_else(|| path.key("Name"))?;
    let text = text.strip_prefix("Microsoft:").unwrap_or(text);
    let part = if last { text.rsplit('\\').next() } else { text.split('\\').next() };
    part?.parse().ok()
}

impl State {
    /// A VM realized on this host, by reference.
    pub(crate) fn vm_by_ref(&self, host: &str, reference: &str) -> Result<&Vm, Refusal> {
        key_guid(reference, false)
            .and_then(|id| self.vms.get(&id))
            .filter(|vm| vm.host == host)
            .ok_or_else(|| not_found(reference))
    }

    /// A planned VM of an import on this host, by reference.
    pub(crate) fn planned_by_ref(&self, host: &str, reference: &str) -> Result<&Vm, Refusal> {
        key_guid(reference, false)
            .and_then(|id| self.planned.get(&id))
            .filter(|vm| vm.host == host)
            .ok_or_else(|| not_found(reference))
    }

    /// A checkpoint of a VM on this host, by reference.
    pub(crate) fn checkpoint_by_ref(
        &self,
        host: &str,
        reference: &str,
    ) -> Result<(&Vm, &Checkpoint), Refusal> {
        let id = key_guid(reference, false).ok_or_else(|| not_found(reference))?;
        let mut here = self.vms.values().filter(|vm| vm.host == host);
        here.find_map(|vm| Some((vm, vm.checkpoints.iter().find(|c| c.id == id)?)))
            .ok_or_else(|| not_found(reference))
    }

    /// A checkpoint of a planned VM on this host, by reference: VM and checkpoint.
    pub(crate) fn planned_checkpoint(&self, host: &str, reference: &str) -> Option<(Uuid, Uuid)> {
        let id = key_guid(reference, false)?;
        let mut here = self.planned.values().filter(|vm| vm.host == host);
        here.find(|vm| vm.checkpoints.iter().any(|c| c.id == id)).map(|vm| (vm.id, id))
    }

    /// A reference point of a VM on this host, by reference.
    pub(crate) fn reference_point_by_ref(
        &self,
        host: &str,
        reference: &str,
    ) -> Result<(&Vm, Uuid), Refusal> {
        let id = key_guid(reference, true).ok_or_else(|| not_found(reference))?;
        let mut here = self.vms.values().filter(|vm| vm.host == host);
        here.find(|vm| vm.reference_points.iter().any(|r| r.id == id))
            .map(|vm| (vm, id))
            .ok_or_else(|| not_found(reference))
    }
}

fn not_found(reference: &str) -> Refusal {
    Refusal::NotFound {
        namespace: outrider_wmi::NS_VIRTUALIZATION.to_owned(),
        path: reference.to_owned(),
    }
}

/// The VM a call is about: by a reference to it, to its checkpoint or reference point, or by one of its files.
pub(crate) fn vm_of(state: &State, call: &Call) -> Option<Uuid> {
    std::iter::once(call.path.as_str()).chain(call.args.texts()).find_map(|text| {
        if let Some(id) = key_guid(text, false).or_else(|| text.parse().ok()) {
            let owner = state.vms.values().chain(state.planned.values()).find(|vm| {
                vm.id == id
                    || vm.checkpoints.iter().any(|c| c.id == id)
                    || vm.reference_points.iter().any(|r| r.id == id)
            });
            if let Some(vm) = owner {
                return Some(vm.id);
            }
        }
        let file = host_path(text);
        let by_file = file.is_absolute().then(|| state.vm_of_file(&file));
        by_file.flatten().map(|vm| vm.id)
    })
}
