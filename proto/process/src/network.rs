//! Which of a machine's networks its connections take (O8).
//!
//! A hypervisor host has networks that backups must not touch: the one of the cluster's own traffic, live migration,
//! storage. `source` names the subnets (or addresses) that connections leave from, in the order of preference; what lies
//! in `avoid` is neither left from nor connected to. Both are strict: where nothing fits, the connection is refused with a
//! sentence instead of taking another way.
//!
//! A failover cluster says itself which networks are its own only; whoever reads that tells it here
//! ([`Network::keep_off`]), and they are avoided, too, unless `source` names them.

use std::fmt;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::str::FromStr;
use std::sync::{Arc, PoisonError, RwLock};

use ipnet::IpNet;
use serde::Deserialize;

/// `[network]` of a configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetworkConfig {
    /// Subnets or addresses of this machine that connections leave from, preferred first; empty: as the system chooses.
    pub source: Vec<Subnet>,
    /// Subnets that are never used.
    pub avoid: Vec<Subnet>,
}

/// A subnet, or one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnet(IpNet);

impl Subnet {
    /// The subnet that an address with this many leading bits lies in; `None` when there are not so many.
    #[must_use]
    pub fn of(address: IpAddr, bits: u8) -> Option<Self> {
        IpNet::new(address, bits).ok().map(|net| Self(net.trunc()))
    }

    fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address)
    }
}

/// A text that is no subnet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no subnet: write for example \"10.1.0.0/16\", \"fd00::/8\" or \"10.1.2.3\"")]
pub struct NotASubnet(String);

impl FromStr for Subnet {
    type Err = NotASubnet;

    fn from_str(text: &str) -> Result<Self, NotASubnet> {
        let text = text.trim();
        let subnet = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        subnet.map(|net| Self(net.trunc())).map_err(|_| NotASubnet(text.to_owned()))
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.prefix_len() == self.0.max_prefix_len() {
            write!(f, "{}", self.0.addr())
        } else {
            write!(f, "{}", self.0)
        }
    }
}

impl<'de> Deserialize<'de> for Subnet {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Why a connection is not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetworkError {
    /// The other end lies in an avoided network.
    #[error("{remote} lies in {subnet}, which {by}")]
    Avoided {
        /// The other end.
        remote: IpAddr,
        /// The forbidden subnet.
        subnet: String,
        /// Who forbids it.
        by: Forbidden,
    },
    /// No address of ours fits.
    #[error(
        "no {family} address of this machine lies in {wanted} (`[network] source`), so {remote} is not connected to"
    )]
    NoSource {
        /// The other end.
        remote: IpAddr,
        /// IPv4 or IPv6.
        family: &'static str,
        /// The subnets asked for.
        wanted: String,
    },
    /// The system would take a forbidden way.
    #[error(
        "the way to {remote} leaves from {local}, which {by}; name the subnet to leave from in `[network] source`"
    )]
    Way {
        /// The other end.
        remote: IpAddr,
        /// Where it would leave from.
        local: IpAddr,
        /// Who forbids it.
        by: Forbidden,
    },
}

/// Who keeps us off a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forbidden {
    /// The operator.
    Configured,
    /// The failover cluster.
    Cluster,
}

impl fmt::Display for Forbidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Configured => "`[network] avoid` forbids",
            Self::Cluster => "is the failover cluster's own network (role \"cluster only\")",
        })
    }
}

/// The choice of networks of one process. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Network {
    config: NetworkConfig,
    cluster: Arc<RwLock<Vec<Subnet>>>,
}

impl Network {
    /// With these preferences.
    #[must_use]
    pub fn new(config: NetworkConfig) -> Self {
        Self { config, cluster: Arc::default() }
    }

    /// Networks that a failover cluster has for itself, in place of those told before. All clones keep off them from now
    /// on; connections that stand are left alone.
    pub fn keep_off(&self, cluster_only: Vec<Subnet>) {
        let named =
            |only: &Subnet| self.config.source.iter().any(|source| only.0.contains(&source.0));
        let off: Vec<Subnet> = cluster_only.into_iter().filter(|only| !named(only)).collect();
        let mut now = self.cluster.write().unwrap_or_else(PoisonError::into_inner);
        if *now != off {
            let networks: Vec<String> = off.iter().map(ToString::to_string).collect();
            tracing::info!(?networks, "the cluster's own networks are not used");
            *now = off;
        }
    }

