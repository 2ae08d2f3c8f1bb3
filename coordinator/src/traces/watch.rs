//! What should not last: checkpoints of backups that grow old, merges that do not end, chains that grow. From one survey of a
//! host to the next; the first survey after a change of leader begins anew. Pure.

use std::collections::BTreeMap;

use outrider_proto::ids::VmKey;

use super::{Kind, VmTraces, unexplained_chain};

/// What is bearable, milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// Age of a checkpoint that a backup made.
    pub(crate) checkpoint_ms: u64,
    /// How long a VM may merge, or write to child files that no checkpoint explains.
    pub(crate) merge_ms: u64,
}

/// What surveys showed of one VM.
#[derive(Debug, Clone, Default)]
struct Seen {
    host: String,
    found: Option<VmTraces>,
    /// Checkpoints of backups and when each was seen first, or was made.
    checkpoints: BTreeMap<String, u64>,
    merging_since: Option<u64>,
    unexplained_since: Option<u64>,
    /// Longest chain, and how long it was when it began to be more than checkpoints explain.
    children: usize,
    began_with: usize,
}

/// Memory of surveys.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    vms: BTreeMap<VmKey, Seen>,
}

impl Watch {
    /// Takes a survey of a host in.
    pub(crate) fn surveyed(&mut self, host: &str, found: Vec<VmTraces>, now_ms: u64) {
        // What the host shows no more is clean, or gone elsewhere with its VM.
        self.vms.retain(|key, seen| seen.host != host || found.iter().any(|vm| vm.vm == *key));
        for vm in found {
            let seen = self.vms.entry(vm.vm.clone()).or_default();
            host.clone_into(&mut seen.host);
            let before = std::mem::take(&mut seen.checkpoints);
            seen.checkpoints = vm
                .checkpoints
                .iter()
                .filter(|c| c.kind == Kind::Recovery)
                .map(|c| {
                    let first = before.get(&c.id).copied().unwrap_or(now_ms);
                    let made = if c.created_ms == 0 { first } else { c.created_ms };
                    (c.id.clone(), made)
                })
                .collect();
            seen.merging_since = vm.merging.then(|| seen.merging_since.unwrap_or(now_ms));
            let longest = vm.chains.iter().map(super::Chain::children).max().unwrap_or(0);
            let unexplained = vm.chains.iter().any(|c| unexplained_chain(&vm, c).is_some())
                || (vm.merging && longest > vm.checkpoints.len());
            if unexplained && seen.unexplained_since.is_none() {
                seen.began_with = longest;
            }
            seen.unexplained_since = unexplained.then(|| seen.unexplained_since.unwrap_or(now_ms));
            seen.children = longest;
            seen.found = Some(vm);
        }
    }

    /// A host that is not of the fabric any more.
    pub(crate) fn forget(&mut self, host: &str) {
        self.vms.retain(|_, seen| seen.host != host);
    }

    /// Sentences for whoever has to act, each with the chain.
    pub(crate) fn alarms(&self, bounds: &Bounds, now_ms: u64) -> Vec<String> {
        let mut alarms = Vec::new();
        for seen in self.vms.values() {
            let Some(found) = &seen.found else { continue };
            // Told only with an alarm: the leader counts alarms at every look.
            let of = || format!("VM {:?} ({}) on {}", found.name, found.vm, seen.host);
            let chain = || longest(found);
            for (id, since) in &seen.checkpoints {
                let age = now_ms.saturating_sub(*since);
                if age > bounds.checkpoint_ms {
                    let name = found.checkpoints.iter().find(|c| c.id == *id).map(|c| &c.name);
                    alarms.push(format!(
                        "{} has had the backup checkpoint {:?} for {}; `outrider host orphans` says whose it is{}",
                        of(),
                        name.filter(|n| !n.is_empty()).unwrap_or(id),
                        time(age),
                        chain()
                    ));
                }
            }
            if let Some(since) = seen.merging_since
                && now_ms.saturating_sub(since) > bounds.merge_ms
            {
                let age = time(now_ms.saturating_sub(since));
                alarms.push(format!(
                    "{} has been merging for {age}; look at the load and free space of its volume{}",
                    of(),
                    chain()
                ));
            } else if seen.unexplained_since.is_some() && seen.children > seen.began_with {
                alarms.push(format!(
                    "the chain of {} grows: {} child files, {} before; stop what makes checkpoints there{}",
                    of(),
                    seen.children,
                    seen.began_with,
                    chain()
                ));
            } else if let Some(since) = seen.unexplained_since
                && now_ms.saturating_sub(since) > bounds.merge_ms
            {
                let age = time(now_ms.saturating_sub(since));
                alarms.push(format!(
                    "{} has been writing to child files that no checkpoint explains for {age}; see `outrider host orphans`{}",
                    of(),
                    chain()
                ));
            }
        }
        alarms
    }
}

