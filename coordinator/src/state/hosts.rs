//! Hosts.

use serde::{Deserialize, Serialize};

use super::departures::Leaving;
use super::{Outcome, State};

/// Readings of one start of a host differ by less than this.
const START_TOLERANCE_MS: u64 = 10_000;

/// A hypervisor host whose agent has said hello once, or that a cluster named.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Host {
    pub(crate) realm: String,
    pub(crate) version: String,
    pub(crate) hypervisor: String,
    /// Start of the agent that attached last.
    pub(crate) boot_id: u64,
    /// What the cluster database says; an agent that attaches proves "up".
    pub(crate) up: bool,
    /// Since when.
    pub(crate) since_ms: u64,
    /// Last hello.
    pub(crate) attached_ms: u64,
    /// Start of its operating system as its agent read it last, Unix milliseconds; 0: never told.
    #[serde(default)]
    pub(crate) started_ms: u64,
    /// SHA-256 of the public key that it showed, hexadecimal.
    #[serde(default)]
    pub(crate) key: String,
    /// It is to leave the fabric.
    #[serde(default)]
    pub(crate) leaving: Option<Leaving>,
}

/// What an agent says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Attached {
    pub(crate) host: String,
    pub(crate) realm: String,
    pub(crate) version: String,
    pub(crate) hypervisor: String,
    pub(crate) boot_id: u64,
    /// Start of the host's operating system, Unix milliseconds; 0: not known.
    #[serde(default)]
    pub(crate) started_ms: u64,
    /// SHA-256 of its public key, hexadecimal.
    #[serde(default)]
    pub(crate) key: String,
}

impl State {
    /// A host that was started anew may have crashed and come back before anybody called it down, and no log says so for
    /// certain: the change tracking of what is placed there is in doubt.
    pub(super) fn host_attached(&mut self, a: Attached, now: u64) -> Outcome {
        let before = self.hosts.get(&a.host);
        let since_ms = before.filter(|h| h.up).map_or(now, |h| h.since_ms);
        let known_ms = before.map_or(0, |h| h.started_ms);
        if restarted(known_ms, a.started_ms) {
            self.host_lost_tracking(&a.host, now);
        }
        let started_ms = if a.started_ms == 0 { known_ms } else { a.started_ms };
        let leaving = self.hosts.get(&a.host).and_then(|h| h.leaving.clone());
        self.hosts.insert(
            a.host,
            Host {
                realm: a.realm,
                version: a.version,
                hypervisor: a.hypervisor,
                boot_id: a.boot_id,
                up: true,
                since_ms,
                attached_ms: now,
                started_ms,
                key: a.key,
                leaving,
            },
        );
        Outcome::Done
    }

    pub(super) fn host_up(&mut self, host: &str, now: u64) -> Outcome {
        if let Some(h) = self.hosts.get_mut(host).filter(|h| !h.up) {
            h.up = true;
            h.since_ms = now;
        }
        Outcome::Done
    }

    /// What ran on a crashed host has change tracking that nobody flushed: the next incremental reads the coarse map.
    pub(super) fn host_down(&mut self, host: &str, now: u64) -> Outcome {
        match self.hosts.get_mut(host) {
            Some(h) if h.up => {
                h.up = false;
                h.since_ms = now;
            }
            _ => return Outcome::Done,
        }
        self.host_lost_tracking(host, now);
        for (job, epoch) in self.jobs.leased_to(host) {
            self.lease_lost(job, epoch, "the host is down", 0, now);
        }
        Outcome::Done
    }

    pub(super) fn host_lost_tracking(&mut self, host: &str, now: u64) {
        let there: Vec<_> = self
            .vms
            .iter()
            .filter(|(_, v)| v.host.as_deref() == Some(host))
            .map(|(k, _)| k.clone())
            .collect();
        for vm in there {
            self.tracking_unproven(&vm, now);
        }
    }
}

/// Whether two readings of a host's start are of two starts. What is not told is not held against the host. The reading
/// is the wall clock less the time since the start, so it moves when the clock is set; a start that is taken for another
/// one because of that costs a check, nothing else.
fn restarted(before_ms: u64, now_ms: u64) -> bool {
    before_ms != 0 && now_ms != 0 && before_ms.abs_diff(now_ms) > START_TOLERANCE_MS
}