    fn rules(&self) -> Rules<'_> {
        let cluster = self.cluster.read().unwrap_or_else(PoisonError::into_inner).clone();
        Rules { config: &self.config, cluster }
    }

    /// Whether the system chooses everything.
    #[must_use]
    pub fn is_any(&self) -> bool {
        let rules = self.rules();
        *rules.config == NetworkConfig::default() && rules.cluster.is_empty()
    }

    /// The address to connect from; `None`: as the system chooses. Addresses are looked up each time: they come and go.
    ///
    /// # Errors
    /// [`NetworkError`]: the operator has to change something.
    pub fn source_for(&self, remote: IpAddr) -> Result<Option<IpAddr>, NetworkError> {
        if self.is_any() {
            return Ok(None);
        }
        // A system that does not tell its addresses has none that fits.
        let locals = if_addrs::get_if_addrs().unwrap_or_default();
        let locals: Vec<IpAddr> = locals.iter().map(if_addrs::Interface::ip).collect();
        choose(&self.rules(), &locals, remote, way_to)
    }

    /// Addresses of the other end in the order to try them: preferred subnets first, forbidden ones not at all.
    #[must_use]
    pub fn order(&self, mut remotes: Vec<SocketAddr>) -> Vec<SocketAddr> {
        let rules = self.rules();
        remotes.retain(|at| rules.forbids(plain(at.ip())).is_none());
        let rank = |at: &SocketAddr| {
            let place = self.config.source.iter().position(|net| net.contains(plain(at.ip())));
            place.unwrap_or(usize::MAX)
        };
        remotes.sort_by_key(rank);
        remotes
    }
}

/// An IPv4 address that came in IPv6 clothes.
fn plain(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

/// What may be used.
struct Rules<'a> {
    config: &'a NetworkConfig,
    cluster: Vec<Subnet>,
}

impl Rules<'_> {
    fn forbids(&self, address: IpAddr) -> Option<(Subnet, Forbidden)> {
        let of = |nets: &[Subnet], by| {
            nets.iter().find(|net| net.contains(address)).map(|net| (*net, by))
        };
        of(&self.config.avoid, Forbidden::Configured)
            .or_else(|| of(&self.cluster, Forbidden::Cluster))
    }
}

fn choose(
    rules: &Rules<'_>,
    locals: &[IpAddr],
    remote: IpAddr,
    way: impl Fn(IpAddr) -> Option<IpAddr>,
) -> Result<Option<IpAddr>, NetworkError> {
    let remote = plain(remote);
    if remote.is_loopback() {
        return Ok(None);
    }
    if let Some((subnet, by)) = rules.forbids(remote) {
        return Err(NetworkError::Avoided { remote, subnet: subnet.to_string(), by });
    }
    let config = rules.config;
    if config.source.is_empty() {
        let way = way(remote).map(plain);
        return match way.and_then(|local| rules.forbids(local).map(|(_, by)| (local, by))) {
            Some((local, by)) => Err(NetworkError::Way { remote, local, by }),
            None => Ok(None),
        };
    }
    let usable = |local: &&IpAddr| {
        local.is_ipv4() == remote.is_ipv4()
            && !local.is_loopback()
            && rules.forbids(**local).is_none()
    };
    let found = config
        .source
        .iter()
        .find_map(|net| locals.iter().filter(usable).find(|local| net.contains(**local)).copied());
    found.map(Some).ok_or_else(|| NetworkError::NoSource {
        remote,
        family: if remote.is_ipv4() { "IPv4" } else { "IPv6" },
        wanted: config.source.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    })
}

