//! What should not last: checkpoints of backups that grow old, merges that do not end, chains that grow. Each look at a host is compared
//! with what the state says of the looks before, so that a new leader goes on counting. Pure.

use std::collections::BTreeMap;

use outrider_proto::ids::VmKey;

use super::lasting::{Lasting, children, looked_at};
use super::{Kind, Known, Owner, VmTraces, orphans};
use crate::state::State;

/// What is bearable, milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// Age of a checkpoint that a backup made.
    pub(crate) checkpoint_ms: u64,
    /// How long a VM may merge, or write to child files that no checkpoint explains.
    pub(crate) merge_ms: u64,
}

/// The last look at one VM.
#[derive(Debug, Clone)]
struct Seen {
    host: String,
    at_ms: u64,
    found: VmTraces,
}

/// The last look at each host.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    vms: BTreeMap<VmKey, Seen>,
}

impl Watch {
    /// Takes a survey of a host in. What lasts there, when that is not what the state says already.
    pub(crate) fn surveyed(
        &mut self,
        host: &str,
        found: Vec<VmTraces>,
        state: &State,
        now_ms: u64,
    ) -> Option<Vec<(VmKey, Lasting)>> {
        let lasting: BTreeMap<VmKey, Lasting> = found
            .iter()
            .filter_map(|vm| {
                let lasting = looked_at(host, vm, state.lasting.get(&vm.vm), now_ms)?;
                Some((vm.vm.clone(), lasting))
            })
            .collect();
        // What the host shows no more is clean, or gone elsewhere with its VM.
        self.vms.retain(|_, seen| seen.host != host);
        for found in found {
            let seen = Seen { host: host.to_owned(), at_ms: now_ms, found };
            self.vms.insert(seen.found.vm.clone(), seen);
        }
        let known = state.lasting.iter().filter(|(_, lasting)| lasting.host == host);
        let same = known.eq(lasting.iter());
        (!same).then(|| lasting.into_iter().collect())
    }

    /// A host that is not of the fabric any more.
    pub(crate) fn forget(&mut self, host: &str) {
        self.vms.retain(|_, seen| seen.host != host);
    }

    /// VMs on hosts that leave which showed something of ours that no duty and no base explains, and when they did.
    pub(crate) fn litter(&self, state: &State) -> BTreeMap<VmKey, u64> {
        let leaving = self.vms.iter().filter(|(_, seen)| state.is_leaving(&seen.host));
        let littered = leaving.filter(|(vm, seen)| {
            let (unexplained, _) = orphans(&seen.found, &Known::of(state, vm));
            unexplained.iter().any(|orphan| orphan.owner == Owner::Ours)
        });
        littered.map(|(vm, seen)| (vm.clone(), seen.at_ms)).collect()
    }

