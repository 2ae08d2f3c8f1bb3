//! What speaks against a restore on this host, and what its operator should know: decided before anything is written.
//! Pure.

use outrider_proto::manifest::{Guardian, Machine, Manifest};
use outrider_proto::rpc::RestoreWork;

use crate::hypervisor::HostFacts;
use crate::job::JobError;

/// Refuses what this host cannot run; gives what the operator should know.
pub(super) fn check(
    manifest: &Manifest,
    work: &RestoreWork,
    facts: &HostFacts,
    host: &str,
) -> Result<Vec<String>, JobError> {
    let machine = &manifest.machine;
    version(manifest, facts, host)?;
    saved_state(manifest, work, host)?;
    let mut warnings = switches(machine, work, facts, host)?;
    warnings.extend(guardians(machine, facts, host));
    if work.with_checkpoints && manifest.tree.checkpoints.is_empty() {
        warnings.push("the recovery point holds no checkpoints: the VM comes back flat".into());
    }
    if work.with_checkpoints {
        warnings.extend(saved_checkpoints(manifest, host));
    }
    Ok(warnings)
}

/// A VM of a higher configuration version cannot run on a lower host (R4).
fn version(manifest: &Manifest, facts: &HostFacts, host: &str) -> Result<(), JobError> {
    let wanted = manifest.machine.version.as_str();
    if wanted.is_empty() || facts.versions.is_empty() || facts.versions.iter().any(|v| v == wanted)
    {
        return Ok(());
    }
    // 254 and above are previews: no range to speak of.
    let number = |v: &String| {
        let (major, minor) = v.split_once('.')?;
        Some((major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?))
    };
    let mut known: Vec<(u32, u32)> = facts.versions.iter().filter_map(number).collect();
    known.retain(|(major, _)| *major < 250);
    known.sort_unstable();
    let range = match (known.first(), known.last()) {
        (Some(first), Some(last)) => format!("{}.{} to {}.{}", first.0, first.1, last.0, last.1),
        _ => facts.versions.join(", "),
    };
    Err(JobError::Unfit(format!(
        "VM {:?} has configuration version {wanted}, host {host} supports {range}: restore it on a host that supports \
         version {wanted}, or restore its disks alone",
        manifest.vm_name
    )))
}

/// A saved state needs the processor that it is of.
fn saved_state(manifest: &Manifest, work: &RestoreWork, host: &str) -> Result<(), JobError> {
    let machine = &manifest.machine;
    let at_home = machine.host.eq_ignore_ascii_case(host);
    if !machine.saved_state || at_home || work.discard_saved_state {
        return Ok(());
    }
    Err(JobError::Unfit(format!(
        "VM {:?} was saved on host {:?} when the recovery point was made; host {host} may not be able to resume that state: \
         restore on {:?}, or with --discard-saved-state (the VM then starts as after a power cut)",
        manifest.vm_name, machine.host, machine.host
    )))
}

/// Checkpoints may carry a saved state of a host, too; nobody resumes it unless they are applied.
fn saved_checkpoints(manifest: &Manifest, host: &str) -> Option<String> {
    let saved = manifest.tree.checkpoints.iter().filter(|c| c.facts.saved_state);
    let names: Vec<String> = saved.map(|c| format!("{:?}", c.name)).collect();
    let at_home = manifest.machine.host.eq_ignore_ascii_case(host);
    (!names.is_empty() && !at_home).then(|| {
        format!(
            "the checkpoints {} carry a saved state of another host than {host}, perhaps: if the VM does not resume after \
             one of them was applied, delete its saved state",
            names.join(", ")
        )
    })
}

/// Every choice must lead to a switch of this host.
fn switches(
    machine: &Machine,
    work: &RestoreWork,
    facts: &HostFacts,
    host: &str,
) -> Result<Vec<String>, JobError> {
    let mut warnings = Vec::new();
    for choice in &work.switches {
        let there = facts
            .switches
            .iter()
            .any(|s| s.name == choice.to || s.id.eq_ignore_ascii_case(&choice.to));
        if !there {
            let names: Vec<&str> = facts.switches.iter().map(|s| s.name.as_str()).collect();
            return Err(JobError::Unfit(format!(
                "host {host} has no virtual switch {:?}; it has: {}",
                choice.to,
                if names.is_empty() { "none".to_owned() } else { names.join(", ") }
            )));
        }
        let asked = machine
            .nics
            .iter()
            .filter_map(|n| n.switch.as_ref())
            .any(|s| s.name == choice.from || s.id.eq_ignore_ascii_case(&choice.from));
        if !asked && !machine.nics.is_empty() {
            warnings.push(format!(
                "no adapter of the recovery point was connected to the switch {:?}",
                choice.from
            ));
        }
    }
    Ok(warnings)
}

