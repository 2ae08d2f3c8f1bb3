//! A second simulated cluster in the same fabric.

use outrider_lab::LabControl;
use outrider_process::identity::Role;

use crate::config::Ground;
use crate::eventually;
use crate::fabric::{DAY, Fabric, Plan, identity_dir, only_address};
use crate::process::Process;

/// A cluster of one host. Its first VM has the GUID of the first one of the other cluster, when both have one name.
pub struct Far {
    /// The cluster.
    pub lab: LabControl,
    /// Its host's agent.
    pub agent: Process,
    // Kept alive.
    _lab: Process,
}

impl Fabric {
    /// Starts it, and waits until its host is known.
    pub async fn second_cluster(&self, realm: &str, host: &str) -> Far {
        let place = identity_dir(self.dir(), Role::Node, host);
        self.ca.issue(Role::Node, host, DAY).expect("issued").save(&place).expect("saved");
        let plan = Plan { hosts: vec![host.to_owned()], unmanned: vec![], ..self.plan.clone() };
        let dir = self.dir().join(realm);
        std::fs::create_dir_all(&dir).expect("made");
        let fabric = self.ca.fabric();
        let of = |dir| Ground { plan: &plan, fabric, dir, coordinators: &self.addresses, realm };
        let mut process = Process::start("lab", realm, self.dir(), &of(&dir).lab());
        let address = only_address(&mut process).await;
        let lab = LabControl::connect(address).await.expect("the lab answers");
        let config = of(self.dir()).node(host, address);
        let mut agent = Process::start("node", host, self.dir(), &config);
        agent.ready().await;
        eventually("the far host is known", async || {
            let hosts = self.operator.hosts().await.map_err(|e| e.to_string())?;
            let up = hosts.iter().any(|h| h.name == host && h.state == "up");
            if up { Ok(()) } else { Err(format!("{hosts:?}")) }
        })
        .await;
        Far { lab, agent, _lab: process }
    }
}
