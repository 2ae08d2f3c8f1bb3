//! Hosts with addresses of their own: each in a network namespace, joined by a switch in another one, which this process
//! reaches over one link. A host is cut off by taking its port at the switch down.
//!
//! The namespaces have no names: a keeper process holds each, and leaves when its standard input closes. So they are
//! gone with the owner, however that ends, and every interface with them.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::{Error, run};
use crate::keeper::Keeper;

/// A network namespace.
#[derive(Debug)]
struct Space {
    keeper: Keeper,
}

impl Space {
    fn new() -> Result<Self, Error> {
        let fail = |source| Error::Start { command: "unshare".to_owned(), source };
        let script = "ip link set lo up && echo up && exec cat >/dev/null";
        let mut shell = Command::new("unshare");
        let (keeper, line) =
            Keeper::start(shell.args(["--net", "sh", "-c", script])).map_err(fail)?;
        if line == "up" {
            return Ok(Self { keeper });
        }
        Err(fail(std::io::Error::other("no network namespace could be made: not permitted here?")))
    }

    /// What runs a program inside; it stays the same process.
    fn inside(&self) -> Vec<OsString> {
        let place = format!("--net=/proc/{}/ns/net", self.keeper.id());
        ["nsenter", &place, "--"].map(OsString::from).to_vec()
    }

    fn ip(&self, arguments: &str) -> Result<(), Error> {
        let inside = self.inside();
        let mut command = Command::new(&inside[0]);
        command.args(&inside[1..]).arg("ip").args(arguments.split(' '));
        run(&mut command).map(drop)
    }
}

/// A switch, hosts around it, and this process's own link to it.
#[derive(Debug)]
pub struct Network {
    /// Dropped last but one: its interfaces go with it, ours included.
    hosts: BTreeMap<String, (Space, IpAddr)>,
    switch: Space,
    /// Address of this process on that network.
    pub outside: IpAddr,
}

impl Network {
    /// Makes a network with these hosts.
    ///
    /// # Errors
    /// When namespaces are not permitted here, or `ip` and its kin are missing.
    pub fn new(hosts: &[&str]) -> Result<Self, Error> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let process = std::process::id();
        // 198.18.0.0/15 is set aside for tests of networks.
        let subnet = u8::try_from((process + number) % 250).unwrap_or(0);
        let address = |host: u8| IpAddr::V4(Ipv4Addr::new(198, 18, subnet, host));
        let switch = Space::new()?;
        switch.ip("link add switch type bridge")?;
        switch.ip("link set switch up")?;
        let outside = address(1);
        let link = format!("or{process:x}x{number:x}");
        run(Command::new("ip")
            .args(["link", "add", &link, "type", "veth", "peer", "name", "out"])
            .args(["netns", &switch.keeper.id().to_string()]))?;
        switch.ip("link set out master switch up")?;
        run(Command::new("ip").args(["address", "add", &format!("{outside}/24"), "dev", &link]))?;
        run(Command::new("ip").args(["link", "set", &link, "up"]))?;
        let mut joined = BTreeMap::new();
        for (place, host) in (2..).zip(hosts) {
            let space = Space::new()?;
            let pid = space.keeper.id();
            switch.ip(&format!("link add port{place} type veth peer name eth0 netns {pid}"))?;
            switch.ip(&format!("link set port{place} master switch up"))?;
            space.ip(&format!("address add {}/24 dev eth0", address(place)))?;
            space.ip("link set eth0 up")?;
            joined.insert((*host).to_owned(), (space, address(place)));
        }
        Ok(Self { hosts: joined, switch, outside })
    }

    fn host(&self, host: &str) -> Result<&(Space, IpAddr), Error> {
        let unknown = || Error::Unknown { kind: "host", name: host.to_owned() };
        self.hosts.get(host).ok_or_else(unknown)
    }

    /// A host's address.
    ///
    /// # Errors
    /// [`Error::Unknown`].
    pub fn address(&self, host: &str) -> Result<IpAddr, Error> {
        Ok(self.host(host)?.1)
    }

    /// What runs a program on a host: to be put before its command line.
    ///
    /// # Errors
    /// [`Error::Unknown`].
    pub fn on(&self, host: &str) -> Result<Vec<OsString>, Error> {
        Ok(self.host(host)?.0.inside())
    }

    /// Cuts a host off, or joins it again.
    ///
    /// # Errors
    /// [`Error::Unknown`], or of `ip`.
    pub fn cut(&self, host: &str, cut: bool) -> Result<(), Error> {
        let IpAddr::V4(address) = self.address(host)? else { return Ok(()) };
        let state = if cut { "down" } else { "up" };
        self.switch.ip(&format!("link set port{} {state}", address.octets()[3]))
    }

    /// Parts hosts from each other, or joins them again. Each still reaches everybody else; what they send each other is
    /// lost without a word, as on a link that broke.
    ///
    /// # Errors
    /// [`Error::Unknown`], or of `ip`.
    pub fn part(&self, hosts: &[&str], apart: bool) -> Result<(), Error> {
        let state = if apart { "on" } else { "off" };
        for host in hosts {
            let IpAddr::V4(address) = self.address(host)? else { continue };
            let port = address.octets()[3];
            self.switch.ip(&format!("link set port{port} type bridge_slave isolated {state}"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reaches(network: &Network, from: &str, to: IpAddr) -> bool {
        let on = network.on(from).expect("a host");
        // The shell's own: no further tool is needed. The other side refuses (nobody listens), or is silent.
        let script = format!("exec 2>&1; timeout 1 bash -c 'exec 3<>/dev/tcp/{to}/9'");
        let said = Command::new(&on[0]).args(&on[1..]).args(["bash", "-c", &script]).output();
        String::from_utf8_lossy(&said.expect("bash").stdout).contains("refused")
    }

    #[test]
    fn hosts_reach_each_other_until_one_is_cut_off_and_nothing_stays() {
        let network = match Network::new(&["a", "b"]) {
            Ok(network) => network,
            Err(reason) => {
                eprintln!("SKIPPED: {reason}");
                return;
            }
        };
        let b = network.address("b").expect("a host");
        assert!(reaches(&network, "a", b) && reaches(&network, "b", network.outside));
        network.cut("b", true).expect("cut");
        assert!(!reaches(&network, "a", b) && !reaches(&network, "b", network.outside));
        network.cut("b", false).expect("joined");
        assert!(reaches(&network, "a", b));
        network.part(&["a", "b"], true).expect("parted");
        assert!(!reaches(&network, "a", b) && reaches(&network, "b", network.outside));
        network.part(&["a", "b"], false).expect("joined");
        assert!(reaches(&network, "a", b));
        let links = || run(Command::new("ip").args(["-brief", "link"])).expect("listed");
        let ours = format!("or{:x}x", std::process::id());
        assert!(links().contains(&ours));
        drop(network);
        // The kernel takes a namespace apart a moment after its last process.
        let began = std::time::Instant::now();
        while links().contains(&ours) {
            assert!(began.elapsed().as_secs() < 30, "{}", links());
            std::thread::yield_now();
        }
    }
}
