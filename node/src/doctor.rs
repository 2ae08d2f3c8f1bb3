//! `outrider node doctor`: a host compared with what backups need of it. It only reads.

mod paths;

use std::sync::Arc;
use std::time::Duration;

use outrider_proto::rpc::Consistency;
use outrider_wmi::files::HostFiles;
use outrider_wmi::lab::{LabFiles, LabWmi};
use outrider_wmi::{NS_CIM, NS_VIRTUALIZATION, Object, Value, Wmi, WmiError};

use crate::config::{Config, HypervisorKind};
use crate::consistency::{self, Wanted};
use crate::hypervisor::facts::Release;
use crate::hypervisor::hyperv::HyperV;
use crate::hypervisor::hyperv::contract::{CLASSES, Class, Kind, Need};
use crate::hypervisor::{Hypervisor, VmState};
use crate::precheck::{self, Situation};

/// VMs whose facts are told.
const SAMPLES: usize = 3;
/// How long a coordinator's port may take to answer.
const CONNECT: Duration = Duration::from_secs(5);
/// How long the provider may take to answer one question.
const ANSWER: Duration = Duration::from_secs(60);

/// What a finding means for backups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// As expected.
    Good,
    /// Other than expected, or to be known; backups go on.
    Differs,
    /// Backups cannot work.
    Stops,
}

impl Verdict {
    /// One word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Differs => "differs",
            Self::Stops => "stops backups",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Part of the checklist.
    pub area: &'static str,
    /// What was looked at.
    pub what: String,
    /// What it means.
    pub verdict: Verdict,
    /// What was found, and what to do.
    pub detail: String,
}

fn finding(
    area: &'static str,
    what: impl Into<String>,
    verdict: Verdict,
    detail: impl Into<String>,
) -> Finding {
    Finding { area, what: what.into(), verdict, detail: detail.into() }
}

/// Goes through the checklist for the host that the configuration is of.
pub async fn examine(config: &Config) -> Vec<Finding> {
    let mut out = Vec::new();
    match transport(config).await {
        Ok((wmi, files)) => {
            let hyperv = HyperV::new(wmi.clone(), files, config.jobs.clone());
            let clustered = classes(&*wmi, &mut out).await;
            services(&*wmi, clustered, &mut out).await;
            host(&hyperv, &mut out).await;
            vms(&hyperv, &mut out).await;
        }
        Err(found) => out.push(found),
    }
    for address in &config.coordinators {
        out.push(coordinator(address).await);
    }
    if !config.coordinators.is_empty() {
        out.extend(paths::storage(config).await);
    }
    out
}

async fn transport(config: &Config) -> Result<(Arc<dyn Wmi>, Arc<dyn HostFiles>), Finding> {
    let stops = |detail: String| finding("provider", "WMI", Verdict::Stops, detail);
    match config.hypervisor {
        HypervisorKind::Lab => {
            let lab = config.lab.as_ref().ok_or_else(|| {
                stops("hypervisor = \"lab\" needs the section [lab] with an address".into())
            })?;
            let wmi = LabWmi::connect_with(&lab.address, &config.name, ANSWER)
                .await
                .map_err(|e| stops(e.to_string()))?;
            Ok((Arc::new(wmi), Arc::new(LabFiles::new(&lab.address, config.name.clone()))))
        }
        #[cfg(windows)]
        HypervisorKind::Hyperv => {
            let wmi =
                outrider_wmi::com::ComWmi::start_with(ANSWER).map_err(|e| stops(e.to_string()))?;
            Ok((Arc::new(wmi), Arc::new(outrider_wmi::files::PlainFiles)))
        }
        #[cfg(not(windows))]
        HypervisorKind::Hyperv => Err(stops(crate::NodeError::NoHyperV.to_string())),
        HypervisorKind::Qemu => Err(finding(
            "provider",
            "WMI",
            Verdict::Differs,
            "this host's hypervisor is QEMU, which the checklist does not cover; see docs/qemu.md",
        )),
    }
}