/// Where the system would leave from. Nothing is sent.
fn way_to(remote: IpAddr) -> Option<IpAddr> {
    let any: SocketAddr =
        if remote.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect((remote, 9)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(source: &[&str], avoid: &[&str]) -> NetworkConfig {
        let parse = |all: &[&str]| all.iter().map(|t| t.parse().expect("a subnet")).collect();
        NetworkConfig { source: parse(source), avoid: parse(avoid) }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    const LOCALS: [&str; 5] = ["127.0.0.1", "192.168.7.4", "10.1.2.3", "fe80::1", "fd00::3"];

    fn chosen(
        source: &[&str],
        avoid: &[&str],
        remote: &str,
    ) -> Result<Option<IpAddr>, NetworkError> {
        let locals = LOCALS.map(ip);
        let network = Network::new(config(source, avoid));
        choose(&network.rules(), &locals, ip(remote), |r| {
            Some(if r.is_ipv4() { ip("192.168.7.4") } else { ip("fd00::3") })
        })
    }

    #[test]
    fn the_first_preferred_subnet_with_an_address_of_ours_is_taken() {
        assert_eq!(chosen(&["10.0.0.0/8"], &[], "172.16.0.1"), Ok(Some(ip("10.1.2.3"))));
        let both = ["172.16.0.0/12", "192.168.0.0/16", "10.0.0.0/8"];
        assert_eq!(chosen(&both, &[], "8.8.8.8"), Ok(Some(ip("192.168.7.4"))));
        assert_eq!(chosen(&["10.1.2.3"], &[], "8.8.8.8"), Ok(Some(ip("10.1.2.3"))));
        let mixed = ["10.0.0.0/8", "fd00::/8"];
        assert_eq!(
            chosen(&mixed, &[], "2001:db8::1"),
            Ok(Some(ip("fd00::3"))),
            "of its own family"
        );
        assert_eq!(chosen(&mixed, &[], "::ffff:172.16.0.1"), Ok(Some(ip("10.1.2.3"))));
        assert_eq!(chosen(&[], &[], "8.8.8.8"), Ok(None));
        assert_eq!(
            chosen(&["10.0.0.0/8"], &[], "127.0.0.1"),
            Ok(None),
            "this machine is everywhere"
        );
    }

    #[test]
    fn a_forbidden_network_is_neither_left_from_nor_connected_to() {
        let error = chosen(&[], &["172.16.0.0/12"], "172.16.0.1").expect_err("forbidden");
        assert!(error.to_string().contains("172.16.0.0/12"), "{error}");
        let error = chosen(&[], &["192.168.0.0/16"], "8.8.8.8").expect_err("leads through it");
        assert!(error.to_string().contains("192.168.7.4"), "{error}");
        let both = ["192.168.0.0/16", "10.0.0.0/8"];
        assert_eq!(chosen(&both, &["192.168.7.0/24"], "8.8.8.8"), Ok(Some(ip("10.1.2.3"))));
        let error = chosen(&["172.16.0.0/12"], &[], "8.8.8.8").expect_err("strict");
        assert!(error.to_string().contains("no IPv4 address"), "{error}");
        chosen(&["10.0.0.0/8"], &[], "2001:db8::1").expect_err("no IPv6 source");
    }

    /// O8: never the cluster's own network by default.
    #[test]
    fn a_network_of_the_cluster_is_used_only_when_it_is_named() {
        let only = |text: &str| text.parse::<Subnet>().expect("a subnet");
        let way = |_| Some(ip("10.1.2.3"));
        let choose_with = |source: &[&str], remote: &str| {
            let network = Network::new(config(source, &[]));
            network.keep_off(vec![only("10.1.0.0/16")]);
            choose(&network.rules(), &LOCALS.map(ip), ip(remote), way)
        };
        let error = choose_with(&[], "10.1.9.9").expect_err("the cluster's own").to_string();
        assert!(error.contains("10.1.0.0/16") && error.contains("cluster only"), "{error}");
        let error = choose_with(&[], "8.8.8.8").expect_err("leads through it").to_string();
        assert!(error.contains("10.1.2.3") && error.contains("`[network] source`"), "{error}");
        assert_eq!(choose_with(&["192.168.0.0/16"], "8.8.8.8"), Ok(Some(ip("192.168.7.4"))));
        // Part of a wide preference is not named by it.
        choose_with(&["10.0.0.0/8"], "8.8.8.8").expect_err("10.1.0.0/16 was not named");
        for named in ["10.1.0.0/16", "10.1.2.3"] {
            assert_eq!(choose_with(&[named], "10.1.9.9"), Ok(Some(ip("10.1.2.3"))), "{named}");
        }
        // All clones hear it, also that it is over.
        let network = Network::default();
        let clone = network.clone();
        network.keep_off(vec![only("10.1.0.0/16")]);
        let at = vec!["10.1.9.9:1".parse::<SocketAddr>().expect("an address")];
        assert_eq!((clone.order(at.clone()), clone.is_any()), (vec![], false));
        network.keep_off(vec![]);
        assert_eq!((clone.order(at.clone()), clone.is_any()), (at, true));
    }

    #[test]
    fn a_subnet_is_told_by_an_address_and_its_bits() {
        assert_eq!(
            Subnet::of(ip("10.1.2.3"), 16).map(|s| s.to_string()),
            Some("10.1.0.0/16".into())
        );
        assert_eq!(Subnet::of(ip("fd00::1"), 64).map(|s| s.to_string()), Some("fd00::/64".into()));
        assert_eq!(Subnet::of(ip("10.1.2.3"), 33), None);
    }

    #[test]
    fn addresses_of_the_other_end_are_tried_in_the_order_of_preference() {
        let at = |text: &str| text.parse::<SocketAddr>().expect("an address");
        let all = ["192.168.7.9:1", "10.9.9.9:1", "[fd00::9]:1", "172.16.0.9:1"].map(at).to_vec();
        let network = Network::new(config(&["fd00::/8", "10.0.0.0/8"], &["172.16.0.0/12"]));
        let wanted = ["[fd00::9]:1", "10.9.9.9:1", "192.168.7.9:1"].map(at).to_vec();
        assert_eq!(network.order(all.clone()), wanted);
        assert_eq!(Network::default().order(all.clone()), all);
    }

    #[test]
    fn what_is_no_subnet_is_refused() {
        for text in ["", "10.0.0.0/33", "ten", "10.0.0.0/8/8", "host:1"] {
            assert!(text.parse::<Subnet>().is_err(), "{text}");
        }
        let subnet: Subnet = "10.1.2.3/16".parse().expect("a subnet");
        assert_eq!(subnet.to_string(), "10.1.0.0/16");
    }
}
