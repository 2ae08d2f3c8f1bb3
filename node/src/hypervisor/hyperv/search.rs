//! Whether a VM is here in any form. Its absence may end what is owed to it, so whatever is not certain says nothing.

use std::collections::BTreeSet;

use outrider_proto::ids::VmGuid;
use outrider_wmi::Object;

use super::HyperV;
use super::cluster::ClusterView;
use super::wql::{self, PLANNED, REFERENCE_POINT, SETTINGS, SYSTEM};
use crate::hypervisor::Found;
use crate::hypervisor::error::HypervisorError;

impl HyperV {
    pub(super) async fn found_of(&self, vms: &[VmGuid]) -> Result<Option<Found>, HypervisorError> {
        let doing = "look for VMs that nobody shows";
        let mut known = BTreeSet::new();
        // Checkpoints and reference points may outlive the VM for a while.
        for class in [SYSTEM, PLANNED, SETTINGS, REFERENCE_POINT] {
            let objects = self.query(doing, &format!("SELECT * FROM {class}")).await?;
            known.extend(objects.iter().filter_map(vm_of));
        }
        Ok(found(vms, &known, self.cluster_view().await?))
    }
}

/// The VM that an object is, or belongs to.
fn vm_of(object: &Object) -> Option<VmGuid> {
    match object.str("VirtualSystemIdentifier") {
        Some(vm) => vm.parse().ok(),
        None => wql::named_guid(object),
    }
}

fn found(vms: &[VmGuid], known: &BTreeSet<VmGuid>, view: ClusterView) -> Option<Found> {
    if !view.speaks || view.nameless > 0 {
        return None;
    }
    let is_known = |vm: &VmGuid| known.contains(vm) || view.owners.contains_key(vm);
    Some(Found { vms: vms.iter().copied().filter(is_known).collect(), cluster_hosts: view.members })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guid(n: u128) -> VmGuid {
        VmGuid(uuid::Uuid::from_u128(n))
    }

    #[test]
    fn a_vm_is_known_here_or_to_the_cluster_and_doubt_says_nothing() {
        let sought = [guid(1), guid(2), guid(3)];
        let known = BTreeSet::from([guid(1)]);
        let view = || ClusterView {
            owners: [(guid(2), "hv2".to_owned())].into(),
            speaks: true,
            members: vec!["hv1".into(), "hv2".into()],
            ..ClusterView::default()
        };
        let told = found(&sought, &known, view()).expect("certain");
        assert_eq!(told.vms, [guid(1), guid(2)]);
        assert_eq!(told.cluster_hosts, ["hv1", "hv2"]);
        let cut_off = ClusterView { speaks: false, ..view() };
        assert_eq!(found(&sought, &known, cut_off), None, "a host that is cut off");
        let unread = ClusterView { nameless: 1, ..view() };
        assert_eq!(
            found(&sought, &known, unread),
            None,
            "a VM of the cluster did not say which it is"
        );
    }

    #[test]
    fn settings_and_checkpoints_show_the_vm_that_they_belong_to() {
        let vm = "11111111-2222-3333-4444-555555555555";
        let settings = Object::new(SETTINGS, "p").with("VirtualSystemIdentifier", vm);
        assert_eq!(vm_of(&settings), vm.parse().ok());
        assert_eq!(vm_of(&Object::new(SYSTEM, "p").with("Name", vm)), vm.parse().ok());
        assert_eq!(vm_of(&Object::new(SYSTEM, "p").with("Name", "HV1")), None, "the host itself");
    }
}