/// Every class and property of the contract; gives whether there is a cluster.
async fn classes(wmi: &dyn Wmi, out: &mut Vec<Finding>) -> bool {
    let mut clustered = true;
    for class in CLASSES {
        if class.need == Need::Clustered && !clustered {
            continue;
        }
        match wmi.query(class.namespace, &format!("SELECT * FROM {}", class.name)).await {
            Ok(found) => out.push(compared(class, &found)),
            Err(WmiError::NoNamespace { .. }) if class.namespace == outrider_wmi::NS_CLUSTER => {
                if clustered {
                    out.push(finding(
                        "classes",
                        class.namespace,
                        Verdict::Good,
                        "no failover cluster here",
                    ));
                }
                clustered = false;
            }
            Err(e) => {
                let verdict = match class.need {
                    Need::Always | Need::Clustered => Verdict::Stops,
                    Need::Helps => Verdict::Differs,
                };
                out.push(finding("classes", class.name, verdict, e.to_string()));
            }
        }
    }
    clustered
}

/// Instances against the properties that are read of them. A property that is null in all instances is not told, which is no
/// difference; one of another kind is.
fn compared(class: &Class, found: &[Object]) -> Finding {
    if class.name == "Msvm_ComputerSystem" && found.is_empty() {
        return finding(
            "rights",
            class.name,
            Verdict::Stops,
            "not even the host itself is shown: the token has no administrator rights; run as LocalSystem, or elevated",
        );
    }
    let mut odd = Vec::new();
    for (name, kind) in class.properties {
        let values = found.iter().map(|o| o.get(name)).filter(|v| **v != Value::Null);
        if let Some(other) = values.into_iter().find(|v| !is_of(*kind, v)) {
            odd.push(format!("{name} should be {kind:?} and is {other:?}"));
        }
    }
    let counted = format!("{} instances", found.len());
    if odd.is_empty() {
        finding("classes", class.name, Verdict::Good, counted)
    } else {
        let detail = format!("{counted}; {}", odd.join("; "));
        finding("classes", class.name, Verdict::Differs, detail)
    }
}

fn is_of(kind: Kind, value: &Value) -> bool {
    match kind {
        // 64-bit numbers and references travel as text.
        Kind::Text => matches!(value, Value::Str(_) | Value::Ref(_)),
        Kind::Number => value.as_u64().is_some() || matches!(value, Value::Int(_)),
        Kind::Truth => matches!(value, Value::Bool(_)),
        Kind::List => matches!(value, Value::Array(_)),
        Kind::Embedded => matches!(value, Value::Object(_)),
    }
}

async fn services(wmi: &dyn Wmi, clustered: bool, out: &mut Vec<Finding>) {
    let wanted = [("vmms", true), ("ClusSvc", clustered)];
    let found = match wmi.query(NS_CIM, "SELECT * FROM Win32_Service").await {
        Ok(found) => found,
        Err(e) => {
            out.push(finding("services", "Win32_Service", Verdict::Differs, e.to_string()));
            return;
        }
    };
    for (name, _) in wanted.iter().filter(|(_, needed)| *needed) {
        let service =
            found.iter().find(|s| s.str("Name").is_some_and(|n| n.eq_ignore_ascii_case(name)));
        let state = service.and_then(|s| s.str("State")).unwrap_or("not installed");
        out.push(if state.eq_ignore_ascii_case("running") {
            finding("services", *name, Verdict::Good, state)
        } else {
            finding("services", *name, Verdict::Stops, format!("{state}; start it"))
        });
    }
    // Rights on the service's objects are told by what it shows; a namespace that cannot be read at all, by this.
    if let Err(e @ WmiError::AccessDenied { .. }) =
        wmi.query(NS_VIRTUALIZATION, "SELECT Name FROM Msvm_VirtualSystemManagementService").await
    {
        out.push(finding("rights", NS_VIRTUALIZATION, Verdict::Stops, e.to_string()));
    }
}

async fn host(hyperv: &HyperV, out: &mut Vec<Finding>) {
    let host = match hyperv.host().await {
        Ok(host) => host,
        Err(e) => {
            out.push(finding("host", "release", Verdict::Stops, e.to_string()));
            return;
        }
    };
    let verdict = if host.release() < Release::Server2016 {
        Verdict::Stops
    } else if host.build.is_none() {
        Verdict::Differs
    } else {
        Verdict::Good
    };
    out.push(finding("host", "release", verdict, host.release_name()));
    let node = host.node;
    let bad = [
        (node.quarantined, "in quarantine"),
        (node.isolated, "isolated"),
        (node.draining, "being drained"),
        (node.paused, "paused"),
    ];
    let said: Vec<&str> = bad.iter().filter(|(is, _)| *is).map(|(_, said)| *said).collect();
    if let Some(level) = host.functional_level {
        let verdict = if level < 9 { Verdict::Differs } else { Verdict::Good };
        let detail = format!("{level}; change tracking needs 9");
        out.push(finding("cluster", "functional level", verdict, detail));
        let verdict = if said.is_empty() { Verdict::Good } else { Verdict::Differs };
        let detail = if said.is_empty() { "takes part".into() } else { said.join(", ") };
        out.push(finding("cluster", "this node", verdict, detail));
    }
}

