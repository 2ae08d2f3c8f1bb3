//! Whether a VM boots, by its heartbeat integration service (`Msvm_HeartbeatComponent`).

use std::time::Duration;

use outrider_proto::ids::VmGuid;
use outrider_wmi::{Object, Value};
use tokio::time::Instant;

use super::HyperV;
use super::wql::{self, literal};
use crate::hypervisor::{BootCheck, Booting, HypervisorError, Sign};
use crate::lease::Lease;

/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// In contact.
const OK: u64 = 2;
const DISABLED: u64 = 3;

/// Hyper-V tells of a heartbeat and of nothing else that Outrider could look at.
pub(super) fn obstacle(check: &BootCheck) -> Option<&'static str> {
    if check.text.is_some() {
        return Some(
            "Outrider does not read serial consoles of Hyper-V: leave --boot-text out, and the heartbeat service is looked at",
        );
    }
    check.screen.then_some(
        "Outrider does not look at screens of Hyper-V: leave --boot-screen out, and the heartbeat service is looked at",
    )
}

impl HyperV {
    /// Watches a VM that was started.
    pub(super) async fn wait_for_heartbeat(
        &self,
        lease: &Lease,
        vm: VmGuid,
        check: &BootCheck,
    ) -> Result<Booting, HypervisorError> {
        let began = Instant::now();
        let doing = "look at a VM's heartbeat";
        let guid = literal(&wql::guid(vm.0));
        let wanted = format!("SELECT * FROM Msvm_HeartbeatComponent WHERE SystemName={guid}");
        loop {
            lease.check()?;
            let found = self.query(doing, &wanted).await?.into_iter().next();
            let watched = began.elapsed();
            if found.as_ref().is_some_and(is_in_contact) {
                return Ok(Booting { sign: Some(Sign::Heartbeat), watched, ..Booting::default() });
            }
            if watched >= check.patience {
                return Ok(Booting {
                    watched,
                    in_vain: vec![why(found.as_ref())],
                    ..Booting::default()
                });
            }
            tokio::time::sleep(LOOK.min(check.patience - watched)).await;
        }
    }
}

fn status(component: &Object) -> Option<u64> {
    component.array("OperationalStatus").first().and_then(Value::as_u64)
}

fn is_in_contact(component: &Object) -> bool {
    component.u64("EnabledState") != Some(DISABLED) && status(component) == Some(OK)
}

fn why(component: Option<&Object>) -> String {
    let Some(component) = component else {
        return "it has no heartbeat integration service".into();
    };
    if component.u64("EnabledState") == Some(DISABLED) {
        return "its heartbeat integration service is switched off: switch it on with Enable-VMIntegrationService".into();
    }
    match status(component) {
        Some(12) => "its heartbeat service was never in contact".into(),
        Some(13) => "its heartbeat service lost contact".into(),
        Some(other) => format!("its heartbeat service is in status {other}"),
        None => "its heartbeat service tells no status".into(),
    }
}