fn longest(found: &VmTraces) -> String {
    match found.chains.iter().max_by_key(|c| c.files.len()) {
        Some(chain) => format!(" (chain: {})", chain.files.join(" <- ")),
        None => String::new(),
    }
}

/// Whole minutes are exact enough for an alarm.
fn time(ms: u64) -> String {
    let minutes = std::time::Duration::from_secs(ms / 60_000 * 60);
    humantime::format_duration(minutes).to_string()
}

#[cfg(test)]
mod tests {
    use super::super::tests::found;
    use super::super::{Chain, Checkpoint};
    use super::*;

    const HOUR: u64 = 3_600_000;
    const BOUNDS: Bounds = Bounds { checkpoint_ms: 24 * HOUR, merge_ms: 4 * HOUR };

    fn vm(children: usize, checkpoints: &[(&str, u64)], merging: bool) -> VmTraces {
        let files = (0..=children).rev().map(|n| format!("d{n}.avhdx")).collect();
        VmTraces {
            checkpoints: checkpoints
                .iter()
                .map(|(id, made)| Checkpoint {
                    id: (*id).into(),
                    name: String::new(),
                    kind: Kind::Recovery,
                    created_ms: *made,
                    ours: false,
                })
                .collect(),
            chains: vec![Chain { slot: "0".into(), files, broken: String::new() }],
            merging,
            ..found()
        }
    }

    /// Surveys of one VM, each with its hour, then what alarms there are an hour after the last one.
    fn after(surveys: Vec<(u64, VmTraces)>) -> Vec<String> {
        let mut watch = Watch::default();
        let mut last = 0;
        for (hour, found) in surveys {
            last = hour;
            watch.surveyed("alpha", vec![found], hour * HOUR);
        }
        watch.alarms(&BOUNDS, (last + 1) * HOUR)
    }

    #[test]
    fn what_lasts_too_long_is_an_alarm_with_its_chain() {
        let none: &[&str] = &[];
        type Case<'a> = (&'a str, Vec<(u64, VmTraces)>, &'a [&'a str]);
        let table: Vec<Case<'_>> = vec![
            ("a checkpoint at work", vec![(0, vm(1, &[("a", 0)], false))], none),
            (
                "an old one",
                vec![(0, vm(1, &[("a", 0)], false)), (30, vm(1, &[("a", 0)], false))],
                &["1day 7h"],
            ),
            (
                "old when seen first",
                vec![(90, vm(1, &[("a", HOUR)], false))],
                &["3days 18h", "90h"],
            ),
            (
                "another one each day",
                vec![(0, vm(1, &[("a", 0)], false)), (30, vm(1, &[("b", 0)], false))],
                none,
            ),
            ("a short merge", vec![(0, vm(1, &[], true)), (1, vm(1, &[], true))], none),
            (
                "a merge that does not end",
                vec![(0, vm(1, &[], true)), (9, vm(1, &[], true))],
                &["merging", "10h"],
            ),
            (
                "merged between",
                vec![(0, vm(1, &[], true)), (5, vm(1, &[("a", 0)], false)), (6, vm(1, &[], true))],
                none,
            ),
            (
                "child files of nobody",
                vec![(0, vm(2, &[], false)), (9, vm(2, &[], false))],
                &["no checkpoint explains"],
            ),
            ("not for long yet", vec![(0, vm(2, &[], false))], none),
            (
                "growing",
                vec![(0, vm(1, &[], false)), (1, vm(3, &[], false))],
                &["grows", "3 child files"],
            ),
        ];
        for (what, surveys, words) in table {
            let alarms = after(surveys);
            if words.is_empty() {
                assert_eq!(alarms, Vec::<String>::new(), "{what}");
            } else {
                assert_eq!(alarms.len(), 1, "{what}: {alarms:?}");
                assert!(words.iter().any(|w| alarms[0].contains(w)), "{what}: {alarms:?}");
                assert!(alarms[0].contains("d1.avhdx <- d0.avhdx"), "{what}: {alarms:?}");
                assert!(alarms[0].contains("web") && alarms[0].contains("alpha"), "{what}");
            }
        }
    }

    #[test]
    fn a_vm_that_shows_nothing_any_more_is_forgotten_and_so_is_a_host() {
        let mut watch = Watch::default();
        watch.surveyed("alpha", vec![vm(2, &[], false)], 0);
        watch.surveyed("beta", vec![], 0);
        assert_eq!(watch.alarms(&BOUNDS, 9 * HOUR).len(), 1);
        watch.surveyed("alpha", vec![], HOUR);
        assert_eq!(watch.alarms(&BOUNDS, 9 * HOUR), Vec::<String>::new());
        watch.surveyed("alpha", vec![vm(2, &[], false)], HOUR);
        watch.forget("alpha");
        assert_eq!(watch.alarms(&BOUNDS, 9 * HOUR), Vec::<String>::new());
    }
}