/// A vTPM opens only where the private keys of one of its guardians are (P12).
fn guardians(machine: &Machine, facts: &HostFacts, host: &str) -> Vec<String> {
    let Some(security) = &machine.security else { return Vec::new() };
    let mut warnings = Vec::new();
    if security.shielded {
        warnings.push(format!(
            "the VM is shielded: it starts on {host} only if the host guardian service that protects it attests that host"
        ));
    }
    if !security.tpm || security.guardians.is_empty() {
        return warnings;
    }
    let Some(here) = &facts.guardians else {
        warnings.push(format!(
            "the VM has a virtual TPM, and host {host} does not tell its guardians: it starts only if the host has the \
             certificates of {}",
            named(&security.guardians)
        ));
        return warnings;
    };
    let held = |g: &Guardian| here.iter().any(|h| h.private_keys && h.signing == g.signing);
    if !security.guardians.iter().any(held) {
        warnings.push(format!(
            "the VM has a virtual TPM that host {host} cannot open: import the certificates of {} with their private keys \
             into \"Shielded VM Local Certificates\" there before the VM is started (exported from host {:?})",
            named(&security.guardians),
            machine.host
        ));
    }
    warnings
}

fn named(guardians: &[Guardian]) -> String {
    let one = |g: &Guardian| {
        format!("guardian {:?} (signing {}, encryption {})", g.name, g.signing, g.encryption)
    };
    guardians.iter().map(one).collect::<Vec<_>>().join(" or ")
}

#[cfg(test)]
mod tests {
    use outrider_proto::manifest::{Nic, Security, Switch};
    use outrider_proto::rpc::SwitchChoice;

    use super::*;
    use crate::restore::target::tests::manifest;

    fn host() -> HostFacts {
        HostFacts {
            host: String::new(),
            versions: ["8.0", "9.0", "10.0", "254.0"].map(str::to_owned).to_vec(),
            switches: vec![Switch { id: "A1".into(), name: "LAN".into() }],
            guardians: Some(vec![]),
        }
    }

    fn told(manifest: &Manifest, work: &RestoreWork, facts: &HostFacts) -> Result<String, String> {
        check(manifest, work, facts, "beta").map(|w| w.join("; ")).map_err(|e| e.to_string())
    }

    #[test]
    fn a_version_that_the_host_does_not_support_is_refused_and_both_are_named() {
        let mut manifest = manifest();
        manifest.machine.version = "12.0".into();
        let refused = told(&manifest, &RestoreWork::default(), &host()).expect_err("too new");
        assert!(refused.contains("12.0") && refused.contains("8.0 to 10.0"), "{refused}");
        manifest.machine.version = "10.0".into();
        told(&manifest, &RestoreWork::default(), &host()).expect("supported");
        manifest.machine.version = "12.0".into();
        told(&manifest, &RestoreWork::default(), &HostFacts::default()).expect("not told");
    }

    #[test]
    fn a_saved_state_of_another_host_is_refused_unless_it_may_be_thrown_away() {
        let mut manifest = manifest();
        manifest.machine.saved_state = true;
        manifest.machine.host = "alpha".into();
        let mut work = RestoreWork::default();
        let refused = told(&manifest, &work, &host()).expect_err("another processor");
        assert!(refused.contains("--discard-saved-state"), "{refused}");
        work.discard_saved_state = true;
        told(&manifest, &work, &host()).expect("thrown away");
        work.discard_saved_state = false;
        manifest.machine.host = "BETA".into();
        told(&manifest, &work, &host()).expect("the same host");
    }

    #[test]
    fn a_switch_that_is_not_there_is_refused_and_one_that_nobody_used_is_told() {
        let mut manifest = manifest();
        let switch = Some(Switch { id: "X".into(), name: "DMZ".into() });
        manifest.machine.nics = vec![Nic { switch, ..Nic::default() }];
        let to = |from: &str, to: &str| RestoreWork {
            switches: vec![SwitchChoice { from: from.into(), to: to.into() }],
            ..RestoreWork::default()
        };
        assert_eq!(told(&manifest, &to("DMZ", "LAN"), &host()), Ok(String::new()));
        let refused = told(&manifest, &to("DMZ", "WAN"), &host()).expect_err("no such switch");
        assert!(refused.contains("it has: LAN"), "{refused}");
        let odd = told(&manifest, &to("Lan", "a1"), &host()).expect("allowed");
        assert!(odd.contains("no adapter"), "{odd}");
    }

    #[test]
    fn guardians_that_the_host_lacks_are_named() {
        let mut manifest = manifest();
        let guardian = |signing: &str, private_keys| Guardian {
            name: "UntrustedGuardian".into(),
            signing: signing.into(),
            encryption: "E".into(),
            private_keys,
        };
        manifest.machine.security = Some(Security {
            tpm: true,
            guardians: vec![guardian("S1", true)],
            ..Security::default()
        });
        let mut facts = host();
        let work = RestoreWork::default();
        let warned = told(&manifest, &work, &facts).expect("allowed");
        assert!(warned.contains("S1") && warned.contains("cannot open"), "{warned}");
        facts.guardians = Some(vec![guardian("S1", false)]);
        assert!(told(&manifest, &work, &facts).expect("allowed").contains("cannot open"));
        facts.guardians = Some(vec![guardian("S1", true)]);
        assert_eq!(told(&manifest, &work, &facts), Ok(String::new()));
        facts.guardians = None;
        assert!(told(&manifest, &work, &facts).expect("allowed").contains("does not tell"));
    }
}
