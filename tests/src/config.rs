//! The configuration files of a small, fast fabric.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;

use crate::fabric::Plan;

/// A text as TOML writes it; paths and names of tests hold nothing that Rust would escape in another way.
fn text(value: impl std::fmt::Display) -> String {
    format!("{:?}", value.to_string())
}

fn list(values: &[String]) -> String {
    values.iter().map(text).collect::<Vec<_>>().join(", ")
}

fn rim(plan: &Plan) -> String {
    let level = if plan.verbose { "debug" } else { "info" };
    let mut out = format!(
        "observability = \"127.0.0.1:0\"\nlog = {{ filter = \"warn,outrider={level},\
         outrider_coordinator={level},outrider_storage={level},outrider_storage_client={level},\
         outrider_node={level},outrider_process={level}\" }}\n"
    );
    if let Some(endpoint) = &plan.otlp {
        let _ = writeln!(out, "telemetry = {{ otlp_endpoint = {} }}", text(endpoint));
    }
    out
}

/// Where the VMs of a host are.
#[derive(Debug, Clone, Copy)]
pub struct RealHost<'a> {
    /// Folder of the sockets.
    pub sockets: &'a Path,
    /// Folder that restores may use.
    pub images: &'a Path,
    /// More settings of `[qemu]`, as TOML.
    pub more: &'a str,
}

/// What all processes know of the fabric.
#[derive(Debug, Clone)]
pub struct Ground<'a> {
    /// The plan.
    pub plan: &'a Plan,
    /// The fabric's id.
    pub fabric: &'a str,
    /// Its folder.
    pub dir: &'a Path,
    /// Addresses of the coordinators, in the order of their ids (from 1).
    pub coordinators: &'a [String],
    /// The hosts' realm.
    pub realm: &'a str,
}