    /// Sentences for whoever has to act, each with the chain.
    pub(crate) fn alarms(&self, state: &State, bounds: &Bounds, now_ms: u64) -> Vec<String> {
        let nothing = Lasting::default();
        let mut alarms = Vec::new();
        for Seen { host, found, .. } in self.vms.values() {
            let lasting = state.lasting.get(&found.vm).unwrap_or(&nothing);
            // Told only with an alarm: the leader counts alarms at every look.
            let of = || format!("VM {:?} ({}) on {host}", found.name, found.vm);
            let chain = || longest(found);
            for checkpoint in found.checkpoints.iter().filter(|c| c.kind == Kind::Recovery) {
                let made = match checkpoint.created_ms {
                    0 => lasting.undated_ms.get(&checkpoint.id).copied().unwrap_or(now_ms),
                    told => told,
                };
                let age = now_ms.saturating_sub(made);
                if age > bounds.checkpoint_ms {
                    let name = Some(&checkpoint.name).filter(|n| !n.is_empty());
                    alarms.push(format!(
                        "{} has had the backup checkpoint {:?} for {}; `outrider host orphans` says whose it is{}",
                        of(),
                        name.unwrap_or(&checkpoint.id),
                        time(age),
                        chain()
                    ));
                }
            }
            let too_long = |since: Option<u64>| {
                since.map(|since| now_ms.saturating_sub(since)).filter(|age| *age > bounds.merge_ms)
            };
            let (now, before) = (children(found), lasting.began_with);
            if let Some(age) = too_long(lasting.merging_ms) {
                alarms.push(format!(
                    "{} has been merging for {}; look at the load and free space of its volume{}",
                    of(),
                    time(age),
                    chain()
                ));
            } else if lasting.unexplained_ms.is_some() && now > before {
                alarms.push(format!(
                    "the chain of {} grows: {now} child files, {before} before; stop what makes checkpoints there{}",
                    of(),
                    chain()
                ));
            } else if let Some(age) = too_long(lasting.unexplained_ms) {
                alarms.push(format!(
                    "{} has been writing to child files that no checkpoint explains for {}; see `outrider host orphans`{}",
                    of(),
                    time(age),
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
    use crate::state::{Change, Command};

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

    /// A leader and what is replicated.
    #[derive(Default)]
    struct Led {
        watch: Watch,
        state: State,
        /// How often something was replicated.
        changes: u32,
    }

    impl Led {
        fn surveyed(&mut self, host: &str, found: Vec<VmTraces>, hour: u64) {
            let at_ms = hour * HOUR;
            if let Some(vms) = self.watch.surveyed(host, found, &self.state, at_ms) {
                let change = Change::Lasting { host: host.into(), vms };
                self.state.apply(Command { at_ms, change });
                self.changes += 1;
            }
        }

        fn alarms(&self, hour: u64) -> Vec<String> {
            self.watch.alarms(&self.state, &BOUNDS, hour * HOUR)
        }
    }

    /// Surveys of one VM, each with its hour, then what alarms there are an hour after the last one. With `elections`, each is
    /// heard by another leader.
    fn after(surveys: &[(u64, VmTraces)], elections: bool) -> Vec<String> {
        let mut led = Led::default();
        let mut last = 0;
        for (hour, found) in surveys {
            last = *hour;
            if elections {
                led.watch = Watch::default();
            }
            led.surveyed("alpha", vec![found.clone()], *hour);
        }
        led.alarms(last + 1)
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
        let both = table.iter().flat_map(|case| [(case, false), (case, true)]);
        for ((what, surveys, words), elections) in both {
            let alarms = after(surveys, elections);
            let what = format!("{what}, elections: {elections}");
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
        let mut led = Led::default();
        led.surveyed("alpha", vec![vm(2, &[], false)], 0);
        led.surveyed("beta", vec![], 0);
        assert_eq!(led.alarms(9).len(), 1);
        led.surveyed("alpha", vec![], 1);
        assert_eq!(led.alarms(9), Vec::<String>::new());
        assert!(led.state.lasting.is_empty());
        led.surveyed("alpha", vec![vm(2, &[], false)], 1);
        led.watch.forget("alpha");
        assert_eq!(led.alarms(9), Vec::<String>::new());
    }

    #[test]
    fn what_lasts_is_replicated_once_and_goes_with_a_vm_that_moves() {
        let mut led = Led::default();
        for hour in 0..5 {
            led.surveyed("alpha", vec![vm(1, &[], true)], hour);
        }
        assert_eq!(led.changes, 1, "the same look again tells nothing new");
        led.surveyed("beta", vec![vm(1, &[], true)], 5);
        led.surveyed("alpha", vec![], 6);
        assert_eq!(led.state.lasting.values().map(|l| l.merging_ms).collect::<Vec<_>>(), [Some(0)]);
        let alarms = led.alarms(7);
        assert!(alarms.len() == 1 && alarms[0].contains("7h") && alarms[0].contains("beta"));
        // Nothing but what a host does not tell: checkpoints have their own times.
        led.surveyed("beta", vec![vm(1, &[("a", 5 * HOUR)], false)], 8);
        assert!(led.state.lasting.is_empty());
    }
}