/// How a few VMs would be backed up now, by the default policy.
async fn vms(hyperv: &HyperV, out: &mut Vec<Finding>) {
    let inventory = match hyperv.inventory().await {
        Ok(inventory) => inventory,
        Err(e) => {
            out.push(finding("VMs", "inventory", Verdict::Stops, e.to_string()));
            return;
        }
    };
    let realized: Vec<_> = inventory.vms.iter().filter(|vm| vm.realized).collect();
    out.push(finding(
        "VMs",
        "inventory",
        Verdict::Good,
        format!("{} VMs on this host", realized.len()),
    ));
    for vm in realized.iter().take(SAMPLES) {
        let what = format!("{} ({})", vm.name, vm.guid);
        let told = async {
            let state = hyperv.vm(vm.guid).await?;
            let foreign = hyperv.checkpoints(vm.guid).await?;
            Ok::<_, crate::hypervisor::HypervisorError>((state, foreign))
        };
        out.push(match told.await {
            Ok((state, checkpoints)) => sample(what, &state, &checkpoints),
            Err(e) => finding("VMs", what, Verdict::Differs, e.to_string()),
        });
    }
}

fn sample(what: String, state: &VmState, checkpoints: &[crate::hypervisor::Checkpoint]) -> Finding {
    let foreign: Vec<_> =
        checkpoints.iter().filter(|c| !c.name.starts_with("Outrider ")).cloned().collect();
    let situation =
        Situation { foreign: &foreign, require_all_disks: false, redirected_waited: false };
    let (obstacle, warnings) = precheck::check(state, situation);
    if let Some(obstacle) = obstacle {
        return finding("VMs", what, Verdict::Differs, obstacle.sentence);
    }
    let wanted = Wanted {
        wanted: Consistency::Application,
        minimum: Consistency::Crash,
        quiesce: true,
        offline: false,
    };
    let mut told = match consistency::plan(state, wanted) {
        Ok(plan) => plan.ways.first().map_or_else(String::new, |way| {
            format!("would be {}: {}", consistency::text(way.gives), way.reason)
        }),
        Err(e) => return finding("VMs", what, Verdict::Differs, e.to_string()),
    };
    let remarks: Vec<String> = warnings.into_iter().chain(precheck::untracked(state)).collect();
    let verdict = if remarks.is_empty() { Verdict::Good } else { Verdict::Differs };
    for remark in remarks {
        told = format!("{told}; {remark}");
    }
    finding("VMs", what, verdict, told)
}

async fn coordinator(address: &str) -> Finding {
    let area = "coordinators";
    match tokio::time::timeout(CONNECT, tokio::net::TcpStream::connect(address)).await {
        Ok(Ok(_)) => finding(area, address, Verdict::Good, "its port answers"),
        Ok(Err(e)) => finding(
            area,
            address,
            Verdict::Stops,
            format!("no connection ({e}): start it, and check name, port and firewalls"),
        ),
        Err(_) => finding(
            area,
            address,
            Verdict::Stops,
            format!("no answer within {CONNECT:?}: check the network and firewalls"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(name: &str) -> &'static Class {
        CLASSES.iter().find(|c| c.name == name).expect("in the contract")
    }

    #[test]
    fn a_property_of_another_kind_differs_and_one_that_is_not_told_does_not() {
        let node = |bits: Value| {
            Object::new("MSCluster_Node", "p").with("Name", "HV1").with("StatusInformation", bits)
        };
        let class = class("MSCluster_Node");
        assert_eq!(compared(class, &[node(Value::UInt(4))]).verdict, Verdict::Good);
        assert_eq!(compared(class, &[node(Value::Null)]).verdict, Verdict::Good);
        let odd = compared(class, &[node(Value::UInt(4)), node(Value::Bool(true))]);
        assert_eq!(odd.verdict, Verdict::Differs);
        assert!(odd.detail.contains("StatusInformation"), "{}", odd.detail);
    }

    #[test]
    fn a_host_that_shows_nothing_at_all_is_a_matter_of_rights() {
        let found = compared(class("Msvm_ComputerSystem"), &[]);
        assert_eq!((found.area, found.verdict), ("rights", Verdict::Stops));
    }
}