impl Ground<'_> {
    fn identity(&self, role: &str, name: &str) -> String {
        text(self.dir.join("identities").join(format!("{role}-{name}")).display())
    }

    fn data(&self, role: &str, name: &str) -> String {
        text(self.dir.join(format!("{role}-{name}")).display())
    }

    /// `coordinator.toml` of the member with this place in the list.
    #[must_use]
    pub fn coordinator(&self, place: usize) -> String {
        let id = place + 1;
        let name = format!("c{id}");
        let members: Vec<String> = (1..)
            .zip(self.coordinators)
            .map(|(id, address)| format!("{{ id = {id}, address = {} }}", text(address)))
            .collect();
        let plan = self.plan;
        let [duration, renew, cutoff] = plan.lease_ms;
        format!(
            "name = {name}\nid = {id}\nfabric = {fabric}\nidentity_dir = {identity}\ndata_dir = {data}\n\
             kek_file = {kek}\nlisten = {listen}\nmembers = [{members}]\n\
             lease = {{ duration = \"{duration}ms\", renew = \"{renew}ms\", cutoff = \"{cutoff}ms\" }}\n\
             storage = {{ nodes = {nodes}, pg_count = 8, replicas = {replicas}, min_durable = {min_durable} }}\n\
             raft = {{ heartbeat = \"100ms\", election_min = \"500ms\", election_max = \"1000ms\" }}\n\
             enrolment = {{ valid = \"{enrolled_for}\" }}\n\
             limits = {{ back_off = \"100ms\", back_off_max = \"1s\" }}\n{rim}{more}",
            more = plan.coordinator_settings,
            enrolled_for = plan.enrolled_for,
            name = text(&name),
            fabric = text(self.fabric),
            identity = self.identity("coordinator", &name),
            data = self.data("coordinator", &name),
            kek = text(self.dir.join("kek").display()),
            listen = text(&self.coordinators[place]),
            members = members.join(", "),
            nodes = plan.storage,
            replicas = plan.replicas,
            min_durable = plan.min_durable,
            rim = rim(plan),
        )
    }

    /// `storage.toml`.
    #[must_use]
    pub fn storage(&self, name: &str) -> String {
        format!(
            "name = {name}\nfabric = {fabric}\nidentity_dir = {identity}\ndata_dir = {data}\n\
             listen = {listen}\ncoordinators = [{coordinators}]\nzone = {name}\n\
             capacity = \"{capacity}\"\nsegment_size = \"16 MiB\"\nlimits = {{ min_free = \"{min_free}\" }}\n{rim}",
            name = text(name),
            fabric = text(self.fabric),
            identity = self.identity("storage", name),
            data = self.data("storage", name),
            coordinators = list(self.coordinators),
            listen = text(SocketAddr::new(self.plan.address, 0)),
            capacity = self.plan.capacity,
            min_free = self.plan.min_free,
            rim = rim(self.plan),
        )
    }

    /// `node.toml` of the agent on a host of the lab.
    #[must_use]
    pub fn node(&self, host: &str, lab: SocketAddr) -> String {
        format!(
            "name = {name}\nfabric = {fabric}\nrealm = {realm}\nidentity_dir = {identity}\n\
             coordinators = [{coordinators}]\nscratch_dir = {scratch}\nhypervisor = \"lab\"\n\
             lab = {{ address = {lab} }}\nlimits = {{ read_size = \"1 MiB\", in_flight = \"16 MiB\" }}\n\
             jobs = {{ barrier_interval = \"{barrier}\", busy_first = \"20ms\", \
             busy_ceiling = \"200ms\", merge_wait = \"{merge}\", storage_patience = \"{patience}\", \
             vm_wait = \"{vm_wait}\", inventory_interval = \"{inventory}\" }}\n{rim}{more}",
            name = text(host),
            fabric = text(self.fabric),
            realm = text(self.realm),
            identity = self.identity("node", host),
            coordinators = list(self.coordinators),
            scratch = self.data("node", host),
            inventory = self.plan.inventory_interval,
            vm_wait = self.plan.vm_wait,
            lab = text(lab),
            more = self.plan.node_settings,
            patience = self.plan.storage_patience,
            merge = self.plan.merge_wait,
            barrier = self.plan.barrier_interval,
            rim = rim(self.plan),
        )
    }

    /// `node.toml` of the agent on a host with real VMs.
    #[must_use]
    pub fn node_with_qemu(&self, host: &str, real: &RealHost<'_>) -> String {
        format!(
            "name = {name}\nfabric = {fabric}\nrealm = {realm}\nidentity_dir = {identity}\n\
             coordinators = [{coordinators}]\nscratch_dir = {scratch}\nhypervisor = \"qemu\"\n\
             qemu = {{ sockets = {sockets}, images = [{images}], {more} }}\n\
             limits = {{ read_size = \"1 MiB\", in_flight = \"16 MiB\" }}\n\
             jobs = {{ barrier_interval = \"{barrier}\", busy_first = \"20ms\", \
             busy_ceiling = \"200ms\", merge_wait = \"{merge}\", storage_patience = \"{patience}\" }}\n{rim}",
            name = text(host),
            fabric = text(self.fabric),
            realm = text(self.realm),
            identity = self.identity("node", host),
            coordinators = list(self.coordinators),
            scratch = self.data("node", host),
            sockets = text(real.sockets.display()),
            images = text(real.images.display()),
            more = real.more,
            patience = self.plan.storage_patience,
            merge = self.plan.merge_wait,
            barrier = self.plan.barrier_interval,
            rim = rim(self.plan),
        )
    }

    /// `lab.toml`.
    #[must_use]
    pub fn lab(&self) -> String {
        let csv = |name: &str| {
            format!("{{ name = {}, path = {} }}", text(name), text(self.dir.join(name).display()))
        };
        format!(
            "realm = {realm}\nhosts = [{hosts}]\ncsvs = [{csv1}, {csv2}]\nseed = 1\n\
             delays = {{ job_ms = 2, migration_ms = 5, merge_ms = 2 }}\n\
             truth = {{ dir = {truth}, keep = 4 }}\n",
            realm = text(self.realm),
            hosts = list(&[&self.plan.hosts[..], &self.plan.unmanned[..]].concat()),
            csv1 = csv("Volume1"),
            csv2 = csv("Volume2"),
            truth = text(self.dir.join("truth").display()),
        )
    }
}

/// The simulated failover cluster's name.
pub const REALM: &str = "cluster";
