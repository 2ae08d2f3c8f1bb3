//! Hosts.

use serde::{Deserialize, Serialize};

use super::{Outcome, State};

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
}

/// What an agent says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Attached {
    pub(crate) host: String,
    pub(crate) realm: String,
    pub(crate) version: String,
    pub(crate) hypervisor: String,
    pub(crate) boot_id: u64,
}

impl State {
    pub(super) fn host_attached(&mut self, a: Attached, now: u64) -> Outcome {
        let was_up = self.hosts.get(&a.host).is_some_and(|h| h.up);
        let since_ms = self.hosts.get(&a.host).filter(|_| was_up).map_or(now, |h| h.since_ms);
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
        let there: Vec<_> = self
            .vms
            .iter()
            .filter(|(_, v)| v.host.as_deref() == Some(host))
            .map(|(k, _)| k.clone())
            .collect();
        for vm in there {
            self.tracking_unproven(&vm);
        }
        for (job, epoch) in self.jobs.leased_to(host) {
            self.lease_lost(job, epoch, "the host is down", 0, now);
        }
        Outcome::Done
    }
}
