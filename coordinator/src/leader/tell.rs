//! Telling: compares the state with what each session has been told, and sends the difference.

use outrider_proto::rpc::{self, agent_down::What, storage_down};

use super::offer::{lease_message, wire_layout};
use super::sessions::{Agent, Storage};
use super::{Leader, Reign};
use crate::lease::Held;
use crate::state::State;
use crate::state::jobs::Job;

impl Leader {
    /// Brings all sessions up to date. A session whose queue is full is cut; it attaches anew.
    pub(super) fn tell(&self, term: u64) {
        let layout = wire_layout(&self.layout());
        let slow = self.reigning(|reign| {
            if reign.term != term {
                return Vec::new();
            }
            let Reign { agents, storage, .. } = reign;
            let mut slow = Vec::new();
            self.member.replica().read(|state| {
                for (host, agent) in agents.iter_mut() {
                    if self.tell_agent(host, agent, state, layout.as_ref(), term).is_none() {
                        slow.push(host.clone());
                    }
                }
            });
            for host in &slow {
                agents.remove(host);
            }
            storage.retain(|_, session| self.tell_storage(session, layout.as_ref()).is_some());
            slow
        });
        for host in slow.unwrap_or_default() {
            tracing::warn!(host, "the agent does not read its stream; it was cut off");
        }
    }

    fn tell_agent(
        &self,
        host: &str,
        agent: &mut Agent,
        state: &State,
        layout: Option<&rpc::Layout>,
        term: u64,
    ) -> Option<()> {
        let keys = self.keys()?;
        let down = agent.down.clone();
        let send = |what: What| down.try_send(Ok(rpc::AgentDown { what: Some(what) })).ok();
        let (boot_id, beat) = (agent.boot_id(), agent.beat);
        let told = &mut agent.told;
        if !told.welcome {
            send(What::Welcome(self.welcome(layout.cloned(), keys.ticket_public(), term)))?;
            told.welcome = true;
        } else if let Some(layout) = layout
            && told.layout.as_ref() != Some(layout)
        {
            send(What::Layout(layout.clone()))?;
        }
        told.layout = layout.cloned();
        for job in state.jobs.unfinished() {
            let Some(lease) = job.lease().filter(|lease| lease.host == host) else { continue };
            let held = (job.id, lease.epoch);
            if told.leases.contains_key(&held) || lease.boot_id != boot_id {
                continue;
            }
            let predecessor_open = state.jobs.has_open_predecessor(job);
            let message = lease_message(
                &self.settings,
                keys,
                state,
                job,
                lease,
                layout.cloned(),
                beat,
                predecessor_open,
                self.member.clock().unix_millis(),
            );
            send(What::Lease(message))?;
            told.leases.insert(held, predecessor_open);
        }
        let mut ended: Vec<Held> = Vec::new();
        for (held, waits) in &mut told.leases {
            let job = state.jobs.get(held.0);
            match job.filter(|job| job.current(held.1).is_some()) {
                Some(job) if *waits && !state.jobs.has_open_predecessor(job) => {
                    send(What::OldHostClosed(rpc::SourcesClosed {
                        job_id: held.0.to_string(),
                        lease_epoch: held.1.0,
                    }))?;
                    *waits = false;
                }
                Some(_) => {}
                None => {
                    let open = state.jobs.open().any(|(j, a)| (j.id, a.epoch) == *held);
                    if open {
                        send(What::Ended(rpc::LeaseEnded {
                            job_id: held.0.to_string(),
                            lease_epoch: held.1.0,
                            reason: job.map(|job| job.superseded(held.1)).unwrap_or_default(),
                            cancelled: job.is_some_and(Job::is_cancelled),
                        }))?;
                    }
                    ended.push(*held);
                }
            }
        }
        for held in ended {
            told.leases.remove(&held);
        }
        Some(())
    }

    fn tell_storage(&self, session: &mut Storage, layout: Option<&rpc::Layout>) -> Option<()> {
        let down = session.down.clone();
        let send = |what| down.try_send(Ok(rpc::StorageDown { what: Some(what) })).ok();
        if !session.facts
            && let Some(keys) = self.keys()
        {
            send(storage_down::What::Facts(rpc::FabricFacts {
                fabric: self.settings.fabric.to_string(),
                ticket_key: keys.ticket_public(),
            }))?;
            session.facts = true;
        }
        if let Some(layout) = layout
            && session.layout.as_ref() != Some(layout)
        {
            send(storage_down::What::Layout(layout.clone()))?;
            session.layout = Some(layout.clone());
        }
        Some(())
    }

    fn welcome(&self, layout: Option<rpc::Layout>, ticket_key: Vec<u8>, term: u64) -> rpc::Welcome {
        let millis = |d: std::time::Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        let lease = &self.settings.lease;
        rpc::Welcome {
            fabric: self.settings.fabric.to_string(),
            lease_ms: millis(lease.duration),
            cutoff_ms: millis(lease.cutoff),
            renew_ms: millis(lease.renew),
            layout,
            ticket_key,
            leader_term: term,
        }
    }
}
